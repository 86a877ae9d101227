"""Analyse the features of a finished run: linear probes, CKA with another run, pictures. Writes JSON and PNG files.

Without --probe, --cka or --pictures it runs all three analyses, CKA only if a second run is given.

Examples:
  localgrad analyse runs/first
  localgrad analyse runs/first runs/end-to-end --cka
  localgrad analyse runs/first --pictures --projection tsne --images 3 17 42
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from localgrad.commands.parse import Output, call, loading
from localgrad.runs.files import check_writable


def analyse(
    run_folder: Positional[Path],
    other_run: Positional[Path | None] = None,
    *,
    probe: bool = False,
    cka: bool = False,
    pictures: bool = False,
    output: Output = None,
    data: str | None = None,
    test_split: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    epochs: int = 10,
    batch_size: int = 256,
    images: tuple[int, ...] = (),
    points: int = 500,
    projection: Literal["pca", "tsne"] = "pca",
    accelerator: str = "auto",
) -> int:
    """Run the analyses and print the path of each file.

    Args:
        run_folder: Folder of a finished run.
        other_run: Folder of another finished run, for CKA.
        probe: Train a linear classifier on the frozen features of every unit, and test it.
        cka: Compare the features of every unit with those of every unit of the other run.
        pictures: Draw activation maps of a few images, and project the features of many images to two dimensions.
        output: Folder for the files; by default `analysis` in the run folder.
        data: Other images, as a folder or a hub name; by default those of the run.
        test_split: Split to test on; by default that of the run.
        train_limit: Number of training images for the probes, balanced over the classes.
        test_limit: Number of test images to use, balanced over the classes.
        epochs: Training epochs of the probes.
        batch_size: Images of a batch.
        images: Positions in the test set, from 0, of the images for activation maps; by default one image of each of
            four classes.
        points: Number of test images to project.
        projection: How to project the features to two dimensions.
        accelerator: Device: auto, cpu, cuda or mps.
    """
    check_writable(output or run_folder / "analysis")
    with loading():
        from localgrad.analysis.study import analyse_run
    for path in analyse_run(
        run_folder,
        other_run,
        probe=probe,
        cka=cka,
        pictures=pictures,
        output=output,
        data=data,
        test_split=test_split,
        train_limit=train_limit,
        test_limit=test_limit,
        epochs=epochs,
        batch_size=batch_size,
        images=images,
        points=points,
        projection=projection,
        accelerator=accelerator,
    ):
        print(f"wrote {path}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad analyse RUN [RUN2]`."""
    return call(analyse, arguments, "localgrad analyse", __doc__)
