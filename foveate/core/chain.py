"""Chain: several methods on one model, each in blocks of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveate.core.attention import AttentionReader
from foveate.core.backbone import BackboneSpec
from foveate.core.reducer import Reducer
from foveate.core.tokens import TokenState
from foveate.core.trace import Outcome

__all__ = ["Chain"]


class Chain(Reducer):
    """Runs methods one after another, each in its own blocks.

    Two methods in the same block are refused, because the second one would read attention of tokens
    that the first one has changed. A method that changes the token set while another one has tokens
    parked is refused too, unless it parks tokens itself.
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
        self._gather_weights()
        # The facts of a chain follow from its parts and shadow the class attributes.
        needs = ("none", "recommended", "required")
        eps = [part.softmax_eps for part in parts if part.softmax_eps is not None]
        vars(self).update(
            hooks=tuple(
                hook
                for hook in ("before", "between", "after")
                if any(hook in p.hooks for p in parts)
            ),
            reads=frozenset().union(*(part.reads for part in parts)),
            training_need=max((part.training_need for part in parts), key=needs.index),
            maskable=all(part.maskable for part in parts),
            needs_place=True,  # sizes may start after a fusion; places show which are fused
            softmax_eps=max(eps) if eps else None,
            **{
                fact: any(getattr(part, fact) for part in parts)
                for fact in ("gated", "drops", "merges", "parks")
            },
        )

    @property
    def settled(self) -> bool:
        """Whether all parts work as they will be deployed."""
        return all(part.settled for part in self.members)

    @property
    def members(self) -> tuple[Reducer, ...]:
        """The chained methods."""
        return tuple(part for part in self.parts if isinstance(part, Reducer))

    def config(self) -> dict[str, Any]:
        """Return the options of the parts, by name."""
        return {part.name: part.config() for part in self.members}

    def __repr__(self) -> str:
        return " + ".join(repr(part) for part in self.members)

    def build(self, spec: BackboneSpec) -> None:
        """Bind every part and refuse combinations that cannot work."""
        self.spec = spec
        for part in self.members:
            part.build(spec)
        self._gather_weights()  # building may have changed some
        self.active_blocks = tuple(sorted({b for p in self.members for b in p.active_blocks}))
        for number, part in enumerate(self.members):
            for other in self.members[:number]:
                _check_apart(other, part, spec.depth)

    def for_pixels(self, classes: int) -> None:
        """Pass the number of classes on to every part."""
        for part in self.members:
            part.for_pixels(classes)
        self.pixel_classes = max(part.pixel_classes for part in self.members)
        self._gather_weights()

    def _gather_weights(self) -> None:
        self.loss_weights = {
            chained_name(part, name): weight
            for part in self.members
            for name, weight in part.loss_weights.items()
        }

    @property
    def fixed_count(self) -> bool:
        """Counts are fixed only if every part's count is."""
        return all(part.fixed_count for part in self.members)

    @property
    def proportional(self) -> bool:
        """Attention is proportional if any part asks for it."""
        return any(part.proportional for part in self.members)

    @property
    def recall_blocks(self) -> frozenset[int]:
        """Patches come back before the blocks that any part names."""
        return frozenset().union(*(part.recall_blocks for part in self.members))

    def parked_blocks(self) -> frozenset[int]:
        """Return the blocks in which any part has tokens parked."""
        return frozenset().union(*(part.parked_blocks() for part in self.members))

    def acts_between(self, block: int) -> bool:
        """Tell whether any part acts between attention and feed forward here."""
        return any(part.acts_between(block) for part in self.members)

    def before(self, block: int, state: TokenState) -> TokenState:
        """Run the parts; at most one acts."""
        for part in self.members:
            state = part.before(block, state)
        return state

    def between(self, block: int, state: TokenState, attention: AttentionReader) -> TokenState:
        """Run the part that acts here."""
        for part in self.members:
            if part.acts_between(block):
                state = part.between(block, state, attention)
        return state

    def after(self, block: int, state: TokenState) -> TokenState:
        """Run the parts; at most one acts."""
        for part in self.members:
            state = part.after(block, state)
        return state

    def finish(self, state: TokenState) -> TokenState:
        """Let every part do what remains."""
        for part in self.members:
            state = part.finish(state)
        return state

    def own_macs(self, block: int, hook: str, tokens: int) -> int:
        """Sum the products of all parts, of which at most one acts here."""
        return sum(part.own_macs(block, hook, tokens) for part in self.members)

    def expected_count(self, block: int, hook: str, current: int, grid: tuple[int, int]) -> int:
        """Return the count that the part that acts here expects."""
        for part in self.members:
            current = part.expected_count(block, hook, current, grid)
        return current

    def losses(
        self, outcome: Outcome, targets: Tensor | None = None, teacher: Outcome | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of all parts; a part's own losses carry its name."""
        return {
            chained_name(part, key): value
            for part in self.members
            for key, value in part.losses(outcome, targets, teacher).items()
        }


# These compare the whole model's answer with labels or a teacher, so every part gives the same.
_SHARED = ("class", "kl", "token")


def chained_name(part: Reducer, loss: str) -> str:
    """Name a part's loss inside a chain."""
    return loss if loss in _SHARED else f"{part.name}.{loss}"


def _working(part: Reducer, depth: int) -> set[int]:
    """Return the blocks in which a method changes tokens or reads attention."""
    return {b for b in range(depth) if b in part.active_blocks or part.acts_between(b)}


def _check_apart(first: Reducer, second: Reducer, depth: int) -> None:
    both = sorted(_working(first, depth) & _working(second, depth))
    if both:
        raise ValueError(
            f"{first.name} and {second.name} both act in block {both[0]}: give each its own "
            "blocks, for example with blocks=[...]"
        )
    for part, other in ((first, second), (second, first)):
        changed = set(part.active_blocks) | part.recall_blocks
        clash = sorted(other.parked_blocks() & changed)
        if clash and not part.parks:
            raise ValueError(
                f"{other.name} has tokens parked in blocks {sorted(other.parked_blocks())}, and "
                f"{part.name} would change the tokens in block {clash[0]}"
            )
