"""Ctrl-C and SIGTERM that wait for the end of a step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts(threading.Event):
    """Set by the first Ctrl-C or SIGTERM; `number` is that of the signal."""

    number: int = signal.SIGINT


class InterruptedRun(KeyboardInterrupt):
    """A run that was asked to stop.

    Attributes:
        exit_code: 128 plus the number of the signal, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Context: a first Ctrl-C or SIGTERM sets an event, which training reads between steps; a second acts at once."""
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
