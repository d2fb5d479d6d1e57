"""Statistics of tokens, against loops over whole traces."""

from __future__ import annotations

import statistics

import pytest
import torch
from batches import demo_batches, small_batches
from small import noise, randomise, vit

import foveate
from foveate.data.demo import demo_vit
from foveate.evaluate import TokenStatistics, token_statistics
from foveate.evaluate.statistics import gather

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
    assert found.images == images and found.grid == (6, 6)
    flat = torch.tensor(found.keep).view(depth, 36)
    group = torch.tensor(found.group).view(depth, 36)
    for block in range(depth):
        for patch in range(36):
            there = [n for n in range(images) if used[block][n][patch]]
            assert flat[block, patch] == pytest.approx(len(there) / images, abs=1e-5)
            mean = statistics.fmean(sizes[block][n][patch] for n in there) if there else 1
            assert group[block, patch] == pytest.approx(mean, abs=1e-4)
        shares = [sum(one) / 36 for one in used[block]]
        assert found.usage[block] == pytest.approx(statistics.fmean(shares), abs=1e-5)
        assert found.usage_deviation[block] == pytest.approx(statistics.pstdev(shares), abs=1e-5)
        assert found.tokens[block] == pytest.approx(statistics.fmean(tokens[block]), abs=1e-5)
        out = back = at_once = 0
        for n in range(images):
            for patch in range(36):
                if used[block][n][patch]:
                    continue
                out += 1
                later = [used[next_one][n][patch] for next_one in range(block + 1, depth)]
                back += any(later)
                at_once += bool(later) and later[0]
        assert found.reactivation[block] == (pytest.approx(back / out, abs=1e-5) if out else None)
        assert found.at_once[block] == (pytest.approx(at_once / back, abs=1e-5) if back else None)
    each = [statistics.fmean(tokens[block][n] for block in range(depth)) for n in range(images)]
    spread = found.tokens_per_image
    assert spread.mean == pytest.approx(statistics.fmean(each), abs=1e-5)
    assert spread.deviation == pytest.approx(statistics.pstdev(each), abs=1e-5)
    assert (spread.least, spread.most) == pytest.approx((min(each), max(each)), abs=1e-5)
    assert spread.median == pytest.approx(statistics.median(each), abs=1e-5)
    assert sum(spread.counts) == images and len(spread.edges) == len(spread.counts) + 1
    assert found.last_tokens.mean == pytest.approx(statistics.fmean(tokens[-1]), abs=1e-5)
    depths = torch.tensor([[sum(used[b][n][p] for b in range(depth)) for p in range(36)] for n in
                           range(images)]).double().mean(0)  # fmt: skip
    assert torch.allclose(torch.tensor(found.depth).double().flatten(), depths, atol=1e-5)


@pytest.mark.parametrize("method", ["svit(keep=0.7)", "ats(K=12)", "tome(r=3)"])
def test_the_batch_does_not_matter(method: str) -> None:
    model = model_of(method)
    found = [token_statistics(model, small_batches(count=6, batch=n)) for n in (1, 4)]
    assert found[0] == found[1]


def test_something_is_brought_back_and_something_is_not() -> None:
    """The loops above must have met both."""
    svit = token_statistics(model_of("svit(keep=0.7)"), small_batches())
    assert any(share for share in svit.reactivation if share)
    evit = token_statistics(model_of("evit(keep=0.5)"), small_batches())
    assert evit.reactivation == (None, 0.0, 0.0, 0.0) and evit.stages == (1, 2, 3)
    tome = token_statistics(model_of("tome(r=3)"), small_batches())
    assert tome.usage == (1.0,) * 4 and tome.stages == (0, 1, 2, 3)
    assert max(max(row) for row in tome.group[-1]) > 1


def test_known_numbers() -> None:
    """Random drops the same positions of every image, so a share is 0 or 1."""
    model = foveate.apply(demo_vit(), "random(keep=0.5)").eval()
    found: TokenStatistics = token_statistics(model, demo_batches(10))
    assert {share for block in found.keep for row in block for share in row} == {0.0, 1.0}
    assert found.usage[0] == 1 and found.usage[3] == pytest.approx(24 / 49, abs=1e-6)
    assert found.usage_deviation == (0.0,) * 12
    assert found.tokens[-1] == found.last_tokens.least == 7 and found.last_tokens.counts == (10,)
    assert found.method == "random(keep=0.5)"


def test_a_masked_pass_counts_who_takes_part() -> None:
    model = model_of("dynamicvit(keep=0.7)")
    gathered = token_statistics(model, small_batches())
    model.mode = "masked"
    masked = token_statistics(model, small_batches())
    assert masked.tokens == gathered.tokens and masked.keep == gathered.keep


def test_several_in_one_pass() -> None:
    models = {name: model_of(name) for name in ("svit(keep=0.7)", "tome(r=3)")}
    found = gather(models, small_batches())
    for name, model in models.items():
        assert found[name] == token_statistics(model, small_batches())


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
