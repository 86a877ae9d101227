"""The images of a table: checks that all rows are trained on the same images, also after an interruption."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from localgrad.config.typed import parse
from localgrad.data.config import DataConfig
from localgrad.data.fingerprint import Fingerprint
from localgrad.data.loading import load_images, untold
from localgrad.errors import LocalGradError
from localgrad.recipes import RECIPES, recipe
from localgrad.results.cells import Cell, load_result
from localgrad.runs.files import read_json, write_json
from localgrad.runs.folder import RunFolder
from localgrad.runs.result import as_file, fields_of

KIND = "table-images"
"""Kind of the file `runs/images.json`."""


@dataclass(frozen=True)
class RowImages:
    """The first run that was started on a data set, and the fingerprint of its training images."""

    run: str
    images: Fingerprint


Known = dict[str, RowImages]
"""The images of each data set, by its key from `images_of`."""


def check_images(cells: Sequence[Cell], waiting: Sequence[Cell]) -> Known:
    """Refuses, before a run starts, images that differ from those of the first runs of the table.

    The first images are known from finished and started runs, and from `runs/images.json`, which this function writes.
    It reads the labels and a sample of the files, and decodes no image.

    Args:
        cells: cells of the table; their folder exists.
        waiting: the cells that will be run.

    Returns:
        The images of each data set.

    Raises:
        LocalGradError: the images differ or are missing, or a file of the folder is damaged.
    """
    output = cells[0].output
    known = _known(output)
    for key, cell in {images_of(cell.config.name): cell for cell in waiting}.items():
        images = _fingerprint(cell.config.data)
        if images is None:
            continue
        first = known.setdefault(key, RowImages(cell.name, images))
        difference = first.images.difference(images)
        if difference is not None:
            raise LocalGradError(
                f"{output} was begun with other images than those of --data {cell.config.data.source}:\n"
                f"  the training images of {first.run} were {difference}.\n"
                "  Give --data FOLDER with those images, or another --output."
            )
    write_json(_file(output), as_file(KIND, {"sets": {key: asdict(first) for key, first in known.items()}}))
    return known


def images_of(name: str) -> str:
    """Key of the data set of a recipe: recipes with equal keys are trained on the same images."""
    data = recipe(name).config.data
    return " ".join(str(part) for part in (data.source, data.subset, data.train_split, data.test_split))


def other_images(cell: Cell, known: Known) -> str | None:
    """Why a finished run cannot be in the table: its training images differ from earlier runs'. None if they agree."""
    images = load_result(cell.run.result).train_images
    if images is None:
        return None
    first = known.setdefault(images_of(cell.config.name), RowImages(cell.name, images))
    difference = images.difference(first.images)
    return None if difference is None else f"its images are not those of {first.run}: {difference}"


def _known(output: Path) -> Known:
    found: Known = {}
    runs = [*_runs(output)]
    if runs and _file(output).exists():
        saved = fields_of(read_json(_file(output)), _file(output), KIND)
        found |= parse(
            dict[str, RowImages], saved.get("sets") if isinstance(saved, dict) else saved, str(_file(output))
        )
    for name, row, images in runs:
        if images is not None and row in RECIPES:
            found.setdefault(images_of(row), RowImages(name, images))
    return found


def _runs(output: Path) -> Iterator[tuple[str, str, Fingerprint | None]]:
    """Name, row and training images of each finished or started run."""
    for path in sorted(output.glob("*-seed*.json")):
        yield path.stem, path.stem.rpartition("-seed")[0], load_result(path).train_images
    for path in sorted(output.glob("runs/*-seed*/config.json")):
        yield path.parent.name, path.parent.name.rpartition("-seed")[0], RunFolder(path.parent).known_images("train")


def _file(output: Path) -> Path:
    return output / "runs" / "images.json"


def _fingerprint(config: DataConfig) -> Fingerprint | None:
    """Fingerprint of the training images; None if they come with a package."""
    return load_images(replace(config, streaming=True), untold)[0].fingerprint if config.on_disk else None
