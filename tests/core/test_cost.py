"""Multiply-adds against the table of methods.md section 0 within 1 %, by running and by formula."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from small import built, images, randomise, spec, vit

import foveate
from foveate.core import Backbone, BackboneSpec, ReducedViT
from foveate.core.budget import parse_budget, solve_budget
from foveate.core.cost import (
    BlockTokens,
    cost,
    expected,
    linear_cost,
    measured,
    on_meta,
    run,
    run_on_meta,
)
from foveate.registry import make, parse

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


@lru_cache
def parts(size: str) -> Backbone:
    """A DeiT on the meta device."""
    width, heads = WIDTHS[size]
    options = dict(img_size=224, patch_size=16, depth=12, num_classes=1000)
    with torch.device("meta"):
        model = vit(embed_dim=width, num_heads=heads, **options).eval()
    return foveate.apply(model, "static").backbone


def deit(size: str) -> BackboneSpec:
    """Its facts, as the papers have them."""
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
    if method == "dense":
        counted = cost(facts, None, (14, 14))
    else:
        with torch.device("meta"):
            reducer = built(method, **vars(facts))
        if reducer.fixed_count:
            counted = run_on_meta(facts, reducer, (14, 14))
        else:  # the table's entry of SPViT leaves its selectors out
            counted = cost(facts, reducer, (14, 14), own=method != "spvit")
    wanted = TABLE[method]["TSB".index(size)]
    assert counted.total / 1e9 == pytest.approx(wanted, rel=0.01, abs=0.005)


def test_the_facts_of_a_real_model_give_the_same_count() -> None:
    """Costs read off the layers of DeiT-S."""
    facts = parts("S").spec
    assert (facts.qkv_cost, facts.mlp_cost) == (deit("S").qkv_cost, deit("S").mlp_cost)
    assert (facts.embed_cost, facts.head_cost) == (768 * 384, 384 * 1000)
    assert cost(facts, None, (14, 14)) == cost(deit("S"), None, (14, 14))
    block = parts("S").blocks[0]
    assert linear_cost(block) == 12 * 384**2 and linear_cost(block.mlp, None) == 8 * 384**2


# By running --------------------------------------------------------------------------------------


def small(method: str, **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)).eval(), method, check=False)
    randomise(model.reducer, seed=1)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"global_pool": "map"}], ids=str)
def test_running_without_a_reduction_counts_what_the_formula_counts(options: dict) -> None:
    """``random(keep=1.0)`` computes nothing of its own."""
    model = small("random(keep=1.0)", **options)
    found = run(model, images(1))
    assert found == cost(model.backbone.spec, None, (6, 6))
    assert found.tokens == (BlockTokens(37, 37, 37),) * 4


@pytest.mark.parametrize(
    "method", ["evit(keep=0.6, blocks=[1]) + tome(r=2, blocks=[2, 3])", "evovit", "tome(r=5)"]
)
def test_what_is_counted_is_what_happens(method: str) -> None:
    model = small(method)
    here, trace = run(model, images(1)), model.trace(images())
    assert run_on_meta(model.backbone.spec, on_meta(model.reducer), (6, 6)) == here
    assert measured(trace) == [list(here.tokens)] * 3
    got = [[s.layout.count for s in (b.attention, b.mlp, b.output)] for b in trace.blocks]
    assert got == [[t.attention, t.mlp, t.output] for t in here.tokens]
    # What it leaves of the model costs the same by formula, and its own products come on top.
    rest = cost(model.backbone.spec, model.reducer, (6, 6), here.tokens, own=False)
    assert 1.0 < here.total / rest.total < 1.1


def test_an_image_of_another_size_is_counted_at_that_size() -> None:
    model = small("evit(keep=0.5)", dynamic_img_size=True)
    found = run_on_meta(model.backbone.spec, on_meta(model.reducer), (8, 4))
    assert found == run(model, images(1, (64, 32)))
    assert found.tokens[0].attention == 33


def test_a_copy_on_the_meta_device_leaves_the_model_alone() -> None:
    model = vit().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    copied = on_meta(model)
    assert all(p.is_meta for p in copied.parameters()) and not copied.training
    assert [n for n, _ in copied.named_parameters()] == list(before)
    assert model.training and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# By formula --------------------------------------------------------------------------------------

PER_IMAGE = ("ats(K=12)", "dynamicvit(gate='argmax')", "svit", "svit(reactivate=False)", "spvit")


@pytest.mark.parametrize("method", PER_IMAGE)
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_the_formula_of_measured_tokens_is_what_a_run_counts(method: str, options: dict) -> None:
    model = small(method, **options)
    tokens = measured(model.trace(images()))
    assert tokens[0] != tokens[1] or tokens[1] != tokens[2]
    for b in range(3):
        found = run(model, images()[b : b + 1])
        assert found == cost(model.backbone.spec, model.reducer, (6, 6), tokens[b])


def test_expected_tokens() -> None:
    facts = spec(depth=4, grid=(6, 6))

    def tokens(method: str | None) -> list[tuple[int, int, int]]:
        reducer = None if method is None else parse(method)
        if reducer is not None:
            reducer.build(facts)
        return [(t.attention, t.mlp, t.output) for t in expected(facts, reducer, (6, 6))]

    assert tokens(None) == [(37, 37, 37)] * 4
    gated = "dynamicvit(keep=0.5, gate='argmax', blocks=[1, 2]{})"
    assert tokens(gated.format("")) == [(37,) * 3, (19,) * 3, (10,) * 3, (10,) * 3]
    recalling = gated.format(", recall_before=3")
    assert tokens(recalling) == [(37,) * 3, (19,) * 3, (10,) * 3, (37,) * 3]
    assert tokens("ats(K=12, blocks=[1])") == [(37,) * 3, (37, 13, 13), (13,) * 3, (13,) * 3]
    assert tokens("ats(K=12, blocks=[1], recall_before='head')")[3] == (13,) * 3


def test_what_is_recalled_costs_as_much_as_what_never_left() -> None:
    facts = spec(depth=4, grid=(6, 6), pools_patches=True, pool_cost=7)
    totals = {}
    for recall in ("None", "3", "'head'"):
        reducer = parse(f"dynamicvit(keep=0.5, gate='argmax', blocks=[1], recall_before={recall})")
        reducer.build(facts)
        totals[recall] = cost(facts, reducer, (6, 6)).total
    whole, part = (
        n * (facts.qkv_cost[0] + facts.mlp_cost[0]) + 2 * n**2 * facts.heads * facts.head_dim
        for n in (37, 19)
    )
    assert totals["3"] - totals["None"] == whole - part + 18 * 7
    assert totals["'head'"] - totals["None"] == 18 * 7


# Budgets -----------------------------------------------------------------------------------------


@lru_cache
def shallow() -> Backbone:
    with torch.device("meta"):
        model = vit(img_size=224, patch_size=16, embed_dim=192, depth=3, num_heads=3).eval()
    return foveate.apply(model, "static").backbone


@pytest.mark.parametrize("method", ["evit", "tome", "svit"])
def test_a_solved_budget_is_met(method: str) -> None:
    backbone = shallow()
    asked: list[dict] = []

    def make_it(options: dict) -> object:
        asked.append(dict(options))
        return make(method, options)

    reducer = solve_budget("0.75x", backbone, make_it)
    assert reducer.spec is None  # the caller builds it
    rate = reducer.rate
    assert all(set(options) <= {rate} for options in asked)
    value = getattr(reducer, rate)
    if isinstance(value, float):  # with no more digits than are needed
        assert len(repr(value)) <= len("0.123")
    reducer.build(backbone.spec)
    found = (
        run_on_meta(backbone.spec, reducer.to("meta"), (14, 14))
        if reducer.fixed_count
        else cost(backbone.spec, reducer, (14, 14))
    )
    assert found.total / cost(backbone.spec, None, (14, 14)).total == pytest.approx(0.75, rel=0.01)


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.6x", 0.6), ("60%", 0.6), ("100 %", 1.0), (" .5x ", 0.5), ("2.5 GMACs", 0.25)]
    + [("800M", 0.08), ("0.001 TFLOPs", 0.1), ("5G", 0.5), ("10 gmac", 1.0)],
)
def test_spellings_of_a_budget(text: str, share: float) -> None:
    assert parse_budget(text, 1e10) == pytest.approx(share * 1e10)


@pytest.mark.parametrize("text", ["", "fast", "3", "-1G", "0.6", "1e9", "2.9 KMACs", 3])
def test_what_does_not_read_as_a_budget(text: object) -> None:
    with pytest.raises(ValueError, match="budget must read like '2.9 GMACs'"):
        parse_budget(text, 1e10)


@pytest.mark.parametrize("text", ["11G", "1.02x", "0x", "0 GMACs"])
def test_a_budget_beyond_the_dense_model(text: str) -> None:
    with pytest.raises(ValueError, match="the model without a method costs, 10"):
        parse_budget(text, 1e10)


def test_budgets_that_cannot_be_met() -> None:
    backbone = shallow()
    with pytest.raises(ValueError, match="structural has no rate that could be set"):
        solve_budget("0.6x", backbone, lambda options: make("structural", options))
    with pytest.raises(ValueError, match=r"svit cannot meet .* within 1%: it reaches from .* to"):
        solve_budget("0.05x", backbone, lambda options: make("svit", options))
