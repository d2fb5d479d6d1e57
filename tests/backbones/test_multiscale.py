"""Multi-scale ViTs: two scales in the first blocks, fused before any method acts."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import close, images, logits, randomise, vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

import foveate
from foveate.backbones import MultiScaleViT, Scales, multiscale
from foveate.convert import save_plain
from foveate.mim import Mae
from foveate.train.optim import parameter_groups
from foveate.train.recipe import Optim


def two_scales(seed: int = 0, **options: object) -> MultiScaleViT:
    """Six blocks, two of them first ones, on 6 x 6 and 3 x 3 patches."""
    model = vit(MultiScaleViT, depth=6, scales=Scales(**{"early": 2, **options}))
    return randomise(model, seed).eval()


def textbook(model: MultiScaleViT, x: Tensor, down: str, low_own: bool = False) -> Tensor:
    """The paper's equations 5 and 6 for one class token and a 6 x 6 grid, patch by patch."""
    own = model.patch_embed
    halves = F.interpolate(x, scale_factor=0.5, mode="area")
    low_proj = own.low_proj if low_own else own.proj
    high = own.proj(x).flatten(2).transpose(1, 2)
    low = low_proj(halves).flatten(2).transpose(1, 2)
    high = torch.cat([model.cls_token.expand(len(x), -1, -1), high], 1) + model.pos_embed
    low = torch.cat([model.low_cls_token.expand(len(x), -1, -1), low], 1) + model.low_pos_embed
    below = [3 * (i // 6 // 2) + i % 6 // 2 for i in range(36)]  # the low cell of a high one
    for number, block in enumerate(model.early):
        if number < 1:
            y = block.norm1(high)
            cells = []
            for cell in range(9):
                four = [1 + i for i in range(36) if below[i] == cell]
                cells.append(y[:, four].mean(1) if down == "mean" else y[:, four[0]])
            out = block.attn(torch.cat([y[:, :1], torch.stack(cells, 1)], 1))
            high = high + out[:, [0, *(1 + cell for cell in below)]]
            high = high + block.mlp(block.norm2(high))
        else:
            high = block(high)
        low = (model.low_blocks[number] if low_own else block)(low)
    up = low[:, [1 + cell for cell in below]].transpose(1, 2).unflatten(2, (6, 6))
    weights = model.lka.mix(model.lka.far(model.lka.near(up)))
    patches = high[:, 1:].transpose(1, 2).unflatten(2, (6, 6)) + weights * up
    patches = patches + model.peg.conv(patches)
    token = high[:, :1] + (low[:, :1] if model.scales.class_tokens == "sum" else 0)
    x = torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)
    return model.head(model.norm(model.blocks(x))[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("down", ["mean", "nearest"])
@pytest.mark.parametrize("class_tokens", ["high", "sum"])
@pytest.mark.parametrize("shared", ["all", "none"])
def test_native_is_the_papers_equations(down: str, class_tokens: str, shared: str) -> None:
    model = two_scales(down=down, class_tokens=class_tokens, shared=shared)
    x = images()
    close(model(x), textbook(model, x, down, shared == "none"))
    other = {"mean": "nearest", "nearest": "mean"}[down]
    assert (model(x) - textbook(model, x, other, shared == "none")).abs().max() > 1e-3
    close(logits(foveate.apply(model, "random(keep=1.0)"), x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("shared", ["all", "blocks", "none"])
@pytest.mark.parametrize("form", [{}, {"no_embed_class": True, "reg_tokens": 2}])
def test_starts_as_the_plain_model(shared: str, form: dict) -> None:
    plain = randomise(vit(**form)).eval()
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    model = multiscale(plain, downsampled=0, shared=shared)
    close(model(images()), plain(images()))
    assert (multiscale(plain, early=2)(images()) - plain(images())).abs().max() > 1e-3
    model.head.weight.zero_()  # the weights are copies
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


def test_new_parts_learn_from_the_start() -> None:
    model = multiscale(randomise(vit()), early=2, shared="none").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # what lies behind a zero has no gradient before that has moved
        optimiser.zero_grad()
        model(images()).square().mean().backward()
        optimiser.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert float(p.grad.abs().max()) > 0, name


# Parameters as printed, and multiply-adds with Token Mergence at two keep rates.
@pytest.mark.parametrize(
    "size, millions, published",
    [
        ("tiny", 5.8, {}),
        ("small", 22.2, {0.7: 3.1, 0.5: 2.4}),
        ("base", 86.6, {}),
    ],
)
def test_the_papers_numbers(size: str, millions: float, published: dict[float, float]) -> None:
    with torch.device("meta"):
        model = multiscale(timm.create_model(f"deit_{size}_patch16_224"))
    counted = foveate.count(model)
    assert counted.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    for keep, printed in published.items():
        macs = foveate.count(foveate.apply(model, f"tokenmergence(keep={keep})")).macs
        assert macs / 1e9 == pytest.approx(printed, rel=0.02)


@pytest.mark.parametrize(
    "size, printed, default, everywhere",
    [("tiny", 0.8, 0.831, 0.795), ("base", 11.5, 11.925, 11.522)],
)
def test_what_the_default_misses(
    size: str, printed: float, default: float, everywhere: float
) -> None:
    """DeiT-T and -B cost 4 % more than printed; down-sampling in all first blocks meets those."""
    with torch.device("meta"):
        plain = timm.create_model(f"deit_{size}_patch16_224")
        for options, expected in (({}, default), ({"downsampled": 3}, everywhere)):
            model = foveate.apply(multiscale(plain, **options), "tokenmergence(keep=0.7)")
            assert foveate.count(model).macs / 1e9 == pytest.approx(expected, abs=6e-4)
    assert everywhere == pytest.approx(printed, rel=0.01) != default


def test_methods_act_after_the_first_blocks() -> None:
    with torch.device("meta"):
        model = multiscale(timm.create_model("deit_small_patch16_224"))
    assert (len(model.early), len(model.blocks), model.scales.downsampled) == (3, 9, 2)
    reduced = foveate.apply(model, "tokenmergence(keep=0.7)")
    assert reduced.reducer.active_blocks == (0, 3, 6)  # blocks 3, 6 and 9 of the plain model
    assert foveate.count(reduced).tokens == (139, 139, 139, 98, 98, 98, 69, 69, 69)
    assert "depth 9 after 3 in the embedding, 14 x 14 patches" in foveate.describe(reduced)
    with pytest.raises(ValueError, match=r"blocks must lie in 0\.\.8 for 9 blocks, got 9"):
        foveate.apply(model, "tokenmergence(blocks=[3, 6, 9])")
    small = foveate.apply(two_scales(), "tome(r=5)").eval()
    trace = small.trace(images())
    assert set(trace.blocks[0].attention.layout.lengths) == {37}


def test_what_leaves_patches_out_from_the_start_is_refused() -> None:
    reduced = foveate.apply(two_scales(), "evit")
    mask = torch.ones(3, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="multi-scale ViT models take no keep_mask: its first"):
        reduced(images(), keep_mask=mask)
    with pytest.raises(ValueError, match="multi-scale ViT models cannot be pre-trained here"):
        Mae(two_scales())


def test_gradient_checkpointing_changes_nothing() -> None:
    model = two_scales().train()
    driven = foveate.apply(model, "evit").train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        driven.zero_grad()
        driven(images()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in driven.parameters()]))
    close(grads[1], grads[0], 1e-5)


def test_layers_are_in_order_for_layer_decay() -> None:
    class Task:
        backbone = model = two_scales(shared="none")

    groups = parameter_groups(Task(), Optim(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(Task.model.named_parameters())
    order = ["low_pos_embed", "early.0.mlp.fc1.weight", "early.1.mlp.fc1.weight", "lka.mix.weight"]
    order += [f"blocks.{n}.mlp.fc1.weight" for n in range(4)]
    scales = [scale[id(named[name])] for name in order]
    assert scales == sorted(set(scales)) and scale[id(named["head.weight"])] == 1
    for name, beside in (
        ("cls_token", "low_cls_token"),
        ("patch_embed.proj.weight", "patch_embed.low_proj.weight"),
        ("early.1.mlp.fc1.weight", "low_blocks.1.mlp.fc1.weight"),
        ("lka.mix.weight", "peg.conv.weight"),
    ):
        assert scale[id(named[name])] == scale[id(named[beside])]
    assert decay[id(named["low_pos_embed"])] == decay[id(named["low_cls_token"])] == 0


def test_another_size_another_head() -> None:
    model = two_scales()
    driven = foveate.apply(model, "random(keep=1.0)").eval()
    wide = images(2, (64, 32))
    at_size = logits(driven, wide)
    model.set_input_size(img_size=(64, 32))
    close(model(wide).detach(), at_size, 1e-4)
    close(logits(driven, wide), at_size, 1e-4)
    with pytest.raises(ValueError, match="takes images of 64 x 32, got 48 x 48"):
        model(images())
    model.reset_classifier(3)
    close(logits(driven, wide), model(wide).detach())
    assert model(wide).shape == (2, 3)


def test_everything_is_saved(tmp_path: Path) -> None:
    vit_ = two_scales(down="nearest", class_tokens="sum", shared="none")
    model = foveate.apply(vit_, "dynamicvit(keep=0.6)").eval()
    randomise(model.reducer, seed=1)
    foveate.save(model, tmp_path, everything=True)
    again = foveate.load(tmp_path).eval()
    assert type(foveate.unwrap(again)) is MultiScaleViT
    assert torch.equal(logits(again, images()), logits(model, images()))
    named = multiscale(timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=5))
    foveate.save(foveate.apply(named.eval(), "evit"), tmp_path / "named", everything=True)
    assert foveate.unwrap(foveate.load(tmp_path / "named")).scales == named.scales


def test_a_file_of_the_plain_model_opens_again(tmp_path: Path) -> None:
    model, path = two_scales(shared="blocks", class_tokens="sum"), tmp_path / "m.safetensors"
    save_plain(model, path)
    again = foveate.load(path)
    assert again.scales == model.scales
    assert torch.equal(logits(again, images()), logits(model, images()))
    larger = foveate.load(path, image_size=64)
    assert larger(images(1, (64, 64))).shape == (1, 10) and larger.low_pos_embed.shape[1] == 17
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    with pytest.raises(ValueError, match=r"two scales and no metadata foveate\.scales"):
        foveate.load(bare, num_heads=3)
    close(logits(foveate.load(bare, two_scales(shared="blocks")), images()), again_high(model))
    with pytest.raises(ValueError, match="cannot be halved for the low scale"):
        foveate.load(path, image_size=56)


def again_high(model: MultiScaleViT) -> Tensor:
    """The answer of the same weights with the other class token."""
    other = two_scales(shared="blocks")
    other.load_state_dict(model.state_dict())
    return logits(other, images())


@pytest.mark.parametrize(
    "made, words",
    [
        (lambda: vit(MultiScaleViT, img_size=40), "images of 5 x 5 patches cannot be halved"),
        (lambda: multiscale(vit(img_size=(48, 56))), "images of 6 x 7 patches cannot be halved"),
        (lambda: foveate.apply(two_scales(), "evit")(images(1, (48, 40))), "multiple of 16 pixels"),
        (lambda: two_scales().set_input_size(img_size=(48, 40)), "of 6 x 5 patches cannot be"),
        (lambda: two_scales().set_input_size(patch_size=(4, 4)), "keeps its patch size"),
        (lambda: two_scales(early=6), r"early must be a number of blocks in 1\.\.5"),
        (lambda: two_scales(early=0), r"early must be a number of blocks in 1\.\.5"),
        (lambda: two_scales(downsampled=3), r"downsampled must lie in 0\.\.2"),
        (lambda: two_scales(shared="some"), "shared must be one of 'all', 'blocks', 'none'"),
        (lambda: two_scales(down="max"), "down must be one of 'mean', 'nearest'"),
        (lambda: two_scales(class_tokens="low"), "class_tokens must be one of 'high', 'sum'"),
        (lambda: multiscale(vit(), late=3), "no option 'late'; its options are early, downsampled"),
        (lambda: multiscale(two_scales()), "has two scales already"),
        (lambda: multiscale(nn.Linear(2, 2)), "Linear cannot be given a second scale"),
        (lambda: multiscale(vit(VisionTransformerDistilled)), "Distilled cannot be given a second"),
        (lambda: multiscale(vit(act_layer="quick_gelu")), "settings that its sizes do not show"),
        (lambda: multiscale(vit(pre_norm=True)), "cannot have a norm before the blocks"),
        (
            lambda: multiscale(vit(class_token=False, global_pool="avg")),
            "needs a class token",
        ),
        (
            lambda: foveate.apply(vit(type("Other", (MultiScaleViT,), {"fused": None})), "evit"),
            "a class of its own",
        ),
    ],
)
def test_bad_values(made, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made()
