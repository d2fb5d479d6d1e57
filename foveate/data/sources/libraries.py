"""Data sets of torchvision and of Hugging Face."""

from __future__ import annotations

import importlib
import inspect
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image

from foveate.data.images import Unreadable, decode_image, to_rgb
from foveate.data.sources.base import NAMES, NO_LABEL, WHOLE, NoSplit, Source
from foveate.data.sources.memory import ArraySource
from foveate.registry import suggest

__all__ = ["open_hf", "open_torchvision"]


@dataclass(frozen=True)
class TorchvisionSource(Source):
    """A data set of torchvision, image by image; see ``Source``."""

    spec: str
    split: str
    dataset: Any
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        try:
            image = self.dataset[index][0]
            return image.convert("L") if self.channels == 1 else to_rgb(image)
        except Exception as error:  # whatever the data set's own reader raises
            raise Unreadable(f"{self.name(index)}: {_one_line(error)}") from error

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def content(self, index: int) -> bytes:
        image = self.image(index)
        return repr((image.mode, image.size)).encode() + image.tobytes()


def open_torchvision(spec: str, location: str, split: str, labels: bool) -> Source:
    """Open ``NAME:FOLDER``, a class of ``torchvision.datasets`` and where its files lie."""
    name, _, folder = location.partition(":")
    if not folder:
        raise ValueError(f"{spec!r} names no folder: it is torchvision:NAME:FOLDER")
    if name not in torchvision.datasets.__all__:
        raise ValueError(suggest("data set of torchvision", name, torchvision.datasets.__all__))
    dataset = _built(name, str(Path(folder).expanduser()), split)
    if not len(dataset):
        raise ValueError(f"{spec} holds no images of the split {split!r}")
    found, classes = _torchvision_labels(spec, dataset) if labels else (None, None)
    first = dataset[0][0]
    if not isinstance(first, Image.Image):
        raise ValueError(f"{spec} gives {type(first).__name__}; images are needed")
    # Small sets are one array already, but some in another layout than their images have.
    array = np.asarray(getattr(dataset, "data", ()))
    if array.dtype == np.uint8 and array.ndim >= 3:
        array = array[..., None] if array.ndim == 3 else array
        if np.array_equal(array[0].squeeze(), np.asarray(first)) and array.shape[3] in (1, 3):
            return ArraySource(spec, split, array, found, classes, array.shape[3])
    channels = 1 if first.mode in ("1", "L") else 3
    return TorchvisionSource(spec, split, dataset, found, classes, channels)


def _built(name: str, root: str, split: str) -> Any:
    """Make the data set, whose class may take ``train=True``, ``split="train"`` or others."""
    cls = getattr(torchvision.datasets, name)
    parameters = inspect.signature(cls).parameters
    fixed = {"download": False} if "download" in parameters else {}
    tries: list[dict[str, Any]]
    if "root" in parameters and "train" in parameters:
        tries = [{"train": split == "train"}] if split in ("train", "test") else []
    elif "root" in parameters and "split" in parameters:
        names = (*NAMES.get(split, ()), *(("trainval",) if split == "train" else ()))
        tries = [{"split": each} for each in names]
    else:
        raise ValueError(f"torchvision's {name} is not cut into training and validation")
    reason: Exception | None = None
    for choice in tries:
        try:
            return cls(root, **choice, **fixed)
        except Exception as error:
            reason = error
            if "Unknown value" not in str(error):  # of the split: it may have another name
                break
    else:
        raise NoSplit(f"torchvision's {name} has no split {split!r}")
    what = f"torchvision's {name} cannot be read from {root}"
    raise ValueError(f"{what}: {_one_line(reason)}") from reason


def _torchvision_labels(spec: str, dataset: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    found = None
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None) if found is None else found
    for attribute in ("samples", "_samples"):
        pairs = getattr(dataset, attribute, None) if found is None else None
        found = [label for _, label in pairs] if pairs else found
    values = np.asarray(() if found is None else found)
    if values.shape != (len(dataset),) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{spec} does not say its labels as one class for each image")
    return _checked(spec, values, getattr(dataset, "classes", ()))


def _checked(
    spec: str, labels: np.ndarray, names: Iterable[Any] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels that all have a class; classes without names are named by their numbers."""
    if labels.min() < 0:
        without = int((labels < 0).sum())
        raise ValueError(f"{spec} has {without} of {len(labels)} images without a label")
    count = int(labels.max()) + 1
    # ImageNet's classes have several names each.
    classes = tuple(n if isinstance(n, str) else str(n[0]) for n in names or ())
    if len(classes) < count:
        classes = tuple(map(str, range(count)))
    return labels.astype(np.int64), classes


@dataclass(frozen=True)
class HfSource(Source):
    """Rows of a Hugging Face data set, their images not decoded yet; see ``Source``."""

    spec: str
    split: str
    rows: Any
    column: str
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    channels: int = 3

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        return decode_image(io.BytesIO(self.content(index)), self.name(index))

    def content(self, index: int) -> bytes:
        cell, name = self.rows[index][self.column] or {}, self.name(index)
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            try:
                data = Path(cell["path"]).read_bytes()
            except OSError as error:
                raise Unreadable(f"{name}: {error}") from error
        if data is None:
            raise Unreadable(f"{name}: there is no image in the column {self.column!r}")
        return bytes(data)

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])


def open_hf(spec: str, location: str, split: str, labels: bool) -> HfSource:
    """Open ``NAME`` or ``PATH``, or ``PATH[image=COLUMN, label=COLUMN]`` where columns are many.

    A path that ``save_to_disk`` wrote is read from there; all else goes through ``load_dataset``.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"{spec} needs a package: pip install 'foveate[datasets]'") from error
    place, columns = _columns(spec, location)
    try:
        rows = _rows(library, place, split)
    except ValueError:
        raise
    except Exception as error:  # of the network, the file formats, the hub, the cache
        raise ValueError(f"{spec} cannot be opened: {_one_line(error)}") from error
    if not len(rows):
        raise ValueError(f"{spec} holds no images of the split {split!r}")
    image = _column(spec, rows, "image", columns, library.Image)
    found = classes = None
    if labels:
        label = _column(spec, rows, "label", columns, library.ClassLabel)
        values = rows.with_format("numpy")[label][:]
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{spec}: the column {label!r} holds no whole numbers")
        found, classes = _checked(spec, values, getattr(rows.features[label], "names", None))
    # Other columns would be read along with every image.
    rows = rows.select_columns([image]).cast_column(image, library.Image(decode=False))
    return HfSource(spec, split, rows, image, found, classes)


def _columns(spec: str, location: str) -> tuple[str, dict[str, str]]:
    match = re.fullmatch(r"(.*?)\[(.*)\]", location)
    if not match:
        return location, {}
    columns = {}
    for part in match[2].split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals or not value:
            raise ValueError(f"cannot read {part!r} in {spec!r}: columns go as label=COLUMN")
        if key not in ("image", "label"):
            raise ValueError(suggest("column", key, ("image", "label")))
        columns[key] = value
    return match[1], columns


def _rows(library: Any, place: str, split: str) -> Any:
    path = Path(place).expanduser()
    if (path / "state.json").is_file():  # one split alone
        if split != WHOLE:
            raise NoSplit(f"{place} was saved as one set, so there is no split {split!r}")
        return library.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        held = library.load_from_disk(str(path))
        return held[_present(place, split, list(held))]
    place = str(path) if path.exists() else place
    return library.load_dataset(
        place, split=_present(place, split, library.get_dataset_split_names(place))
    )


def _present(place: str, split: str, held: list[str]) -> str:
    wanted = NAMES.get(split, (split,))
    for name in wanted:
        if name in held:
            return name
    raise NoSplit(f"{place} has the splits {', '.join(held)}; needed is {' or '.join(wanted)}")


def _column(spec: str, rows: Any, what: str, given: dict[str, str], kind: type) -> str:
    names = list(rows.features)
    if what in given:
        if given[what] not in names:
            raise ValueError(suggest("column", given[what], names))
        return given[what]
    fitting = [name for name in names if isinstance(rows.features[name], kind)]
    if len(fitting) != 1:
        found = f"{len(fitting)} columns ({', '.join(fitting)})" if fitting else "no column"
        raise ValueError(
            f"{spec} has {found} of the type {kind.__name__} among {', '.join(names)}: "
            f"name one, as in {spec.partition('[')[0]}[{what}=COLUMN]"
        )
    return fitting[0]


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
