"""TokenState: the tokens of a batch on their way through the network.

Every change of the token set is one verb here, so where each patch went (``source``), how many
patches a token stands for (``size``), what was last known of it (``canvas``) and everything that
travels with a token (``place``, ``extras``) stay right in one place. Methods decide; the verbs
move. A verb returns a new state and never changes the old one.

Positions that methods hand to the verbs (``idx_keep``, ``into`` ...) count the tokens of an image
*after* its prefix tokens: 0 is the first patch token. Prefix tokens always stay in front.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from foveate.core.layout import Layout

__all__ = ["TokenState"]


@dataclass(eq=False)
class TokenState:
    """All tokens of a batch between two steps of the network.

    Attributes:
        x: token values, ``[T, C]``, image after image.
        layout: how the rows of ``x`` divide into images.
        prefix: class, distillation and register tokens in front of each image.
        grid: rows and columns of the patch grid.
        place: patch index whose position each token has, ``[T]``; ``H*W`` for tokens without a
            place (prefix, fused, package, representative). None while nobody needs it.
        source: for each patch the token that carries it, counted within its image including the
            prefix, ``[B, H*W]``; -1 when the patch is gone. None unless tracked.
        size: patches each token stands for, ``[T]`` float32. None until something merged.
        alive: 1 = takes part, ``[B, N]`` float with gradient. Masked mode only.
        visible: keys that attention may see, ``[B, N]`` bool, without gradient.
        canvas: last value of every patch, ``[B, H*W, C]``. None unless tracked.
        extras: further values that follow their tokens, each ``[T, ...]``.
        outer: the state in which tokens were parked, and ``home`` the row each token has there.
        notes: what a forward pass leaves behind for losses and traces; keys name the method.
    """

    x: Tensor
    layout: Layout
    prefix: int
    grid: tuple[int, int]
    place: Tensor | None = None
    source: Tensor | None = None
    size: Tensor | None = None
    alive: Tensor | None = None
    visible: Tensor | None = None
    canvas: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    outer: TokenState | None = None
    home: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    # Making and reading ----------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        x: Tensor,
        *,
        prefix: int,
        grid: tuple[int, int],
        place: bool = False,
        track: bool = False,
    ) -> TokenState:
        """Start from embedded images ``x [B, N, C]``: prefix tokens, then the grid's patches."""
        batch, count, width = x.shape
        patches = grid[0] * grid[1]
        state = cls(x.reshape(batch * count, width), Layout.even(batch, count), prefix, grid)
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
        # Not ``vars(self)``: the compiler of the oldest torch does not follow it.
        return TokenState(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

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
    def patches(self) -> int:
        """Number of cells of the patch grid."""
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens after the prefix, one number an image."""
        return tuple(n - self.prefix for n in self.layout.lengths)

    @property
    def tracked(self) -> bool:
        """Whether source and canvas are kept."""
        return self.source is not None

    def tokens(self) -> Tensor:
        """The tokens as ``[B, N, C]``; zero-padded when the layout is ragged."""
        return self.layout.rect(self.x)

    def prefix_tokens(self) -> Tensor:
        """The prefix tokens ``[B, prefix, C]``."""
        if self.layout.is_even:
            return self.tokens()[:, : self.prefix]
        rows = self.layout.start(self.x.device)[:, None]
        rows = rows + torch.arange(self.prefix, device=self.x.device)
        return self.x.index_select(0, rows.flatten()).view(self.batch, self.prefix, self.x.shape[1])

    def mean(self, values: Tensor) -> Tensor:
        """Mean of flat values ``[T, ...]`` over each image's live tokens after the prefix."""
        if self.layout.is_even and self.alive is None:
            return self.after_prefix(values).mean(1)
        weight = self.layout.valid(values.device) if self.alive is None else self.alive
        assert weight is not None
        front = torch.arange(weight.shape[1], device=values.device) >= self.prefix
        flat = self.layout.flat((weight * front).to(values.dtype))
        total = self.layout.sum(flat).clamp_min(1e-6)
        per_token = (-1, *[1] * (values.ndim - 1))
        return self.layout.sum(values * flat.view(per_token)) / total.view(per_token)

    def after_prefix(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Lay flat values ``[T, ...]`` out as ``[B, longest - prefix, ...]``."""
        return self.layout.rect(values, fill)[:, self.prefix :]

    def present(self) -> Tensor | None:
        """Cells after the prefix that hold a live token, ``[B, longest - prefix]``; None = all."""
        valid = self.layout.valid(self.x.device)
        if self.alive is not None:
            live = self.alive.detach() > 0
            valid = live if valid is None else valid & live
        return None if valid is None else valid[:, self.prefix :]

    def placed(self) -> Tensor:
        """Tokens that stand for a patch of the grid, ``[T]``: no prefix, no fused ones."""
        if self.place is None:
            raise RuntimeError("this pass does not carry token places; ask with needs_place")
        return self.place < self.patches

    def sizes(self) -> Tensor:
        """Patches each token stands for, ``[T]`` float32; 0 for prefix and fused tokens."""
        if self.source is None:
            raise RuntimeError("sizes are read off the source map; run with tracking")
        longest = self.layout.longest
        slots = torch.where(self.source < 0, longest, self.source)
        counted = slots.new_zeros(self.batch, longest + 1)
        counted = counted.scatter_add(1, slots, torch.ones_like(slots))[:, :longest]
        return self.layout.flat(counted).float()

    # Verbs -------------------------------------------------------------------------------------

    def keep(self, idx: Tensor, valid: Tensor | None = None) -> TokenState:
        """Keep the tokens ``idx [B, K]`` after the prefix, in that order; drop the others."""
        return self._moved(*self._with_prefix(idx, valid))

    def keep_where(self, mask: Tensor) -> TokenState:
        """Keep the tokens marked in ``mask [B, longest - prefix]``; images may differ."""
        idx, valid = _true_positions(self._present_only(mask))
        return self.keep(idx, valid)

    def merge(
        self,
        idx_keep: Tensor,
        idx_src: Tensor,
        into: Tensor,
        weight: Tensor,
        *,
        valid_keep: Tensor | None = None,
        valid_src: Tensor | None = None,
        track_size: bool = True,
    ) -> TokenState:
        """Average the tokens ``idx_src [B, R]`` into kept ones, weighted.

        Args:
            idx_keep: tokens that stay, ``[B, K]``, in their new order.
            idx_src: tokens that are merged, ``[B, R]``.
            into: for each of them the position in ``idx_keep`` that takes it up, ``[B, R]``.
            weight: weight of every token after the prefix, ``[B, N]`` float32.
            valid_keep: which entries of ``idx_keep`` count.
            valid_src: which entries of ``idx_src`` count.
            track_size: count merged patches in ``size`` from here on.
        """
        prefix, old_layout = self.prefix, self.layout
        target_old = idx_keep.gather(1, into)  # the target's position before the merge
        weight_src = weight.gather(1, idx_src)
        if valid_src is not None:
            weight_src = weight_src * valid_src
        weight_keep = weight.gather(1, idx_keep)
        total = weight_keep.scatter_add(1, into, weight_src)  # [B, K]
        share = weight_src / total.gather(1, into).clamp_min(torch.finfo(total.dtype).tiny)

        idx_full, valid_full = self._with_prefix(idx_keep, valid_keep)
        inverse = None
        if self.source is not None:
            slots = idx_src + prefix
            if valid_src is not None:
                slots = torch.where(valid_src, slots, old_layout.longest)
            inverse = self._inverse(idx_full, valid_full).scatter(1, slots, into + prefix)
        state = self._moved(idx_full, valid_full, inverse)

        rows_src = old_layout.rows(idx_src + prefix, valid_src)
        rows_dst = old_layout.rows(target_old + prefix, valid_src)
        rows_new = state.layout.rows(into + prefix, valid_src)
        share = share.flatten() if valid_src is None else share[valid_src]
        change = self.x.index_select(0, rows_src) - self.x.index_select(0, rows_dst)
        change = change * share.to(change.dtype)[:, None]
        size = None
        if track_size or self.size is not None:
            before = self.size
            if before is None:
                before = self._first_sizes()
            size = before.index_select(0, old_layout.rows(idx_full, valid_full))
            size = size.index_add(0, rows_new, before.index_select(0, rows_src))
        return state.replace(x=state.x.index_add(0, rows_new, change), size=size)

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

        def none_of(values: Tensor, fill: float = 0) -> Tensor:
            return values.new_full((batch, *values.shape[1:]), fill)

        token = token.to(self.x.dtype)  # products under autocast come in half precision
        changes: dict[str, Any] = {"x": put(self.x, token), "layout": layout}
        if self.place is not None:
            changes["place"] = put(self.place, none_of(self.place, self.patches))
        if self.size is not None:
            changes["size"] = put(self.size, none_of(self.size))
        if self.home is not None:
            changes["home"] = put(self.home, none_of(self.home, -1))
        if self.alive is not None:
            new = torch.ones_like(self.alive[:, 0]) if alive is None else alive
            changes["alive"] = torch.cat([self.alive, new.to(self.alive)[:, None]], 1)
        changes["extras"] = {k: put(v, none_of(v)) for k, v in self.extras.items()}
        return self.replace(**changes)

    def fuse(
        self, idx: Tensor, weight: Tensor, valid: Tensor | None = None, exists: Tensor | None = None
    ) -> TokenState:
        """Keep ``idx`` and append the weighted sum of everything else as one token.

        ``weight [B, N]`` weighs every token after the prefix; those that stay do not enter.
        ``exists [B]`` says which images have anything to fuse; None means all of them.
        """
        left = zero_at(weight, idx, valid).to(self.x.dtype)
        fused = (left[:, None, :] @ self.after_prefix(self.x)).squeeze(1)
        return self.keep(idx, valid).append(fused, exists)

    def park(
        self, idx: Tensor, valid: Tensor | None = None, *, with_prefix: bool = True
    ) -> TokenState:
        """Set everything but the tokens ``idx [B, K]`` aside, unchanged, until ``recall``.

        Without ``with_prefix``, positions count the whole image and a prefix token that is not
        listed is parked too.
        """
        if with_prefix:
            idx, valid = self._with_prefix(idx, valid)
        if self.outer is not None:
            raise RuntimeError("tokens are parked already; recall them first")
        inner = self._moved(idx, valid, remember=False)
        return inner.replace(outer=self, home=self.layout.rows(idx, valid))

    def park_but(self, mask: Tensor) -> TokenState:
        """Park everything but the tokens marked in ``mask [B, longest]``, prefix included."""
        present = self.layout.valid(self.x.device)
        idx, valid = _true_positions(mask if present is None else mask & present)
        return self.park(idx, valid, with_prefix=False)

    def recall(self, change: Tensor | None = None) -> TokenState:
        """Bring parked tokens back to where they stood; processed ones take their new values.

        ``change [B, C]`` is added to the parked tokens of each image.
        """
        if self.outer is None or self.home is None:
            raise RuntimeError("no tokens are parked")
        outer, home = self.outer, self.home
        base = outer.x if change is None else outer.x + outer.layout.spread(change)
        x = base.index_copy(0, home, self.x)
        extras = dict(outer.extras)
        for name, values in self.extras.items():
            if name in extras:
                extras[name] = extras[name].index_copy(0, home, values)
        return outer.replace(x=x, extras=extras, notes=self.notes)

    def discard(self, mask: Tensor | None = None) -> TokenState:
        """Take the last token of each image (or of those in ``mask [B]``) away again."""
        if self.layout.is_even and mask is None:
            assert self.layout.count is not None
            idx = torch.arange(self.layout.count - 1, device=self.x.device)
            idx, valid = idx.expand(self.batch, -1), None
        else:
            last = torch.tensor(self.layout.lengths, device=self.x.device) - 1
            gone = last if mask is None else torch.where(mask, last, -1)
            cell = torch.arange(self.layout.longest, device=self.x.device)
            stays = cell[None] != gone[:, None]
            present = self.layout.valid(self.x.device)
            idx, valid = _true_positions(stays if present is None else stays & present)
        return self._moved(idx, valid)

    def mask_out(self, alive: Tensor) -> TokenState:
        """Masked mode: let ``alive [B, N - prefix]`` decide which live tokens stay alive."""
        if self.alive is None:
            raise RuntimeError("only the masked mode switches tokens off without removing them")
        now = torch.cat([self.alive[:, : self.prefix], self.alive[:, self.prefix :] * alive], 1)
        canvas = self.canvas
        if canvas is not None and self.source is not None:
            died = (self.alive.detach() > 0) & (now.detach() <= 0)
            lost = died.gather(1, self.source.clamp_min(0)) & (self.source >= 0)
            canvas = torch.where(lost[..., None], self._carried(self.source), canvas)
        return self.replace(alive=now, canvas=canvas)

    # Back to the grid --------------------------------------------------------------------------

    def recalled(self) -> TokenState:
        """The same state with nothing parked, for looking at a pass from outside."""
        state = self
        while state.outer is not None and state.home is not None:
            guests = state.layout.rect(state.home, -1) < 0
            if bool((state.home < 0).any()):  # appended tokens have no home to go back to
                idx, valid = _true_positions(~guests)
                state = state._moved(idx, valid, remember=False)
            state = state.recall()
        return state

    def restore(self, gone: str = "last") -> Tensor:
        """Values on the full grid, ``[B, H*W, C]``.

        A merged patch gets its merged token. A patch whose token is gone (dropped, or fused into
        one un-normalised sum) gets the last value it had (``gone="last"``) or zeros ("zero").
        """
        if gone not in ("last", "zero"):
            raise ValueError(f"gone must be 'last' or 'zero', not {gone!r}")
        if self.outer is not None:
            return self.recalled().restore(gone)
        if self.source is None or self.canvas is None:
            raise RuntimeError("this pass was not tracked: use forward_features() or trace()")
        source, here = self.source, self.source >= 0
        if self.alive is not None:
            here = here & (self.alive.detach().gather(1, source.clamp_min(0)) > 0)
        value = self._carried(source)
        other = self.canvas if gone == "last" else torch.zeros_like(self.canvas)
        return torch.where(here[..., None], value, other)

    def refill(self) -> TokenState:
        """Bring every patch back at its last value: prefix, then the whole grid in order."""
        grid_tokens = self.restore("last")
        x = torch.cat([self.prefix_tokens(), grid_tokens], 1)
        fresh = TokenState.begin(
            x, prefix=self.prefix, grid=self.grid, place=self.place is not None, track=True
        )
        return fresh.replace(notes=self.notes)

    # Inside ------------------------------------------------------------------------------------

    def _present_only(self, mask: Tensor) -> Tensor:
        present = self.layout.valid(self.x.device)
        return mask if present is None else mask & present[:, self.prefix :]

    def _first_sizes(self) -> Tensor:
        """Sizes before anything merged: 1, and 0 for fused tokens where they can be told."""
        size = torch.ones(self.layout.total, device=self.x.device)
        if self.place is None:
            return size
        rect = self.layout.rect(self.placed().float())
        front = torch.arange(rect.shape[1], device=rect.device) < self.prefix
        return self.layout.flat(torch.where(front, torch.ones_like(rect), rect))

    def _with_prefix(self, idx: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.prefix == 0:
            return idx, valid
        front = torch.arange(self.prefix, device=idx.device).expand(idx.shape[0], -1)
        if valid is not None:
            valid = torch.cat([torch.ones_like(front, dtype=torch.bool), valid], 1)
        return torch.cat([front, idx + self.prefix], 1), valid

    def _inverse(self, idx: Tensor, valid: Tensor | None) -> Tensor:
        """New position of each old one, ``[B, longest + 1]``, -1 = gone; the last slot is spare."""
        new = torch.arange(idx.shape[1], device=idx.device).expand_as(idx)
        empty = idx.new_full((idx.shape[0], self.layout.longest + 1), -1)
        slots = idx if valid is None else torch.where(valid, idx, self.layout.longest)
        return _close(empty.scatter(1, slots, new))

    def _moved(
        self,
        idx: Tensor,
        valid: Tensor | None,
        inverse: Tensor | None = None,
        remember: bool = True,
    ) -> TokenState:
        """Select the tokens ``idx [B, K]`` and carry everything that belongs to them along.

        ``inverse`` says where every old token's patches go, if not simply along with it.
        """
        rows = self.layout.rows(idx, valid)
        if valid is None:
            layout = Layout.even(self.batch, idx.shape[1])
        else:
            layout = Layout.ragged(valid.sum(1).tolist())

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, rows)

        source, canvas = self.source, self.canvas
        if source is not None:
            inverse = self._inverse(idx, valid) if inverse is None else _close(inverse)
            slots = torch.where(source < 0, self.layout.longest, source)
            source = inverse.gather(1, slots)
            if canvas is not None and remember:
                lost = (source < 0) & (slots < self.layout.longest)
                canvas = torch.where(lost[..., None], self._carried(self.source), canvas)
        return self.replace(
            x=self.x.index_select(0, rows),
            layout=layout,
            place=take(self.place),
            size=take(self.size),
            home=take(self.home),
            alive=None if self.alive is None else self.alive.gather(1, idx),
            source=source,
            canvas=canvas,
            extras={k: v.index_select(0, rows) for k, v in self.extras.items()},
        )

    def _carried(self, source: Tensor | None) -> Tensor:
        """Value of the token that carries each patch, ``[B, H*W, C]``; arbitrary where gone."""
        assert source is not None
        if self.x.shape[0] == 0:
            return self.x.new_zeros(self.batch, self.patches, self.x.shape[1])
        rows = self.layout.rows(source.clamp_min(0)).clamp_max(self.x.shape[0] - 1)
        return self.x.index_select(0, rows).view(self.batch, self.patches, -1)


def _close(inverse: Tensor) -> Tensor:
    """Mark the spare last slot as gone again after writes to it."""
    return torch.cat([inverse[:, :-1], torch.full_like(inverse[:, :1], -1)], 1)


def zero_at(weight: Tensor, idx: Tensor, valid: Tensor | None) -> Tensor:
    """``weight [B, N]`` with the entries ``idx [B, K]`` set to zero."""
    if valid is None:
        return weight.scatter(1, idx, 0.0)
    spare = weight.shape[1]  # one more cell takes the entries that do not count
    padded = torch.cat([weight, weight.new_zeros(weight.shape[0], 1)], 1)
    return padded.scatter(1, torch.where(valid, idx, spare), 0.0)[:, :-1]


def _true_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the true cells of ``mask [B, N]`` in order, padded, with what counts."""
    counts = mask.sum(1)
    order = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(counts.max())]
    return order, torch.arange(order.shape[1], device=mask.device) < counts[:, None]
