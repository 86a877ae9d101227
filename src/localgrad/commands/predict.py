"""Predict classes and probabilities of images with the network of a finished run.

Examples:
  localgrad predict runs/first cat.jpg dog.jpg
  localgrad predict runs/first path/to/photographs --top 1
  localgrad predict runs/first cat.jpg --json
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from localgrad.commands.parse import call, loading, tell
from localgrad.errors import LocalGradError

BATCH = 32


def predict(
    run_folder: Positional[Path],
    images: Positional[tuple[Path, ...]] = (),
    *,
    top: int = 3,
    best: bool = False,
    json_lines: bool = False,
) -> int:
    """Print the most probable classes of each image.

    Args:
        run_folder: Folder of a finished run.
        images: Image files, or folders of images.
        top: Number of classes to print for each image, the most probable first.
        best: Use the weights of the best epoch (train --keep-best) instead of the last epoch.
        json_lines: Print one line of JSON per image, with the probability of every class.
    """
    if not images:
        raise LocalGradError(
            f"predict takes images: `localgrad predict {shlex.quote(str(run_folder))} cat.jpg`, or a folder of them"
        )
    if top < 1:
        raise LocalGradError(f"--top is {top}: give 1 or more")
    with loading():
        import torch

        from localgrad.data.decoding import broken
        from localgrad.runs.load import load_run

    loaded = load_run(run_folder, best=best)
    paths = list(_files(images))
    read, problems = _read(paths, loaded)
    if problems:
        problem = broken("given", problems, len(paths), "Leave them out, or repair them.")
        if not read:
            raise problem
        tell(str(problem))
    _show([*read], loaded.classes, _probabilities(loaded, torch.stack([*read.values()])), top, json_lines)
    return 1 if problems else 0


def _read(paths: list[Path], loaded: Any) -> tuple[dict[Path, Any], list[tuple[str, str]]]:
    """The pixels (3, H, W) of each image, and the problems of unreadable files. Prints how images were changed."""
    import torch

    from localgrad.data.decoding import BrokenImageError, decode, remarked

    config = loaded.transform.config
    read: dict[Path, Any] = {}
    problems: list[tuple[str, str]] = []
    remarks, resized = Counter[str](), 0
    for path in paths:
        try:
            image, seen = decode(path)
        except BrokenImageError as error:
            problems.append((str(path), str(error)))
            continue
        remarks.update(seen)
        resized += config.resize is None and image.size != (config.image_size, config.image_size)
        read[path] = torch.from_numpy(loaded.transform.pixels(image))
    for sentence in remarked(len(read), remarks, "given"):
        tell(sentence)
    if resized:
        tell(
            f"{resized} of {len(paths)} images are resized to {config.image_size} x {config.image_size} pixels, which "
            "the network was trained on"
        )
    return read, problems


def _probabilities(loaded: Any, pixels: Any) -> list[list[float]]:
    """Images (N, 3, H, W) uint8 to a list of class probabilities for each image."""
    import torch

    from localgrad.data.transform import normalise

    with torch.inference_mode():
        scores = [loaded.model(normalise(part, loaded.transform.config)) for part in pixels.split(BATCH)]
    return torch.cat(scores).softmax(1).tolist()


def _show(paths: list[Path], classes: list[str], found: list[list[float]], top: int, as_json: bool) -> None:
    rows: list[tuple[str, str]] = []
    for path, probabilities in zip(paths, found, strict=True):
        order = sorted(range(len(classes)), key=lambda number: -probabilities[number])
        if as_json:
            every = {classes[number]: round(probabilities[number], 6) for number in order}
            print(json.dumps({"image": str(path), "class": classes[order[0]], "probabilities": every}))
            continue
        said = "  ".join(f"{classes[number]} {probabilities[number]:.1%}" for number in order[:top])
        rows.append((str(path), said))
    if rows:
        from localgrad.results.terminal import print_table

        print_table(["image", "classes, the most probable first"], rows, left=[0, 1])


def _files(images: Sequence[Path]) -> Iterator[Path]:
    """The given files, and the images in the given folders, without hidden files."""
    from localgrad.data.decoding import suffixes
    from localgrad.data.folders import is_hidden

    for path in images:
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in suffixes() and not any(map(is_hidden, file.relative_to(path).parts))
            )
            if not found:
                raise LocalGradError(f"{path} has no images")
            yield from found
        else:
            yield path


def main(arguments: Sequence[str]) -> int:
    """`localgrad predict RUN_FOLDER IMAGES`."""
    flags = ["--json-lines" if argument == "--json" else argument for argument in arguments]
    return call(predict, flags, "localgrad predict", __doc__)
