"""TODO commands.evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import parse
from localgrad.errors import LocalGradError

EVALUATE_HELP = """Test the weights that a finished run left in its folder.

Examples:
  localgrad evaluate runs/first --local-heads
  localgrad evaluate runs/first --exit-at 3
"""


def evaluate(arguments: Sequence[str]) -> int:
    """`localgrad evaluate RUN_FOLDER`."""
    import tyro

    @dataclass(frozen=True)
    class Evaluate:
        run_folder: tyro.conf.Positional[Path]
        """Folder of a finished run."""
        data: str | None = None
        """Other images to test on, all of them: a hub name or a folder; those of the run unless given."""
        test_split: str | None = None
        """Split to test on; that of the run unless given."""
        local_heads: bool = False
        """Test each block's own head too."""
        exit_at: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Run only the first so many blocks and the last one's own head, and say what that saves."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""

    options = parse(Evaluate, arguments, "localgrad evaluate", EVALUATE_HELP)
    from localgrad.results.evaluation import early_exit
    from localgrad.results.evaluation import evaluate as evaluate_run

    if options.exit_at is not None:
        if options.local_heads:
            raise LocalGradError("--exit-at tests one head, --local-heads all of them: give one of the two")
        left = early_exit(
            options.run_folder,
            options.exit_at,
            data=options.data,
            test_split=options.test_split,
            accelerator=options.accelerator,
        )
        print(
            f"test error {left.test_error:.2f}% on {left.images:,} images, after block {options.exit_at} of "
            f"{left.num_blocks}: {left.compute:.1%} of the network's compute, {left.parameters:.1%} of its parameters "
            "(the head counted in)"
        )
        return 0
    found = evaluate_run(
        options.run_folder,
        data=options.data,
        test_split=options.test_split,
        local_heads=options.local_heads,
        accelerator=options.accelerator,
    )
    print(f"test error {found.test_error:.2f}% on {found.images:,} images")
    for number, error in enumerate(found.local_errors or (), start=1):
        print(f"  block {number}: {'no class head' if error is None else f'{error:.2f}%'}")
    return 0
