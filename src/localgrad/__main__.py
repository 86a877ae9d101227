"""Entry point of `localgrad` and `python -m localgrad`. Ctrl-C prints one line at any time, never a traceback."""

import sys

from localgrad.commands.interrupts import INTERRUPTED, leave_at_once


def main() -> int:
    """Run the command in `sys.argv`; see `localgrad.commands.main`."""
    leave_at_once()
    from localgrad.commands.main import main as run

    try:
        return run()
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being handled
        return INTERRUPTED
    finally:
        leave_at_once()  # for a Ctrl-C while the interpreter shuts down


if __name__ == "__main__":
    sys.exit(main())
