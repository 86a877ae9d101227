"""The one base error of the library."""


class LocalGradError(ValueError):
    """What was given cannot be used.

    The message says what was given (name and value), what is allowed, and what to do. Every error that
    localgrad raises about its input is of this class; the command line prints it in one line and leaves
    with exit code 2.
    """
