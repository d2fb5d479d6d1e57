"""Open a run's images, and refuse to judge a model by images that it was trained on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from foveate import config
from foveate.data import Splits, open_splits
from foveate.data.sources.base import IMAGE
from foveate.data.splits import NONE, holds_out, place
from foveate.train import recipe as recipes

__all__ = ["check_start", "check_unseen", "open_data"]

_log = logging.getLogger(__name__)
_INSIDE = ("snapshots", "best", "model", "checkpoints")  # folders of models inside that of a run


def open_data(data: recipes.Data, *, labels: bool = True, labels_of: str = IMAGE) -> Splits:
    """Open the images that a recipe names, and check that no two splits share any.

    Args:
        data: the recipe's.
        labels: without them images need none.
        labels_of: what must have labels: the whole "image", "objects" or "pixels".
    """
    if labels and data.val == NONE:
        raise ValueError("data.val=none is for pre-training: this job chooses by validation images")
    splits = open_splits(
        data.train,
        data.val,
        data.test,
        share=data.val_share,
        seed=data.split_seed,
        allowed=data.overlap,
        labels=labels,
        labels_of=labels_of,
    )
    classes = splits.train.classes
    if splits.held_out is not None and classes is not None and labels_of == IMAGE:
        left = {splits.train.label(i) for i in range(len(splits.train))}
        lost = [name for number, name in enumerate(classes) if number not in left]
        if lost:
            _log.warning(
                "the division leaves no training image of %s, which another data.split_seed may do",
                ", ".join(lost),
            )
    return splits


def check_start(data: recipes.Data, start: Any) -> None:
    """Refuse a start that was trained on images which judge this run, if its recipe shows it."""
    if not isinstance(start, (str, Path)):
        return
    folder = Path(start) if Path(start).is_dir() else Path(start).parent
    while folder.name in _INSIDE and not (folder / "recipe.yaml").is_file():
        folder = folder.parent
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    tree = config.load(path).get("data")
    # A data set object is recorded by its description, which cannot be opened.
    if isinstance(tree, dict) and isinstance(tree.get("train"), str):
        keys = [key for key in ("train", "val", "val_share", "split_seed") if key in tree]
        seen = config.parse(recipes.Data, {key: tree[key] for key in keys}, where=str(path))
        check_unseen(seen, str(start), data, "this run")


def check_unseen(seen: recipes.Data, who: str, data: recipes.Data, whose: str) -> None:
    """Refuse to judge a model by images that it was trained on.

    Args:
        seen: data of the recipe that trained it.
        who: name of the model or stage that was trained, for the error.
        data: data that judge.
        whose: name of the run that is judged, for the error.
    """
    for name in ("val", "test"):
        spec = getattr(data, name)
        if spec is not None and place(spec) == place(seen.train):
            raise ValueError(
                f"{who} trains on {spec}, which is data.{name} of {whose}: nothing may learn from "
                "the images that models are judged by"
            )
    if place(data.train) != place(seen.train):
        return
    for name in ("val", "val_share", "split_seed"):
        mine, its = getattr(seen, name), getattr(data, name)
        # Whether images are held out is asked last: the set is opened for that.
        if mine != its and holds_out(data.train, data.val):
            raise ValueError(
                f"{who} has data.{name}={mine} and {whose} {its}, on the same images: it would be "
                "trained on some that are held out for validation, so both must be the same"
            )
