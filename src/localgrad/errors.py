"""The one base error of the library, and what its messages share."""

from __future__ import annotations

TYPE_CHECKING = False  # without `typing`, which the command line would wait for
if TYPE_CHECKING:
    from collections.abc import Sequence


class LocalGradError(ValueError):
    """What was given cannot be used.

    The message says what was given (name and value), what is allowed, and what to do. Every error that
    localgrad raises about its input is of this class; the command line prints it in one line and leaves
    with exit code 2.
    """


class LocalGradWarning(UserWarning):
    """Something that was given works, but perhaps not as meant; the message says what is left out or assumed."""


class DefaultsWarning(LocalGradWarning):
    """Optional arguments of a model's forward pass stay at their defaults."""


class SettingsError(LocalGradError):
    """An argument is outside what is allowed."""


class NotTraceableError(LocalGradError):
    """The model's forward pass cannot be turned into a chain of units."""


class CannotSitError(LocalGradError):
    """An objective or a momentum network cannot be built at this cut; at another it may."""


class DoesNotFitError(LocalGradError):
    """Nothing that is allowed fits into the memory that there is."""


def check_rules(what: str, rules: list[tuple[str, bool]]) -> None:
    """Refuse `what` with every problem whose rule does not hold, all at once."""
    problems = [problem for problem, holds in rules if not holds]
    if problems:
        raise LocalGradError(f"{what} cannot be used: " + "; ".join(problems))


def closest(name: str, choices: Sequence[str], count: int = 3) -> str:
    """The choices that look most like a mistyped name, as the end of a message: ` (did you mean ...?)`, or nothing."""
    import difflib

    matches = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
