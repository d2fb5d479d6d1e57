"""Layout against loops over images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import noise

from foveate.core import Layout, Selection

CPU = torch.device("cpu")
# Images without a token are legal; a batch without any image is not.
lens = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@given(lens)
def test_ragged_facts(lengths: list[int]) -> None:
    layout = Layout.ragged(lengths)
    assert layout.lengths == tuple(lengths)
    assert layout.batch == len(lengths) and layout.total == sum(lengths)
    assert layout.longest == max(lengths)
    assert layout.is_even == (len(lengths) == 1)
    assert layout.start(CPU).tolist() == [sum(lengths[:b]) for b in range(len(lengths))]
    assert layout.image(CPU).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert layout.resized(2).lengths == tuple(n + 2 for n in lengths)
    valid = layout.valid(CPU)
    if layout.is_even:
        assert valid is None
    else:
        assert valid.tolist() == [[i < n for i in range(max(lengths))] for n in lengths]


@given(lens, st.booleans())
def test_rectangles_and_back(lengths: list[int], even: bool) -> None:
    if even:
        lengths = [lengths[0]] * len(lengths)
    layout = Layout.even(len(lengths), lengths[0]) if even else Layout.ragged(lengths)
    flat = noise(sum(lengths), 3)
    rect = layout.rect(flat, -7.0)
    assert rect.shape == (len(lengths), max(lengths), 3)
    parts = list(flat.split(list(lengths)))
    for b, (n, part) in enumerate(zip(lengths, parts, strict=True)):
        assert torch.equal(rect[b, :n], part)
        assert (rect[b, n:] == -7.0).all()
    assert torch.equal(layout.flat(rect), flat)
    assert torch.allclose(layout.sum(flat), torch.stack([part.sum(0) for part in parts]))
    per_image = noise(len(lengths), 2)
    spread = [per_image[b] for b, n in enumerate(lengths) for _ in range(n)]
    got = layout.spread(per_image)
    assert got.tolist() == [row.tolist() for row in spread]


@given(lens, st.data())
def test_rows_point_at_tokens(lengths: list[int], data: st.DataObject) -> None:
    layout = Layout.ragged(lengths)
    chosen = [data.draw(st.lists(st.integers(0, n - 1), max_size=4)) if n else [] for n in lengths]
    width = max(len(row) for row in chosen)
    index = torch.tensor([row + [0] * (width - len(row)) for row in chosen], dtype=torch.long)
    index = index.view(len(lengths), width)
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    expected = [starts[b] + i for b, row in enumerate(chosen) for i in row]
    assert layout.rows(Selection(index, tuple(map(len, chosen)))).tolist() == expected
    if width and all(lengths):  # without lengths every entry counts
        everything = [starts[b] + i for b, row in enumerate(index.tolist()) for i in row]
        assert layout.rows(Selection(index)).tolist() == everything


def test_even_rectangles_are_views() -> None:
    flat = noise(12, 3)
    assert Layout.even(3, 4).rect(flat).data_ptr() == flat.data_ptr()


def test_gradients_pass_through_ragged_rectangles() -> None:
    layout = Layout.ragged([1, 3])
    flat = noise(4, 2).requires_grad_()
    layout.flat(layout.rect(flat) * 2).sum().backward()
    assert torch.equal(flat.grad, torch.full((4, 2), 2.0))


@pytest.mark.parametrize("layout", [Layout.even(2, 3), Layout.ragged([1, 4])])
def test_repr_says_what_it_is(layout: Layout) -> None:
    assert eval(repr(layout), {"Layout": Layout}).lengths == layout.lengths
