"""Probes on features whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import checkpoint, small_model
from small import noise
from timm.optim.lars import Lars
from torch import Tensor

from foveate import config
from foveate.backbones import backbone_for
from foveate.core import dense
from foveate.train import probe as probes
from foveate.train import recipe as recipes
from foveate.train.probe import features, linear_probe, nearest_neighbours, probe


def settings(**changes: Any) -> recipes.Probe:
    base = {"model": recipes.Model(start="demo"), "epochs": 60, "batch": 16, "warmup_epochs": 2.0}
    return recipes.Probe(**{**base, "lr": 400.0, **changes})


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes on the corners of a square, far from zero, on very unequal scales."""
    labels = torch.arange(count) % 4
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x = corners[labels] + 0.1 * noise(count, 2, seed=seed)
    return x * torch.tensor([1000.0, 0.001]) + torch.tensor([5000.0, 3.0]), labels


def test_a_linear_classifier_finds_what_is_linear() -> None:
    """The batch norm before it makes scales and offsets equal."""
    (x, y), (held, labels) = clouds(64, 0), clouds(40, 1)
    assert linear_probe(x, y, held, labels, settings()) == 100
    assert linear_probe(x, y, held, (labels + 1) % 4, settings()) == 0
    assert linear_probe(x, y, held, labels, settings()) == 100  # the same again


def test_a_linear_classifier_does_not_find_what_is_not() -> None:
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]).repeat(16, 1)
    y = torch.tensor([0, 0, 1, 1]).repeat(16)
    found = linear_probe(x + 0.01 * noise(64, 2), y, x, y, settings())
    assert found <= 75


def test_neighbours_are_by_angle_and_vote_by_nearness() -> None:
    def unit(degrees: float, length: float = 1.0) -> list[float]:
        angle = math.radians(degrees)
        return [length * math.cos(angle), length * math.sin(angle)]

    x = torch.tensor([unit(0, 100.0), unit(40), unit(42), unit(44)])
    y = torch.tensor([0, 1, 1, 1])
    held, labels = torch.tensor([unit(2), unit(30)]), torch.tensor([0, 1])
    # By distance the long vector would be nobody's neighbour.
    assert nearest_neighbours(x, y, held, labels, k=1) == 100
    # Three votes at 40 degrees against one at 2: the weights decide, as the temperature has it.
    assert nearest_neighbours(x, y, held, labels, k=4, temperature=0.07) == 100
    assert nearest_neighbours(x, y, held, labels, k=4, temperature=10) == 50
    with pytest.raises(ValueError, match="neighbours=5 is more than the 4 training images"):
        nearest_neighbours(x, y, held, labels, k=5)


def test_lars_adapts_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight moves by a share of its own length, the bias by its gradient."""
    steps: list[tuple[Any, ...]] = []

    class Watched(Lars):
        def step(self, closure: Any = None) -> Any:
            (weight,), (bias,) = (group["params"] for group in self.param_groups)
            before = weight.detach().clone(), bias.detach().clone()
            rate = self.param_groups[0]["lr"]
            found = super().step(closure)
            moved = weight.detach() - before[0], bias.detach() - before[1]
            steps.append((rate, before[0], weight.grad.clone(), bias.grad.clone(), *moved))
            return found

    monkeypatch.setattr(probes, "Lars", Watched)
    (x, y), (held, labels) = clouds(64, 0), clouds(8, 1)
    linear_probe(x, y, held, labels, settings(warmup_epochs=0.0, epochs=1))
    rate, weight, grad, bias_grad, moved, bias_moved = steps[0]
    assert rate == pytest.approx(400.0 * 16 / 256)
    torch.testing.assert_close(bias_moved, -rate * bias_grad)
    ratio = 0.001 * weight.norm() / grad.norm()
    torch.testing.assert_close(moved, -rate * ratio * grad, rtol=1e-3, atol=1e-9)


def test_the_rate_of_a_probe() -> None:
    recipe = settings(epochs=10)
    found = [probes._rate(2.0, epoch, recipe) for epoch in (0, 1, 2, 6, 10)]
    assert found == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


def test_features() -> None:
    model = small_model().eval()
    images, labels = noise(5, 1, 28, 28), torch.arange(5)
    driven = dense(backbone_for(model)).eval()
    with torch.no_grad():
        tokens = model.forward_features(images)
    for feature, wanted in (("token", tokens[:, 0]), ("avg", tokens[:, 1:].mean(1))):
        batches = iter([(images[:2], labels[:2], labels[:2]), (images[2:], labels[2:], labels[2:])])
        found, y = features(driven, batches, recipes.Reading(feature=feature))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(y, labels) and not found.requires_grad
    one = (images, labels, labels)
    rough, _ = features(driven, iter([one]), recipes.Reading(precision="bf16-mixed"))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, tokens[:, 0], atol=0.1, rtol=0.1)
    tokenless = dense(backbone_for(small_model(class_token=False, global_pool="avg")))
    with pytest.raises(ValueError, match="feature=token needs a class token"):
        features(tokenless, iter([one]), recipes.Reading())
    # After some of the blocks: as if the model ended there.
    first, _ = features(driven, iter([one]), recipes.Reading(depth=1))
    with pytest.raises(ValueError, match=r"^depth=\d+: the model has \d+ blocks$"):
        features(driven, iter([one]), recipes.Reading(depth=len(model.blocks) + 1))
    model.blocks = model.blocks[:1]
    with torch.no_grad():
        torch.testing.assert_close(first, model.forward_features(images)[:, 0])


def test_the_model_that_ships(tmp_path: Path) -> None:
    """Its own head reaches 84.3 %; so should what is read off its features, about."""
    recipe = config.read(recipes.Probe, config.find_recipe("probe", "fashion_part"))
    recipe.data.limit, recipe.data.val_limit, recipe.epochs = 200, 100, 20
    recipe.batch, recipe.lr = 40, 20.0
    result = probe(recipe, tmp_path)
    assert result["linear"] > 70 and result["knn"] > 70
    assert result["accuracy"] == result["linear"]


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors", num_classes=0)  # no head is needed
    recipe = settings(model=recipes.Model(start=start), linear=False, neighbours=5)
    recipe.data = recipes.Data(limit=40, val_limit=20, batch=20)
    result = probe(recipe, tmp_path / "out")
    assert "linear" not in result and result["accuracy"] == result["knn"]
    again = probe(recipe, tmp_path / "out")  # in place of the earlier one
    assert again["knn"] == result["knn"]
    with pytest.raises(ValueError, match="leave nothing to measure"):
        settings(linear=False, neighbours=0)
