"""The softmax of every family and every mode, and what methods read off attention.

Attention stays fused: a backbone hands over q, k and v, and one of four paths runs.

* plain: ``scaled_dot_product_attention``;
* weighted: the same with ``log(size)`` as an additive mask (proportional attention);
* masked: the differentiable softmax with a self-loop that trains token gates;
* packed: images of different lengths in a few buckets, or one variable-length kernel on CUDA.

Scores that papers read off the N x N map need one row of it, so only that row is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.tokens import TokenState

__all__ = ["CarriedSeen", "Heads", "Seen", "attend"]

_CARRIED = "seen."
_BUCKETS = 4  # the number hardly matters between 2 and 8; more buckets pad less
_QUERY_CHUNK = 64


@dataclass(eq=False)
class Heads:
    """What a backbone hands over for one block's attention.

    Attributes:
        q, k, v: ``[T, H, d]`` each.
        y: the normed block input that they were made from, ``[T, C]``.
        scale: factor on the dot products.
        dropout: probability of dropping an attention weight (0 in evaluation).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    scale: float
    dropout: float = 0.0


def attend(
    heads: Heads, state: TokenState, *, proportional: bool = False, eps: float = 0.0
) -> Tensor:
    """Attention output ``[T, H * d]``.

    Args:
        heads: q, k, v of the block.
        state: the tokens; its layout and its alive, visible and size fields choose the path.
        proportional: add ``log(size)`` to the logits.
        eps: smoothing of the masked softmax.
    """
    bias = None
    if proportional and state.size is not None:
        # Prefix and fused tokens may carry size 0; they still count as one key.
        bias = state.size.clamp_min(1.0).log()
    if state.alive is not None:
        out = _masked(heads, state, bias, eps)
    elif state.layout.is_even:
        mask = None if bias is None else state.layout.rect(bias)[:, None, None, :]
        if state.visible is not None:
            # With no key left in an image every key is shown, or its softmax would be NaN; a
            # method that hides keys throws away what comes of it.
            shown = state.visible | ~state.visible.any(1, keepdim=True)
            mask = shown[:, None, None, :]
        out = _fused(heads, state.layout, mask)
    else:
        out = _packed(heads, state.layout, bias)
    return out.flatten(1)


def _split(t: Tensor, layout: Layout) -> Tensor:
    """``[T, H, d]`` as ``[B, H, N, d]``."""
    return t.view(layout.batch, layout.count or 0, *t.shape[1:]).transpose(1, 2)


def _fused(heads: Heads, layout: Layout, mask: Tensor | None) -> Tensor:
    q, k, v = (_split(t, layout) for t in (heads.q, heads.k, heads.v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=heads.dropout, scale=heads.scale
    )
    return out.transpose(1, 2).reshape(layout.total, *heads.v.shape[1:])


def _masked(heads: Heads, state: TokenState, bias: Tensor | None, eps: float) -> Tensor:
    """Softmax over live keys, where every query also sees itself.

    The weights are ``exp(a_ij) G_ij``, with ``G_ij = alive_j`` off the diagonal and 1 on it, so
    the gradient of a kept or dropped key flows through the normaliser. An additive log-mask
    would give dropped tokens no gradient at all.
    """
    assert state.alive is not None
    layout = state.layout
    q, k, v = (_split(t, layout) for t in (heads.q, heads.k, heads.v))
    logits = (q * heads.scale @ k.transpose(-2, -1)).float()
    if bias is not None:
        logits = logits + layout.rect(bias)[:, None, None, :]
    count = logits.shape[-1]
    self_loop = torch.eye(count, device=logits.device)
    gate = state.alive.float()[:, None, :]
    gate = (gate + (1 - gate) * self_loop)[:, None]  # [B, 1, N, N]
    seen = logits.detach().masked_fill(gate.detach() <= 0, float("-inf"))
    # Dropped keys may hold the largest logit; capping keeps their exp finite where it is only
    # needed for the gradient.
    shifted = (logits - seen.amax(-1, keepdim=True)).clamp_max(30.0)
    weight = shifted.exp() * gate
    total = weight.sum(-1, keepdim=True)
    attention = (weight + eps / count) / (total + eps)
    if heads.dropout:
        attention = F.dropout(attention, heads.dropout)
    out = attention.to(v.dtype) @ v
    return out.transpose(1, 2).reshape(layout.total, *heads.v.shape[1:])


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
    """Group images of similar length: few groups, images without tokens left out."""
    order = sorted((n, b) for b, n in enumerate(lengths) if n > 0)
    step = max(1, -(-len(order) // _BUCKETS))
    return [[b for _, b in order[i : i + step]] for i in range(0, len(order), step)]


def _bucket(
    heads: Heads, layout: Layout, bias: Tensor | None, images: list[int]
) -> tuple[Tensor, Tensor]:
    """Attention of a few images: their rows of the output and where they belong."""
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
    """The variable-length flash kernel of recent torch, or None where there is none."""
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
        assert isinstance(out, Tensor)  # with the log-sum-exp only when asked for
        return out

    return run


class Seen:
    """What a method may read off one block's attention: computed on demand, by name.

    A method declares the names in ``needs``; others are refused, so that a declared fact about a
    method cannot be wrong.
    """

    def __init__(
        self,
        heads: Heads,
        state: TokenState,
        needs: frozenset[str],
        class_token: bool,
        proportional: bool = False,
        key_mean: Tensor | None = None,
    ) -> None:
        self._heads = heads
        self._layout = state.layout
        self._needs = needs
        self._class_token = class_token
        self._key_mean = key_mean
        self._bias = None
        if proportional and state.size is not None:
            self._bias = state.layout.rect(state.size.clamp_min(1.0).log())[:, None, :]
        live = None if state.alive is None else state.alive.detach() > 0
        valid = state.layout.valid(state.x.device)
        if live is None:
            self._live = valid
        else:
            self._live = live if valid is None else live & valid

    def cls_row(self) -> Tensor:
        """Attention of the class token to every token, head mean: ``[B, N]`` float32.

        Without a class token: the attention each token receives, averaged over all queries.
        """
        return self.cls_row_heads().mean(1)

    def cls_row_heads(self) -> Tensor:
        """The same before the mean over heads, ``[B, H, N]`` float32."""
        self._check("cls_row")
        return self._cls_row()

    def key_mean(self) -> Tensor:
        """Keys averaged over heads, ``[T, d]``."""
        self._check("key_mean")
        return self._heads.k.mean(1) if self._key_mean is None else self._key_mean

    def value_norm(self) -> Tensor:
        """Length of every token's value vector in each head, ``[B, H, N]`` float32."""
        self._check("value_norm")
        norm = self._heads.v.float().norm(dim=-1)  # [T, H]
        return self._layout.rect(norm).transpose(1, 2)

    def attention(self) -> Tensor:
        """The whole map, head mean, ``[B, N, N]`` float32. Costly: un-fused."""
        self._check("attention")
        return torch.cat([a.mean(1) for a in self._maps()], 1)

    def carry(self, state: TokenState, needs: frozenset[str]) -> TokenState:
        """Let the tokens take along what a later method will read (see CarriedSeen)."""
        extras = dict(state.extras)
        if "cls_row" in needs:
            extras[_CARRIED + "cls_row"] = self._layout.flat(self._cls_row().transpose(1, 2))
        if "key_mean" in needs:
            mean = self._heads.k.mean(1) if self._key_mean is None else self._key_mean
            extras[_CARRIED + "key_mean"] = mean
        if "value_norm" in needs:
            extras[_CARRIED + "value_norm"] = self._heads.v.float().norm(dim=-1)
        return state.replace(extras=extras)

    def _check(self, name: str) -> None:
        if name not in self._needs:
            raise RuntimeError(f"{name!r} is not among the declared needs {sorted(self._needs)}")

    def _cls_row(self) -> Tensor:
        if self._class_token:
            return self._first_row()
        queries = self._live
        total: Tensor | None = None
        done = 0
        for part in self._maps():
            if queries is not None:
                rows = queries[:, done : done + part.shape[2]]
                part = part * rows[:, None, :, None]
            done += part.shape[2]
            total = part.sum(2) if total is None else total + part.sum(2)
        assert total is not None
        if queries is None:
            return total / done
        return total / queries.sum(1).clamp_min(1)[:, None, None]

    def _first_row(self) -> Tensor:
        heads, layout = self._heads, self._layout
        batch, device = layout.batch, heads.q.device
        num_heads, dim = heads.q.shape[1:]
        if layout.count is not None:
            q = _split(heads.q, layout)[:, :, 0]  # [B, H, d]
            # One product of the un-permuted key rows with a block-diagonal query is about twice
            # as fast as H thin products on the permuted view.
            eye = torch.eye(num_heads, dtype=q.dtype, device=device)
            spread = (q[:, :, None, :] * eye[:, :, None]).flatten(2)  # [B, H, H * d]
            keys = heads.k.view(batch, layout.count, num_heads * dim)
            logits = spread @ keys.transpose(1, 2)  # [B, H, N]
        else:
            first = heads.q.index_select(0, layout.start(device))  # [B, H, d]
            products = (heads.k * layout.spread(first)).sum(-1)  # [T, H]
            logits = layout.rect(products).transpose(1, 2)
        return self._softmax(logits.float() * heads.scale)

    def _softmax(self, logits: Tensor) -> Tensor:
        """Softmax over live keys of logits whose last axis is the keys, with the image first."""
        shape = [logits.shape[0]] + [1] * (logits.ndim - 2) + [logits.shape[-1]]
        if self._bias is not None:
            logits = logits + self._bias.view(shape)
        if self._live is None:
            return logits.softmax(-1)
        logits = logits.masked_fill(~self._live.view(shape), float("-inf"))
        return logits.softmax(-1).nan_to_num(0.0)  # an image without tokens has no row

    def _maps(self) -> Iterable[Tensor]:
        """The attention map in chunks of queries, each ``[B, H, chunk, N]`` float32."""
        q = self._layout.rect(self._heads.q).transpose(1, 2)
        k = self._layout.rect(self._heads.k).transpose(1, 2)
        for part in q.split(_QUERY_CHUNK, 2):
            yield self._softmax((part @ k.transpose(-2, -1)).float() * self._heads.scale)


class CarriedSeen(Seen):
    """What a method reads after another one changed the tokens in the same block.

    The values were computed for the tokens that attention saw and travelled with them: a merged
    token has its target's, a fused one has zeros.
    """

    def __init__(self, state: TokenState, needs: frozenset[str]) -> None:
        self._state = state
        self._needs = needs

    def _read(self, name: str) -> Tensor:
        self._check(name)
        return self._state.extras[_CARRIED + name]

    def cls_row_heads(self) -> Tensor:
        """Class attention as it was before the tokens changed, ``[B, H, N]``."""
        return self._state.layout.rect(self._read("cls_row")).transpose(1, 2)

    def key_mean(self) -> Tensor:
        """Mean keys of the tokens that are left, ``[T, d]``."""
        return self._read("key_mean")

    def value_norm(self) -> Tensor:
        """Value lengths of the tokens that are left, ``[B, H, N]``."""
        return self._state.layout.rect(self._read("value_norm")).transpose(1, 2)

    def attention(self) -> Tensor:
        """Refused: the map belongs to tokens that are no longer there."""
        raise RuntimeError("the attention map cannot be carried past a change of the tokens")

    @staticmethod
    def dropped(state: TokenState) -> TokenState:
        """The state without the carried values."""
        return state.replace(
            extras={k: v for k, v in state.extras.items() if not k.startswith(_CARRIED)}
        )
