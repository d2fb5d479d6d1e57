"""Attention in every mode, and what is read off it, against a plain softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from small import noise
from torch import Tensor

from foveate.core import AttentionReader, Context, Heads, Layout, TokenState, attend, attention

HEADS, DIM = 3, 4
ALL = frozenset({"cls_row", "key_direction", "value_norm", "full_map"})
RAGGED = ([5, 2, 7, 1], [3, 0, 6], [4, 4, 4], [1, 9, 2, 8, 3, 7, 4, 6, 5])


def make(lengths: Sequence[int], even: bool = False) -> tuple[Heads, TokenState]:
    """Random heads and the state that they belong to."""
    total = sum(lengths)
    layout = Layout.even(len(lengths), lengths[0]) if even else Layout.ragged(lengths)
    q, k, v = (noise(total, HEADS, DIM, seed=s) for s in range(3))
    return Heads(2 * q, 2 * k, v, 0.37), tokens(layout)


def tokens(layout: Layout) -> TokenState:
    """A state of this layout; attention does not look at the values."""
    return TokenState(
        noise(layout.total, HEADS * DIM, seed=3), layout, Context(1, (1, layout.longest))
    )


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
    state = state.replace(size=size, appended=True)
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
    long = Heads(heads.q[rows], heads.k[rows], heads.v[rows], heads.scale)
    got = attend(heads, state, proportional=True)
    torch.testing.assert_close(got, attend(long, tokens(Layout.even(1, 8)))[[0, 1, 4, 5, 7]])
    torch.testing.assert_close(attend(heads, state), attend(heads, state.replace(size=None)))


@pytest.mark.parametrize("proportional", [False, True])
def test_dead_keys_are_hidden_in_the_masked_mode(proportional: bool) -> None:
    """Without a smoothing nothing trains through attention, and no query sees a dead key."""
    heads, state = make([6] * 3, even=True)
    alive = torch.tensor([[1, 1, 0, 1, 0, 0], [1] * 6, [0, 0, 0, 0, 0, 1]]).double()
    size = torch.arange(1.0, 19)
    bias = size.log() if proportional else None
    gate = alive[:, None, :].expand(3, 6, 6)
    gates = alive.float().requires_grad_()
    got = attend(heads, state.replace(alive=gates, size=size), proportional=proportional)
    assert not got.requires_grad
    same(got, output(heads, maps(heads, [6] * 3, bias=bias, gate=gate)))


def test_an_image_without_a_live_key_has_finite_outputs() -> None:
    heads, state = make([4] * 2, even=True)
    alive = torch.tensor([[0.0] * 4, [1.0, 0, 1, 0]])
    for proportional in (False, True):
        masked = state.replace(alive=alive, size=torch.ones(8))
        got = attend(heads, masked, proportional=proportional)
        assert torch.isfinite(got).all()
        gate = alive.double()[:, None, :].expand(2, 4, 4)
        same(got[4:], output(heads, maps(heads, [4] * 2, gate=gate))[4:])
        same(got[:4], output(heads, maps(heads, [4] * 2))[:4])  # it sees all of them


def test_an_empty_pack() -> None:
    heads, state = make([0, 0])
    assert attend(heads, state).shape == (0, HEADS * DIM)


def alive_of(batch: int, count: int) -> Tensor:
    alive = (torch.rand(batch, count, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    alive[:, 0] = 1
    return alive


def soft(heads: Heads, state: TokenState, eps: float = 0.0) -> Tensor:
    return attend(heads, state, softmax_eps=eps)


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
    got = attend(heads, state, proportional=proportional, softmax_eps=eps)
    same(got, output(heads, found))


def test_masked_equals_the_live_tokens_alone() -> None:
    heads, state = make([7] * 3, even=True)
    alive = alive_of(3, 7)
    live = alive.flatten().bool()
    part = Heads(heads.q[live], heads.k[live], heads.v[live], heads.scale)
    few = tokens(Layout.ragged(alive.sum(1).int().tolist()))
    for eps in (0.0, None):
        got = attend(heads, state.replace(alive=alive.float()), softmax_eps=eps)
        torch.testing.assert_close(got[live], attend(part, few))


def test_masked_passes_the_gradient_of_the_gates() -> None:
    """Compared with differences of the plain formula: also dropped keys have a gradient."""
    heads, state = make([6] * 2, even=True)
    gates, direction = alive_of(2, 6), noise(12, HEADS * DIM, seed=9)
    alive = gates.float().requires_grad_()
    (soft(heads, state.replace(alive=alive)) * direction).sum().backward()

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
    got = soft(heads, state.replace(alive=gates.float()))
    grads = torch.autograd.grad((got * direction).sum(), leaves)
    expected = output(heads, maps(heads, [6] * 2, gate=self_loop(gates)))
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    for one, other in zip(grads, wanted, strict=True):
        same(one, other.double())


def test_masked_survives_a_dropped_key_with_a_huge_logit() -> None:
    heads, state = make([5], even=True)
    heads.k[2] *= 60  # beyond the range of a float32 exp
    alive = torch.tensor([[1.0, 1, 0, 1, 1]], requires_grad=True)
    got = soft(heads, state.replace(alive=alive))
    found = maps(heads, [5], gate=self_loop(alive.detach().double()))
    assert max(float((heads.q[i] * heads.k[2]).sum(-1).max()) for i in (0, 1, 3, 4)) * 0.37 > 90
    others = torch.tensor([0, 1, 3, 4])  # the dropped token sees itself
    same(got.detach()[others], output(heads, found)[others])
    got.square().sum().backward()
    assert torch.isfinite(got).all() and torch.isfinite(alive.grad).all()


MODES = pytest.mark.parametrize("mode", ["even", "packed", "masked", "soft"])


def in_mode(mode: str) -> tuple[Heads, TokenState, dict]:
    heads, state = make([4] * 3, even=mode != "packed")
    if mode in ("masked", "soft"):
        state = state.replace(alive=torch.ones(3, 4))
    return heads, state, {"softmax_eps": 0.0 if mode == "soft" else None}


@MODES
def test_half_precision(mode: str) -> None:
    heads, state, options = in_mode(mode)
    state = state.replace(size=torch.full((12,), 2.0))
    half = Heads(*(t.bfloat16() for t in (heads.q, heads.k, heads.v)), heads.scale)
    got = attend(half, state, proportional=True, **options)
    assert got.dtype == torch.bfloat16
    expected = attend(heads, state, proportional=True, **options)
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


@MODES
def test_dropout_is_right_on_average(mode: str) -> None:
    heads, state, options = in_mode(mode)
    expected = attend(heads, state, **options)
    torch.manual_seed(0)
    copies = 100  # of each image in the batch: as many draws at once
    q, k, v = (t.repeat(copies, 1, 1) for t in (heads.q, heads.k, heads.v))
    dropped = Heads(q, k, v, heads.scale, dropout=0.3)
    layout = state.layout
    many = Layout.even(3 * copies, 4) if layout.is_even else Layout.ragged([4] * 3 * copies)
    alive = None if state.alive is None else torch.ones(3 * copies, 4)
    large = tokens(many).replace(alive=alive)
    draws = [attend(dropped, large, **options).view(copies, 12, -1) for _ in range(15)]
    found = torch.cat(draws)
    assert found.std(0).min() > 0.02
    assert (found.mean(0) - expected).abs().max() < 0.12


# Many tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 10])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("proportional", [False, True])
def test_soft_attention_in_chunks_gives_the_same(
    count: int, eps: float, proportional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and the gradients of queries, keys, values and gates; the last chunk may be short."""
    heads, state = make([count] * 2, even=True)
    state = state.replace(size=torch.arange(1.0, 2 * count + 1))
    direction = noise(2 * count, HEADS * DIM, seed=9)
    chunks: list[int] = []
    run = attention._Maps.exponentials

    def counted(maps: attention._Maps, part: slice) -> tuple[Tensor, Tensor]:
        chunks.append(part.stop - part.start)
        return run(maps, part)

    monkeypatch.setattr(attention._Maps, "exponentials", counted)

    def found() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (heads.q, heads.k, heads.v)]
        alive = alive_of(2, count).float().requires_grad_()
        options = dict(proportional=proportional, softmax_eps=eps)
        out = attend(Heads(*leaves, heads.scale), state.replace(alive=alive), **options)
        with torch.no_grad():  # nothing differs without gradients
            again = attend(Heads(*leaves, heads.scale), state.replace(alive=alive), **options)
        assert torch.equal(again, out)
        return [out, *torch.autograd.grad((out * direction).sum(), [*leaves, alive])]

    whole = found()
    assert chunks == []
    monkeypatch.setattr(attention, "_SOFT_WHOLE", 7)
    monkeypatch.setattr(attention, "_SOFT_CHUNK", 4)
    parts = found()
    once = [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert chunks == once * 3  # twice forward, once backward
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert all((grad != 0).any() for grad in whole[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_soft_attention_in_chunks_in_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result and the gradients keep their types and lie near those in single precision."""
    heads, state = make([10] * 2, even=True)
    monkeypatch.setattr(attention, "_SOFT_WHOLE", 7)
    monkeypatch.setattr(attention, "_SOFT_CHUNK", 4)

    def found(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (heads.q, heads.k, heads.v)]
        alive = alive_of(2, 10).float().requires_grad_()
        out = attend(Heads(*leaves, heads.scale), state.replace(alive=alive), softmax_eps=1e-6)
        assert out.dtype == kind
        return [out, *torch.autograd.grad(out.float().square().sum(), [*leaves, alive])]

    for half, single in zip(found(dtype), found(torch.float32), strict=True):
        torch.testing.assert_close(half.float(), single, atol=0.15, rtol=0.05)


def test_soft_attention_is_whole_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went in chunks")

    monkeypatch.setattr(attention._SoftInChunks, "apply", refuse)
    monkeypatch.setattr(attention, "_SOFT_WHOLE", 6)
    heads, state = make([6] * 2, even=True)
    heads.q.requires_grad_()
    soft(heads, state.replace(alive=torch.ones(2, 6)))
    heads, state = make([7] * 2, even=True)
    heads.q.requires_grad_()
    with pytest.raises(AssertionError, match="in chunks"):
        soft(heads, state.replace(alive=torch.ones(2, 7)))


# What methods read -------------------------------------------------------------------------


def reader(
    heads: Heads, state: TokenState, class_token: bool = True, proportional: bool = False
) -> AttentionReader:
    return AttentionReader(heads, state, ALL, class_token, proportional)


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
def test_values_that_methods_read(lengths: list[int], proportional: bool) -> None:
    for even in (False, True) if len(set(lengths)) == 1 else (False,):
        heads, state = make(lengths, even)
        size = torch.arange(1.0, sum(lengths) + 1)
        state = state.replace(size=size)
        found = maps(heads, lengths, bias=size.log() if proportional else None)
        got = reader(heads, state, proportional=proportional)
        rows = rectangle([m[:, 0] for m in found], 1)
        assert got.cls_row().dtype == torch.float32
        same(got.cls_row_heads(), rows)
        same(got.cls_row(), rows.mean(1))
        whole, real = got.full_map(), rectangle([m.mean(0) for m in found], 2)
        for b, n in enumerate(lengths):  # rows of padding say nothing
            same(whole[b, :n], real[b, :n])
        norm = heads.v.double().square().sum(-1).sqrt()
        same(got.value_norm(), rectangle(list(norm.T.split(list(lengths), 1)), 1))
        same(got.key_direction(), F.normalize(heads.k.double().mean(1), dim=-1))


def test_in_the_masked_mode_only_live_keys_are_looked_at() -> None:
    heads, state = make([7] * 3, even=True)
    alive = alive_of(3, 7)
    gate = alive[:, None, :].expand(3, 7, 7)
    found = maps(heads, [7] * 3, gate=gate)
    got = reader(heads, state.replace(alive=alive.float()))
    same(got.cls_row_heads(), torch.stack([m[:, 0] for m in found]))
    same(got.full_map(), torch.stack([m.mean(0) for m in found]))


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
    got = reader(heads, state, class_token=False)
    same(got.cls_row_heads(), expected)
    same(got.cls_row(), expected.mean(1))
    same(got.full_map().sum(2)[:, 0], torch.ones(3, dtype=torch.float64))


def test_an_image_without_tokens_has_no_row() -> None:
    heads, state = make([3, 0, 2])
    got = reader(heads, state, class_token=False)
    assert got.cls_row()[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_was_not_declared_is_refused(name: str) -> None:
    heads, state = make([3, 2])
    got = AttentionReader(heads, state, ALL - {name}, True)
    for other in ALL - {name}:
        getattr(got, other)()
    with pytest.raises(RuntimeError, match=f"{name!r} is not among the declared reads"):
        getattr(got, name)()


def test_one_head_at_a_time_takes_the_same_declaration() -> None:
    heads, state = make([3, 2])
    with pytest.raises(RuntimeError, match="'cls_row' is not among the declared reads"):
        AttentionReader(heads, state, frozenset({"full_map"}), True).cls_row_heads()
