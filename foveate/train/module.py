"""The Lightning module around a task: steps, rates, logs, evaluation, and the guard against NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from foveate.data import Loader
from foveate.evaluate.answers import logits_of
from foveate.train.draws import Draws, seed_step
from foveate.train.optim import Rates, make_optimiser, scaled, updates_of
from foveate.train.prepare import Prepare
from foveate.train.recipe import Loop, Optim
from foveate.train.task import LOGITS, Task, total

__all__ = ["Module"]

_NAMES = {"loss": ("loss", 1.0), "top1": ("accuracy", 100.0), "top5": ("top5", 100.0)}


class Module(LightningModule):
    """Trains a task.

    Attributes:
        task: what is computed.
        update_images: images that make one update, over all processes.
        updates: of the whole run.
        results: of the newest evaluation.
        evaluated: updates that were done at that time; -1 before the first.
    """

    def __init__(
        self,
        task: Task,
        prepare: Prepare,
        optim: Optim,
        loop: Loop,
        *,
        loader: Loader,
        update_images: int,
    ) -> None:
        super().__init__()
        self.task, self.prepare = task, prepare
        self.optim, self.loop = optim, loop
        self.update_images = update_images
        self.loader, self._batches = loader, len(loader)
        self.updates = updates_of(loop.epochs, self._batches, loop.accumulate)
        self._ema: list[nn.Module] = []  # in a list: it is no part of this module's state
        kinds: dict[str, Callable[[], Metric]] = {"loss": MeanMetric}
        for k in [1, 5] if prepare.classes > 5 else [1]:
            kinds[f"top{k}"] = partial(
                MulticlassAccuracy, prepare.classes, top_k=k, average="micro"
            )
        self.scores = nn.ModuleDict(
            {f"{who}_{name}": kind() for who in ("model", "ema") for name, kind in kinds.items()}
        )
        self.results: dict[str, float] = {}
        self.evaluated = -1
        self._unchecked: list[tuple[int, float, list[str], Tensor]] = []

    @property
    def ema(self) -> nn.Module | None:
        """The running mean of the model, if one is kept."""
        return self._ema[0] if self._ema else None

    @property
    def exported(self) -> nn.Module:
        """What the run is for: the running mean, or without one the model."""
        return self.task.model if self.ema is None else self.ema

    def keep_mean(self, model: nn.Module) -> None:
        """Evaluate a running mean beside the model."""
        self._ema = [model]

    # Set-up ------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimiser; rates are set before each step."""
        rates = scaled(self.optim, self.update_images)
        optimiser = make_optimiser(self.task, self.optim, rates[0])
        epochs = (self.optim.warmup_epochs, self.optim.frozen_epochs)
        warmup, frozen = (updates_of(e, self._batches, self.loop.accumulate) for e in epochs)
        self.rates = Rates(optimiser, rates, updates=self.updates, warmup=warmup, frozen=frozen)
        return optimiser

    def on_fit_start(self) -> None:
        """Bring the teacher along."""
        self.task.place(self.device)

    # Training ----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Make everything this step depends on a function of its number."""
        self.task.settle(self.loop.eval_mode)
        self._rate = self.rates.set(self.trainer.global_step)
        seed_step(self.loop.seed, self.current_epoch, index, self.global_rank)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Losses of the task, their weighted sum to be minimised."""
        images, targets = self.prepare.train_batch(batch["images"], batch["labels"])
        draws = Draws(
            self.loop.seed,
            self.current_epoch,
            index,
            rank=self.global_rank,
            world=self.trainer.world_size,
            device=self.device,
        )
        losses = self.task(images, targets, draws)
        logits = losses.pop(LOGITS)
        loss = total(losses, self.task.weights)
        self._watch(losses, loss)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        show = {"loss": loss.detach(), "accuracy": 100 * accuracy}
        self.log_dict({f"train/{k}": v for k, v in show.items()}, prog_bar=True)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()})
        self.log("rate", self._rate)
        return loss

    def _watch(self, losses: dict[str, Tensor], loss: Tensor) -> None:
        """Stop on a loss that is no number. On a GPU looking means waiting, so it is done late."""
        values = torch.stack([v.detach().float() for v in (*losses.values(), loss)])
        names = [*losses, "their sum"]
        self._unchecked.append((self.trainer.global_step, self._rate, names, values))
        if values.device.type == "cpu" or len(self._unchecked) >= self.loop.log_every:
            self.check_losses()

    def check_losses(self) -> None:
        """Raise for the first loss since the last look that is not finite."""
        pending, self._unchecked = self._unchecked, []
        if not pending or bool(torch.isfinite(torch.cat([v for *_, v in pending])).all()):
            return
        for step, rate, names, values in pending:
            for name, value in zip(names, values.tolist(), strict=True):
                if not abs(value) < float("inf"):
                    raise ValueError(
                        f"the loss {name} is {value} at update {step}, with learning rate "
                        f"{rate:.3g}: lower the rate, or set optim.clip"
                    )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never save what a bad loss or gradient may have spoilt."""
        self.check_losses()
        self._check_weights()
        checkpoint["loader"] = self.loader.state_dict()
        checkpoint["run"] = {
            "update_images": self.update_images,
            "results": self.results,
            "evaluated": self.evaluated,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the data; Lightning itself restores loaders inside an epoch only."""
        run = checkpoint["run"]
        if run["update_images"] != self.update_images:
            raise ValueError(
                f"the run made its updates of {run['update_images']} images, and would go on with "
                f"{self.update_images}: resume on as many processes as before"
            )
        self.results, self.evaluated = run["results"], run["evaluated"]
        self.loader.load_state_dict(checkpoint["loader"])

    def _check_weights(self) -> None:
        """Raise where a gradient that was no number has reached the weights of a finite loss."""
        named = dict(self.task.named_parameters())
        fine = torch.stack([p.detach().isfinite().all() for p in named.values()])
        if not bool(fine.all()):
            first = list(named)[fine.tolist().index(False)]
            raise ValueError(
                f"the weights {first} are no finite numbers after update "
                f"{self.trainer.global_step - 1}, with learning rate {self._rate:.3g}: lower the "
                "rate, or set optim.clip"
            )

    # Evaluation --------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Count right answers of the model and of its running mean."""
        images, labels = self.prepare(batch["images"]), batch["labels"]
        for who, model in (("model", self.task.model), ("ema", self.ema)):
            if model is None:
                continue
            logits = logits_of(model(images)).float()
            for name, metric in self._metrics(who):
                if name == "loss":
                    metric.update(F.cross_entropy(logits, labels), weight=len(labels))
                else:
                    metric.update(logits, labels)

    def _metrics(self, who: str) -> list[tuple[str, Metric]]:
        return [
            (name.removeprefix(f"{who}_"), metric)  # type: ignore[misc]
            for name, metric in self.scores.items()
            if name.startswith(who)
        ]

    def on_validation_epoch_end(self) -> None:
        """Log losses, and accuracies in per cent."""
        found: dict[str, float] = {}
        for who, suffix in (("model", ""), ("ema", "_ema")):
            if who == "ema" and self.ema is None:
                continue
            for name, metric in self._metrics(who):
                label, scale = _NAMES[name]
                found[f"val/{label}{suffix}"] = scale * float(metric.compute())
                metric.reset()
        self.results, self.evaluated = found, self.trainer.global_step
        for name, value in found.items():
            self.log(name, value, prog_bar=name == "val/accuracy", rank_zero_only=True)
