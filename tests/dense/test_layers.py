"""Convolutions with their norms: a settled batch norm is part of the convolution."""

from __future__ import annotations

import pytest
import torch
from small import noise
from torch import nn

from foveate.dense import Canvas
from foveate.dense.layers import NORMS, ConvNorm


def layer(norm: str) -> ConvNorm:
    """A layer whose norm has other statistics than new ones."""
    torch.manual_seed(0)
    made = ConvNorm(3, 5, 3, stride=2, scale=4.0, norm=norm, act=nn.ReLU)
    state = made.norm.state_dict()
    for name, values in state.items():
        if values.is_floating_point():
            state[name] = torch.rand(values.shape) + (0.5 if "var" in name else -0.5)
    made.norm.load_state_dict(state)
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_is_convolution_norm_and_activation(norm: str, training: bool) -> None:
    made = layer(norm).train(training)
    canvas = Canvas.of(noise(2, 3, 16, 16), (8, 8), 1)
    results, gradients = [], []
    for way in (lambda x: made(x, canvas), lambda x: made.norm(made.conv(x)).relu()):
        made.zero_grad()
        found = way(canvas.images)
        found.square().sum().backward()
        results.append(found)
        gradients.append({name: p.grad.clone() for name, p in made.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and "conv.weight" in gradients[0]
    for name, values in gradients[0].items():
        torch.testing.assert_close(values, gradients[1][name], rtol=1e-4, atol=1e-5)
    assert (results[0] > 0).any()


def test_padding_stays_zero_behind_a_bias() -> None:
    made = layer("batch").eval()
    canvas = Canvas.of([noise(3, 16, 16), noise(3, 8, 8)], (8, 8), 1)
    found = made(canvas.images, canvas)
    assert found.shape[-2:] == (8, 8) and not found[1, :, 4:].any() and not found[1, :, :, 4:].any()
    assert found[1, :, :4, :4].any()
