"""Attention in every mode, and what is read off it, against a plain softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small import noise
from torch import Tensor

from foveate.core import Heads, Layout, Seen, TokenState, attend, attention
from foveate.core.attention import CarriedSeen

HEADS, DIM = 3, 4
ALL = frozenset({"cls_row", "key_mean", "value_norm", "attention"})
RAGGED = ([5, 2, 7, 1], [3, 0, 6], [4, 4, 4], [1, 9, 2, 8, 3, 7, 4, 6, 5])


def make(lengths: Sequence[int], even: bool = False) -> tuple[Heads, TokenState]:
    """Random heads and the state that they belong to."""
    total = sum(lengths)
    layout = Layout.even(len(lengths), lengths[0]) if even else Layout.ragged(lengths)
    q, k, v = (noise(total, HEADS, DIM, seed=s) for s in range(3))
    heads = Heads(2 * q, 2 * k, v, noise(total, HEADS * DIM, seed=3), 0.37)
    return heads, TokenState(heads.y, layout, 1, (1, max(lengths)))


def maps(
    heads: Heads, lengths: Sequence[int], *, bias: Tensor | None = None, gate: Tensor | None = None
) -> list[Tensor]:
    """Attention maps ``[H, N, N]`` of each image: exp(logits) * gate, normalised.

    ``bias [T]`` is added to the logits of a key; ``gate`` (one ``[N, N]`` an image) multiplies.
    """
    found, row = [], 0
    for b, n in enumerate(lengths):
        part = slice(row, row + n)
        q, k = heads.q[part].double(), heads.k[part].double()
        logits = torch.einsum("qhd,khd->hqk", q, k) * heads.scale
        if bias is not None:
            logits = logits + bias[part].double()
        weight = logits.exp()
        if gate is not None:
            weight = weight * gate[b]
        found.append(weight / weight.sum(-1, keepdim=True))
        row += n
    return found


def output(heads: Heads, found: list[Tensor]) -> Tensor:
    parts, row = [], 0
    for image in found:
        v = heads.v[row : row + image.shape[1]].double()
        parts.append(torch.einsum("hqk,khd->qhd", image, v).flatten(1))
        row += image.shape[1]
    return torch.cat(parts)


def self_loop(alive: Tensor) -> Tensor:
    """G of the masked softmax, ``[B, N, N]``: every query sees live keys and itself."""
    eye = torch.eye(alive.shape[1], dtype=alive.dtype)
    return alive[:, None, :] * (1 - eye) + eye


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


# Paths of attend ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("proportional", [False, True])
def test_packed_equals_each_image_alone(lengths: list[int], proportional: bool) -> None:
    heads, state = make(lengths)
    size = (noise(sum(lengths), seed=5).abs() * 4).round()  # some are 0, as of fused tokens
    state = state.replace(size=size)
    bias = size.clamp_min(1).log() if proportional else None
    got = attend(heads, state, proportional=proportional)
    assert got.shape == (sum(lengths), HEADS * DIM)
    same(got, output(heads, maps(heads, lengths, bias=bias)))


@pytest.mark.parametrize("proportional", [False, True])
def test_even_layouts(proportional: bool) -> None:
    heads, state = make([6] * 3, even=True)
    size = torch.randint(1, 5, (18,), generator=torch.Generator().manual_seed(0)).float()
    state = state.replace(size=size)
    bias = size.log() if proportional else None
    expected = output(heads, maps(heads, [6] * 3, bias=bias))
    same(attend(heads, state, proportional=proportional), expected)
    ragged = state.replace(layout=Layout.ragged([6] * 3))
    same(attend(heads, ragged, proportional=proportional), expected)


def test_proportional_attention_counts_a_merged_key_as_often_as_its_size() -> None:
    """s identical keys, or one of size s."""
    heads, state = make([5], even=True)
    state = state.replace(size=torch.tensor([1.0, 3, 1, 2, 1]))
    rows = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4])
    long = Heads(heads.q[rows], heads.k[rows], heads.v[rows], heads.y[rows], heads.scale)
    unmerged = TokenState(long.y, Layout.even(1, 8), 1, (1, 7))
    got = attend(heads, state, proportional=True)
    torch.testing.assert_close(got, attend(long, unmerged)[[0, 1, 4, 5, 7]])
    torch.testing.assert_close(attend(heads, state), attend(heads, state.replace(size=None)))


def test_visible_keys() -> None:
    heads, state = make([6] * 3, even=True)
    visible = torch.tensor([[1, 1, 0, 1, 0, 0], [1] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    gate = visible.double()[:, None, :].expand(3, 6, 6)
    got = attend(heads, state.replace(visible=visible))
    same(got, output(heads, maps(heads, [6] * 3, gate=gate)))


def test_an_empty_pack() -> None:
    heads, state = make([0, 0])
    assert attend(heads, state).shape == (0, HEADS * DIM)


def alive_of(batch: int, count: int) -> Tensor:
    alive = (torch.rand(batch, count, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    alive[:, 0] = 1
    return alive


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("proportional", [False, True])
def test_masked_is_a_softmax_with_a_self_loop(eps: float, proportional: bool) -> None:
    heads, state = make([7] * 3, even=True)
    alive, size = alive_of(3, 7), torch.arange(1.0, 22)
    state = state.replace(alive=alive.float(), size=size)
    bias = size.log() if proportional else None
    gate, found = self_loop(alive), maps(heads, [7] * 3, bias=bias, gate=self_loop(alive))
    if eps:  # the released form: after the largest seen logit is taken off, before normalising
        raw = maps(heads, [7] * 3, bias=bias)
        found = []
        for image, seen in zip(raw, gate, strict=True):
            weight = image / (image * seen).amax(-1, keepdim=True) * seen
            found.append((weight + eps / 7) / (weight.sum(-1, keepdim=True) + eps))
    same(attend(heads, state, proportional=proportional, eps=eps), output(heads, found))


def test_masked_equals_the_live_tokens_alone() -> None:
    heads, state = make([7] * 3, even=True)
    alive = alive_of(3, 7)
    live = alive.flatten().bool()
    part = Heads(heads.q[live], heads.k[live], heads.v[live], heads.y[live], heads.scale)
    lengths = alive.sum(1).int().tolist()
    few = TokenState(part.y, Layout.ragged(lengths), 1, (1, 6))
    got = attend(heads, state.replace(alive=alive.float()))
    torch.testing.assert_close(got[live], attend(part, few))


def test_masked_passes_the_gradient_of_the_gates() -> None:
    """Compared with differences of the plain formula: also dropped keys have a gradient."""
    heads, state = make([6] * 2, even=True)
    gates, direction = alive_of(2, 6), noise(12, HEADS * DIM, seed=9)
    alive = gates.float().requires_grad_()
    (attend(heads, state.replace(alive=alive)) * direction).sum().backward()

    def loss(gates: Tensor) -> float:
        found = maps(heads, [6] * 2, gate=self_loop(gates))
        return float((output(heads, found) * direction).sum())

    for b in range(2):
        for j in range(6):
            step = torch.zeros(2, 6, dtype=torch.float64)
            step[b, j] = 1e-6
            slope = (loss(gates + step) - loss(gates - step)) / 2e-6
            assert alive.grad[b, j].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)
    assert (alive.grad[gates == 0].abs() > 1e-3).all()


def test_masked_passes_the_gradient_of_queries_keys_and_values() -> None:
    heads, state = make([6] * 2, even=True)
    gates, direction = alive_of(2, 6), noise(12, HEADS * DIM, seed=9)
    leaves = [t.requires_grad_() for t in (heads.q, heads.k, heads.v)]
    got = attend(heads, state.replace(alive=gates.float()))
    grads = torch.autograd.grad((got * direction).sum(), leaves)
    expected = output(heads, maps(heads, [6] * 2, gate=self_loop(gates)))
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    for one, other in zip(grads, wanted, strict=True):
        same(one, other.double())


def test_masked_survives_a_dropped_key_with_a_huge_logit() -> None:
    heads, state = make([5], even=True)
    heads.k[2] *= 60  # beyond the range of a float32 exp
    alive = torch.tensor([[1.0, 1, 0, 1, 1]], requires_grad=True)
    got = attend(heads, state.replace(alive=alive))
    found = maps(heads, [5], gate=self_loop(alive.detach().double()))
    assert max(float((heads.q[i] * heads.k[2]).sum(-1).max()) for i in (0, 1, 3, 4)) * 0.37 > 90
    others = torch.tensor([0, 1, 3, 4])  # the dropped token sees itself
    same(got.detach()[others], output(heads, found)[others])
    got.square().sum().backward()
    assert torch.isfinite(got).all() and torch.isfinite(alive.grad).all()


@pytest.mark.parametrize("mode", ["even", "packed", "masked"])
def test_half_precision(mode: str) -> None:
    heads, state = make([4] * 3, even=mode != "packed")
    if mode == "masked":
        state = state.replace(alive=torch.ones(3, 4))
    state = state.replace(size=torch.full((12,), 2.0))
    half = Heads(*(t.bfloat16() for t in (heads.q, heads.k, heads.v, heads.y)), heads.scale)
    got = attend(half, state, proportional=True)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), attend(heads, state), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", ["even", "packed", "masked"])
def test_dropout_is_right_on_average(mode: str) -> None:
    heads, state = make([4] * 3, even=mode != "packed")
    if mode == "masked":
        state = state.replace(alive=torch.ones(3, 4))
    expected = attend(heads, state)
    torch.manual_seed(0)
    dropped = Heads(heads.q, heads.k, heads.v, heads.y, heads.scale, dropout=0.3)
    draws = torch.stack([attend(dropped, state) for _ in range(1500)])
    assert draws.std(0).min() > 0.02
    assert (draws.mean(0) - expected).abs().max() < 0.12


# What methods read -------------------------------------------------------------------------


def seen(
    heads: Heads, state: TokenState, class_token: bool = True, proportional: bool = False
) -> Seen:
    return Seen(heads, state, ALL, class_token, proportional)


def rectangle(parts: list[Tensor], dims: int) -> Tensor:
    """Stack per-image values whose last ``dims`` axes have the image's length, zero-padded."""
    longest = max(p.shape[-1] for p in parts)
    shape = [*parts[0].shape[: parts[0].ndim - dims], *[longest] * dims]
    out = torch.zeros(len(parts), *shape, dtype=torch.float64)
    for b, part in enumerate(parts):
        out[(b, ..., *[slice(part.shape[-1])] * dims)] = part
    return out


@pytest.mark.parametrize("lengths", RAGGED[:1] + RAGGED[2:], ids=str)
@pytest.mark.parametrize("proportional", [False, True])
def test_seen_values(lengths: list[int], proportional: bool) -> None:
    for even in (False, True) if len(set(lengths)) == 1 else (False,):
        heads, state = make(lengths, even)
        size = torch.arange(1.0, sum(lengths) + 1)
        state = state.replace(size=size)
        found = maps(heads, lengths, bias=size.log() if proportional else None)
        got = seen(heads, state, proportional=proportional)
        rows = rectangle([m[:, 0] for m in found], 1)
        assert got.cls_row().dtype == torch.float32
        same(got.cls_row_heads(), rows)
        same(got.cls_row(), rows.mean(1))
        whole, real = got.attention(), rectangle([m.mean(0) for m in found], 2)
        for b, n in enumerate(lengths):  # rows of padding say nothing
            same(whole[b, :n], real[b, :n])
        norm = heads.v.double().square().sum(-1).sqrt()
        same(got.value_norm(), rectangle(list(norm.T.split(list(lengths), 1)), 1))
        same(got.key_mean(), heads.k.double().mean(1))


def test_seen_in_the_masked_mode_looks_at_live_keys() -> None:
    heads, state = make([7] * 3, even=True)
    alive = alive_of(3, 7)
    gate = alive[:, None, :].expand(3, 7, 7)
    found = maps(heads, [7] * 3, gate=gate)
    got = seen(heads, state.replace(alive=alive.float()))
    same(got.cls_row_heads(), torch.stack([m[:, 0] for m in found]))
    same(got.attention(), torch.stack([m.mean(0) for m in found]))


@pytest.mark.parametrize("chunk", [2, 3, 64])
@pytest.mark.parametrize("kind", ["even", "ragged", "masked"])
def test_without_a_class_token_it_is_the_attention_received(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_CHUNK", chunk)
    lengths = [5, 2, 7] if kind == "ragged" else [7] * 3
    heads, state = make(lengths, even=kind != "ragged")
    alive = alive_of(3, 7)
    if kind == "masked":
        state = state.replace(alive=alive.float())
        found = maps(heads, lengths, gate=alive[:, None, :].expand(3, 7, 7))
        received = [m[:, a.bool()].mean(1) for m, a in zip(found, alive, strict=True)]
    else:
        received = [m.mean(1) for m in maps(heads, lengths)]
    expected = rectangle(received, 1)
    got = seen(heads, state, class_token=False)
    same(got.cls_row_heads(), expected)
    same(got.cls_row(), expected.mean(1))
    same(got.attention().sum(2)[:, 0], torch.ones(3, dtype=torch.float64))


def test_an_image_without_tokens_has_no_row() -> None:
    heads, state = make([3, 0, 2])
    got = seen(heads, state, class_token=False)
    assert got.cls_row()[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_was_not_declared_is_refused(name: str) -> None:
    heads, state = make([3, 2])
    got = Seen(heads, state, ALL - {name}, True)
    for other in ALL - {name}:
        getattr(got, other)()
    with pytest.raises(RuntimeError, match=f"{name!r} is not among the declared needs"):
        getattr(got, name)()


def test_a_cheaper_mean_of_the_keys_is_taken_if_given() -> None:
    heads, state = make([3, 2])
    mean = noise(5, DIM)
    assert Seen(heads, state, ALL, True, key_mean=mean).key_mean() is mean


def test_carried_values_follow_their_tokens() -> None:
    heads, state = make([5, 3])
    before = seen(heads, state)
    needs = frozenset({"cls_row", "value_norm", "key_mean"})
    state = before.carry(state, needs).keep_where(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]) > 0)
    state = state.append(noise(2, HEADS * DIM))
    after = CarriedSeen(state, needs | {"attention"})
    for got, values in (
        (after.cls_row(), before.cls_row()),
        (after.cls_row_heads(), before.cls_row_heads()),
        (after.value_norm(), before.value_norm()),
    ):
        assert torch.equal(got[0, ..., :3], values[0, ..., [0, 1, 3]])
        assert torch.equal(got[1, ..., :2], values[1, ..., [0, 2]])
        assert (got[0, ..., 3] == 0).all()  # the appended token
    assert torch.equal(after.key_mean()[:3], before.key_mean()[[0, 1, 3]])
    with pytest.raises(RuntimeError, match="cannot be carried"):
        after.attention()
    with pytest.raises(RuntimeError, match="declared needs"):
        CarriedSeen(state, frozenset()).cls_row()
    assert CarriedSeen.dropped(state).extras == {}
