"""Test the saved weights of a finished run.

Examples:
  localgrad evaluate runs/first --local-heads
  localgrad evaluate runs/first --exit-at 3
"""

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from localgrad.commands.parse import call, loading
from localgrad.errors import LocalGradError


def evaluate(
    run_folder: Positional[Path],
    *,
    data: str | None = None,
    test_split: str | None = None,
    local_heads: bool = False,
    exit_at: int | None = None,
    accelerator: str = "auto",
) -> int:
    """Print the test error.

    Args:
        run_folder: Folder of a finished run.
        data: Other images to test on, as a folder or a hub name; by default those of the run.
        test_split: Split to test on; by default that of the run.
        local_heads: Test each block's own head too.
        exit_at: Test the first blocks up to this one with its own head, and print the share of compute and parameters.
        accelerator: Device: auto, cpu, cuda or mps.
    """
    if exit_at is not None and local_heads:
        raise LocalGradError("--exit-at tests one head, --local-heads all of them: give one of the two")
    with loading():
        from localgrad.results import evaluation

    if exit_at is not None:
        left = evaluation.early_exit(run_folder, exit_at, data=data, test_split=test_split, accelerator=accelerator)
        print(
            f"test error {left.test_error:.2f}% on {left.images:,} images, after block {exit_at} of "
            f"{left.num_blocks}: {left.compute:.1%} of the network's compute, {left.parameters:.1%} of its parameters "
            "(the head counted in)"
        )
        return 0
    found = evaluation.evaluate(
        run_folder, data=data, test_split=test_split, local_heads=local_heads, accelerator=accelerator
    )
    print(f"test error {found.test_error:.2f}% on {found.images:,} images")
    for number, error in enumerate(found.local_errors or (), start=1):
        print(f"  block {number}: {'no class head' if error is None else f'{error:.2f}%'}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad evaluate RUN_FOLDER`."""
    return call(evaluate, arguments, "localgrad evaluate", __doc__)
