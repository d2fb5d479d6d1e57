"""Folders that save writes, and what happens when they are damaged, foreign or do not fit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import eva, images, logits, randomise, vit
from torch import nn

import foveate
from foveate.core import ReducedViT

CONFIG, WEIGHTS = "foveate.json", "foveate.safetensors"
KEY = "reducer.predictors.0.out.1.weight"


def made(method: str = "dynamicvit(keep=0.6)", model: nn.Module | None = None) -> ReducedViT:
    reduced = foveate.apply(randomise(vit()) if model is None else model, method)
    randomise(reduced.reducer, seed=1)
    return reduced.eval()


def tiny(**options: object) -> nn.Module:
    """A model that timm makes by name, with random weights."""
    given = dict(num_classes=7, img_size=64, depth=3)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**given, **options}))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    foveate.save(made(), tmp_path / "saved")
    return tmp_path / "saved"


# Round trips -----------------------------------------------------------------------------------


def test_the_small_part_alone(folder: Path) -> None:
    model = made()
    assert set(load_file(folder / WEIGHTS)) == {
        name for name in model.state_dict() if name.startswith("reducer.")
    }
    again = foveate.load(folder, randomise(vit())).eval()
    assert torch.equal(logits(again, images()), logits(model, images()))
    other = foveate.load(folder, randomise(vit(num_classes=3))).eval()  # another head is fine
    assert logits(other, images()).shape == (3, 3)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    "method",
    [
        "evit(keep=[0.9, 0.8, 0.7], blocks=[1, 2, 3], warmup=[0.1, 0.5], warmup_steps=3)",
        "tome(r=[3, 2, 1])",
        "svit(gate='topk', gate_prefix_last=True)",
        "evovit(starts=[2], aux=True)",
        "dynamicvit(keep=0.8, blocks=[2]) + svit(keep=0.7, blocks=[3])",
        "random(keep=0.5, blocks=[1], seed=-3)",
    ],
)
def test_every_option_survives(method: str, tmp_path: Path) -> None:
    model = made(method)
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path, foveate.unwrap(model)).eval()
    assert repr(again.reducer) == repr(model.reducer)
    assert again.reducer.config() == model.reducer.config()
    assert torch.equal(logits(again, images()), logits(model, images()))


def test_mode_and_gate_survive(tmp_path: Path) -> None:
    model = made()
    model.mode, model.gate = "masked", "argmax"
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path, foveate.unwrap(model))
    assert (again.mode, again.gate) == ("masked", "argmax")


def test_saving_twice_leaves_the_later(tmp_path: Path) -> None:
    for method in ("dynamicvit(keep=0.6)", "evit(keep=0.5)"):
        foveate.save(made(method), tmp_path / "deep" / "er")
    assert repr(foveate.load(tmp_path / "deep" / "er", vit()).reducer) == "evit(keep=0.5)"
    foveate.save(made(), str(tmp_path / "deep" / "er"))
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "README.md",
        CONFIG,
        WEIGHTS,
    ]


def test_a_failed_save_leaves_the_earlier_folder_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: object, path: str) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(foveate.convert.folders, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        foveate.save(made("static(keep=0.5)"), folder)
    again = foveate.load(folder, randomise(vit())).eval()
    assert torch.equal(logits(again, images()), logits(made(), images()))


def test_everything_of_a_timm_model_needs_no_model(tmp_path: Path) -> None:
    x = images(2, (64, 64))
    for number, options in enumerate(
        (
            {},
            {"global_pool": "avg"},
            {"class_token": False, "global_pool": "avg"},
            {"qk_norm": True},
        )
    ):
        model = made("dynamicvit(keep=0.6)", tiny(**options))
        foveate.save(model, tmp_path / str(number), everything=True)
        again = foveate.load(tmp_path / str(number)).eval()
        assert torch.equal(logits(again, x), logits(model, x))
        assert foveate.unwrap(again) is not foveate.unwrap(model)


def test_a_timm_model_that_was_resized_and_given_another_head(tmp_path: Path) -> None:
    base = tiny()
    base.set_input_size(img_size=96)
    base.reset_classifier(3)
    model = made("evit(keep=0.6)", randomise(base))
    foveate.save(model, tmp_path, everything=True)
    x = images(2, (96, 96))
    assert torch.equal(logits(foveate.load(tmp_path).eval(), x), logits(model, x))


def test_a_head_given_after_the_method(tmp_path: Path) -> None:
    model = made("evit(keep=0.6)", tiny())
    foveate.unwrap(model).reset_classifier(3)
    foveate.save(model, tmp_path, everything=True)
    x = images(2, (64, 64))
    assert torch.equal(logits(foveate.load(tmp_path).eval(), x), logits(model, x))


def test_everything_of_a_hand_made_model_needs_none(tmp_path: Path) -> None:
    model = made()
    foveate.save(model, tmp_path, everything=True)
    assert torch.equal(logits(foveate.load(tmp_path).eval(), images()), logits(model, images()))


def test_a_model_that_plain_data_cannot_make_asks_for_one(tmp_path: Path) -> None:
    model = made(model=randomise(vit(act_layer="relu")))
    foveate.save(model, tmp_path, everything=True)
    with pytest.raises(ValueError, match=r"from plain data; pass the backbone as load\(folder"):
        foveate.load(tmp_path)
    other = randomise(vit(act_layer="relu"), seed=8)  # its weights are replaced
    again = foveate.load(tmp_path, other).eval()
    assert torch.equal(logits(again, images()), logits(model, images()))


def test_a_changed_timm_model_asks_for_one(tmp_path: Path) -> None:
    base = tiny()
    base.blocks[1].mlp = type(base.blocks[1].mlp)(192, 100)
    model = made("evit(keep=0.6)", base)
    foveate.save(model, tmp_path, everything=True)
    with pytest.raises(ValueError, match="pass the backbone"):
        foveate.load(tmp_path)


def test_the_small_part_asks_for_a_model(folder: Path) -> None:
    with pytest.raises(ValueError, match="only the method's own parameters were saved; pass"):
        foveate.load(folder)


def test_only_reduced_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VisionTransformer"):
        foveate.save(vit(), tmp_path)


# What does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: vit(embed_dim=96), "saved for width 48, the given model has 96"),
        (lambda: vit(depth=8), "saved for depth 4, the given model has 8"),
        (lambda: vit(num_heads=6), "saved for heads 3, the given model has 6"),
        (lambda: vit(reg_tokens=4), "saved for prefix 1, the given model has 5"),
        (lambda: eva(), "saved for family timm VisionTransformer, the given model has timm Eva"),
        (lambda: nn.Linear(3, 3), "Linear with an architecture that is not a plain ViT"),
    ],
)
def test_other_models(folder: Path, model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foveate.load(folder, model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "saved for classes 10, the given model has 3"),
        ({"qk_norm": True}, "does not fit: missing"),
        ({"img_size": 64}, "pos_embed"),
        ({"mlp_ratio": 2.0}, "mlp.fc1"),
    ],
)
def test_weights_of_another_model_leave_it_as_it_was(
    options: dict, message: str, tmp_path: Path
) -> None:
    foveate.save(made(), tmp_path, everything=True)
    other = randomise(vit(**options), seed=8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        foveate.load(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_tampered_model_is_refused(folder: Path) -> None:
    model = randomise(vit())
    stock = model.blocks[2].forward
    model.blocks[2].forward = lambda x, **options: stock(x, **options) * 1.05
    with pytest.raises(ValueError, match="block 2"):
        foveate.load(folder, model)


# Damage ----------------------------------------------------------------------------------------


def cut(name: str, keep: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return damage


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def drop(*keys: str) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda c: [c.pop(key) for key in keys])


def put(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda c: c.update(values))


def method(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda c: c["methods"][0].update(values))


def weight(name: str, value: torch.Tensor | None) -> Callable[[Path], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return lambda folder: edit_weights(folder, change)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    **{f"weights cut at {share}": cut(WEIGHTS, share) for share in (0, 0.001, 0.1, 0.5, 0.999)},
    **{f"config cut at {share}": cut(CONFIG, share) for share in (0, 0.3, 0.9)},
    "weights are pickled": write(WEIGHTS, pickle.dumps({KEY: [1, 2]})),
    "weights are text": write(WEIGHTS, b"hello" * 100),
    "config is binary": write(CONFIG, b"\xff\xfe\x00\x80"),
    "config is a list": write(CONFIG, b"[]"),
    "config is a number": write(CONFIG, b"7"),
    "config is of another program": write(CONFIG, b'{"model_type": "vit"}'),
    "config says little": write(CONFIG, b'{"format": 1}'),
    "a later format": put(format=2),
    **{f"no {key}": drop(key) for key in ("format", "methods", "mode", "backbone", "everything")},
    "no methods": put(methods=[]),
    "methods are a number": put(methods=5),
    "a method is a string": put(methods=["evit"]),
    "a method without a name": put(methods=[{"options": {}}]),
    "a method without options": put(methods=[{"name": "evit"}]),
    "an unknown method": method(name="evitt"),
    "a method named by a number": method(name=5),
    "an unknown option": method(options={"kep": 0.5}),
    "an illegal value": method(options={"keep": 3}),
    "options are a string": method(options="keep"),
    "an unknown mode": put(mode="fast"),
    "backbone is a list": put(backbone=[]),
    "backbone of another width": put(backbone={"width": 7}),
    "backbone with an unknown fact": put(backbone={"colour": 7}),
    "weights missing": weight(KEY, None),
    "weights of another shape": weight(KEY, torch.zeros(3, 3)),
    "weights too many": weight("reducer.extra", torch.zeros(3)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_gives_one_clear_sentence(folder: Path, kind: str) -> None:
    DAMAGE[kind](folder)
    with pytest.raises(ValueError) as error:
        foveate.load(folder, randomise(vit()))
    assert 10 < len(str(error.value)) < 600


@pytest.mark.parametrize("kind", ["nothing there", "a file", "an empty folder"])
def test_what_is_no_folder_of_ours(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "a file":
        path.write_text("hello")
    elif kind == "an empty folder":
        path.mkdir()
    with pytest.raises(ValueError, match=str(path)):
        foveate.load(path, vit())


@pytest.mark.parametrize(
    "recipe",
    [
        {"timm": "no_such_model", "arguments": {}},
        {"timm": "resnet18", "arguments": {"num_classes": 7}},
        {"timm": "vit_tiny_patch16_224", "arguments": {"no_such": 1}},
        {"timm": "vit_tiny_patch16_224", "arguments": {"pretrained": True}},
        {"timm": "vit_tiny_patch16_224"},
        {"timm": 5, "arguments": {}},
        "vit_tiny_patch16_224",
        {"timm": "hf-hub:somebody/model", "arguments": {}},
        {"timm": "hf_hub:somebody/model", "arguments": {}},
        {"timm": "local-dir:/tmp", "arguments": {}},
        {"plain": {"img_size": "x"}},
        {"plain": {"no_such": 1}},
        {"plain": 5},
        {},
    ],
    ids=str,
)
def test_a_foreign_recipe_is_refused_and_nothing_is_fetched(
    recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foveate.save(made("evit(keep=0.6)", tiny()), tmp_path, everything=True)
    edit(tmp_path, lambda c: c.update(model=recipe))
    create = timm.create_model

    def no_network(name: str, *args: object, **options: object) -> nn.Module:
        assert ":" not in str(name), "a checkpoint made timm look elsewhere"
        return create(name, *args, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError) as error:
        foveate.load(tmp_path)
    assert len(str(error.value)) < 600
