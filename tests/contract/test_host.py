"""A reduced model in the hands of other libraries: it answers as the model inside would."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from table import FORMS, close, form, images, randomise, reduced, vit
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import foveate

NOTHING = "random(keep=1.0)"
TIMM = [name for name in FORMS if not name.startswith("hf_")]


def test_preprocessing_is_that_of_the_model_inside() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    model.pretrained_cfg["mean"] = model.pretrained_cfg["std"] = (0.5, 0.4, 0.3)
    wrapped = foveate.apply(model, "evit", check=False)
    assert resolve_model_data_config(wrapped) == resolve_model_data_config(model)
    assert resolve_model_data_config(wrapped)["mean"] == (0.5, 0.4, 0.3)


@pytest.mark.parametrize("name", TIMM)
def test_the_same_caller_reads_both_models(name: str) -> None:
    plain, wrapped = form(name), reduced(NOTHING, name)

    def caller(model: nn.Module) -> dict:
        return {
            "classes": model.num_classes,
            "features": (model.num_features, model.embed_dim, model.num_prefix_tokens),
            "classifier": model.get_classifier(),
            "training": model.training,
        }

    assert caller(wrapped) == caller(plain)
    with torch.no_grad():
        features = wrapped.forward_features(images())
        close(features, plain.forward_features(images()))
        if "siglip" not in name:  # timm's own attention pooling wants its module's shape alone
            close(wrapped.forward_head(features), wrapped(images()))


OPTIONS = [
    {},
    {"indices": 2},
    {"indices": [0, -1]},
    {"indices": [3, 1], "norm": True},
    {"indices": [1], "stop_early": True},
    {"indices": 1, "output_fmt": "NLC"},
    {"indices": 2, "intermediates_only": True},
    {"indices": 2, "return_prefix_tokens": True},
    {"indices": 2, "return_prefix_tokens": True, "intermediates_only": True, "norm": True},
]


def flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in flat(part)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "siglip_average", "dinov3"])
def test_intermediates_have_timms_forms(name: str, options: dict) -> None:
    with torch.no_grad():
        own = form(name).forward_intermediates(images(), **options)
        mine = reduced(NOTHING, name).forward_intermediates(images(), **options)
    assert type(mine) is type(own)
    for a, b in zip(flat(mine), flat(own), strict=True):
        close(a, b)


def test_intermediates_as_a_dictionary() -> None:
    with torch.no_grad():
        own = form("vit").forward_intermediates(images(), 2, True, output_dict=True)
        mine = reduced(NOTHING, "vit").forward_intermediates(images(), 2, True, output_dict=True)
        layers = form("vit").get_intermediate_layers(images(), 2, norm=True)
        mine_layers = reduced(NOTHING, "vit").get_intermediate_layers(images(), 2, norm=True)
    assert sorted(mine) == sorted(own)
    for key in own:
        for a, b in zip(flat(mine[key]), flat(own[key]), strict=True):
            close(a, b)
    for a, b in zip(mine_layers, layers, strict=True):
        close(a, b)


def test_timms_optimisers_see_the_models_groups() -> None:
    plain = randomise(vit(class_token=True))
    wrapped = foveate.apply(copy.deepcopy(plain), "dynamicvit", check=False)
    assert wrapped.no_weight_decay() == {f"vit.{n}" for n in plain.no_weight_decay()}

    def scales(model: nn.Module) -> dict[str, tuple[float, float]]:
        names = {id(p): n.removeprefix("vit.") for n, p in model.named_parameters()}
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
        return {
            names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]
        }

    own, mine = scales(plain), scales(wrapped)
    assert {name: own[name][1] for name in own} == {name: mine[name][1] for name in own}
    depth = [mine[f"blocks.{b}.mlp.fc1.weight"][0] for b in range(4)]
    assert depth == sorted(depth) and depth[0] < depth[-1]
    assert {mine[n][0] for n in mine if n.startswith("reducer.predictors")} == {1.0}
    create_optimizer_v2(wrapped, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)


def test_another_head_through_the_wrapper() -> None:
    model = foveate.apply(randomise(vit()), "evit", check=False).eval()
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(images()).shape == (3, 3)
    assert model.backbone.spec.classes == 3
    model.set_grad_checkpointing(True)
    assert model.vit.grad_checkpointing and model.backbone.checkpointing


def test_what_does_not_know_the_method_is_refused() -> None:
    model = foveate.apply(randomise(vit()), "evit", check=False)
    with pytest.raises(AttributeError, match="before foveate.apply"):
        model.prune_intermediate_layers(2)
    with pytest.raises(AttributeError, match="neither ReducedViT nor the VisionTransformer inside"):
        _ = model.colour
    assert not hasattr(model, "colour") and copy.deepcopy(model).num_classes == 10
