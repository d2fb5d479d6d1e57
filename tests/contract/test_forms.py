"""Backbones alone: what is driven equals what the model does by itself."""

from __future__ import annotations

import pytest
import torch
from table import (
    FORMS,
    IMAGE,
    OTHER_SIZES,
    close,
    fitting,
    form,
    images,
    randomise,
    reduced,
    said,
    vit,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva

import foveate

NOTHING = "random(keep=1.0)"


@pytest.mark.parametrize("name", FORMS)
def test_native_equals_driven(name: str) -> None:
    model = form(name)
    with torch.no_grad():
        close(said(reduced(NOTHING, name), images()), said(model, images()))


@pytest.mark.parametrize("name", FORMS)
def test_native_equals_driven_in_training(name: str) -> None:
    """With stochastic depth and dropout off; gradients too."""
    model = randomise(FORMS[name]()).train()
    driven = reduced(NOTHING, name, model).train()
    grads = {}
    for key, output in (("native", said(model, images())), ("driven", said(driven, images()))):
        model.zero_grad()
        output.square().sum().backward()
        grads[key] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["native"].keys() == grads["driven"].keys()
    for n, grad in grads["native"].items():
        close(grads["driven"][n], grad, 1e-4)


@pytest.mark.parametrize("name", ["vit", "deit3", "eva02"])
@pytest.mark.parametrize("mode", ["gathered", "packed"])
def test_stochastic_depth_drops_whole_images(name: str, mode: str) -> None:
    """The same random numbers as the native model draws, whatever the layout."""
    model = FORMS[name]()
    model = type(model)(**{**BASE[name], "drop_path_rate": 0.5})
    model = randomise(model).train()
    driven = reduced(NOTHING, name, model).train()
    driven.mode = mode
    torch.manual_seed(3)
    native = model(images(4))
    torch.manual_seed(3)
    close(driven(images(4)), native)


BASE = {
    "vit": dict(img_size=IMAGE, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10),
}
BASE["deit3"] = {**BASE["vit"], "no_embed_class": True, "init_values": 1e-6}
BASE["eva02"] = {**BASE["vit"], "use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", OTHER_SIZES)
def test_other_sizes_equal_a_model_built_for_them(name: str, size: tuple[int, int]) -> None:
    """The driver takes any size; timm does after set_input_size, transformers when told."""
    driven, size = reduced(NOTHING, name), fitting(name, size)
    other = randomise(FORMS[name]())
    other.load_state_dict(form(name).state_dict())
    options = {}
    if name in ("hf_vit", "hf_siglip"):
        options = {"interpolate_pos_encoding": True}
    elif not name.startswith("hf_") and not getattr(other, "dynamic_img_size", False):
        other.set_input_size(img_size=size)
    with torch.no_grad():
        native = said(other.eval(), images(2, size), **options)
        close(said(driven, images(2, size)), native, 5e-5)


@pytest.mark.parametrize("name", FORMS)
def test_self_check_passes(name: str) -> None:
    foveate.apply(form(name), "tome")


def test_self_check_catches_a_changed_block() -> None:
    model = randomise(vit())
    stock = model.blocks[2].forward
    model.blocks[2].forward = lambda x, **options: stock(x, **options) * 1.05
    model.blocks[1].eval()
    with pytest.raises(ValueError, match="block 2 differs"):
        foveate.apply(model, "tome")
    assert model.training and not model.blocks[1].training


def test_hooks_that_change_a_block_are_part_of_the_model() -> None:
    model = randomise(vit()).eval()
    plain = said(model, images())
    model.blocks[2].register_forward_hook(lambda _, __, output: output * 1.05)
    driven = foveate.apply(model, NOTHING)
    with torch.no_grad():
        close(said(driven, images()), said(model, images()))
        assert (said(driven, images()) - plain).abs().max() > 1e-3


def test_prefixes_are_0_1_2_and_5() -> None:
    prefixes = {foveate.apply(form(n), "tome", check=False).backbone.spec.prefix for n in FORMS}
    assert prefixes == {0, 1, 2, 5}
    assert {type(form(n)) for n in FORMS} >= {VisionTransformerDistilled, Eva}


def test_gradient_checkpointing_changes_nothing() -> None:
    for method in ("evit", "tome", "svit", "dynamicvit"):
        model = randomise(vit()).train()
        driven = reduced(method, "vit", model).train()
        grads = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            driven.zero_grad()
            torch.manual_seed(0)
            driven(images()).square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in driven.parameters()]))
        close(grads[1], grads[0], 1e-5)
