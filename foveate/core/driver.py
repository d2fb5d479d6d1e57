"""ReducedViT: drives a stock backbone block by block and lets a method act in between.

    images -> begin -> step(0) -> step(1) -> ... -> end -> head

``begin``, ``step`` and ``end`` are public. Use them to read or to change the tokens between two
blocks; everything here is built on them. Nothing of the model is patched, subclassed or copied; its
weights are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.core.attention import AttentionReader, Heads, attend
from foveate.core.backbone import Backbone, Embedded
from foveate.core.context import MODES, Context
from foveate.core.embedding import embed_images, own_patches
from foveate.core.executed import check_executed
from foveate.core.gates import DECISIONS
from foveate.core.hooks import call_with_hooks, check_sharding, has_hooks
from foveate.core.host import HostedModel
from foveate.core.layout import Layout
from foveate.core.reducer import Reducer
from foveate.core.schedule import check_choice
from foveate.core.tokens import TokenState
from foveate.core.trace import Outcome, Recorder, Trace
from foveate.core.windows import Windows

__all__ = ["ReducedViT", "dense"]

Watch = Callable[[str, TokenState], None]


class ReducedViT(HostedModel):
    """A vision transformer that runs with few tokens.

    Attributes that it does not have itself (``pretrained_cfg``, ``num_classes``, ...) come from the
    model inside. Methods with a name from timm behave as in timm.

    Attributes:
        vit: the given model, whose weights are used.
        reducer: the method, with the parameters that it adds.
        mode: "auto", "masked", "gathered" or "packed"; "auto" means masked while a gated method
            trains, gathered if all images have the same count, and packed otherwise.
        gate: how gates decide: "sample", "argmax" or "topk"; None samples while the method trains
            masked, and otherwise uses its own deterministic rule.
        windows: attention inside windows, for the dense model only; None is global attention.
        by_image: give the model's layers tokens as ``[B, N, C]`` where all images have the same
            count; they get ``[T, C]`` otherwise. A graph in 8 bits may run faster with it.
    """

    windows: Windows | None = None
    by_image: bool = False

    def __init__(self, backbone: Backbone, reducer: Reducer) -> None:
        super().__init__()
        if backbone.needs_every_token:
            raise backbone.undrivable()
        self.vit = backbone.model
        self.reducer = reducer
        self._backbone = backbone
        self._mode = "auto"
        self.training = self.vit.training  # the modules keep their own modes
        self.reducer.train(self.training)

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The parts of ``vit``, read again if the model has changed."""
        backbone = self._backbone
        if backbone.model is not self.vit:  # a replica of this module has its own
            backbone = self._backbone = copy.copy(backbone)
            backbone.bind(self.vit)
        elif not torch.compiler.is_compiling() and not backbone.current():
            backbone = self._backbone = type(backbone)(self.vit)  # type: ignore[call-arg]
        return backbone

    # Switches ----------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """Mode that was set for the next forward pass."""
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
        """How gates decide; None if each method decides its own way or has no gates."""
        ways = {part.gate for part in self._gated}
        return ways.pop() if len(ways) == 1 else None

    @gate.setter
    def gate(self, how: str | None) -> None:
        if how is not None:
            check_choice("gate", how, DECISIONS)
        if not self._gated:
            raise ValueError(f"{self.reducer.name} has no gates")
        for part in self._gated:
            part.gate = how

    @property
    def _gated(self) -> list[Any]:
        return [part for part in self.reducer.members if hasattr(part, "gate")]

    def set_progress(self, progress: float) -> None:
        """Tell schedules with a warm-up how much of the training is done, 0 to 1."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress!r}")
        for part in self.reducer.members:
            part.advance(float(progress))

    def resolved_mode(self, with_mask: bool = False) -> str:
        """Return the mode that the next forward pass will run in."""
        if self._mode != "auto":
            return self._mode
        if self.training and self.reducer.gated:
            if not self.reducer.maskable:
                raise ValueError(
                    f"gates train masked, but not every method in {self.reducer!r} has a masked "
                    "mode: train the gated method alone, or set a mode yourself"
                )
            return "masked"
        return "gathered" if self.reducer.fixed_count and not with_mask else "packed"

    # One step at a time --------------------------------------------------------------------------

    def begin(
        self,
        images: Tensor | Sequence[Tensor],
        keep_mask: Tensor | None = None,
        *,
        track: bool = False,
        prefix: bool = True,
    ) -> TokenState:
        """Embed images and return the tokens that enter the first block.

        Args:
            images: preprocessed images ``[B, channels, H, W]`` of any size that the patch divides;
                or a list of images ``[channels, H, W]`` that may differ in size. Images of a list
                get the positions of their own grids and lie in the top left corner of the batch's
                common grid.
            keep_mask: patches that take part, ``[B, rows, columns]`` or ``[B, patches]`` bool; the
                others (padding, regions of no interest) are left out from the start.
            track: follow every patch through the network, for ``restore`` and ``add``.
            prefix: False leaves out the class token and all other tokens before the patches.
        """
        backbone, reducer = self.backbone, self.reducer
        spec = backbone.spec
        check_sharding(self.vit)
        embedded, grids = embed_images(backbone, images)
        grid, mask, original = embedded.grid, None, None
        front = spec.prefix if prefix else 0
        if front < spec.prefix:
            embedded = Embedded(embedded.x[:, spec.prefix :], grid, embedded.table)
        mode = self.resolved_mode(keep_mask is not None or grids is not None)
        if keep_mask is not None or grids is not None:
            if mode == "gathered":
                what = "images with a keep_mask" if grids is None else "images of different sizes"
                raise ValueError(f"{what} differ in their token count: use mode 'packed'")
            backbone.check_takes_masks()
            if grids is not None:
                mask = own_patches(grids, grid, embedded.x.device)
                original = tuple(rows * columns for rows, columns in grids)
            if keep_mask is not None:
                kept = _checked_mask(keep_mask, embedded.x, grid)
                mask = kept if mask is None else mask & kept
                if spec.pools_patches or not front:  # a class token alone can be classified
                    _check_not_empty(mask)
                original = tuple(mask.sum(1).tolist())
        context = Context(
            prefix=front,
            grid=grid,
            mode=mode,
            training=self.training,
            mask=mask,
            original=original,
            rotary=embedded.table,
            grids=grids if keep_mask is None else None,
        )
        if self.windows is not None:
            self.windows.check(reducer.name, context, masked=keep_mask is not None)
        state = TokenState.begin(
            embedded.x,
            context,
            place=spec.rotary or reducer.needs_place or (reducer.drops and spec.pools_patches),
            track=track or bool(reducer.recall_blocks),
        )
        if mode == "masked":
            alive = state.x.new_ones(state.batch, state.layout.longest, dtype=torch.float32)
            if mask is not None:
                alive[:, front:] = mask.float()
            return state.replace(alive=alive)
        if mode == "packed":
            if mask is not None:
                return state.keep_where(mask)
            return state.replace(layout=Layout.ragged(state.layout.lengths))
        return state

    def step(self, block: int, state: TokenState, watch: Watch | None = None) -> TokenState:
        """Take the tokens through one block, and let the method act in it.

        Blocks must run in order. Between two of them the caller may look at the tokens and give
        them new values (``state.add``, ``state.with_tokens``).

        Args:
            block: number of the block.
            state: tokens that ``begin`` or the previous step returned.
            watch: called with the tokens at "attention", "mlp" and "output".
        """
        backbone = self._backbone  # as ``begin`` read it: looking again in every block costs time
        if block != state.block or not 0 <= block < backbone.spec.depth:
            raise ValueError(_out_of_order(block, state.block, backbone.spec.depth))
        if backbone.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._block, backbone, block, state, watch, use_reentrant=False)
        return self._block(backbone, block, state, watch)

    def end(self, state: TokenState) -> TokenState:
        """Bring back patches that the method recalls before the head, and apply the final norm."""
        backbone = self._backbone
        if state.block != backbone.spec.depth:
            raise ValueError(
                f"end comes after block {backbone.spec.depth - 1}, but for these tokens block "
                f"{state.block} comes next"
            )
        state = self.reducer.finish(state.recalled())
        if backbone.spec.depth in self.reducer.recall_blocks:
            state = state.refill()
        canvas = None if state.canvas is None else backbone.norm(state.canvas)
        return state.replace(x=backbone.norm(state.x), canvas=canvas)

    def _block(
        self, backbone: Backbone, block: int, state: TokenState, watch: Watch | None
    ) -> TokenState:
        reducer = self.reducer
        if block in reducer.recall_blocks:
            state = state.recalled().refill()
        state = reducer.before(block, state)
        if watch is not None:
            watch("attention", state)
        module = backbone.blocks[block]
        if has_hooks(module):
            state = call_with_hooks(
                module, state, lambda inner: self._inside(backbone, block, inner, watch)
            )
        else:
            state = self._inside(backbone, block, state, watch)
        state = reducer.after(block, state)
        if watch is not None:
            watch("output", state)
        return state

    def _inside(
        self, backbone: Backbone, block: int, state: TokenState, watch: Watch | None
    ) -> TokenState:
        state = self._attention(backbone, block, state)
        if watch is not None:
            watch("mlp", state)
        x = self._shaped(state.x, state)
        out = backbone.feedforward(block, x)
        out = _dropped(backbone.drop_path(block, 1), out, state)
        return state.replace(x=_flat(x + out, state), block=block + 1)

    def _attention(self, backbone: Backbone, block: int, state: TokenState) -> TokenState:
        """Attend, and let the method act on the tokens after it.

        This is a function of its own so that queries, keys and values are freed before the feed
        forward, where memory peaks.
        """
        reducer, spec = self.reducer, backbone.spec
        made: list[Heads] = []

        def inside(y: Tensor) -> Tensor:
            heads = backbone.qkv(block, y, _rotary(block, state))
            made.append(heads)
            return backbone.project(block, self._shaped(self.attend(block, heads, state), state), y)

        x = self._shaped(state.x, state)
        y, module = backbone.attention_input(block, x), backbone.attention_of(block)
        if has_hooks(module):
            out = call_with_hooks(
                module,
                state.replace(x=_flat(y, state)),
                lambda given: given.replace(x=_flat(inside(self._shaped(given.x, state)), state)),
                backbone.wrap,
            ).x
            out = self._shaped(out, state)
        else:
            out = inside(y)
        out = _dropped(backbone.drop_path(block, 0), backbone.scale(block, out), state)
        state = state.replace(x=_flat(x + out, state))
        if not reducer.acts_between(block):
            return state
        class_token = spec.class_token and state.prefix > 0
        reader = AttentionReader(made[0], state, reducer.reads, class_token, reducer.proportional)
        return reducer.between(block, state, reader)

    def _shaped(self, x: Tensor, state: TokenState) -> Tensor:
        """Return flat tokens as the model's layers are to get them."""
        return state.layout.rect(x) if self.by_image and state.layout.is_even else x

    def attend(self, block: int, heads: Heads, state: TokenState) -> Tensor:
        """Compute a block's attention output ``[T, H * d]``; subclasses may look at the heads."""
        reducer, windows = self.reducer, self.windows
        if windows is not None and block not in windows.global_blocks:
            return windows.attend(heads, state)
        return attend(
            heads, state, proportional=reducer.proportional, softmax_eps=reducer.softmax_eps
        )

    # All of it -----------------------------------------------------------------------------------

    def forward(self, images: Tensor | Sequence[Tensor], keep_mask: Tensor | None = None) -> Tensor:
        """Return logits for ``images [B, 3, H, W]``; the arguments are those of ``begin``."""
        # Does not call ``run``: with sharded weights, each of the two gathers and releases them.
        return self.backbone.head(self.tokens(images, keep_mask, track=False))

    def run(
        self,
        images: Tensor | Sequence[Tensor],
        keep_mask: Tensor | None = None,
        *,
        track: bool = False,
    ) -> Outcome:
        """Return logits together with the final tokens and the method's notes."""
        state = self.tokens(images, keep_mask, track=track)
        return Outcome(self.backbone.head(state), state)

    def tokens(
        self,
        images: Tensor | Sequence[Tensor],
        keep_mask: Tensor | None = None,
        *,
        track: bool = True,
        visit: Callable[[TokenState], None] | None = None,
    ) -> TokenState:
        """Return the final, normed tokens; ``restore`` puts them back on the grid.

        ``visit`` is called with the embedded tokens and with the tokens after every block.
        """
        state = self.begin(images, keep_mask, track=track)
        if visit is not None:
            visit(state)
        for block in range(self.backbone.spec.depth):
            state = self.step(block, state)
            if visit is not None:
                visit(state)
        return self.end(state)

    @torch.no_grad()
    def trace(self, images: Tensor | Sequence[Tensor], keep_mask: Tensor | None = None) -> Trace:
        """Run once and record every block's tokens."""
        state = self.begin(images, keep_mask, track=True)
        records = Recorder()
        for block in range(self.backbone.spec.depth):
            state = self.step(block, state, records.watch)
        final = self.end(state)
        return Trace(self.backbone.head(final), final.grid, records.blocks, final)

    def check_in_effect(
        self, images: Tensor | Sequence[Tensor], keep_mask: Tensor | None = None
    ) -> list[tuple[int, ...]]:
        """Run and prove that every block computes the tokens that the method decided, no more.

        The tokens are counted in the matrix products that torch runs. Raise RuntimeError if a block
        computes more or fewer, or in masked mode, which computes all tokens.

        Returns:
            Tokens in each block, one number per image, as ``Trace.counts`` gives them.
        """
        if self.resolved_mode(keep_mask is not None) == "masked":
            raise RuntimeError(
                f"{self.reducer.name} is not in effect in masked mode, which computes all tokens "
                "so that decisions can be trained: call eval(), or set mode"
            )
        where = next(self.parameters()).device
        # Gates that sample draw the same noise in both runs.
        with torch.random.fork_rng([where] if where.type == "cuda" else []):
            trace = self.trace(images, keep_mask)
        wanted = [sum(counts) for counts in trace.counts()]
        check_executed(self.backbone, lambda: self.run(images, keep_mask), wanted)
        return trace.counts()

    # Parameters --------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return trainable parameters: "new" ones of the method and those of the "backbone"."""
        new = [p for p in self.reducer.parameters() if p.requires_grad]
        return {"new": new, "backbone": [p for p in self.vit.parameters() if p.requires_grad]}


class _Dense(Reducer):
    """Changes nothing, so that only a keep mask decides which patches are computed."""

    name = "dense"
    maskable = True


def dense(backbone: Backbone, windows: Windows | None = None) -> ReducedViT:
    """Drive a backbone with all tokens, for keep masks, final tokens and traces without a method.

    With a keep mask, mode "packed" computes only the patches that are kept. Mode "masked" computes
    all patches, and a key mask hides those that are not kept.

    Args:
        backbone: the parts of the model.
        windows: keep attention inside windows in most blocks.
    """
    reducer = _Dense()
    reducer.build(backbone.spec)
    driver: type[ReducedViT] = backbone.driver or ReducedViT
    model = driver(backbone, reducer)
    if windows is not None:
        windows.build(backbone.spec.depth)
    model.windows = windows
    return model


def _checked_mask(keep_mask: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, (rows, columns) = x.shape[0], grid
    legal = {(batch, rows, columns), (batch, rows * columns)}
    if tuple(keep_mask.shape) not in legal or keep_mask.dtype != torch.bool:
        raise ValueError(
            f"keep_mask must be bool [{batch}, {rows}, {columns}] or "
            f"[{batch}, {rows * columns}], got {keep_mask.dtype} {list(keep_mask.shape)}"
        )
    return keep_mask.flatten(1).to(x.device)


def _check_not_empty(mask: Tensor) -> None:
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"keep_mask leaves no patch in image {empty[0]}")


def _out_of_order(block: int, following: int, depth: int) -> str:
    if following == depth:
        return f"step({block}): all {depth} blocks are done; end comes next"
    return f"step({block}) is out of order: block {following} of 0..{depth - 1} comes next"


def _rotary(block: int, state: TokenState) -> Tensor | None:
    """Return the rotary rows of the tokens that are left: positions follow their tokens."""
    table = state.context.rotary
    if table is None:
        return None
    assert state.place is not None
    table, rows = table[block] if table.ndim == 4 else table, state.place
    if table.shape[0] > state.patches + 1:  # one table per image, because grids differ
        rows = rows + state.layout.image(rows.device) * (state.patches + 1)
    return table.index_select(0, rows)


def _flat(x: Tensor, state: TokenState) -> Tensor:
    return state.layout.flat(x) if x.ndim > 2 else x


def _dropped(module: nn.Module | None, values: Tensor, state: TokenState) -> Tensor:
    """Apply stochastic depth, which drops a branch for whole images."""
    if module is None or not module.training:
        return values
    scale = module(values.new_ones(state.batch, 1))
    if values.ndim > 2:
        return values * scale[..., None]
    return values * state.layout.spread(scale)
