"""Predict labels and confidences for images, which are prepared as in evaluation."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from foveate import machine
from foveate.backbones import backbone_of, class_names
from foveate.convert import open_base
from foveate.core import ReducedViT, TokenState
from foveate.core.evaluation import PRECISIONS, answering, evaluating
from foveate.core.schedule import check_choice
from foveate.data import ImageFiles, Inputs, to_rgb
from foveate.dense import DenseModel
from foveate.files import write_text
from foveate.viz import answers

__all__ = [
    *("Images", "Prediction", "Predictions", "named_images", "opened", "picture", "predict"),
]

Images = str | os.PathLike[str] | Image.Image | Sequence[Any]


@dataclass(frozen=True)
class Prediction:
    """The answers of a model to one image, the most confident one first.

    Attributes:
        image: path of the image, or "image N" for a PIL image.
        method: the method that the model ran with; None for a plain model.
        classes: numbers of the classes.
        labels: their names, "class N" where the model has no names.
        confidences: the softmax of the logits.
        tokens: number of tokens in the last block, prefix tokens included; None for a plain model.
    """

    image: str
    method: str | None
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    tokens: int | None

    @property
    def label(self) -> str:
        """Return the name of the most confident class."""
        return self.labels[0]

    @property
    def confidence(self) -> float:
        """Return the confidence of the most confident class."""
        return self.confidences[0]


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """Predictions for several images, in their order.

    Attributes:
        model: name of the model, or its class.
        records: one prediction for each image.
        unreadable: files that were skipped, with the reasons.
    """

    model: str
    records: tuple[Prediction, ...]
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each answer: image, method, tokens, rank, class, label, confidence."""
        return [
            {
                "image": record.image,
                "method": record.method,
                "tokens": record.tokens,
                "rank": rank,
                **answer,
            }
            for record in self.records
            for rank, answer in enumerate(_answers(record), 1)
        ]

    def csv(self, path: str | os.PathLike[str]) -> None:
        """Write ``rows`` as a table of comma-separated values."""
        names = ("image", "method", "tokens", "rank", "class", "label", "confidence")
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows())
        _write(path, text.getvalue())

    def json(self, path: str | os.PathLike[str]) -> None:
        """Write one entry for each image, with its answers in a list."""
        content = {
            "model": self.model,
            "images": [
                {
                    "image": record.image,
                    "method": record.method,
                    "tokens": record.tokens,
                    "answers": _answers(record),
                }
                for record in self.records
            ],
            "unreadable": self.unreadable,
        }
        _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _answers(record: Prediction) -> list[dict[str, Any]]:
    return [
        {"class": number, "label": label, "confidence": confidence}
        for number, label, confidence in zip(
            record.classes, record.labels, record.confidences, strict=True
        )
    ]


def _write(path: str | os.PathLike[str], text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def predict(
    model: nn.Module | str | os.PathLike[str],
    images: Images,
    *,
    top: int = 5,
    batch: int = 32,
    device: str = "auto",
    precision: str = "fp32",
    strict: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Predictions:
    """Classify images: return the most likely classes of each, and their confidences.

    Args:
        model: a plain ViT, a model from ``foveate.apply``, or what the command line takes: a
            file, a folder, a name of timm, or "demo".
        images: paths of files and folders, or PIL images.
        top: number of answers for each image.
        batch: number of images in a forward pass.
        device: "cpu" or "cuda". "auto" leaves a given model where it is, and opens others on a GPU
            if there is one.
        precision: "fp32", or "bf16" for automatic mixed precision.
        strict: raise an error for the first file that cannot be read, instead of skipping it.
        progress: called with the number of images done and the number of all.
    """
    for name, value in (("top", top), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    check_choice("precision", precision, PRECISIONS)
    pictures, count = named_images(images, strict)
    model, title, place = opened(model, device)
    classifier = _Classifier(model)
    if place is not None:
        model.to(place)
    records: list[Prediction] = []
    stream: Iterator[tuple[str | Path, Image.Image]] = iter(pictures)
    with answering(model, precision=precision):
        while some := list(islice(stream, batch)):
            records += classifier.predictions(some, top)
            if progress is not None:
                progress(len(records), count)
    broken = pictures.broken if isinstance(pictures, ImageFiles) else {}
    return Predictions(title, tuple(records), {str(path): why for path, why in broken.items()})


def picture(model: nn.Module, image: Image.Image, prediction: Prediction) -> Image.Image:
    """Draw an image, its answers as bars and, for a reduced model, the patches it kept.

    Args:
        model: the model that made the prediction.
        image: the image that the prediction is for.
        prediction: the answers to draw.
    """
    classifier, trace = _Classifier(model), None
    if isinstance(model, ReducedViT):
        with evaluating(model):
            trace = model.trace(classifier.batch([image]))
    title = [Path(prediction.image).name, *([prediction.method] if prediction.method else [])]
    return answers(
        image,
        prediction.labels,
        prediction.confidences,
        title=title,
        trace=trace,
        box=classifier.inputs.box(image),
    )


def opened(
    model: nn.Module | str | os.PathLike[str], device: str
) -> tuple[nn.Module, str, str | None]:
    """Return a model, its name, and the device to move it to; None leaves it where it is."""
    if isinstance(model, nn.Module):
        place = None if device == "auto" else machine.device_of(device)
        return model, type(getattr(model, "vit", model)).__name__, place
    title = os.fspath(model)
    return open_base(title), title, machine.device_of(device)


def named_images(
    images: Images, strict: bool
) -> tuple[ImageFiles | list[tuple[str | Path, Image.Image]], int]:
    """Return pairs of a name and an RGB image, and how many there are at most."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    given = list(images)
    if given and all(isinstance(image, Image.Image) for image in given):
        return [(f"image {n}", to_rgb(image)) for n, image in enumerate(given)], len(given)
    for image in given:
        if not isinstance(image, (str, os.PathLike)):
            raise ValueError(
                f"images must all be paths or all be PIL images, got {type(image).__name__}"
            )
    files = ImageFiles(given, strict=strict)
    return files, len(files.files)


class _Classifier:
    """Holds a model, the preparation of its images and the names of its classes."""

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, DenseModel):
            raise ValueError(
                f"a {type(model).__name__} has no class for a whole image: use "
                "foveate.predictions.predict_dense"
            )
        self.model = model
        self.backbone = backbone_of(model)
        if not self.backbone.classifies:
            raise ValueError(
                f"this {type(self.backbone.model).__name__} has no classifier, so it has no labels "
                "to give: fine-tune it first"
            )
        self.names = class_names(model)
        self.inputs = Inputs.of(model)

    def batch(self, images: Iterable[Image.Image]) -> Tensor:
        """Prepare RGB images, ``[B, channels, H, W]``, on the model's device."""
        return self.inputs.batch(images, next(self.model.parameters()))

    def predictions(
        self, pictures: Sequence[tuple[str | Path, Image.Image]], top: int
    ) -> list[Prediction]:
        """Classify a batch of named images."""
        logits, tokens = self._forward(self.batch(image for _, image in pictures))
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's answers contain NaN or infinity: its weights are broken")
        found = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
        method = repr(self.model.reducer) if isinstance(self.model, ReducedViT) else None
        return [
            Prediction(
                image=str(name),
                method=method,
                classes=tuple(classes),
                labels=tuple(map(self._label, classes)),
                confidences=tuple(confidences),
                tokens=count,
            )
            for (name, _), classes, confidences, count in zip(
                pictures, found.indices.tolist(), found.values.tolist(), tokens, strict=True
            )
        ]

    def _label(self, number: int) -> str:
        return f"class {number}" if self.names is None else self.names[number]

    def _forward(self, images: Tensor) -> tuple[Tensor, Sequence[int | None]]:
        """Return logits, and for each image the tokens that the last block feeds forward."""
        model, depth = self.model, self.backbone.spec.depth
        if not isinstance(model, ReducedViT):
            return self.backbone.native(images), [None] * len(images)
        seen: dict[str, TokenState] = {}
        state = model.begin(images)
        for block in range(depth):
            state = model.step(block, state, seen.__setitem__ if block == depth - 1 else None)
        last = seen["mlp"]
        tokens = last.layout.lengths if last.alive is None else (last.alive > 0).sum(1).tolist()
        return model.backbone.head(model.end(state)), list(tokens)
