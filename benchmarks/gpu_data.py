"""Images for the runs on a GPU: pack them into small files, and read them with only PyArrow and Pillow.

    python benchmarks/gpu_data.py --cifar10 path/to/cifar10 --imagenette path/to/imagenette -o .data

writes two folders of about 60 MB, `part1` and `part2`. Together they contain `cifar10`, unchanged, and `imagenette64`:
the images of Imagenette at 64 px (lossy WebP, quality 80).
"""

import argparse
import io
import json
import shutil
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localgrad.data.config import DataConfig
from localgrad.data.loading import balanced
from localgrad.data.sets import Images

SIZE, QUALITY = 64, 80


def load(folder: Path, config: DataConfig, processes: int) -> tuple[Images, Images]:
    """The training and test set of a folder of Parquet files, decoded by several processes.

    Args:
        folder: folder with `train-*.parquet`, and `test-*` or `validation-*`. They have a column of encoded images and
            a column `label`.
        config: how to prepare the images. Its limits take the first images of each class.
        processes: number of processes that decode images.
    """
    sets = []
    for split, limit in (("train", config.train_limit), (config.test_split, config.test_limit)):
        encoded, labels, names = _read(folder, split)
        chosen = balanced(labels, limit)
        parts = np.array_split(chosen.numpy(), max(1, processes))
        work = [([encoded[i] for i in part], config.image_size) for part in parts if len(part)]
        with get_context("fork").Pool(processes) as pool:
            pixels = torch.from_numpy(np.concatenate(pool.starmap(_decoded, work)))
        sets.append(Images(labels[chosen], config, len(names), pixels, class_names=tuple(names)))
    return sets[0], sets[1]


def _read(folder: Path, split: str) -> tuple[list[bytes], Tensor, list[str]]:
    import pyarrow.parquet

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SystemExit(f"{folder} has no {split}-*.parquet")
    encoded, labels, names = [], [], []
    for file in files:
        table = pyarrow.parquet.read_table(file)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        column = next(name for name, kind in features.items() if kind["_type"] == "Image")
        names = features["label"]["names"]
        encoded += [image["bytes"] for image in table.column(column).to_pylist()]
        labels += table.column("label").to_pylist()
    return encoded, torch.tensor(labels), names


def _decoded(encoded: Sequence[bytes], size: int) -> np.ndarray[Any, Any]:
    from PIL import Image

    pixels = np.empty((len(encoded), 3, size, size), dtype=np.uint8)
    for place, image in enumerate(encoded):
        opened = Image.open(io.BytesIO(image)).convert("RGB")
        if opened.size != (size, size):
            opened = opened.resize((size, size), Image.Resampling.BILINEAR)
        pixels[place] = np.asarray(opened).transpose(2, 0, 1)
    return pixels


def shrink(source: Path, target: Path, rows: slice = slice(None)) -> None:
    """Write a copy of a Parquet file with its images resized to `SIZE` x `SIZE` pixels."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(source)
    table = table.slice(*_range(rows, len(table)))
    small = []
    for image in table.column("image").to_pylist():
        opened = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
        file = io.BytesIO()
        opened.resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(file, "WEBP", quality=QUALITY, method=4)
        small.append({"bytes": file.getvalue(), "path": None})
    column = pyarrow.array(small, type=table.schema.field("image").type)
    table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), column)
    target.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, target, compression="none")


def _range(rows: slice, length: int) -> tuple[int, int]:
    start, stop, _ = rows.indices(length)
    return start, stop - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--imagenette", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path(".data"))
    options = parser.parse_args(arguments)
    first, second, test = sorted(options.cifar10.glob("*.parquet"), key=lambda path: ("test" in path.name, path.name))
    for part, files in ((1, [first]), (2, [second, test])):
        for file in files:
            target = options.output / f"part{part}" / "cifar10" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    (train,), (validation,) = (list(options.imagenette.glob(f"{split}-*.parquet")) for split in ("train", "validation"))
    for part, rows in ((1, slice(6500)), (2, slice(6500, None))):
        target = options.output / f"part{part}" / "imagenette64" / f"train-{part - 1:05}-of-00002.parquet"
        shrink(train, target, rows)
    shrink(validation, options.output / "part2" / "imagenette64" / validation.name)
    for part in (1, 2):
        size = sum(file.stat().st_size for file in (options.output / f"part{part}").rglob("*.parquet"))
        print(f"{options.output}/part{part}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
