"""Attention for every family and every mode, and what methods may read from it.

Attention stays fused: a backbone hands over q, k and v, and one of four paths runs.

* plain: ``scaled_dot_product_attention``;
* weighted: the same with ``log(size)`` as an additive mask (proportional attention), or with a
  mask that hides dead keys;
* soft: the differentiable softmax with a self-loop that trains token gates;
* packed: images of different lengths in a few buckets, or one variable-length kernel on CUDA.

Papers read scores off the N x N map but need only one row of it, so only that row is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.tokens import TokenState
from foveate.ops import unit

__all__ = ["AttentionReader", "Heads", "attend"]

_BUCKETS = 4  # the number hardly matters between 2 and 8; more buckets pad less
_QUERY_CHUNK = 64  # queries at a time where the whole map is read
_CAP = 30.0  # soft attention caps logits at this much above the highest visible one
_CAPPED = math.exp(_CAP) * (1 - 1e-6)  # exponentials from here on were capped
# Soft attention holds several float32 maps of N x N for the backward pass. Above ``_SOFT_WHOLE``
# tokens it works in chunks of queries and computes each chunk's maps again in the backward pass.
_SOFT_WHOLE = 1024
_SOFT_CHUNK = 256


@dataclass(eq=False)
class Heads:
    """Queries, keys and values of one block's attention, as a backbone hands them over.

    Attributes:
        q, k, v: ``[T, H, d]`` each.
        scale: factor on the dot products.
        dropout: probability of dropping an attention weight (0 in evaluation).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dropout: float = 0.0


def attend(
    heads: Heads, state: TokenState, *, proportional: bool = False, softmax_eps: float | None = None
) -> Tensor:
    """Compute the attention output ``[T, H * d]``.

    Args:
        heads: q, k, v of the block.
        state: the tokens; its layout and its alive and size fields choose the path.
        proportional: add ``log(size)`` to the logits.
        softmax_eps: in the masked mode, smoothing of the soft softmax, through which gates get
            their gradient; None hides dead keys instead, without a gradient.
    """
    bias = None
    if proportional and state.size is not None:
        bias = state.merge_weight().log()  # a fused token of size 0 still counts as one key
    if not state.layout.is_even:
        return _packed(heads, state.layout, bias).flatten(1)
    if state.alive is not None and softmax_eps is not None:
        return _soft(heads, state.alive, state.layout, bias, softmax_eps)
    mask = None if bias is None else state.layout.rect(bias)[:, None, None, :]
    if state.alive is not None:
        mask = _hidden(mask, state.alive.detach() > 0)
    return _fused(heads, state.layout, mask)


def _hidden(bias: Tensor | None, live: Tensor) -> Tensor:
    """Hide dead keys ``[B, N]`` on top of an additive mask."""
    # An image without a live key shows all keys: its softmax would be NaN, and nobody reads it.
    live = (live | ~live.any(1, keepdim=True))[:, None, None, :]
    return live if bias is None else bias.masked_fill(~live, float("-inf"))


def _by_image(heads: Heads, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """View queries, keys and values ``[T, H, d]`` as ``[B, H, N, d]``."""
    shape = (layout.batch, layout.count or 0, *heads.v.shape[1:])
    return (
        heads.q.view(shape).transpose(1, 2),
        heads.k.view(shape).transpose(1, 2),
        heads.v.view(shape).transpose(1, 2),
    )


def _by_token(out: Tensor, heads: Heads) -> Tensor:
    """Lay an output ``[B, H, N, d]`` out as ``[T, H * d]``."""
    tokens, number, dim = heads.v.shape
    return out.transpose(1, 2).reshape(tokens, number * dim)


def _fused(heads: Heads, layout: Layout, mask: Tensor | None) -> Tensor:
    q, k, v = _by_image(heads, layout)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=heads.dropout, scale=heads.scale
    )
    return _by_token(out, heads)


def _soft(heads: Heads, alive: Tensor, layout: Layout, bias: Tensor | None, eps: float) -> Tensor:
    """Compute the softmax over live keys, where every query also sees itself.

    The weights are ``exp(a_ij) G_ij``, with ``G_ij = alive_j`` off the diagonal and 1 on it, so
    the gradient of a kept or dropped key flows through the normaliser. An additive log-mask
    would give dropped tokens no gradient at all.
    """
    q, k, v = _by_image(heads, layout)
    count = q.shape[2]
    keys = None if bias is None else layout.rect(bias)[:, None, None, :]

    def rows(queries: Tensor, k: Tensor, v: Tensor, alive: Tensor, first: int) -> Tensor:
        logits = (queries * heads.scale @ k.transpose(-2, -1)).float()
        if keys is not None:
            logits = logits + keys
        own = torch.arange(first, first + queries.shape[2], device=logits.device)
        self_loop = (own[:, None] == torch.arange(count, device=logits.device)).float()
        gate = alive.float()[:, None, :]
        gate = (gate + (1 - gate) * self_loop)[:, None]  # [B, 1, queries, N]
        visible = logits.detach().masked_fill(gate.detach() <= 0, float("-inf"))
        # Dropped keys may hold the largest logit; capping keeps their exp finite where it is only
        # needed for the gradient.
        shifted = (logits - visible.amax(-1, keepdim=True)).clamp_max(_CAP)
        weight = shifted.exp() * gate
        attention = (weight + eps / count) / (weight.sum(-1, keepdim=True) + eps)
        if heads.dropout:
            attention = F.dropout(attention, heads.dropout)
        return attention.to(v.dtype) @ v

    if count <= _SOFT_WHOLE or heads.dropout:  # no ViT drops attention weights at such sizes
        out = rows(q, k, v, alive, 0)
    else:
        out = _SoftInChunks.apply(q, k, v, alive.float(), keys, heads.scale, eps)
    return _by_token(out, heads)


class _SoftInChunks(torch.autograd.Function):
    """Computes soft attention for many tokens in chunks of queries, with its gradient by hand.

    All chunks use the same buffers for their maps. Autograd would hold about ten maps, and new maps
    in every chunk would leave gaps that a CPU's allocator never closes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alive: Tensor,
        keys: Tensor | None,
        scale: float,
        eps: float,
    ) -> Tensor:
        """Compute ``softmax(q k) v`` for ``[B, H, N, d]``; ``keys`` is added to the logits."""
        maps = _Maps(q, k, alive, keys, scale)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        norms = alive.new_empty(*q.shape[:3], 1)
        for part in maps.chunks:
            weight, gate = maps.exponentials(part)
            weight.mul_(gate)
            norms[:, :, part] = weight.sum(-1, keepdim=True) + eps
            weight.add_(eps / q.shape[2]).div_(norms[:, :, part])
            out[:, :, part] = weight.to(v.dtype) @ v
        ctx.save_for_backward(q, k, v, alive, keys, out, norms)
        ctx.scale, ctx.eps = scale, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of queries, keys, values and gates."""
        q, k, v, alive, keys, out, norms = ctx.saved_tensors
        maps = _Maps(q, k, alive, keys, ctx.scale)
        q_grad = torch.empty_like(q)
        k_grad, v_grad = torch.zeros_like(k), torch.zeros_like(v)
        alive_grad = torch.zeros_like(alive)
        change = torch.empty_like(maps.first)
        values = v.float().transpose(2, 3)
        for part in maps.chunks:
            weight, gate = maps.exponentials(part)
            back, norm = grad[:, :, part].float(), norms[:, :, part]
            of_weight = _view(change, weight.shape)
            torch.matmul(back, values, out=of_weight)
            of_weight.sub_((back * out[:, :, part].float()).sum(-1, keepdim=True)).div_(norm)
            # Gates are shared by heads; on the diagonal they do not act.
            of_gate = torch.mul(of_weight, weight, out=_view(maps.second, weight.shape)).sum(1)
            of_gate.diagonal(part.start, 1, 2).zero_()
            alive_grad += of_gate.sum(1)
            of_weight.masked_fill_(weight >= _CAPPED, 0.0)
            weight.mul_(gate)
            of_logit = of_weight.mul_(weight).mul_(ctx.scale).to(q.dtype)
            q_grad[:, :, part] = of_logit @ k
            k_grad += of_logit.transpose(2, 3) @ q[:, :, part]
            weight.add_(ctx.eps / q.shape[2]).div_(norm)
            v_grad += weight.to(v.dtype).transpose(2, 3) @ grad[:, :, part]
        return q_grad, k_grad, v_grad, alive_grad, None, None, None


class _Maps:
    """Computes exponentials of logits, chunk by chunk of queries, in buffers that chunks share."""

    def __init__(
        self, q: Tensor, k: Tensor, alive: Tensor, keys: Tensor | None, scale: float
    ) -> None:
        self.q, self.k, self.alive, self.keys, self.scale = q, k.transpose(2, 3), alive, keys, scale
        count = q.shape[2]
        self.chunks = [
            slice(first, min(first + _SOFT_CHUNK, count)) for first in range(0, count, _SOFT_CHUNK)
        ]
        shape = (*q.shape[:2], min(_SOFT_CHUNK, count), count)
        self.first = torch.empty(shape, dtype=torch.float32, device=q.device)
        self.second = torch.empty_like(self.first)

    def exponentials(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return ``exp`` of the logits minus the highest visible one, and the factors on it.

        They are ``[B, H, queries, N]`` and ``[B, 1, queries, N]``; every query sees itself.
        """
        queries = self.q[:, :, part] * self.scale
        gate = self.alive[:, None, :].repeat(1, queries.shape[2], 1)
        gate.diagonal(part.start, 1, 2).fill_(1.0)
        gate = gate[:, None]
        logits = _view(self.first, (*queries.shape[:3], self.q.shape[2]))
        if queries.dtype == torch.float32:
            torch.matmul(queries, self.k, out=logits)
        else:
            logits.copy_(queries @ self.k)
        if self.keys is not None:
            logits.add_(self.keys)
        seen = _view(self.second, logits.shape).copy_(logits)
        highest = seen.masked_fill_(gate <= 0, float("-inf")).amax(-1, keepdim=True)
        return logits.sub_(highest).clamp_max_(_CAP).exp_(), gate


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View the front of a buffer, so that a short last chunk is contiguous too."""
    return buffer.flatten()[: math.prod(shape)].view(shape)


def _packed(heads: Heads, layout: Layout, bias: Tensor | None) -> Tensor:
    if layout.total == 0:
        return heads.v
    half = heads.q.dtype in (torch.float16, torch.bfloat16)
    if heads.q.is_cuda and half and bias is None and not heads.dropout:
        varlen = _varlen_kernel()
        if varlen is not None:
            return varlen(heads, layout)
    out = torch.empty_like(heads.v, memory_format=torch.contiguous_format)
    pieces, rows = [], []
    for images in _buckets(layout.lengths):
        value, row = _bucket(heads, layout, bias, images)
        pieces.append(value)
        rows.append(row)
    return out.index_copy(0, torch.cat(rows), torch.cat(pieces))


def _buckets(lengths: Iterable[int]) -> list[list[int]]:
    """Group images of similar length into a few groups; leave out images without tokens."""
    order = sorted((n, b) for b, n in enumerate(lengths) if n > 0)
    step = max(1, -(-len(order) // _BUCKETS))
    return [[b for _, b in order[i : i + step]] for i in range(0, len(order), step)]


def _bucket(
    heads: Heads, layout: Layout, bias: Tensor | None, images: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute the attention of a few images; return rows of the output and where they belong."""
    device = heads.q.device
    lens = [layout.lengths[b] for b in images]
    longest = max(lens)
    start = layout.start(device)[torch.tensor(images, device=device)]
    rows = start[:, None] + torch.arange(longest, device=device)
    equal = min(lens) == longest
    real = torch.arange(longest, device=device) < torch.tensor(lens, device=device)[:, None]
    rows = rows.clamp_max(layout.total - 1)
    q, k, v = (
        t.index_select(0, rows.flatten()).view(len(images), longest, *t.shape[1:]).transpose(1, 2)
        for t in (heads.q, heads.k, heads.v)
    )
    mask: Tensor | None = None
    if bias is not None:
        mask = bias.index_select(0, rows.flatten()).view(len(images), longest)
        mask = mask.masked_fill(~real, float("-inf"))[:, None, None, :].to(q.dtype)
    elif not equal:
        mask = real[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=heads.dropout, scale=heads.scale
    )
    out = out.transpose(1, 2).flatten(0, 1)
    if equal:
        return out, rows.flatten()
    return out[real.flatten()], rows[real]


def _varlen_kernel() -> Callable[[Heads, Layout], Tensor] | None:
    """Return the variable-length flash kernel of recent torch, or None if torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def run(heads: Heads, layout: Layout) -> Tensor:
        device = heads.q.device
        ends = torch.tensor((0, *layout.lengths), device=device).cumsum(0).to(torch.int32)
        longest = layout.longest
        out = varlen_attn(
            heads.q, heads.k, heads.v, ends, ends, longest, longest, scale=heads.scale
        )
        assert isinstance(out, Tensor)  # a tuple comes only when the log-sum-exp is asked for
        return out

    return run


class AttentionReader:
    """Gives a method what it reads from one block's attention, computed on demand.

    A method declares the names in ``reads``. Other names are refused, so the declaration is always
    right.
    """

    def __init__(
        self,
        heads: Heads,
        state: TokenState,
        reads: frozenset[str],
        class_token: bool,
        proportional: bool = False,
    ) -> None:
        self._heads = heads
        self._layout = state.layout
        self._reads = reads
        self._class_token = class_token
        self._size: Tensor | None = None
        if proportional and state.size is not None:
            self._size = state.merge_weight()
        self._live = state.layout.valid(state.x.device)
        if state.alive is not None:
            self._live = state.alive.detach() > 0

    def cls_row(self) -> Tensor:
        """Return the class token's attention to every token, head mean, ``[B, N]`` float32.

        Without a class token it is the attention that each token receives, averaged over queries.
        """
        return self.cls_row_heads().mean(1)

    def cls_row_heads(self) -> Tensor:
        """Return ``cls_row`` before the mean over heads, ``[B, H, N]`` float32."""
        self._check("cls_row")
        return self._first_row() if self._class_token else self._received()

    def key_direction(self) -> Tensor:
        """Return the keys averaged over heads and scaled to length 1, ``[T, d]`` float32.

        No gradient flows through them.
        """
        self._check("key_direction")
        return unit(self._heads.k.detach().sum(1).float())  # the sum has the mean's direction

    def value_norm(self) -> Tensor:
        """Return the length of every token's value vector in each head, ``[B, H, N]`` float32."""
        self._check("value_norm")
        norm = self._heads.v.float().norm(dim=-1)  # [T, H]
        return self._layout.rect(norm).transpose(1, 2)

    def full_map(self) -> Tensor:
        """Return the whole map, head mean, ``[B, N, N]`` float32; it is costly, since un-fused."""
        self._check("full_map")
        return torch.cat([a.mean(1) for a in self._maps()], 1)

    def _check(self, name: str) -> None:
        if name not in self._reads:
            raise RuntimeError(f"{name!r} is not among the declared reads {sorted(self._reads)}")

    def _received(self) -> Tensor:
        """Return the attention that each token receives, averaged over live queries."""
        total: Tensor | None = None
        done = 0
        for part in self._maps():
            if self._live is not None:
                rows = self._live[:, done : done + part.shape[2]]
                part = part * rows[:, None, :, None]
            done += part.shape[2]
            total = part.sum(2) if total is None else total + part.sum(2)
        assert total is not None
        if self._live is None:
            return total / done
        return total / self._live.sum(1).clamp_min(1)[:, None, None]

    def _first_row(self) -> Tensor:
        heads, layout = self._heads, self._layout
        num_heads, dim = heads.q.shape[1:]
        if layout.count is not None:
            q = heads.q.view(layout.batch, layout.count, num_heads, dim)[:, 0]  # [B, H, d]
            # One product of the un-permuted key rows with a block-diagonal query is about twice
            # as fast as H thin products on the permuted view.
            eye = torch.eye(num_heads, dtype=q.dtype, device=q.device)
            spread = (q[:, :, None, :] * eye[:, :, None]).flatten(2)  # [B, H, H * d]
            keys = heads.k.view(layout.batch, layout.count, num_heads * dim)
            logits = spread @ keys.transpose(1, 2)  # [B, H, N]
        else:
            first = heads.q.index_select(0, layout.start(heads.q.device))  # [B, H, d]
            products = (heads.k * layout.spread(first)).sum(-1)  # [T, H]
            logits = layout.rect(products).transpose(1, 2)
        return self._softmax(logits.float() * heads.scale)

    def _softmax(self, logits: Tensor) -> Tensor:
        """Compute the softmax over live keys; the first axis is the image, the last one the key."""
        shape = [logits.shape[0]] + [1] * (logits.ndim - 2) + [logits.shape[-1]]
        if self._size is not None:
            logits = logits + self._layout.rect(self._size.log()).view(shape)
        if self._live is None:
            return logits.softmax(-1)
        logits = logits.masked_fill(~self._live.view(shape), float("-inf"))
        return logits.softmax(-1).nan_to_num(0.0)  # an image without tokens gives NaN

    def _maps(self) -> Iterable[Tensor]:
        """Yield the attention map in chunks of queries, each ``[B, H, chunk, N]`` float32."""
        q = self._layout.rect(self._heads.q).transpose(1, 2)
        k = self._layout.rect(self._heads.k).transpose(1, 2)
        for part in q.split(_QUERY_CHUNK, 2):
            yield self._softmax((part @ k.transpose(-2, -1)).float() * self._heads.scale)
