"""The task that detection and segmentation share: the model, its images, its export."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL.Image import Image
from torch import Tensor, nn

from foveate import api
from foveate.backbones import backbone_for, set_image_settings
from foveate.convert import save
from foveate.core import Trace
from foveate.core.evaluation import evaluating
from foveate.data import (
    Source,
    Splits,
    Transform,
    Unreadable,
    dense_eval_transform,
    dense_train_transform,
    limited,
    listed,
)
from foveate.data.images import as_picture
from foveate.dense import DenseModel, make_dense, with_class_token
from foveate.predictions import predict_dense
from foveate.registry import suggest
from foveate.train.callbacks import TokenCounts
from foveate.train.dense_recipe import DenseData, DenseRecipe
from foveate.train.draws import Draws
from foveate.train.models import make_model, open_start, set_checkpointing, set_drop_path
from foveate.train.module import Module
from foveate.train.processes import device_of, processes
from foveate.train.result import Result
from foveate.train.run import Loaders, fit
from foveate.train.splits import check_start, open_data
from foveate.train.task import Task

__all__ = ["DenseTask", "make_dense_model", "train_dense"]

_log = logging.getLogger(__name__)
_COMPARED = ("kl", "token")  # losses of methods that need a teacher, and there is none here


class DenseTask(Task):
    """Images of any sizes with objects or label maps.

    The losses are the model's own ones by their names, without "loss_" in front. The model weights
    the method's losses itself; the task weights the others.

    Args:
        model: a detector or a segmenter, with a method or without.
        data: what the recipe says of images.
        weights: weights of losses in place of 1 and of the method's own.

    Attributes:
        labels_of: what the job learns labels of, as ``foveate.data.open_splits`` takes it.
        heads: names of the model's own losses, by its head.
        model: the detector or segmenter.
    """

    labels_of: ClassVar[str]
    heads: ClassVar[Mapping[str, tuple[str, ...]]]
    higher_is_better: bool = True
    model: DenseModel

    def __init__(
        self,
        model: DenseModel,
        data: DenseData | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        given, heads = dict(weights or {}), self.heads[model.settings["head"]["name"]]
        own = model.reducer.loss_weights
        legal = [*heads, *(name for name in own if name.rpartition(".")[2] not in _COMPARED)]
        for name in given:
            if name not in legal:
                raise ValueError(suggest("loss", name, legal))
        super().__init__(model, {name: given[name] for name in heads if name in given})
        own |= {name: given[name] for name in own if name in given}
        self._data = data or DenseData()
        model.transform.resizes_training = False
        _fix_unused(model)

    def read(self, splits: Splits) -> Splits:
        """Return the images as the task reads them."""
        return splits

    def transforms(self) -> tuple[Transform, Transform]:
        """Return the recipe's augmentation; in evaluation the model resizes images itself."""
        channels = self.model.reduced.backbone.channels
        return (
            dense_train_transform(self._data.augment, channels),
            dense_eval_transform(channels, short=None),
        )

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of a list of images and a list of targets."""
        return listed(samples)

    def images(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return images with values from 0 to 1."""
        return [image.float() / 255 for image in batch["image"]]

    def wanted(self, batch: Mapping[str, Any]) -> list[Any]:
        """Return the targets of a batch as the model takes them in training."""
        raise NotImplementedError

    def drawn(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """Return further arguments that the model takes in training: what it needs of chance."""
        return {}

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Compute the losses of the head and of the method."""
        losses = self.model(self.images(batch), self.wanted(batch), **self.drawn(batch, draws))
        return {name.removeprefix("loss_"): value for name, value in losses.items()}

    def trace(self, model: nn.Module, batch: Mapping[str, Any]) -> Trace | None:
        """Record the tokens of a batch in every block."""
        assert isinstance(model, DenseModel)
        return None if model.reducer.name == "dense" else model.trace(self.images(batch))

    def set_progress(self, progress: float, model: nn.Module) -> None:
        """Lower the method's rate and change its stages as the run goes on."""
        assert isinstance(model, DenseModel)
        model.reduced.set_progress(progress)

    @property
    def backbone(self) -> nn.Module:
        """Return the ViT alone; gates, adapter and head train at the full rate."""
        return self.model.reduced.vit

    def units(self) -> list[nn.Module]:
        """Return the blocks of the ViT."""
        return list(self.model.reduced.backbone.blocks)

    def export(self, model: nn.Module, folder: Path) -> Path:
        """Write all of the model, for ``foveate.load``."""
        assert isinstance(model, DenseModel)
        path = folder / "model"
        save(model, path)
        return path


def _fix_unused(model: DenseModel) -> None:
    """Freeze parts that no map depends on, such as the ViT's final norm and head.

    Processes that train together wait for the gradients of all parameters.
    """
    named = dict(model.reduced.vit.named_parameters())
    body = model.backbone
    side = int(model.transform.size_divisible)
    like = next(iter(named.values()))
    image = torch.zeros(
        1, model.reduced.backbone.channels, side, side, device=like.device, dtype=like.dtype
    )
    learning = [p for p in named.values() if p.requires_grad]
    with torch.random.fork_rng(), evaluating(model), torch.enable_grad():
        maps = body.features(image).maps  # type: ignore[operator,union-attr]
        total = torch.stack([values.sum() for values in maps.values()]).sum()
        found = torch.autograd.grad(total, learning, allow_unused=True)
    for parameter, gradient in zip(learning, found, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def make_dense_model(
    recipe: DenseRecipe, classes: tuple[str, ...], heads: Collection[str], usual_head: str
) -> DenseModel:
    """Make a model for some classes, new on a ViT or from an earlier run.

    Args:
        recipe: what to do.
        classes: names of the classes that the data have.
        heads: names of the heads that the job trains.
        usual_head: name of the head where the recipe names none.
    """
    start, parts = recipe.model.start, {"backbone": recipe.backbone, "head": recipe.head}
    found = None
    if start is not None and recipe.model.name is None:
        found = open_start(start, recipe.model.weights)
    if isinstance(found, DenseModel):
        _check_start_head(recipe.model.origin, found, heads)
        model = _gone_on(recipe, found, classes, parts)
    else:
        vit: Any = _with_token(recipe, make_model(recipe.model, None))
        if getattr(vit, "num_classes", 0) and hasattr(vit, "reset_classifier"):
            vit.reset_classifier(0)
        _say_statistics(vit, recipe.data)
        model = make_dense(
            vit,
            classes,
            _shown(recipe, recipe.backbone or {"name": "adapter"}),
            recipe.head or {"name": usual_head},
            recipe.data.image_size,
        )
    if recipe.method is not None:
        method: Any = recipe.method  # in Python also an object
        model = api.apply(model, method)
    device = device_of(recipe.loop)
    if device == "cuda" and math.prod(processes(recipe.loop, device)) > 1:
        # Each device has an image or two, which is too few for statistics of its own.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.train()


def _with_token(recipe: DenseRecipe, vit: nn.Module) -> nn.Module:
    """Give the ViT a class token and the block options that the recipe asks for."""
    vit = with_class_token(vit) if recipe.class_token else vit
    if recipe.model.drop_path:
        set_drop_path(backbone_for(vit), recipe.model.drop_path)
    if recipe.model.checkpointing:
        set_checkpointing(vit)
    return vit


def _shown(recipe: DenseRecipe, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the backbone, with the value for dropped patches."""
    return {**backbone, **({} if recipe.gone is None else {"gone": recipe.gone})}


def _say_statistics(vit: nn.Module, data: DenseData) -> None:
    """Store the recipe's mean and spread on the ViT, where dense models read them."""
    if data.mean is None or data.std is None:
        return
    channels = backbone_for(vit).channels
    if {len(data.mean), len(data.std)} != {channels}:
        raise ValueError(
            f"data.mean and data.std need one value for each of the model's {channels} channels"
        )
    set_image_settings(vit, {"mean": tuple(data.mean), "std": tuple(data.std)})


def _check_start_head(origin: str, found: DenseModel, heads: Collection[str]) -> None:
    """Refuse a model of another job, whose head cannot learn from these labels."""
    if not found.settings:
        raise ValueError(
            f"{origin} cannot be built again for training: make it with foveate.dense.make_dense"
        )
    head = found.settings["head"]["name"]
    if head not in heads:
        raise ValueError(
            f"{origin} has the head {head}, and this job trains {' or '.join(heads)}: start from "
            "the ViT or the run of its backbone"
        )


def _gone_on(
    recipe: DenseRecipe,
    found: DenseModel,
    classes: tuple[str, ...],
    parts: Mapping[str, Mapping[str, Any] | None],
) -> DenseModel:
    """Take a detector or segmenter of an earlier run, for other classes if asked for."""
    origin, settings = recipe.model.origin, found.settings
    for name, given in parts.items():
        if given is not None and dict(given) != settings[name]:
            raise ValueError(
                f"{origin} has {name} {settings[name]}, and the recipe says {dict(given)}: leave "
                f"{name} out, or start from a ViT"
            )
    if found.reducer.name != "dense":
        _log.info("%s was saved with %r, which is left out", origin, found.reducer)
        found = api.unwrap(found)  # type: ignore[assignment]
    same = found.class_names == classes
    if not same and not recipe.model.new_head:
        raise ValueError(
            f"{origin} has {len(found.class_names)} classes ({', '.join(found.class_names[:3])}, "
            f"...), the data {len(classes)} ({', '.join(classes[:3])}, ...): model.new_head=true "
            "trains new outputs for them"
        )
    for name in ("pool", "multiscale"):
        if getattr(recipe.model, name) is not None:
            raise ValueError(f"model.{name} is for a ViT, and {origin} is a whole detector")
    vit = _with_token(recipe, found.reduced.vit)
    _say_statistics(vit, recipe.data)
    backbone = _shown(recipe, settings["backbone"])
    model = make_dense(vit, classes, backbone, settings["head"], recipe.data.image_size)
    made = model.state_dict()
    state, shapes = found.state_dict(), {name: value.shape for name, value in made.items()}
    if vit is not found.reduced.vit:  # its new class token stays what it is
        state |= {name: made[name] for name in made.keys() - state if name.endswith("cls_token")}
    kept = {key: value for key, value in state.items() if same or value.shape == shapes[key]}
    model.load_state_dict(kept, strict=same)
    if not same:
        _log.info(
            "new outputs for %d classes; %d tensors anew", len(classes), len(state) - len(kept)
        )
    return model


def train_dense(
    recipe: DenseRecipe,
    out: Path,
    make_task: Callable[[Any, Splits], DenseTask],
    labels_of: str,
    **how: Any,
) -> Result:
    """Train a detector or a segmenter on the engine and export it.

    Args:
        recipe: what to do.
        out: folder of the run.
        make_task: from the recipe and the opened images.
        labels_of: what the images must have labels of.
        how: as in ``fit``.
    """
    if recipe.loop.strategy == "fsdp":
        raise ValueError(
            "loop.strategy=fsdp is not for detectors and segmenters yet: ddp holds all weights on "
            "each process"
        )

    def build(recipe: Any) -> tuple[Task, Splits]:
        check_start(recipe.data, recipe.model.start)
        splits = open_data(recipe.data, labels_of=labels_of)
        assert splits.val is not None
        _check_countable(limited(splits.val, recipe.data.val_limit, balanced=False))
        task = make_task(recipe, splits)
        return task, task.read(splits)

    return fit(recipe, out, build, callbacks=_callbacks, **how)


def _check_countable(source: Any) -> None:
    """Refuse validation images without a single object: no score would choose the best weights."""
    for index in range(len(source)):
        try:
            found = source.targets(index)
        except Unreadable:  # the loader skips it and says so, or fails where the recipe wants that
            continue
        if len(found.get("labels", ())) or "semantic" in found:
            return
    raise ValueError(
        f"none of the {len(source)} validation images of {source.spec} has an object that can be "
        "read, so there is nothing to choose the best weights by: give data.val others"
    )


def _callbacks(recipe: Any, task: Task, loaders: Loaders, out: Path) -> list[Callback]:
    loop = recipe.loop
    found: list[Callback] = []
    if loop.statistics:
        found.append(TokenCounts())
    if loop.pictures_every is not None:
        assert loaders.val is not None
        found.append(DensePictures(out / "pictures", loop.pictures_every, loaders.val.source))
    return found


class DensePictures(Callback):
    """Draw every few epochs what the model finds in the first validation images.

    Args:
        folder: of the pictures, with a folder for each epoch.
        every: epochs between pictures.
        source: the validation images.
        number: of images.
    """

    def __init__(self, folder: Path, every: int, source: Source, number: int = 4) -> None:
        if source.finished:
            raise ValueError(
                f"loop.pictures_every draws on pictures, and {source.spec} gives tensors: leave it "
                "out"
            )
        self.folder, self.every = folder, every
        self.source, self.number = source, number

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw on one process, also after epochs without an evaluation."""
        assert isinstance(module, Module)
        epoch = trainer.current_epoch + 1
        if epoch % self.every or not trainer.is_global_zero:
            return
        model: Any = module.exported
        images: list[Image] = []
        for index in range(len(self.source)):
            if len(images) < self.number:
                with suppress(Unreadable):  # evaluation says so, if it is to
                    images.append(as_picture(self.source.image(index)))
        predict_dense(model, images, pictures=self.folder / f"epoch-{epoch:03d}", least=0.3)
