"""The library's errors and warnings, and helpers for their messages."""

from __future__ import annotations

import warnings

TYPE_CHECKING = False  # as type checkers know it: importing `typing` would delay the command line
if TYPE_CHECKING:
    from collections.abc import Sequence


class LocalGradError(ValueError):
    """An input cannot be used: the base class of every error that localgrad raises about its input.

    The message says what was given (name and value), what is allowed, and what to do. The command line prints the
    message without a traceback and exits with code 2.
    """


class LocalGradWarning(UserWarning):
    """An input works, but perhaps not as the user meant; the message says what is left out or assumed."""


class DefaultsWarning(LocalGradWarning):
    """Optional arguments of a model's forward pass stay at their defaults."""


class SettingsError(LocalGradError):
    """The value of an argument is not allowed."""


class NotTraceableError(LocalGradError):
    """The model's forward pass cannot be turned into a chain of units."""


class CannotSitError(LocalGradError):
    """An objective or a momentum network cannot be built at this cut, but perhaps at another one."""


class DoesNotFitError(LocalGradError):
    """No allowed plan fits into the available memory."""


def warn(message: str, kind: type[LocalGradWarning] = LocalGradWarning) -> None:
    """Warn at the line of the user's code: the innermost frame outside of this package and of torch."""
    import inspect  # here, as it would delay the command line

    frame, level = inspect.currentframe(), 1
    while frame and str(frame.f_globals.get("__name__")).split(".")[0] in ("localgrad", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)


def check_rules(what: str, rules: list[tuple[str, bool]]) -> None:
    """Raise one LocalGradError that lists all violated rules.

    Args:
        what: what is checked, the subject of the message.
        rules: pairs of a problem in words, and True if there is no such problem.
    """
    problems = [problem for problem, holds in rules if not holds]
    if problems:
        raise LocalGradError(f"{what} cannot be used: " + "; ".join(problems))


def closest(name: str, choices: Sequence[str], count: int = 3) -> str:
    """End of a message about a mistyped name: ` (did you mean ...?)` with similar choices, or "" if none is similar."""
    import difflib

    matches = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
