"""Files: formats told by content, wrappers, prefixes, copies; what is damaged, foreign or armed."""

from __future__ import annotations

import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import HEADS, Weights, mae, renamed, write
from safetensors.torch import save_file
from small import images, logits, randomise, vit
from torch import nn

import foveate
from foveate.convert.read import read


@pytest.fixture
def state() -> Weights:
    return dict(randomise(vit()).state_dict())


def load(path: Path, **options: object) -> nn.Module:
    return foveate.load(path, num_heads=HEADS, **options)


def same(model: nn.Module, state: Weights) -> None:
    got = model.state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in got)


def prefixed(prefix: str, state: Weights) -> Weights:
    return {prefix + key: value for key, value in state.items()}


# What is understood ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors", "bin", "of_no_kind"])
def test_the_format_is_told_by_content(suffix: str, state: Weights, tmp_path: Path) -> None:
    new, old, safe = (tmp_path / f"{kind}.{suffix}" for kind in ("new", "old", "safe"))
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    save_file(state, safe)
    for path in (new, old, safe):
        model = load(path)
        assert not model.training
        same(model, state)
    assert torch.equal(logits(model, images()), logits(randomise(vit()).eval(), images()))


WRAPPERS: dict[str, Callable[[Weights], object]] = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(3)}}, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "arch": "vit", "best_acc1": 81.0},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(1.0)},
    "net": lambda s: {"net": s},
    "nested": lambda s: {"checkpoint": 1, "model": {"state_dict": s}},
    "parallel": lambda s: prefixed("module.", s),
    "parallel in model": lambda s: {"model": prefixed("module.", s)},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.", s)},
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "global_step": 9},
    "compiled, parallel, lightning": lambda s: prefixed("model._orig_mod.module.", s),
    "backbone": lambda s: prefixed("backbone.", s),
    "encoder": lambda s: prefixed("encoder.", s),
    "averaged model": lambda s: prefixed("module.", s) | {"n_averaged": torch.tensor(3)},
    "settings": lambda s: {"model": s, "args": Namespace(lr=0.1, out=Path("x"), sub=Namespace())},
    "numpy": lambda s: {"model": s, "best": np.float64(3.5), "curve": np.arange(3.0)},
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("new", [True, False])
def test_wrappers(kind: str, new: bool, state: Weights, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(WRAPPERS[kind](state), path, _use_new_zipfile_serialization=new)
    same(load(path), state)


def test_settings_are_not_even_made(state: Weights, tmp_path: Path) -> None:
    """Namespace and numpy are named in the file; inert objects stand in for them."""
    content = {"model": state, "args": Namespace(lr=0.1), "best": np.float64(1)}
    path = write(content, tmp_path / "x.pth")
    allowed = set(torch.serialization.get_safe_globals())
    load(path)
    assert set(torch.serialization.get_safe_globals()) == allowed
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_averaged_weights(state: Weights, tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    for name, nested in (("model_ema", False), ("ema", True), ("state_dict_ema", False)):
        ema: object = {"state_dict": prefixed("module.", other)} if nested else other
        both = write({"model": state, name: ema}, tmp_path / "both.pth")
        same(load(both), state)
        same(load(both, weights="model"), state)
        same(load(both, weights="ema"), other)
        alone = write({name: ema, "epoch": 3}, tmp_path / "alone.pth")
        same(load(alone), other)
        with pytest.raises(ValueError, match="alone.pth"):
            load(alone, weights="model")
    flat = write(prefixed("model.", state) | prefixed("ema.", other), tmp_path / "flat.pth")
    same(load(flat), state)
    same(load(flat, weights="ema"), other)
    assert read(both).notes[0] == "took model and not state_dict_ema"


def test_no_averaged_weights(state: Weights, tmp_path: Path) -> None:
    path = write({"model": state, "epoch": 1}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match="x.pth holds no EMA copy, only model, epoch; expected one"
    ):
        load(path, weights="ema")
    with pytest.raises(ValueError, match="weights must be one of 'auto', 'model', 'ema'"):
        load(path, weights="best")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(dtype: torch.dtype, state: Weights, tmp_path: Path) -> None:
    path = write({k: v.to(dtype) for k, v in state.items()}, tmp_path / "x.pt")
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same(model, {k: v.to(dtype).float() for k, v in state.items()})


def test_the_file_may_go_after_loading(state: Weights, tmp_path: Path) -> None:
    """Files are mapped while they are read, and models must not depend on them afterwards."""
    for path in (write(state, tmp_path / "x.pth"), tmp_path / "x.safetensors"):
        if path.suffix == ".safetensors":
            save_file(state, path)
        model = load(path)
        path.write_bytes(b"\xff" * path.stat().st_size)
        same(model, state)
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# What is not -----------------------------------------------------------------------------------


class Armed:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


class Plain:
    """Somebody's class."""


@pytest.mark.parametrize("way", ["zip", "old", "pickle"])
def test_code_does_not_run(way: str, state: Weights, tmp_path: Path) -> None:
    path, trap = tmp_path / "x.pth", tmp_path / "sprung"
    content = {"model": state, "extra": Armed(trap)}
    if way == "pickle":
        path.write_bytes(pickle.dumps({"extra": Armed(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=r"x\.pth .*global posix\.system|x\.pth .*global nt\."):
        load(path)
    assert not trap.exists()


def test_classes_are_refused_by_name(state: Weights, tmp_path: Path) -> None:
    path = write({"model": state, "config": Plain()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth .*global \S*Plain, expected tensors"):
        load(path)
    path = write(vit(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole\.pth .*global timm\S+VisionTransformer, exp"):
        load(path)


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_dot_", "."), data)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


BAD_FILES: dict[str, tuple[Callable[[Path, Weights], object], str]] = {
    "missing": (lambda path, s: None, "does not exist"),
    "empty": (lambda path, s: path.write_bytes(b""), "is empty"),
    "html": (lambda path, s: path.write_text("\n<!DOCTYPE html><p>404"), "HTML"),
    "xml": (lambda path, s: path.write_text("<?xml?><Error>AccessDenied"), "HTML or XML"),
    "git-lfs": (
        lambda path, s: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "git-LFS pointer",
    ),
    "text": (lambda path, s: path.write_text("hello, world"), "begins with b'hello"),
    "json": (lambda path, s: path.write_text('{"weight_map": {}}'), "not a checkpoint"),
    "zip of others": (lambda path, s: zipped(path, a_dot_txt=b"x"), "a zip archive that"),
    "numpy": (lambda path, s: zipped(path, a_dot_npy=b"x"), "a NumPy archive"),
    "torchscript": (
        lambda path, s: torch.jit.script(nn.Linear(2, 2)).save(str(path)),
        "TorchScript",
    ),
    **{
        f"zip cut at {share}": (
            lambda path, s, share=share: (torch.save(s, path), cut(path, share)),
            "truncated|damaged|empty",
        )
        for share in (0.0001, 0.01, 0.5, 0.99)
    },
    **{
        f"old cut at {share}": (
            lambda path, s, share=share: (
                torch.save(s, path, _use_new_zipfile_serialization=False),
                cut(path, share),
            ),
            "truncated|damaged",
        )
        for share in (0.001, 0.01, 0.5, 0.99)
    },
    **{
        f"safetensors cut at {share}": (
            lambda path, s, share=share: (save_file(s, path), cut(path, share)),
            "truncated|damaged",
        )
        for share in (0.001, 0.01, 0.5, 0.99)
    },
    "a number": (lambda path, s: torch.save(5, path), "holds 5; expected a dictionary"),
    "a tensor": (lambda path, s: torch.save(torch.ones(3), path), "holds Tensor"),
    "a list": (lambda path, s: torch.save([s], path), "holds list; expected a dictionary"),
    "no tensors": (lambda path, s: torch.save({"epoch": 3}, path), "holds epoch; expected tens"),
    "nothing": (lambda path, s: torch.save({}, path), "holds nothing; expected"),
    "an empty model": (lambda path, s: torch.save({"model": {}}, path), "holds model; expected"),
    "teachers": (lambda path, s: torch.save({"student": s, "teacher": s}, path), "student, teach"),
    "a detector": (
        lambda path, s: torch.save(
            prefixed("backbone.", s) | {"rpn.weight": torch.ones(3)}, path
        ),
        "ViT under 'backbone.' and beside it rpn.weight; expected the model only",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_give_one_sentence(kind: str, state: Weights, tmp_path: Path) -> None:
    make, message = BAD_FILES[kind]
    path = tmp_path / "checkpoint.pth"
    make(path, state)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text and len(text) < 500 and "\n" not in text and "expected" in text


FOREIGN: dict[str, tuple[str, str]] = {
    "swin": ("layers.0.blocks.0.attn.qkv.weight", "a Swin"),
    "swin by simmim": ("encoder.layers.0.blocks.0.attn.relative_position_bias_table", "a Swin"),
    "relative positions": (
        "blocks.0.attn.rel_pos.relative_position_bias_table",
        "a ViT with relative positions that are not BEiT's",
    ),
    "sam": ("blocks.0.attn.rel_pos_h", "a ViT with relative positions"),
    "convnext": ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt"),
    "resnet": ("layer1.0.conv1.weight", "a ResNet"),
    "hugging face": ("vit.embeddings.patch_embeddings.projection.weight", "from its folder"),
    "torchvision": ("encoder.layers.encoder_layer_0.ln_1.weight", "a torchvision ViT"),
    "clip": ("visual.transformer.resblocks.0.ln_1.weight", "CLIP"),
    "eva": ("blocks.0.attn.q_proj.weight", "rotary ViT"),
    "dinov2 giant": ("blocks.0.mlp.w12.weight", "gated feed forward"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_architectures_are_named(kind: str, tmp_path: Path) -> None:
    key, what = FOREIGN[kind]
    path = write({key: torch.ones(3, 3), "head.bias": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected the weights of a plain ViT") as error:
        load(path)
    assert what in str(error.value) and str(path) in str(error.value) and key in str(error.value)


@pytest.mark.parametrize("form", ["vit_hybrid", "resnet18", "swin_tiny_patch4_window7_224"])
def test_other_timm_models_are_refused(form: str, tmp_path: Path) -> None:
    import timm

    name = "vit_tiny_r_s16_p8_224" if form == "vit_hybrid" else form
    path = write(timm.create_model(name).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth"):
        foveate.load(path)


def test_unknown_architectures_show_their_keys(tmp_path: Path) -> None:
    path = write(nn.Linear(3, 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth has keys such as weight, bias; expected the w"):
        load(path)


BAD_KEYS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing": (lambda s: s.pop("blocks.2.norm1.bias"), r"no blocks\.2\.norm1\.bias; expected"),
    "no norm": (lambda s: (s.pop("norm.weight"), s.pop("norm.bias")), r"no norm\.weight, norm\."),
    "no feed forward": (lambda s: s.pop("blocks.0.mlp.fc1.weight"), r"no blocks\.0\.mlp\.fc1"),
    "too many": (lambda s: s.update({"x.y": torch.ones(3)}), r"unexpected x\.y; expected exactly"),
    "pre-logits": (lambda s: s.update({"pre_logits.fc.bias": torch.ones(3)}), r"pre_logits\.fc"),
    "a block lost": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")],
        r"3 blocks, expected blocks\.1 among them",
    ),
    "a block of 10^9": (lambda s: s.update({"blocks.1000000000.x": torch.ones(1)}), r"blocks\.4"),
    "a shape": (
        lambda s: s.update({"blocks.1.mlp.fc2.weight": torch.ones(4, 4)}),
        r"blocks\.1\.mlp\.fc2\.weight of shape \[4, 4\]; expected \[48, 192\]",
    ),
    "flat patches": (lambda s: s.update({"patch_embed.proj.weight": torch.ones(3)}), r"4 dimens"),
    "a scalar head": (lambda s: s.update({"head.weight": torch.tensor(1.0)}), r"2 dimensions"),
    "a scalar token": (lambda s: s.update({"cls_token": torch.tensor(1.0)}), r"3 dimensions"),
    "NaN": (lambda s: s["blocks.1.norm1.bias"].fill_(float("nan")), "NaN or infinity in blocks.1"),
    "a name of two lines": (lambda s: s.update({"x\ny": torch.ones(3)}), r"unexpected 'x\\ny'"),
    "gated": (lambda s: s.update({"blocks.0.mlp.fc2.weight": torch.ones(48, 96)}), r"gated"),
    "no square": (
        lambda s: s.update({"pos_embed": s["pos_embed"][:, :31]}),
        r"31 positions and 1 prefix tokens, which fit no square grid.*image_size=",
    ),
    "no positions": (lambda s: s.pop("pos_embed"), r"no positions .*image_size="),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_keys_that_do_not_fit_are_named(kind: str, state: Weights, tmp_path: Path) -> None:
    change, message = BAD_KEYS[kind]
    change(state)
    path = write(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text and len(text) < 500 and "\n" not in text


def test_what_is_known_and_unused_is_said(tmp_path: Path) -> None:
    content = mae() | {"decoder_pos_embed": torch.ones(1)}
    loaded = foveate.convert.open_model(
        write(content, tmp_path / "mae.pth"),
        None,
        None,
        {},
        foveate.convert.Settings(num_heads=HEADS),
    )
    assert loaded.origin == "mae"
    notes = " / ".join(loaded.notes)
    assert "left out decoder_embed.weight" in notes and "left out mask_token" in notes
    assert not any("decoder" in key for key in loaded.model.state_dict())


def test_old_names_of_layer_scale(tmp_path: Path) -> None:
    model = randomise(vit(init_values=1e-5, no_embed_class=True))
    state = renamed(dict(model.state_dict()), (r"\.ls([12])\.gamma", r".gamma_\1"))
    same(load(write(state, tmp_path / "x.pth")), model.state_dict())
