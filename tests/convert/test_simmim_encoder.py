"""SimMIM's ViT as its authors release it, and timm's Beit as it is written here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from checkpoints import Weights, write
from golden.golden_files import golden
from golden.golden_files import images as golden_images
from safetensors.torch import save_file
from small import close, images, logits, noise, randomise, vit
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import nn
from torch.nn import functional as F

import foveate
from foveate.backbones import backbone_for
from foveate.backbones.timm_beit import SHARED_BIAS, TABLE
from foveate.cli import main
from foveate.convert import Settings, open_model, save_plain

OWN = f"blocks.0.attn.{TABLE}"


def beit(**options: object) -> Beit:
    base = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    base |= dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    return randomise(vit(Beit, **{**base, **options})).eval()


def simmim(**options: object) -> Weights:
    """A small SimMIM checkpoint: the encoder's keys, what belongs to pre-training, the decoder."""
    shared = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    model = beit(num_classes=0, global_pool="token", use_fc_norm=False, **{**shared, **options})
    state = {**model.state_dict(), "mask_token": noise(1, 1, 48)}
    state["rel_pos_bias.relative_position_index"] = model.rel_pos_bias.relative_position_index
    state = {f"encoder.{key}": value for key, value in state.items()}
    return {**state, "decoder.0.weight": noise(192, 48, 1, 1), "decoder.0.bias": noise(192)}


def official(state: Weights) -> Beit:
    """The encoder itself, with the table that its blocks share."""
    options = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, num_classes=0)
    model = beit(global_pool="token", use_fc_norm=False, **options)
    tensors = {k.removeprefix("encoder."): v for k, v in state.items()}
    model.load_state_dict({k: tensors[k] for k in model.state_dict()})
    return model


# The release ---------------------------------------------------------------------------------


def test_the_reference_answers(tmp_path: Path) -> None:
    """Reconstruction and loss of the original code, from the loaded encoder and its decoder."""
    state, answers = golden("simmim")
    path = tmp_path / "simmim.safetensors"
    save_file(state, path)
    loaded = open_model(path, None, None, {}, Settings())
    model = loaded.model
    assert loaded.origin == "simmim" and isinstance(model, Beit)
    assert (model.num_classes, model.pos_embed, model.global_pool) == (0, None, "token")
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.fc_norm, nn.Identity)
    assert model.blocks[0].attn.num_heads == 3 and model.rel_pos_bias is None
    notes = " / ".join(loaded.notes)
    for what in ("mask_token", "relative_position_index", "decoder.0.weight", "copied to every"):
        assert what in notes
    # By hand, as pre-training has it.
    x, hidden = golden_images(), answers["mask"].bool()
    backbone = backbone_for(model)
    with torch.no_grad():
        embedded = backbone.embed(
            x,
            lambda patches: torch.where(
                hidden.flatten(1)[..., None], state["encoder.mask_token"], patches
            ),
        )
        tokens = backbone.norm(backbone.through(embedded.x, embedded.grid))
        features = tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        pixels = F.conv2d(features, state["decoder.0.weight"], state["decoder.0.bias"])
        drawn = F.pixel_shuffle(pixels, 16)
    torch.testing.assert_close(drawn, answers["reconstruction"].float(), atol=2e-3, rtol=0)
    mask = hidden.float().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    loss = ((x - drawn).abs() * mask).sum() / (mask.sum() + 1e-5) / 3
    torch.testing.assert_close(loss[None], answers["loss"], atol=1e-4, rtol=0)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that SimMIM's code keeps its settings in."""

    class CfgNode(dict):
        def __init__(self, **values: object) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name in ("yacs", "yacs.config"):
        module = ModuleType(name)
        module.CfgNode = CfgNode  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return CfgNode


def test_a_release_loads_with_its_settings(
    settings: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = simmim()
    config = settings(MODEL=settings(TYPE="vit"), EPOCHS=800)
    path = write({"model": state, "epoch": 799, "config": config}, tmp_path / "x.pth")
    wanted = logits(official(state), images())
    for options in ({}, {"origin": "simmim"}, {"num_heads": 3}):
        model = foveate.load(path, **options)
        assert not model.training and not any(b.is_meta for b in model.buffers())
        close(logits(model, images()), wanted)
    assert OWN in model.state_dict() and SHARED_BIAS not in model.state_dict()
    # From several processes, and the encoder alone.
    parallel = {f"module.{key}": value for key, value in state.items()}
    close(logits(foveate.load(write(parallel, tmp_path / "y.pth")), images()), wanted)
    alone = {key: value for key, value in state.items() if key.startswith("encoder.")}
    path = write(alone, tmp_path / "z.pth")
    assert foveate.load(path).rel_pos_bias is not None  # as timm would have such a model
    model = foveate.load(path, origin="simmim")
    assert model.rel_pos_bias is None
    close(logits(model, images()), wanted)
    # The command.
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "x.pth"), str(out)]) == 0
    said = capsys.readouterr().out
    assert "origin   simmim" in said and "timm Beit, width 48, depth 4, 3 heads" in said
    close(logits(foveate.load(out), images()), wanted)


def test_a_given_model_goes_on_with_pretraining(tmp_path: Path) -> None:
    """Its blocks share a position bias, so the shared table stays one; others get copies."""
    state = simmim()
    path = write({"model": state}, tmp_path / "x.pth")
    shared = official(simmim())
    randomise(shared, seed=5)
    assert foveate.load(path, shared) is shared
    assert torch.equal(logits(shared, images()), logits(official(state), images()))
    own = beit(num_classes=0, global_pool="token", use_fc_norm=False)
    close(logits(foveate.load(path, own), images()), logits(official(state), images()))


def test_what_is_no_such_encoder_is_refused(tmp_path: Path) -> None:
    swin = {
        "encoder.mask_token": torch.ones(1, 1, 8),
        "encoder.patch_embed.proj.weight": torch.ones(8, 3, 4, 4),
        "encoder.layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(9, 2),
        "decoder.0.weight": torch.ones(3, 8, 1, 1),
    }
    path = write({"model": swin}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"swin\.pth looks like a Swin transformer"):
        foveate.load(path)
    path = write(simmim(), tmp_path / "x.pth")
    for options, message in (
        ({"num_heads": 4}, "for 3 heads, width 48 and num_heads=4; expected a number of heads"),
        ({"origin": "mae"}, "has the keys of 'simmim', but origin='mae' was"),
        ({"method": "tome"}, "relative position bias, and methods that drop tokens do not carry"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            foveate.load(path, **options)
        assert "\n" not in str(error.value)
    state = simmim()
    state["encoder." + SHARED_BIAS] = noise(100, 3)
    with pytest.raises(
        ValueError, match=r"100 relative positions, which fit no square grid: n x n"
    ):
        foveate.load(write(state, tmp_path / "y.pth"))


# timm's own ----------------------------------------------------------------------------------

BEITS: dict[str, Callable[[], Beit]] = {
    "blocks apart": beit,
    "shared": lambda: beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "both, and absolute": lambda: beit(use_shared_rel_pos_bias=True, use_abs_pos_emb=True),
    "absolute": lambda: beit(use_rel_pos_bias=False, use_abs_pos_emb=True),
    "no positions": lambda: beit(use_rel_pos_bias=False),
    "class token": lambda: beit(global_pool="token"),
    "average of normed": lambda: beit(global_pool="avg", use_fc_norm=False),
    "normed class token": lambda: beit(global_pool="token", use_fc_norm=True),
    "headless": lambda: beit(num_classes=0),
    "no layer scale": lambda: beit(init_values=None),
    "no biases": lambda: beit(qkv_bias=False),
    "normed feed forward": lambda: beit(scale_mlp=True),
    "not square": lambda: beit(img_size=(32, 72)),
    "wide heads": lambda: beit(embed_dim=128, num_heads=2),
    "one head": lambda: beit(num_heads=1),
}


@pytest.mark.parametrize("name", BEITS)
def test_a_beit_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BEITS[name]()
    save_plain(model, tmp_path / "x.safetensors")
    again = foveate.load(tmp_path / "x.safetensors")
    assert type(again) is Beit and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    x = images(2, tuple(model.patch_embed.img_size))
    assert torch.equal(logits(again, x), logits(model, x))
    torch.save(again.state_dict(), tmp_path / "y.pth")
    mine = BEITS[name]()
    randomise(mine, seed=9)
    assert torch.equal(logits(foveate.load(tmp_path / "y.pth", mine).eval(), x), logits(model, x))


def test_a_named_beit(tmp_path: Path) -> None:
    """As timm's own files have it: nothing of ours in the metadata."""
    model = randomise(timm.create_model("beit_base_patch16_224", depth=2)).eval()
    loaded = open_model(
        write(model.state_dict(), tmp_path / "x.pth"), None, None, {}, Settings(num_heads=12)
    )
    assert loaded.origin == "beit"
    x = images(1, (224, 224))
    assert torch.equal(logits(loaded.model, x), logits(model, x))


def test_the_pooling_of_a_plain_vit_comes_back_too(tmp_path: Path) -> None:
    """Its keys do not tell an average of normed patches from a class token."""
    model = randomise(vit(global_pool="avg", fc_norm=False)).eval()
    save_plain(model, tmp_path / "x.safetensors")
    again = foveate.load(tmp_path / "x.safetensors")
    assert torch.equal(logits(again, images()), logits(model, images()))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "y.safetensors", {"foveate.pool": "best"})
    with pytest.raises(ValueError, match=r"metadata foveate\.pool 'best', expected one of avg"):
        foveate.load(tmp_path / "y.safetensors", num_heads=3)


def test_keys_that_eva_has_too(tmp_path: Path) -> None:
    """Without relative positions only the user can tell them apart: one has rotary positions."""
    model = BEITS["absolute"]()
    path = write(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"EVA, or BEiT without .*give origin='beit'") as error:
        foveate.load(path, num_heads=3)
    assert len(str(error.value)) < 500
    again = foveate.load(path, num_heads=3, origin="beit")
    assert torch.equal(logits(again, images()), logits(model, images()))


@pytest.mark.parametrize("size", [32, 64, (64, 48)])
def test_relative_positions_are_resized(size: int | tuple[int, int], tmp_path: Path) -> None:
    state = simmim()
    path = write(state, tmp_path / "x.pth")
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // 8, width // 8)
    loaded = open_model(path, None, None, {}, Settings(image_size=size))
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    wanted = resize_rel_pos_bias_table(state["encoder." + SHARED_BIAS], grid, (rows, 3))
    for block in loaded.model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, wanted)
    assert f"relative positions resized from 6 x 6 to {grid[0]} x {grid[1]}" in loaded.notes[-2]
    reference = official(state)
    reference.set_input_size((height, width))
    x = images(2, (height, width))
    close(logits(loaded.model, x), logits(reference, x))


def test_sizes_that_do_not_go(tmp_path: Path) -> None:
    wide = beit(img_size=(32, 72))
    save_plain(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="positions for 4 x 9 patches, and only square grids are"):
        foveate.load(tmp_path / "wide.safetensors", image_size=48)
    path = write(wide.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match=r"122 relative positions, which fit no square .*image_size"
    ):
        foveate.load(path)
    x = images(2, (32, 72))
    assert torch.equal(logits(foveate.load(path, image_size=(32, 72)), x), logits(wide, x))
    state = dict(BEITS["both, and absolute"]().state_dict())
    state["pos_embed"] = noise(1, 30, 48)
    with pytest.raises(ValueError, match="30 absolute positions, but relative ones for 6 x 6"):
        foveate.load(write(state, tmp_path / "y.pth"))
