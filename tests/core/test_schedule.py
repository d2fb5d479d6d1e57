"""Schedules: the token counts of the papers, warm-up, and everything that is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import pytest
import torch
from small import noise, vit

import foveate
from foveate.core import (
    Backbone,
    ReducedViT,
    Schedule,
    TokenState,
    check_blocks,
    check_keep,
    split_evenly,
    stage_blocks,
)
from foveate.core.cost import expected
from foveate.registry import parse


@lru_cache
def parts(grid: tuple[int, int]) -> Backbone:
    """A narrow DeiT: widths do not change counts."""
    size = (16 * grid[0], 16 * grid[1])
    model = vit(img_size=size, patch_size=16, embed_dim=8, num_heads=1, depth=12)
    return foveate.apply(model.eval(), "static", check=False).backbone


@lru_cache
@torch.no_grad()
def fed(method: str, grid: tuple[int, int] = (14, 14)) -> list[int]:
    """Patch tokens that the feed forward of each block of a DeiT sees."""
    backbone, seen = parts(grid), []
    reducer = parse(method)
    reducer.build(backbone.spec)
    if not reducer.fixed_count:
        return [tokens.mlp - 1 for tokens in expected(backbone.spec, reducer, grid)]

    def watch(name: str, state: TokenState) -> None:
        if name == "mlp":
            seen.append(state.layout.longest - 1)

    model = ReducedViT(backbone, reducer.eval())
    state = model.begin(noise(1, 3, 16 * grid[0], 16 * grid[1]))
    for block in range(12):
        state = model.step(block, state, watch)
    return seen


def stages(method: str) -> list[int]:
    return [fed(method)[block] for block in (2, 3, 6, 9)]


def test_evit() -> None:
    """At keep 0.7 each stage keeps 138, 98 and 70, the fused token being a candidate."""
    assert stages("evit(keep=0.7)") == [196, 138 + 1, 98 + 1, 70 + 1]
    assert stages("evit(keep=0.7, rest='drop')") == [196, 138, 97, 68]
    assert stages("evit(keep=0.5)") == [196, 98 + 1, 50 + 1, 26 + 1]
    assert stages("evit(keep=1.0)") == [196] * 4


@pytest.mark.parametrize("name", ["dynamicvit", "attention", "random", "static"])
def test_dynamicvit_and_the_controls(name: str) -> None:
    counts = [196, 137, 96, 67]
    assert stages(f"{name}(keep=0.7)") == counts
    blocks = fed(f"{name}(keep=0.7)")
    assert blocks == [counts[sum(b >= s for s in (3, 6, 9))] for b in range(12)]
    assert stages(f"{name}(keep=0.9)") == [196, 176, 158, 142]


def test_spvit_and_tokenmergence() -> None:
    assert stages("tokenmergence(keep=0.7)") == [196, 138, 97, 68]
    # floor(196 * (.617, .369, .137)) patches and one, two, three packages
    assert stages("spvit") == [196, 120 + 1, 72 + 2, 26 + 3]
    assert stages("spvit(accumulate=True)") == [196, 120 + 1, 72 + 1, 26 + 1]
    assert stages("spvit(keep=[1.0, 1.0, 0.5])") == [196, 196, 196, 98 + 1]


def test_tome() -> None:
    """Counts include the class token, as methods.md has them."""
    r13 = [n + 1 for n in fed("tome(r=13)")]
    assert [197, *r13] == [197 - 13 * i for i in range(13)]
    assert r13[-2:] == [54, 41]
    r16 = [n + 1 for n in fed("tome(r=16)")]
    assert r16[-2:] == [21, 11]  # the last block may only halve
    falling = fed("tome(r=13, inflection=-1.0)")
    removed = [a - b for a, b in zip([196, *falling], falling, strict=False)]
    assert removed == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert sum(removed) == 151
    rising = fed("tome(r=13, inflection=1.0)")
    removed = [a - b for a, b in zip([196, *rising], rising, strict=False)]
    assert removed == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]
    assert fed("tome(r=[8, 4])") == [188] + [184] * 11
    assert fed("tome(r=4, blocks=[2, 5])")[::3] == [196, 192, 188, 188]


def test_evovit_and_structural_and_svit() -> None:
    assert fed("evovit(keep=0.5)") == [196] * 4 + [99] * 8
    assert fed("evovit(keep=0.5, variant='deit')") == [196] * 4 + [98] * 8
    assert fed("structural") == [196] * 6 + [49] * 6
    assert fed("structural", grid=(3, 5)) == [15] * 6 + [6] * 6
    assert fed("svit(keep=0.7)") == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert fed("ats(K=49)") == [196] * 3 + [49] * 9


@pytest.mark.parametrize("depth", [4, 12, 16, 20, 24])
def test_stages_start_at_the_quarters(depth: int) -> None:
    blocks = stage_blocks(depth)
    assert blocks == (depth // 4, depth // 2, 3 * depth // 4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shallow_models_have_fewer_stages(depth: int) -> None:
    assert stage_blocks(depth) == tuple(range(1, depth))


# Counts ------------------------------------------------------------------------------------


ROUND = {"floor": math.floor, "ceil": math.ceil, "nearest": round}


@pytest.mark.parametrize("rounding", ROUND)
def test_counts_do_not_depend_on_rounding_errors(rounding: str) -> None:
    """100 * 0.29 is 28.999999999999996, 100 * 0.07 is 7.000000000000001, and 150 * 0.07 is not
    10.5 but more."""
    for percent in range(1, 100):
        schedule = Schedule((0,), percent / 100, rounding=rounding)
        for original in (1, 49, 100, 150, 196, 256, 400, 576, 1024):
            wanted = ROUND[rounding](Fraction(original * percent, 100))
            assert schedule.count(0, original, original) == max(1, wanted)


def test_rates_of_the_original_multiply() -> None:
    schedule = Schedule((0, 1, 2), 0.7)
    assert [schedule.rate(s) for s in range(3)] == pytest.approx([0.7, 0.49, 0.343])
    current = Schedule((0, 1, 2), 0.7, relative="current")
    assert [current.rate(s) for s in range(3)] == [0.7] * 3
    each = Schedule((0, 1, 2), (0.9, 0.5, 0.2))
    assert [each.count(s, 100, 100) for s in range(3)] == [90, 50, 20]


def test_shares_of_the_original() -> None:
    """What a ratio loss aims at."""
    assert [Schedule((0, 1), 0.7).share(s) for s in (0, 1)] == pytest.approx([0.7, 0.49])
    current = Schedule((0, 1), (0.7, 0.5), relative="current")
    assert [current.share(s) for s in (0, 1)] == pytest.approx([0.7, 0.35])
    assert [Schedule((0, 1), (0.7, 0.5)).share(s) for s in (0, 1)] == [0.7, 0.5]
    warming = Schedule((0, 1), 0.5, relative="current", warmup=(0.0, 1.0))
    assert warming.share(1, 0.5) == pytest.approx(0.75**2)


def test_a_method_may_count_the_other_way() -> None:
    assert stages("evit(keep=0.7, rest='drop', relative='original', rounding='floor')") == [
        196,
        137,
        96,
        67,
    ]
    assert stages("dynamicvit(keep=0.7, relative='current', rounding='ceil')")[1:] == [138, 97, 68]


def test_counts_stay_between_one_and_what_is_there() -> None:
    schedule = Schedule((0, 1), 0.5)
    assert schedule.count(0, 100, 30) == 30
    assert schedule.count(0, 1, 1) == 1 == Schedule((0,), 0.01).count(0, 9, 9)
    assert schedule.count(0, 100, 0) == 0


# Warm-up -----------------------------------------------------------------------------------


def test_warm_up_is_the_cosine_of_the_paper() -> None:
    """EViT from scratch: 300 epochs, rate 1 until epoch 10, falling until epoch 110."""
    schedule = Schedule((3, 6, 9), 0.7, relative="current", warmup=(10 / 300, 110 / 300))
    rate = [schedule.rate(0, epoch / 300) for epoch in (0, 9, 10, 35, 60, 85, 110, 299)]
    quarter = 0.7 + 0.3 * (1 + 0.5**0.5) / 2
    assert rate == pytest.approx([1, 1, 1, quarter, 0.85, 1.7 - quarter, 0.7, 0.7])
    falling = [schedule.rate(0, p / 50) for p in range(51)]
    assert falling == sorted(falling, reverse=True)
    assert schedule.rate(1) == 0.7  # without a progress, training is over


def test_warm_up_without_length_is_a_step() -> None:
    schedule = Schedule((0,), 0.5, warmup=(0.3, 0.3))
    assert [schedule.rate(0, p) for p in (0, 0.29, 0.3, 1)] == [1, 1, 0.5, 0.5]
    assert Schedule((0,), 0.5, warmup=(0, 0)).rate(0, 0) == 0.5


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_stepped_warm_up_changes_rarely(steps: int) -> None:
    smooth = Schedule((0,), 0.5, warmup=(0.0, 1.0))
    stepped = Schedule((0,), 0.5, warmup=(0.0, 1.0), warmup_steps=steps)
    rates = [stepped.rate(0, p / 1000) for p in range(1001)]
    assert len(set(rates)) == steps + 1
    assert rates[0] == 1 and rates[-1] == 0.5 and rates == sorted(rates, reverse=True)
    for step in range(steps + 1):  # on the corners it lies on the smooth curve
        assert stepped.rate(0, step / steps) == pytest.approx(smooth.rate(0, step / steps))
    counts = {stepped.count(0, 196, 196, p / 1000) for p in range(1001)}
    smooth_counts = {smooth.count(0, 196, 196, p / 1000) for p in range(1001)}
    assert len(counts) == steps + 1 < len(smooth_counts)


def test_warm_up_of_powers_and_lists() -> None:
    schedule = Schedule((0, 1), 0.5, warmup=(0.0, 1.0))
    assert schedule.rate(1, 0.5) == pytest.approx(0.75**2)
    each = Schedule((0, 1), (0.8, 0.4), warmup=(0.0, 1.0))
    assert [each.rate(s, 0.5) for s in range(2)] == pytest.approx([0.9, 0.7])


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep must lie in \(0, 1\], got 0"),
        ({"keep": 1.01}, r"\(0, 1\], got 1.01"),
        ({"keep": -0.5}, "got -0.5"),
        ({"keep": float("nan")}, "got nan"),
        ({"keep": True}, "got True"),
        ({"keep": "0.7"}, "got '0.7'"),
        ({"keep": (0.5, 2.0)}, "got 2.0"),
        ({"keep": (0.5,)}, "keep has 1 rates for 2 blocks"),
        ({"relative": "previous"}, "'original', 'current'; got 'previous'"),
        ({"rounding": "even"}, "'floor', 'ceil', 'nearest'; got 'even'"),
        ({"warmup": (0.5, 0.2)}, r"start <= end <= 1, got \(0.5, 0.2\)"),
        ({"warmup": (-0.1, 0.2)}, "0 <= start"),
        ({"warmup": (0.0, 1.5)}, "got"),
        ({"warmup": 0.5}, "warmup must be .* got 0.5"),
        ({"warmup": (0.1, 0.2, 0.3)}, "warmup must be"),
        ({"warmup": ("0", "1")}, "warmup must be"),
        ({"warmup_steps": 0}, "warmup_steps must be .*at least 1, got 0"),
        ({"warmup_steps": 2.5}, "warmup_steps must be .* got 2.5"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"blocks": (3, 6), **options})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((3, 12), r"0..11 for 12 blocks, got 12"),
        ((-1,), "got -1"),
        ((6, 3), r"ascend without repeats, got \[6, 3\]"),
        ((3, 3), "without repeats"),
        ((), "at least one block"),
        ((True, 2), "whole numbers, got True"),
        ((1.0,), "whole numbers, got 1.0"),
    ],
)
def test_block_refusals(blocks: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(blocks, 12)


def test_checks_accept_what_is_legal() -> None:
    assert check_blocks([0, 11], 12) == (0, 11)
    check_keep(1)
    check_keep((0.1, 1.0), "share")
    with pytest.raises(ValueError, match="share must"):
        check_keep(0.0, "share")


@pytest.mark.parametrize(("total", "parts"), [(0, 3), (7, 3), (9, 3), (2, 5)])
def test_even_parts_have_the_whole_sum(total: int, parts: int) -> None:
    found = split_evenly(total, parts)
    assert len(found) == parts and sum(found) == total
    assert found[0] - found[-1] in (0, 1) and list(found) == sorted(found, reverse=True)


def test_a_count_is_a_plain_number_in_a_graph() -> None:
    """Where all numbers are dynamic, a rate is one of them; what follows from it would be too."""
    schedule = Schedule((0, 1), 0.7, "current", "ceil")
    seen: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph)
        return graph

    class Keeping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for stage in (0, 1):
                x = x[:, : self.schedule.count(stage, 20, 20 - 6 * stage)]
            return x

    torch._dynamo.reset()
    compiled = torch.compile(Keeping(), backend=compiler, fullgraph=True, dynamic=True)
    assert compiled(torch.zeros(3, 20)).shape == (3, 10)
    (graph,) = seen
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    (shape,) = (value.meta["example_value"].shape for value in output.all_input_nodes)
    assert isinstance(shape[1], int) and shape[1] == 10
    assert isinstance(shape[0], torch.SymInt)
