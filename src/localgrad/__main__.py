"""The command `localgrad`, and `python -m localgrad`. Ctrl-C is one line from the first moment on."""

import sys

from localgrad.commands.interrupts import INTERRUPTED, leave_at_once


def main() -> int:
    """Runs the command that the process was started with; see `localgrad.commands.main`."""
    leave_at_once()
    from localgrad.commands.main import main as run

    try:
        return run()
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        return INTERRUPTED
    finally:
        leave_at_once()  # while the interpreter winds up


if __name__ == "__main__":
    sys.exit(main())
