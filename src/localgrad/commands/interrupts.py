"""Ctrl-C while a command loads its modules: one line and exit code 130, at once.

An exception in the middle of an import may come out as another one, or not at all. Nothing has been written by then, so
the process may end where it is. This module loads nothing but `signal`: it has to be there before all others.
"""

import os
import signal
import sys

INTERRUPTED = 130


def leave_at_once() -> None:
    """From here on Ctrl-C ends the process; where it is ignored, as behind `nohup`, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, as work with files needs it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"localgrad: interrupted\n")
    os._exit(INTERRUPTED)
