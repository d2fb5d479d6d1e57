"""The Lightning module around a task: steps, rates, logs, evaluation, and the guard against NaN."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from foveate.data import Loader
from foveate.train.draws import Draws, seed_step
from foveate.train.optim import Rates, make_optimiser, scaled, updates_of
from foveate.train.prepare import Prepare
from foveate.train.recipe import Loop, Optim
from foveate.train.scores import Scores
from foveate.train.task import LOGITS, Task, total

__all__ = ["Module"]

_log = logging.getLogger(__name__)
_SHORTENED = 0.2  # of a run whose warm-up would be longer than itself


class Module(LightningModule):
    """Trains a task.

    Attributes:
        task: what is computed.
        update_images: images that make one update, over all processes.
        updates: of the whole run.
        results: of the newest evaluation.
        evaluated: updates that were done at that time; -1 before the first.
        watched: what callbacks last measured, for the result.
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
        self.scores = nn.ModuleDict({who: task.scores(prepare.classes) for who in ("model", "ema")})
        self.results: dict[str, float] = {}
        self.evaluated = -1
        self.watched: dict[str, float] = {}
        self._unchecked: list[tuple[int, float, list[str], Tensor]] = []

    @property
    def ema(self) -> nn.Module | None:
        """The running mean of the model, if one is kept."""
        return self._ema[0] if self._ema else None

    @property
    def exported(self) -> nn.Module:
        """What the run is for: the running mean, or without one the model."""
        return self.task.model if self.ema is None else self.ema

    def judged(self) -> tuple[float, bool]:
        """Return the newest score of what is exported, and whether a higher one is better."""
        shown = self._scores("model").shown
        name = f"val/{shown}" + "_ema" * (self.ema is not None)
        return self.results[name], shown != "loss"

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

    def on_fit_start(self) -> None:
        """Bring the teacher along."""
        self.task.place(self.device)

    # Training ----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Make everything this step depends on a function of its number."""
        self.task.settle(self.loop.eval_mode)
        self.task.advance(min(1.0, self.trainer.global_step / self.updates))
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
        logits = losses.pop(LOGITS, None)
        loss = total(losses, self.task.weights)
        self._watch(losses, loss)
        show = {"loss": loss.detach()}
        if logits is not None:
            labels = targets if targets.ndim == 1 else targets.argmax(1)
            show["accuracy"] = 100 * (logits.detach().argmax(1) == labels).float().mean()
        several = self.trainer.world_size > 1  # what is logged is of all processes
        self.log_dict({f"train/{k}": v for k, v in show.items()}, prog_bar=True, sync_dist=several)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, sync_dist=several)
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
        """Count for the model and for its running mean."""
        images, labels = self.prepare(batch["images"]), batch["labels"]
        for who, model in self._evaluated():
            self._scores(who).update(model, images, labels, index)

    def _evaluated(self) -> list[tuple[str, nn.Module]]:
        pairs = (("model", self.task.model), ("ema", self.ema))
        return [(who, model) for who, model in pairs if model is not None]

    def _scores(self, who: str) -> Scores:
        return self.scores[who]  # type: ignore[return-value]

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        found: dict[str, float] = {}
        for who, _ in self._evaluated():
            suffix = "_ema" if who == "ema" else ""
            for name, value in self._scores(who).compute().items():
                found[f"val/{name}{suffix}"] = value
        self.results, self.evaluated = found, self.trainer.global_step
        for name, value in found.items():
            shown = name == f"val/{self._scores('model').shown}"
            self.log(name, value, prog_bar=shown, rank_zero_only=True)
