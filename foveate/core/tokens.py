"""TokenState: the tokens of a batch on their way through the network.

Every change of the token set is one method of TokenState, called a verb. The verbs keep everything
that belongs to the tokens up to date: where each patch went (``source``), how many patches a token
stands for (``size``), the last known value of every patch (``canvas``) and what travels with a
token (``place``, ``extras``). A reduction method decides what to change, and a verb changes it. A
verb returns a new state and never changes the old one.

Positions passed to the verbs count the tokens of an image *after* its prefix tokens: 0 is the first
patch token. Prefix tokens stay in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.context import Context
from foveate.core.layout import Layout
from foveate.core.selection import Selection

__all__ = ["Parked", "TokenState"]


@dataclass(frozen=True, eq=False)
class Parked:
    """Tokens that are set aside while a method works on some of them.

    Attributes:
        state: all tokens, as they were before some were set aside. This state may hold parked
            tokens itself.
        rows: row in ``state`` of each token that is still worked on, ``[T]``; -1 for tokens that
            were appended since.
    """

    state: TokenState
    rows: Tensor


@dataclass(eq=False)
class TokenState:
    """All tokens of a batch between two steps of the network.

    Attributes:
        x: token values, ``[T, C]``, image after image.
        layout: how the rows of ``x`` divide into images.
        context: facts about the whole pass: prefix, grid, mode.
        block: number of the next block.
        place: index of the patch whose position each token has, ``[T]``; ``H*W`` for tokens
            without a position (prefix, fused, package, representative). None if nothing needs it.
        source: the token that carries each patch, ``[B, H*W]``, counted within its image with the
            prefix; -1 when the patch is gone. None unless tracked.
        canvas: last value of every patch that is gone, ``[B, H*W, C]``. None unless tracked.
        size: number of patches that each token stands for, ``[T]`` float32. None until tokens
            have merged.
        alive: 1 for tokens that take part and 0 for the others, ``[B, N]`` float, with a gradient
            where gates are trained. None except in masked mode.
        extras: further values that follow their tokens, each ``[T, ...]``.
        parked: tokens that are set aside, or None.
        notes: values that methods leave for later blocks, losses and traces.
        intact: whether every patch still has a token of its own, in the order of the grid, right
            after the prefix. If so, the full grid can be read without looking patches up.
        appended: whether tokens were appended, which stand for no patch.
    """

    x: Tensor
    layout: Layout
    context: Context
    block: int = 0
    place: Tensor | None = None
    source: Tensor | None = None
    canvas: Tensor | None = None
    size: Tensor | None = None
    alive: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    parked: Parked | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    intact: bool = True
    appended: bool = False

    # Making and reading ----------------------------------------------------------------------

    @classmethod
    def begin(
        cls, x: Tensor, context: Context, *, place: bool = False, track: bool = False
    ) -> TokenState:
        """Start from embedded images ``x [B, N, C]``: prefix tokens, then the grid's patches."""
        batch, count, width = x.shape
        prefix, patches = context.prefix, context.patches
        state = cls(x.reshape(batch * count, width), Layout.even(batch, count), context)
        index = torch.arange(patches, device=x.device)
        if place:
            nowhere = index.new_full((prefix,), patches)
            state.place = torch.cat([nowhere, index]).repeat(batch)
        if track:
            state.source = (index + prefix).expand(batch, patches)
            state.canvas = x[:, prefix:]
        return state

    def replace(self, **changes: Any) -> TokenState:
        """Copy the state with some fields changed."""
        # Every block makes several copies. Writing all fields out is the fastest way that the
        # compiler of the oldest supported torch can follow.
        state = TokenState(
            self.x,
            self.layout,
            self.context,
            self.block,
            self.place,
            self.source,
            self.canvas,
            self.size,
            self.alive,
            self.extras,
            self.parked,
            self.notes,
            self.intact,
            self.appended,
        )
        for name, value in changes.items():
            if name not in _FIELDS:
                raise TypeError(f"tokens have no field {name!r}; they have {', '.join(_FIELDS)}")
            setattr(state, name, value)
        return state

    def with_tokens(self, x: Tensor) -> TokenState:
        """Give the tokens new values, ``[T, C]`` or ``[B, N, C]``; nothing else changes."""
        if x.ndim == 3:
            x = x.flatten(0, 1)
        if x.shape != self.x.shape:
            raise ValueError(
                f"new values must be {list(self.x.shape)}, the tokens of all images in one tensor, "
                f"got {list(x.shape)}"
            )
        return self.replace(x=x)

    def note(self, key: str, value: Any) -> TokenState:
        """Leave a value for later blocks, losses and traces."""
        return self.replace(notes={**self.notes, key: value})

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)[4:]}
        carried = [
            k for k, v in values.items() if v is not None and not (isinstance(v, dict) and not v)
        ]
        return (
            f"TokenState({self.layout!r}, width={self.x.shape[1]}, prefix={self.prefix}, "
            f"grid={self.grid}, carries {', '.join(carried) or 'nothing else'})"
        )

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.layout.batch

    @property
    def prefix(self) -> int:
        """Tokens in front of each image's patches."""
        return self.context.prefix

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.context.grid

    @property
    def patches(self) -> int:
        """Number of cells of the patch grid."""
        return self.context.patches

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tokens after the prefix in each image."""
        return tuple(n - self.prefix for n in self.layout.lengths)

    @property
    def original(self) -> tuple[int, ...]:
        """Number of patches that each image began with."""
        return self.context.original or (self.patches,) * self.batch

    def to_remove(self, r: int | float, most: Callable[[int], int]) -> int | list[int]:
        """Return how many tokens to remove: one number in an even layout, else one per image.

        Args:
            r: number of tokens, or share of the patches that an image began with.
            most: gives the most tokens that may leave, from the number of tokens after the prefix.
        """
        wanted = self.context.removed(r)
        if self.layout.is_even:
            assert isinstance(wanted, int)
            return min(wanted, most(self.layout.longest - self.prefix))
        each = [wanted] * self.batch if isinstance(wanted, int) else wanted
        return [min(one, most(n)) for one, n in zip(each, self.counts, strict=True)]

    def tokens(self) -> Tensor:
        """Return the tokens as ``[B, N, C]``; zero-padded when the layout is ragged."""
        return self.layout.rect(self.x)

    def prefix_tokens(self) -> Tensor:
        """Return the prefix tokens ``[B, prefix, C]``."""
        if self.layout.is_even:
            return self.tokens()[:, : self.prefix]
        rows = self.layout.start(self.x.device)[:, None]
        rows = rows + torch.arange(self.prefix, device=self.x.device)
        return self.x.index_select(0, rows.flatten()).view(self.batch, self.prefix, self.x.shape[1])

    def after_prefix(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Arrange flat values ``[T, ...]`` as ``[B, longest - prefix, ...]``, prefix left out."""
        return self.layout.rect(values, fill)[:, self.prefix :]

    def mean(self, values: Tensor) -> Tensor:
        """Average flat values ``[T, ...]`` over each image's live tokens after the prefix."""
        if self.layout.is_even and self.alive is None:
            return self.after_prefix(values).mean(1)
        weight = self.layout.valid(values.device) if self.alive is None else self.alive
        assert weight is not None
        front = torch.arange(weight.shape[1], device=values.device) >= self.prefix
        flat = self.layout.flat((weight * front).to(values.dtype))
        total = self.layout.sum(flat).clamp_min(1e-6)
        per_token = (-1, *[1] * (values.ndim - 1))
        return self.layout.sum(values * flat.view(per_token)) / total.view(per_token)

    def present(self) -> Tensor | None:
        """Mark the cells that hold a live token, ``[B, longest - prefix]``; None means all."""
        valid = self.layout.valid(self.x.device)
        if self.alive is not None:
            live = self.alive.detach() > 0
            valid = live if valid is None else valid & live
        return None if valid is None else valid[:, self.prefix :]

    def is_patch(self) -> Tensor:
        """Mark the tokens with a place on the grid, ``[T]``; prefix and fused ones have none."""
        if self.place is None:
            raise RuntimeError("tokens carry no places in this pass: set needs_place on the method")
        return self.place < self.patches

    def patch_counts(self) -> Tensor:
        """Count the patches that each token carries, ``[T]`` float32."""
        source = self._tracked()
        longest = self.layout.longest
        slots = torch.where(source < 0, longest, source)
        counted = slots.new_zeros(self.batch, longest + 1)
        counted = counted.scatter_add(1, slots, torch.ones_like(slots))[:, :longest]
        return self.layout.flat(counted).float()

    def merge_weight(self) -> Tensor:
        """Return each token's weight, the number of patches it stands for, ``[T]`` float32.

        A fused token stands for no patch but has a value, so its weight is 1.
        """
        if self.size is None:
            return self.x.new_ones(self.x.shape[0], dtype=torch.float32)
        return self.size.clamp_min(1.0) if self.appended else self.size

    # Verbs -------------------------------------------------------------------------------------

    def keep(self, kept: Selection) -> TokenState:
        """Keep the selected tokens, in that order; drop the others."""
        return self._moved(kept.behind(self.prefix))

    def keep_where(self, mask: Tensor) -> TokenState:
        """Keep the tokens marked in ``mask [B, longest - prefix]``, any number in each image."""
        present = self.layout.valid(self.x.device)
        if present is not None:
            mask = mask & present[:, self.prefix :]
        return self.keep(Selection.where(mask))

    def merge(
        self,
        kept: Selection,
        merged: Selection,
        into: Tensor,
        weight: Tensor | None = None,
        *,
        track_size: bool = True,
        with_prefix: bool = True,
    ) -> TokenState:
        """Merge some tokens into kept ones by a weighted average.

        Args:
            kept: tokens that stay, in their new order.
            merged: tokens that are merged away, ``[B, R]``.
            into: entry of ``kept`` that each of them merges into, ``[B, R]``.
            weight: weight of every token after the prefix, ``[B, N]`` float32; None takes the
                number of patches that a token stands for.
            track_size: count merged patches in ``size`` from here on.
            with_prefix: add the prefix to ``kept``. Without it, positions count the whole image,
                and ``kept`` selects the prefix itself.
        """
        # Everything is done on rows of the flat tensor: on a CPU the two-dimensional gather and
        # scatter cost several times as much.
        if with_prefix:
            kept, into = kept.behind(self.prefix), into + self.prefix
            merged = Selection(merged.index + self.prefix, merged.lengths)
        inverse = None
        if self.source is not None:
            moved_to = into if merged.valid is None else torch.where(merged.valid, into, 0)
            inverse = self._inverse(kept).scatter(1, merged.slots(self.layout.longest), moved_to)
        rows_kept = self.layout.rows(kept)
        state = self._moved(kept, inverse, rows=rows_kept)
        rows_from = self.layout.rows(merged)
        rows_to = state.layout.rows(Selection(into, merged.lengths))

        size, before = state.size, self.size
        if track_size and before is None:
            before = self._initial_size()
            size = before.index_select(0, rows_kept)
        # In place, here and below: these rows were just made, and a copy would cost more.
        if size is not None and before is not None:
            moved = before.index_select(0, rows_from)
            size = total = size.index_add_(0, rows_to, moved)
        if weight is not None or size is None or self.appended:  # the weights are not the sizes
            flat = self.merge_weight() if weight is None else self._behind_prefix(weight)
            moved = flat.index_select(0, rows_from)
            total = flat.index_select(0, rows_kept).index_add_(0, rows_to, moved)
        total = total.index_select(0, rows_to)
        if weight is not None:  # sizes are at least 1, weights may all be 0
            total = total.clamp_min(torch.finfo(total.dtype).tiny)
        share = moved / total
        change = self.x.index_select(0, rows_from) - state.x.index_select(0, rows_to)
        change = change * share.to(change.dtype)[:, None]
        return state.replace(x=state.x.index_add_(0, rows_to, change), size=size)

    def append(
        self, token: Tensor, exists: Tensor | None = None, alive: Tensor | None = None
    ) -> TokenState:
        """Put one more token ``token [B, C]`` at the end of each image.

        It stands for no patch. ``exists [B]`` leaves it out of some images (ragged layout);
        ``alive [B]`` switches it off in some (masked mode).
        """
        device, batch = self.x.device, self.batch
        if self.layout.is_even and exists is None:
            layout = self.layout.resized(1)

            def put(values: Tensor, new: Tensor) -> Tensor:
                return torch.cat([self.layout.rect(values), new[:, None]], 1).flatten(0, 1)
        else:
            here = torch.ones(batch, dtype=torch.bool, device=device) if exists is None else exists
            added = [int(e) for e in here.tolist()]
            lens = [n + e for n, e in zip(self.layout.lengths, added, strict=True)]
            layout = Layout.ragged(lens)
            last = layout.start(device) + torch.tensor(lens, device=device) - 1
            is_new = torch.zeros(layout.total, dtype=torch.bool, device=device)
            is_new[last[here]] = True
            old_rows = (~is_new).nonzero().squeeze(1)

            def put(values: Tensor, new: Tensor) -> Tensor:
                out = values.new_zeros((layout.total, *values.shape[1:]))
                out = out.index_copy(0, old_rows, values)
                return out.index_copy(0, last[here], new[here])

        def constant(values: Tensor, fill: float = 0) -> Tensor:
            return values.new_full((batch, *values.shape[1:]), fill)

        token = token.to(self.x.dtype)  # autocast computes products in half precision
        changes: dict[str, Any] = {"x": put(self.x, token), "layout": layout, "appended": True}
        if self.place is not None:
            changes["place"] = put(self.place, constant(self.place, self.patches))
        if self.size is not None:
            changes["size"] = put(self.size, constant(self.size))
        if self.parked is not None:
            rows = self.parked.rows
            changes["parked"] = Parked(self.parked.state, put(rows, constant(rows, -1)))
        if self.alive is not None:
            new = torch.ones_like(self.alive[:, 0]) if alive is None else alive
            changes["alive"] = torch.cat([self.alive, new.to(self.alive)[:, None]], 1)
        changes["extras"] = {k: put(v, constant(v)) for k, v in self.extras.items()}
        return self.replace(**changes)

    def discard_last(self, mask: Tensor | None = None) -> TokenState:
        """Remove the last token of each image, or of the images in ``mask [B]``."""
        device = self.x.device
        if self.layout.is_even and mask is None:
            assert self.layout.count is not None
            index = torch.arange(self.layout.count - 1, device=device).expand(self.batch, -1)
            return self._moved(Selection(index))
        last = torch.tensor(self.layout.lengths, device=device) - 1
        gone = last if mask is None else torch.where(mask, last, -1)
        stays = torch.arange(self.layout.longest, device=device) != gone[:, None]
        present = self.layout.valid(device)
        return self._moved(Selection.where(stays if present is None else stays & present))

    def park(self, kept: Selection, *, with_prefix: bool = True) -> TokenState:
        """Set all tokens except the selected ones aside, unchanged, until ``recall``.

        Without ``with_prefix``, positions count the whole image, and a prefix token that is not
        selected is parked too. Tokens that are parked already stay parked until a later recall.
        """
        if with_prefix:
            kept = kept.behind(self.prefix)
        inner = self._moved(kept, remember=False)
        return inner.replace(parked=Parked(self, self.layout.rows(kept)))

    def recall(self, change: Tensor | None = None) -> TokenState:
        """Bring the tokens parked last back to their rows; the others keep their new values.

        ``change [B, C]`` is added to the parked tokens of each image.
        """
        if self.parked is None:
            raise RuntimeError("no tokens are parked")
        outside, rows = self.parked.state, self.parked.rows
        base = outside.x if change is None else outside.x + outside.layout.spread(change)
        extras = dict(outside.extras)
        for name, values in self.extras.items():
            if name in extras:
                extras[name] = extras[name].index_copy(0, rows, values)
        return outside.replace(
            x=base.index_copy(0, rows, self.x), extras=extras, notes=self.notes, block=self.block
        )

    def mask_out(self, alive: Tensor) -> TokenState:
        """Switch off the tokens after the prefix that ``alive [B, N - prefix]`` does not keep."""
        if self.alive is None:
            raise RuntimeError("only masked mode switches tokens off; other modes remove them")
        now = torch.cat([self.alive[:, : self.prefix], self.alive[:, self.prefix :] * alive], 1)
        canvas = self.canvas
        if canvas is not None and self.source is not None:
            died = (self.alive.detach() > 0) & (now.detach() <= 0)
            lost = died.gather(1, self.source.clamp_min(0)) & (self.source >= 0)
            canvas = torch.where(lost[..., None], self._carried(self.source), canvas)
        return self.replace(alive=now, canvas=canvas)

    # The full grid -----------------------------------------------------------------------------

    def recalled(self) -> TokenState:
        """Return the state with all parked tokens brought back, for callers outside the pass."""
        state = self
        while state.parked is not None:
            guests = state.layout.rect(state.parked.rows, 0) < 0
            if bool((state.parked.rows < 0).any()):  # appended tokens have no place to go back to
                present = state.layout.valid(state.x.device)
                own = ~guests if present is None else ~guests & present
                state = state._moved(Selection.where(own), remember=False)
            state = state.recall()
        return state

    def restore(self, gone: str = "last") -> Tensor:
        """Return values on the full grid, ``[B, H*W, C]``.

        A merged patch gets its merged token. A patch whose token is gone (dropped, or fused into
        one un-normalised sum) gets the last value it had (``gone="last"``) or zeros ("zero").
        """
        if gone not in ("last", "zero"):
            raise ValueError(f"gone must be 'last' or 'zero', not {gone!r}")
        if self.parked is not None:
            return self.recalled().restore(gone)
        source = self._tracked()
        whole = self._whole()
        if whole is not None and self.alive is None:
            return whole[:, self.prefix : self.prefix + self.patches]  # a view
        assert self.canvas is not None
        here = source >= 0
        if self.alive is not None:
            here = here & (self.alive.detach().gather(1, source.clamp_min(0)) > 0)
        other = self.canvas if gone == "last" else torch.zeros_like(self.canvas)
        return torch.where(here[..., None], self._carried(source), other)

    def add(self, values: Tensor) -> TokenState:
        """Add ``values [B, H*W, C]`` to the patches, wherever each of them is.

        A token takes the mean of what is added to the patches that it carries. Patches that are
        parked or gone get theirs too.
        """
        source = self._tracked()
        shape = (self.batch, self.patches, self.x.shape[1])
        if tuple(values.shape) != shape:
            raise ValueError(
                f"values to add must be {list(shape)}, one for every patch of the grid, got "
                f"{list(values.shape)}"
            )
        assert self.canvas is not None
        values = values.to(self.x.dtype)
        whole = self._whole()
        if whole is not None and self.alive is None and self.parked is None:
            end = self.prefix + self.patches
            parts = [whole[:, : self.prefix], whole[:, self.prefix : end] + values, whole[:, end:]]
            x = torch.cat([part for part in parts if part.shape[1]], 1)
            return self.replace(x=x.flatten(0, 1))  # no patch is gone, so nobody reads the canvas
        longest = self.layout.longest
        slots = torch.where(source < 0, longest, source)[..., None].expand(shape)
        total = values.new_zeros(self.batch, longest + 1, shape[2]).scatter_add(1, slots, values)
        change = self.layout.flat(total[:, :longest])
        change = change / self.patch_counts().clamp_min(1.0).to(change.dtype)[:, None]
        parked = self.parked
        if parked is not None:
            parked = Parked(parked.state.add(values), parked.rows)
        return self.replace(x=self.x + change, canvas=self.canvas + values, parked=parked)

    def refill(self) -> TokenState:
        """Bring every patch back with its last value: the prefix, then the whole grid in order."""
        x = torch.cat([self.prefix_tokens(), self.restore("last")], 1)
        full = TokenState.begin(x, self.context, place=self.place is not None, track=True)
        full = full.replace(notes=self.notes, block=self.block)
        mask = self.context.mask
        if self.alive is not None:
            alive = self.alive.new_ones(self.batch, full.layout.longest)
            if mask is not None:
                alive[:, self.prefix :] = mask.to(alive.dtype)
            return full.replace(alive=alive)
        return full if mask is None else full.keep_where(mask)

    # Inside ------------------------------------------------------------------------------------

    def _tracked(self) -> Tensor:
        if self.source is None:
            raise RuntimeError("this pass does not track its patches: begin it with track=True")
        return self.source

    def _whole(self) -> Tensor | None:
        """View the tokens as ``[B, N, C]`` if every patch is in its place; else return None."""
        if not self.intact:
            return None
        if self.layout.count is not None:
            return self.tokens()
        if len(set(self.layout.lengths)) > 1:  # tokens were appended to some images only
            return None
        return self.x.view(self.batch, -1, self.x.shape[1])

    def _behind_prefix(self, values: Tensor) -> Tensor:
        """Turn values of the tokens after the prefix ``[B, N]`` into flat ones, 0 at the prefix."""
        return self.layout.flat(F.pad(values, (self.prefix, 0)))

    def _initial_size(self) -> Tensor:
        """Return the sizes before any merge: 1, or 0 for fused tokens if their places are known."""
        size = torch.ones(self.layout.total, device=self.x.device)
        if self.place is None:
            return size
        rect = self.layout.rect(self.is_patch().float())
        front = torch.arange(rect.shape[1], device=rect.device) < self.prefix
        return self.layout.flat(torch.where(front, torch.ones_like(rect), rect))

    def _inverse(self, kept: Selection) -> Tensor:
        """Return each token's new position, -1 = gone: ``[B, longest + 1]``, the last is spare."""
        new = torch.arange(kept.index.shape[1], device=kept.index.device).expand_as(kept.index)
        empty = kept.index.new_full((kept.index.shape[0], self.layout.longest + 1), -1)
        return _close(empty.scatter(1, kept.slots(self.layout.longest), new))

    def _moved(
        self,
        kept: Selection,
        inverse: Tensor | None = None,
        remember: bool = True,
        rows: Tensor | None = None,
    ) -> TokenState:
        """Select tokens of the whole image, with everything that belongs to them.

        ``inverse`` gives the token that each old token's patches go to; None means that they stay
        with their own token. ``remember`` keeps the last values of lost patches in ``canvas``.
        ``rows`` are the rows of ``kept`` if the caller knows them.
        """
        rows = self.layout.rows(kept) if rows is None else rows
        if kept.lengths is None:
            layout = Layout.even(self.layout.batch, kept.index.shape[1])
        else:
            layout = Layout.ragged(kept.lengths)
        changes: dict[str, Any] = {
            "x": self.x.index_select(0, rows),
            "layout": layout,
            "intact": False,
        }
        if self.place is not None:
            changes["place"] = self.place.index_select(0, rows)
        if self.size is not None:
            changes["size"] = self.size.index_select(0, rows)
        if self.alive is not None:
            changes["alive"] = self.alive.gather(1, kept.index)
        if self.extras:
            changes["extras"] = {k: v.index_select(0, rows) for k, v in self.extras.items()}
        if self.parked is not None:
            parked = self.parked
            changes["parked"] = Parked(parked.state, parked.rows.index_select(0, rows))
        if self.source is not None:
            inverse = self._inverse(kept) if inverse is None else _close(inverse)
            slots = torch.where(self.source < 0, self.layout.longest, self.source)
            changes["source"] = source = inverse.gather(1, slots)
            if self.canvas is not None and remember:
                lost = (source < 0) & (slots < self.layout.longest)
                last = self._carried(self.source)
                changes["canvas"] = torch.where(lost[..., None], last, self.canvas)
        return self.replace(**changes)

    def _carried(self, source: Tensor) -> Tensor:
        """Return the value of each patch's token, ``[B, H*W, C]``; arbitrary if it is gone."""
        if self.x.shape[0] == 0:
            return self.x.new_zeros(self.batch, self.patches, self.x.shape[1])
        rows = self.layout.rows(Selection(source.clamp_min(0)))
        if not self.layout.is_even:  # an image without tokens has no row of its own
            rows = rows.clamp_max(self.x.shape[0] - 1)
        return self.x.index_select(0, rows).view(self.batch, self.patches, -1)


_FIELDS = tuple(f.name for f in fields(TokenState))


def _close(inverse: Tensor) -> Tensor:
    """Mark the spare last slot as gone again after writes to it."""
    return torch.cat([inverse[:, :-1], torch.full_like(inverse[:, :1], -1)], 1)
