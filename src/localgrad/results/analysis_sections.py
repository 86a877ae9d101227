"""The parts of the report about analyses (linear probes, CKA, pictures of features), plans and step times."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from localgrad.config.saved import flat, to_dict
from localgrad.results import analysis_figures as drawings
from localgrad.results import figures
from localgrad.results.analysis_figures import class_name, label_of, title_of
from localgrad.results.kinds import Alignment, AnalysedRun, Analysis, Pictures, Plan, Probe, StepTimes
from localgrad.results.names import device_text
from localgrad.results.page import Cell, Grid, Part, Picture, Studio, plain
from localgrad.results.read import File
from localgrad.results.tables import BUDGET, own_fields, sort_key


def order_of(file: File[Any]) -> tuple[Any, ...]:
    """Sort key of an analysis: the position of its run in a table, then seed and path."""
    run = file.values.runs[0]
    return (*sort_key(run.config, run.num_blocks), run.config.seed, str(file.path))


def _named(run: AnalysedRun) -> str:
    return f"{label_of(run)} ({run.name})"


# Probes


def probes(files: Sequence[File[Probe]], studio: Studio) -> Part:
    """Linear probes: one curve per config, one picture and one table for each setting of the probes."""
    grouped: dict[str, list[File[Probe]]] = {}
    for file in files:
        grouped.setdefault(_setting(file.values), []).append(file)
    pictures, grids = [], []
    for group in grouped.values():
        picture, grid = _probe_picture(sorted({_probed(each): each for each in group}.values(), key=order_of), studio)
        pictures.append(picture)
        grids.append(grid)
    return Part("Linear separability", grids=grids, pictures=pictures)


def _probe_picture(group: Sequence[File[Probe]], studio: Studio) -> tuple[Picture, Grid]:
    trainings: dict[str, list[File[Probe]]] = {}  # by config; each list has the seeds
    for file in group:
        run = file.values.runs[0]
        key = json.dumps([own_fields(run.config), run.num_blocks], sort_keys=True)
        trainings.setdefault(key, []).append(file)
    labels = _distinct_labels([same[0].values.runs[0] for same in trainings.values()])
    accuracies = [[file.values.accuracies for file in same] for same in trainings.values()]
    first = group[0].values
    epochs = first.runs[0].config.optim.epochs
    caption = (
        f"Accuracy of a linear probe on the pooled features of every unit, the network frozen, on "
        f"{first.data.test_images:,} test images{_probe_training(first)}: {title_of(first)}, trained for {epochs} "
        f"epoch{'s' * (epochs != 1)}. Runs: {'; '.join(_named(file.values.runs[0]) for file in group)}."
    )
    drawn = drawings.probe_curves(title_of(first), first.units, dict(zip(labels, accuracies, strict=True)))
    means = [[sum(each) / len(each) for each in zip(*runs, strict=True)] for runs in accuracies]
    rows = [plain(unit, *(f"{mean[i]:.2f}" for mean in means)) for i, unit in enumerate(first.units)]
    grid = Grid(["unit", *labels], rows, "Accuracy in percent, mean over runs.", folded="The probes as a table")
    return studio.picture(drawn, caption, [file.path for file in group]), grid


def _setting(found: Probe) -> str:
    """Key of a picture: probes with equal keys have the same network, budget, and settings of training and test."""
    budget = {name: value for name, value in flat(to_dict(found.runs[0].config)).items() if name in BUDGET}
    images = (found.data.test_split, found.data.test_images)
    return json.dumps((title_of(found), budget, images, found.settings, found.units), sort_keys=True, default=str)


def _probed(file: File[Probe]) -> str:
    """Key of the run that was probed; several files may be about the same run."""
    config = file.values.runs[0].config
    return json.dumps([own_fields(config), config.seed], sort_keys=True)


def _probe_training(found: Probe) -> str:
    epochs, images = found.settings.get("epochs"), found.settings.get("train_images")
    if not isinstance(epochs, int) or not isinstance(images, int):
        return ""
    return f", after {epochs} epoch{'s' * (epochs != 1)} on {images:,} training images"


def _distinct_labels(runs: Sequence[AnalysedRun]) -> list[str]:
    """Label of each run; where labels are the same, the fields that differ are appended."""
    labels = list(map(label_of, runs))
    apart: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        others = [own_fields(other.config) for other, same in zip(runs, labels, strict=True) if same == label]
        own = {name: value for name, value in own_fields(run.config).items() if name != "name"}
        fields = [f"{name} {value}" for name, value in own.items() if any(each.get(name) != value for each in others)]
        apart.append(", ".join([label, *(fields or [run.config.name] * (len(others) > 1))]))
    return apart


# CKA and pictures


def alignments(files: Sequence[File[Alignment]], studio: Studio) -> Part:
    """Heat maps of CKA, and a table of the means of their diagonals."""
    if not files:
        return Part("Similarity of features (CKA)")
    rows, pictures = [], []
    for file in sorted(files, key=order_of):
        found = file.values
        first, second = found.runs
        mean = "" if found.mean_diagonal is None else f"{found.mean_diagonal:.3f}"
        rows.append([Cell(label_of(run), small=(run.name,)) for run in found.runs] + [Cell(strong=mean)])
        caption = (
            f"Linear CKA (minibatch, unbiased) between every unit of {_named(first)}, upwards, and every unit of "
            f"{_named(second)}, to the right, on {found.data.test_images:,} test images: {title_of(found)}."
        )
        pictures.append(studio.picture(drawings.alignment_map(found), caption, [file.path]))
    note = "CKA of the same unit in both networks, mean over all units; 1 is equal up to rotation and scale."
    grid = Grid(["network", "compared with", "mean CKA"], rows, note)
    return Part("Similarity of features (CKA)", grids=[grid], pictures=pictures)


def features(files: Sequence[File[Pictures]], studio: Studio) -> Part:
    """Activation maps and projected features."""
    return Part("Pictures of features", pictures=list(_features(sorted(files, key=order_of), studio)))


def _features(files: Sequence[File[Pictures]], studio: Studio) -> Iterator[Picture]:
    for file in files:
        found = file.values
        whose = f"{title_of(found)}, {_named(found.runs[0])}"
        labels = ", ".join(class_name(found, label) for label in found.image_labels)
        maps = drawings.activation_pictures(found)
        if maps is not None:
            caption = (
                f"Mean over the channels of each unit's features, from the least (black) to the most (yellow) of each "
                f"map, for test images of {labels}: {whose}."
            )
            yield studio.picture(maps, caption, [file.path])
        projection = found.settings.get("projection")
        method = {"pca": "the first two principal components", "tsne": "t-SNE"}.get(str(projection), "a projection")
        caption = (
            f"Pooled features of {len(found.point_labels):,} test images after each unit, in two dimensions by "
            f"{method}, a color a class: {whose}."
        )
        yield studio.picture(drawings.feature_clouds(found), caption, [file.path])


def analyses(files: Sequence[File[Analysis]], studio: Studio) -> Iterator[Part]:
    """All parts about analyses, without empty ones."""

    def of(kind: type) -> list[File[Any]]:
        return [file for file in files if isinstance(file.values, kind)]

    parts = probes(of(Probe), studio), alignments(of(Alignment), studio), features(of(Pictures), studio)
    yield from filter(None, parts)


# Plans and times


def plans(files: Sequence[File[Plan]], studio: Studio) -> Part:
    """Predicted peak memory against the number of blocks, one picture per plan."""
    pictures = []
    for file in files:
        caption = (
            f"Predicted peak memory of a step over the number of blocks: {file.values.title}. Dashed: activation "
            "checkpointing of every unit. Weights, gradients, optimizer, activations and auxiliary networks count."
        )
        pictures.append(studio.picture(figures.planned_peaks(file.values), caption, [file.path]))
    return Part("", pictures=pictures)


def speeds(files: Sequence[File[StepTimes]], studio: Studio) -> Part:
    """Seconds per step, one picture per file."""
    pictures = []
    for file in files:
        settings = {name: value for name, value in file.values.settings.items() if value is not None}
        words = ", ".join(f"{name.replace('_', ' ')} {_words(value)}" for name, value in settings.items())
        caption = f"Seconds of one training step, in turns on {device_text(file.values.device)}"
        title = str(settings.get("network") or file.path.stem)
        drawn = figures.step_times(file.values, title)
        pictures.append(studio.picture(drawn, f"{caption}: {words}." if words else f"{caption}.", [file.path]))
    return Part("", pictures=pictures)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
