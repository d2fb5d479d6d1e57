"""The Lightning module around a task: steps, rates, logs, evaluation, and the guard against NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import Metric

from foveate.data import Loader
from foveate.train.draws import Draws, seed_step
from foveate.train.optim import Rates, fix_parameters, make_optimiser, scaled, updates_of
from foveate.train.recipe import Loop, Optim
from foveate.train.sharded import Sharded, hold_whole, shard
from foveate.train.task import Task, total

__all__ = ["Module"]

_log = logging.getLogger(__name__)
_SHORTENED = 0.2  # length of the warm-up, as a share of a run that would be shorter than it
_HALF = 10.0  # updates after which the decay of a running mean is a half


class Module(LightningModule):
    """Trains a task.

    Attributes:
        task: what is computed.
        mean: running mean of the task's model, if one is kept. Its decay grows with the updates t
            as t / (t + 10), up to the one that was asked for: without that the mean of a short run
            would be little else than the weights it began with.
        update_images: images that make one update, over all processes.
        updates: of the whole run.
        results: of the newest evaluation.
        evaluated: updates that were done at that time; -1 before the first.
        watched: what callbacks last measured, for the result.
    """

    def __init__(
        self, task: Task, optim: Optim, loop: Loop, *, loader: Loader, update_images: int
    ) -> None:
        super().__init__()
        self.task, self.optim, self.loop = task, optim, loop
        fix_parameters(task, optim)
        self.mean: ModelEmaV3 | None = None
        if loop.ema is not None:
            self.mean = ModelEmaV3(
                task.model,
                decay=loop.ema,
                use_warmup=True,
                warmup_gamma=_HALF,
                warmup_power=1.0,
            ).requires_grad_(False)
        if loop.compile:
            task.compile()
        self.update_images = update_images
        self.loader, self._batches = loader, len(loader)
        self.updates = updates_of(loop.epochs, self._batches, loop.accumulate)
        self.counted = nn.ModuleDict(
            {who: nn.ModuleDict(task.metrics()) for who, _ in self._evaluated()}
        )
        self.results: dict[str, float] = {}
        self.evaluated = -1
        self.watched: dict[str, float] = {}
        self._unchecked: list[tuple[int, float, list[str], Tensor]] = []
        self._shared = False

    @property
    def exported(self) -> nn.Module:
        """Return what is exported: the running mean, or without one the model."""
        return self.task.model if self.mean is None else self.mean.module

    def judged(self) -> tuple[float, bool]:
        """Return the newest score of what is exported, and whether a higher one is better."""
        name = f"val/{self.task.score}" + "_ema" * (self.mean is not None)
        return self.results[name], self.task.higher_is_better

    # Set-up ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the weights, where the strategy does that."""
        if not isinstance(self.trainer.strategy, Sharded) or self._shared:
            return
        self._shared = True  # it is called for each of fit and validate
        names = {id(part): name for name, part in self.task.model.named_modules()}
        units = [names[id(unit)] for unit in self.task.units()]
        for _, model in self._evaluated():
            shard(model, units, self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimiser; rates are set before each step."""
        rates = scaled(self.optim, self.update_images)
        optimiser = make_optimiser(self.task, self.optim, rates[0])
        epochs = (self.optim.warmup_epochs, self.optim.frozen_epochs)
        warmup, frozen = (updates_of(e, self._batches, self.loop.accumulate) for e in epochs)
        if self.optim.warmup_share is not None:
            warmup = round(self.optim.warmup_share * self.updates)
        if warmup > self.updates:  # the peak would never be reached
            warmup = round(_SHORTENED * self.updates)
            _log.warning(
                "optim.warmup_epochs=%g is longer than loop.epochs=%d: the warm-up takes "
                "%d of its %d updates instead",
                *(self.optim.warmup_epochs, self.loop.epochs, warmup, self.updates),
            )
        self.rates = Rates(
            optimiser,
            rates,
            updates=self.updates,
            warmup=warmup,
            frozen=frozen,
            milestones=[round(share * self.updates) for share in self.optim.milestones],
        )
        return optimiser

    # Training ----------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Let a trial end where it is to.

        Lightning takes a trainer that was made with a limit of steps for inside its epoch when it
        goes on, also where a trial ended with an epoch, and would train no further.
        """
        if self.loop.max_steps is not None:
            self.trainer.fit_loop.epoch_loop.max_steps = self.loop.max_steps

    def settle(self) -> None:
        """Set the mode of training; with ``loop.eval_mode`` dropout and the like stay off."""
        self.task.train()
        if self.loop.eval_mode:
            self.task.backbone.eval()

    @property
    def progress(self) -> float:
        """Return how much of the run is done, 0 to 1."""
        return min(1.0, self.trainer.global_step / self.updates)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Make everything this step depends on a function of its number."""
        self.settle()
        self.task.set_progress(self.progress, self.task.model)
        self._rate = self.rates.set(self.trainer.global_step)
        seed_step(self.loop.seed, self.current_epoch, index, self.global_rank)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Compute the losses of the task, and return their weighted sum."""
        draws = Draws(
            self.loop.seed,
            self.current_epoch,
            index,
            rank=self.global_rank,
            world=self.trainer.world_size,
            device=self.device,
        )
        self.task.notes = {}
        losses = self.task.training_step(batch, draws)
        loss = total(losses, self.task.weights)
        self._watch(losses, loss)
        several = self.trainer.world_size > 1  # what is logged is of all processes
        shown = {"loss": loss.detach(), **self.task.notes}
        self.log_dict({f"train/{k}": v for k, v in shown.items()}, prog_bar=True, sync_dist=several)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, sync_dist=several)
        self.log("rate", self._rate)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then what follows them, before any checkpoint of the update."""
        super().optimizer_step(*args, **kwargs)
        if self.mean is not None:
            self.mean.update(self.task.model, step=self.trainer.global_step + 1)
        self.task.after_update()

    def _watch(self, losses: dict[str, Tensor], loss: Tensor) -> None:
        """Stop on a loss that is NaN or infinite; look late on a GPU, where that means waiting."""
        values = torch.stack([v.detach().float() for v in (*losses.values(), loss)])
        names = [f"the loss {name!r}" for name in losses] + ["the weighted sum of the losses"]
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
                        f"{name} is {value} at update {step}, with learning rate {rate:.3g}: "
                        "lower the rate, or set optim.clip"
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
            "watched": self.watched,
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
        self.watched = run["watched"]
        self.loader.load_state_dict(checkpoint["loader"])

    def _check_weights(self) -> None:
        """Raise where a gradient that was no number has reached the weights of a finite loss."""
        named = dict(self.task.named_parameters())
        fine = torch.stack([_local(p).isfinite().all() for p in named.values()])
        if not bool(fine.all()):
            first = list(named)[fine.tolist().index(False)]
            raise ValueError(
                f"the weights {first} contain NaN or infinity after update "
                f"{self.trainer.global_step - 1}, with learning rate {self._rate:.3g}: lower the "
                "rate, or set optim.clip"
            )

    # Evaluation --------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Gather the weights: processes with fewer batches than others must not be waited for."""
        self._hold_whole(True)

    def on_validation_end(self) -> None:
        """Shard the weights again."""
        self._hold_whole(False)

    def _hold_whole(self, whole: bool) -> None:
        if self._shared:
            for _, model in self._evaluated():
                hold_whole(model, whole)

    def on_validation_epoch_start(self) -> None:
        """Evaluate at the rate of the moment, and after the end as the model is exported."""
        over = self.trainer.state.fn != TrainerFn.FITTING
        for _, model in self._evaluated():
            self.task.set_progress(1.0 if over else self.progress, model)

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Count for the model and for its running mean."""
        for who, model in self._evaluated():
            model.eval()
            self.task.validation_step(model, batch, self._metrics(who), index)

    def _evaluated(self) -> Iterator[tuple[str, nn.Module]]:
        yield "model", self.task.model
        if self.mean is not None:
            yield "ema", self.mean.module

    def _metrics(self, who: str) -> dict[str, Metric]:
        return dict(self.counted[who].items())  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        found: dict[str, float] = {}
        for who, _ in self._evaluated():
            suffix = "_ema" if who == "ema" else ""
            for name, metric in self._metrics(who).items():
                found[f"val/{name}{suffix}"] = float(metric.compute())
                metric.reset()
        self.results, self.evaluated = found, self.trainer.global_step
        for name, value in found.items():
            if math.isnan(value) and self.trainer.is_global_zero:
                _log.warning(
                    "%s is NaN at update %d: the model's answers to some validation images contain "
                    "NaN, or these images have nothing to be right about",
                    *(name, self.evaluated),
                )
            self.log(name, value, prog_bar=name == f"val/{self.task.score}", rank_zero_only=True)


def _local(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter that may be sharded."""
    to_local = getattr(parameter, "to_local", None)
    return parameter.detach() if to_local is None else to_local().detach()
