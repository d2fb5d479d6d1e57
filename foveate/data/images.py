"""Read images from files and folders, of any format, as 8-bit RGB; errors are one sentence."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

__all__ = [
    "SUFFIXES",
    "ImageFiles",
    "Unreadable",
    "as_picture",
    "decode_image",
    "find_images",
    "read_image",
    "to_rgb",
]

_log = logging.getLogger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
# What is read in full. Twice as much is still decoded, then shrunk; a JPEG of any size is shrunk
# while it is decoded. Pillow's own guard against files that claim to be huge stays as it is.
_MOST_PIXELS = 89_000_000
_REFUSED_PIXELS = 2 * _MOST_PIXELS
_SIXTEEN_BITS = 65535


class Unreadable(ValueError):
    """An image that cannot be read or decoded; training may go on without it."""


def find_images(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files at some paths, in order: files as given, folders with subfolders.

    In folders, files count as images by their suffix; hidden ones are left out.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ValueError("no images were given: name at least one file or folder")
    found: dict[Path, None] = {}  # in order, and each once
    for path in map(Path, given):
        if path.is_dir():
            inside = _inside(path)
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)})")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise ValueError(f"{path} does not exist; images are files or folders of files")
    return list(found)


def _inside(folder: Path) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(place, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return files


class ImageFiles:
    """Images of files and folders, read one after another.

    A file that cannot be read is named in a warning and skipped; ``broken`` has the reasons.

    Attributes:
        files: all files, readable or not.
        broken: what was wrong with those that were skipped so far.
        strict: the first file that cannot be read is an error.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        strict: bool = False,
    ) -> None:
        self.files = find_images(paths)
        self.broken: dict[Path, str] = {}
        self.strict = strict

    def __iter__(self) -> Iterator[tuple[Path, Image.Image]]:
        """Give path and image of each readable file; ValueError where none is."""
        self.broken.clear()
        for path in self.files:
            try:
                image = read_image(path)
            except ValueError as error:
                if self.strict:
                    raise
                self.broken[path] = str(error)
                _log.warning("skipped %s", error)
                continue
            yield path, image
        if len(self.broken) == len(self.files):
            first = next(iter(self.broken.values()))
            if len(self.files) == 1:
                raise ValueError(first)
            raise ValueError(f"none of {len(self.files)} files is a readable image: {first} ...")
        if self.broken:
            _log.warning("%d of %d files were skipped", len(self.broken), len(self.files))


def read_image(path: str | os.PathLike[str], *, stored: bool = False) -> Image.Image:
    """Read an image as RGB, upright as its EXIF says; ValueError with the path and the reason.

    Images above 89 million pixels are shrunk by a whole factor; above twice that only JPEGs are
    read, because they alone can be shrunk while they are decoded.

    Args:
        path: the file.
        stored: neither turn nor shrink the image, so that boxes and masks, which are given in the
            file's pixels, still fit; larger ones than 178 million pixels are refused.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise Unreadable(f"{path} {kind}; one image file is needed")
    return decode_image(path, str(path), stored=stored)


def decode_image(file: Path | BinaryIO, name: str, *, stored: bool = False) -> Image.Image:
    """Decode an image from a file or from bytes, as ``read_image`` does."""
    try:
        with warnings.catch_warnings():
            # Of large sizes, which are dealt with here, and of odd metadata, which do not matter.
            warnings.simplefilter("ignore")
            return _read_as_stored(file) if stored else _read(file, name)
    except MemoryError:
        raise Unreadable(f"{name}: too large for the memory there is") from None
    except Exception as error:  # decoders raise many kinds, some of them on damaged files alone
        raise Unreadable(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that Pillow does not read"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    return " ".join(str(error).split()) or type(error).__name__


def _read(file: Path | BinaryIO, name: str) -> Image.Image:
    with _opened(file) as image:
        width, height = image.size
        if width * height > _MOST_PIXELS and image.format == "JPEG":
            image.draft(None, (width // 8, height // 8))
        if image.width * image.height > _REFUSED_PIXELS:
            raise _too_large(width, height)
        image.load()
        factor = 1
        while image.width * image.height > _MOST_PIXELS * factor**2:
            factor += 1
        small = image.reduce(factor) if factor > 1 and image.mode in ("L", "RGB", "RGBA") else image
        if small.size != (width, height):
            _log.info("%s: %d x %d pixels, shrunk to %d x %d", name, width, height, *small.size)
        return to_rgb(_upright(small))


def _read_as_stored(file: Path | BinaryIO) -> Image.Image:
    with _opened(file) as image:
        if image.width * image.height > _REFUSED_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels; images with boxes or masks may have at "
                f"most {_REFUSED_PIXELS // 10**6} million"
            )
        image.load()
        return to_rgb(image)


def _opened(file: Path | BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError:
        pass
    try:
        # Pillow's guard is for the whole of a file; a JPEG read at an eighth stays small.
        image = JpegImageFile(file)
    except SyntaxError:  # what a plugin says of a file of another format
        raise ValueError(
            f"more than {_REFUSED_PIXELS // 10**6} million pixels, which only a JPEG may have"
        ) from None
    if image.info.get("progressive"):  # its decoder keeps the whole of it
        image.close()
        raise _too_large(*image.size)
    return image


def _too_large(width: int, height: int) -> ValueError:
    return ValueError(
        f"{width} x {height} pixels; at most {_REFUSED_PIXELS // 10**6} million are read, "
        "more only of a baseline JPEG"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels, which are good
        _log.info("EXIF data that cannot be read are left aside")
        return image


def as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """Return an image of a source in the form that pictures are drawn on."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode into 8-bit RGB: 16 bits scaled, transparency on white."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "La":  # Pillow turns it into nothing else
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale values of more than 8 bits to 0..255; Pillow's own conversion would clip them.

    16-bit files have a fixed range. Floats and 32-bit integers have none: the smallest usual range
    that holds all values is taken, or else the range of the values.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, float(_SIXTEEN_BITS)
    if not mode.startswith("I;16"):
        least, most = float(values.min()), float(values.max())
        usual = (1.0, 255.0, high) if mode == "F" else (255.0, high)
        low = min(least, 0.0)
        high = next((top for top in usual if least >= 0 and most <= top), most)
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return np.round(255 * scaled).clip(0, 255).astype(np.uint8)
