"""Statistics of tokens, against loops over whole traces."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from batches import demo_batches, small_batches
from small import noise, randomise, vit

import foveate
from foveate.data.demo import demo_vit
from foveate.measure import TokenStatistics, one, token_statistics
from foveate.measure.tokens import gather

METHODS = (
    "dynamicvit(keep=0.7)",
    "dynamicvit(keep=0.7, gate='argmax')",
    "evit(keep=0.5)",
    "svit(keep=0.7)",
    "structural",
    "tome(r=3)",
    "ats(K=12)",
    "evit(keep=0.7, blocks=[1]) + tome(r=2, blocks=[2, 3])",
)


def same(one: TokenStatistics, other: TokenStatistics) -> bool:
    return all(
        np.array_equal(value, vars(other)[name], equal_nan=name in ("reactivation", "at_once"))
        for name, value in vars(one).items()
        if name not in ("method", "rate")
    )


def model_of(method: str):
    model = foveate.apply(randomise(vit()), method)
    randomise(model.reducer, seed=1)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_against_loops(method: str) -> None:
    model, batches = model_of(method), small_batches(count=7, batch=3)
    found = token_statistics(model, batches)
    traces = [model.trace(images) for images, _, _ in batches()]
    # used[block][image][patch], and the size of the token that carries it
    depth, images, used, sizes, tokens = 4, 7, [], [], []
    for block in range(depth):
        used.append([])
        sizes.append([])
        tokens.append([])
        for trace in traces:
            state = trace.blocks[block].mlp
            for source, length in zip(state.source.tolist(), state.layout.lengths, strict=True):
                used[-1].append([token >= 0 for token in source])
                sizes[-1].append([source.count(token) if token >= 0 else 0 for token in source])
                tokens[-1].append(length)
    assert found.images == images and found.keep.shape == (4, 6, 6)
    flat, group = found.keep.reshape(depth, 36), found.group.reshape(depth, 36)
    table = found.table()
    for block in range(depth):
        for patch in range(36):
            there = [n for n in range(images) if used[block][n][patch]]
            assert flat[block, patch] == pytest.approx(len(there) / images, abs=1e-5)
            mean = statistics.fmean(sizes[block][n][patch] for n in there) if there else 1
            assert group[block, patch] == pytest.approx(mean, abs=1e-4)
        shares = [sum(one) / 36 for one in used[block]]
        assert found.usage[:, block].tolist() == pytest.approx(shares, abs=1e-5)
        assert one(table, "usage", at=block) == pytest.approx(statistics.fmean(shares), abs=1e-5)
        deviation = one(table, "usage_deviation", at=block)
        assert deviation == pytest.approx(statistics.pstdev(shares), abs=1e-5)
        assert found.tokens[:, block].tolist() == tokens[block]
        out = back = at_once = 0
        for n in range(images):
            for patch in range(36):
                if used[block][n][patch]:
                    continue
                out += 1
                later = [used[next_one][n][patch] for next_one in range(block + 1, depth)]
                back += any(later)
                at_once += bool(later) and later[0]
        share = back / out if out else np.nan
        assert found.reactivation[block] == pytest.approx(share, abs=1e-5, nan_ok=True)
        share = at_once / back if back else np.nan
        assert found.at_once[block] == pytest.approx(share, abs=1e-5, nan_ok=True)
    each = [statistics.fmean(tokens[block][n] for block in range(depth)) for n in range(images)]
    assert one(table, "mean") == pytest.approx(statistics.fmean(each), abs=1e-5)
    assert one(table, "deviation") == pytest.approx(statistics.pstdev(each), abs=1e-5)
    assert one(table, "low") == pytest.approx(np.quantile(each, 0.05), abs=1e-5)
    assert one(table, "last") == pytest.approx(statistics.fmean(tokens[-1]), abs=1e-5)
    assert one(table, "used_last") == pytest.approx(statistics.fmean(shares), abs=1e-5)


@pytest.mark.parametrize("method", ["svit(keep=0.7)", "ats(K=12)", "tome(r=3)"])
def test_the_batch_does_not_matter(method: str) -> None:
    model = model_of(method)
    found = [token_statistics(model, small_batches(count=6, batch=n)) for n in (1, 4)]
    assert same(*found)


def test_something_is_brought_back_and_something_is_not() -> None:
    """The loops above must have met both."""
    svit = token_statistics(model_of("svit(keep=0.7)"), small_batches())
    assert (np.nan_to_num(svit.reactivation) > 0).any()
    evit = token_statistics(model_of("evit(keep=0.5)"), small_batches())
    assert np.isnan(evit.reactivation[0]) and not evit.reactivation[1:].any()
    assert evit.stages == (1, 2, 3)
    tome = token_statistics(model_of("tome(r=3)"), small_batches())
    assert (tome.usage == 1).all() and tome.stages == (0, 1, 2, 3)
    assert tome.group[-1].max() > 1


def test_known_numbers() -> None:
    """Random drops the same positions of every image, so a share is 0 or 1."""
    model = foveate.apply(demo_vit(), "random(keep=0.5)").eval()
    found: TokenStatistics = token_statistics(model, demo_batches(10))
    assert set(found.keep.flatten()) == {0.0, 1.0}
    assert (found.usage[:, 0] == 1).all() and found.usage[:, 3] == pytest.approx(24 / 49)
    assert (found.tokens[:, -1] == 7).all() and found.images == 10
    assert found.method == "random(keep=0.5)" and found.rate == 0.5


def test_a_masked_pass_counts_who_takes_part() -> None:
    model = model_of("dynamicvit(keep=0.7)")
    gathered = token_statistics(model, small_batches())
    model.mode = "masked"
    masked = token_statistics(model, small_batches())
    assert np.array_equal(masked.tokens, gathered.tokens)
    assert np.array_equal(masked.keep, gathered.keep)


def test_several_in_one_pass() -> None:
    models = {name: model_of(name) for name in ("svit(keep=0.7)", "tome(r=3)")}
    found = gather(models, small_batches())
    for name, model in models.items():
        assert same(found[name], token_statistics(model, small_batches()))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="are of models from foveate.apply"):
        token_statistics(vit(), small_batches())
    with pytest.raises(ValueError, match="gave no image"):
        token_statistics(model_of("tome(r=3)"), lambda: iter(()))
    model = foveate.apply(vit(dynamic_img_size=True), "tome(r=3)")
    labels = torch.zeros(1).long()
    sizes = [(noise(1, 3, 48, 48), labels, labels), (noise(1, 3, 64, 64), labels, labels)]
    with pytest.raises(ValueError, match="must all have one size"):
        token_statistics(model, lambda: iter(sizes))
