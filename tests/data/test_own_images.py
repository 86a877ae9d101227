"""Images as people have them: nothing is left out in silence, what cannot be read says what to do in three lines."""

from __future__ import annotations

import io
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import config as settings
from PIL import Image, TiffImagePlugin

from localgrad.data import hub
from localgrad.data.config import DataConfig
from localgrad.data.decoding import BrokenImageError, decode
from localgrad.data.fingerprint import Fingerprint, fingerprint
from localgrad.data.loading import load_images
from localgrad.data.sets import Images, ImageSet, ImageStream
from localgrad.data.sources import check_source, located
from localgrad.data.splits import held_back
from localgrad.errors import LocalGradError

PLAIN = DataConfig("?", crop="none", image_size=8, resize=8)
CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, splits: tuple[str, ...] = ("train", "test"), count: int = 4, classes: Any = CLASSES) -> Path:
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * number + 10 * label + i).save(root / split / name / f"{i}.png")
    return root


def table(root: Path, labels: list[Any], images: Any = None, column: str = "label", split: str = "train") -> Path:
    root.mkdir(exist_ok=True)
    images = [{"bytes": encoded(i), "path": None} for i in range(len(labels))] if images is None else images
    parquet.write_table(pa.table({"image": images, column: labels}), root / f"{split}-0.parquet")
    return root


def load(source: Path, **changes: Any) -> tuple[ImageSet, ImageSet, list[str]]:
    said: list[str] = []
    train, test = load_images(replace(PLAIN, source=str(source), **changes), said.append)
    return train, test, said


def refused(source: Path, match: str, **changes: Any) -> str:
    """The message of the refusal, which has three lines at most, none of them endless."""
    with pytest.raises(LocalGradError, match=match) as error:
        load(source, **changes)
    lines = str(error.value).splitlines()
    assert len(lines) <= 3
    return str(error.value)


# Splits


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Test", "testing"])
def test_the_split_to_test_on_is_found_and_said(tmp_path: Path, name: str) -> None:
    _, test, said = load(folder(tmp_path, ("Training", name)))
    assert len(test) == 12 and said == [f"tests on the split {name!r}"]


def test_of_several_splits_the_one_that_is_used_is_said(tmp_path: Path) -> None:
    _, test, said = load(folder(tmp_path, ("train", "val", "test")))
    assert "'test'" in said[0] and "'val' is not used" in said[0]
    assert test.fingerprint is not None and test.fingerprint.split == "test"


def test_classes_alone_need_a_fraction(tmp_path: Path) -> None:
    root = folder(tmp_path, ("",), count=10)
    refused(root, r"--data.test-split .* train\n.*--data.test-fraction 0.2")
    train, test, said = load(root, test_fraction=0.2)
    assert train.labels.bincount().tolist() == [8, 8, 8] and test.labels.bincount().tolist() == [2, 2, 2]
    assert said == ["6 of 30 images of train are held back for testing, the same share of each class "
                    "(--data.test-fraction 0.2)"]  # fmt: skip
    again, other = load(root, test_fraction=0.2)[1], load(root, test_fraction=0.2, split_seed=1)[1]
    assert isinstance(test, Images) and isinstance(again, Images) and isinstance(other, Images)
    assert torch.equal(test.images, again.images) and not torch.equal(test.images, other.images)


def test_what_is_held_back_is_stratified_and_the_rest() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    train, test = held_back(labels, 0.3, seed=0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert labels[test].bincount(minlength=4).tolist() == [15, 3, 1, 0]  # one of two, none of one
    assert held_back(labels, 0.01, seed=0)[1].tolist() != held_back(labels, 0.01, seed=5)[1].tolist()


def test_a_split_to_test_on_goes_before_the_fraction(tmp_path: Path) -> None:
    train, test, said = load(folder(tmp_path, ("train", "val")), test_fraction=0.5)
    assert (len(train), len(test)) == (12, 12) and "--data.test-fraction is for sets without" in said[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_slices_of_a_set_sorted_by_class_are_refused(tmp_path: Path, streaming: bool) -> None:
    root = folder(tmp_path, count=6)
    refused(root, r"train\[:8\] has images of 2 of 3 classes, .* sorted by class.\n  Give --data.train-limit 8",
            train_split="train[:8]", streaming=streaming)  # fmt: skip
    table(tmp_path / "mixed", [i % 3 for i in range(9)])
    train, _, _ = load(tmp_path / "mixed", train_split="train[:3]", test_split="train[3:]")
    assert train.labels.tolist() == [0, 1, 2]  # not sorted, so a slice is a sample


def test_a_test_split_that_lacks_classes_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path)
    shutil.rmtree(root / "test" / "bee")
    assert load(root)[2] == ["test has no image of 1 of 3 classes: bee"]
    shutil.rmtree(root / "train" / "ant")
    refused(root, r"test has 1 class\(es\) without an image in train: ant")


# What is left out


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for name in ("a.heic", "b.heic", "c.svg", "Thumbs.db", ".DS_Store", "._0.png"):
        (root / "train" / "ant" / name).write_bytes(b"x")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    picture(0).save(root / "train" / ".ipynb_checkpoints" / "0.png")
    picture(0).save(root / "train" / "stray.png")
    (root / "test" / "cow" / "2024").mkdir()
    picture(0).save(root / "test" / "cow" / "2024" / "deep.png")
    train, test, said = load(root)
    assert (len(train), len(test)) == (12, 13)
    assert said == [
        "left out 3 files of kinds that are not read: 2 .heic, 1 .svg; convert .heic to JPEG to use them",
        "left out 1 image outside the folders of the classes, as train/stray.png",
        "left out 1 hidden image",
        "1 image deeper than CLASS/, as test/cow/2024/deep.png: of the class of the first folder",
    ]


def test_a_class_without_an_image_that_we_read_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "train" / "yak").mkdir()
    (root / "train" / "zebra").mkdir()
    for name in ("a", "b"):
        (root / "train" / "zebra" / f"{name}.heic").write_bytes(b"x")
    refused(root, r"2 of 5 class folders of .*train have no image that we read: yak \(empty\), zebra \(2 .heic\)")


def test_images_that_all_lie_too_deep_are_refused(tmp_path: Path) -> None:
    for place in ("home", "town"):
        for name in ("cat", "dog"):
            (tmp_path / "train" / place / name).mkdir(parents=True)
            picture(0).save(tmp_path / "train" / place / name / "0.png")
    refused(tmp_path, "lie deeper than in a folder for each class, as home/cat/0.png", test_split="train")


def test_one_class_is_refused(tmp_path: Path) -> None:
    refused(folder(tmp_path, classes=("ant",)), r"train has images of one class \(ant\)")


def test_a_wrapping_folder_is_gone_through(tmp_path: Path) -> None:
    train, _, said = load(folder(tmp_path / "outer" / "my_set").parent)
    assert len(train) == 12 and said == [f"reads the images of {tmp_path / 'outer' / 'my_set'}"]


def test_files_that_lie_beside_the_classes_do_not_matter(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "labels.csv").write_text("a,b\n1,2\n")
    (root / "README.md").write_text("# my images\n")
    assert load(root)[2] == []


def test_all_broken_files_are_named_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path, count=20)
    for i in range(12):
        (root / "train" / "bee" / f"{i:02d}.png").write_bytes(b"<html>404</html>")
    for i in range(10):
        (root / "train" / "bee" / f"{i}.png").unlink()
    (root / "train" / "ant" / "0.png").write_bytes(b"")
    said = refused(root, r"13 of 60 train images cannot be used\n  train/ant/0.png \(empty\); train/bee/00.png, ")
    assert said.count(".png") == 10 and "and 3 more" in said


@pytest.mark.parametrize("workers", [0])
def test_a_stream_looks_at_some_before_it_starts(tmp_path: Path, workers: int) -> None:
    root = folder(tmp_path, count=2)
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")
    refused(root, r"train/ant/0.png \(no image\)", streaming=True, workers=workers)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_decoding_leaves_out_is_said(tmp_path: Path, streaming: bool) -> None:
    root = folder(tmp_path)
    clear = Image.merge("RGBA", (*picture(0).split(), Image.new("L", (8, 8), 0)))
    clear.save(root / "train" / "ant" / "0.png")
    picture(0).save(root / "test" / "cow" / "9.gif", save_all=True, append_images=[picture(1)])
    train, _, said = load(root, streaming=streaming)
    sampled = "sampled " if streaming else ""
    assert said == [
        f"{sampled}train: 1 of 12 images with transparent pixels, laid on white",
        f"{sampled}test: 1 of 13 images with several frames, of which the first is taken",
    ]
    images, _ = next(train.batches(1, train=False))
    mean, std = torch.tensor(PLAIN.mean), torch.tensor(PLAIN.std)
    white = ((1 - mean) / std).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(images[0], white)


# Bit depths


def png16(values: np.ndarray) -> bytes:
    """A grey PNG of 16 bits."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(raw))]
    chunks = (
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in [*parts, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values: np.ndarray, **tags: Any) -> bytes:
    info, file = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    for name, value in tags.items():
        info[{"most": 281, "low": 340, "high": 341}[name]] = value
    Image.fromarray(values).save(file, "TIFF", tiffinfo=info)
    return file.getvalue()


def pgm(values: np.ndarray, most: int) -> bytes:
    return f"P5 {values.shape[1]} {values.shape[0]} {most}\n".encode() + values.astype(">u2").tobytes()


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("data", "remark"),
    [
        (png16(np.round(RAMP * 65535)), None),
        (tiff(np.round(RAMP * 65535).astype(np.uint16)), None),
        (tiff(np.round(RAMP * 4095).astype(np.uint16), most=4095), None),
        (pgm(np.round(RAMP * 1023), 1023), None),
        (tiff(RAMP.astype(np.float32), low=0.0, high=1.0), None),
        (tiff((RAMP * 300 - 100).astype(np.float32), low=-100.0, high=200.0), None),
    ],
)
def test_bit_depths_are_scaled_by_what_the_file_says(data: bytes, remark: str | None) -> None:
    image, remarks = decode(data)
    assert remarks == set() if remark is None else {remark}
    assert np.abs(np.asarray(image)[..., 0] - RAMP * 255).max() <= 1


def test_twelve_bits_that_the_file_does_not_tell_are_said() -> None:
    assert decode(tiff(np.round(RAMP * 4095).astype(np.uint16)))[1] == {"dark"}
    with pytest.raises(BrokenImageError, match="32 bits"):
        decode(tiff(RAMP.astype(np.float32)))


# Tables


@pytest.mark.parametrize(
    ("labels", "column", "expected", "names"),
    [
        ([0, 1, 2, 1], "label", [0, 1, 2, 1], None),
        (["dog", "ant", "dog", "cow"], "label", [2, 0, 2, 1], ("ant", "cow", "dog")),
        ([True, False, True, True], "label", [1, 0, 1, 1], ("False", "True")),
        ([0.0, 1.0, 2.0, 1.0], "label", [0, 1, 2, 1], None),
        ([0, 1, 2, 1], "target", [0, 1, 2, 1], None),
        ([0, 1, 2, 1], "Class", [0, 1, 2, 1], None),
    ],
)
def test_labels_of_any_kind(
    tmp_path: Path, labels: list[Any], column: str, expected: list[int], names: tuple[str, ...] | None
) -> None:
    """Written without the hub's metadata."""
    train, _, said = load(table(tmp_path / "set", labels, column=column), test_split="train")
    assert train.labels.tolist() == expected and train.class_names == names
    assert bool(said) == (names is not None) and all("0 = " in sentence for sentence in said)


@pytest.mark.parametrize("kind", ["bytes", "path", "table", "relative"])
def test_images_of_any_kind_in_a_column(tmp_path: Path, kind: str) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    make: dict[str, Callable[[int], Any]] = {
        "bytes": encoded,
        "path": lambda i: str(tmp_path / f"{i}.png"),
        "table": lambda i: {"bytes": encoded(i), "path": None},
        "relative": lambda i: f"{i}.png",
    }
    rows = [make[kind](i) for i in range(4)]
    table(tmp_path, [0, 1, 0, 1], rows)
    train, _, _ = load(tmp_path / "train-0.parquet", test_fraction=0.5)
    assert isinstance(train, Images)
    known = {np.asarray(picture(i)).transpose(2, 0, 1).tobytes() for i in range(4)}
    assert {image.numpy().tobytes() for image in train.images} < known


def test_labels_that_begin_at_one_or_leave_gaps_are_said(tmp_path: Path) -> None:
    _, _, said = load(table(tmp_path / "one", [1, 2, 1, 2]), test_split="train")
    assert said == ["labels begin at 1; train has no image of 1 of 3 classes: 0"]
    _, _, said = load(table(tmp_path / "gap", [0, 3, 0, 3]), test_split="train")
    assert said == ["train has no image of 2 of 4 classes: 1, 2"]
    refused(table(tmp_path / "half", [0.0, 0.5]), "image 1 has the label 0.5 in column 'label'", test_split="train")


def test_saved_by_datasets_and_webdataset_and_csv_are_read(tmp_path: Path) -> None:
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}, features=kinds
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "both")[0].class_names == ("ant", "bee")
    assert len(load(tmp_path / "one", test_fraction=0.5)[1]) == 2
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text("file,class\na.png,x\nb.png,y\na.png,x\nb.png,y\n")
    train, _, _ = load(tmp_path / "list.csv", test_split="train")
    assert train.class_names == ("x", "y") and len(train) == 4


@pytest.mark.parametrize(
    ("name", "how"),
    [("set.zip", "unpack it"), ("set.npz", "save its arrays as images"), ("set.mat", "save its arrays as images")],
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_not_read_says_how_to_convert_it(tmp_path: Path, name: str, how: str, inside: bool) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path if inside else tmp_path / name, how)


def test_pixels_in_columns_are_not_printed(tmp_path: Path) -> None:
    names = ",".join(["label", *(f"pixel{i}" for i in range(784))])
    (tmp_path / "train.csv").write_text(
        f"{names}\n" + "\n".join(f"{i % 2}," + ",".join(["13"] * 784) for i in range(4))
    )
    said = refused(tmp_path, "Pixels in columns are not read", test_split="train")
    assert len(said) < 500 and "13" not in said


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    table(tmp_path, [0, 1])
    (tmp_path / "train-0.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path, "Git LFS pointer", test_split="train")


# Where images lie, and which they are


def test_a_folder_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    folder(tmp_path / "here" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    config = located(replace(PLAIN, source="mine"))
    assert config.source == str(tmp_path / "here" / "mine") and located(config) == config
    monkeypatch.chdir(tmp_path)
    assert len(load_images(config)[0]) == 12
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", pytest.fail)  # a name alone is never looked up anywhere
    with pytest.raises(LocalGradError, match=r"'mine' is not a folder; .* has the folders 'here': .*OWNER/NAME"):
        load_images(replace(PLAIN, source="mine"))


def test_a_fingerprint_tells_images_apart_wherever_they_lie(tmp_path: Path) -> None:
    one = load(folder(tmp_path / "one"))[0].fingerprint
    moved = load(Path(shutil.copytree(tmp_path / "one", tmp_path / "two")))[0].fingerprint
    limited = load(tmp_path / "two", train_limit=3)[0].fingerprint
    streamed = load(tmp_path / "two", streaming=True)[0].fingerprint
    assert one is not None and one == moved == limited == streamed and one.difference(one) is None
    picture(77).save(tmp_path / "two" / "train" / "cow" / "0.png")
    other = load(tmp_path / "two")[0].fingerprint
    assert other is not None and "others or in another order" in str(one.difference(other))
    assert Fingerprint("x", 3, 2, "").difference(Fingerprint("x", 4, 2, "")) == "3 in 2 classes, not 4 in 2"


def test_the_fingerprint_reads_a_sample_alone() -> None:
    read: list[int] = []

    def files(positions: Any) -> list[bytes]:
        read.extend(positions)
        return [b""] * len(positions)

    fingerprint("train", torch.zeros(100_000, dtype=torch.int64), files)
    assert len(read) == 32 and read[0] == 0 and read[-1] == 99_999


def test_a_hub_name_without_network_fails_once_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unreachable(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    with pytest.raises(LocalGradError, match=r"^--data owner/name: no such folder here, .* cannot be reached: [^\n]*$"):
        check_source(replace(PLAIN, source="owner/name"))
    assert len(asked) == 1 and asked[0]["timeout"] <= 10


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with many addresses, of which each has the whole limit."""
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: time.sleep(60))
    begin = time.monotonic()
    assert hub.hub_lacks("owner/name", seconds=0.1) == hub.UNREACHABLE.format(instead="--data FOLDER")
    assert time.monotonic() - begin < 30


def test_a_name_that_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            pass

    def absent(*_: Any, **__: Any) -> None:
        raise Absent

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", absent)
    with pytest.raises(LocalGradError, match=r"the hub has no such set, or it is private: .* `hf auth login`[^\n]*$"):
        check_source(replace(PLAIN, source="owner/name"))


def test_a_stream_of_folders_reads_the_same_images(tmp_path: Path) -> None:
    train, _, _ = load(folder(tmp_path))
    streamed, _, _ = load(tmp_path, streaming=True)
    assert isinstance(streamed, ImageStream)
    for ours, theirs in zip(train.batches(5, train=False), streamed.batches(5, train=False), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("names", [("labels.csv",), ("train.csv", "test.csv")])
def test_a_table_beside_the_images_names_them(names: tuple[str, ...], tmp_path: Path) -> None:
    """As many sets come: one folder of images, and a table with a path and a class in each line."""
    (tmp_path / "img").mkdir()
    for name in names:
        lines = ["file_name,species"]
        for i in range(10):
            picture(i).save(tmp_path / "img" / f"{name}{i}.png")
            lines.append(f"img/{name}{i}.png,{['bee', 'ant'][i % 2]}")
        (tmp_path / name).write_text("\n".join(lines))
    share = {"test_fraction": 0.2} if len(names) == 1 else {}
    train, test, _ = load(tmp_path, label_column="species", **share)
    assert (len(train), len(test)) == ((8, 2) if share else (10, 10)) and train.class_names == ("ant", "bee")


def test_described_images_take_their_labels_from_the_description(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        lines = []
        for i in range(4):
            picture(i).save(tmp_path / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "class": ["bee", "ant"][i % 2]}))
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    train, _, _ = load(tmp_path)
    assert train.labels.tolist() == [1, 0, 1, 0] and train.class_names == ("ant", "bee")
