"""Find a data set in a local folder, a file or on the Hugging Face hub, and read it as one table of rows per split."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localgrad.data.config import DataConfig
from localgrad.data.decoding import suffixes
from localgrad.data.folders import ImageFolder, image_folder, is_hidden, labelled, split_named
from localgrad.data.hub import hub_lacks
from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets

_TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
}
"""Suffixes of table files, and the names of their formats in `datasets`."""
_WANTED = "Give a folder of SPLIT/CLASS/ with images, or a table with images and labels."
_SURE_TABLES = (".parquet", ".arrow", ".tar")
_PIXELS = "save its arrays as images, PIL.Image.fromarray(x[i]).save(f'train/{y[i]}/{i}.png'), and give that folder"
_CONVERT = {
    **dict.fromkeys((".zip", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z"), "unpack it, and give the folder"),
    **dict.fromkeys((".npz", ".npy", ".h5", ".hdf5", ".mat", ".pt", ".pth", ".pkl", ".pickle", ".tfrecord"), _PIXELS),
    **dict.fromkeys((".heic", ".heif", ".svg"), "convert the images to JPEG or PNG"),
}


@dataclass
class Source:
    """A data set that was found: names of its splits, and a function that reads one."""

    splits: list[str]
    read: Callable[[str], datasets.Dataset]
    """Function from the name of a split to its table of rows."""
    notes: Callable[[], list[str]] = list
    """Function that returns sentences about files that were left out of the splits read so far."""
    root: str = ""
    """Folder that relative paths in a table belong to; "" for a data set from the hub."""
    folders: ImageFolder | None = field(default=None)
    """The folder of images; None if the data set is a table."""


def located(config: DataConfig) -> DataConfig:
    """The config with the absolute path of a local source, so that it means the same in another working directory."""
    if not config.on_disk:
        return config
    path = local_path(config.source)
    if path is None:
        return config
    return replace(config, source=os.path.abspath(path))  # noqa: PTH100


def local_path(source: str) -> Path | None:
    """The path of a local folder or file; None if it does not exist.

    Raises:
        LocalGradError: the operating system refuses the name as a path.
    """
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or an unknown user after "~"
        raise LocalGradError(f"--data {source[:80]!r} cannot be a folder: {error}"[:300]) from error


def open_source(config: DataConfig) -> Source:
    """Find the data set of a config and its splits.

    Raises:
        LocalGradError: the folder, file or hub name does not exist, or holds no images or tables that can be read.
    """
    path = local_path(config.source)
    if path is not None:
        path = Path(os.path.abspath(path))  # noqa: PTH100
        return _file(path) if path.is_file() else _folder(path, config)
    check_hub(config.source)
    with _quiet(offline=hub_lacks(config.source) is not None):
        return _loaded(config.source, {"path": config.source, "name": config.subset})


def check_source(config: DataConfig) -> None:
    """Check, before any other work, that the source exists.

    Raises:
        LocalGradError: the source is no local folder or file, and no data set that the hub or its cache has.
    """
    if config.on_disk and local_path(config.source) is None:
        check_hub(config.source)


def check_hub(source: str) -> None:
    """Check that a name is OWNER/NAME, and that the data set is in the cache or on the hub.

    Raises:
        LocalGradError: it is not.
    """
    if source[:1] in "./~" or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        parent = next(path for path in Path(source).expanduser().absolute().parents if path.is_dir())
        exists = sorted(path.name for path in parent.iterdir() if path.is_dir() and not is_hidden(path.name))
        there = ", ".join(map(repr, exists[:20])) + (f" and {len(exists) - 20} more" if exists[20:] else "")
        raise LocalGradError(
            f"--data {source!r} is not a folder; {parent} has the folders {there or '(none)'}: "
            "give a folder, or a hub name OWNER/NAME, as uoft-cs/cifar10"
        )
    if _is_cached(*source.split("/")):
        return
    why = hub_lacks(source)
    if why is not None:
        raise LocalGradError(f"--data {source}: no such folder here, not in the cache, and {why}")


def _is_cached(owner: str, name: str) -> bool:
    """Whether the data set is in the cache of `datasets`, which stores it under a derived name."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase

    home = Path(settings.HF_DATASETS_CACHE).expanduser()
    return any(path.is_dir() for path in home.glob(f"{escape(owner)}___{escape(camelcase_to_snakecase(name))}/*/*/*"))


@contextmanager
def _quiet(offline: bool = False) -> Iterator[None]:
    """Context: `datasets` shows no progress bars, and uses only its cache if `offline`; settings are restored."""
    import datasets
    from datasets import config as settings

    bars = settings.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled()
    before = settings.HF_HUB_OFFLINE
    if bars:
        datasets.disable_progress_bars()
    settings.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before
        if bars:
            datasets.enable_progress_bars()


def _loaded(called: str, arguments: dict[str, Any], root: str = "") -> Source:
    """All splits of a data set, loaded by `datasets.load_dataset`; `called` is its name in errors."""
    import datasets

    try:
        with _quiet():
            found = datasets.load_dataset(**arguments)
    except Exception as error:  # of any class: the data set cannot be loaded
        why = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        part = f" --data.subset {arguments['name']}" if arguments.get("name") else ""
        raise LocalGradError(f"--data {called}{part} cannot be loaded: {why}\n  {_advice(called)}") from error
    return Source([str(name) for name in found], found.__getitem__, root=root)


def _advice(called: str) -> str:
    path = Path(called)
    pointer = next((file for file in _some_files(path) if _is_pointer(file)), None)
    if pointer is not None:
        return f"{pointer.name} is a Git LFS pointer, not the file: run `git lfs pull` in its folder."
    if path.exists():
        return "Repair or remove the file, or give another folder or table."
    return f"{_WANTED[:-1]}, or a hub name OWNER/NAME."


def _some_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))[:100] if path.is_dir() else []


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix not in _TABLES:
        raise LocalGradError(f"--data {path} cannot be read as it is: {_CONVERT.get(suffix, _PIXELS)}")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    arguments = {"path": _TABLES[suffix], "data_files": {"train": escape(str(path))}, **options}
    return _loaded(str(path), arguments, root=str(path.parent))


def _folder(folder: Path, config: DataConfig) -> Source:
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # a file that is missing or damaged
            raise LocalGradError(
                f"--data {folder} is cut short or damaged: {' '.join(str(error).split())[:200]}"
            ) from error
        found = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return Source([str(name) for name in found], found.__getitem__, root=str(folder))
    kinds, described = _kinds(folder)
    tables = sum(kinds[suffix] for suffix in _TABLES)
    images = sum(kinds[suffix] for suffix in suffixes())
    if described or any(kinds[suffix] for suffix in _SURE_TABLES):
        return _loaded(str(folder), _table_arguments(folder, config, images=described), root=str(folder))
    if images and (_classes(folder) > 1 or not tables):
        return _images(folder)
    if tables:
        beside = _tables_beside(folder) if images else {}
        arguments = beside or _table_arguments(folder, config)
        return _loaded(str(folder), arguments, root=str(folder))
    odd = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5)) or "nothing"
    how = next((_CONVERT[suffix] for suffix, _ in kinds.most_common() if suffix in _CONVERT), None)
    raise LocalGradError(
        f"--data {folder} has no images or tables that we read: {odd}\n  "
        + (
            f"For each: {how}."
            if how
            else "Give a folder of SPLIT/CLASS/ with images, or a table with images and labels."
        )
    )


def _kinds(folder: Path) -> tuple[Counter[str], bool]:
    """Number of files by suffix, without hidden ones, and whether there is a metadata file of an image folder."""
    kinds: Counter[str] = Counter()
    described = False
    for at, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not is_hidden(name)]
        kinds.update(os.path.splitext(name)[1].lower() or "(no suffix)" for name in files if not is_hidden(name))  # noqa: PTH122
        near = len(Path(at).relative_to(folder).parts) <= 1
        described |= near and any(name in ("metadata.csv", "metadata.jsonl") for name in files)
        for name in folders:
            if os.path.islink(os.path.join(at, name)):  # noqa: PTH114, PTH118
                kinds.update(path.suffix.lower() for path in Path(at, name).rglob("*.*"))
    return kinds, described


def _classes(folder: Path) -> int:
    found = image_folder(folder)
    split = split_named("train", found.splits) or next(iter(found.splits))
    return sum(path.is_dir() for path in found.splits[split].iterdir() if not is_hidden(path.name))


def _images(folder: Path) -> Source:
    """A source whose tables have the path and the class name of each image of a folder."""
    import datasets

    found = image_folder(folder)
    kinds = datasets.Features({"image": datasets.Value("string"), "label": datasets.Value("string")})

    def read(split: str) -> datasets.Dataset:
        paths, labels = labelled(found, split)
        if not paths:
            raise _unlabelled(found.splits[split], len(found.strays))
        return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=kinds)

    if not _classes(folder):
        raise _unlabelled(found.root, sum(path.suffix.lower() in suffixes() for path in found.root.rglob("*")))
    notes = [] if found.root == folder else [f"reads the images of {found.root}"]
    return Source(list(found.splits), read, lambda: notes + found.left_out(), str(found.root), found)


def _unlabelled(folder: Path, count: int) -> LocalGradError:
    return LocalGradError(
        f"{folder} has no images in a folder for each class, {count} beside: labels are the names of the folders.\n"
        "  Put the images into SPLIT/CLASS/, as train/cat/1.jpg, or into CLASS/."
    )


def _table_arguments(folder: Path, config: DataConfig, images: bool = False) -> dict[str, Any]:
    """Arguments of `load_dataset` for a folder of tables, or of images described by a metadata file (`images`).

    By default `load_dataset` finds splits by words anywhere in a path, so a class "test_bench" in train/ would become
    test data. If there is a subfolder for training, the files of each split are therefore listed here.
    """
    import datasets

    subfolders = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name)}
    train = split_named("train", subfolders)
    if train is not None:
        known = [
            name for name in subfolders if any(split_named(word, [name]) for word in ("train", "validation", "test"))
        ]
        files = {re.sub(r"\W", "_", name): _patterns(folder, name) for name in known}
        if images:
            return {"path": "imagefolder", "data_dir": str(folder), "data_files": files}
        return {"path": str(folder), "data_files": files}
    declared = config.subset and datasets.get_dataset_config_names(str(folder)) != ["default"]
    return {"path": str(folder), "name": config.subset if declared else None}


def _tables_beside(folder: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` for tables beside the images that they name; by default it reads the images alone.

    A table with the name of a split is that split, and any other table is `train`. Empty if tables differ in suffix.
    """
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _TABLES and not is_hidden(path.name)]
    if len({path.suffix.lower() for path in tables}) != 1:
        return {}
    files: dict[str, list[str]] = {}
    for path in tables:
        known = [word for word in ("train", "validation", "test") if split_named(word, [path.stem])]
        files.setdefault(path.stem if known else "train", []).append(escape(str(path)))
    suffix = tables[0].suffix.lower()
    return {"path": _TABLES[suffix], "data_files": files, **({"sep": "\t"} if suffix == ".tsv" else {})}


def _patterns(folder: Path, name: str) -> list[str]:
    """Glob patterns for all files in the folder of a split, including those of linked folders."""
    links = [path.name for path in sorted((folder / name).iterdir()) if path.is_symlink() and path.is_dir()]
    odd = [link for link in links if has_magic(link)]
    if odd:
        raise LocalGradError(
            f"the linked folder {odd[0]!r} cannot be read, for *, ? and [] mean other names: rename it"
        )
    return [f"{name}/**", *(f"{name}/{link}/**" for link in links)]
