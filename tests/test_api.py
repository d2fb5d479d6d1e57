"""apply, unwrap, describe, the self-check, and images and masks that do not fit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small import eva, images, logits, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.api import check_driven
from foveate.backbones import backbone_for
from foveate.core import AttentionReader, ScoreReducer, TokenState
from foveate.methods import EViT


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(vit()).eval()


# Ways to apply -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evit", {"keep": 0.5, "blocks": (1, 2)}),
        ("evit", {"keep": 0.5, "blocks": [1, 2]}),
        ("evit", {"keep": 0.5, "blocks": range(1, 3)}),
        ("evit(keep=0.5, blocks=[1, 2])", {}),
        (EViT, {"keep": 0.5, "blocks": (1, 2)}),
        (EViT(keep=0.5, blocks=(1, 2)), {}),
    ],
    ids=str,
)
def test_every_way_to_name_a_method(model: nn.Module, method: object, options: dict) -> None:
    reduced = foveate.apply(model, method, **options)
    assert repr(reduced.reducer) == "evit(keep=0.5, blocks=(1, 2))"
    assert foveate.unwrap(reduced) is model
    assert reduced.trace(images()).counts() == [(37,) * 3, (20,) * 3, (12,) * 3, (12,) * 3]


def test_an_instance_is_a_template(model: nn.Module) -> None:
    template = EViT(keep=0.5)
    first, second = foveate.apply(model, template), foveate.apply(vit(depth=8), template)
    assert template.active_blocks == () and first.reducer is not second.reducer
    assert (first.reducer.active_blocks, second.reducer.active_blocks) == ((1, 2, 3), (2, 4, 6))


@dataclass(eq=False, kw_only=True, repr=False)
class Norm(ScoreReducer):
    """A method somebody writes in a notebook, not registered."""

    power: float = 2.0

    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "keeps tokens with a large norm"
    hooks: ClassVar[tuple[str, ...]] = ("before",)

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        return state.after_prefix(state.x.float().norm(p=self.power, dim=-1))


@dataclass(eq=False, kw_only=True, repr=False)
class Reversed(EViT):
    """A registered method, changed."""

    def score(self, stage: int, state: TokenState, attention: AttentionReader | None) -> Tensor:
        return -super().score(stage, state, attention)


@pytest.mark.parametrize("by", ["class", "instance"])
def test_methods_of_ones_own_run_or_are_refused_but_are_never_another(
    model: nn.Module, by: str
) -> None:
    for own, options in ((Norm, {"keep": 0.5, "power": 1.0}), (Reversed, {"keep": 0.5})):
        try:
            reduced = (
                foveate.apply(model, own, **options)
                if by == "class"
                else foveate.apply(model, own(**options))
            )
        except ValueError as error:
            assert "register" in str(error) and own.__name__ in str(error)
            continue
        assert type(reduced.reducer) is own
        assert options.items() <= reduced.reducer.config().items()
        reduced(images())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (5, {}, "a name, a class or an instance, got 5"),
        (None, {}, "got None"),
        (nn.Linear, {}, "a name, a class or an instance"),
        (EViT(), {"keep": 0.5}, "to the method's own constructor"),
        ("evit(keep=0.7)", {"keep": 0.5}, "not both"),
        ("evit + tome", {"keep": 0.5}, "not both"),
        ("evit", {"kept": 0.5}, "did you mean 'keep'"),
        ("evitt", {"keep": 0.5}, "did you mean 'evit'"),
        ("evit", {"blocks": (1, 4)}, "0..3 for 4 blocks, got 4"),
        ("tome", {"r": 19}, r"r must lie in 0..18 \(half of the 36 patches"),
        ("svit", {"keep": (0.5, 0.5)}, "keep has 2 rates for 3 blocks"),
    ],
    ids=str,
)
def test_refusals(model: nn.Module, method: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foveate.apply(model, method, **options)


def test_a_reduced_model_is_not_reduced_again(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has a method already: call foveate.unwrap"):
        foveate.apply(foveate.apply(model, "evit"), "tome")
    with pytest.raises(ValueError, match="got VisionTransformer"):
        foveate.unwrap(model)
    with pytest.raises(ValueError, match="VisionTransformer"):
        foveate.describe(model)


def test_parameters_follow_the_model() -> None:
    """Dtype and device of the weights, training flag, and sharing."""
    base = randomise(vit()).to(torch.float64).train()
    reduced = foveate.apply(base, "dynamicvit")
    assert {p.dtype for p in reduced.parameters()} == {torch.float64}
    assert reduced.training and reduced.reducer.training
    assert not foveate.apply(base.eval(), "dynamicvit").training
    with torch.no_grad():
        base.head.bias += 1000
    assert (logits(reduced.eval(), images().double()) > 500).all()
    on_meta = foveate.apply(vit().to("meta"), "dynamicvit")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


def test_two_methods_share_one_model(model: nn.Module) -> None:
    before = logits(foveate.apply(model, "evit"), images())
    foveate.apply(model, "tome")(images())
    assert torch.equal(logits(foveate.apply(model, "evit"), images()), before)


def test_a_copy_stands_alone(model: nn.Module) -> None:
    reduced = foveate.apply(model, "dynamicvit").eval()
    before = logits(reduced, images())
    twin = copy.deepcopy(reduced)
    assert foveate.unwrap(twin) is not model and torch.equal(logits(twin, images()), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert (logits(twin, images()) == 0).all()
    assert torch.equal(logits(reduced, images()), before)


# The self-check ------------------------------------------------------------------------------


def tampered(part: str) -> nn.Module:
    model = randomise(vit())
    if part == "head":
        model.head.register_forward_pre_hook(lambda _, args: (args[0] * 1.05,))
        model.register_forward_hook(lambda _, __, output: output * 1.2)
    elif part == "embedding":
        model.patch_embed.register_forward_hook(lambda _, __, output: output * 1.05)
    elif part == "attention":
        replace_forward(model.blocks[2].attn, 1.05)
    elif part == "block":
        replace_forward(model.blocks[2], 1.05)
    return model


def replace_forward(module: nn.Module, factor: float) -> None:
    """Let a module give something else than its class's forward, which is what is driven."""
    stock = module.forward
    module.forward = lambda *args, **options: stock(*args, **options) * factor


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("block", "block 2"),
        ("attention", "block 2"),
        ("embedding", "embedding"),
        ("head", "head"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_self_check_finds_what_was_tampered_with(part: str, what: str, training: bool) -> None:
    model = tampered(part).train(training)
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=f"its {what} differ.* a replaced forward or a param"):
        foveate.apply(model, "evit")
    assert [module.training for module in model.modules()] == flags
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    foveate.apply(model, "evit", check=False)  # whoever knows better may


def test_small_changes_behind_tiny_scales_are_found() -> None:
    """LayerScale of 1e-6: logits would not show it, blocks do."""
    model = vit(init_values=1e-6)
    check_driven(backbone_for(model))
    replace_forward(model.blocks[1].attn, 1.1)
    with pytest.raises(ValueError, match="block 1"):
        check_driven(backbone_for(model))


@pytest.mark.parametrize("kind", [vit, eva])
def test_the_self_check_leaves_no_trace(kind: object) -> None:
    model = kind(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    check_driven(backbone_for(model))
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_self_check_in_other_precisions(dtype: torch.dtype) -> None:
    model = randomise(vit()).to(dtype)
    foveate.apply(model, "tome")
    replace_forward(model.blocks[2], 1.5)
    with pytest.raises(ValueError, match="block 2"):
        foveate.apply(model, "tome")


# Images and masks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 47, 48), "height 47 is not a multiple of the patch's 8; .* 40 and 48"),
        ((2, 3, 48, 50), "width 50 is not a multiple of the patch's 8; .* 48 and 56"),
        ((2, 3, 4, 48), "height 4 .* 8"),
        ((2, 3, 0, 48), "height 0"),
        ((3, 48, 48), r"\[B, channels, H, W\], got \[3, 48, 48\]"),
        ((0, 3, 48, 48), "no image|at least one image|empty"),
    ],
)
def test_images_that_do_not_fit(model: nn.Module, shape: tuple, message: str) -> None:
    for method in ("evit", "tome", "svit", "ats"):
        with pytest.raises(ValueError, match=message):
            foveate.apply(model, method, check=False)(torch.zeros(shape))


def masks() -> list[tuple[Tensor, str]]:
    all_true = torch.ones(3, 6, 6, dtype=torch.bool)
    shape = r"keep_mask must be bool \[3, 6, 6\] or \[3, 36\], got"
    return [
        (all_true.float(), f"{shape} torch.float32"),
        (all_true.to(torch.uint8), f"{shape} torch.uint8"),
        (all_true[:2], rf"{shape} torch.bool \[2, 6, 6\]"),
        (all_true[:, :5], rf"{shape} torch.bool \[3, 5, 6\]"),
        (all_true[0], rf"{shape} torch.bool \[6, 6\]"),
        (all_true.flatten(), rf"{shape} torch.bool \[108\]"),
        (torch.ones(3, 37, dtype=torch.bool), rf"{shape} torch.bool \[3, 37\]"),
    ]


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("method", ["evit", "svit"])
def test_keep_masks_that_do_not_fit(model: nn.Module, index: int, method: str) -> None:
    mask, message = masks()[index]
    for training in (False, True):
        reduced = foveate.apply(model, method, check=False).train(training)
        with pytest.raises(ValueError, match=message):
            reduced(images(), keep_mask=mask)
    model.eval()


def test_a_keep_mask_cannot_be_gathered(model: nn.Module) -> None:
    reduced = foveate.apply(model, "evit")
    reduced.mode = "gathered"
    with pytest.raises(ValueError, match="use mode 'packed'"):
        reduced(images(), keep_mask=torch.ones(3, 36, dtype=torch.bool))


def test_the_public_names() -> None:
    assert sorted(foveate.__all__) == [
        "Predictions",
        "Schedule",
        "adapt",
        "apply",
        "count",
        "describe",
        "detect",
        "evaluate",
        "export",
        "finetune",
        "from_pretrained",
        "list_methods",
        "load",
        "pipeline",
        "predict",
        "pretrain",
        "probe",
        "push_to_hub",
        "reduce",
        "save",
        "segment",
        "tune",
        "unwrap",
    ]
