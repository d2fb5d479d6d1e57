"""ATM: its matching against lists, its thresholds, and calibration on images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import batch_state, built, images, logits, noise, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.core import ReducedViT, TokenState
from foveate.methods.atm import calibrate
from foveate.ops import unit


class Keys:
    """Stands in for the attention that a method reads keys off."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def key_direction(self) -> Tensor:
        return unit(self.keys)


def merged(method: str, state: TokenState, keys: Tensor) -> TokenState:
    """Let the method act in block 1 of four on these keys ``[T, d]``, prefix included."""
    return built(method).between(1, state, Keys(keys))


Token = tuple[list[float], float]  # value and size


def rows(state: TokenState) -> list[list[Token]]:
    """The tokens of every image."""
    size = torch.ones(len(state.x)) if state.size is None else state.size
    each = list(zip(state.x.tolist(), size.tolist(), strict=True))
    ends = torch.tensor((0, *state.layout.lengths)).cumsum(0).tolist()
    return [each[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def naive(
    tokens: list[Token], keys: Tensor, prefix: int, threshold: float, sized: bool
) -> list[Token]:
    """Threshold merging of one image, prefix included."""
    sources = [i for i in range(prefix, len(tokens)) if i % 2 == 0]
    targets = [i for i in range(prefix, len(tokens)) if i % 2 == 1]
    if sized:
        order = sorted(sources + targets, key=lambda i: (tokens[i][1], i % 2))
        sources = order[: len(order) // 2]
        targets = sorted(order[len(order) // 2 :])
    keys = keys / keys.norm(dim=1, keepdim=True)
    gone, now = set(), list(tokens)
    for a in sources:
        links = [(float(keys[a] @ keys[b]), b) for b in targets]
        if links and max(links)[0] > threshold:
            b = max(links)[1]
            (x, s), (y, t) = tokens[a], now[b]
            now[b] = ([(s * p + t * q) / (s + t) for p, q in zip(x, y, strict=True)], s + t)
            gone.add(a)
    order = [*range(prefix), *(a for a in sources if a not in gone), *targets]
    return [now[i] for i in order]


@pytest.mark.parametrize("counts", [12, 5, [12, 7, 1, 4], [9, 0, 3], [1, 1], [10]])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.5, 0.9])
def test_merging_pair_by_pair(
    counts: int | list[int], prefix: int, sized: bool, threshold: float
) -> None:
    state = batch_state(counts, prefix=prefix)
    state = state.replace(size=1.0 + torch.arange(len(state.x)) % 3)
    keys = noise(len(state.x), 5, seed=1)
    split = 1 if sized else 2
    after = merged(f"atm(threshold={threshold}, split={split})", state, keys)
    for before, now, key in zip(
        rows(state), rows(after), keys.split(list(state.layout.lengths)), strict=True
    ):
        expected = naive(before, key, prefix, threshold, sized)
        assert [size for _, size in now] == [size for _, size in expected]
        torch.testing.assert_close(
            torch.tensor([x for x, _ in now]), torch.tensor([x for x, _ in expected])
        )


@pytest.mark.parametrize("split", [0, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.9999])
def test_equal_tokens_merge_by_half(split: int, threshold: float) -> None:
    state = batch_state([10, 7])
    after = merged(f"atm(threshold={threshold}, split={split})", state, torch.ones(19, 4))
    assert after.counts == (5, 4)


def test_large_tokens_never_merge_with_each_other() -> None:
    """The two large tokens are the most alike, and stand where alternating would pair them."""
    state, keys = batch_state([4]), torch.eye(5)
    state = state.replace(size=torch.tensor([1.0, 9.0, 9.0, 1.0, 1.0]))
    keys[2] = keys[1]
    assert merged("atm(threshold=0.5, split=1)", state, keys).counts == (4,)
    assert merged("atm(threshold=0.5, split=2)", state, keys).counts == (3,)


def test_the_rule_falls_and_is_clipped() -> None:
    thresholds = list(built("atm", depth=12).thresholds.values())
    expected = [0.9, 0.88, 0.859, 0.838, 0.817, 0.795, 0.773, 0.75, 0.726, 0.703, 0.7, 0.7]
    assert thresholds == pytest.approx(expected, abs=6e-4)
    assert set(built("atm(beta=1e6)").thresholds.values()) == {0.9, 0.7}
    assert built("atm(blocks=[0, 2])").thresholds == pytest.approx({0: 0.9, 2: 0.859}, abs=1e-3)
    assert built("atm(threshold=0.3)").thresholds == dict.fromkeys(range(4), 0.3)
    assert built("atm(threshold=[0.3, 0.2], blocks=[1, 3])").thresholds == {1: 0.3, 3: 0.2}
    assert built("atm", depth=12).first_split == 8


def model() -> nn.Module:
    return randomise(vit()).eval()


def test_a_threshold_of_one_is_the_dense_model() -> None:
    stock = model()
    driven = foveate.apply(stock, "atm(threshold=1.0)")
    with torch.no_grad():
        assert torch.equal(driven(images()), stock(images()))
    assert foveate.count(driven, images=images(1)).method_macs == 0
    few = foveate.apply(stock, "atm(threshold=0.999)").trace(images())
    torch.testing.assert_close(few.logits, stock(images()).detach())


def test_counts_do_not_depend_on_the_batch() -> None:
    driven, x = foveate.apply(model(), "atm(threshold=0.3, split=2)").eval(), images(5)
    counts = driven.trace(x).counts()
    assert len(set(counts[-1])) > 1
    for b in range(5):
        assert driven.trace(x[b : b + 1]).counts() == [(c[b],) for c in counts]


def test_an_image_where_nothing_merges_is_split_alike_alone_and_in_a_batch() -> None:
    """Its tokens are reordered whether or not another image merges, and its halves are the same."""
    keys = torch.eye(12)[torch.arange(24) % 12]  # no token like another
    alike = torch.cat([keys[:8], torch.ones(8, 12)])
    for split in (0, 4):
        alone = batch_state([7])
        alone = alone.with_tokens(batch_state([7, 7]).x[:8])
        method = f"atm(threshold=0.5, split={split})"
        one = merged(method, alone, keys[:8])
        both = merged(method, batch_state([7, 7]), alike)
        assert one.counts == (7,) and both.counts[1] < 7
        assert torch.equal(both.x[:8], one.x)


def test_macs_worked_out_are_those_that_run() -> None:
    driven, x = foveate.apply(model(), "atm(threshold=0.2, split=2)").eval(), images(4)
    worked_out = foveate.count(driven, trace=driven.trace(x))
    run = foveate.count(driven, images=x)
    assert worked_out.macs == run.macs and worked_out.method_macs == run.method_macs > 0
    assert foveate.count(driven).tokens == (37,) * 4  # at most


def test_no_gradient_through_the_matching() -> None:
    state, keys = batch_state([10, 8]), noise(20, 5).requires_grad_()
    state = state.with_tokens(state.x.requires_grad_())
    after = merged("atm(threshold=0.1)", state, keys)
    assert after.layout.total < 20
    after.x.square().sum().backward()
    assert keys.grad is None


# Calibration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["atm", "atm(threshold=[0.9, 0.3, 0.5], blocks=[0, 1, 3])"])
def test_a_budget_holds_on_other_images(method: str) -> None:
    driven = foveate.apply(model(), method)
    start = tuple(driven.reducer.thresholds.values())
    text = calibrate(driven, images(24), "0.8x")
    assert text == repr(driven.reducer)
    seen, held_out = (
        foveate.count(driven.eval(), trace=driven.trace(images(24, seed=seed))).ratio
        for seed in (0, 1)
    )
    assert seen == pytest.approx(0.8, rel=0.01) and held_out == pytest.approx(0.8, rel=0.03)
    shifts = [a - b for a, b in zip(start, driven.reducer.threshold, strict=True)]
    free = [s for s, t in zip(shifts, driven.reducer.threshold, strict=True) if abs(t) < 1]
    assert max(free) - min(free) < 1e-5  # one shift for all


def test_lower_budgets_mean_lower_thresholds() -> None:
    found = []
    for budget in ("1x", "90%", "0.8x", "0.7x", "0.0025 GMACs"):
        driven = foveate.apply(model(), "atm")
        calibrate(driven, images(12), budget)
        found.append(driven.reducer.threshold)
    for higher, lower in zip(found, found[1:], strict=False):
        assert all(a >= b for a, b in zip(higher, lower, strict=True)) and higher != lower


def test_thresholds_are_saved_and_the_model_is_otherwise_untouched(tmp_path: Path) -> None:
    stock = model().train()
    stock.blocks[1].eval()
    driven = foveate.apply(stock, "atm(split=1)")
    before = [m.training for m in driven.modules()]
    text = calibrate(driven, images(8), "0.8x")
    assert [m.training for m in driven.modules()] == before
    foveate.save(driven, tmp_path)
    again: list[ReducedViT] = [foveate.load(tmp_path, stock), foveate.apply(stock, text)]
    for other in again:
        assert other.reducer.config() == driven.reducer.config()
        assert torch.equal(logits(other.eval(), images()), logits(driven.eval(), images()))


def test_calibration_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"needs a model with the method atm, got tome\(r=13\)"):
        calibrate(foveate.apply(model(), "tome"), images(2), "0.8x")
    driven = foveate.apply(model(), "atm")
    for budget, message in (
        ("0.2x", "atm cannot meet .* GMACs within 1% on these images: it reaches from 0.00"),
        ("plenty", "must read like"),
        ("2x", "what the model without a method costs"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(driven, images(2), budget)
        assert driven.reducer.threshold is None and not driven.training
    with pytest.raises(ValueError, match=r"needs images: use foveate.methods.atm.calibrate"):
        foveate.apply(model(), "atm", budget="0.8x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("threshold=1.5", r"threshold must lie in \[-1, 1\], got 1.5"),
        ("threshold=[0.5, -2.0, 0.1, 0.1]", r"threshold must lie in \[-1, 1\], got -2.0"),
        ("threshold=[0.5, 0.4]", "threshold has 2 entries for 4 blocks"),
        ("alpha=2.0", r"alpha must lie in \[-1, 1\], got 2.0"),
        ("theta_min=-3.0", r"theta_min must lie in \[-1, 1\], got -3.0"),
        ("beta=-0.1", "beta must be a finite number of at least 0, got -0.1"),
        ("split=5", r"split must lie in 0..4, got 5"),
        ("blocks=[4]", "0..3"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(f"atm({options})")
