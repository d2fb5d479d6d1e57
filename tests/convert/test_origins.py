"""Checkpoints of every origin, made of our own models' weights under their releases' names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import (
    HEADS,
    Weights,
    as_dynamicvit,
    as_evovit,
    as_svit,
    lvvit,
    mae,
    parts,
    reduced,
    write,
)
from contract.table import FORMS
from small import close, images, logits, randomise, vit
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from torch import nn

import foveate
from foveate.cli import main
from foveate.core import ReducedViT


def load(path: Path, **options: object) -> nn.Module:
    return foveate.load(path, num_heads=HEADS, **options)


def svit() -> ReducedViT:
    base = randomise(vit())
    for block in base.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5
    return reduced("svit(gate_prefix_last=True)", base)


CASES: dict[str, tuple[Callable[[], ReducedViT], Callable[[ReducedViT], Weights], dict]] = {
    "dynamicvit": (lambda: reduced("dynamicvit(keep=0.6)"), as_dynamicvit, {"keep": 0.6}),
    "dynamicvit by default": (lambda: reduced("dynamicvit(keep=0.7)"), as_dynamicvit, {}),
    "dynamicvit elsewhere": (
        lambda: reduced("dynamicvit(keep=0.6, blocks=[1, 3])"),
        as_dynamicvit,
        {"keep": 0.6, "blocks": (1, 3), "origin": "dynamicvit"},
    ),
    "dynamicvit on lvvit": (lambda: reduced("dynamicvit", lvvit()), as_dynamicvit, {}),
    "evit": (lambda: reduced("evit(keep=0.6)"), parts, {"origin": "evit", "keep": 0.6}),
    "evit on lvvit": (lambda: reduced("evit", lvvit()), parts, {"origin": "evit"}),
    "evovit": (
        lambda: reduced("evovit(variant='deit')", randomise(vit(global_pool="avg"))),
        as_evovit,
        {},
    ),
    "svit": (svit, as_svit, {}),
    "tome": (lambda: reduced("tome(r=4)"), parts, {"method": "tome(r=4)"}),
    "tome on lvvit": (lambda: reduced("tome(r=4)", lvvit()), parts, {"method": "tome", "r": 4}),
}


@pytest.mark.parametrize("kind", CASES)
def test_released_names(kind: str, tmp_path: Path) -> None:
    make, name_as, options = CASES[kind]
    model = make()
    path = write({"model": name_as(model)}, tmp_path / "x.pth")
    again = load(path, **options)
    assert isinstance(again, ReducedViT) and not again.training
    assert again.reducer.config() == model.reducer.config()
    assert torch.equal(logits(again, images()), logits(model, images()))
    # Saved whole, it needs neither the checkpoint nor a model.
    foveate.save(again, tmp_path / "out", everything=True)
    last = foveate.load(tmp_path / "out").eval()
    assert torch.equal(logits(last, images()), logits(model, images()))


def test_a_budget_goes_with_a_checkpoint(tmp_path: Path) -> None:
    path = write(dict(randomise(vit()).state_dict()), tmp_path / "x.pth")
    assert foveate.count(load(path, method="tome", budget="80%")).ratio < 0.85


def test_mae_gives_its_encoder(tmp_path: Path) -> None:
    state = mae()
    path = write({"model": state}, tmp_path / "x.pth")
    for options in ({}, {"origin": "mae"}):
        model = load(path, **options)
        assert model.num_classes == 0
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert load(path, method="evit").reducer.name == "evit"


# Plain models, their form read off ---------------------------------------------------------------

NORM = partial(nn.LayerNorm, eps=1e-5)
PLAIN: dict[str, Callable[[], nn.Module]] = {
    **{
        name: FORMS[name]
        for name in ("vit", "vit_average", "deit_distilled", "deit3", "dinov2", "dinov2_reg4")
    },
    "siglip": FORMS["siglip"],
    "siglip_average": FORMS["siglip_average"],
    "siglip_norm_first": lambda: vit(class_token=False, global_pool="avg", fc_norm=False),
    "clip": lambda: vit(pre_norm=True, norm_layer=NORM),
    "qk_norm": lambda: vit(qk_norm=True),
    "no_qkv_bias": lambda: vit(qkv_bias=False),
    "registers_with_positions": lambda: vit(reg_tokens=4),
    "patches_with_positions": lambda: vit(no_embed_class=True),
    "distilled_headless": lambda: vit(VisionTransformerDistilled, num_classes=0),
    "grey": lambda: vit(in_chans=1),
    "wide_mlp": lambda: vit(mlp_ratio=100 / 48),
    "large_patches": lambda: vit(patch_size=16),
    "lvvit": lvvit,
    "lvvit_headless": lambda: lvvit(num_classes=0),
}


@pytest.mark.parametrize("name", PLAIN)
def test_forms_are_read_off_the_tensors(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(PLAIN[name]()).eval()
    path = write({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    again = load(path)
    assert type(again) is type(model) and not again.training
    assert not any(p.is_meta for p in again.parameters())
    x = images()
    x = x[:, :1] if name == "grey" else x
    assert torch.equal(logits(again, x), logits(model, x))
    # A plain model is written as one file, which says what its tensors do not.
    foveate.convert.save_plain(again, tmp_path / "x.safetensors")
    assert torch.equal(logits(foveate.load(tmp_path / "x.safetensors"), x), logits(model, x))
    # And whole, below a method.
    foveate.save(foveate.apply(again, "tome(r=2)"), tmp_path / "out", everything=True)
    with_method = foveate.load(tmp_path / "out").eval()
    expected = foveate.apply(model, "tome(r=2)").eval()
    assert torch.equal(logits(with_method, x), logits(expected, x))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]
)
def test_named_models_need_no_help(name: str, tmp_path: Path) -> None:
    model = randomise(timm.create_model(name, depth=2)).eval()
    path = write(model.state_dict(), tmp_path / "x.pth")
    x = images(1, (224, 224))
    assert torch.equal(logits(foveate.load(path), x), logits(model, x))


def test_a_given_model_says_what_tensors_do_not(tmp_path: Path) -> None:
    model = randomise(vit(pre_norm=True, act_layer="quick_gelu")).eval()
    path = write(model.state_dict(), tmp_path / "x.pth")
    mine = vit(pre_norm=True, act_layer="quick_gelu")
    assert foveate.load(path, mine) is mine
    assert torch.equal(logits(mine, images()), logits(model, images()))
    eva = randomise(FORMS["eva02"](), seed=3).eval()
    again = foveate.load(
        write(eva.state_dict(), tmp_path / "eva.pth"), FORMS["eva02"](), method="tome"
    )
    close(logits(again, images()), logits(foveate.apply(eva, "tome").eval(), images()))
    with pytest.raises(ValueError, match=r"head\.weight of shape \[10, 48\]; expected \[3, 48\]"):
        foveate.load(path, vit(pre_norm=True, num_classes=3))
    with pytest.raises(ValueError, match="are the given model's; leave them out"):
        foveate.load(path, mine, num_heads=3)
    with pytest.raises(ValueError, match=r"has a method already: call foveate.unwrap"):
        foveate.load(path, foveate.apply(mine, "tome"))


# Heads, sizes, positions -------------------------------------------------------------------------


def test_heads(tmp_path: Path) -> None:
    path = write(vit().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth has width 48, .*num_heads="):
        foveate.load(path)
    for wrong in (5, 0, -3, 2.0, True):
        with pytest.raises(ValueError, match="divides the width 48"):
            foveate.load(path, num_heads=wrong)
    assert foveate.load(path, num_heads=6).blocks[0].attn.num_heads == 6
    wide = write(vit(embed_dim=128, num_heads=2).state_dict(), tmp_path / "wide.pth")
    assert foveate.load(wide).blocks[0].attn.num_heads == 2


@pytest.mark.parametrize("size", [32, 96, (64, 48)])
def test_positions_are_resized(size: int | tuple[int, int], tmp_path: Path) -> None:
    model = randomise(vit())
    path = write(model.state_dict(), tmp_path / "x.pth")
    height, width = (size, size) if isinstance(size, int) else size
    answers = []
    for antialias in (True, False):
        again = load(path, image_size=size, antialias=antialias)
        expected = resample_abs_pos_embed(
            model.pos_embed.detach(), [height // 8, width // 8], [6, 6], 1, antialias=antialias
        )
        assert torch.equal(again.pos_embed, expected)
        answers.append(logits(again, images(2, (height, width))))
    difference = (answers[0] - answers[1]).abs().max() / answers[0].abs().max()
    assert difference > 1e-3


def test_another_size_below_a_method(tmp_path: Path) -> None:
    model = reduced("dynamicvit(keep=0.7)")
    path = write({"model": as_dynamicvit(model)}, tmp_path / "x.pth")
    large = load(path, image_size=96)
    trace = large.trace(images(2, (96, 96)))
    counts = [len(set(row[row >= 0].tolist())) for row in trace.final.source]
    assert counts == [int(144 * 0.7**3)] * 2
    foveate.save(large, tmp_path / "out", everything=True)
    again = foveate.load(tmp_path / "out").eval()
    assert torch.equal(logits(again, images(2, (96, 96))), trace.logits)


def test_a_grid_that_is_no_square(tmp_path: Path) -> None:
    model = randomise(vit(img_size=(32, 72))).eval()
    path = write(model.state_dict(), tmp_path / "x.pth")
    x = images(2, (32, 72))
    model48 = randomise(vit(img_size=(40, 48))).eval()
    path48 = write(model48.state_dict(), tmp_path / "y.pth")
    with pytest.raises(ValueError, match="31 positions and 1 prefix tokens"):
        load(path48)
    y = images(2, (40, 48))
    again = load(path48, image_size=(40, 48))
    assert torch.equal(logits(again, y), logits(model48, y))
    # Its own metadata settles it for good, and other sizes start from there.
    foveate.convert.save_plain(again, tmp_path / "y.safetensors")
    assert torch.equal(logits(foveate.load(tmp_path / "y.safetensors"), y), logits(model48, y))
    assert foveate.load(tmp_path / "y.safetensors", image_size=64).patch_embed.grid_size == (8, 8)
    # 4 x 9 patches are as many as 6 x 6 and are taken for those.
    square = load(path, image_size=(32, 72))
    assert not torch.equal(logits(square, x), logits(model, x))


@pytest.mark.parametrize("size", [50, 0, -8, (48,), (48, 48, 48), "48", 48.0])
def test_wrong_sizes(size: object, tmp_path: Path) -> None:
    path = write(vit().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="image"):
        load(path, image_size=size)


# Wrong words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"origin": "evitt"}, "unknown origin 'evitt'; did you mean 'evit'?"),
        ({"origin": "dynamicvit"}, "has the keys of 'vit', but origin='dynamicvit' was"),
        ({"orgin": "evit"}, "unknown keyword 'orgin'; did you mean 'origin'?"),
        ({"keep": 0.7}, "unknown keyword 'keep'.*Options of a method need method="),
        ({"origin": "evit", "kep": 0.7}, "unknown option of evit 'kep'; did you mean 'keep'?"),
        ({"origin": "evit", "keep": 7}, "keep"),
        ({"origin": "evit", "method": "tome"}, "checkpoint of EViT, which has its own method"),
        ({"method": "tomme"}, "unknown method 'tomme'; did you mean 'tome'?"),
    ],
)
def test_wrong_words(options: dict, message: str, tmp_path: Path) -> None:
    path = write(vit().state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load(path, **options)


def test_an_origin_must_fit(tmp_path: Path) -> None:
    path = write(as_dynamicvit(reduced("dynamicvit")), tmp_path / "x.pth")
    for origin in ("vit", "evit", "svit"):
        with pytest.raises(ValueError, match=f"keys of 'dynamicvit', but origin='{origin}' was"):
            load(path, origin=origin)


def test_stages_must_be_said_when_they_are_not_the_usual(tmp_path: Path) -> None:
    path = write(as_dynamicvit(reduced("dynamicvit(blocks=[1, 3])")), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"predictors for 2 blocks, expected 3 .*blocks="):
        load(path)
    path = write(as_svit(reduced("svit(blocks=[2, 3])")), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"gates for 2 blocks, expected 3 .*blocks="):
        load(path)
    assert load(path, blocks=(2, 3)).reducer.active_blocks == (2, 3)


def test_parts_of_a_method_that_miss(tmp_path: Path) -> None:
    state = as_dynamicvit(reduced("dynamicvit"))
    del state["score_predictor.1.out_conv.2.bias"]
    with pytest.raises(ValueError, match=r"no predictors\.1\.out\.1\.bias; .* method dynamicvit"):
        load(write(state, tmp_path / "x.pth"))
    state = as_evovit(reduced("evovit(variant='deit')", randomise(vit(global_pool="avg"))))
    del state["vs.2.v.weight"]
    with pytest.raises(
        ValueError, match=r"unexpected blocks\.2\.attn\.qk\.weight and no blocks\.2"
    ):
        load(write(state, tmp_path / "y.pth"))


def test_folders(tmp_path: Path) -> None:
    foveate.save(reduced("evit"), tmp_path / "ours", everything=True)
    with pytest.raises(ValueError, match="is a folder; num_heads is for checkpoint files"):
        foveate.load(tmp_path / "ours", num_heads=3)
    with pytest.raises(ValueError, match="image_size is for checkpoint files and Hugging Face f"):
        foveate.load(tmp_path / "ours", image_size=64)
    with pytest.raises(ValueError, match="saved with its method; leave method, r out"):
        foveate.load(tmp_path / "ours", method="tome", r=3)


def test_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=48,
        patch_size=8,
    )
    model = randomise(transformers.ViTForImageClassification(config)).eval()
    model.save_pretrained(tmp_path / "hf")
    x = images()
    plain = foveate.load(tmp_path / "hf")
    assert torch.equal(logits(plain, x), logits(model, x))
    again = foveate.load(tmp_path / "hf", method="evit", keep=0.6)
    expected = logits(foveate.apply(model, "evit", keep=0.6).eval(), x)
    assert not again.training and torch.equal(logits(again, x), expected)
    with pytest.raises(ValueError, match="leave model out"):
        foveate.load(tmp_path / "hf", model)
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "out")]
    assert main(words) == 2 and "give a --method" in capsys.readouterr().err
    assert main([*words, "--method", "evit", "keep=0.6"]) == 0
    assert torch.equal(logits(foveate.load(tmp_path / "out").eval(), x), expected)
    size = ("--image-size", "64", "--antialias")
    assert main([*words, "--method", "evit", "keep=0.6", *size]) == 0
    printed = capsys.readouterr().out
    assert "note     positions resized from 6 x 6 to 8 x 8 patches, with anti" in printed


def test_the_log_says_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = reduced("evovit(variant='deit')", randomise(vit(global_pool="avg")))
    path = write({"model": as_evovit(model), "model_ema": as_evovit(model)}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, "foveate"):
        load(path)
    assert "took model and not model_ema" in caplog.text
    assert "left out head_cls.weight, norm_cls.bias: the classifier on the class" in caplog.text
