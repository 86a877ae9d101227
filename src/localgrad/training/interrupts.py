"""Delay Ctrl-C and SIGTERM until the end of a step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts(threading.Event):
    """Event that the first Ctrl-C or SIGTERM sets; `number` is the number of the signal."""

    number: int = signal.SIGINT


class InterruptedRun(KeyboardInterrupt):
    """A run was interrupted by a signal.

    Attributes:
        exit_code: 128 plus the number of the signal, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Context: a first Ctrl-C or SIGTERM sets an event, which training reads between steps; a second raises at once.

    Outside the main thread, which cannot handle signals, the event is never set.
    """
    event = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise InterruptedRun("interrupted at once; the last checkpoint holds", signum)
        event.number = signum
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
