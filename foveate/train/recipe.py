"""Recipes: everything that decides how a training run goes, as dataclasses that YAML fills in.

Values are checked here, where they stand, before data or models are touched. The parts are shared
by all jobs; each job's recipe is a class of its own at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveate.core.schedule import check_choice
from foveate.data import Augment
from foveate.registry import make

__all__ = [
    "Data",
    "Distill",
    "Finetune",
    "Loop",
    "Masking",
    "Mix",
    "Model",
    "Optim",
    "Probe",
    "Reading",
    "Recipe",
    "Reduce",
]


@dataclass(kw_only=True)
class Model:
    """Which model is trained, and from where.

    Attributes:
        name: a ViT of timm, "lvvit_s" or "lvvit_m"; None takes the model that ``start`` holds.
        options: arguments of the model's constructor, such as img_size, patch_size, depth.
        start: weights to begin with: a checkpoint, a run folder, a folder of foveate or Hugging
            Face, "demo", or "pretrained" for timm's own; None is from scratch. In Python also a
            model of one's own, which is trained itself.
        weights: "model" or "ema" where a checkpoint has both; "auto" prefers the model's.
        new_head: give a start with another number of classes a new head; without it that is an
            error. A start without a head gets one anyway.
        multiscale: options of ``foveate.backbones.multiscale``, which gives a plain ViT of timm a
            second scale: {} takes its defaults, None leaves the model as it is.
        pool: "token" or "avg"; None leaves the model's own.
        drop_path: stochastic depth of the last block, growing linearly from the first.
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
        """Where its weights are from, for messages: a path, or the class of a given model."""
        return self.start if isinstance(self.start, str) else type(self.start).__name__


@dataclass(kw_only=True)
class Data:
    """Where images come from and how they become batches.

    Attributes:
        train: what is trained on, as ``foveate.data.open_source`` takes it; in Python also a data
            set of one's own, as val and test.
        val: what rates, epochs and the best checkpoint are chosen on; None takes the split "val"
            of ``train``, or holds out a part of its training images where it has none; "none" is
            for pre-training that is not to be watched.
        test: what ``foveate eval`` and ``foveate compare`` look at in the end; None takes the split
            "test" of ``train`` if it has one.
        val_share: share of the training images that is held out where there is no split "val".
        split_seed: another number holds out other images. Which ones follows from their content
            and this number alone.
        overlap: how many images two splits may have in common before that is an error.
        mean: mean of the pixels in each channel, from 0 to 1; None takes the model's own.
        std: spread of the pixels in each channel; None takes the model's own.
        crop_pct: share of the short side that evaluation keeps.
        augment: what is done to training images.
        batch: images in a step of each process.
        val_batch: images in a step of evaluation; None is as many as in training.
        workers: processes that read images; 0 reads in the training process, None is 0 without a
            GPU and for images in memory, else one for each core but one, up to 8.
        repeats: times that an image appears, differently augmented, in one pass (repeated
            augmentation).
        corrupt: "skip" images that cannot be read, named and counted, or "fail".
        limit: train on so many images only, some of every class.
        val_limit: validate on so many images only, evenly spaced.
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
        _at_least("data.batch", self.batch, 1)
        if self.workers is not None:
            _at_least("data.workers", self.workers, 0)
        _at_least("data.repeats", self.repeats, 1)
        _at_least("data.split_seed", self.split_seed, 0)
        _at_least("data.overlap", self.overlap, 0)
        if not 0 < self.val_share < 1:
            raise ValueError(f"data.val_share must lie between 0 and 1, got {self.val_share}")
        for name, value in (
            ("val_batch", self.val_batch),
            ("limit", self.limit),
            ("val_limit", self.val_limit),
        ):
            if value is not None:
                _at_least(f"data.{name}", value, 1)
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std are given together or not at all")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"data.std must be above 0, got {list(self.std)}")


@dataclass(kw_only=True)
class Mix:
    """What is done to a batch on the device: mixing of images, soft labels, erasing.

    Attributes:
        mixup: strength (alpha) of mixup, which blends two images; 0 is off.
        cutmix: strength (alpha) of cutmix, which pastes a part of one image into another; 0 is off.
        prob: how often a batch is mixed at all, 0 to 1.
        switch: how often cutmix is taken instead of mixup where both are on.
        smoothing: share of each label that is spread over all classes.
        erase: how often a random part of an image is replaced by noise, 0 to 1.
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
    """How weights move.

    Attributes:
        name: an optimiser of timm, by timm's name for it.
        lr: peak learning rate; for a batch of ``lr_batch`` images if that is given.
        lr_batch: all rates are multiplied by the images in an update over this number; None takes
            the rates as they are.
        min_lr: learning rate at the end of the run; scaled as ``lr``.
        warmup_lr: learning rate at the start of the warm-up; scaled as ``lr``.
        warmup_epochs: epochs over which the rate rises to its peak, update by update.
        warmup_share: the length of the warm-up as a share of the run, instead of ``warmup_epochs``.
        schedule: "cosine" down to ``min_lr``, or "steps": a tenth at each of ``milestones``.
        milestones: where the rate falls to a tenth, as shares of the run.
        weight_decay: pulls weights towards zero, but not biases, norms, positions and prefix
            tokens.
        betas: the two decay rates of Adam and its kin; None is the optimiser's own.
        layer_decay: factor between the rates of neighbouring blocks, from the head down; 1 is off.
        clip: largest norm of the gradient; None is off.
        backbone_scale: factor on the rate of the backbone, beside which gates or a new head train
            at the full one.
        frozen_epochs: epochs at the start during which the backbone stays as it is.
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
    frozen_epochs: float = 0.0
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be above 0, got {self.lr}")
        for name in ("min_lr", "warmup_lr", "weight_decay", "backbone_scale", "frozen_epochs"):
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
            _at_least("optim.lr_batch", self.lr_batch, 1)


@dataclass(kw_only=True)
class Loop:
    """The run itself.

    Attributes:
        epochs: passes over the training images.
        max_steps: stop after so many updates; schedules keep their length. For trials.
        seed: decides the order of the data, augmentation, masks, gates and new weights.
        precision: "32", "bf16-mixed" or "16-mixed", as Lightning takes it.
        accumulate: batches whose gradients make one update; at the end of an epoch the rest make
            one, with as much less weight.
        compile: let torch compile what a step spends its time in.
        device: "auto" takes a GPU if there is one; "cpu" or "cuda".
        devices: processes on this machine; None is one for each GPU, or a single one. Under
            torchrun and SLURM the processes are theirs.
        num_nodes: machines; each is started by itself, by torchrun or SLURM.
        strategy: "auto", "ddp", or "fsdp", which shares the weights out among the processes.
        ema: decay of a running mean of the weights that is kept, evaluated and exported; None is
            off. It grows to that over the first updates. The result is the mean's, with the
            model's own beside it.
        eval_mode: train without dropout and stochastic depth, as some releases fine-tune.
        check_every: epochs between evaluations; at the end there is one in any case.
        patience: evaluations without a better score after which the run ends; None never does.
        save_every: updates between checkpoints; None is at the end of each epoch only.
        keep_last: checkpoints that stay.
        log_every: updates between lines of metrics.csv.
        pictures_every: epochs between pictures of evaluated images; None is never.
        statistics: count at each evaluation which tokens are kept, for a method that reduces.
        loggers: that write beside metrics.csv: "tensorboard", "wandb" (needs that package).
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
            _at_least(f"loop.{name}", getattr(self, name), 1)
        for name in ("max_steps", "patience", "save_every", "pictures_every", "devices"):
            if getattr(self, name) is not None:
                _at_least(f"loop.{name}", getattr(self, name), 1)
        if self.ema is not None:
            _share("loop.ema", self.ema, below_one=True)
        for name in ("patience", "ema"):
            if getattr(self, name) is not None and self.strategy == "fsdp":
                raise ValueError(f"loop.{name} does not go with loop.strategy=fsdp yet")


@dataclass(kw_only=True)
class Masking:
    """Which patches a training image loses before the first block.

    Attributes:
        ratios: shares to hide, one drawn for each image; none hides nothing. 1 leaves the class
            token alone.
        stratified: give every ratio the same part of each batch instead of drawing independently,
            which keeps the shapes of a batch the same from step to step.
        backend: "bucket" computes the kept patches alone; "keymask" computes all patches and hides
            the others in attention: the same numbers at the full price.
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
    """What a trained model that sees the whole image teaches.

    Attributes:
        kind: "none", "soft" (its class probabilities) or "hard" (its decision).
        teacher: a checkpoint or folder; None is the start of the run itself.
        temperature: softens both distributions in "soft"; its square is a factor of the loss.
        weight: factor of this loss beside the classification loss.
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
    """What the engine looks at.

    Attributes:
        data: images and batches.
        optim: how weights move.
        loop: the run itself.
    """

    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)


@dataclass(kw_only=True)
class Finetune(Recipe):
    """Supervised training of a plain ViT, on whole or masked images.

    Attributes:
        model: which one, and from where.
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
        model: which one, and from where.
        method: a method with its options, such as "dynamicvit(keep=0.7)"; or method.name and its
            options one by one, such as method.name=dynamicvit method.keep=0.7.
        mix: what is done to a batch on the device.
        teacher: a checkpoint or folder for the losses that compare with a dense model; None is the
            start of the run.
        weights: factors of losses instead of the method's own, for class, ratio, kl, token or aux.
        token_loss: how final tokens are compared: "mse", or "kl" over channels (LV-ViT).
    """

    model: Model
    method: str | dict[str, Any]
    mix: Mix = field(default_factory=Mix)
    teacher: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    token_loss: str = "mse"

    def __post_init__(self) -> None:
        self.method = _method(self.method)
        check_choice("token_loss", self.token_loss, ("mse", "kl"))
        for name, value in self.weights.items():
            if value < 0:
                raise ValueError(f"weights.{name} must be at least 0, got {value}")


@dataclass(kw_only=True)
class Reading:
    """How frozen features are read: by a linear classifier and by the nearest neighbours.

    Attributes:
        feature: "token" (class token) or "avg" (mean of patches) after the final norm.
        linear: fit the linear classifier.
        epochs: passes of the linear classifier over the features.
        batch: features in a step of the linear classifier.
        lr: peak learning rate of the linear classifier, for 256 features in a step.
        warmup_epochs: epochs over which that rate rises to its peak.
        neighbours: how many nearest neighbours vote; 0 is off.
        temperature: how much more the nearest of them count.
        seed: decides the linear classifier's first weights and the order of the features.
        precision: of the pass through the backbone: "32" or "bf16-mixed".
    """

    feature: str = "token"
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
        _at_least("epochs", self.epochs, 1)
        _at_least("batch", self.batch, 2)
        _at_least("neighbours", self.neighbours, 0)
        if not self.linear and not self.neighbours:
            raise ValueError("linear=false and neighbours=0 leave nothing to measure")


@dataclass(kw_only=True)
class Probe(Reading):
    """How much frozen features say.

    Attributes:
        model: the backbone, with ``start``.
        data: images; ``augment`` and ``repeats`` do not apply, features are taken once.
        split: what is measured on: "test", or "val" while something is still being chosen; None
            takes the test images if there are any.
    """

    model: Model
    data: Data = field(default_factory=Data)
    split: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, (None, "val", "test"))


def _method(given: str | dict[str, Any]) -> str:
    """A method in one string, from a group of its name and options too."""
    if isinstance(given, str):
        return given
    if not isinstance(given.get("name"), str):
        raise ValueError("method.name must say which method, such as method.name=dynamicvit")
    options = {name: value for name, value in given.items() if name != "name"}
    return repr(make(given["name"], options))


def _share(name: str, value: float, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
