"""Recipes: everything that decides how a training run goes, as dataclasses that YAML fills in.

Values are checked here, where they stand, before data or models are touched. The parts are shared
by all jobs; each job's recipe is a class of its own at the end.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.optim import list_optimizers

from foveate.core.schedule import check_choice
from foveate.data import Augment
from foveate.data.splits import NONE
from foveate.registry import make

__all__ = [
    "Adapt",
    "Data",
    "Distill",
    "Finetune",
    "LENGTHS",
    "Loop",
    "Masking",
    "Mix",
    "Model",
    "Optim",
    "Probe",
    "Reading",
    "Recipe",
    "Reduce",
    "at_least",
    "checked_weights",
    "one_word",
]

LENGTHS = ("epochs", "max_steps", "patience")  # of ``Loop``; may change when a run is resumed


@dataclass(kw_only=True)
class Model:
    """The model to train, and its first weights.

    Attributes:
        name: name of a timm ViT, "lvvit_s" or "lvvit_m"; None uses the model that ``start`` holds.
        options: arguments of the model's constructor, such as model.options.img_size=64.
        start: weights to begin with: a checkpoint file, the folder of a run, a folder that foveate
            or Hugging Face has saved, "demo", or "pretrained" for timm's own weights; None begins
            with random ones. In Python also a module of your own, which is itself trained.
        weights: which weights to read from a checkpoint that has two sets: "model", "ema" (their
            running mean), or "auto", which prefers the model's.
        new_head: replace a head whose number of classes differs from the data's; otherwise a
            different number is an error. A start without a head always gets a new one.
        multiscale: options of ``foveate.backbones.multiscale``, which gives a plain ViT of timm a
            second scale: {} takes its defaults, None leaves the model as it is.
        pool: how the head pools tokens: "token" (class token) or "avg" (mean of the patches); None
            keeps the model's own way.
        drop_path: rate of stochastic depth in the last block; it grows linearly from the first.
        checkpointing: recompute activations in the backward pass, to save memory.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    weights: str = "auto"
    new_head: bool = False
    multiscale: dict[str, Any] | None = None
    pool: str | None = None
    drop_path: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.name is None and self.start is None:
            raise ValueError("model.name or model.start must say which model is trained")
        if self.start == "pretrained" and self.name is None:
            raise ValueError("model.start=pretrained needs model.name, a model of timm")
        if self.options and self.name is None:
            raise ValueError("model.options are for a model made by model.name")
        check_choice("model.pool", self.pool, (None, "token", "avg"))
        check_choice("model.weights", self.weights, ("auto", "model", "ema"))
        _share("model.drop_path", self.drop_path, below_one=True)

    @property
    def origin(self) -> str:
        """Say where the weights are from, for messages: a path, or the class of a given model."""
        return self.start if isinstance(self.start, str) else type(self.start).__name__


@dataclass(kw_only=True)
class Data:
    """Images, and how they become batches.

    Attributes:
        train: training images: fashion-mnist (the part that ships), fashion-mnist:FOLDER (the
            whole), folder:PATH (one subfolder for each class), torchvision:NAME:FOLDER (such as
            torchvision:CIFAR10:data), shards:PATTERN (WebDataset tar files) or hf:NAME (a data set
            of Hugging Face); for detection and segmentation coco:PATH (boxes and masks of objects),
            masks:PATH (a class for each pixel) or scenes (made of fashion-mnist). In Python also a
            data set of your own; so may val and test be.
        val: validation images, by which rates, epochs and the best weights are chosen; None uses
            the split "val" of ``train``, or holds out a part of its training images where it has
            none. "none" turns validation off, which only pre-training allows.
        test: test images, which ``foveate eval`` and ``foveate compare`` use after training; None
            uses the split "test" of ``train`` if it has one.
        val_share: share of the training images to hold out where there is no split "val".
        split_seed: seed that chooses the held-out images. The choice depends only on the content
            of the images and on this number.
        overlap: number of images that two splits may have in common; more are an error.
        mean: mean of the pixels in each channel, from 0 to 1; None uses the model's own.
        std: standard deviation of the pixels in each channel; None uses the model's own.
        crop_pct: share of an image's short side that evaluation keeps.
        augment: what is done to training images.
        batch: number of images that each process takes in one step.
        val_batch: number of images in one step of evaluation; None uses as many as in training.
        workers: number of processes that read images; 0 reads them in the training process. None
            is 0 without a GPU and for images in memory, else one for each core but one, up to 8.
        repeats: number of differently augmented copies of an image in one epoch (repeated
            augmentation). The length of an epoch stays the same, so with 3 it visits a third of
            the images.
        corrupt: what to do with images that cannot be read: "skip" them, named and counted, or
            "fail".
        limit: number of training images to use, some of every class; None uses all.
        val_limit: number of validation images to use, evenly spaced; None uses all.
    """

    train: str = "fashion-mnist"
    val: str | None = None
    test: str | None = None
    val_share: float = 0.1
    split_seed: int = 0
    overlap: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 0.875
    augment: Augment = field(default_factory=Augment)
    batch: int = 128
    val_batch: int | None = None
    workers: int | None = None
    repeats: int = 1
    corrupt: str = "skip"
    limit: int | None = None
    val_limit: int | None = None

    def __post_init__(self) -> None:
        check_choice("data.corrupt", self.corrupt, ("skip", "fail"))
        at_least("data.batch", self.batch, 1)
        if self.workers is not None:
            at_least("data.workers", self.workers, 0)
        at_least("data.repeats", self.repeats, 1)
        at_least("data.split_seed", self.split_seed, 0)
        at_least("data.overlap", self.overlap, 0)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must lie in (0, 1], got {self.crop_pct}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"data.val_share must lie between 0 and 1, got {self.val_share}")
        for name, value in (
            ("val_batch", self.val_batch),
            ("limit", self.limit),
            ("val_limit", self.val_limit),
        ):
            if value is not None:
                at_least(f"data.{name}", value, 1)
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std are given together or not at all")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"data.std must be above 0, got {list(self.std)}")


@dataclass(kw_only=True)
class Mix:
    """Mixing of images, soft labels and erasing, for each batch on the device.

    Attributes:
        mixup: strength (alpha) of mixup, which blends two images; 0 is off.
        cutmix: strength (alpha) of cutmix, which pastes a part of one image into another; 0 is off.
        prob: probability that a batch is mixed at all.
        switch: probability of cutmix instead of mixup where both are on.
        smoothing: share of each label that is spread over all classes.
        erase: probability that a random part of an image is replaced by noise.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"mix.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("prob", "switch", "smoothing", "erase"):
            _share(f"mix.{name}", getattr(self, name))


@dataclass(kw_only=True)
class Optim:
    """The optimiser and its learning rate.

    Attributes:
        name: name of an optimiser of timm.
        lr: peak learning rate; if ``lr_batch`` is set, it is stated for that batch size.
        lr_batch: batch size that the learning rates are stated for: they are multiplied by the
            number of images in an update divided by this number. None does not scale them.
        min_lr: learning rate at the end of the run; scaled as ``lr``.
        warmup_lr: learning rate at the start of the warm-up; scaled as ``lr``.
        warmup_epochs: length of the warm-up in epochs, in which the rate rises to its peak.
        warmup_share: length of the warm-up as a share of the run, instead of ``warmup_epochs``.
        schedule: "cosine" lowers the rate to ``min_lr`` along half a cosine; "steps" divides it by
            10 at each of ``milestones``.
        milestones: points at which the rate is divided by 10, as shares of the run.
        weight_decay: strength of the weight decay; biases, norms, positions and prefix tokens have
            none.
        betas: decay rates of the two running means that Adam and similar optimisers keep; None
            uses the optimiser's own.
        layer_decay: learning rate of each block relative to the next one, so that early blocks
            learn more slowly; 1 is off.
        clip: largest norm of the gradient; a larger gradient is scaled down to it. None is off.
        backbone_scale: factor on the learning rate of the backbone; gates and other new parameters
            keep the full rate.
        method_scale: factor on the learning rate of the method's own parameters, such as gates; a
            short training with a low rate hardly moves new ones.
        frozen_epochs: number of epochs at the start in which the backbone is not trained.
        fixed: names of parameters that are not trained at all, such as pos_embed.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch: int | None = None
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_share: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float = 1.0
    clip: float | None = None
    backbone_scale: float = 1.0
    method_scale: float = 1.0
    frozen_epochs: float = 0.0
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # timm reads the last word: "lookahead_adamw" is adamw with a lookahead.
        names = list_optimizers()
        if self.name.lower().rpartition("_")[2] not in names:
            near = difflib.get_close_matches(self.name.lower(), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"optim.name={self.name} is not an optimiser of timm{hint}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be a number above 0, got {self.lr}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {list(self.betas)}")
        for name in (
            "min_lr",
            "warmup_lr",
            "weight_decay",
            "backbone_scale",
            "method_scale",
            "frozen_epochs",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be at least 0, got {getattr(self, name)}")
        if self.warmup_epochs < 0:
            raise ValueError(f"optim.warmup_epochs must be at least 0, got {self.warmup_epochs}")
        if self.warmup_share is not None:
            _share("optim.warmup_share", self.warmup_share)
            if self.warmup_epochs:
                raise ValueError(
                    "optim.warmup_epochs and optim.warmup_share say the same: give one"
                )
        check_choice("optim.schedule", self.schedule, ("cosine", "steps"))
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("optim.schedule=steps and optim.milestones go together")
        for share in self.milestones:
            _share("optim.milestones", share)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip must be above 0, got {self.clip}")
        if self.lr_batch is not None:
            at_least("optim.lr_batch", self.lr_batch, 1)


@dataclass(kw_only=True)
class Loop:
    """The run itself.

    Attributes:
        epochs: number of passes over the training images.
        max_steps: number of updates after which the run stops early, for a trial. Schedules keep
            the length that ``epochs`` gives them, so resuming with a larger number or None
            continues the same run.
        seed: seed of the order of images, of augmentation, masks, gates and new weights.
        precision: "32", or "bf16-mixed" or "16-mixed" for automatic mixed precision.
        accumulate: number of batches whose gradients make one update. If fewer are left at the end
            of an epoch, they make a smaller update.
        compile: run the training steps through torch.compile.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        devices: number of processes on this machine; None is one for each GPU, or a single one
            without any. Leave it out under torchrun and SLURM, which start the processes.
        num_nodes: number of machines, if you start the command on each of them by hand with
            MASTER_ADDR, MASTER_PORT and NODE_RANK set; torchrun and SLURM set it themselves.
        strategy: "auto", "ddp" (each process holds all weights) or "fsdp" (the weights are divided
            among the processes).
        ema: decay of an exponential moving average (EMA) of the weights, which is evaluated and
            exported; None keeps none. The decay grows to this value over the first updates. Scores
            of the weights themselves are named with _without_ema.
        eval_mode: train without dropout and stochastic depth, as some releases do in fine-tuning.
        check_every: number of epochs from one evaluation to the next; the end is always evaluated.
        patience: number of evaluations without a better score after which the run stops early;
            None never stops early. Resuming such a run trains on only with another patience.
        save_every: number of updates between checkpoints inside an epoch; None saves at the end of
            each epoch only.
        keep_last: number of checkpoints to keep.
        log_every: number of updates between lines of metrics.csv.
        pictures_every: number of epochs between pictures of evaluated images; None draws none.
        statistics: count at each evaluation how many tokens every block keeps, where the model has
            a method.
        loggers: loggers beside metrics.csv: "tensorboard", and "wandb", which needs that package.
    """

    epochs: int = 10
    max_steps: int | None = None
    seed: int = 0
    precision: str | int = "32"
    accumulate: int = 1
    compile: bool = False
    device: str = "auto"
    devices: int | None = None
    num_nodes: int = 1
    strategy: str = "auto"
    ema: float | None = None
    eval_mode: bool = False
    check_every: int = 1
    patience: int | None = None
    save_every: int | None = None
    keep_last: int = 2
    log_every: int = 10
    pictures_every: int | None = None
    statistics: bool = False
    loggers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        self.precision = str(self.precision)  # YAML reads 32 as a number
        check_choice("loop.precision", self.precision, ("32", "bf16-mixed", "16-mixed"))
        check_choice("loop.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        check_choice("loop.device", self.device, ("auto", "cpu", "cuda"))
        for name in self.loggers:
            check_choice("loop.loggers", name, ("tensorboard", "wandb"))
        for name in ("epochs", "accumulate", "check_every", "keep_last", "log_every", "num_nodes"):
            at_least(f"loop.{name}", getattr(self, name), 1)
        for name in ("max_steps", "patience", "save_every", "pictures_every", "devices"):
            if getattr(self, name) is not None:
                at_least(f"loop.{name}", getattr(self, name), 1)
        if self.ema is not None:
            _share("loop.ema", self.ema, below_one=True)


@dataclass(kw_only=True)
class Masking:
    """Patches that a training image loses before the first block.

    Attributes:
        ratios: shares of the patches to hide; every image draws one of them. An empty list hides
            nothing; a ratio of 1 hides all patches and leaves only the class token.
        stratified: give every ratio the same part of each batch instead of drawing independently,
            so that the shapes of a batch are the same in every step.
        backend: "bucket" computes only the visible patches; "keymask" computes all patches and
            hides some of them from attention, with the same result at full cost.
    """

    ratios: tuple[float, ...] = ()
    stratified: bool = False
    backend: str = "bucket"

    def __post_init__(self) -> None:
        check_choice("masking.backend", self.backend, ("bucket", "keymask"))
        for ratio in self.ratios:
            _share("masking.ratios", ratio)


@dataclass(kw_only=True)
class Distill:
    """A teacher that sees the whole image.

    Attributes:
        kind: "none", "soft" (learn the teacher's class probabilities) or "hard" (learn its
            decision).
        teacher: checkpoint or folder of the teacher; None is the model as it is before training.
        temperature: temperature that softens both distributions if ``kind`` is "soft"; the loss is
            multiplied by its square.
        weight: factor of the teacher's loss beside the classification loss.
    """

    kind: str = "none"
    teacher: str | None = None
    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("distill.kind", self.kind, ("none", "soft", "hard"))
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be above 0, got {self.temperature}")
        if self.weight < 0:
            raise ValueError(f"distill.weight must be at least 0, got {self.weight}")


@dataclass(kw_only=True)
class Recipe:
    """The parts of every recipe, which the engine reads.

    Attributes:
        data: images and batches.
        optim: the optimiser and its learning rate.
        loop: the run itself.
    """

    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)


@dataclass(kw_only=True)
class Finetune(Recipe):
    """Supervised training of a plain ViT, on whole or masked images.

    Attributes:
        model: the model to train, and its first weights.
        mix: what is done to a batch on the device.
        masking: patches that are hidden; none for full fine-tuning.
        distill: what a teacher adds.
    """

    model: Model
    mix: Mix = field(default_factory=Mix)
    masking: Masking = field(default_factory=Masking)
    distill: Distill = field(default_factory=Distill)


@dataclass(kw_only=True)
class Reduce(Recipe):
    """Training of a model together with a reduction method.

    Attributes:
        model: the model to train, and its first weights.
        method: reduction method with its options, such as "dynamicvit(keep=0.7)"; or its name and
            options one by one, such as method.name=dynamicvit method.keep=0.7.
        budget: what a pass may cost, such as "60%" of the model's multiply-adds, or take, such as
            "1.5x faster" or "12 ms" on the device that trains; it sets the method's rate, which
            then stands in the run's budget.json. None leaves the rate as it is.
        mix: what is done to a batch on the device.
        teacher: checkpoint or folder of the dense model that the losses kl and token compare with;
            None is the model as it is before training.
        weights: factors of the losses (class, ratio, kl, token or aux) that replace the method's
            own factors, such as weights.kl=0.5.
        token_loss: how final tokens are compared with the teacher's: "mse", or "kl" over channels
            (LV-ViT).
    """

    model: Model
    method: str | dict[str, Any]
    budget: str | None = None
    mix: Mix = field(default_factory=Mix)
    teacher: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    token_loss: str = "mse"

    def __post_init__(self) -> None:
        self.method = one_word(self.method)
        check_choice("token_loss", self.token_loss, ("mse", "kl"))
        checked_weights(self.weights)


@dataclass(kw_only=True)
class Adapt(Recipe):
    """Training of a model with a method to answer as it does without it; no labels are read.

    Attributes:
        model: the model to train; its state before training, without the method, is the teacher.
        method: reduction method with its options, such as "evit(keep=0.7)"; or its name and options
            one by one, such as method.name=evit method.keep=0.7. None takes the one that the model
            was saved with.
        budget: what a pass may cost or take, such as "60%" or "1.5x faster", as for ``reduce``; it
            sets the method's rate.
        train: what is trained: "method" (its own parameters, such as gates), "blocks:N" (these and
            the last N blocks of the model) or "all".
        weights: factors of the losses (patches, prefix, kl, and the method's own, such as ratio),
            such as weights.kl=0.5.
    """

    model: Model
    method: str | dict[str, Any] | None = None
    budget: str | None = None
    train: str = "all"
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = None if self.method is None else one_word(self.method)
        checked_weights(self.weights)
        if not re.fullmatch(r"method|all|blocks:[1-9]\d*", self.train):
            raise ValueError(f"train must be method, all or blocks:N from 1, got {self.train!r}")
        if self.data.val == NONE:
            raise ValueError("data.val=none: agreement is measured on validation images")

    @property
    def blocks(self) -> int | None:
        """Count the last blocks that are trained; None trains the whole model."""
        if self.train == "all":
            return None
        return int(self.train.partition(":")[2] or 0)


@dataclass(kw_only=True)
class Reading:
    """How frozen features are measured: by a linear classifier and by nearest neighbours.

    Attributes:
        feature: feature to read after the final norm: "token" (class token) or "avg" (mean of the
            patches).
        depth: number of blocks after which it is read; None reads after all of them.
        linear: fit the linear classifier.
        epochs: number of passes of the linear classifier over the features.
        batch: number of features in one step of the linear classifier.
        lr: peak learning rate of the linear classifier, for 256 features in a step.
        warmup_epochs: length of the linear classifier's warm-up in epochs.
        neighbours: number of nearest neighbours that vote; 0 turns the vote off.
        temperature: temperature of the vote; the lower, the more the nearest neighbours count.
        seed: seed of the linear classifier's first weights and of the order of the features.
        precision: precision of the pass through the backbone: "32" or "bf16-mixed".
    """

    feature: str = "token"
    depth: int | None = None
    linear: bool = True
    epochs: int = 90
    batch: int = 256
    lr: float = 0.1
    warmup_epochs: float = 10.0
    neighbours: int = 20
    temperature: float = 0.07
    seed: int = 0
    precision: str | int = "32"

    def __post_init__(self) -> None:
        check_choice("feature", self.feature, ("token", "avg"))
        self.precision = str(self.precision)
        check_choice("precision", self.precision, ("32", "bf16-mixed"))
        if self.depth is not None:
            at_least("depth", self.depth, 1)
        at_least("epochs", self.epochs, 1)
        at_least("batch", self.batch, 2)
        at_least("neighbours", self.neighbours, 0)
        if not self.linear and not self.neighbours:
            raise ValueError("linear=false and neighbours=0 leave nothing to measure")


@dataclass(kw_only=True)
class Probe(Reading):
    """A measurement of frozen features.

    Attributes:
        model: the backbone, with ``start``.
        data: images; ``augment`` and ``repeats`` do not apply, features are taken once.
        split: images to measure on: "test", or "val" while you still choose something by the
            result; None uses the test images if there are any.
    """

    model: Model
    data: Data = field(default_factory=Data)
    split: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, (None, "val", "test"))


def checked_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights of losses below zero."""
    for name, value in weights.items():
        if value < 0:
            raise ValueError(f"weights.{name} must be at least 0, got {value}")


def one_word(given: str | dict[str, Any]) -> str:
    """Write a method as one string, also one that was given as a name and options."""
    if isinstance(given, str):
        return given
    if not isinstance(given.get("name"), str):
        raise ValueError("method.name must say which method, such as method.name=dynamicvit")
    options = {name: value for name, value in given.items() if name != "name"}
    return repr(make(given["name"], options))


def _share(name: str, value: float, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value}")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
