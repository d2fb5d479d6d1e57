"""What is read off a trace, compared with the trace by the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract.table import FORMS, METHODS, Row
from pictures import traced

from foveate.core import Trace
from foveate.viz.steps import Step, changes, live_tokens, steps

# Prefixes of 0, 1, 2 and 5 tokens, rotary positions, and transformers.
NAMES = [n for n in ("vit", "siglip_average", "deit_distilled", "dinov3", "hf_vit") if n in FORMS]


def check(trace: Trace, index: int) -> list[Step]:
    found = steps(trace, index)
    assert len(found) - len(trace.blocks) in (0, 1)
    for step, block in zip(found, trace.blocks, strict=False):
        state = block.mlp
        assert np.array_equal(step.working, block.active()[index].numpy())
        source = np.where(step.working, state.source[index].numpy(), -1)
        same = source[:, None] == source[None]
        both = step.working[:, None] & step.working[None]
        assert np.array_equal((step.group[:, None] == step.group[None]) & both, same & both)
        for patch in np.flatnonzero(step.working):
            assert step.group[patch] == np.flatnonzero(source == source[patch])[0]
        assert np.array_equal(step.merged, step.working & ((same & both).sum(1) > 1))
        assert (step.group[~step.working] == -1).all()
        assert step.tokens == live_tokens(state, index).sum()
        for group in np.unique(step.group[step.working]):
            assert len(np.unique(step.hue[step.group == group])) == 1
    return found


@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, id=f"{name}-{row.method}")
        for i, row in enumerate(METHODS)
        for j, name in enumerate(NAMES)
        if name == "vit" or (i + j) % 4 == 0
    ],
)
def test_every_method_and_mode(row: Row, name: str) -> None:
    for mode in row.modes:
        model, trace = traced(row.method, name)
        if mode != model.resolved_mode():
            model.mode = mode
            trace = model.trace(torch.randn(2, 3, 48, 48, generator=torch.manual_seed(0)))
        for index in range(2):
            for step in check(trace, index):
                carriers = len(np.unique(step.carrier[step.working]))
                prefix = step.tokens - carriers - step.extra
                allowed = {model.backbone.spec.prefix}
                if "gate_prefix_last" in row.method:
                    allowed = set(range(model.backbone.spec.prefix + 1))
                assert prefix in allowed


def extras(method: str, index: int = 0) -> list[int]:
    return [step.extra for step in steps(traced(method)[1], index)]


def test_tokens_without_a_patch_are_counted() -> None:
    """Fused, package and representative tokens; none for methods that make none."""
    assert extras("evit(keep=0.7, blocks=[1])") == [0, 1, 1, 1]
    assert extras("evit(keep=0.7, blocks=[1], rest='drop')") == [0] * 4
    assert extras("tome(r=4)") == extras("svit(keep=0.7)") == [0] * 4
    assert extras("evovit(keep=0.5)") == [0, 1, 1, 1]
    assert max(extras("spvit(keep=0.5, gate='topk')")) == 3


def test_stages_are_the_blocks_that_change_something() -> None:
    _, trace = traced("evit(keep=0.7, blocks=[1, 3])")
    assert [s.label for s in changes(steps(trace), "working")] == ["block 1", "block 3"]
    _, trace = traced("tome(r=4, blocks=[2])")
    assert changes(steps(trace), "working") == []
    assert [s.label for s in changes(steps(trace), "group")] == ["block 2"]
    _, trace = traced("structural(after_block=3)")
    assert [s.label for s in changes(steps(trace), "group")] == ["after block 3"]


def test_the_larger_group_keeps_its_colour() -> None:
    _, trace = traced("tome(r=10)")
    before, *later = steps(trace)
    assert any(step.merged.any() for step in later)
    for step in later:
        for group in np.unique(step.group):
            members = step.group == group
            sizes = {h: (before.hue[members] == h).sum() for h in before.hue[members]}
            hue = step.hue[members][0]
            assert sizes[hue] == max(sizes.values())
        # Two groups never share a number.
        assert len(np.unique(step.hue)) == len(np.unique(step.group))
        before = step


def test_images_have_numbers() -> None:
    _, trace = traced("evit")
    for index in (-1, 2):
        with pytest.raises(ValueError, match=r"index must lie in 0\.\.1"):
            steps(trace, index)
