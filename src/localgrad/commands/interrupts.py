"""Ctrl-C while a command imports its modules: prints one line and exits at once with code 130.

A KeyboardInterrupt during an import may turn into another exception, or get lost. No file has been written by then, so
the process can exit at any point. This module imports little, because it must be imported before all others.
"""

import os
import signal
import sys

INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, once modules are loaded.

    A KeyboardInterrupt that leaves `exec` or `eval` of a string, as in `dataclass`, makes `python -m` end by SIGINT
    whatever exit code the program gives, even if it was caught. Python does not do this for a subclass.
    """


def leave_at_once() -> None:
    """Make Ctrl-C end the process at once. If it is ignored, as under `nohup`, it stays ignored."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _raise):
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Make Ctrl-C raise a KeyboardInterrupt again, so that work on files can clean up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _raise)


def _leave(number: int, frame: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"localgrad: interrupted\n")
    os._exit(INTERRUPTED)


def _raise(number: int, frame: object) -> None:
    raise Interrupted
