"""Ctrl-C while a command imports its modules: prints one line and exits at once with code 130.

A KeyboardInterrupt during an import may turn into another exception, or get lost. No file has been written by then, so
the process can exit at any point. This module imports little, because it must be imported before all others.
"""

import os
import signal
import sys

INTERRUPTED = 130


def leave_at_once() -> None:
    """Make Ctrl-C end the process at once. If it is ignored, as under `nohup`, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, so that work on files can clean up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"localgrad: interrupted\n")
    os._exit(INTERRUPTED)
