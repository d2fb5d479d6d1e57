"""Each verb of TokenState by itself; test_tokens_random.py runs them in any order."""

from __future__ import annotations

import re

import pytest
import torch
from naive_tokens import Naive, beginning, chosen, padded
from small import batch_state, noise
from torch import Tensor

from foveate.core import Context, Layout, Selection, TokenState, disposal

LAYOUTS = pytest.mark.parametrize("counts", [None, [8, 3, 5], [2, 8, 1]], ids=str)
PREFIXES = pytest.mark.parametrize("prefix", [0, 1, 5])


def start(counts: list[int] | None, prefix: int = 1) -> tuple[TokenState, Naive]:
    return beginning(counts, prefix=prefix)


def everywhere(*positions: int) -> Selection:
    """The same positions in all three images."""
    return chosen([positions] * 3)


@PREFIXES
def test_beginning(prefix: int) -> None:
    x = noise(2, prefix + 6, 4)
    context = Context(prefix, (2, 3))
    state = TokenState.begin(x, context, place=True, track=True)
    assert (state.prefix, state.grid, state.patches, state.batch) == (prefix, (2, 3), 6, 2)
    assert state.context is context and state.block == 0
    assert state.x.data_ptr() == x.data_ptr() and torch.equal(state.tokens(), x)
    assert state.place.tolist() == ([6] * prefix + list(range(6))) * 2
    assert state.source.tolist() == [list(range(prefix, prefix + 6))] * 2
    assert torch.equal(state.canvas, x[:, prefix:])
    assert torch.equal(state.restore(), x[:, prefix:])
    bare = TokenState.begin(x, context)
    assert (
        bare.place is bare.source is bare.canvas is bare.size is bare.alive is bare.parked is None
    )


@pytest.mark.parametrize("counts", [[4, 6], 3])
def test_new_values_for_the_same_tokens(counts: list[int] | int) -> None:
    state = batch_state(counts).replace(block=2).note("seen", 1)
    x = noise(state.layout.total, 4, seed=3)
    changed = state.with_tokens(x)
    assert changed.x is x and changed.layout is state.layout
    assert changed.block == 2 and changed.notes == {"seen": 1}
    if isinstance(counts, int):
        assert torch.equal(state.with_tokens(x.view(2, 4, 4)).x, x)
    packed = state.with_tokens(x[None])  # as hooks see tokens of images that differ
    assert torch.equal(packed.x, x)
    total = state.layout.total
    wrong = (x[:, :3], x[1:], x[None, :, :3], x[:, :, None, None])
    for values in wrong:
        given = values.flatten(0, 1) if values.ndim == 3 else values
        message = (
            f"new values must be [{total}, 4], the tokens of all images in one tensor, got "
            f"{list(given.shape)}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            state.with_tokens(values)


def test_notes_are_added_and_the_state_before_has_none() -> None:
    state = batch_state(3)
    noted = state.note("a", 1).note("b", [2]).note("a", 3)
    assert noted.notes == {"a": 3, "b": [2]} and state.notes == {}


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
    kept = state.keep(chosen(rows))
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
    return state.merge(chosen(keep), chosen(src), padded(into), weight, track_size=track)


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
    into = torch.zeros(3, 2, dtype=torch.long)
    after = state.merge(everywhere(*range(6)), everywhere(6, 7), into, torch.zeros(3, 8))
    assert torch.equal(after.tokens(), state.tokens()[:, :7])


def test_merge_keeps_the_dtype_and_passes_gradients() -> None:
    x = noise(1, 4, 3).requires_grad_()
    context = Context(0, (1, 4))
    state = TokenState.begin(x, context)
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    args = chosen([[2, 3]]), chosen([[0, 1]]), torch.tensor([[1, 1]])
    after = state.merge(*args, weight)
    after.x[1].sum().backward()
    share = torch.tensor([1.0, 2.0, 0.0, 4.0]) / 7
    torch.testing.assert_close(x.grad[0], share[:, None].expand(4, 3))
    assert weight.grad[0, 2] == 0 and (weight.grad[0, [0, 1, 3]] != 0).all()
    half = TokenState.begin(x.detach().bfloat16(), context)
    assert half.merge(*args, weight).x.dtype == torch.bfloat16


def test_sizes_of_fused_tokens_are_zero_whenever_sizes_begin() -> None:
    """A token that stands for no patch weighs nothing, before or after the first merge."""
    zeros = torch.zeros(3, 1, dtype=torch.long)
    for sized_first in (True, False):
        state, naive = start(None)
        if sized_first:
            naive.merge([list(range(8))] * 3, [[]] * 3, [[]] * 3, torch.ones(3, 8), True)
            state = state.merge(everywhere(*range(8)), everywhere(), zeros[:, :0], torch.ones(3, 8))
        naive.fuse([[0, 1, 2]] * 3, torch.ones(3, 8), [True] * 3)
        state = disposal.fuse(state, everywhere(0, 1, 2), torch.ones(3, 8))
        naive.merge([[1, 2, 3]] * 3, [[0]] * 3, [[0]] * 3, torch.ones(3, 4), True)
        state = state.merge(everywhere(1, 2, 3), everywhere(0), zeros, torch.ones(3, 4))
        naive.check(state)


def test_append_and_discard_undo_each_other() -> None:
    for counts in (None, [8, 3, 5]):
        state, naive = start(counts)
        token = noise(3, 4, seed=3).requires_grad_()
        longer = state.append(token)
        assert longer.layout.is_even == (counts is None)
        assert torch.equal(longer.discard_last().x, state.x)
        naive.check(longer.discard_last())
        some = torch.tensor([True, False, True])
        longer = state.append(token, some)
        assert longer.counts == tuple(n + int(s) for n, s in zip(state.counts, some, strict=True))
        naive.check(longer.discard_last(some))
        longer.x.sum().backward()
        assert torch.equal(token.grad, some[:, None].float().expand(3, 4))


# Parking -------------------------------------------------------------------------------------


@LAYOUTS
def test_parked_tokens_come_back_where_they_stood(counts: list[int] | None) -> None:
    state, naive = start(counts)
    rows = [[n - 1, 0][:n] for n in state.counts]
    naive.park([[0] + [i + 1 for i in row] for row in rows])
    inner = state.park(chosen(rows))
    naive.check(inner)
    naive.compute(3.0)
    inner = inner.replace(x=inner.x * 3 + 1, block=2).note("seen", 1)
    inner = inner.replace(extras={**inner.extras, "only_inside": inner.x})
    change = noise(3, 4, seed=9)
    outside = inner.recall(change)
    naive.recall(change)
    naive.check(outside)
    assert outside.parked is None
    assert outside.notes == {"seen": 1} and sorted(outside.extras) == ["mark"]
    assert outside.block == 2
    with pytest.raises(RuntimeError, match="no tokens are parked"):
        outside.recall()


@LAYOUTS
def test_tokens_parked_within_parked_ones_come_back_in_two_steps(counts: list[int] | None) -> None:
    state, naive = start(counts)
    outer_rows = [list(range(n))[::-1][:4] for n in state.counts]
    naive.park([[0] + [i + 1 for i in row] for row in outer_rows])
    outer = state.park(chosen(outer_rows))
    naive.compute(2.0)
    outer = outer.with_tokens(outer.x * 2 + 1)
    inner_rows = [[n - 1, 0][:n] for n in outer.counts]
    naive.park([[0] + [i + 1 for i in row] for row in inner_rows])
    inner = outer.park(chosen(inner_rows))
    naive.compute(-1.0)
    inner = inner.with_tokens(inner.x * -1 + 1).note("inside", True)
    naive.check(inner)
    seen = inner.recalled()
    naive.recalled().check(seen)
    one = inner.recall()
    naive.recall()
    naive.check(one)
    assert one.parked is not None and one.layout.lengths == outer.layout.lengths
    two = one.recall()
    naive.recall()
    naive.check(two)
    assert two.parked is None and two.layout.lengths == state.layout.lengths
    assert torch.equal(two.x, seen.x) and two.notes == {"inside": True}


def test_looking_at_a_parked_state_from_outside() -> None:
    """``recalled`` and ``restore`` also work while a representative is there."""
    state, _ = start(None)
    inner = state.park(everywhere(1, 5)).append(noise(3, 4, seed=1))
    inner = inner.replace(x=inner.x + 1)
    seen = inner.recalled()
    assert seen.layout.lengths == state.layout.lengths
    expected = state.tokens().clone()
    expected[:, [0, 2, 6]] += 1
    assert torch.equal(seen.tokens(), expected)
    assert torch.equal(inner.restore(), expected[:, 1:])


def test_parking_everything_leaves_images_without_tokens() -> None:
    state, _ = start(None)
    inner = state.park(everywhere(), with_prefix=False)
    assert inner.layout.total == 0 and inner.layout.lengths == (0, 0, 0)
    assert torch.equal(inner.recall().x, state.x)
    inner = state.park(chosen([[], [4], []]), with_prefix=False)
    assert inner.layout.lengths == (0, 1, 0)
    assert torch.equal(inner.replace(x=inner.x * 0).recall().x[9 + 4], torch.zeros(4))


# Masked --------------------------------------------------------------------------------------


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


# The full grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["last", "zero"])
def test_restore_passes_gradients(gone: str) -> None:
    x = noise(1, 5, 2).requires_grad_()
    state = TokenState.begin(x, Context(1, (2, 2)), track=True)
    state.keep(chosen([[3, 1]])).restore(gone).sum().backward()
    reached = torch.tensor([0.0, gone == "last", 1, gone == "last", 1])
    assert torch.equal(x.grad[0], reached[:, None].expand(5, 2))


def test_restore_refuses() -> None:
    state, _ = start(None)
    with pytest.raises(ValueError, match="'last' or 'zero', not 'first'"):
        state.restore("first")
    untracked = state.replace(source=None, canvas=None, place=None)
    for ask in (untracked.restore, untracked.patch_counts, lambda: untracked.add(noise(3, 8, 4))):
        with pytest.raises(RuntimeError, match="begin it with track=True"):
            ask()
    with pytest.raises(RuntimeError, match="needs_place"):
        untracked.is_patch()


@PREFIXES
@LAYOUTS
def test_refill_brings_the_whole_grid_back(counts: list[int] | None, prefix: int) -> None:
    state, _ = start(counts, prefix)
    fewer = state.keep_where(torch.arange(max(state.counts)).expand(3, -1) % 3 == 0)
    fewer = fewer.append(noise(3, 4)).replace(notes={"kept": 1}, block=3)
    full = fewer.refill()
    assert full.layout.is_even and full.layout.count == prefix + 8
    assert torch.equal(full.prefix_tokens(), state.prefix_tokens())
    assert torch.equal(full.tokens()[:, prefix:], fewer.restore("last"))
    assert full.place.tolist() == ([8] * prefix + list(range(8))) * 3
    assert full.notes == {"kept": 1} and full.block == 3 and full.context is state.context
    assert torch.equal(full.restore(), fewer.restore())


def with_mask(mode: str, mask: Tensor) -> TokenState:
    """What a pass with a keep mask begins with: three images, 1 prefix token, a 2 x 4 grid."""
    context = Context(1, (2, 4), mode, mask=mask, original=tuple(mask.sum(1).tolist()))
    state = TokenState.begin(noise(3, 9, 4), context, place=True, track=True)
    if mode == "packed":
        return state.keep_where(mask)
    alive = torch.ones(3, 9)
    alive[:, 1:] = mask.float()
    return state.replace(alive=alive)


def test_refill_leaves_out_what_the_mask_of_the_pass_leaves_out() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for image, patches in enumerate(([0, 3, 5], [1, 2], [2, 4, 5, 6, 7])):
        mask[image, patches] = True
    packed, masked = (with_mask(mode, mask) for mode in ("packed", "masked"))
    begun = packed
    # Drop the first of each image, then compute.
    few = packed.keep_where((torch.arange(5) > 0).expand(3, 5))
    gates = torch.ones(3, 8)
    gates[torch.arange(3), mask.int().argmax(1)] = 0
    dead = masked.mask_out(gates)
    packed, masked = (s.with_tokens(s.x * 2).refill() for s in (few, dead))
    # The same patches as at the beginning, and no others.
    assert packed.counts == begun.counts == (3, 2, 5)
    assert torch.equal(packed.place, begun.place) and torch.equal(packed.source, begun.source)
    assert packed.context.mask is mask
    assert masked.alive.tolist() == [[1.0, *row] for row in mask.float().tolist()]
    assert masked.layout.lengths == (9, 9, 9)
    for gone in ("last", "zero"):
        assert torch.equal(masked.restore(gone), packed.restore(gone))
    # What was dropped comes back at its last value, the others at their new ones.
    expected = with_mask("masked", mask).restore("zero") * (1 + gates[..., None])
    assert torch.equal(packed.restore("zero"), expected)


def test_refill_in_the_masked_mode_brings_everything_to_life() -> None:
    state, _ = start(None)
    gates = torch.zeros(3, 8)
    dead = state.replace(alive=torch.ones(3, 9)).mask_out(gates).append(noise(3, 4))
    full = dead.refill()
    assert torch.equal(full.alive, torch.ones(3, 9)) and torch.equal(full.x, state.x)


@LAYOUTS
@PREFIXES
def test_add_reaches_every_patch_wherever_it_is(counts: list[int] | None, prefix: int) -> None:
    """Merged, dropped, parked; prefix and fused tokens get nothing."""
    values = noise(3, 8, 4, seed=7)
    state, naive = start(counts, prefix)
    few = merged(state, naive, True)
    naive.keep([list(range(n))[1:] or [0] for n in few.counts])
    few = few.keep(chosen([list(range(n))[1:] or [0] for n in few.counts]))
    naive.append(torch.ones(3, 4), [True] * 3)
    few = few.append(torch.ones(3, 4))
    naive.park([list(range(prefix)) + [n + prefix - 1, prefix] for n in few.counts])
    inner = few.park(chosen([[n - 1, 0] for n in few.counts]))
    before = inner.restore()
    naive.add(values)
    after = inner.add(values)
    naive.check(after)
    assert torch.equal(after.prefix_tokens(), inner.prefix_tokens())
    row = torch.tensor(after.layout.lengths).cumsum(0) - 2  # the fused token is second to last
    assert torch.equal(after.x[row], torch.ones(3, 4))
    # A patch whose token it has to itself, or that is gone, shows exactly what was added.
    source = few.source
    alone = torch.stack([(source == source[:, [p]]).sum(1) == 1 for p in range(8)], 1)
    alone |= source < 0
    assert alone.any() and not alone.all()
    torch.testing.assert_close(after.restore()[alone], (before + values)[alone])
    # Of the patches of a merged token, each shows the mean.
    for b in range(3):
        for token in source[b][source[b] >= 0].unique():
            group = source[b] == token
            expected = before[b, group] + values[b, group].mean(0)
            torch.testing.assert_close(after.restore()[b, group], expected)
    # Nothing that was there has changed.
    assert torch.equal(inner.restore(), before)


def test_add_passes_gradients_to_what_is_added() -> None:
    state, _ = start(None)
    values = noise(3, 8, 4).requires_grad_()
    state.keep(everywhere(0, 5)).add(values).restore().sum().backward()
    assert torch.equal(values.grad, torch.ones(3, 8, 4))


def test_add_keeps_the_dtype() -> None:
    state, _ = start(None)
    half = state.replace(x=state.x.bfloat16(), canvas=state.canvas.bfloat16())
    after = half.keep(everywhere(2, 3)).add(torch.ones(3, 8, 4))
    assert after.x.dtype == after.canvas.dtype == after.restore().dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 8, 3), (3, 9, 4), (1, 8, 4), (3, 2, 4, 4), (8, 4)])
def test_add_refuses_values_of_another_shape(shape: tuple[int, ...]) -> None:
    message = f"values to add must be [3, 8, 4], one for every patch of the grid, got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(None)[0].add(torch.zeros(shape))


def test_replace_shares_what_it_does_not_change_and_repr_is_short() -> None:
    state = batch_state([3, 5])
    other = state.replace(block=3)
    assert other.x is state.x and other.layout is state.layout and other.context is state.context
    assert state.block == 0
    assert repr(Layout.ragged([4, 6])) in repr(state) and len(repr(state)) < 200
