"""Base classes of the reduction methods.

A method is a keyword-only dataclass: its fields are its config. It declares the hooks it acts at,
what it needs of attention and how it trains; the driver and ``describe`` read those facts and the
contract tests hold it to them. State of a forward pass lives in the TokenState, never here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.core.attention import CarriedSeen, Seen
from foveate.core.backbone import BackboneSpec
from foveate.core.options import check_types
from foveate.core.schedule import Schedule, check_blocks, check_keep, stage_blocks
from foveate.core.tokens import TokenState
from foveate.ops import top_k

__all__ = ["Chain", "Match", "MatchReducer", "Reducer", "ScoreReducer", "Seen"]


@dataclass(eq=False, kw_only=True, repr=False)
class Reducer(nn.Module):
    """Base of every method.

    Class attributes are the facts a method declares about itself:

    * ``paper``: authors, title and where it appeared; ``summary``: one line;
    * ``hooks``: any of "before" (a block), "between" (its attention and its feed forward), "after";
    * ``needs``: what it reads off attention: "cls_row", "key_mean", "value_norm", "attention";
    * ``training``: "none" (works as it is), "recommended" or "required";
    * ``maskable``: can run masked, all tokens computed and decisions applied as a mask;
    * ``gated``: learns gates, so it trains masked;
    * ``drops``: tokens may disappear (``preserve`` then brings them back at the end);
    * ``parks``: tokens are set aside and come back;
    * ``identity``: options under which the method changes nothing, or None if there are none;
    * ``rate``: the option that says how much is reduced, "" if there is none;
    * ``loss_weights``: what training minimises besides the task, and how strongly.
    """

    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    name: ClassVar[str] = ""
    hooks: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    training_need: ClassVar[str] = "none"
    gated: ClassVar[bool] = False
    maskable: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    parks: ClassVar[bool] = False
    needs_place: ClassVar[bool] = False
    identity: ClassVar[Mapping[str, Any] | None] = None
    rate: ClassVar[str] = ""
    loss_weights: ClassVar[Mapping[str, float]] = {}
    softmax_eps: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        # The dataclass sets plain fields first; nn.Module does not need its tables for those.
        super().__init__()
        self.progress = 1.0
        self.spec: BackboneSpec | None = None
        self.acts: tuple[int, ...] = ()
        check_types(self)
        self.validate()

    # Config ------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Refuse option values that are wrong whatever the model."""

    def build(self, spec: BackboneSpec) -> None:
        """Bind to a backbone: resolve blocks, check against it, make new parameters.

        Sets ``acts``, the blocks at which the method changes the token set.
        """
        self.spec = spec

    def config(self) -> dict[str, Any]:
        """The method's options, as given."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        options = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default or f.name == self.rate:
                options.append(f"{f.name}={value!r}")
        return f"{self.name}({', '.join(options)})"

    def advance(self, progress: float) -> None:
        """Follow the training, of which so much is done, 0 to 1; 1 is the method as deployed."""
        self.progress = progress

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
    def preserves(self) -> bool:
        """Whether dropped patches return, at their last value, after the last block."""
        return bool(getattr(self, "preserve", False))

    def spans(self) -> frozenset[int]:
        """Blocks during which tokens of this method are parked."""
        return frozenset()

    # Work --------------------------------------------------------------------------------------

    def before(self, block: int, state: TokenState) -> TokenState:
        """Change the tokens that enter a block."""
        return state

    def between(self, block: int, state: TokenState, seen: Seen) -> TokenState:
        """Change the tokens between attention and feed forward."""
        return state

    def after(self, block: int, state: TokenState) -> TokenState:
        """Change the tokens that leave a block."""
        return state

    def wants(self, block: int) -> bool:
        """Whether ``between`` has anything to do in this block."""
        return "between" in self.hooks and block in self.acts

    def finish(self, state: TokenState) -> TokenState:
        """Last word after the last block, before the final norm."""
        return state

    # Facts for describe, costs and training ----------------------------------------------------

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Tokens after the prefix once a hook has run, from the count before it.

        For counts that depend on the image: the expected count, or its upper bound.
        """
        return current

    def at_level(self, level: float) -> dict[str, Any]:
        """The rate from level 0, nothing reduced, to 1, as few tokens as the method can leave.

        For budgets, of a method that has a ``rate``, once it is built. A share kept is the common
        case; methods that count tokens instead override it.
        """
        return {self.rate: max(1.0 - level, 1e-6)}

    def reads(self, block: int, tokens: int, left: int) -> bool:
        """Whether attention is read in a block that ``between`` takes from one count to another."""
        return self.wants(block) and left < tokens

    def macs(self, block: int, hook: str, tokens: int, left: int) -> int:
        """Multiply-adds of the method's own products for one image when a hook runs.

        ``tokens`` enter and ``left`` leave, prefix included. What is read off attention is counted
        by core/cost.py and does not belong here.
        """
        return 0

    def losses(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """The method's own losses, un-weighted, from what a forward pass left in its notes."""
        return {}

    def note(self, state: TokenState, key: str, value: Any) -> TokenState:
        """Leave a value for losses and traces."""
        return state.replace(notes={**state.notes, (self.name, key): value})

    def noted(self, notes: Mapping[Any, Any], key: str, default: Any = None) -> Any:
        """Read back what this method left."""
        return notes.get((self.name, key), default)


@dataclass(eq=False, kw_only=True, repr=False)
class ScoreReducer(Reducer):
    """Keeps the best-scored patch tokens at a few blocks; a method overrides only ``score``.

    Attributes:
        keep: fraction kept at each stage, or one fraction a stage.
        blocks: where; None means a quarter, a half and three quarters of the depth.
        relative: rates are of the "original" count (keep, keep**2, ...) or of the "current" one.
        rounding: "floor" or "ceil".
        preserve: bring dropped patches back at their last value after the last block.
        warmup: training progress between which the rate sinks from 1 to ``keep``.
        warmup_steps: number of equal steps of the warm-up; None is continuous.
    """

    keep: float | tuple[float, ...] = 0.7
    blocks: tuple[int, ...] | None = None
    relative: str = "original"
    rounding: str = "floor"
    preserve: bool = False
    warmup: tuple[float, float] | None = None
    warmup_steps: int | None = None

    drops: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any] | None] = {"keep": 1.0}
    rate: ClassVar[str] = "keep"

    def validate(self) -> None:
        """Check the rate and, where blocks are given, the rest of the schedule."""
        check_keep(self.keep)
        if self.blocks is not None:
            check_blocks(self.blocks)
        self._schedule(self.blocks or self._stand_in())

    def _stand_in(self) -> tuple[int, ...]:
        return tuple(range(len(self.keep) if isinstance(self.keep, Sequence) else 3))

    def _schedule(self, blocks: tuple[int, ...]) -> Schedule:
        return Schedule(
            blocks,
            self.keep,
            relative=self.relative,
            rounding=self.rounding,
            warmup=self.warmup,
            warmup_steps=self.warmup_steps,
        )

    def build(self, spec: BackboneSpec) -> None:
        """Resolve the schedule for the backbone's depth."""
        super().build(spec)
        blocks = self.blocks if self.blocks is not None else stage_blocks(spec.depth)
        self.acts = check_blocks(blocks, spec.depth)
        self.schedule = self._schedule(self.acts)

    def score(self, stage: int, state: TokenState, seen: Seen | None) -> Tensor:
        """Score the tokens after the prefix, higher = keep: ``[B, N]`` float32."""
        raise NotImplementedError

    def reduce(
        self,
        state: TokenState,
        seen: Seen | None,
        score: Tensor,
        idx: Tensor,
        valid: Tensor | None,
    ) -> TokenState:
        """Leave the tokens ``idx`` and deal with the others; dropping them is the default."""
        return state.keep(idx, valid)

    def before(self, block: int, state: TokenState) -> TokenState:
        """Reduce here if the method's hook is "before"."""
        if self.hooks != ("before",) or block not in self.acts:
            return state
        return self._stage(self.acts.index(block), state, None)

    def between(self, block: int, state: TokenState, seen: Seen) -> TokenState:
        """Reduce here if the method's hook is "between"."""
        return self._stage(self.acts.index(block), state, seen)

    def counts(self, stage: int, state: TokenState) -> int | list[int]:
        """Tokens to keep after the prefix: one number, or one an image when they differ."""
        original = self.original(state)
        counts = [
            self.schedule.count(stage, n0, n, self.progress)
            for n0, n in zip(original, state.counts, strict=True)
        ]
        return counts[0] if state.layout.is_even else counts

    def original(self, state: TokenState) -> tuple[int, ...]:
        """Patches each image started with (fewer than the grid under a user's mask)."""
        return state.notes.get("original", (state.patches,) * state.batch)

    def _stage(self, stage: int, state: TokenState, seen: Seen | None) -> TokenState:
        k = self.counts(stage, state)
        if k == (state.counts[0] if isinstance(k, int) else list(state.counts)):
            return state  # nothing to drop: the score need not even be computed
        score = self.score(stage, state, seen)
        present = state.present()
        if present is not None:
            score = score.masked_fill(~present, float("-inf"))
        idx, valid = top_k(score, k)
        return self.reduce(state, seen, score, idx, valid)

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Counts follow the schedule."""
        if hook not in self.hooks or block not in self.acts:
            return current
        return self.schedule.count(
            self.acts.index(block), grid[0] * grid[1], current, self.progress
        )


@dataclass(eq=False)
class Match:
    """Who merges into whom; fields as TokenState.merge takes them."""

    idx_keep: Tensor
    idx_src: Tensor
    into: Tensor
    weight: Tensor
    valid_keep: Tensor | None = None
    valid_src: Tensor | None = None


@dataclass(eq=False, kw_only=True, repr=False)
class MatchReducer(Reducer):
    """Merges tokens into others between attention and feed forward; override only ``match``."""

    hooks: ClassVar[tuple[str, ...]] = ("between",)
    track_size: ClassVar[bool] = True

    def match(self, block: int, state: TokenState, seen: Seen | None) -> Match | None:
        """Say which tokens stay and which are merged into them; None to leave all alone."""
        raise NotImplementedError

    def between(self, block: int, state: TokenState, seen: Seen) -> TokenState:
        """Merge in the blocks where the method acts."""
        return self.merge(block, state, seen)

    def merge(self, block: int, state: TokenState, seen: Seen | None) -> TokenState:
        """Carry out the match, if there is one."""
        match = self.match(block, state, seen)
        if match is None:
            return state
        return state.merge(
            match.idx_keep,
            match.idx_src,
            match.into,
            match.weight,
            valid_keep=match.valid_keep,
            valid_src=match.valid_src,
            track_size=self.track_size,
        )


class Chain(Reducer):
    """Runs methods one after another at every hook.

    What one of them parks may not be touched by another, so a method that drops or merges in the
    middle of such a stretch is refused when the chain meets its model.
    """

    name = "chain"

    def __init__(self, *parts: Reducer) -> None:
        if len(parts) < 2:
            raise ValueError(f"a chain needs at least two methods, got {len(parts)}")
        names = [part.name for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"a chain takes each method once, got {name!r} twice")
        Reducer.__post_init__(self)
        self.parts = nn.ModuleList(parts)
        # The facts of a chain follow from its parts and shadow the class attributes.
        for key, merged in _MERGED.items():
            vars(self)[key] = merged(parts)

    @property
    def members(self) -> tuple[Reducer, ...]:
        """The chained methods."""
        return tuple(part for part in self.parts if isinstance(part, Reducer))

    def config(self) -> dict[str, Any]:
        """Options of the parts, by name."""
        return {part.name: part.config() for part in self.members}

    def __repr__(self) -> str:
        return " + ".join(repr(part) for part in self.members)

    def build(self, spec: BackboneSpec) -> None:
        """Bind every part and refuse combinations that cannot work."""
        super().build(spec)
        for part in self.members:
            part.build(spec)
        self.acts = tuple(sorted({b for part in self.members for b in part.acts}))
        for place, part in enumerate(self.members):
            for other_place, other in enumerate(self.members):
                if other is part:
                    continue
                clash = part.spans() & (set(other.acts) | other.spans())
                if other.hooks == ("before",) and not other.parks and other_place < place:
                    clash = clash - set(part.acts)  # it acts just before the tokens are parked
                if clash:
                    raise ValueError(
                        f"{part.name} has tokens parked in blocks {sorted(part.spans())}, and "
                        f"{other.name} would change the tokens in {sorted(clash)} of these"
                    )
        self.carried: dict[int, frozenset[str]] = {}
        for block in range(spec.depth):
            later = [part for part in self.members if part.wants(block)][1:]
            self.carried[block] = frozenset(need for part in later for need in part.needs)
            if "attention" in self.carried[block]:
                raise ValueError(
                    f"block {block}: only the first method of a chain may read the attention map"
                )

    @property
    def fixed_count(self) -> bool:
        """Fixed only if every part's count is."""
        return all(part.fixed_count for part in self.members)

    @property
    def proportional(self) -> bool:
        """Proportional attention if any part asks for it."""
        return any(part.proportional for part in self.members)

    @property
    def preserves(self) -> bool:
        """Preserve if any part does."""
        return any(part.preserves for part in self.members)

    def spans(self) -> frozenset[int]:
        """Blocks in which any part has tokens parked."""
        return frozenset().union(*(part.spans() for part in self.members))

    def wants(self, block: int) -> bool:
        """Whether any part acts between attention and feed forward here."""
        return any(part.wants(block) for part in self.members)

    def before(self, block: int, state: TokenState) -> TokenState:
        """Run the parts in order."""
        for part in self.members:
            state = part.before(block, state)
        return state

    def between(self, block: int, state: TokenState, seen: Seen) -> TokenState:
        """Run the parts in order; what later ones read of attention travels with the tokens."""
        first, *later = [part for part in self.members if part.wants(block)]
        if not later:
            return first.between(block, state, seen)
        needs = self.carried[block]
        state = first.between(block, seen.carry(state, needs), seen)
        for part in later:
            state = part.between(block, state, CarriedSeen(state, part.needs))
        return CarriedSeen.dropped(state)

    def after(self, block: int, state: TokenState) -> TokenState:
        """Run the parts in reverse, so that what was parked last comes back first."""
        for part in reversed(self.members):
            state = part.after(block, state)
        return state

    def finish(self, state: TokenState) -> TokenState:
        """Let every part have its last word."""
        for part in self.members:
            state = part.finish(state)
        return state

    def planned(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Compose the parts' counts."""
        parts = reversed(self.members) if hook == "after" else self.members
        for part in parts:
            current = part.planned(block, hook, current, grid)
        return current

    def losses(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of all parts, prefixed with their names."""
        return {
            f"{part.name}.{key}": value
            for part in self.members
            for key, value in part.losses(notes).items()
        }


_NEEDS = ("none", "recommended", "required")
_MERGED: dict[str, Any] = {
    "hooks": lambda parts: tuple(
        h for h in ("before", "between", "after") if any(h in p.hooks for p in parts)
    ),
    "needs": lambda parts: frozenset().union(*(p.needs for p in parts)),
    "training_need": lambda parts: max((p.training_need for p in parts), key=_NEEDS.index),
    "gated": lambda parts: any(p.gated for p in parts),
    "maskable": lambda parts: all(p.maskable for p in parts),
    "drops": lambda parts: any(p.drops for p in parts),
    "parks": lambda parts: any(p.parks for p in parts),
    # Sizes may begin after tokens were fused, which only their places tell.
    "needs_place": lambda parts: True,
    "softmax_eps": lambda parts: max(p.softmax_eps for p in parts),
}
