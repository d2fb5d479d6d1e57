"""Base classes of the reduction methods.

A method is a keyword-only dataclass: its fields are its config. It declares the hooks it acts at,
what it reads from attention and how it trains. The driver and ``describe`` use those facts, and the
contract tests hold the method to them. State of a forward pass lives in the TokenState, never here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core import disposal
from foveate.core.attention import AttentionReader
from foveate.core.backbone import BackboneSpec
from foveate.core.losses import distillation
from foveate.core.options import check_types
from foveate.core.schedule import (
    Schedule,
    check_blocks,
    check_choice,
    check_keep,
    nearest_share,
    stage_blocks,
)
from foveate.core.selection import Selection
from foveate.core.tokens import TokenState
from foveate.core.trace import Outcome

__all__ = ["Match", "MatchReducer", "Reducer", "ScoreReducer", "keeps_all", "scheduled_counts"]


@dataclass(eq=False, kw_only=True, repr=False)
class Reducer(nn.Module):
    """Base of every method.

    Class attributes are the facts that a method declares about itself:

    * ``paper``: authors, title and where it appeared; ``summary``: one line;
    * ``hooks``: any of "before" (a block), "between" (its attention and its feed forward), "after";
    * ``reads``: what it reads from attention: "cls_row", "key_direction", "value_norm",
      "full_map";
    * ``training_need``: "none" (works as it is), "recommended" or "required";
    * ``gated``: it learns gates, so it trains masked;
    * ``maskable``: it can run masked: all tokens are computed and decisions applied as a mask;
    * ``drops``: tokens may disappear; ``merges``: tokens are averaged into others;
    * ``parks``: tokens are set aside and come back;
    * ``needs_place``: it needs each token's place in the grid;
    * ``identity``: options under which the method changes nothing, or None if there are none;
    * ``rate``: the option that says how much is reduced, "" if there is none;
    * ``default_loss_weights``: losses that training minimises besides the task's, with weights;
    * ``softmax_eps``: smoothing of the soft softmax that trains gates through attention; None for
      methods whose gates do not need it.

    Attributes:
        recall_before: block before which dropped and merged patches come back, so that it works
            on all of them; "head" brings them back after the last block.
        active_blocks: blocks at which the method changes the token set.
        loss_weights: weights of the losses that training minimises besides the task's.
        pixel_classes: number of pixel classes that the method learns in a segmenter or detector,
            else 0. If it is above 0, ``losses`` gets the classes of all patches as targets.
    """

    recall_before: int | str | None = None

    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    name: ClassVar[str] = ""
    hooks: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[frozenset[str]] = frozenset()
    training_need: ClassVar[str] = "none"
    gated: ClassVar[bool] = False
    maskable: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    parks: ClassVar[bool] = False
    needs_place: ClassVar[bool] = False
    identity: ClassVar[Mapping[str, Any] | None] = None
    rate: ClassVar[str] = ""
    default_loss_weights: ClassVar[Mapping[str, float]] = {}
    softmax_eps: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        # The dataclass sets plain fields first; nn.Module does not need its tables for those.
        super().__init__()
        self.progress = 1.0
        self.spec: BackboneSpec | None = None
        self.pixel_classes = 0
        self.active_blocks: tuple[int, ...] = ()
        self.loss_weights = dict(self.default_loss_weights)
        check_types(self)
        self.validate()

    # Config ------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Refuse option values that are wrong for every model."""

    def build(self, spec: BackboneSpec) -> None:
        """Bind to a backbone: resolve blocks, check against it, make new parameters.

        A method that overrides it sets ``active_blocks``.
        """
        self.spec = spec
        recall = self.recall_before
        if recall is None:
            return
        if not (self.drops or self.merges):
            raise ValueError(
                f"recall_before={recall!r} has no effect: {self.name} keeps every token"
            )
        if recall != "head" and not (isinstance(recall, int) and 1 <= recall < spec.depth):
            raise ValueError(
                f"recall_before must be a block in 1..{spec.depth - 1} or 'head', got {recall!r}"
            )

    def config(self) -> dict[str, Any]:
        """Return the method's options, as given."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        options = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default or f.name == self.rate:
                options.append((f.name != self.rate, f"{f.name}={value!r}"))
        return f"{self.name}({', '.join(text for _, text in sorted(options, key=lambda o: o[0]))})"

    def advance(self, progress: float) -> None:
        """Set the training progress, from 0 to 1; 1 is the method as deployed."""
        self.progress = progress

    @property
    def settled(self) -> bool:
        """Whether it works as it will be deployed: no rate is still falling."""
        return True

    @property
    def members(self) -> tuple[Reducer, ...]:
        """The methods that act, in order: itself, or the parts of a chain."""
        return (self,)

    @property
    def fixed_count(self) -> bool:
        """Whether every image has the same count at every block."""
        return True

    @property
    def proportional(self) -> bool:
        """Whether attention weighs keys by the patches they stand for."""
        return False

    @property
    def recall_blocks(self) -> frozenset[int]:
        """Blocks before which all patches come back; the depth stands for the head."""
        if self.recall_before is None or self.spec is None:
            return frozenset()
        recall = self.recall_before
        return frozenset({self.spec.depth if isinstance(recall, str) else recall})

    def parked_blocks(self) -> frozenset[int]:
        """Return the blocks during which tokens of this method are parked."""
        return frozenset()

    # Work --------------------------------------------------------------------------------------

    def before(self, block: int, state: TokenState) -> TokenState:
        """Change the tokens that enter a block."""
        return state

    def acts_between(self, block: int) -> bool:
        """Tell whether ``between`` has anything to do in this block."""
        return "between" in self.hooks and block in self.active_blocks

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Change the tokens between attention and feed forward."""
        return state

    def after(self, block: int, state: TokenState) -> TokenState:
        """Change the tokens that leave a block."""
        return state

    def finish(self, state: TokenState) -> TokenState:
        """Do what remains after the last block, before the final norm."""
        return state

    # Training ----------------------------------------------------------------------------------

    def for_pixels(self, classes: int) -> None:
        """Prepare for a segmenter or detector, whose pixels have this number of classes.

        It is called after ``build``. A method that learns the classes makes its heads again and
        sets ``pixel_classes``.
        """

    def losses(
        self, outcome: Outcome, targets: Tensor | None = None, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """Compute the method's own losses, un-weighted; those without a weight may be left out.

        Args:
            outcome: result of the forward pass.
            targets: labels ``[B]`` or class probabilities ``[B, classes]``; for a segmenter or
                detector the classes of all patches ``[B, H, W]``, -100 where there is none.
            teacher: result of a dense teacher on the same images; "kl" compares the logits.
        """
        if teacher is None or not self.loss_weights.get("kl"):
            return {}
        return {"kl": distillation(outcome.logits, teacher.logits)}

    def weighted_losses(self, outcome: Outcome, targets: Tensor | None = None) -> dict[str, Tensor]:
        """Return the method's own losses that have a weight, multiplied by it."""
        found, weights = self.losses(outcome, targets), self.loss_weights
        return {name: weights[name] * value for name, value in found.items() if weights.get(name)}

    # Counts that depend on the image -----------------------------------------------------------

    def expected_count(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Return the count of tokens after the prefix that is expected once a hook has run.

        ``current`` is the count before the hook. Only methods whose count depends on the image need
        this; it may be an upper bound. All others are counted by running them.
        """
        return current

    def own_macs(self, block: int, hook: str, tokens: int) -> int:
        """Count the multiply-adds of the method's own products for one image at a hook.

        ``tokens`` is the number that reach the hook, prefix included. Only methods whose count
        depends on the image need this; it includes what they read from attention.
        """
        raise NotImplementedError

    def at_level(self, level: float) -> dict[str, Any]:
        """Return the rate for a level from 0 (nothing reduced) to 1 (as few tokens as possible).

        Budgets call it on a method that is built. Here the rate is the share that is kept; methods
        with another rate override it.
        """
        return {self.rate: max(1.0 - level, 1e-6)}

    def at_counts(self, left: Sequence[int]) -> dict[str, Any] | None:
        """Return options that leave about these numbers of patches after each block.

        Searches call it on a method that is built. A method without a schedule by block returns
        None.

        Args:
            left: number of patches after each block, at least 1 and never rising.
        """
        return None


@dataclass(eq=False, kw_only=True, repr=False)
class ScoreReducer(Reducer):
    """Scores patch tokens at a few blocks, keeps the best and disposes of the rest.

    A method overrides ``score``. The option ``rest`` says what becomes of the other tokens.

    Attributes:
        keep: share of the patches that each stage keeps, or one share for each stage.
        blocks: numbers of the blocks that reduce, counted from 0. None means three blocks: at a
            quarter, at a half and at three quarters of the depth.
        relative: what rates are shares of: the "original" number of patches (a single rate then
            means keep, keep**2, ...) or the "current" one.
        rounding: how to round a number of tokens that is not whole: "floor", "ceil" or "nearest".
        rest: what becomes of the others: "drop", "fuse" (into one token, their weighted sum),
            "merge" (each into the most similar kept token) or "park" (they skip this block).
        warmup: two points of training progress, between which the rate falls from 1 to ``keep``.
        warmup_steps: number of equal steps of the warm-up; None is continuous.
    """

    keep: float | tuple[float, ...] = 0.7
    blocks: tuple[int, ...] | None = None
    relative: str = "original"
    rounding: str = "floor"
    rest: str = "drop"
    warmup: tuple[float, float] | None = None
    warmup_steps: int | None = None

    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0}
    rate: ClassVar[str] = "keep"
    hook: ClassVar[str] = "before"
    hooks: ClassVar[tuple[str, ...]] = ("before",)

    def __post_init__(self) -> None:
        super().__post_init__()
        parks = self.rest == "park"
        # These facts follow from an option.
        vars(self).update(
            drops=self.rest in ("drop", "fuse"),
            merges=self.rest == "merge",
            parks=parks,
            hooks=(self.hook, "after") if parks else (self.hook,),
        )

    def validate(self) -> None:
        """Check the rate and, where blocks are given, the rest of the schedule."""
        check_choice("rest", self.rest, tuple(disposal.DISPOSALS))
        check_keep(self.keep)
        if self.blocks is not None:
            check_blocks(self.blocks)
        stages = len(self.keep) if isinstance(self.keep, Sequence) else 3
        self._schedule(self.blocks or tuple(range(stages)))

    def _schedule(self, blocks: tuple[int, ...]) -> Schedule:
        return Schedule(
            blocks,
            self.rates(len(blocks)),
            relative=self.relative,
            rounding=self.rounding,
            warmup=self.warmup,
            warmup_steps=self.warmup_steps,
        )

    def rates(self, stages: int) -> float | tuple[float, ...]:
        """Return one rate for all of these stages, or one for each."""
        return self.keep

    @property
    def settled(self) -> bool:
        """Whether the warm-up of the rate is over."""
        return self.warmup is None or self.progress >= self.warmup[1]

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the schedule for the backbone's depth."""
        super().build(spec)
        blocks = self.blocks
        if blocks is None:  # shares of the whole depth, which includes blocks in the embedding
            whole = self.default_blocks(spec.early + spec.depth)
            blocks = tuple(sorted({max(0, block - spec.early) for block in whole}))
        self.active_blocks = check_blocks(blocks, spec.depth)
        self.schedule = self._schedule(self.active_blocks)

    def default_blocks(self, depth: int) -> tuple[int, ...]:
        """Return the blocks at which the method acts if the user names none."""
        return stage_blocks(depth)

    def at_counts(self, left: Sequence[int]) -> dict[str, Any] | None:
        """Return a rate for every block where the count falls.

        Learned parts of a method belong to their blocks, so such a method keeps its blocks.
        """
        assert self.spec is not None
        patches = self.spec.grid[0] * self.spec.grid[1]
        how: dict[str, Any] = {"relative": "original", "rounding": "nearest"}
        blocks = self.active_blocks
        if next(self.parameters(), None) is None:
            before = [patches] * len(left) if self.rest == "park" else [patches, *left[:-1]]
            pairs = enumerate(zip(left, before, strict=True))
            blocks = tuple(block for block, (count, now) in pairs if count < now)
            if not blocks:
                return dict(self.identity or {})
            how["blocks"] = blocks
        return {"keep": tuple(nearest_share(left[b], patches) for b in blocks), **how}

    # Score, select, dispose ----------------------------------------------------------------------

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        """Score the tokens after the prefix, higher = keep: ``[B, N]`` float32."""
        raise NotImplementedError

    def weights(self, score: Tensor) -> Tensor:
        """Turn scores into the weights that fusing and merging use; none may be negative."""
        return score.clamp_min(0.0)  # padding was scored -inf

    def dispose(
        self,
        state: TokenState,
        kept: Selection,
        score: Tensor,
        attention: AttentionReader | None = None,
    ) -> TokenState:
        """Keep the selected tokens and deal with the others as ``rest`` says."""
        weight = self.weights(score) if self.rest in disposal.WEIGHING else score
        return disposal.DISPOSALS[self.rest](state, kept, weight)

    def counts(self, stage: int, state: TokenState) -> int | list[int]:
        """Return the number of tokens to keep after the prefix; a list where images differ."""
        return scheduled_counts(self.schedule, stage, state, self.progress)

    def before(self, block: int, state: TokenState) -> TokenState:
        """Reduce here if the method's hook is "before"."""
        if self.hook != "before" or block not in self.active_blocks:
            return state
        return self._stage(self.active_blocks.index(block), state, None)

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Reduce here if the method's hook is "between"."""
        return self._stage(self.active_blocks.index(block), state, attention)

    def acts_between(self, block: int) -> bool:
        """Tell whether the method's hook is "between" and this is one of its blocks."""
        return self.hook == "between" and block in self.active_blocks

    def after(self, block: int, state: TokenState) -> TokenState:
        """Bring back the tokens that skipped the block."""
        parked_here = self.rest == "park" and block in self.active_blocks
        return state.recall() if parked_here and state.parked is not None else state

    def parked_blocks(self) -> frozenset[int]:
        """Return the active blocks if the rest is parked, because tokens wait during them."""
        return frozenset(self.active_blocks) if self.rest == "park" else frozenset()

    def _stage(
        self, stage: int, state: TokenState, attention: AttentionReader | None
    ) -> TokenState:
        k = self.counts(stage, state)
        if keeps_all(state, k):
            return state  # nothing to dispose of: the score need not even be computed
        score = self.score(stage, state, attention)
        present = state.present()
        if present is not None:
            score = score.masked_fill(~present, float("-inf"))
        return self.dispose(state, Selection.best(score, k), score, attention)


def scheduled_counts(
    schedule: Schedule, stage: int, state: TokenState, progress: float = 1.0
) -> int | list[int]:
    """Return how many tokens after the prefix a stage keeps; a list where images differ."""
    count = state.layout.count
    if count is not None and state.context.original is None:  # nothing may depend on the batch
        return schedule.count(stage, state.patches, count - state.prefix, progress)
    pairs = zip(state.original, state.counts, strict=True)
    counts = [schedule.count(stage, n0, n, progress) for n0, n in pairs]
    return counts[0] if count is not None else counts


def keeps_all(state: TokenState, counts: int | list[int]) -> bool:
    """Tell whether all tokens stay, given counts as ``scheduled_counts`` returns them."""
    if isinstance(counts, int):
        return counts == state.layout.longest - state.prefix
    return counts == list(state.counts)


@dataclass(eq=False)
class Match:
    """Which tokens merge into which others; the fields are arguments of ``TokenState.merge``."""

    kept: Selection
    merged: Selection
    into: Tensor
    weight: Tensor | None = None
    with_prefix: bool = True


@dataclass(eq=False, kw_only=True, repr=False)
class MatchReducer(Reducer):
    """Merges tokens between attention and feed forward; a method overrides only ``match``.

    Attributes:
        blocks: numbers of the blocks that merge, counted from 0. None means every block.
        prop_attn: use proportional attention, which weighs keys by the patches they stand for.
    """

    blocks: tuple[int, ...] | None = None
    prop_attn: bool = True

    hooks: ClassVar[tuple[str, ...]] = ("between",)
    merges: ClassVar[bool] = True

    def validate(self) -> None:
        """Check the blocks, where they are given."""
        if self.blocks is not None:
            check_blocks(self.blocks)

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the blocks."""
        super().build(spec)
        blocks = tuple(range(spec.depth)) if self.blocks is None else self.blocks
        self.active_blocks = check_blocks(blocks, spec.depth)

    @property
    def proportional(self) -> bool:
        """Whether attention weighs keys by the patches they stand for."""
        return self.prop_attn

    def match(self, block: int, state: TokenState, attention: AttentionReader) -> Match | None:
        """Return which tokens stay and which merge into them, or None to leave all unchanged."""
        raise NotImplementedError

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Merge as ``match`` says."""
        found = self.match(block, state, attention)
        if found is None:
            return state
        return state.merge(
            found.kept, found.merged, found.into, found.weight, with_prefix=found.with_prefix
        )
