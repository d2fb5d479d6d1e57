"""What holds for every method on every form of ViT: what it sees, and that it trains."""

from __future__ import annotations

import pytest
import torch
from masked_models import close, forms, images, mask, with_other
from small import noise
from torch import Tensor

from foveate.mim import Mask
from foveate.mim.method import Prediction

ALL = forms("mae", "simmim", "bootmae", "conmim")
EVERY = pytest.mark.parametrize("form", ALL)


def loss_of(found: Prediction) -> Tensor:
    """One number that all parts of a method have a share in, its states included."""
    return sum(found.losses.values()) + sum(
        network.tokens[1].float().square().mean() for network in found.states
    )


@EVERY
def test_hidden_pixels_do_not_matter_and_visible_ones_do(form: str) -> None:
    model, x, hiding = ALL[form](), images(), mask()
    hidden, seen = (with_other(x, hiding.hidden, change=what) for what in ("hidden", "visible"))
    with torch.no_grad():
        before, same, other = (model(each, hiding).patches for each in (x, hidden, seen))
        if model.name == "mae":
            assert torch.equal(model.encode(x, hiding), model.encode(hidden, hiding))
    assert torch.equal(before, same)
    assert not torch.allclose(before, other, atol=1e-2)


@pytest.mark.parametrize("form", forms("mae", "bootmae"))
def test_the_order_of_kept_tokens_does_not_matter(form: str) -> None:
    model, x, hiding = ALL[form](), images(), mask()
    assert hiding.visible is not None
    order = torch.stack([noise(13, seed=i).argsort() for i in range(2)])
    other = Mask(hiding.hidden, hiding.visible.gather(1, order), hiding.masked)
    with torch.no_grad():
        one, two = (model(x, each, states=True) for each in (hiding, other))
    assert one.losses.keys() == two.losses.keys()
    for name, loss in one.losses.items():
        close(loss, two.losses[name])
    close(one.patches, two.patches)
    for a, b in zip(one.states, two.states, strict=True):
        for mine, its in zip(a.tokens, b.tokens, strict=True):
            close(mine, its)


@EVERY
def test_gradients_with_recomputed_activations(form: str) -> None:
    model, x, hiding = ALL[form](), images(), mask()
    found = []
    for recomputed in (False, True):
        model.vit.set_grad_checkpointing(recomputed)
        model.zero_grad()
        loss_of(model(x, hiding, states=True)).backward()
        found.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, grad in found[0].items():
        close(found[1][name], grad, 1e-5)


@EVERY
def test_half_precision(form: str) -> None:
    model, x, hiding = ALL[form](), images(), mask()
    whole = model(x, hiding)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, hiding, states=True)
    for name, loss in found.losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(whole.losses[name].item(), rel=0.05)
    sum(found.losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.painted(x, found).dtype == torch.float32


@EVERY
def test_every_parameter_but_fixed_positions_learns(form: str) -> None:
    """The shared position bias too; timm's own head, of which nothing is left, has none."""
    model = ALL[form]()
    sum(model(images(), mask()).losses.values()).backward()
    assert not {k for k, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not {k for k, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
