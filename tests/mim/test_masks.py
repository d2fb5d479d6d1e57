"""Masks: how many patches are hidden, that all are hidden alike, and that draws repeat."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.mim import BootMAE, ConMIM, Hiding, Mask
from foveate.train.draws import Draws

P16 = (16, 16)


def draws(step: int = 0, seed: int = 0, **options: int) -> Draws:
    return Draws(seed, 0, step, **options)


def check(mask: Mask, batch: int, patches: int, hidden: int) -> None:
    """The three views of a mask say the same."""
    assert mask.visible is not None and mask.masked is not None
    assert mask.hidden.dtype == torch.bool and mask.hidden.shape == (batch, patches)
    assert mask.hidden.sum(1).tolist() == [hidden] * batch
    assert mask.masked.shape == (batch, hidden)
    assert mask.visible.shape == (batch, patches - hidden)
    assert mask.hidden.gather(1, mask.masked).all()
    assert not mask.hidden.gather(1, mask.visible).any()
    both = torch.cat([mask.visible, mask.masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(patches).expand(batch, -1))


# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hiding", "hidden"),
    [
        (Hiding(kind="random", ratio=0.75), 147),
        (Hiding(kind="unit", ratio=0.6), 120),
        (Hiding(kind="unit", ratio=0.75), 148),
        (Hiding(kind="block", ratio=0.75), 147),
        (BootMAE.hiding, 147),
        (ConMIM.hiding, 148),
        (Hiding(kind="block", ratio=120 / 196), 120),
        (Hiding(kind="block", ratio=0.4), 78),
    ],
)
def test_counts_of_the_papers(hiding: Hiding, hidden: int) -> None:
    assert hiding.count((14, 14), P16) == hidden
    check(hiding.draw(4, (14, 14), P16, draws()), 4, 196, hidden)


@pytest.mark.parametrize(
    ("ratio", "patches", "seen"),
    [(0.9, 10, 1), (0.7, 10, 3), (0.75, 49, 12), (0.75, 50, 12), (0.6, 5, 2), (0.34, 3, 1)],
)
def test_what_is_kept_of_random_patches_is_rounded_down(
    ratio: float, patches: int, seen: int
) -> None:
    """Exactly, where 1 - ratio is a hair below the number that is written."""
    assert Hiding(kind="random", ratio=ratio).count((1, patches), (4, 4)) == patches - seen


@pytest.mark.parametrize(("ratio", "units"), [(0.6, 3), (0.61, 4), (0.2, 1), (0.21, 2), (0.8, 4)])
def test_hidden_units_are_rounded_up(ratio: float, units: int) -> None:
    assert Hiding(kind="unit", ratio=ratio, unit=8).count((2, 10), (4, 4)) == 4 * units


def test_a_hair_above_a_whole_number_of_units_is_that_number() -> None:
    assert 0.28 * 5 * 5 > 7
    assert Hiding(kind="unit", ratio=0.28, unit=8).count((10, 10), (4, 4)) == 4 * 7


def test_the_mask_of_every_method_where_none_is_chosen() -> None:
    own = Hiding(kind="unit", ratio=0.6)
    assert Hiding().filled(own) == own
    mine = Hiding(kind="block", ratio=0.5, unit=8)
    assert mine.filled(own) == mine
    blocks = Hiding(kind="block", ratio=0.75, blocks=0.8)
    assert Hiding(ratio=0.5).filled(blocks) == replace(blocks, ratio=0.5)
    assert Hiding(blocks=0.5).filled(blocks) == replace(blocks, blocks=0.5)
    assert Hiding(kind="random").filled(blocks) == Hiding(kind="random", ratio=0.75)


def test_a_share_in_blocks() -> None:
    """BootMAE: 120 of 147 in rectangles, the others anywhere; all patches are hidden alike."""
    few, all_of_them = (
        Hiding(kind="block", ratio=0.75, blocks=share).draw(16, (14, 14), P16, draws())
        for share in (0.1, 1.0)
    )
    check(few, 16, 196, 147)
    # Neighbours agree by chance where nearly all is hidden one by one, and more often in blocks.
    assert alike(few.hidden.view(-1, 14, 14)) < alike(all_of_them.hidden.view(-1, 14, 14)) - 0.05
    assert BootMAE.hiding.blocks == pytest.approx(120 / 147)
    for wrong in (0, 1.1, -0.2):
        with pytest.raises(ValueError, match=r"^mask.blocks must lie in \(0, 1\], got "):
            Hiding(blocks=wrong)


@pytest.mark.parametrize("kind", ["random", "unit", "block"])
@pytest.mark.parametrize("grid", [(4, 10), (12, 2), (7, 21)])
def test_grids_that_are_not_square(kind: str, grid: tuple[int, int]) -> None:
    hiding = Hiding(kind=kind, ratio=0.5, unit=8 if grid[0] % 2 == 0 else 28)
    hidden = hiding.count(grid, (4, 4))
    assert abs(hidden - 0.5 * math.prod(grid)) <= math.prod(grid) / 3
    mask = hiding.draw(5, grid, (4, 4), draws())
    check(mask, 5, math.prod(grid), hidden)
    assert len({tuple(row.tolist()) for row in mask.hidden}) > 1


def test_patches_that_are_not_square() -> None:
    """Units are square in pixels."""
    hidden = Hiding(kind="unit", ratio=0.5, unit=16).draw(3, (4, 8), (8, 4), draws()).hidden
    units = hidden.view(3, 2, 2, 2, 4)
    assert torch.equal(units.all(4).all(2), units.any(4).any(2))
    assert units.all(4).all(2).sum((1, 2)).tolist() == [2, 2, 2]


# What is drawn -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hiding", "cells"),
    [(Hiding(kind="random", ratio=0.75), 49), (Hiding(kind="unit", ratio=0.6, unit=28), 49)],
)
def test_all_places_are_hidden_alike(hiding: Hiding, cells: int) -> None:
    """Chi-square of how often each place, and each pair with the first, is hidden."""
    count, grid = 4000, (7, 7) if hiding.kind == "random" else (49, 49)
    hidden = hiding.draw(count, grid, (4, 4), draws()).hidden.view(count, *grid)
    step = grid[0] // 7
    places = hidden[:, ::step, ::step].reshape(count, cells).double()
    share = float(places.mean())
    for rows, p, expected in (
        (places, share, count * share),
        # Without replacement: beside a hidden first one, one fewer is left for the others.
        (places[places[:, 0] == 1][:, 1:], (share * cells - 1) / (cells - 1), None),
    ):
        wanted = len(rows) * p if expected is None else expected
        square = ((rows.sum(0) - wanted) ** 2 / (wanted * (1 - p))).sum()
        free = rows.shape[1]
        assert abs(float(square) - free) < 4 * math.sqrt(2 * free)


def test_no_two_images_and_no_two_steps_alike() -> None:
    hiding = Hiding(kind="random", ratio=0.75)
    rows = torch.cat([hiding.draw(8, (7, 7), (4, 4), draws(step)).hidden for step in range(4)])
    assert len({tuple(row.tolist()) for row in rows}) == 32


def test_units_are_hidden_as_wholes() -> None:
    hidden = Hiding(kind="unit", ratio=0.6).draw(6, (14, 14), P16, draws()).hidden
    units = hidden.view(6, 7, 2, 7, 2)
    assert torch.equal(units.all(4).all(2), units.any(4).any(2))
    assert units.all(4).all(2).sum((1, 2)).tolist() == [30] * 6


def test_units_of_one_patch_are_random_patches() -> None:
    one = Hiding(kind="unit", ratio=0.75, unit=4).draw(3, (8, 8), (4, 4), draws())
    other = Hiding(kind="random", ratio=0.75).draw(3, (8, 8), (4, 4), draws())
    assert torch.equal(one.hidden, other.hidden)


def alike(hidden: Tensor) -> float:
    """Share of neighbours that are both hidden or both seen."""
    same = [hidden[:, 1:] == hidden[:, :-1], hidden[:, :, 1:] == hidden[:, :, :-1]]
    return float(torch.cat([x.flatten() for x in same]).double().mean())


def test_blocks_are_rectangles_mostly() -> None:
    """Neighbours share their fate far more often than among random patches; and with few patches
    to hide all lie in one rectangle."""
    block, random = (Hiding(kind=kind, ratio=0.4) for kind in ("block", "random"))
    hidden = block.draw(50, (14, 14), P16, draws()).hidden.view(-1, 14, 14)
    loose = random.draw(50, (14, 14), P16, draws()).hidden.view(-1, 14, 14)
    assert alike(hidden) > 0.75 and alike(loose) < 0.55
    boxes = []
    for image in Hiding(kind="block", ratio=0.1).draw(50, (14, 14), P16, draws()).hidden:
        rows, columns = image.view(14, 14).nonzero().T
        boxes.append(int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)))
    assert sorted(boxes)[20] <= 28  # of 20 patches: one block, and a few beside it


# Repeatable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "unit", "block"])
@pytest.mark.parametrize("world", [2, 4])
def test_masks_do_not_depend_on_the_number_of_processes(kind: str, world: int) -> None:
    hiding = Hiding(kind=kind, ratio=0.6, unit=8)
    whole = hiding.draw(8, (8, 8), (4, 4), draws())
    parts = [
        hiding.draw(8 // world, (8, 8), (4, 4), draws(rank=rank, world=world))
        for rank in range(world)
    ]
    assert torch.equal(torch.cat([part.hidden for part in parts]), whole.hidden)
    again = hiding.draw(8, (8, 8), (4, 4), draws())
    assert again.visible is not None and whole.visible is not None
    assert torch.equal(again.hidden, whole.hidden) and torch.equal(again.visible, whole.visible)
    for other in (draws(step=1), draws(seed=1)):
        assert not torch.equal(hiding.draw(8, (8, 8), (4, 4), other).hidden, whole.hidden)


# Made from what is given -------------------------------------------------------------------------


def test_from_noise_hides_where_it_is_largest() -> None:
    mask = Mask.from_noise(torch.tensor([[0.3, 0.9, 0.1, 0.5], [0.8, 0.2, 0.6, 0.4]]), 2)
    assert mask.hidden.tolist() == [[False, True, False, True], [True, False, True, False]]
    assert mask.visible is not None and mask.visible.tolist() == [[2, 0], [1, 3]]
    check(mask, 2, 4, 2)


def test_of_equal_and_unequal_counts() -> None:
    hidden = torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]])
    mask = Mask.of(hidden)
    check(mask, 2, 4, 2)
    assert mask.visible is not None and mask.visible.tolist() == [[1, 3], [0, 2]]  # raster order
    ragged = Mask.of(torch.tensor([[True, False, False], [True, True, False]]))
    assert ragged.visible is None and ragged.masked is None
    assert ragged.hidden.tolist() == [[True, False, False], [True, True, False]]


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.2, math.nan])
def test_a_ratio_that_hides_nothing_or_all(ratio: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^mask.ratio must lie between 0 and 1, got {ratio}: [^.]*$"
    ):
        Hiding(ratio=ratio)


@pytest.mark.parametrize(
    ("hiding", "hidden"),
    [
        (Hiding(kind="random", ratio=0.95), 9),
        (Hiding(kind="block", ratio=0.04), 0),
        (Hiding(kind="unit", ratio=0.9, unit=12), 9),
    ],
)
def test_a_ratio_that_rounds_to_nothing_or_all(hiding: Hiding, hidden: int) -> None:
    with pytest.raises(ValueError, match=f"hides {hidden} of 9 patches: something must be hidden"):
        hiding.count((3, 3), (4, 4))


@pytest.mark.parametrize(("unit", "grid"), [(32, (7, 7)), (8, (7, 7)), (6, (6, 6)), (2, (8, 8))])
def test_a_unit_that_does_not_fit(unit: int, grid: tuple[int, int]) -> None:
    size = f"{grid[0] * 4} x {grid[1] * 4}"
    said = f"^mask.unit={unit} pixels must divide images of {size} and be a multiple of the patch"
    hiding = Hiding(kind="unit", ratio=0.5, unit=unit)
    with pytest.raises(ValueError, match=said + r" of 4 x 4$"):
        hiding.count(grid, (4, 4))
    with pytest.raises(ValueError, match=said):
        hiding.draw(2, grid, (4, 4), draws())


def test_other_choices_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="mask.kind"):
        Hiding(kind="units")
    with pytest.raises(ValueError, match="mask.unit must be at least 1 pixel, got 0"):
        Hiding(unit=0)
    for wrong in (torch.ones(2, 4), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a mask is bool \[B, N\] or \[B, rows, columns\]"):
            Mask.of(wrong)
