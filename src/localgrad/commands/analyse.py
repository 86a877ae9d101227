"""Look into the features of a finished run: linear probes, CKA with another run, pictures.

Without --probe, --cka or --pictures it does all of them, CKA where a second run is given. Writes JSON and PNG files.

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
    """Writes the analyses.

    Args:
        run_folder: Folder of a finished run.
        other_run: Folder of another one, to compare with by CKA.
        probe: Train a linear probe on every unit: how far its features tell the classes apart.
        cka: Compare every unit with every unit of the other run.
        pictures: Draw activation maps of some images, and the features of many in two dimensions.
        output: Folder for the files; `analysis` in the run's folder unless given.
        data: Other images: a folder or a hub name; those of the run unless given.
        test_split: Split to test on; that of the run unless given.
        train_limit: Train the probes on so many images only, evenly from each class.
        test_limit: Use so many test images only, evenly from each class.
        epochs: Passes over the training images for the probes.
        batch_size: Images of a batch.
        images: Test images to draw activation maps of, by position from 0; one of each of four classes unless given.
        points: Test images to project.
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
