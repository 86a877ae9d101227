"""TODO commands.analyse."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from localgrad.commands.parse import parse

ANALYSE_HELP = """Look into the features of a finished run: linear probes, CKA with another run, pictures.

Without --probe, --cka or --pictures it does all of them, CKA where a second run is given. Writes JSON and PNG files.

Examples:
  localgrad analyse runs/first
  localgrad analyse runs/first runs/end-to-end --cka
  localgrad analyse runs/first --pictures --projection tsne --images 3 17 42
"""


def analyse(arguments: Sequence[str]) -> int:
    """`localgrad analyse RUN [RUN2]`."""
    import tyro

    @dataclass(frozen=True)
    class Analyse:
        run_folder: tyro.conf.Positional[Path]
        """Folder of a finished run."""
        other_run: tyro.conf.Positional[Path | None] = None
        """Folder of another one, to compare with by CKA."""
        probe: bool = False
        """Train a linear probe on every unit: how far its features tell the classes apart."""
        cka: bool = False
        """Compare every unit with every unit of the other run."""
        pictures: bool = False
        """Draw activation maps of some images, and the features of many in two dimensions."""
        output: Path | None = None
        """Folder for the files; `analysis` in the run's folder unless given."""
        data: str | None = None
        """Other images: a hub name or a folder; those of the run unless given."""
        test_split: str | None = None
        """Split to test on; that of the run unless given."""
        train_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Train the probes on so many images only, evenly from each class."""
        test_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Use so many test images only, evenly from each class."""
        epochs: int = 10
        """Passes over the training images for the probes."""
        batch_size: int = 256
        """Images of a batch."""
        images: tuple[int, ...] = ()
        """Test images to draw activation maps of, by position from 0; one of each of four classes unless given."""
        points: int = 500
        """Test images to project."""
        projection: Literal["pca", "tsne"] = "pca"
        """How to project the features to two dimensions."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""

    options = parse(Analyse, arguments, "localgrad analyse", ANALYSE_HELP)
    from localgrad.analysis.study import analyse_run

    for path in analyse_run(**vars(options)):
        print(f"wrote {path}")
    return 0
