"""DynamicViT: masked training equals gathered use, and the predictors learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import batch_state, images, logits, noise, randomise, spec, vit
from torch import Tensor

import foveate
from foveate.core import GatedReducer, ReducedViT, TokenState
from foveate.methods.dynamicvit import DynamicViT, Predictor


def dynamicvit(method: str = "dynamicvit(keep=0.6)", **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


def test_masked_becomes_gathered_as_eps_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same top-k decisions; what is left of the dropped tokens is the smoothing."""
    model = dynamicvit()
    model.mode = "gathered"
    kept = model.trace(images()).final
    grid, there = kept.restore("zero"), kept.source >= 0
    errors = []
    for eps in (1e-2, 1e-4, 0.0):
        monkeypatch.setattr(DynamicViT, "softmax_eps", eps)
        model.mode = "masked"
        masked = model.trace(images()).final
        assert torch.equal(masked.alive.gather(1, masked.source) > 0, there)
        errors.append(float((masked.restore("zero") - grid)[there].abs().max()))
    assert errors[0] > 10 * errors[1] > 10 * errors[2]
    assert errors[2] < 2e-5 * float(grid.abs().max())


def test_the_released_smoothing_is_small() -> None:
    model = dynamicvit()
    assert model.reducer.softmax_eps == 1e-6
    outputs = {}
    for mode in ("gathered", "masked"):
        model.mode = mode
        outputs[mode] = logits(model, images())
    torch.testing.assert_close(outputs["masked"], outputs["gathered"], atol=2e-4, rtol=2e-4)


def test_the_task_alone_trains_the_predictors() -> None:
    """Through the attention of later blocks: no ratio loss, head on the class token."""
    model = dynamicvit().train()
    torch.manual_seed(0)
    outcome = model.run(images())
    outcome.logits.square().sum().backward()
    for predictor in model.reducer.predictors:
        for parameter in predictor.parameters():
            assert parameter.grad.abs().sum() > 0


def test_gates_are_nested_and_drawn_in_training_only() -> None:
    model = dynamicvit().train()
    torch.manual_seed(0)
    first, second = model.trace(images()), model.trace(images())
    assert not torch.equal(first.logits, second.logits)
    for trace in (first, second):
        alive = [block.attention.alive for block in trace.blocks]
        for before, after in zip(alive, alive[1:], strict=False):
            assert (after <= before).all()
        assert (alive[-1][:, 1:].sum(1) >= 1).all() and (alive[-1][:, 0] == 1).all()
        assert alive[-1].sum() < alive[0].sum()
    model.eval()
    assert torch.equal(logits(model, images()), logits(model, images()))
    model.gate = "sample"
    assert not torch.equal(logits(model, images()), logits(model, images()))


def naive_predictor(predictor: Predictor, x: Tensor, weight: Tensor) -> Tensor:
    """As methods.md 2.1 has it, for one image ``x [N, C]``."""
    into = torch.cat([predictor.local_in.weight, predictor.global_in.weight])
    bias = torch.cat([predictor.local_in.bias, predictor.global_in.bias])
    u = F.gelu(F.linear(predictor.norm(x), into, bias))
    half = u.shape[1] // 2
    shared = (u[:, half:] * weight[:, None]).sum(0) / weight.sum()
    z = torch.cat([u[:, :half], shared.expand(len(u), -1)], 1)
    first = torch.cat([predictor.local_out.weight, predictor.global_out.weight], 1)
    return predictor.out(F.linear(z, first, predictor.global_out.bias)).log_softmax(-1)


@pytest.mark.parametrize("kind", ["even", "ragged", "masked"])
def test_predictor(kind: str) -> None:
    predictor = randomise(Predictor(12))
    state = batch_state([5, 3, 7] if kind == "ragged" else 6, width=12, prefix=2)
    weight = torch.ones(state.layout.total)
    if kind == "masked":
        alive = (noise(2, 8) > -0.3).float()
        state, weight = state.replace(alive=alive), alive.flatten()
    got, row = predictor(state), 0
    for n in state.layout.lengths:
        part = slice(row + 2, row + n)  # prefix tokens have no say
        expected = naive_predictor(predictor, state.x[part], weight[part])
        torch.testing.assert_close(got[part].log_softmax(-1), expected)
        row += n


def test_the_ratio_loss_holds_every_image_to_its_target() -> None:
    model = dynamicvit("dynamicvit(keep=0.5, blocks=[1, 2])").train()
    torch.manual_seed(0)
    outcome = model.run(images(), track=True)
    torch.manual_seed(0)
    trace = model.trace(images())
    terms = []
    for stage, block in enumerate((1, 2)):
        share = trace.blocks[block].attention.alive[:, 1:].mean(1)
        terms.append(((share - 0.5 ** (stage + 1)) ** 2).mean())
    losses = model.reducer.losses(outcome)
    torch.testing.assert_close(losses["ratio"], torch.stack(terms).mean())
    assert set(model.reducer.loss_weights) == {"ratio", "kl", "token"}


def test_argmax_gates_keep_at_least_one() -> None:
    model = dynamicvit("dynamicvit(keep=0.5, gate='argmax')")
    for predictor in model.reducer.predictors:
        predictor.out[-1].bias.data.copy_(torch.tensor([-50.0, 50.0]))
    assert set(model.trace(images()).counts()[1]) == {2}


class Scripted(GatedReducer):
    """Gates that say what a test wants, ``[stages, N]`` log-odds of keeping."""

    def script(self, odds: Tensor) -> Scripted:
        self.odds = odds
        return self

    def logits(self, stage: int, state: TokenState) -> Tensor:
        odds = self.odds[stage].expand(state.batch, -1)
        return torch.stack([odds / 2, -odds / 2], -1)


def test_an_earlier_gate_learns_from_what_later_ones_make_of_the_dropped() -> None:
    """methods.md 2.2, by hand: D_2 = g_2 * D_1, so d(share_2)/d(g_1) is g_2, dropped or not.

    Patches 1 and 3 are dropped at stage 1; stage 2 would keep patch 1 and not patch 3.
    """
    odds = torch.tensor([[2.0, -1.0, 1.0, -3.0], [1.0, 2.0, -1.0, -2.0]], requires_grad=True)
    reducer = Scripted(keep=0.5, blocks=(0, 1), gate="argmax").script(odds)
    reducer.build(spec(depth=2, grid=(1, 4)))
    state = batch_state(4)
    state = state.replace(alive=torch.ones(2, 5))
    for block in (0, 1):
        state = reducer.before(block, state)
    assert state.alive[:, 1:].tolist() == [[1, 0, 0, 0]] * 2
    share = state.notes[".kept_share"]
    assert share[0].tolist() == [0.5, 0.5] and share[1].tolist() == [0.25, 0.25]
    (gradient,) = torch.autograd.grad(share[1][0], odds)
    slope = (odds.sigmoid() * (1 - odds.sigmoid())).detach()
    g_1, g_2 = torch.tensor([1.0, 0, 1, 0]), torch.tensor([1.0, 1, 0, 0])
    torch.testing.assert_close(gradient[0], g_2 * slope[0] / 4)
    torch.testing.assert_close(gradient[1], g_1 * slope[1] / 4)
    assert gradient[0, 1] > 0 and gradient[0, 3] == 0


@pytest.mark.parametrize("method", ["dynamicvit(keep=0.5)", "spvit(keep=0.5)"])
def test_the_ratio_loss_reaches_patches_that_were_dropped(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real model, sampling: the first gates feel the second ones' ratio at dropped patches."""
    model = dynamicvit(f"{method[:-1]}, blocks=[1, 2])").train()
    said: list[Tensor] = []
    original = type(model.reducer).logits

    def watched(self: GatedReducer, stage: int, state: TokenState) -> Tensor:
        found = original(self, stage, state)
        found.retain_grad()
        said.append(found)
        return found

    monkeypatch.setattr(type(model.reducer), "logits", watched)
    with torch.no_grad():
        monkeypatch.setattr(type(model.reducer), "logits", original)
        torch.manual_seed(0)
        alive = model.trace(images(8)).blocks[1].attention.alive[:, 1 : 1 + 36]
    monkeypatch.setattr(type(model.reducer), "logits", watched)
    torch.manual_seed(0)
    outcome = model.run(images(8), track=True)
    outcome.notes[f"{model.reducer.name}.kept_share"][1].sum().backward()
    gradient = said[0].grad[..., 0].abs()
    assert gradient[alive == 0].mean() > 1e-3 and gradient[alive > 0].mean() > 1e-3
