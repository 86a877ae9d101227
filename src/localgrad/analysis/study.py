"""Analyse run folders, and write the results as JSON files and pictures."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad.analysis.cka import MIN_IMAGES, cka, mean_diagonal
from localgrad.analysis.features import plain_batches
from localgrad.analysis.probe import probe
from localgrad.analysis.projections import MIN_POINTS, Projection, activation_maps, project
from localgrad.core.split import cut_positions
from localgrad.core.units import Unit, units
from localgrad.data.loading import balanced
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError, check_rules
from localgrad.results.finished import Trained, load_trained
from localgrad.results.kinds import Alignment, AnalysedImages, AnalysedRun, Pictures, Probe, kind_name
from localgrad.results.read import read_file
from localgrad.runs.files import make_folder, write_json
from localgrad.runs.folder import RunFolder
from localgrad.runs.provenance import provenance
from localgrad.runs.result import as_file

MOST_PICTURES = 8
"""Largest number of units whose features are drawn."""
MOST_PIXELS = 64
"""Largest height and width of a map in a file, in pixels."""
OTHER_OUTPUT = "give another --output"


def analyse_run(
    run_folder: Path,
    other_run: Path | None = None,
    *,
    probe: bool = False,
    cka: bool = False,
    pictures: bool = False,
    output: Path | None = None,
    data: str | None = None,
    test_split: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    epochs: int = 10,
    batch_size: int = 256,
    images: Sequence[int] = (),
    points: int = 500,
    projection: Projection = "pca",
    accelerator: str = "auto",
) -> Iterator[Path]:
    """Analyses a finished run, and writes the results as JSON and PNG files.

    Args:
        run_folder: folder of the run.
        other_run: folder of another run, for CKA.
        probe, cka, pictures: the analyses to run. If none is chosen: all, with CKA only if `other_run` is given.
        output: folder for the files; `analysis` in the run folder if None.
        data, test_split, accelerator: as in `evaluate`.
        train_limit, test_limit: number of training and test images to use.
        epochs: epochs of the probes.
        batch_size: images of a batch.
        images: positions in the test set of the images for the maps.
        points: number of test images to project.
        projection: `pca` or `tsne`.

    Yields:
        The path of each file, once it is written.

    Raises:
        LocalGradError: an argument is out of range, CKA is requested without another run, a folder holds no finished
            run, the other network was trained on images of another size or normalisation, or a file cannot be written.
    """
    everything = not (probe or cka or pictures)
    if cka and other_run is None:
        raise LocalGradError(f"--cka compares two networks: give another run folder behind {run_folder}")
    if other_run is not None and not (cka or everything):
        raise LocalGradError(f"{other_run} is for CKA, which was not asked for: add --cka, or leave it out")
    ranges = [("epochs", epochs, 1), ("batch_size", batch_size, 2), ("points", points, MIN_POINTS)]
    ranges += [(name, n, 1) for name, n in (("train_limit", train_limit), ("test_limit", test_limit)) if n is not None]
    check_rules("these analyses", [(f"{name}={n}: give at least {least}", n >= least) for name, n, least in ranges])
    chosen: dict[str, Any] = {"data": data, "test_split": test_split, "test_limit": test_limit}
    chosen["accelerator"] = accelerator
    trained = load_trained(run_folder, train_limit=train_limit, training_images=probe or everything, **chosen)
    other = None if other_run is None else load_trained(other_run, **chosen)
    folder = run_folder / "analysis" if output is None else output
    if other is not None:
        _check_alike(trained, other, batch_size)
    if pictures or everything:
        _check_images(trained, images)
    make_folder(folder, OTHER_OUTPUT)  # fails here, before the long work
    if probe or everything:
        yield from write_study(folder, "probe", study_probe(trained, epochs=epochs, batch_size=batch_size))
    if other is not None:
        found = study_cka(trained, other, batch_size=batch_size)
        yield from write_study(folder, _cka_name(folder, other, found), found)
    if pictures or everything:
        found = study_pictures(trained, images=images, points=points, projection=projection, batch_size=batch_size)
        yield from write_study(folder, "pictures", found)


def units_of(trained: Trained) -> list[Unit]:
    """The units of a trained network."""
    size = trained.config.data.image_size
    return units(trained.model, torch.zeros(2, 3, size, size, device=trained.fabric.device))


def study_probe(trained: Trained, *, epochs: int, batch_size: int) -> Probe:
    """Linear probes on every unit; see `probe`."""
    found = units_of(trained)
    results = probe(found, trained.train, trained.test, epochs=epochs, batch_size=batch_size, seed=trained.config.seed)
    return Probe(
        **_about([trained], [found], len(trained.test)),
        settings={"epochs": epochs, "batch_size": batch_size, "train_images": len(trained.train)},
        units=[result.unit for result in results],
        blocks=_block_numbers(trained, found),
        accuracies=[result.accuracy for result in results],
        train_losses=[result.train_loss for result in results],
    )


def study_cka(first: Trained, second: Trained, *, batch_size: int) -> Alignment:
    """CKA between the units of two networks on the test images of the first; see `cka`.

    Raises:
        LocalGradError: the two networks differ in image size or normalisation, or there are fewer than 4 images.
    """
    full = _check_alike(first, second, batch_size)
    ours, theirs = units_of(first), units_of(second)
    batches = plain_batches(first.test, batch_size, first.fabric.device)
    alignment = cka(ours, theirs, (inputs for inputs, _ in batches if len(inputs) == full))
    names, other_names = [unit.name for unit in ours], [unit.name for unit in theirs]
    seen = len(first.test) - len(first.test) % full  # without the last, smaller batch, which is left out
    return Alignment(
        **_about([first, second], [ours, theirs], seen),
        settings={"batch_size": batch_size},
        units=names,
        other_units=other_names,
        alignment=[[None if value != value else value for value in row] for row in alignment.tolist()],
        mean_diagonal=_number(mean_diagonal(alignment)) if names == other_names else None,
    )


def study_pictures(
    trained: Trained, *, images: Sequence[int], points: int, projection: Projection, batch_size: int
) -> Pictures:
    """Activation maps and projected features of at most eight units, evenly spaced over the network.

    Args:
        trained: a run with its test images.
        images: positions in the test set of the images for the maps; if empty, the first image of each of the first
            four classes.
        points: number of test images to project, balanced over the classes; all test images if there are fewer.
        projection: `pca` or `tsne`.
        batch_size: images of a batch.

    Raises:
        LocalGradError: there is no image at such a position, or there are too few to project.
    """
    every = units_of(trained)
    chosen = _evenly(len(every), MOST_PICTURES)
    _check_images(trained, images)
    numbers = list(images) if images else _first_of_classes(trained.test.labels.cpu(), 4)
    inputs = torch.cat([_image(trained.test, number, trained.fabric.device) for number in numbers])
    maps = activation_maps(every, inputs)
    some, labels = _some(trained.test, min(points, len(trained.test)))
    projected = project(every, some, at=chosen, method=projection, batch_size=batch_size)
    return Pictures(
        **_about([trained], [every], len(trained.test)),
        settings={"projection": projection, "points": len(some), "images": numbers},
        units=[every[index].name for index in chosen],
        blocks=[_block_numbers(trained, every)[index] for index in chosen],
        image_labels=trained.test.labels[numbers].tolist(),
        thumbnails=_thumbnails(inputs, trained),
        maps=[None if each is None else _rounded(_shrunk(each)) for each in (maps[index] for index in chosen)],
        point_labels=labels,
        points=[_rounded(points) for points in projected],
    )


def write_study(folder: Path, name: str, found: Probe | Alignment | Pictures) -> list[Path]:
    """Write an analysis as JSON, and its pictures as PNG, into a folder.

    Raises:
        LocalGradError: the folder cannot be made or written.
    """
    from localgrad.results.analysis_figures import of_analysis
    from localgrad.results.figures import save_png

    make_folder(folder, OTHER_OUTPUT)
    path = folder / f"{name}.json"
    write_json(path, as_file(kind_name(found), found), indent=None)
    drawn = of_analysis(found)
    for suffix, figure in drawn.items():
        save_png(figure, folder / f"{name}{suffix}.png")
    return [path, *(folder / f"{name}{suffix}.png" for suffix in drawn)]


def _check_alike(first: Trained, second: Trained, batch_size: int) -> int:
    """Refuse two networks that cannot be compared; return the size of the full batches."""
    prepared = [(each.config.data.image_size, each.config.data.mean, each.config.data.std) for each in (first, second)]
    if prepared[0] != prepared[1]:
        raise LocalGradError(
            f"{first.folder.path} and {second.folder.path} take images of another size or normalisation "
            f"({prepared[0]} and {prepared[1]}): compare networks that were trained on images prepared alike"
        )
    full = min(batch_size, len(first.test))
    if full < MIN_IMAGES:
        raise LocalGradError(f"CKA on batches of {full} image(s): it needs at least {MIN_IMAGES} in each")
    return full


def _check_images(trained: Trained, images: Sequence[int]) -> None:
    outside = [number for number in images if not 0 <= number < len(trained.test)]
    if outside:
        raise LocalGradError(
            f"there is no test image {outside[0]}: the set has {len(trained.test)}; give 0 to {len(trained.test) - 1}"
        )


def _cka_name(folder: Path, other: Trained, found: Alignment) -> str:
    """Name of the file: `cka-FOLDER` of the other run, plus a hash of its path if another run has taken that name."""
    path = other.folder.path.resolve()
    name = f"cka-{path.name}"
    taken = folder / f"{name}.json"
    if taken.exists():
        try:
            before = read_file(taken)
        except LocalGradError:
            return name  # a damaged file is overwritten
        if not isinstance(before, Alignment) or before.runs[1].config != found.runs[1].config:
            return f"{name}-{sha256(str(path).encode()).hexdigest()[:8]}"
    return name


def _about(runs: Sequence[Trained], found: Sequence[Sequence[Unit]], test_images: int) -> dict[str, Any]:
    """The fields that every analysis has: runs, images and origin."""
    first = runs[0]
    names = first.test.class_names
    return {
        "runs": [
            AnalysedRun(
                name=each.folder.path.resolve().name,
                num_blocks=_block_numbers(each, own)[-1],
                config=RunFolder(each.folder.path).config(),
            )
            for each, own in zip(runs, found, strict=True)
        ],
        "data": AnalysedImages(
            test_images=test_images,
            source=first.config.data.source,
            test_split=first.config.data.test_split,
            class_names=None if names is None else list(names),
        ),
        **provenance(first.fabric.device),
    }


def _block_numbers(trained: Trained, found: Sequence[Unit]) -> list[int]:
    """The number of the block, from 1, that each unit belongs to."""
    ends = cut_positions(found, trained.cuts)
    return [1 + sum(end < index for end in ends) for index in range(len(found))]


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced numbers from 0 to `count - 1`, both included."""
    if count <= most:
        return list(range(count))
    return [round(position * (count - 1) / (most - 1)) for position in range(most)]


def _first_of_classes(labels: Tensor, most: int) -> list[int]:
    classes = labels.unique().tolist()[:most]
    return [int((labels == each).nonzero()[0]) for each in classes]


def _image(images: ImageSet, number: int, device: torch.device) -> Tensor:
    inputs, _ = next(iter(images.batches(1, train=False, start=number, device=device)))
    return inputs


def _some(images: ImageSet, count: int) -> tuple[ImageSet, list[int]]:
    """`count` images, balanced over the classes, and their labels."""
    chosen = balanced(images.labels.cpu(), count)
    return images.subset(chosen), images.labels.cpu()[chosen].tolist()


def _thumbnails(inputs: Tensor, trained: Trained) -> list[Any]:
    """Undo the normalisation: images with values 0 to 255, height x width x 3."""
    config = trained.config.data
    mean, std = (inputs.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
    pixels = _shrunk(inputs * std + mean).clamp(0, 1).mul(255).round().to(torch.int64)
    return pixels.movedim(1, -1).tolist()


def _shrunk(pictures: Tensor) -> Tensor:
    """Maps of at most 64 x 64 pixels, by average pooling."""
    height, width = pictures.shape[-2:]
    size = min(height, MOST_PIXELS), min(width, MOST_PIXELS)
    if size == (height, width):
        return pictures
    return F.adaptive_avg_pool2d(pictures, size)


def _rounded(values: Tensor) -> Any:
    """Nested lists of the values, rounded to four significant digits."""
    return _each(values.double().tolist())


def _each(value: Any) -> Any:
    return [_each(item) for item in value] if isinstance(value, list) else float(f"{value:.4g}")


def _number(value: float) -> float | None:
    return None if value != value else value
