"""ReducedViT: drives a stock backbone block by block and lets a method act in between.

    images -> embed -> for each block { before, attend, between, feed forward, after } -> head

Nothing of the model is patched, subclassed or copied; its weights are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.core.attention import Seen, attend
from foveate.core.backbone import Backbone
from foveate.core.gates import DECISIONS
from foveate.core.layout import Layout
from foveate.core.reducer import Reducer
from foveate.core.schedule import check_choice
from foveate.core.tokens import TokenState

__all__ = ["MODES", "BlockTrace", "Outcome", "ReducedViT", "Trace", "dense"]

MODES = ("auto", "masked", "gathered", "packed")


@dataclass(eq=False)
class Outcome:
    """What one forward pass gives: logits, final tokens, and what the method left for losses."""

    logits: Tensor
    state: TokenState
    notes: dict[Any, Any]


@dataclass(eq=False)
class BlockTrace:
    """One block's tokens: those it attended over, those it fed forward, those it left."""

    attended: TokenState
    fed: TokenState
    left: TokenState

    def active(self) -> Tensor:
        """Patches that this block's feed forward worked on, ``[B, H*W]`` bool."""
        return _working(self.fed)


@dataclass(eq=False)
class Trace:
    """Everything a picture, a statistic or a test may want to know of one forward pass."""

    logits: Tensor
    grid: tuple[int, int]
    blocks: list[BlockTrace] = field(default_factory=list)
    final: TokenState | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Trace(grid={self.grid}, tokens per block: {self.counts()})"

    def depth(self) -> Tensor:
        """How many blocks worked on each patch, ``[B, H*W]``."""
        return torch.stack([block.active().long() for block in self.blocks]).sum(0)

    def counts(self) -> list[tuple[int, ...]]:
        """Tokens that each block fed forward, one number an image, prefix included."""
        return [block.fed.layout.lengths for block in self.blocks]


class ReducedViT(nn.Module):
    """A vision transformer that runs with few tokens.

    Attributes:
        vit: the model as it was given; the weights are its own.
        reducer: the method, with whatever parameters it adds.
        mode: "auto", "masked", "gathered" or "packed"; "auto" takes masked while a gated method
            trains, gathered when all images have one count, packed otherwise.
        gate: how gates decide: "sample", "argmax", "topk", or None for the method's own way:
            sampling while it trains masked, its deterministic rule otherwise.
    """

    def __init__(self, backbone: Backbone, reducer: Reducer) -> None:
        super().__init__()
        if backbone.needs_every_token:
            raise backbone.undrivable()
        self.vit = backbone.model
        self.reducer = reducer
        self._backbone = backbone
        self._mode = "auto"
        self.train(self.vit.training)

    @property
    def backbone(self) -> Backbone:
        """The parts of ``vit``; read anew where the model has changed since."""
        backbone = self._backbone
        if backbone.model is not self.vit:  # a replica of this module has its own
            backbone = copy.copy(backbone)
            backbone.bind(self.vit)
        elif not torch.compiler.is_compiling() and not backbone.current():
            backbone = self._backbone = type(backbone)(self.vit)  # type: ignore[call-arg]
        return backbone

    # Switches ----------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How the next forward pass runs."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        check_choice("mode", mode, MODES)
        if mode == "masked" and not self.reducer.maskable:
            raise ValueError(f"{self.reducer.name} has no masked mode; use 'gathered' or 'packed'")
        if mode == "gathered" and not self.reducer.fixed_count:
            raise ValueError(
                f"{self.reducer.name} keeps a different count for every image; use 'packed'"
            )
        self._mode = mode

    @property
    def gate(self) -> str | None:
        """How gates decide; None is each method's own way."""
        gates = {getattr(part, "gate", None) for part in self.reducer.members}
        return gates.pop() if len(gates) == 1 else None

    @gate.setter
    def gate(self, how: str | None) -> None:
        if how is not None:
            check_choice("gate", how, DECISIONS)
        gated = [part for part in self.reducer.members if hasattr(part, "gate")]
        if not gated:
            raise ValueError(f"{self.reducer.name} has no gates")
        for part in gated:
            part.gate = how  # type: ignore[assignment]

    def set_progress(self, progress: float) -> None:
        """Tell schedules with a warm-up how much of the training is done, 0 to 1."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress!r}")
        for part in self.reducer.members:
            part.advance(float(progress))

    def resolved_mode(self, masked_input: bool = False) -> str:
        """The mode that the next forward pass will run in."""
        if self._mode != "auto":
            return self._mode
        if self.training and self.reducer.gated:
            if not self.reducer.maskable:
                raise ValueError(
                    f"gates train masked, which not all of {self.reducer!r} can do: train the "
                    "gated method alone, or set a mode yourself"
                )
            return "masked"
        return "gathered" if self.reducer.fixed_count and not masked_input else "packed"

    # Forward -----------------------------------------------------------------------------------

    def forward(self, images: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Logits for ``images [B, 3, H, W]``.

        Args:
            images: preprocessed images of any size that the patch divides.
            keep_mask: patches that take part at all, ``[B, rows, columns]`` or ``[B, patches]``
                bool: padding and regions of no interest stay out from the start.
        """
        return self.run(images, keep_mask).logits

    def run(
        self, images: Tensor, keep_mask: Tensor | None = None, *, track: bool = False
    ) -> Outcome:
        """Logits together with the final tokens and the method's notes."""
        backbone = self.backbone
        state = self._tokens(backbone, images, keep_mask, track)
        return Outcome(backbone.head(state), state, state.notes)

    def forward_features(self, images: Tensor, keep_mask: Tensor | None = None) -> TokenState:
        """Final, normed tokens; ``.restore()`` puts them back on the grid."""
        return self._tokens(self.backbone, images, keep_mask, True)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        keep_mask: Tensor | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        gone: str = "last",
    ) -> list[Tensor]:
        """Features after the named blocks, restored to the grid.

        Args:
            images: preprocessed images.
            indices: the last n blocks if a number, those blocks if a list, all if None.
            keep_mask: as in ``forward``.
            norm: apply the final norm.
            output_fmt: "NCHW" for ``[B, C, H, W]`` or "NLC" for ``[B, H*W, C]``.
            gone: as in ``TokenState.restore``.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        backbone = self.backbone
        wanted = self._indices(indices, backbone.spec.depth)
        found: dict[int, Tensor] = {}
        state, rotary = self._begin(backbone, images, keep_mask, True)
        for block in range(max(wanted) + 1):
            state = self._block(backbone, block, state, rotary)
            if block in wanted:
                grid = state.restore(gone)
                grid = backbone.norm(grid) if norm else grid
                if output_fmt == "NCHW":
                    grid = grid.transpose(1, 2).unflatten(2, state.grid).contiguous()
                found[block] = grid
        return [found[block] for block in wanted]

    @torch.no_grad()
    def trace(self, images: Tensor, keep_mask: Tensor | None = None) -> Trace:
        """Run once and record every block's tokens."""
        backbone = self.backbone
        state, rotary = self._begin(backbone, images, keep_mask, True)
        records: list[BlockTrace] = []
        for block in range(backbone.spec.depth):
            state = self._step(backbone, block, state, rotary, records)
        state = self._end(backbone, state, True)
        return Trace(backbone.head(state), state.grid, records, state, state.notes)

    # Parameters --------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: "new" ones of the method and those of the "backbone"."""
        new = [p for p in self.reducer.parameters() if p.requires_grad]
        return {"new": new, "backbone": [p for p in self.vit.parameters() if p.requires_grad]}

    # Inside ------------------------------------------------------------------------------------

    def _tokens(
        self,
        backbone: Backbone,
        images: Tensor,
        keep_mask: Tensor | None,
        track: bool,
        visit: Callable[[TokenState], None] | None = None,
    ) -> TokenState:
        """Final, normed tokens. ``visit`` is shown the embedded ones and every block's."""
        state, rotary = self._begin(backbone, images, keep_mask, track)
        if visit is not None:
            visit(state)
        for block in range(backbone.spec.depth):
            state = self._block(backbone, block, state, rotary)
            if visit is not None:
                visit(state)
        return self._end(backbone, state, track)

    @staticmethod
    def _indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                raise ValueError(f"indices must be 1..{depth} blocks, got {indices}")
            return list(range(depth - indices, depth))
        wanted = [i + depth if i < 0 else i for i in indices]
        for given, i in zip(indices, wanted, strict=True):
            if not 0 <= i < depth:
                raise ValueError(f"indices must lie in {-depth}..{depth - 1}, got {given}")
        if not wanted:
            raise ValueError("indices must name at least one block")
        return wanted

    def _begin(
        self, backbone: Backbone, images: Tensor, keep_mask: Tensor | None, track: bool
    ) -> tuple[TokenState, Tensor | None]:
        spec, reducer = backbone.spec, self.reducer
        if images.ndim != 4:
            raise ValueError(f"images must be [B, channels, H, W], got {list(images.shape)}")
        if len(images) == 0:
            raise ValueError("the batch is empty: at least one image is needed")
        grid = backbone.grid_of(images)
        mode = self.resolved_mode(keep_mask is not None)
        if mode == "gathered" and keep_mask is not None:
            raise ValueError("with a keep_mask images differ in count: use mode 'packed'")
        embedded = backbone.embed(images)
        state = TokenState.begin(
            embedded.x,
            prefix=spec.prefix,
            grid=grid,
            place=spec.rotary or reducer.needs_place or (reducer.drops and spec.pools_patches),
            track=track or reducer.preserves,
        )
        state.notes["mode"] = mode
        state.notes["training"] = self.training
        mask = None
        if keep_mask is not None:
            mask = self._checked_mask(keep_mask, state, spec.pools_patches)
        if mode == "masked":
            state = self._masked(state, mask)
        elif mode == "packed":
            state = self._packed(state, mask)
        return state, embedded.table

    @staticmethod
    def _checked_mask(keep_mask: Tensor, state: TokenState, pools_patches: bool) -> Tensor:
        rows, columns = state.grid
        legal = {(state.batch, rows, columns), (state.batch, rows * columns)}
        if tuple(keep_mask.shape) not in legal or keep_mask.dtype != torch.bool:
            raise ValueError(
                f"keep_mask must be bool [{state.batch}, {rows}, {columns}] or "
                f"[{state.batch}, {rows * columns}], got {keep_mask.dtype} {list(keep_mask.shape)}"
            )
        mask = keep_mask.flatten(1).to(state.x.device)
        if pools_patches or state.prefix == 0:  # a class token alone can be classified
            empty = (~mask.any(1)).nonzero().flatten().tolist()
            if empty:
                raise ValueError(f"keep_mask leaves no patch in image {empty[0]}")
        return mask

    @staticmethod
    def _masked(state: TokenState, mask: Tensor | None) -> TokenState:
        alive = torch.ones(
            state.batch, state.layout.longest, dtype=torch.float32, device=state.x.device
        )
        if mask is not None:
            state.notes["original"] = tuple(mask.sum(1).tolist())
            alive[:, state.prefix :] = mask.float()
        return state.replace(alive=alive)

    @staticmethod
    def _packed(state: TokenState, mask: Tensor | None) -> TokenState:
        if mask is not None:
            state.notes["original"] = tuple(mask.sum(1).tolist())
            return state.keep_where(mask)
        return state.replace(layout=Layout.ragged(state.layout.lengths))

    def _end(self, backbone: Backbone, state: TokenState, track: bool) -> TokenState:
        """Bring parked tokens back, apply the final norm, and refill the grid if asked to."""
        state = self.reducer.finish(state.recalled())
        canvas = state.canvas
        if canvas is not None and (track or self.reducer.preserves):
            canvas = backbone.norm(canvas)
        state = state.replace(x=backbone.norm(state.x), canvas=canvas)
        if self.reducer.preserves:
            state = state.refill()
        return state

    def _block(
        self, backbone: Backbone, block: int, state: TokenState, rotary: Tensor | None
    ) -> TokenState:
        if backbone.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._step, backbone, block, state, rotary, use_reentrant=False)
        return self._step(backbone, block, state, rotary)

    def _step(
        self,
        backbone: Backbone,
        block: int,
        state: TokenState,
        table: Tensor | None,
        records: list[BlockTrace] | None = None,
    ) -> TokenState:
        attended = self.reducer.before(block, state)
        fed = self._attention(backbone, block, attended, table)
        x = fed.x + _dropped(backbone.drop_path(block, 1), backbone.feedforward(block, fed.x), fed)
        left = self.reducer.after(block, fed.replace(x=x))
        if records is not None:
            records.append(BlockTrace(attended, fed, left))
        return left

    def _attention(
        self, backbone: Backbone, block: int, state: TokenState, table: Tensor | None
    ) -> TokenState:
        """Attention and what a method does after it.

        A function of its own so that queries, keys and values are freed before the feed forward,
        where memory peaks.
        """
        reducer = self.reducer
        heads = backbone.qkv(block, state.x, self._rotary(block, state, table))
        out = attend(heads, state, proportional=reducer.proportional, eps=reducer.softmax_eps)
        x = state.x + _dropped(
            backbone.drop_path(block, 0), backbone.project(block, out, heads), state
        )
        state = state.replace(x=x)
        if not reducer.wants(block):
            return state
        mean = backbone.key_mean(block, heads) if "key_mean" in reducer.needs else None
        seen = Seen(
            heads, state, reducer.needs, backbone.spec.class_token, reducer.proportional, mean
        )
        return reducer.between(block, state, seen)

    @staticmethod
    def _rotary(block: int, state: TokenState, table: Tensor | None) -> Tensor | None:
        """Rotary rows of the tokens that are here now: positions follow their tokens."""
        if table is None:
            return None
        assert state.place is not None
        rows = table[block] if table.ndim == 4 else table
        return rows.index_select(0, state.place)


class _Dense(Reducer):
    """No method at all, so that a keep mask alone decides which patches are computed."""

    name = "dense"
    maskable = True


def dense(backbone: Backbone) -> ReducedViT:
    """Drive a backbone with all tokens: for keep masks, final tokens and traces without a method.

    With a keep mask its mode "packed" computes only the patches that are kept, and "masked" all of
    them, hidden from each other by a key mask.
    """
    reducer = _Dense()
    reducer.build(backbone.spec)
    driver: type[ReducedViT] = backbone.driver or ReducedViT
    return driver(backbone, reducer)


def _dropped(module: nn.Module | None, values: Tensor, state: TokenState) -> Tensor:
    """Stochastic depth: a branch is dropped for whole images, also when tokens are flat."""
    if module is None or not module.training:
        return values
    scale = module(values.new_ones(state.batch, 1))
    return values * state.layout.spread(scale)


def _working(state: TokenState) -> Tensor:
    """Patches carried by a token that takes part, ``[B, H*W]`` bool."""
    assert state.source is not None
    here = state.source >= 0
    alive = state.alive if state.visible is None else state.visible
    if alive is not None:
        here = here & (alive.detach().gather(1, state.source.clamp_min(0)) > 0)
    return here
