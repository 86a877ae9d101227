"""A local folder of images: its splits, classes and files, and the files that are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from localgrad.data.decoding import counted, suffixes
from localgrad.errors import LocalGradError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Names of folders and splits that mean the same split, in upper or lower case."""
_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class ImageFolder:
    """The splits of a folder, and notes on its files that `classes` collects."""

    root: Path
    splits: dict[str, Path]
    """Folder of each split by name; only "train", the root itself, if the class folders are directly in the root."""
    deep: list[Path] = field(default_factory=list)
    """Images in subfolders of a class folder; they are used."""
    hidden: int = 0
    """Number of hidden images, which are left out."""
    strays: list[Path] = field(default_factory=list)
    """Images outside the class folders, which are left out."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of files that cannot be decoded, by suffix."""

    def classes(self, split: str) -> dict[str, list[Path]]:
        """Sorted paths of the images of a split by class name; notes files that are left out."""
        found: dict[str, list[Path]] = {}
        for entry in _visible(self.splits[split]):
            if entry.is_dir():
                found[entry.name] = sorted(self._images(entry), key=lambda path: path.as_posix())
            elif entry.suffix.lower() in suffixes():
                self.strays.append(entry)
        self.hidden += sum(1 for _ in _hidden_images(self.splits[split]))
        return found

    def _images(self, folder: Path) -> Iterator[Path]:
        for path in _files(folder):
            if path.suffix.lower() in suffixes():
                if path.parent != folder:
                    self.deep.append(path)
                yield path
            else:
                self.others[path.suffix.lower() or "(no suffix)"] += 1

    def left_out(self) -> list[str]:
        """Sentences about files that were left out, and about images in subfolders of class folders."""
        said = []
        if self.others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.others.most_common(6))
            convert = "; convert .heic to JPEG to use them" if {".heic", ".heif"} & {*self.others} else ""
            said.append(f"left out {counted(self.others.total(), 'file')} of kinds that are not read: {kinds}{convert}")
        if self.strays:
            strays = counted(len(self.strays), "image")
            said.append(f"left out {strays} outside the folders of the classes, as {self._short(self.strays)}")
        if self.hidden:
            said.append(f"left out {counted(self.hidden, 'hidden image')}")
        if self.deep:
            deep = counted(len(self.deep), "image")
            said.append(f"{deep} deeper than CLASS/, as {self._short(self.deep)}: of the class of the first folder")
        return said

    def _short(self, paths: list[Path]) -> str:
        return paths[0].relative_to(self.root).as_posix()


def image_folder(folder: Path) -> ImageFolder:
    """Find the splits of a folder of images. A single folder inside another one, as in archives, is entered."""
    root = _unwrapped(folder)
    names = {name: split for split, words in SPLITS.items() for name in words}
    children = {path.name: path for path in _visible(root) if path.is_dir()}
    known = {name: path for name, path in children.items() if name.lower() in names}
    return ImageFolder(root, (children if known else {}) or {"train": root})


def split_named(wanted: str, there: Iterable[str]) -> str | None:
    """The wanted split, or a split of the same meaning (see `SPLITS`), among the existing names; None without one."""
    there = list(there)
    if wanted in there:
        return wanted
    meaning = next((words for words in SPLITS.values() if wanted.lower() in words), (wanted.lower(),))
    return next((name for word in meaning for name in there if name.lower() == word), None)


def labelled(folder: ImageFolder, split: str) -> tuple[list[str], list[str]]:
    """Sorted paths of the images of a split, and the class name of each image.

    Raises:
        LocalGradError: all images are in subfolders of the class folders, or a class of the training split is empty.
    """
    classes = folder.classes(split)
    where = folder.splits[split]
    direct = {name: [path for path in paths if path.parent == where / name] for name, paths in classes.items()}
    if classes and any(classes.values()) and not any(direct.values()):
        one = next(path for paths in classes.values() for path in paths)
        raise LocalGradError(
            f"all images of {where} lie deeper than in a folder for each class, as {one.relative_to(where)}: which "
            f"folder is the class?\n  Put them into {where.name}/CLASS/, or give --data the folder above the classes."
        )
    empty = [name for name, paths in classes.items() if not paths]
    if empty and split_named("train", [split]):
        raise LocalGradError(
            f"{len(empty)} of {len(classes)} class folders of {where} have no image that we read: "
            f"{', '.join(f'{name} ({_contents(where / name)})' for name in empty[:10])}\n"
            "  Remove these folders, or convert their files to JPEG or PNG."
        )
    pairs = sorted((str(path), name) for name, paths in classes.items() for path in paths)
    return [path for path, _ in pairs], [name for _, name in pairs]


def _contents(folder: Path) -> str:
    kinds = Counter(path.suffix.lower() or "(no suffix)" for path in _files(folder))
    return ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(3)) or "empty"


def _unwrapped(folder: Path) -> Path:
    while True:
        inside = list(_visible(folder))
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.lower() in SPLITS["train"]:
            return folder
        below = list(_visible(inside[0]))
        if any(path.is_file() and path.suffix.lower() in suffixes() for path in below) or not any(
            path.is_dir() for path in below
        ):
            return folder
        folder = inside[0]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden: it belongs to the operating system or to a program."""
    return name.startswith((".", "__")) or name.lower() in _SYSTEM


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder except hidden ones. Links are followed, and each folder is visited once."""
    been: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        folders[:] = [] if real in been else sorted(name for name in folders if not is_hidden(name))
        if real not in been:
            been.add(real)
            yield from (Path(at, name) for name in sorted(files) if not is_hidden(name))


def _hidden_images(folder: Path) -> Iterator[Path]:
    """Images that are hidden or in a hidden folder, without macOS's `._x.jpg` files, which are no images."""
    for at, _, files in os.walk(folder):
        inside = Path(at).relative_to(folder).parts
        for name in files:
            if name.startswith("._") or Path(name).suffix.lower() not in suffixes():
                continue
            if is_hidden(name) or any(map(is_hidden, inside)):
                yield Path(at, name)
