"""Image sets: every layout that users have, exact order and resume, augmentation against a naive loop, each error."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import config as settings
from datasets.exceptions import DatasetNotFoundError
from PIL import Image
from torch import Tensor

from localgrad.data import config as data
from localgrad.data.config import DataConfig
from localgrad.data.loading import balanced
from localgrad.data.loading import load_images as load
from localgrad.data.sets import Images, ImageSet, ImageStream, crop_and_flip
from localgrad.errors import LocalGradError

# Linux starts the loader's workers by fork; newer Pythons warn since pyarrow has threads, which the workers do not use.
fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PLAIN = DataConfig("?", crop="none", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=8)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def pictures(count: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8 noise, so that no window of one image is found in another."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def write(folder: Path, split: str, columns: dict[str, Any], label: Any = None, image: str = "image") -> Path:
    """A parquet file as the hub's; `label` is the type of all columns but the image's."""
    label = label or datasets.ClassLabel(num_classes=3)
    kinds = {name: datasets.Image() if name == image else label for name in columns}
    folder.mkdir(exist_ok=True)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 11 test images of 8x8 and 3 classes."""
    folder = tmp_path_factory.mktemp("small")
    write(folder, "train", {"image": [encoded(p) for p in pictures(40)], "label": [i % 3 for i in range(40)]})
    return write(
        folder, "test", {"image": [encoded(p) for p in pictures(11, seed=1)], "label": [i % 3 for i in range(11)]}
    )


def memory(count: int, **changes: Any) -> Images:
    """`count` images in memory that were not loaded from anywhere."""
    images = torch.from_numpy(pictures(count).transpose(0, 3, 1, 2).copy())
    return Images(torch.arange(count), replace(PLAIN, **changes), count, images)


def everything(dataset: ImageSet, batch_size: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*dataset.batches(batch_size, **arguments), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def back(inputs: Tensor) -> Tensor:
    """Pixels 0 to 255 of inputs normalised by 0.5 and 0.5."""
    return (inputs.double() * 0.5 + 0.5).mul(255).round().to(torch.uint8)


# The conventions and the configuration


def test_default_is_digits() -> None:
    assert DataConfig() == data.digits()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (data.cifar10(), ("uoft-cs/cifar10", None, "test", 32, "pad", 4, "reflect", True, None, False)),
        (data.svhn(), ("ufldl-stanford/svhn", "cropped_digits", "test", 32, "pad", 2, "zeros", False, None, False)),
        (data.stl10(), ("tanganke/stl10", None, "test", 96, "pad", 4, "zeros", True, None, False)),
        (data.imagenette(), ("frgfm/imagenette", "160px", "validation", 128, "pad", 16, "reflect", True, 128, False)),
    ],
)
def test_conventions(config: DataConfig, expected: tuple[Any, ...]) -> None:
    names = ["source", "subset", "test_split", "image_size", "crop", "padding", "padding_mode", "flip", "resize"]
    names = [*names, "streaming"]
    assert tuple(getattr(config, name) for name in names) == expected


def test_conventions_of_imagenet_and_statistics() -> None:
    config = data.imagenet()
    assert (config.crop, config.image_size, config.resize, config.flip, config.streaming) == (
        "resized",
        224,
        256,
        True,
        True,
    )
    assert config.mean == data.imagenette().mean == (0.485, 0.456, 0.406)
    assert config.std == data.imagenette().std == (0.229, 0.224, 0.225)
    assert [255 * m for m in data.cifar10().mean] == pytest.approx([125.3, 123.0, 113.9])
    assert [255 * s for s in data.cifar10().std] == pytest.approx([63.0, 62.1, 66.7])
    assert data.svhn().mean == data.svhn().std == data.stl10().mean == data.stl10().std == (0.5, 0.5, 0.5)
    assert data.stl10().num_classes == 10


def test_every_field_has_a_sentence() -> None:
    lines = Path(data.__file__).read_text().partition("class DataConfig")[2].partition("def ")[0].splitlines()
    for field in fields(DataConfig):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """') and lines[at + 1].endswith('"""'), field.name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": ""}, "--data ''"),
        ({"image_size": 0}, "--data.image-size 0: give at least 1"),
        ({"padding": -1}, "--data.padding -1: give at least 0"),
        ({"workers": -2}, "--data.workers -2: give at least 0"),
        ({"num_classes": 0}, "--data.num-classes 0"),
        ({"train_limit": 0}, "--data.train-limit 0: give at least 1"),
        ({"test_limit": -3}, "--data.test-limit -3: give at least 1"),
        ({"crop": "five"}, "--data.crop five: choose from none, pad, resized"),
        ({"padding_mode": "edge"}, "--data.padding-mode edge: choose from"),
        ({"mean": (0.5,)}, "--data.mean"),
        ({"std": (0.5, 0.5, 0.0)}, "--data.std"),
        ({"padding_mode": "reflect", "padding": 32}, "--data.padding 32: reflection"),
        ({"resize": 31}, "--data.resize 31: give at least --data.image-size 32"),
        ({"source": "a/b", "crop": "resized"}, "needs --data.streaming"),
        ({"source": "a/b", "crop": "resized", "streaming": True}, "--data.resize"),
        ({"streaming": True}, "--data.streaming"),
        ({"test_fraction": 1.0}, "--data.test-fraction 1.0: give more than 0"),
        ({"split_seed": -1}, "--data.split-seed -1: give at least 0"),
    ],
)
def test_wrong_configuration(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError) as error:
        DataConfig(**wrong)
    assert message in str(error.value)


def test_all_configuration_errors_at_once() -> None:
    with pytest.raises(LocalGradError, match=r"image-size 0.*workers -1.*crop x"):
        DataConfig(image_size=0, workers=-1, crop="x")  # pyright: ignore[reportArgumentType]


# Digits


def test_digits_split_and_pixels() -> None:
    from sklearn.datasets import load_digits

    train, test = load(data.digits())
    assert isinstance(train, Images) and isinstance(test, Images)
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    small, labels = load_digits(return_X_y=True)
    share = np.bincount(labels) / 5
    assert (test.labels.bincount().numpy() - share).__abs__().max() <= 1
    assert (torch.cat([train.labels, test.labels]).bincount().numpy() == np.bincount(labels)).all()
    # Bilinear upsampling by 4 as a matrix, in float64: output pixel i lies at (i + 0.5) / 4 - 0.5.
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    large = np.einsum("ij,njk,lk->nil", weight, small.reshape(-1, 8, 8) * 255 / 16, weight)
    both = torch.cat([train.images, test.images])
    assert both.shape == (1797, 3, 32, 32) and both.dtype == torch.uint8
    assert (both[:, :1] == both).all()
    ours = {row.tobytes() for row in both[:, 0].numpy()}
    near = sum(np.round(picture).astype(np.uint8).tobytes() in ours for picture in large)
    assert near > 0.9 * len(large)  # the rest has a pixel on the edge of rounding
    again, _ = load(data.digits())
    assert isinstance(again, Images) and torch.equal(again.images, train.images)


def test_digits_by_their_splits() -> None:
    train, test = load(data.digits())
    same, other = load(replace(data.digits(), test_split="train"))
    assert torch.equal(same.labels, train.labels)
    assert torch.equal(other.labels, train.labels)
    assert len(test) == 360
    with pytest.raises(LocalGradError, match=r"--data\.test-split validation: the digits have the splits"):
        load(replace(data.digits(), test_split="validation"))


def test_digits_statistics() -> None:
    config = data.digits()
    train, _ = load(config)
    assert isinstance(train, Images)
    pixels = train.images.double() / 255
    assert config.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-3)
    assert config.std[0] == pytest.approx(float(pixels.std()), abs=1e-3)


def test_digits_limits_size_and_classes() -> None:
    train, test = load(DataConfig(image_size=16, train_limit=50, test_limit=20))
    assert train.labels.bincount().tolist() == [5] * 10 and test.labels.bincount().tolist() == [2] * 10
    assert next(train.batches(4, train=True))[0].shape == (4, 3, 16, 16)
    with pytest.raises(LocalGradError, match=r"digits image 3 .* 3: .* = 2 \(1260 of 1797"):
        load(DataConfig(num_classes=3))
    with pytest.raises(LocalGradError, match=r"--data\.train-limit 1438: .*1437"):
        load(DataConfig(train_limit=1438))


# Layouts of files


def test_cifar10_layout(tmp_path: Path) -> None:
    """Columns img and label, class names in the schema, lossless WebP, several files a split."""
    names = datasets.ClassLabel(names=["cat", "dog", "ox"])
    pixels = pictures(6, 32, 32)
    rows = [encoded(p, "WEBP", lossless=True) for p in pixels]
    write(tmp_path, "train", {"img": rows[:4], "label": [0, 1, 2, 0]}, names, "img")
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    write(tmp_path, "train", {"img": rows[4:], "label": [1, 2]}, names, "img")
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00001-of-00002.parquet")
    write(tmp_path, "test", {"img": rows[:1], "label": [0]}, names, "img")
    train, test = load(data.cifar10(str(tmp_path)))
    assert isinstance(train, Images) and (len(train), len(test), train.num_classes) == (6, 1, 3)
    assert np.array_equal(train.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3)]
    for split in ("train", "test"):
        write(tmp_path, split, {"img": rows, "fine_label": [0, 1, 2], "coarse_label": [2, 2, 2]}, None, "img")
    train, _ = load(replace(PLAIN, source=str(tmp_path)))
    assert train.labels.tolist() == [0, 1, 2]
    coarse, _ = load(replace(PLAIN, source=str(tmp_path), label_column="coarse_label"))
    assert coarse.labels.tolist() == [2, 2, 2]


def test_svhn_layout(tmp_path: Path) -> None:
    """A third split that is not asked for, and a hub configuration's name that the folder does not have."""
    rows = [encoded(p) for p in pictures(4, 32, 32)]
    for split in ("train", "test", "extra"):
        write(tmp_path, split, {"image": rows, "label": [0, 1, 2, 1]})
    train, test = load(data.svhn(str(tmp_path)))
    assert len(train) == len(test) == 4
    inputs, _ = next(test.batches(4, train=False))
    assert float(inputs.min()) == -1.0 and float(inputs.max()) == 1.0


def test_stl10_layout_with_plain_integers(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3, 96, 96)]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "label": [9, 0, 1]}, datasets.Value("uint8"))
    train, _ = load(data.stl10(str(tmp_path)))
    assert train.labels.dtype == torch.int64 and train.labels.tolist() == [9, 0, 1] and train.num_classes == 10
    guessed, _ = load(replace(data.stl10(str(tmp_path)), num_classes=None, test_split="test[1:]"))
    assert (len(guessed), guessed.num_classes) == (3, 10)  # the largest label of both sets


def test_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    grey = pictures(1)[0, :, :, 0]
    rgba = np.concatenate([pictures(1)[0], np.full((8, 8, 1), 255, np.uint8)], axis=2)
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    rows = [encoded(grey), encoded(rgba), {"bytes": palette.getvalue(), "path": None}]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "label": [0, 1, 2]})
    train, _ = load(replace(PLAIN, source=str(tmp_path)))
    assert isinstance(train, Images)
    assert np.array_equal(train.images[0].numpy(), np.stack([grey] * 3))
    assert np.array_equal(train.images[1].numpy(), pictures(1)[0].transpose(2, 0, 1))
    assert np.array_equal(train.images[2].numpy(), np.stack([grey] * 3))


def test_sixteen_bits_become_eight_and_photographs_stand_upright(tmp_path: Path) -> None:
    ramp = (np.arange(64, dtype=np.uint32) * 65535 // 63).reshape(8, 8).astype(np.uint16)
    rows = [encoded(ramp), encoded(ramp, "TIFF")]
    pixels, file = pictures(1)[0], io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    rows.append({"bytes": file.getvalue(), "path": None})
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "label": [0, 1, 2]})
    train, _ = load(replace(PLAIN, source=str(tmp_path)))
    assert isinstance(train, Images)
    expected = np.round(ramp / 257).astype(np.uint8)
    for position in (0, 1):
        assert np.array_equal(train.images[position].numpy(), np.stack([expected] * 3))
    assert np.array_equal(train.images[2].numpy(), np.rot90(pixels, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(tmp_path: Path, kind: type) -> None:
    row = encoded(np.linspace(0, 1, 64).reshape(8, 8).astype(kind), "TIFF")
    for split in ("train", "test"):
        write(tmp_path, split, {"image": [row], "label": [0]})
    with pytest.raises(LocalGradError, match=r"image 0 \(pixels of 32 bits \(mode [FI]\)"):
        load(replace(PLAIN, source=str(tmp_path)))


def test_splits_that_number_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3)]
    write(tmp_path, "train", {"image": rows, "label": [0, 1, 2]}, datasets.ClassLabel(names=["a", "b", "c"]))
    write(tmp_path, "test", {"image": rows[:2], "label": [0, 1]}, datasets.ClassLabel(names=["a", "c"]))
    with pytest.raises(LocalGradError, match=r"numbers the classes \['a', 'c'\], .* \['a', 'b', 'c'\]"):
        load(replace(PLAIN, source=str(tmp_path)))


def _class_folders(root: Path, classes: tuple[str, ...], count: int) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pictures(1)[0]).save(root / name / f"{number}.png")


def test_linked_class_folders_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _class_folders(tmp_path / "images" / split, ("ant", "bee"), 2)
        _class_folders(tmp_path / "store" / split, ("cow",), 3)
        (tmp_path / "images" / split / "cow").symlink_to(tmp_path / "store" / split / "cow")
    train, test = load(replace(PLAIN, source=str(tmp_path / "images")))
    assert train.num_classes == 3
    assert train.labels.bincount().tolist() == test.labels.bincount().tolist() == [2, 2, 3]
    (tmp_path / "images" / "train" / "cow").rename(tmp_path / "images" / "train" / "cow [1]")
    (tmp_path / "images" / "test" / "cow").rename(tmp_path / "images" / "test" / "cow [1]")
    train, _ = load(replace(PLAIN, source=str(tmp_path / "images")))
    assert train.class_names == ("ant", "bee", "cow [1]")


def test_classes_alone_cannot_be_sliced_into_other_classes(tmp_path: Path) -> None:
    _class_folders(tmp_path, ("dev_board", "test_bench", "train_station"), 4)
    config = replace(PLAIN, source=str(tmp_path), train_split="train[:60%]", test_split="train[60%:]")
    with pytest.raises(LocalGradError, match=r"train\[:60%\] .* 2 of 3 "):
        load(config)
    train, _ = load(replace(config, train_split="train", test_split="train"))
    assert train.labels.bincount().tolist() == [4, 4, 4]


def test_images_of_no_class_say_where_labels_come_from(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.fromarray(pictures(1)[0]).save(tmp_path / split / "stray.png")
    with pytest.raises(LocalGradError, match=r"labels are the names of the folders"):
        load(replace(PLAIN, source=str(tmp_path)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout: a folder a split and a class, JPEG files of different sizes; a class is called "test"."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 5), ("val", 2)):
        for number, name in enumerate(("n01440764", "n02102040", "test_bench")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (40 + 3 * i, 50 - 2 * number)
                picture = Image.fromarray(pictures(1, 10, 10, i)[0]).resize(size)
                picture.convert("L" if i == 1 else "RGB").save(root / split / name / f"{name}_{i}.JPEG")
    return root


SMALL_IMAGENET = replace(data.imagenet(), image_size=24, resize=32, workers=0)


def test_class_folders_in_memory(folders: Path) -> None:
    config = replace(SMALL_IMAGENET, source=str(folders), crop="none", streaming=False)
    train, test = load(config)
    assert isinstance(train, Images)
    assert (len(train), len(test), train.num_classes) == (15, 6, 3)  # none of train/test_bench is tested on
    assert train.labels.bincount().tolist() == [5, 5, 5] and train.images.shape == (15, 3, 24, 24)
    # Shorter side 40 to 32 and the middle 24 x 24, against Pillow.
    picture = Image.open(folders / "train/n01440764/n01440764_0.JPEG").resize((32, 40), Image.Resampling.BILINEAR)
    expected = np.asarray(picture.crop((4, 8, 28, 32))).transpose(2, 0, 1)
    assert np.array_equal(train.images[0].numpy(), expected)


@pytest.mark.parametrize("name", ["test_bench", "train_car", "val", "dev-board"])
@pytest.mark.parametrize("second", ["test", "val"])
def test_a_class_named_like_a_split_stays_in_its_split(tmp_path: Path, second: str, name: str) -> None:
    """`datasets` alone finds splits by words anywhere in a path: train/test_bench would be in the test set too."""
    for split, count in (("train", 3), (second, 2)):
        for label in ("ant", name):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pictures(1)[0]).save(tmp_path / split / label / f"{i}.png")
    test_split = "test" if second == "test" else "validation"
    train, test = load(replace(PLAIN, source=str(tmp_path), test_split=test_split))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]


def test_class_folders_streamed(folders: Path) -> None:
    train, test = load(replace(SMALL_IMAGENET, source=str(folders), train_limit=7))
    assert isinstance(train, ImageStream) and train.labels.bincount().tolist() == [3, 2, 2]
    inputs, targets = everything(train, 4, train=True)
    assert inputs.shape == (7, 3, 24, 24) and sorted(targets.tolist()) == sorted(train.labels.tolist())
    in_memory = load(replace(SMALL_IMAGENET, source=str(folders), crop="none", streaming=False))[1]
    for ours, expected in zip(everything(test, 4, train=False), everything(in_memory, 4, train=False), strict=True):
        assert torch.equal(ours, expected)


def test_progress_bars_and_offline_setting_come_back(small: Path) -> None:
    before = settings.HF_HUB_OFFLINE
    for disabled in (False, True):
        (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
        load(replace(PLAIN, source=str(small)))
        assert datasets.are_progress_bars_disabled() is disabled
        assert before == settings.HF_HUB_OFFLINE


def test_declared_subset_of_a_folder_is_used(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        for split in ("train", "test"):
            rows = [encoded(p) for p in pictures(2 if name == "red" else 3)]
            write(tmp_path / name, split, {"image": rows, "label": [0, 1, 2][: len(rows)]})
    card = "---\nconfigs:\n- config_name: red\n  data_dir: red\n- config_name: blue\n  data_dir: blue\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert len(load(replace(PLAIN, source=str(tmp_path), subset="blue"))[0]) == 3
    with pytest.raises(LocalGradError, match=r"subset green .*red.*blue|subset green .*blue.*red"):
        load(replace(PLAIN, source=str(tmp_path), subset="green"))


# Order, ranks and resume


def test_normalised_values_and_file_order() -> None:
    dataset = memory(10, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    inputs, targets = everything(dataset, 4, train=False)
    expected = dataset.images.double() / 255
    expected = (expected - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    torch.testing.assert_close(inputs.double(), expected, atol=1e-5, rtol=0)
    assert targets.tolist() == list(range(10))


def test_channels_last_changes_the_memory_format_only() -> None:
    plain, _ = next(memory(4).batches(4, train=False))
    last, _ = next(memory(4).batches(4, train=False, channels_last=True))
    assert torch.equal(plain, last)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


def test_to_a_device() -> None:
    dataset = memory(4)
    inputs, targets = next(dataset.to("meta").batches(4, train=True))
    assert inputs.device.type == targets.device.type == "meta" and dataset.images.device.type == "cpu"
    inputs, targets = next(dataset.batches(4, train=True, device="meta"))
    assert inputs.device.type == targets.device.type == "meta"


@pytest.mark.parametrize("batch_size", [1, 4, 5, 9, 128])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_are_one_process(batch_size: int, train: bool, world_size: int) -> None:
    dataset = memory(19, crop="pad", flip=True)
    whole = list(dataset.batches(batch_size * world_size, train=train, seed=3))
    ranks = [
        list(dataset.batches(batch_size, train=train, seed=3, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    count = dataset.num_batches(batch_size, world_size, train)
    if train:
        assert {len(rank) for rank in ranks} == {count}
        left = 19 % (batch_size * world_size)
        assert count == 19 // (batch_size * world_size) + (left >= 2 * world_size)
        assert all(len(targets) >= min(2, batch_size) for rank in ranks for _, targets in rank)
    else:
        assert max(len(rank) for rank in ranks) == count == len(whole)
        assert sorted(int(t) for rank in ranks for _, targets in rank for t in targets) == list(range(19))
    for number in range(count):
        inputs, targets = whole[number]
        for r, rank in enumerate(ranks):
            part = rank[number] if number < len(rank) else (inputs[:0], targets[:0])
            assert torch.equal(part[0], inputs[r::world_size]) and torch.equal(part[1], targets[r::world_size])


def test_last_batch_of_one_is_dropped_in_training_only() -> None:
    dataset = memory(9)
    assert [len(targets) for _, targets in dataset.batches(4, train=True)] == [4, 4]
    assert [len(targets) for _, targets in dataset.batches(4, train=False)] == [4, 4, 1]
    assert [len(targets) for _, targets in memory(10).batches(4, train=True)] == [4, 4, 2]
    assert [len(targets) for _, targets in memory(3).batches(1, train=True)] == [1, 1, 1]  # as asked for
    assert (dataset.num_batches(4), dataset.num_batches(4, train=False)) == (2, 3)


def test_training_order_is_a_permutation_by_seed_and_epoch() -> None:
    dataset = memory(40)
    orders = [
        everything(dataset, 8, train=True, seed=seed, epoch=epoch)[1].tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(40)]}) == 5
    assert everything(dataset, 8, train=True, seed=1, epoch=1)[1].tolist() == orders[3]


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, np.asarray(keys).tolist(), rest, random.getstate()


@fork
@pytest.mark.parametrize("kind", ["memory", "stream", "workers"])
def test_resume_is_exact_and_the_global_random_state_untouched(small: Path, kind: str) -> None:
    config = replace(PLAIN, source=str(small), crop="pad", flip=True, streaming=kind != "memory")
    dataset, _ = load(replace(config, workers=2 if kind == "workers" else 0))
    assert isinstance(dataset, Images if kind == "memory" else ImageStream)
    before = random_states()
    whole = list(dataset.batches(8, train=True, seed=2, epoch=3))
    assert random_states() == before
    torch.manual_seed(99)  # must not matter
    starts = (0, 2, 5) if kind != "workers" else (2,)
    for start in starts:
        rest = list(dataset.batches(8, train=True, seed=2, epoch=3, start=start))
        assert len(rest) == len(whole) - start == dataset.num_batches(8) - start
        for ours, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@fork
def test_stream_does_not_depend_on_workers_or_ranks(folders: Path) -> None:
    config = replace(SMALL_IMAGENET, source=str(folders))
    alone = everything(load(config)[0], 6, train=True, seed=5)
    workers = everything(load(replace(config, workers=2))[0], 6, train=True, seed=5)
    assert torch.equal(alone[0], workers[0]) and torch.equal(alone[1], workers[1])
    ranks = [everything(load(config)[0], 3, train=True, seed=5, rank=r, world_size=2)[0] for r in (0, 1)]
    assert torch.equal(ranks[0], torch.cat([alone[0][:6][0::2], alone[0][6:12][0::2]]))
    assert torch.equal(ranks[1], torch.cat([alone[0][:6][1::2], alone[0][6:12][1::2]]))
    other = everything(load(config)[0], 6, train=True, seed=5, epoch=1)
    assert not torch.equal(alone[0], other[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: give at least 1"),
        ({"world_size": 0}, "world_size=0: give at least 1"),
        ({"seed": -1}, "seed=-1: give at least 0"),
        ({"epoch": -1}, "epoch=-1: give at least 0"),
        ({"rank": 2, "world_size": 2}, "rank=2: give 0 to world_size - 1 = 1"),
        ({"rank": -1}, "rank=-1"),
        ({"start": 4}, "start=4: give 0 to 3"),
        ({"start": -1}, "start=-1"),
        ({"world_size": 6}, "training on 10 images: give 2 or more for each of 6 ranks"),
    ],
)
def test_wrong_batches(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):  # at once, not at the first batch
        memory(10).batches(**{"batch_size": 4, "train": True, **wrong})


def test_nothing_is_left_at_the_end_of_an_epoch() -> None:
    assert list(memory(10).batches(4, train=True, start=3)) == []
    with pytest.raises(LocalGradError, match=r"\b1 images"):
        memory(1).batches(4, train=True)


# Augmentation


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("padding", [0, 1, 4, 7])
def test_crop_and_flip_against_a_loop(mode: data.Mode, padding: int) -> None:
    images = pictures(30, 8, 8)
    generator = np.random.default_rng(1)
    offsets = generator.integers(0, 2 * padding + 1, (30, 2))
    offsets[:2] = [[0, 0], [2 * padding, 2 * padding]]
    flips = generator.random(30) < 0.5
    kind: Any = "reflect" if mode == "reflect" else "constant"
    expected = []
    for image, (top, left), flip in zip(images, offsets, flips, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), kind)
        window = padded[top : top + 8, left : left + 8]
        expected.append(window[:, ::-1] if flip else window)
    ours = crop_and_flip(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(offsets),
        torch.from_numpy(flips),
        padding,
        mode,
    )
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.numpy(), np.stack(expected).transpose(0, 3, 1, 2))


def found(picture: np.ndarray, original: np.ndarray, padding: int, mode: Any) -> tuple[int, int, bool]:
    """Where a training image (3, 8, 8) lies in its padded original, and whether it is mirrored."""
    padded = np.pad(original, ((0, 0), (padding, padding), (padding, padding)), mode)
    for flip in (False, True):
        image = picture[:, :, ::-1] if flip else picture
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                if np.array_equal(image, padded[:, top : top + 8, left : left + 8]):
                    return top, left, flip
    raise AssertionError("no window of the padded image")


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("streaming", [False, True])
def test_training_images_are_windows(small: Path, mode: data.Mode, streaming: bool) -> None:
    config = replace(PLAIN, source=str(small), crop="pad", padding=2, padding_mode=mode, flip=True)
    originals, _ = load(config)
    dataset, _ = load(replace(config, streaming=streaming))
    assert isinstance(originals, Images)
    windows = []
    for epoch in range(3):
        order = everything(replace(originals, labels=torch.arange(40)), 8, train=True, epoch=epoch)[1]
        inputs, targets = everything(dataset, 8, train=True, epoch=epoch)
        assert torch.equal(targets, originals.labels[order])
        for picture, original in zip(back(inputs).numpy(), originals.images[order].numpy(), strict=True):
            windows.append(found(picture, original, 2, "reflect" if mode == "reflect" else "constant"))
    assert windows[:40] != windows[40:80] != windows[80:]  # drawn anew in each epoch
    tops, lefts, flips = zip(*windows, strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert 35 < sum(flips) < 85  # 120 tosses: 60 +- 4.6 standard deviations
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.4  # drawn apart


@pytest.mark.parametrize("streaming", [False, True])
def test_no_crop_and_no_flip_leaves_the_images(small: Path, streaming: bool) -> None:
    dataset, _ = load(replace(PLAIN, source=str(small), streaming=streaming))
    originals, _ = load(replace(PLAIN, source=str(small)))
    assert isinstance(originals, Images)
    inputs, _ = everything(dataset, 8, train=True)
    ours = {picture.tobytes() for picture in back(inputs).numpy()}
    assert ours == {picture.tobytes() for picture in originals.images.numpy()}
    inputs, _ = everything(load(replace(PLAIN, source=str(small), streaming=streaming, flip=True))[0], 8, train=True)
    kept = sum(picture.tobytes() in ours for picture in back(inputs).numpy())
    mirrored = sum(picture.tobytes() in ours for picture in back(inputs.flip(3)).numpy())
    assert kept + mirrored == 40 and 8 < kept < 32


def test_no_augmentation_when_testing(small: Path) -> None:
    config = replace(PLAIN, source=str(small), crop="pad", flip=True)
    plain, _ = load(replace(PLAIN, source=str(small)))
    for streaming in (False, True):
        dataset, _ = load(replace(config, streaming=streaming))
        for ours, expected in zip(everything(dataset, 8, train=False), everything(plain, 8, train=False), strict=True):
            assert torch.equal(ours, expected)


# Class balance


def test_balanced_takes_the_first_of_each_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1, 0, 2])
    assert balanced(labels, 3).tolist() == [0, 4, 5]
    assert balanced(labels, 5).tolist() == [0, 1, 4, 5, 6]  # the fourth and fifth: second images, first in the file
    assert balanced(labels, 9).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]  # class 1 has only two
    assert balanced(labels, None).tolist() == balanced(labels, 10).tolist() == list(range(10))
    with pytest.raises(LocalGradError, match=r"limit 11: .* 10 "):
        balanced(labels, 11)


def test_balanced_against_a_loop() -> None:
    labels = torch.from_numpy(np.random.default_rng(0).choice(7, 200, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]))
    for limit in (1, 6, 50, 111, 199):
        taken: list[int] = []
        for turn in range(200):
            places = [(labels == c).nonzero()[:, 0].tolist()[turn : turn + 1] for c in range(7)]
            taken += sorted(place for found in places for place in found)
        assert balanced(labels, limit).tolist() == sorted(taken[:limit])


def test_limits_decode_only_what_is_kept(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(6)]
    rows[4]["bytes"] = b"no image"
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "label": [0, 0, 1, 2, 2, 1]})
    train, test = load(replace(PLAIN, source=str(tmp_path), train_limit=4, test_limit=3))
    assert train.labels.tolist() == [0, 0, 1, 2] and test.labels.tolist() == [0, 1, 2]
    with pytest.raises(LocalGradError, match=r"--data\.test-limit 7: the set has 6 images"):
        load(replace(PLAIN, source=str(tmp_path), train_limit=4, test_limit=7))


# What cannot be loaded


def test_a_folder_that_is_not_there(small: Path) -> None:
    with pytest.raises(LocalGradError, match=rf"absent' .*{small.parent} .*'{small.name}'"):
        load(replace(PLAIN, source=str(small.parent / "absent")))
    with pytest.raises(LocalGradError, match="absent"):
        load(replace(PLAIN, source="./absent"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match="has no images or tables that we read: nothing"):
        load(replace(PLAIN, source=str(tmp_path)))


@pytest.mark.parametrize("field", ["train_split", "test_split"])
def test_a_split_that_is_not_there(small: Path, field: str) -> None:
    with pytest.raises(LocalGradError, match=rf"{field.replace('_', '-')} dev: there is no such split; .* train, test"):
        load(replace(PLAIN, source=str(small), **{field: "dev"}))
    with pytest.raises(LocalGradError, match="no data"):
        load(replace(PLAIN, source=str(small), **{field: "train[:0]"}))


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        (
            "image_column",
            "picture",
            r"image-column picture: .*\n.*label \(ClassLabel\).\n  Give --data.image-column image",
        ),
        ("image_column", "label", r"image-column label: (?s:.*)Give --data.image-column image"),
        (
            "label_column",
            "class",
            r"label-column class: (?s:.*)image \(Image\), (?s:.*)Give --data.label-column label\.$",
        ),
        ("label_column", "image", r"label-column image: (?s:.*)Give --data.label-column label\.$"),
    ],
)
def test_a_column_that_is_not_there(small: Path, field: str, given: str, message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        load(replace(PLAIN, source=str(small), **{field: given}))


def test_ambiguous_columns(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3)]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "size": [0, 1, 2], "age": [0, 1, 2]}, datasets.Value("int32"))
    with pytest.raises(LocalGradError, match=r"which column has the labels(?s:.*)Give --data.label-column size or age"):
        load(replace(PLAIN, source=str(tmp_path)))
    train, _ = load(replace(PLAIN, source=str(tmp_path), label_column="age"))
    assert train.num_classes == 3


def test_splits_with_different_columns(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3)]
    write(tmp_path, "train", {"image": rows, "label": [0, 1, 2]})
    write(tmp_path, "test", {"image": rows})
    with pytest.raises(LocalGradError, match=r"test image 0 .*'label'"):
        load(replace(PLAIN, source=str(tmp_path)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes(tmp_path: Path, label: int, split: str, streaming: bool) -> None:
    rows = [encoded(p) for p in pictures(4)]
    for name in ("train", "test"):
        labels = [0, 1, label if name == split else 2, 1]
        write(tmp_path, name, {"image": rows, "label": labels}, datasets.Value("int64"))
    with pytest.raises(LocalGradError, match=rf"{split} image 2 has label {label}: .*num_classes - 1 = 2 \(1 of 4"):
        load(replace(PLAIN, source=str(tmp_path), num_classes=3, streaming=streaming))


def test_a_missing_label(tmp_path: Path) -> None:
    rows = [encoded(p) for p in pictures(3)]
    write(tmp_path, "test", {"image": rows, "label": [0, 1, 2]})
    write(tmp_path, "train", {"image": rows, "label": [0, None, None]})
    with pytest.raises(LocalGradError, match="train image 1 has no label in column 'label'"):
        load(replace(PLAIN, source=str(tmp_path)))


@fork
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_images_of_unequal_size(tmp_path: Path, workers: int | None) -> None:
    rows = [encoded(p) for p in [*pictures(3), *pictures(2, 8, 9)]]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": rows, "label": [0, 1, 2, 0, 1]})
    config = replace(PLAIN, source=str(tmp_path), streaming=workers is not None, workers=workers or 0)
    with pytest.raises(
        LocalGradError, match=r"image 3.* \(8 x 9 pixels, not --data.image-size 8 squared\)\n  Give --data.resize 8"
    ):
        everything(load(config)[0], 5, train=False)
    assert everything(load(replace(config, resize=8))[0], 5, train=False)[0].shape == (5, 3, 8, 8)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    whole = encoded(pictures(1)[0])["bytes"]
    for name, content in (("other", b"no image"), ("truncated", whole[:100]), ("none", None)):
        rows = [encoded(pictures(1)[0]), {"bytes": content, "path": None} if content else None]
        for split in ("train", "test"):
            write(tmp_path / name, split, {"image": rows, "label": [0, 1]})
        with pytest.raises(LocalGradError, match=r"^1 of 2 .*\n  image 1 \("):
            load(replace(PLAIN, source=str(tmp_path / name)))


# The hub


def unreachable(*_: Any, **__: Any) -> None:
    raise OSError("no network")


def test_no_network_and_not_cached_fails_at_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def once(*_: Any, timeout: float, **__: Any) -> None:
        asked.append(timeout)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", once)
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    with pytest.raises(LocalGradError, match=r"^--data ufldl-stanford/svhn") as error:
        load(data.svhn())
    assert len(asked) == 1 and asked[0] <= 10 and "\n" not in str(error.value)
    assert not settings.HF_HUB_OFFLINE


def test_no_network_takes_the_cached_set(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", tmp_path)
    expected, _ = load(replace(PLAIN, source=str(small)))
    (cached,) = (path for path in tmp_path.iterdir() if path.is_dir())
    cached.rename(tmp_path / "owner___small0")
    for file in (tmp_path / "owner___small0").rglob("*.arrow"):
        file.rename(file.with_name(f"small0-{file.stem.split('-')[-1]}.arrow"))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    ours, _ = load(replace(PLAIN, source="owner/small0"))
    assert isinstance(ours, Images) and isinstance(expected, Images) and torch.equal(ours.images, expected.images)


def test_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**arguments: Any) -> None:
        assert arguments == {"path": "owner/absent", "name": "part"}
        raise DatasetNotFoundError("Dataset 'owner/absent' doesn't exist\non the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        LocalGradError,
        match=r"owner/absent --data.subset part cannot be loaded: .*doesn't exist on the Hub\n  Give a folder",
    ):
        load(replace(PLAIN, source="owner/absent", subset="part"))


# Real images


def test_real_cifar10() -> None:
    folder = Path(__file__).parents[3] / "shared/data/cifar10"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}")
    train, test = load(replace(data.cifar10(str(folder)), train_limit=200, test_limit=100))
    assert (len(train), len(test), train.num_classes) == (200, 100, 10)
    assert train.labels.bincount().tolist() == [20] * 10
    inputs, _ = everything(train, 50, train=False)
    assert abs(float(inputs.mean())) < 0.2 and abs(float(inputs.std()) - 1) < 0.2
