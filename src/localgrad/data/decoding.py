"""Decode image files to 8-bit RGB, and note what is lost (transparency, frames, bits)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Image formats to try first; trying every format of Pillow takes longer than decoding a small image."""
RARE_FORMATS = ("AVIF", "JPEG2000", "TGA", "ICO", "QOI")
"""Formats to try next. Others are left out: for some, such as EPS, Pillow runs an external program on the file."""
REMARKS = {
    "transparent": "with transparent pixels, laid on white",
    "frames": "with several frames, of which the first is taken",
    "dark": "of 16 bits without a value above 4095, nearly black (of 12 bits? TIFF's MaxSampleValue can say so)",
}
"""Remarks on images of which something is left out or in doubt, by key: the words for messages."""
MOST_NAMED = 10
_MAX_SAMPLE, _S_MIN_SAMPLE, _S_MAX_SAMPLE = 281, 340, 341  # TIFF 6.0, sections 8 and 19
_PAPER = 255


class BrokenImageError(LocalGradError):
    """One image cannot be used; the message is the reason, in a few words."""


def suffixes() -> frozenset[str]:
    """Suffixes of files that can be decoded, in lower case."""
    from PIL import Image

    known = {*FORMATS, *RARE_FORMATS}
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def decode(item: Any) -> tuple[Image, set[str]]:
    """Decode an image to RGB with 8 bits per channel.

    The image is rotated as its EXIF data say. More than 8 bits are scaled down from the range of the file: that of its
    type, or the largest sample value of a TIFF file. Transparent pixels are blended onto white. Of several frames the
    first is taken.

    Args:
        item: the bytes of a file, a path, the dict with `bytes` or `path` that `datasets` stores, or a Pillow image.

    Returns:
        The image, and the keys of the `REMARKS` that apply to it.

    Raises:
        BrokenImageError: the item is no image, or has 32 bits and the file does not give their range.
    """
    from PIL import Image, ImageOps

    remarks: set[str] = set()
    try:
        file = item if isinstance(item, Image.Image) else _opened(encoded(item))
        if getattr(file, "is_animated", False):
            remarks.add("frames")
        image = _eight_bits(ImageOps.exif_transpose(file), file, remarks)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                remarks.add("transparent")
                paper = Image.new("RGBA", image.size, (_PAPER, _PAPER, _PAPER, 255))
                image = Image.alpha_composite(paper, image)
        return image.convert("RGB"), remarks
    except BrokenImageError:
        raise
    except Exception as error:  # of many classes, by format
        raise BrokenImageError(_reason(error)) from error


def encoded(item: Any) -> bytes:
    """The encoded bytes of an image: the item itself, or read from its path.

    Raises:
        BrokenImageError: there are no bytes.
    """
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, str | Path):
        item = Path(item).read_bytes()
    if not item:
        raise BrokenImageError("empty")
    return item


def _opened(data: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        Image.init()
        known = [kind for kind in RARE_FORMATS if kind in Image.OPEN]
        return Image.open(io.BytesIO(data), formats=known)


def _eight_bits(image: Image, file: Image, remarks: set[str]) -> Image:
    """The image with values from 0 to 255; more than 8 bits are scaled from the range that the file gives."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    tags = getattr(file, "tag_v2", {})
    low, high = (_number(tags.get(tag)) for tag in (_S_MIN_SAMPLE, _S_MAX_SAMPLE))
    if image.mode.startswith("I;16") or file.format == "PPM":  # Pillow has scaled a PPM file to 16 bits
        low, high = 0.0, _number(tags.get(_MAX_SAMPLE)) or high or _bits(tags) or 65535.0
    if high is None:
        raise BrokenImageError(
            f"pixels of 32 bits (mode {image.mode}), whose black and white the file does not say: store 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.float64)
    if high == 65535 and 0 < values.max() < 4096:
        remarks.add("dark")
    scaled = (values - (low or 0.0)) * (255 / (high - (low or 0.0)))
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def _bits(tags: Any) -> float | None:
    """The largest value of a sample by the number of bits in a TIFF file (tag 258); None without the tag."""
    bits = _number(tags.get(258))
    return None if bits is None else 2.0**bits - 1


def _number(value: Any) -> float | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return None if value is None or isinstance(value, tuple) else float(value)


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:80]


def broken(split: str, problems: Sequence[tuple[str, str]], count: int, advice: str) -> LocalGradError:
    """One error of three lines for all images of a split that cannot be used.

    Args:
        split: name of the split.
        problems: name and reason of each image.
        count: number of images that were decoded.
        advice: the last line, which says what to do.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in problems[:MOST_NAMED]:
        reasons.setdefault(reason, []).append(name)
    named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    return LocalGradError(f"{len(problems)} of {count:,} {split} images cannot be used\n  {named}{more}\n  {advice}")


def name_of(item: Any, number: int, root: str = "") -> str:
    """Name of an image in messages: its path, relative to `root`, or `image` and its number in the split."""
    path = item.get("path") if isinstance(item, dict) else item
    if not isinstance(path, str) or (isinstance(item, dict) and item.get("bytes")):
        return f"image {number}"
    return path.removeprefix(root).lstrip("/\\") if root else path


def remarked(count: int, remarks: Counter[str], split: str) -> list[str]:
    """One sentence for each remark that applies to images, with their number.

    Args:
        count: number of images that were decoded.
        remarks: number of images for each key of `REMARKS`.
        split: name of the split.
    """
    return [
        f"{split}: {remarks[key]:,} of {counted(count, 'image')} {text}"
        for key, text in REMARKS.items()
        if remarks[key]
    ]


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 image` or `1,200 images`; the plural ends in `s`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
