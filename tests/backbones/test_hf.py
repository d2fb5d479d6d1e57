"""Hugging Face models: the driven model answers as the native one does, in every field."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small import close, hf, images, keep_masks, logits, randomise
from torch import Tensor, nn

import foveate
from foveate.backbones import from_folder
from foveate.core import ReducedViT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NOTHING = "random(keep=1.0)"
SIZES = ((48, 48), (64, 64), (32, 72))
VISION = dict(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=96,
    image_size=48,
    patch_size=8,
)


def two_halves(name: str) -> nn.Module:
    """A classifier whose configuration has a text half, which the model has not."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(vision_config=VISION, text_config={}, num_labels=10))


def no_pooler(kind: str) -> nn.Module:
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**VISION), add_pooling_layer=False, use_mask_token=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf("ViTModel"),
    "vit_no_pooler": lambda: no_pooler("ViTModel"),
    "vit_no_bias": lambda: hf("ViTModel", qkv_bias=False, hidden_act="quick_gelu"),
    "vit_classifier": lambda: hf("ViTForImageClassification"),
    "deit": lambda: hf("DeiTModel"),
    "deit_classifier": lambda: hf("DeiTForImageClassification"),
    "deit_teacher": lambda: hf("DeiTForImageClassificationWithTeacher"),
    "dinov2": lambda: hf("Dinov2Model"),
    "dinov2_swiglu": lambda: hf("Dinov2Model", use_swiglu_ffn=True),
    "dinov2_classifier": lambda: hf("Dinov2ForImageClassification"),
    "dinov2_reg": lambda: hf("Dinov2WithRegistersModel"),
    "dinov2_reg_classifier": lambda: hf("Dinov2WithRegistersForImageClassification"),
    "clip": lambda: hf("CLIPVisionModel"),
    "clip_projection": lambda: hf("CLIPVisionModelWithProjection", projection_dim=20),
    "clip_classifier": lambda: two_halves("CLIPForImageClassification"),
    "siglip": lambda: hf("SiglipVisionModel"),
    "siglip_no_head": lambda: hf("SiglipVisionModel", vision_use_head=False),
    "siglip_classifier": lambda: two_halves("SiglipForImageClassification"),
}
CLASSIFIERS = [name for name in MODELS if "classifier" in name]
names = pytest.mark.parametrize("name", MODELS)


@lru_cache
def stock(name: str) -> nn.Module:
    """A model with random parameters, shared by the tests: leave it as it is."""
    torch.manual_seed(0)
    return randomise(MODELS[name]()).eval()


def reduced(name: str, method: str = NOTHING) -> ReducedViT:
    model = foveate.apply(stock(name), method, check=False)
    randomise(model.reducer, seed=1)
    return model.eval()


def native(name: str, x: Tensor, **options: Any) -> Any:
    if "dinov2" not in name:
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return stock(name)(x, **options)


def driven(model: ReducedViT, x: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(x, **options)


def main(model: ReducedViT, output: Any, default: Tensor) -> Tensor:
    """The field that ``run`` calls logits; the default where the model leaves it empty."""
    answer = getattr(output, model.backbone.form.main)
    return default if answer is None else answer


def same(got: Any, expected: Any) -> None:
    """Equal in kind, in the names of the fields and in every tensor."""
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        close(got, expected, 5e-5)
        return
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        got, expected = got.to_tuple(), expected.to_tuple()
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        same(mine, theirs)


# The same answers --------------------------------------------------------------------------------


@names
def test_every_field_is_the_native_one(name: str) -> None:
    model = foveate.apply(stock(name), NOTHING).eval()
    for size in SIZES:
        x = images(2, size)
        same(driven(model, x), native(name, x))
        options = dict(output_hidden_states=True)
        same(driven(model, x, **options), native(name, x, **options))
    same(driven(model, x, return_dict=False), native(name, x, return_dict=False))
    with torch.no_grad():
        alone = torch.cat([model.run(x[i : i + 1]).logits for i in range(2)])
        close(alone, model.run(x).logits)


@names
def test_eager_and_fused_are_one(name: str) -> None:
    eager = copy.deepcopy(stock(name))
    eager.set_attn_implementation("eager")
    assert stock(name).config._attn_implementation == "sdpa"
    model = foveate.apply(eager, "evit(keep=0.7)").eval()
    x = images()
    same(driven(model, x), driven(reduced(name, "evit(keep=0.7)"), x))
    same(driven(foveate.apply(eager, NOTHING).eval(), x), native(name, x))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_labels_give_the_native_loss(name: str) -> None:
    labels = torch.tensor([1, 4, 9])
    same(driven(reduced(name), images(), labels=labels), native(name, images(), labels=labels))


def test_the_loss_in_training_has_the_methods_own_in_it() -> None:
    model = foveate.apply(copy.deepcopy(stock("vit_classifier")), "dynamicvit").train()
    labels = torch.tensor([1, 4, 9])
    torch.manual_seed(0)
    output = model(images(), labels=labels)
    torch.manual_seed(0)
    outcome = model.run(images())
    ratio = model.reducer.losses(outcome)["ratio"]
    task = nn.functional.cross_entropy(outcome.logits, labels)
    close(output.loss, task + model.reducer.loss_weights["ratio"] * ratio)
    output.loss.backward()
    assert all(p.grad is not None for p in model.reducer.parameters())
    assert all(p.grad is not None for n, p in model.vit.named_parameters() if "mask" not in n)


def test_hidden_states_by_number_and_by_configuration() -> None:
    model, x = reduced("vit"), images()
    every = driven(model, x, output_hidden_states=True).hidden_states
    some = driven(model, x, output_hidden_states=[1, -1]).hidden_states
    assert [state is None for state in some] == [True, False, True, True, False]
    same(some[4], every[4])
    first = driven(model, x, output_hidden_states=0).hidden_states
    assert [state is None for state in first] == [False, True, True, True, True]
    same(first[0], every[0])
    for nothing in (False, None, []):
        assert driven(model, x, output_hidden_states=nothing).hidden_states is None
    with pytest.raises(ValueError, match="numbered -5..4, got 5"):
        driven(model, x, output_hidden_states=5)
    told = copy.deepcopy(stock("vit"))
    told.config.output_hidden_states = True
    same(driven(foveate.apply(told, NOTHING).eval(), x).hidden_states, every)
    told.config.return_dict = False
    assert isinstance(driven(foveate.apply(told, NOTHING).eval(), x), tuple)


def test_training_draws_the_same_random_numbers() -> None:
    """Stochastic depth takes them image by image, dropout value by value."""
    for model in (
        hf("Dinov2Model", drop_path_rate=0.5),
        hf("ViTModel", hidden_dropout_prob=0.3),
    ):
        model = randomise(model).train()
        reduced = foveate.apply(model, NOTHING).train()
        torch.manual_seed(3)
        expected = model(images(4)).last_hidden_state
        torch.manual_seed(3)
        close(reduced(images(4)).last_hidden_state, expected)
    model = randomise(hf("ViTModel", attention_probs_dropout_prob=0.5)).train()
    reduced = foveate.apply(model, NOTHING).train()
    torch.manual_seed(3)
    first = reduced(images()).last_hidden_state
    assert (first - reduced(images()).last_hidden_state).abs().max() > 0.1


# With fewer tokens -------------------------------------------------------------------------------


METHODS = ["evit(keep=0.6)", "tome(r=5)", "svit(keep=0.6)", "evovit(keep=0.5)", "spvit(keep=0.6)"]


def test_labels_train_an_auxiliary_head_with_the_methods_weights() -> None:
    """Evo-ViT: half of the class loss and half of that of the head on the class token."""
    model = foveate.apply(copy.deepcopy(stock("vit_classifier")), "evovit(aux=True)").train()
    labels = torch.tensor([1, 4, 9])
    output = model(images(), labels=labels)
    outcome = model.run(images())
    task = nn.functional.cross_entropy(outcome.logits, labels)
    aux = nn.functional.cross_entropy(outcome.notes["evovit.aux_logits"], labels)
    close(output.loss, 0.5 * task + 0.5 * aux)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.reducer.parameters())
    same(
        model.eval()(images(), labels=labels).loss,
        model.vit.loss_function(labels, model.run(images()).logits, model.vit.config),
    )


@pytest.mark.parametrize("method", METHODS)
@names
def test_tokens_stand_on_the_grid(method: str, name: str) -> None:
    model, size = reduced(name, method), (32, 72)
    x, prefix = images(2, size), model.backbone.spec.prefix
    output = driven(model, x, output_hidden_states=True)
    shape = (2, prefix + 4 * 9, 48)
    assert len(output.hidden_states) == 5
    assert all(state.shape == shape for state in output.hidden_states)
    trace = model.trace(x)
    for block, state in zip(trace.blocks, output.hidden_states[1:], strict=True):
        close(state[:, prefix:], block.output.restore())
    if "last_hidden_state" in output:
        assert output.last_hidden_state.shape == shape
        close(output.last_hidden_state[:, prefix:], model.tokens(x).restore())
        assert torch.equal(output.last_hidden_state[:, :prefix], trace.final.prefix_tokens())
    close(main(model, output, trace.logits), trace.logits)


def test_gone_tokens_show_their_last_value_or_zero() -> None:
    model, x = reduced("dinov2", "evit(keep=0.5, rest='drop')"), images()
    state = model.tokens(x)
    gone = (state.source < 0)[..., None]
    last = driven(model, x).last_hidden_state[:, 1:]
    zero = driven(model, x, gone="zero").last_hidden_state[:, 1:]
    assert gone.any() and not last.masked_select(gone).eq(0).any()
    assert zero.masked_select(gone).eq(0).all()
    close(zero.masked_select(~gone), last.masked_select(~gone))
    with pytest.raises(ValueError, match="'last' or 'zero'"):
        driven(model, x, gone="mean")


@names
def test_keep_masks(name: str) -> None:
    """What lies under a masked patch changes nothing; pooling leaves it out too."""
    mask, x = keep_masks(3, (6, 6)), images()
    hidden = ~mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, images(seed=9), x)
    for method in (NOTHING, "tome(r=3)"):
        model = reduced(name, method)
        with torch.no_grad():
            expected = model.run(x, mask).logits
            close(model.run(other, mask).logits, expected)
        close(main(model, driven(model, x, keep_mask=mask), expected), expected)


@names
def test_half_precision_is_finite(name: str) -> None:
    model = copy.deepcopy(reduced(name, "tome(r=5)")).bfloat16()
    for value in driven(model, images().bfloat16()).to_tuple():
        assert value.dtype == torch.bfloat16 and torch.isfinite(value).all()


@pytest.mark.parametrize("method", ["evit", "tome", "svit", "dynamicvit"])
def test_gradients_and_checkpointing(method: str) -> None:
    model = randomise(hf("Dinov2ForImageClassification")).train()
    reduced = foveate.apply(model, method).train()
    randomise(reduced.reducer, seed=1)
    grads = []
    for enable in (False, True):
        if enable:
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        assert reduced.backbone.checkpointing == enable
        reduced.zero_grad()
        torch.manual_seed(0)
        reduced(images(), labels=torch.tensor([1, 4, 9])).loss.backward()
        trained = {n: p for n, p in reduced.named_parameters() if "mask_token" not in n}
        assert all(torch.isfinite(p.grad).all() for p in trained.values())
        assert all(layer.mlp.fc1.weight.grad.abs().sum() > 0 for layer in reduced.backbone.blocks)
        grads.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    close(grads[1], grads[0], 1e-5)
    assert not reduced.eval().backbone.checkpointing


# The model behind it -----------------------------------------------------------------------------


@names
def test_the_model_is_untouched_and_given_back(name: str) -> None:
    base = stock(name)
    keys, before = list(base.state_dict()), native(name, images())
    model = foveate.apply(base, "evit")
    driven(model, images(), output_hidden_states=True)
    assert foveate.unwrap(model) is base and list(base.state_dict()) == keys
    same(native(name, images()), before)
    assert model.config is base.config
    assert (model.device, model.dtype) == (base.device, base.dtype)


def test_another_head_later() -> None:
    model = randomise(hf("ViTForImageClassification")).eval()
    reduced = foveate.apply(model, "evit").eval()
    assert reduced.backbone.spec.classes == 10
    model.classifier = nn.Linear(48, 3)
    assert driven(reduced, images()).logits.shape == (3, 3)
    assert reduced.backbone.spec.classes == 3
    assert reduced.backbone.recipe() is None  # its configuration says 10


def test_facts_of_the_forms() -> None:
    facts = {name: foveate.apply(stock(name), "tome", check=False).backbone.spec for name in MODELS}
    prefix = {name: spec.prefix for name, spec in facts.items()}
    assert {n for n, p in prefix.items() if p == 0} == {n for n in MODELS if "siglip" in n}
    assert {n for n, p in prefix.items() if p == 2} == {n for n in MODELS if "deit" in n}
    assert {n for n, p in prefix.items() if p == 5} == {n for n in MODELS if "reg" in n}
    pools = {name for name, spec in facts.items() if spec.pools_patches}
    assert pools == {n for n in MODELS if "siglip" in n} | {
        "dinov2_classifier",
        "dinov2_reg_classifier",
        "clip_classifier",
    }
    assert facts["clip_projection"].classes == 20 and facts["vit"].classes == 0
    assert "GMACs" in foveate.describe(reduced("clip", "evit"))


def test_non_square_models() -> None:
    model = randomise(hf("ViTModel", image_size=(32, 72))).eval()
    reduced = foveate.apply(model, NOTHING).eval()
    assert reduced.backbone.spec.grid == (4, 9)
    with torch.no_grad():
        same(reduced(images(2, (32, 72))), model(images(2, (32, 72))))
    with pytest.raises(ValueError, match="positions for 4 x 9 patches"):
        reduced(images(2))
    with pytest.raises(ValueError, match="not square"):
        foveate.apply(hf("Dinov2Model", image_size=(32, 72)), NOTHING)


def test_a_pipeline_takes_it() -> None:
    pytest.importorskip("PIL", reason="pictures need Pillow")
    from PIL import Image

    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    pipe = transformers.pipeline(
        "image-classification",
        model=reduced("vit_classifier", "evit"),
        image_processor=processor,
        device="cpu",
    )
    found = pipe(Image.new("RGB", (60, 50), (200, 30, 90)), top_k=3)
    assert len(found) == 3 and all(0 <= entry["score"] <= 1 for entry in found)


# Folders -----------------------------------------------------------------------------------------


@names
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = reduced(name, "dynamicvit(keep=0.6)")
    expected = model.run(images()).logits
    foveate.save(model, tmp_path / "small")
    again = foveate.load(tmp_path / "small", stock(name)).eval()
    assert torch.equal(again.run(images()).logits, expected)
    foveate.save(model, tmp_path / "all", everything=True)
    again = foveate.load(tmp_path / "all").eval()
    assert type(again.vit) is type(stock(name)) and again.vit is not stock(name)
    assert torch.equal(again.run(images()).logits, expected)


@names
def test_folders_of_save_pretrained(name: str, tmp_path: Path) -> None:
    stock(name).save_pretrained(tmp_path)
    model = from_folder(tmp_path)
    assert type(model) is type(stock(name)) and not model.training
    again = foveate.apply(model, "evit").eval()
    close(again.run(images()).logits, reduced(name, "evit").run(images()).logits)


def test_folders_without_a_class_or_with_two_halves(tmp_path: Path) -> None:
    stock("vit").save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    same(logits(from_folder(tmp_path), images()), logits(stock("vit"), images()))
    config = transformers.CLIPConfig(
        vision_config=VISION, text_config={**VISION, "vocab_size": 50, "eos_token_id": 2}
    )
    both = randomise(transformers.CLIPModel(config)).eval()
    both.save_pretrained(tmp_path / "clip")
    half = from_folder(tmp_path / "clip")
    assert type(half).__name__ == "CLIPVisionModel"
    same(logits(half, images()), logits(both.vision_model, images()))


SQUARE_ONLY = [name for name in MODELS if name.startswith(("dinov2", "clip", "siglip"))]


@pytest.mark.parametrize(
    "size", [pytest.param((64, 64), marks=pytest.mark.slow), (32, 32), (40, 72)], ids=str
)
@names
def test_a_folder_at_another_size(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """The loaded model answers as the original does with positions resized in its forward pass."""
    stock(name).save_pretrained(tmp_path / "hf")
    if size[0] != size[1] and name in SQUARE_ONLY:
        with pytest.raises(ValueError, match="square images only, got image_size 40 x 72; leave"):
            foveate.load(tmp_path / "hf", image_size=size)
        return
    model = foveate.load(tmp_path / "hf", image_size=size)
    x = images(2, size)
    with torch.no_grad():
        got, expected = model(x), native(name, x)
    for field, value in expected.items():
        close(got[field], value, 1e-5)
    again = foveate.load(tmp_path / "hf", image_size=size, method="evit", keep=0.6)
    assert again.backbone.spec.grid == (size[0] // 8, size[1] // 8)
    close(again.run(x).logits, reduced(name, "evit(keep=0.6)").run(x).logits, 1e-5)
    foveate.save(again, tmp_path / "all", everything=True)
    last = foveate.load(tmp_path / "all").eval()
    assert torch.equal(last.run(x).logits, again.run(x).logits)
    wanted = size[0] if size[0] == size[1] else list(size)
    assert last.backbone.tower.config.image_size == wanted
    model.save_pretrained(tmp_path / "theirs")  # transformers itself reads it back
    with torch.no_grad():
        same(from_folder(tmp_path / "theirs")(x), got)


def test_antialiasing_is_a_choice_and_noted(tmp_path: Path) -> None:
    from foveate.convert import Settings, open_model

    for name, default in (("vit", False), ("dinov2", False), ("dinov2_reg", True)):
        folder = tmp_path / name
        stock(name).save_pretrained(folder)
        answers = {}
        for choice in (None, False, True):
            settings = Settings(image_size=32, antialias=choice)
            loaded = open_model(folder, None, None, {}, settings)
            answers[choice] = logits(loaded.model, images(2, (32, 32)))
            how = "with" if (default if choice is None else choice) else "without"
            note = f"positions resized from 6 x 6 to 4 x 4 patches, {how} antialiasing"
            assert loaded.notes == [note]
        assert torch.equal(answers[None], answers[default])
        assert not torch.equal(answers[None], answers[not default])
        same = open_model(folder, None, None, {}, Settings(image_size=48))
        assert not same.notes and torch.equal(
            logits(same.model, images()), logits(stock(name), images())
        )


def test_sizes_that_a_folder_cannot_have(tmp_path: Path) -> None:
    stock("vit").save_pretrained(tmp_path / "vit")
    hf("ViTModel", image_size=(32, 72)).save_pretrained(tmp_path / "wide")
    for name, options, words in (
        ("vit", dict(image_size=50), "image size 50 is not a multiple of the patch's 8"),
        ("vit", dict(antialias=False), "antialias says how to resize positions; give image_size"),
        ("vit", dict(image_size=64, num_heads=3), "num_heads is for checkpoint files$"),
        ("wide", dict(image_size=48), "4 x 9 patches, and transformers resizes square grids only"),
    ):
        with pytest.raises(ValueError, match=words):
            foveate.load(tmp_path / name, **options)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        from_folder(tmp_path / "nowhere")
    stock("vit_classifier").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="the weights cannot be read"):
        from_folder(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="the weights cannot be read"):
        from_folder(tmp_path)
    weights.write_bytes(whole)
    for changes, words in (
        (dict(architectures=["DeiTForImageClassification"]), "missing"),
        (dict(num_hidden_layers=5), "weights of .* are missing"),
        (dict(hidden_size=96), "cannot be read"),
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
        (dict(architectures=["SwinModel"]), "holds SwinModel; supported are ViTModel"),
        (dict(architectures=None, model_type="swin"), "a model of type 'swin'"),
    ):
        text = (tmp_path / "config.json").read_text()
        edit(tmp_path, **changes)
        with pytest.raises(ValueError, match=words):
            from_folder(tmp_path)
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        from_folder(tmp_path)


def test_saved_folders_name_no_other_code(tmp_path: Path) -> None:
    foveate.save(reduced("vit"), tmp_path, everything=True)
    path = tmp_path / "foveate.json"
    config = json.loads(path.read_text())
    for name in ("AutoModel", "ViTMAEModel", "os"):
        config["model"]["transformers"] = name
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="no Hugging Face ViT model is called"):
            foveate.load(tmp_path)
    config["model"].update(transformers="ViTModel", arguments={"hidden": 3})
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be made again"):
        foveate.load(tmp_path)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SwinModel", "not a plain ViT"),
        ("BeitModel", "not a plain ViT"),
        ("ViTMAEModel", "not a plain ViT"),
        ("ViTMSNModel", "not a plain ViT"),
        ("DINOv3ViTModel", "not a plain ViT"),
        ("ViTForMaskedImageModeling", "a form other than ViTModel"),
        ("DeiTForMaskedImageModeling", "a form other than ViTModel"),
        ("Dinov2Backbone", "a form other than Dinov2Model"),
        ("CLIPModel", "a form other than CLIPVisionModel"),
        ("CLIPTextModel", "a form other than CLIPVisionModel"),
        ("SiglipModel", "a form other than SiglipVisionModel"),
    ],
)
def test_other_models(name: str, words: str) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(ValueError, match=f"^{name} with .*{words}.* cannot be driven") as error:
        foveate.apply(model, "evit")
    assert "Hugging Face transformers ViT, DeiT, DINOv2" in str(error.value)


def test_changed_models() -> None:
    class OwnViT(transformers.ViTModel):
        pass

    class OwnMlp(nn.Module):
        pass

    own = OwnViT(stock("vit").config)
    with pytest.raises(ValueError, match="OwnViT with a class of its own"):
        foveate.apply(own, "evit")
    model = hf("ViTModel")
    model.layers[2].mlp = OwnMlp()
    with pytest.raises(ValueError, match="ViTModel with OwnMlp in its layers"):
        foveate.apply(model, "evit")
    model = hf("ViTModel")
    del model.layers[0].attention.q_proj
    with pytest.raises(ValueError, match="an older transformers: 5.18 or newer is needed"):
        foveate.apply(model, "evit")
    model = randomise(hf("ViTModel"))
    stock_forward = model.layers[2].forward
    model.layers[2].forward = lambda x, *rest, **named: stock_forward(x, *rest, **named) * 1.05
    with pytest.raises(ValueError, match="block 2 differs"):
        foveate.apply(model, "evit")


@names
def test_hooks_on_layers_and_their_attention_see_what_they_would(name: str) -> None:
    """The same forms and shapes as natively."""
    model, seen = copy.deepcopy(stock(name)), []

    def note(_: nn.Module, __: tuple, output: object) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        shapes = [list(part.shape) for part in parts if part is not None]
        seen.append((type(output).__name__, shapes))

    backbone = foveate.apply(model, NOTHING, check=False).eval()
    backbone.backbone.blocks[1].register_forward_hook(note)
    backbone.backbone.attention_of(1).register_forward_hook(note)
    with torch.no_grad():
        model(images())
        natively = list(seen)
        seen.clear()
        backbone(images())
    assert seen == natively and len(seen) == 2


def test_what_the_driver_does_not_do() -> None:
    model, x = reduced("vit"), images()
    for options, words in (
        (dict(output_attentions=True), "attention stays fused"),
        (dict(attention_mask=torch.ones(3, 37)), "keep_mask"),
        (dict(bool_masked_pos=torch.ones(3, 36)), "masked modelling"),
        (dict(labels=torch.ones(3)), "ViTModel has no loss"),
    ):
        with pytest.raises(ValueError, match=words):
            model(x, **options)
    with pytest.raises(ValueError, match="image height 50 is not a multiple of the patch's 8"):
        model(images(2, (48, 48))[..., :1].expand(-1, -1, -1, 48).new_zeros(2, 3, 50, 48))


def test_importing_foveate_leaves_transformers_out() -> None:
    code = "import sys, foveate; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Full size ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ViTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "Dinov2WithRegistersForImageClassification",
        "CLIPVisionModelWithProjection",
        "SiglipVisionModel",
    ],
)
def test_full_size(name: str) -> None:
    """Models of transformers' own default size: base, 224 px."""
    kind = getattr(transformers, name)
    model = randomise(kind(kind.config_class())).eval()
    reduced = foveate.apply(model, NOTHING).eval()
    x = images(2, (224, 224))
    with torch.no_grad():
        expected, got = model(x), reduced(x)
        for field, value in expected.items():
            assert (got[field] - value).norm() < 1e-4 * value.norm()
        evit = foveate.apply(model, "evit").eval()(x)
        assert all(torch.isfinite(value).all() for value in evit.to_tuple())
