"""Multiply-adds against the table of methods.md section 0, within 1 %."""

from __future__ import annotations

import pytest
import torch
from small import built, images, randomise, spec, vit

import foveate
from foveate.core import BackboneSpec
from foveate.core.cost import cost, plan

WIDTHS = {"T": (192, 3), "S": (384, 6), "B": (768, 12)}

# methods.md: GMACs of T, S, B at 224 px.
TABLE = {
    "dense": (1.25, 4.60, 17.56),
    "dynamicvit(keep=0.9)": (1.09, 4.04, 15.51),
    "dynamicvit(keep=0.8)": (0.93, 3.46, 13.32),
    "dynamicvit(keep=0.7)": (0.80, 2.98, 11.48),
    "dynamicvit(keep=0.5)": (0.60, 2.23, 8.56),
    "evit(keep=0.9)": (1.09, 4.02, 15.40),
    "evit(keep=0.8)": (0.94, 3.48, 13.33),
    "evit(keep=0.7)": (0.82, 3.03, 11.61),
    "evit(keep=0.6)": (0.72, 2.64, 10.09),
    "evit(keep=0.5)": (0.63, 2.31, 8.82),
    "tome(r=13)": (0.73, 2.71, 10.37),
    "tome(r=16)": (0.62, 2.29, 8.77),
    "evovit(variant='deit')": (0.82, 3.03, 11.66),
    "svit(keep=0.7)": (0.79, 2.94, 11.33),
    "spvit": (0.66, 2.45, 9.40),
}


def deit(size: str) -> BackboneSpec:
    width, heads = WIDTHS[size]
    return spec(
        width=width,
        heads=heads,
        qkv_cost=(4 * width**2,) * 12,
        mlp_cost=(8 * width**2,) * 12,
        embed_cost=768 * width,
        head_cost=1000 * width,
    )


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("method", TABLE)
def test_table(method: str, size: str) -> None:
    facts = deit(size)
    reducer = None if method == "dense" else built(method, **vars(facts))
    counted = cost(facts, reducer, (14, 14))
    # The table's entry of SPViT leaves its selectors out.
    got = (counted.total - (sum(counted.method) if method == "spvit" else 0)) / 1e9
    expected = TABLE[method]["TSB".index(size)]
    assert got == pytest.approx(expected, rel=0.01, abs=0.005)


def test_the_facts_of_a_real_model_give_the_same_count() -> None:
    """Costs read off the layers: of DeiT-S, and of one with a gated MLP and no class token."""
    with torch.device("meta"):
        model = vit(
            img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=1000
        )
    facts = foveate.apply(model, "evit").backbone.spec
    assert (facts.qkv_cost, facts.mlp_cost) == (deit("S").qkv_cost, deit("S").mlp_cost)
    assert (facts.embed_cost, facts.head_cost) == (768 * 384, 384 * 1000)
    assert cost(facts, None, (14, 14)) == cost(deit("S"), None, (14, 14))


def test_a_plan_is_what_happens() -> None:
    model = foveate.apply(randomise(vit()).eval(), "evit(keep=0.6) + tome(r=2)")
    facts = model.backbone.spec
    blocks = model.trace(images()).blocks
    for tokens, block in zip(plan(facts, model.reducer, (6, 6)), blocks, strict=True):
        got = [s.layout.count for s in (block.attended, block.fed, block.left)]
        assert got == [tokens.attended, tokens.fed, tokens.left]
