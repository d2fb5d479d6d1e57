"""Scenes of garments as a data set without files, and the same scenes as a folder."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from foveate.data.fashion import CLASSES
from foveate.data.rle import encode, mask_box
from foveate.data.scenes import PIXEL_CLASSES, Scene, draw_scene
from foveate.data.sources.base import OBJECTS, PIXELS, NoSplit, Source, Tell
from foveate.data.sources.coco import object_targets
from foveate.files import write_text
from foveate.registry import suggest

__all__ = ["Scenes", "SceneSource", "open_scenes", "write_scenes"]


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """The settings of scenes.

    Attributes:
        size: height and width in pixels, from 32.
        train: number of training scenes.
        val: number of validation scenes.
        test: number of test scenes.
        seed: seed of the scenes.
        colour: whether they have colours.
        clutter: difficulty, from 0 to 1; see ``draw_scene``.
    """

    size: tuple[int, int] = (96, 96)
    train: int = 2000
    val: int = 500
    test: int = 500
    seed: int = 0
    colour: bool = False
    clutter: float = 1.0

    def __post_init__(self) -> None:
        if not all(32 <= side <= 4096 for side in self.size):
            raise ValueError(f"the sides of scenes must lie in 32..4096, got {self.size}")
        for name in ("train", "val", "test"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"the number of {name} scenes must be 1 or more, got {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"the seed of scenes must lie in 0..{2**31 - 1}, got {self.seed}")
        if not 0 <= self.clutter <= 1:
            raise ValueError(f"the clutter of scenes must lie in 0..1, got {self.clutter}")


@dataclass(frozen=True)
class SceneSource(Source):
    """Scenes of one split, drawn on demand; see ``Source``."""

    spec: str
    split: str
    made: Scenes
    classes: tuple[str, ...] | None
    masks: bool = True
    labels_of: tuple[str, ...] = (OBJECTS, PIXELS)

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Give 3 for colour, 1 for grey."""
        return 3 if self.made.colour else 1

    @property
    def pixel_classes(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Background before the garments."""
        return None if self.classes is None else PIXEL_CLASSES

    @property
    def category_ids(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """As ``write_scenes`` numbers the classes, from 1."""
        return None if self.classes is None else tuple(range(1, len(CLASSES) + 1))

    def __len__(self) -> int:
        count: int = getattr(self.made, self.split)
        return count

    def scene(self, index: int) -> Scene:
        """Draw a scene."""
        made = self.made
        return draw_scene(made.size, self.channels, made.seed, self.split, index, made.clutter)

    def image(self, index: int) -> np.ndarray:
        return self.scene(index).image

    def targets(self, index: int) -> dict[str, Any]:
        return self._targets(self.scene(index), index)

    def sample(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {"image": scene.image, **self._targets(scene, index)}

    def content(self, index: int) -> bytes:
        """Return the settings that determine the scene, which is faster than drawing it."""
        made = self.made
        how = f"{made.size} {self.channels} {made.seed} {made.clutter}"
        return f"scene {how} {self.split} {index}".encode()

    def boxes_only(self) -> SceneSource:
        return dataclasses.replace(self, masks=False)

    def class_counts(self, tell: Tell = iter) -> np.ndarray:
        counts = np.zeros(len(CLASSES), dtype=np.int64)
        for index in tell(range(len(self))):
            counts += np.bincount(self.scene(index).labels, minlength=len(counts))
        return counts

    def _targets(self, scene: Scene, index: int) -> dict[str, Any]:
        if self.classes is None:
            return {}
        boxes = np.array([mask_box(mask) for mask in scene.masks]).reshape(-1, 4)
        found = object_targets(
            boxes=boxes,
            labels=scene.labels,
            areas=scene.masks.sum((1, 2)),
            crowds=np.zeros(len(scene.labels)),
            masks=scene.masks if self.masks else None,
            size=self.made.size,
            image_id=index,
        )
        return {**found, "semantic": tv_tensors.Mask(torch.from_numpy(scene.semantic()))}


def open_scenes(spec: str, location: str, split: str, labels: bool) -> SceneSource:
    """Open scenes by options such as ``size=96,train=2000,val=500,colour=true,clutter=0.3``."""
    if split not in ("train", "val", "test"):
        raise NoSplit(f"{spec} has the splits train, val and test, and no {split}")
    options: dict[str, Any] = {}
    names = [one.name for one in dataclasses.fields(Scenes)]
    for part in filter(None, location.split(",")):
        key, equals, value = (text.strip() for text in part.partition("="))
        if key not in names:
            raise ValueError(suggest("option of scenes", key, names))
        options[key] = _read(key, value if equals else "true")
    return SceneSource(spec, split, Scenes(**options), CLASSES if labels else None)


def _read(key: str, value: str) -> Any:
    if key == "colour":
        if value not in ("true", "false"):
            raise ValueError(f"colour of scenes must be true or false, got {value!r}")
        return value == "true"
    if key == "size":
        return scene_size(value)
    if key == "clutter":
        if not re.fullmatch(r"\d{1,2}(\.\d{1,9})?", value):
            raise ValueError(f"clutter of scenes must be a number in 0..1, got {value!r}")
        return float(value)
    if not re.fullmatch(r"\d{1,10}", value):
        raise ValueError(f"{key} of scenes must be a whole number, got {value!r}")
    return int(value)


def scene_size(text: str) -> tuple[int, int]:
    """Read ``96`` or ``96x128``, height before width."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise ValueError(f"the size of scenes goes as 96 or 96x128 (height x width), got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def write_scenes(folder: Path, made: Scenes, tell: Tell = iter) -> None:
    """Write scenes as files that ``coco:FOLDER`` and ``masks:FOLDER`` open with the same targets.

    Args:
        folder: a new or an empty folder.
        made: settings of the scenes.
        tell: iterates over the numbers of the scenes, and may show the progress.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: name a new one")
    places = [(split, i) for split in ("train", "val", "test") for i in range(getattr(made, split))]
    sources = {one: SceneSource("scenes", one, made, CLASSES) for one in ("train", "val", "test")}
    for kind in ("images", "masks"):
        for split in sources:
            (folder / kind / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    write_text(folder / "classes.txt", "\n".join(PIXEL_CLASSES) + "\n")
    images: dict[str, list[dict[str, Any]]] = {split: [] for split in sources}
    objects: dict[str, list[dict[str, Any]]] = {split: [] for split in sources}
    height, width = made.size
    for number in tell(range(len(places))):
        split, index = places[number]
        scene, name = sources[split].scene(index), f"{index:06d}.png"
        pixels = scene.image[..., 0] if scene.image.shape[2] == 1 else scene.image
        Image.fromarray(pixels).save(folder / "images" / split / name)
        Image.fromarray(scene.semantic()).save(folder / "masks" / split / name)
        images[split].append({"id": index, "file_name": name, "height": height, "width": width})
        for mask, counts, label in zip(
            scene.masks, encode(scene.masks), scene.labels.tolist(), strict=True
        ):
            box = mask_box(mask)
            assert box is not None
            left, top, right, bottom = box
            objects[split].append(
                {
                    "id": len(objects[split]) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": counts.decode("ascii")},
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    for split in sources:  # last, so that a folder that was cut short does not open
        content = {
            "info": {"description": "scenes of Fashion-MNIST garments", "seed": made.seed},
            "images": images[split],
            "annotations": objects[split],
            "categories": categories,
        }
        write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(content))
