"""Each verb of TokenState by itself; test_tokens_random.py runs them in any order."""

from __future__ import annotations

import pytest
import torch
from naive_tokens import Naive, beginning, padded
from small import batch_state, noise
from torch import Tensor

from foveate.core import Layout, TokenState

LAYOUTS = pytest.mark.parametrize("counts", [None, [8, 3, 5], [2, 8, 1]], ids=str)
PREFIXES = pytest.mark.parametrize("prefix", [0, 1, 5])


def start(counts: list[int] | None, prefix: int = 1) -> tuple[TokenState, Naive]:
    state, naive = beginning(counts, prefix=prefix)
    return state, naive


@PREFIXES
def test_beginning(prefix: int) -> None:
    x = noise(2, prefix + 6, 4)
    state = TokenState.begin(x, prefix=prefix, grid=(2, 3), place=True, track=True)
    assert state.x.data_ptr() == x.data_ptr() and torch.equal(state.tokens(), x)
    assert state.place.tolist() == ([6] * prefix + list(range(6))) * 2
    assert state.source.tolist() == [list(range(prefix, prefix + 6))] * 2
    assert torch.equal(state.canvas, x[:, prefix:])
    assert torch.equal(state.restore(), x[:, prefix:])
    bare = TokenState.begin(x, prefix=prefix, grid=(2, 3))
    assert bare.place is bare.source is bare.canvas is bare.size is bare.alive is None
    assert not bare.tracked and state.tracked


@PREFIXES
@LAYOUTS
def test_reading(counts: list[int] | None, prefix: int) -> None:
    state, naive = start(counts, prefix)
    images = [torch.stack([t.x for t in image.tokens]) for image in naive.images]
    front = state.prefix_tokens()
    assert front.shape == (3, prefix, 4)
    values = state.after_prefix(state.extras["mark"], -1.0)
    present = state.present()
    for b, image in enumerate(images):
        n = len(image) - prefix
        assert state.counts[b] == n
        assert torch.equal(front[b], image[:prefix])
        assert torch.equal(state.tokens()[b, : prefix + n], image)
        assert values[b, :n].tolist() == [t.mark for t in naive.images[b].tokens[prefix:]]
        assert (values[b, n:] == -1).all()
        if present is not None:
            assert present[b].tolist() == [i < n for i in range(max(state.counts))]
        torch.testing.assert_close(state.mean(state.x)[b], image[prefix:].mean(0))
    assert (present is None) == (counts is None)


def test_the_mean_counts_live_tokens_only_and_passes_gradients() -> None:
    state, _ = start(None)
    gates = torch.ones(3, 9)
    gates[0, 3:], gates[1, 1:8] = 0, 0
    gates = gates.requires_grad_()
    state = state.replace(alive=gates)
    x = state.tokens()
    got = state.mean(state.x)
    torch.testing.assert_close(got[0], x[0, 1:3].mean(0))
    torch.testing.assert_close(got[1], x[1, 8])
    torch.testing.assert_close(got[2], x[2, 1:].mean(0))
    got.square().sum().backward()
    assert (gates.grad[[0, 2], 1:] != 0).all()  # dead tokens too
    assert (gates.grad[:, 0] == 0).all()


@PREFIXES
def test_keep_orders_as_asked(prefix: int) -> None:
    state, naive = start(None, prefix)
    rows = [[4, 0, 7], [1, 2, 3], [7, 6, 5]]
    naive.keep(rows)
    kept = state.keep(torch.tensor(rows))
    assert kept.layout.is_even
    naive.check(kept)


@LAYOUTS
def test_keep_where_ignores_marks_on_padding(counts: list[int] | None) -> None:
    state, naive = start(counts)
    marks = torch.ones(3, max(state.counts), dtype=torch.bool)
    marks[:, 1::2] = False
    naive.keep([[i for i in range(n) if i % 2 == 0] for n in state.counts])
    kept = state.keep_where(marks)
    assert not kept.layout.is_even
    naive.check(kept)


def test_keeping_nothing_leaves_the_prefix() -> None:
    state, naive = start(None, 2)
    naive.keep([[], [3], []])
    kept = state.keep_where(torch.tensor([[False] * 8, [i == 3 for i in range(8)], [False] * 8]))
    naive.check(kept)
    assert kept.counts == (0, 1, 0)
    naive.keep([[], [], []])
    naive.check(kept.keep_where(torch.zeros(3, 1, dtype=torch.bool)))


def merged(
    state: TokenState, naive: Naive, track: bool, weight: Tensor | None = None
) -> TokenState:
    """Three tokens into two: two of them into the same."""
    keep = [list(range(n))[::-1][: max(1, n - 3)] for n in state.counts]
    src = [[i for i in range(n) if i not in k] for n, k in zip(state.counts, keep, strict=True)]
    into = [[0, 0, len(k) - 1][: len(s)] for k, s in zip(keep, src, strict=True)]
    weight = noise(3, max(state.counts), seed=4).exp() if weight is None else weight
    naive.merge(keep, src, into, weight, track)
    idx_keep, valid_keep = padded(keep)
    idx_src, valid_src = padded(src)
    even = state.layout.is_even
    return state.merge(
        idx_keep,
        idx_src,
        padded(into)[0],
        weight,
        valid_keep=None if even else valid_keep,
        valid_src=None if even else valid_src,
        track_size=track,
    )


@LAYOUTS
@pytest.mark.parametrize("track", [True, False])
def test_merge_is_a_weighted_mean(counts: list[int] | None, track: bool) -> None:
    state, naive = start(counts)
    after = merged(state, naive, track)
    naive.check(after)
    assert (after.size is not None) == track
    assert (after.source >= 0).sum() == (state.source >= 0).sum()  # nothing is gone
    if counts is None:  # sizes add up over several merges, also where they are not asked for
        naive.compute(2.0)
        again = merged(after.replace(x=after.x * 2 + 1), naive, False)
        naive.check(again)


@LAYOUTS
def test_merge_by_size_counts_every_patch_once(counts: list[int] | None) -> None:
    """With sizes as weights, two merges in a row give the mean of all patches involved."""
    state, naive = start(counts)
    one = torch.ones(3, max(state.counts))
    first = merged(state, naive, True, one)
    second = merged(first, naive, True, first.after_prefix(first.size))
    naive.check(second)
    patches, carried = state.restore("zero"), second.restore("zero")
    for b in range(3):
        for token in second.source[b].unique().tolist():
            group = second.source[b] == token
            if token >= 0:
                torch.testing.assert_close(carried[b, group][0], patches[b, group].mean(0))


def test_merge_without_any_weight_leaves_the_target() -> None:
    state, _ = start(None)
    idx = torch.arange(8).expand(3, 8)
    weight, zeros = torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.long)
    after = state.merge(idx[:, :6], idx[:, 6:], zeros, weight)
    assert torch.equal(after.tokens(), state.tokens()[:, :7])


def test_merge_keeps_the_dtype_and_passes_gradients() -> None:
    x = noise(1, 4, 3).requires_grad_()
    state = TokenState.begin(x, prefix=0, grid=(1, 4))
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    args = torch.tensor([[2, 3]]), torch.tensor([[0, 1]]), torch.tensor([[1, 1]])
    after = state.merge(*args, weight)
    after.x[1].sum().backward()
    share = torch.tensor([1.0, 2.0, 0.0, 4.0]) / 7
    torch.testing.assert_close(x.grad[0], share[:, None].expand(4, 3))
    assert weight.grad[0, 2] == 0 and (weight.grad[0, [0, 1, 3]] != 0).all()
    half = TokenState.begin(x.detach().bfloat16(), prefix=0, grid=(1, 4))
    assert half.merge(*args, weight).x.dtype == torch.bfloat16


def test_sizes_of_fused_tokens_are_zero_whenever_sizes_begin() -> None:
    """A token that stands for no patch weighs nothing, before or after the first merge."""
    idx = torch.arange(8).expand(3, 8)
    zeros = torch.zeros(3, 1, dtype=torch.long)
    for sized_first in (True, False):
        state, naive = start(None)
        if sized_first:
            naive.merge([list(range(8))] * 3, [[]] * 3, [[]] * 3, torch.ones(3, 8), True)
            state = state.merge(idx, idx[:, :0], zeros[:, :0], torch.ones(3, 8))
        naive.fuse([[0, 1, 2]] * 3, torch.ones(3, 8), [True] * 3)
        state = state.fuse(idx[:, :3], torch.ones(3, 8))
        naive.merge([[1, 2, 3]] * 3, [[0]] * 3, [[0]] * 3, torch.ones(3, 4), True)
        state = state.merge(idx[:, 1:4], idx[:, :1], zeros, torch.ones(3, 4))
        naive.check(state)


@LAYOUTS
def test_fuse_appends_the_weighted_sum_of_the_rest(counts: list[int] | None) -> None:
    state, naive = start(counts)
    weight = noise(3, max(state.counts), seed=2).exp()
    rows = [[n - 1, 0][: max(1, n - 1)] for n in state.counts]
    some = [len(row) < n for row, n in zip(rows, state.counts, strict=True)]
    naive.fuse(rows, weight, some)
    idx, valid = padded(rows)
    exists = None if all(some) else torch.tensor(some)
    after = state.fuse(idx, weight, None if counts is None else valid, exists)
    naive.check(after)
    assert after.layout.is_even == (counts is None)


def test_append_and_discard_undo_each_other() -> None:
    for counts in (None, [8, 3, 5]):
        state, naive = start(counts)
        token = noise(3, 4, seed=3).requires_grad_()
        longer = state.append(token)
        assert longer.layout.is_even == (counts is None)
        assert torch.equal(longer.discard().x, state.x)
        naive.check(longer.discard())
        some = torch.tensor([True, False, True])
        longer = state.append(token, some)
        assert longer.counts == tuple(n + int(s) for n, s in zip(state.counts, some, strict=True))
        naive.check(longer.discard(some))
        longer.x.sum().backward()
        assert torch.equal(token.grad, some[:, None].float().expand(3, 4))


@LAYOUTS
def test_parked_tokens_come_back_where_they_stood(counts: list[int] | None) -> None:
    state, naive = start(counts)
    rows = [[n - 1, 0][:n] for n in state.counts]
    naive.park([[0] + [i + 1 for i in row] for row in rows])
    idx, valid = padded(rows)
    inner = state.park(idx, None if counts is None else valid)
    naive.check(inner)
    with pytest.raises(RuntimeError, match="parked already"):
        inner.park(idx[:, :1])
    naive.compute(3.0)
    inner = inner.replace(x=inner.x * 3 + 1, notes={"seen": 1})
    inner = inner.replace(extras={**inner.extras, "only_inside": inner.x})
    change = noise(3, 4, seed=9)
    outside = inner.recall(change)
    naive.recall(change)
    naive.check(outside)
    assert outside.outer is outside.home is None
    assert outside.notes == {"seen": 1} and sorted(outside.extras) == ["mark"]
    with pytest.raises(RuntimeError, match="no tokens are parked"):
        outside.recall()


def test_looking_at_a_parked_state_from_outside() -> None:
    """``recalled`` and ``restore`` also work while a representative is there."""
    state, naive = start(None)
    inner = state.park(torch.tensor([[1, 5]] * 3)).append(noise(3, 4, seed=1))
    inner = inner.replace(x=inner.x + 1)
    seen = inner.recalled()
    assert seen.layout.lengths == state.layout.lengths
    expected = state.tokens().clone()
    expected[:, [0, 2, 6]] += 1
    assert torch.equal(seen.tokens(), expected)
    assert torch.equal(inner.restore(), expected[:, 1:])


def test_parking_everything_leaves_images_without_tokens() -> None:
    state, _ = start(None)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    inner = state.park_but(mask)
    assert inner.layout.total == 0 and inner.layout.lengths == (0, 0, 0)
    assert torch.equal(inner.recall().x, state.x)
    mask[1, 4] = True
    inner = state.park_but(mask)
    assert inner.layout.lengths == (0, 1, 0)
    assert torch.equal(inner.replace(x=inner.x * 0).recall().x[9 + 4], torch.zeros(4))


def test_mask_out_multiplies_and_remembers() -> None:
    state, naive = start(None)
    with pytest.raises(RuntimeError, match="masked mode"):
        state.mask_out(torch.ones(3, 8))
    state = state.replace(alive=torch.ones(3, 9))
    gates = torch.ones(3, 8)
    gates[0, 2] = gates[2, 7] = 0
    gates.requires_grad_()
    naive.mask_out(gates.detach())
    after = state.mask_out(gates)
    naive.compute(-1.0)
    after = after.replace(x=after.x * -1 + 1)
    naive.check(after.replace(alive=after.alive.detach()))
    assert (after.alive[:, 0] == 1).all()
    after.alive.sum().backward()
    assert (gates.grad == 1).all()


@pytest.mark.parametrize("gone", ["last", "zero"])
def test_restore_passes_gradients(gone: str) -> None:
    x = noise(1, 5, 2).requires_grad_()
    state = TokenState.begin(x, prefix=1, grid=(2, 2), track=True)
    state.keep(torch.tensor([[3, 1]])).restore(gone).sum().backward()
    reached = torch.tensor([0.0, gone == "last", 1, gone == "last", 1])
    assert torch.equal(x.grad[0], reached[:, None].expand(5, 2))


def test_restore_refuses() -> None:
    state, _ = start(None)
    with pytest.raises(ValueError, match="'last' or 'zero', not 'first'"):
        state.restore("first")
    untracked = state.replace(source=None, canvas=None, place=None)
    with pytest.raises(RuntimeError, match="not tracked"):
        untracked.restore()
    with pytest.raises(RuntimeError, match="tracking"):
        untracked.sizes()
    with pytest.raises(RuntimeError, match="needs_place"):
        untracked.placed()


@PREFIXES
@LAYOUTS
def test_refill_brings_the_whole_grid_back(counts: list[int] | None, prefix: int) -> None:
    state, _ = start(counts, prefix)
    fewer = state.keep_where(torch.arange(max(state.counts)).expand(3, -1) % 3 == 0)
    fewer = fewer.append(noise(3, 4)).replace(notes={"kept": 1})
    full = fewer.refill()
    assert full.layout.is_even and full.layout.count == prefix + 8
    assert torch.equal(full.prefix_tokens(), state.prefix_tokens())
    assert torch.equal(full.tokens()[:, prefix:], fewer.restore("last"))
    assert full.place.tolist() == ([8] * prefix + list(range(8))) * 3
    assert full.notes == {"kept": 1}
    assert torch.equal(full.restore(), fewer.restore())


def test_replace_shares_what_it_does_not_change_and_repr_is_short() -> None:
    state = batch_state([3, 5])
    other = state.replace(prefix=0)
    assert other.x is state.x and other.layout is state.layout and state.prefix == 1
    assert repr(Layout.ragged([4, 6])) in repr(state) and len(repr(state)) < 200
