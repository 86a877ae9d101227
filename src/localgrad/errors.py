"""The one base error of the library, and whose fault an error is."""

import torch.distributed as dist


class LocalGradError(ValueError):
    """What was given cannot be used.

    The message says what was given (name and value), what is allowed, and what to do. Every error that
    localgrad raises about its input is of this class; the command line prints it in one line and leaves
    with exit code 2.
    """


def of_another_process(error: Exception) -> bool:
    """Whether torch.distributed says with it that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
