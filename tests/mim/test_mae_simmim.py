"""The methods: the originals' answers, what the encoder sees, losses by hand, states, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.golden_files import golden
from golden.golden_files import images as golden_images
from masked_models import (
    FORMS,
    GRID,
    PATCH,
    SHARED,
    beit,
    close,
    forms,
    images,
    mask,
    method,
    vit,
    with_other,
)
from safetensors.torch import save_file
from small import noise
from timm.layers import build_sincos2d_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

from foveate.convert import Settings
from foveate.mim import Hiding, Mask, MaskedImageModel, make_method, register
from foveate.mim.encoders import sincos_positions
from foveate.mim.mae import Decoder
from foveate.mim.method import METHODS, Prediction
from foveate.mim.release import open_release
from foveate.mim.targets import normalised, patchify, unpatchify
from foveate.mim.task import PretrainTask
from foveate.train.optim import make_optimiser, parameter_groups
from foveate.train.recipe import Optim

BOTH = pytest.mark.parametrize("name", ["mae", "simmim"])
ALL = forms("mae", "simmim")
EVERY = pytest.mark.parametrize("form", ALL)


class Fixed(nn.Module):
    """Says the same whatever it is given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def answering(model: MaskedImageModel, answer: Tensor) -> MaskedImageModel:
    """The method with a last layer that predicts given patches."""
    if model.name == "mae":
        model.decoder.pred = Fixed(answer)
    else:
        model.head = Fixed(answer)
    return model


# The originals' answers --------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "norm_pix"), [("mae", False), ("mae_normpix", True)])
def test_the_reference_answers_of_mae(case: str, norm_pix: bool, tmp_path: Path) -> None:
    state, answers = golden(case)
    save_file(state, tmp_path / "mae.safetensors")
    options = {"decoder_heads": 2, "norm_pix": norm_pix}
    model = open_release(tmp_path / "mae.safetensors", Settings(num_heads=3), options)
    assert model.name == "mae" and model.depth == 2 and not model.training
    hiding = Mask.from_noise(answers["noise"].float(), 147)
    assert torch.equal(hiding.hidden, answers["mask"].bool())
    with torch.no_grad():
        found = model(golden_images(), hiding)
    close(found.losses["pixel"].reshape(-1), answers["loss"].reshape(-1), 1e-4)
    torch.testing.assert_close(found.patches, answers["pred"].float(), atol=2e-3, rtol=0)


def test_the_reference_answers_of_simmim(tmp_path: Path) -> None:
    state, answers = golden("simmim")
    save_file(state, tmp_path / "simmim.safetensors")
    model = open_release(tmp_path / "simmim.safetensors", Settings(num_heads=3))
    assert model.name == "simmim" and model.depth == 6 and isinstance(model.vit, Beit)
    with torch.no_grad():
        found = model(golden_images(), Mask.of(answers["mask"].bool()))
        drawn = model.painted(golden_images(), found)
    close(found.losses["pixel"].reshape(-1), answers["loss"].reshape(-1), 1e-4)
    torch.testing.assert_close(drawn, answers["reconstruction"].float(), atol=2e-3, rtol=0)


def test_a_release_without_its_decoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file(vit().state_dict(), path)
    with pytest.raises(ValueError, match="has no decoder: expected a checkpoint of MAE, "):
        open_release(path, Settings(num_heads=2))


# What is seen ------------------------------------------------------------------------------------


def test_the_decoder_puts_tokens_back_where_they_were() -> None:
    """Tokens that say where they are from, through a decoder that changes nothing."""
    decoder, hiding = Decoder(32, 32, 0, 1, 16, GRID, prefix=2), mask()
    assert hiding.visible is not None
    nn.init.eye_(decoder.embed.weight)
    nn.init.zeros_(decoder.embed.bias)
    nn.init.constant_(decoder.mask_token, -1)
    names = torch.cat([torch.tensor([[500.0, 600.0]] * 2), hiding.visible.float()], 1)
    _, (states,) = decoder(names[..., None].expand(-1, -1, 32), hiding, GRID, states=True)
    wanted = torch.arange(49.0).expand(2, -1).masked_fill(hiding.hidden, -1)
    assert torch.equal(states.initial, wanted[..., None].expand(-1, -1, 32))
    places = sincos_positions(GRID, 32, 0)
    close(states.tokens[0], states.initial + places)


def test_masks_of_unequal_counts() -> None:
    """SimMIM computes every image as it would alone; MAE says that it cannot."""
    hidden = noise(3, 49) > torch.tensor([[-1.0], [0.0], [1.0]])
    ragged, x = Mask.of(hidden), images(3)
    assert ragged.visible is None
    model = method("simmim", beit())
    with torch.no_grad():
        found = model(x, ragged)
        alone = [model(x[i : i + 1], Mask.of(hidden[i : i + 1])) for i in range(3)]
    close(found.patches, torch.cat([one.patches for one in alone]))
    share = hidden.sum(1) / hidden.sum()
    losses = torch.stack([one.losses["pixel"] for one in alone])
    close(found.losses["pixel"], (share * losses).sum())
    with pytest.raises(ValueError, match="^mae needs masks that hide as many patches in every im"):
        method("mae")(x, ragged)


# Losses ------------------------------------------------------------------------------------------


def by_loop(name: str, x: Tensor, patches: Tensor, hidden: Tensor, norm_pix: bool) -> float:
    """Patch by patch from the pixels themselves."""
    total, count = 0.0, 0
    for image, mine, mask_row in zip(x, patches.detach(), hidden, strict=True):
        for number in mask_row.nonzero().flatten().tolist():
            row, column = (PATCH[0] * i for i in divmod(number, GRID[1]))
            target = image[:, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            for a, b in zip(mine[number].tolist(), target.tolist(), strict=True):
                total += (a - b) ** 2 if name == "mae" else abs(a - b)
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("name", "norm_pix", "channels"),
    [("mae", True, 1), ("mae", False, 3), ("simmim", False, 1), ("simmim", False, 3)],
)
def test_the_loss_by_hand(name: str, norm_pix: bool, channels: int) -> None:
    options = {"norm_pix": norm_pix} if name == "mae" else {}
    model = method(name, vit(in_chans=channels), **options)
    x, hiding = images(2, channels=channels), mask()
    found = model(x, hiding)
    assert found.losses.keys() == {"pixel"} and found.patches.shape == (2, 49, 16 * channels)
    wanted = by_loop(name, x, found.patches, hiding.hidden, norm_pix)
    assert found.losses["pixel"].item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("name", "norm_pix"), [("mae", True), ("mae", False), ("simmim", False)])
def test_a_perfect_prediction_has_no_loss_whatever_is_visible(name: str, norm_pix: bool) -> None:
    options = {"norm_pix": norm_pix} if name == "mae" else {}
    x, hiding = images(), mask()
    target = patchify(x, PATCH)
    model = answering(method(name, **options), normalised(target) if norm_pix else target)
    assert model(x, hiding).losses["pixel"].item() == 0
    seen, hidden = (with_other(x, hiding.hidden, change=what) for what in ("visible", "hidden"))
    assert model(seen, hiding).losses["pixel"].item() == 0
    assert model(hidden, hiding).losses["pixel"].item() > 0.1
    torch.testing.assert_close(model.painted(x, model(x, hiding)), x, atol=1e-5, rtol=0)


def test_what_is_painted_is_what_is_predicted() -> None:
    x, hiding = images(), mask()
    for name, options in (("mae", {"norm_pix": False}), ("simmim", {})):
        model = method(name, **options)
        found = model(x, hiding)
        assert torch.equal(model.painted(x, found), unpatchify(found.patches, GRID, PATCH))


# Positions ---------------------------------------------------------------------------------------


def test_positions_are_timms_in_another_order_of_channels() -> None:
    ours = sincos_positions((4, 7), 8, 2)
    assert ours.shape == (1, 2 + 28, 8) and not ours[:, :2].any()
    theirs = build_sincos2d_pos_embed([4, 7], 8)
    same = (ours[0, 2:, :, None] - theirs[:, None]).abs().amax(0) < 1e-5
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
    with pytest.raises(ValueError, match="need a width that 4 divides, got 18"):
        sincos_positions((4, 7), 18, 0)


@pytest.mark.parametrize("learned", [False, True])
def test_positions_of_mae_stay_unless_they_are_to_learn(learned: bool) -> None:
    model = make_method("mae", vit(), {"decoder_width": 32, "learned_positions": learned})
    model.initialise()
    places = [model.vit.pos_embed, model.decoder.pos_embed]
    assert torch.equal(places[0][0, 1:], sincos_positions(GRID, 32, 0)[0])
    assert not places[0][0, 0].any() and torch.equal(*places)
    before = copy.deepcopy(model.state_dict())
    task = PretrainTask(model)
    optimiser = make_optimiser(task, Optim(weight_decay=0.5), 1e-2)
    model(images(), mask()).losses["pixel"].backward()
    assert (model.vit.pos_embed.grad is not None) == learned
    optimiser.step()
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert ("vit.pos_embed" in moved) == learned and "decoder.pos_embed" not in moved
    assert {"vit.cls_token", "decoder.mask_token", "vit.patch_embed.proj.weight"} <= moved


@pytest.mark.parametrize("form", FORMS)
def test_positions_of_every_form_start_as_sines_and_cosines(form: str) -> None:
    model = method("mae", FORMS[form]())
    model.initialise()
    pos = model.vit.pos_embed[0]
    assert torch.equal(pos[-49:], sincos_positions(GRID, 32, 0)[0]) and not pos[:-49].any()


@pytest.mark.parametrize("size", [(36, 20), (28, 32), (4, 196)])
@BOTH
def test_images_of_another_size(name: str, size: tuple[int, int]) -> None:
    """As a model would answer that was made for that size, with its positions resized."""
    model, x = method(name), images(2, size)
    patches = size[0] * size[1] // 16
    hiding = mask(2, patches, int(0.7 * patches))
    resized = copy.deepcopy(model.vit)
    resized.set_input_size(size)
    other = make_method(name, resized, model.options)
    places = {key: value for key, value in other.state_dict().items() if "pos_embed" in key}
    other.load_state_dict({**model.state_dict(), **copy.deepcopy(places)})
    with torch.no_grad():
        found, wanted = model(x, hiding, states=True), other(x, hiding, states=True)
    assert found.patches.shape == (2, patches, 16)
    close(found.patches, wanted.patches)
    close(found.losses["pixel"], wanted.losses["pixel"])
    close(found.states[0].tokens[0], wanted.states[0].tokens[0])
    assert model.painted(x, found).shape == x.shape


# States ------------------------------------------------------------------------------------------


@EVERY
def test_states(form: str) -> None:
    """Layer by layer in raster order, hidden rows alike before positions, the last as predicted."""
    model, x, hiding = ALL[form](), images(), mask()
    with torch.no_grad():
        found = model(x, hiding, states=True)
        assert model(x, hiding).states == ()
        (network,) = found.states
        width = network.initial.shape[-1]
        assert len(network.tokens) == model.depth + 1 == 3
        assert all(layer.shape == (2, 49, width) for layer in network.tokens)
        token = model.decoder.mask_token if model.name == "mae" else model.mask_token
        hidden = network.initial[hiding.hidden]
        assert torch.equal(hidden, token[0].expand_as(hidden))
        places = network.tokens[0] - network.initial
        if model.name == "mae":
            norm, head = model.decoder.norm, model.decoder.pred
            close(places, sincos_positions(GRID, width, 0).expand_as(places))
            encoded = model.decoder.embed(model.encode(x, hiding))[:, -13:]
            assert hiding.visible is not None
            seen = network.initial.gather(1, hiding.visible[..., None].expand_as(encoded))
            close(seen, encoded)
        else:
            norm, head, pos = model.vit.norm, model.head, model.vit.pos_embed
            added = torch.zeros_like(places) if pos is None else pos[:, -49:].expand_as(places)
            close(places, added)
            patches = model.vit.patch_embed(x)
            close(network.initial[~hiding.hidden], patches[~hiding.hidden])
        close(head(norm(network.tokens[-1])), found.patches)


def test_states_carry_gradients() -> None:
    for name in ("mae", "simmim"):
        model = method(name)
        (network,) = model(images(), mask(), states=True).states
        for layer in (network.initial, *network.tokens):
            model.zero_grad()
            layer.square().sum().backward(retain_graph=True)
            token = model.decoder.mask_token if name == "mae" else model.mask_token
            assert token.grad is not None and token.grad.abs().sum() > 0
            assert model.vit.patch_embed.proj.weight.grad.abs().sum() > 0


# Training ----------------------------------------------------------------------------------------


def test_a_copy_computes_with_its_own_weights() -> None:
    for name in ("mae", "simmim"):
        model, x, hiding = method(name), images(), mask()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = model(x, hiding).patches
            assert torch.equal(twin(x, hiding).patches, before)
            twin.vit.blocks[0].attn.proj.weight.mul_(-1)
            assert torch.equal(model(x, hiding).patches, before)
            assert not torch.allclose(twin(x, hiding).patches, before, atol=1e-3)
            twin.vit = model.vit
            assert torch.equal(twin(x, hiding).patches, before)


def test_new_weights() -> None:
    """MAE's as Xavier draws them; SimMIM's shrink with depth where they add to the stream."""
    mae = method("mae", vit(depth=3))
    mae.initialise()
    for part in (mae.vit.blocks[1].mlp.fc1, mae.decoder.blocks[0].attn.qkv, mae.decoder.pred):
        bound = (6 / (part.in_features + part.out_features)) ** 0.5
        assert part.weight.abs().max() <= bound and part.weight.std() > 0.5 * bound
        assert not part.bias.any()
    weight = mae.vit.patch_embed.proj.weight
    assert 0.9 < weight.abs().max().item() / (6 / (32 + 16)) ** 0.5 <= 1
    assert (mae.decoder.norm.weight == 1).all() and not mae.vit.norm.bias.any()
    assert 0 < mae.vit.cls_token.std() < 0.05 and 0 < mae.decoder.mask_token.std() < 0.05
    simmim = method("simmim", vit(depth=3))
    simmim.initialise()
    for number, block in enumerate(simmim.vit.blocks, 1):
        for part in (block.attn.proj, block.mlp.fc2):
            assert part.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.15)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0 < simmim.mask_token.abs().max() <= 0.02 and not simmim.head.bias.any()


# Refused -----------------------------------------------------------------------------------------


@BOTH
def test_models_that_cannot_be_pretrained(name: str) -> None:
    for model, said in (
        (
            vit(Eva),
            "^timm Eva models cannot be pre-trained here: timm's VisionTransformer and Beit",
        ),
        (vit(global_pool="avg"), "^VisionTransformer norms after pooling, and there is no pooling"),
    ):
        with pytest.raises(ValueError, match=said):
            make_method(name, model)


@pytest.mark.parametrize(
    "options", [{}, {"use_abs_pos_emb": True}, {"use_shared_rel_pos_bias": False}]
)
def test_mae_leaves_patches_out_and_so_takes_no_beit(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^mae leaves patches out, which needs absolute positions"):
        make_method("mae", beit(**options))


def test_mae_takes_no_vit_without_positions() -> None:
    with pytest.raises(ValueError, match="which needs absolute positions: this timm VisionTransf"):
        make_method("mae", vit(pos_embed="none"))
    assert method("simmim", vit(pos_embed="none"))(images(), mask()).patches.isfinite().all()


def test_a_beit_that_norms_after_pooling() -> None:
    with pytest.raises(ValueError, match="^Beit norms after pooling.* with model.pool=token"):
        make_method("simmim", vit(Beit, **{**SHARED, "global_pool": "avg", "use_fc_norm": True}))


def test_a_beit_has_one_size() -> None:
    with pytest.raises(ValueError, match="relative positions for images of 28 x 28, got 36 x 20"):
        method("simmim", beit())(images(2, (36, 20)), mask(2, 45, 30))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder_width": 34}, "^decoder_width=34 must be a multiple of 4, for its positions$"),
        (
            {"decoder_width": 32, "decoder_heads": 3},
            "^decoder_width=32 must be a multiple of its 3 heads$",
        ),
        ({"decoder_width": 0}, "^decoder_width must be a whole number from 1, got 0$"),
        ({"decoder_depth": 0}, "^decoder_depth must be a whole number from 1, got 0$"),
        ({"decoder_heads": -1}, "^decoder_heads must be a whole number from 1, got -1$"),
        ({"decoder_dept": 2}, "decoder_dept.*did you mean 'decoder_depth'"),
        ({"vit": None}, "'vit'"),
    ],
)
def test_options_of_mae(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_method("mae", vit(), options)


def test_names_of_methods() -> None:
    with pytest.raises(ValueError, match="'simmin'; did you mean 'simmim'"):
        make_method("simmin", vit())
    with pytest.raises(ValueError, match="named 'mae' is registered already"):
        register("mae")(METHODS["simmim"])
    assert METHODS["simmim"].name == "simmim"
    with pytest.raises(ValueError, match="decoder_depth"):
        make_method("simmim", vit(), {"decoder_depth": 2})


@BOTH
def test_a_mask_of_another_size(name: str) -> None:
    model = method(name)
    for wrong in (mask(2, 64, 40), mask(3)):
        with pytest.raises(ValueError, match=r"^the mask is of \[\d, \d+\] patches, the images ha"):
            model(images(), wrong)
    assert isinstance(model(images(), mask()), Prediction)


# Models ------------------------------------------------------------------------------------------


def test_what_the_vit_leaves_out_of_weight_decay_stays_out() -> None:
    task = PretrainTask(make_method("simmim", beit()), Hiding(kind="random"))
    groups = parameter_groups(task, Optim(weight_decay=0.05))
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    named = dict(task.model.named_parameters())
    table = "vit.rel_pos_bias.relative_position_bias_table"
    assert id(named[table]) in plain and id(named["vit.cls_token"]) in plain
    assert id(named["vit.blocks.0.attn.qkv.weight"]) not in plain


def test_models_that_cannot_be() -> None:
    pooled = vit(class_token=False, global_pool="map")
    with pytest.raises(ValueError, match="pools by attention, .*model.options.global_pool=''"):
        make_method("mae", pooled)
    padded = make_method("mae", vit(dynamic_img_size=True, dynamic_img_pad=True))
    x = torch.zeros(1, 1, 30, 28)
    with pytest.raises(ValueError, match="images of 30 x 28 are not whole patches of 4 x 4"):
        padded(x, mask(1, 56, 42))


def test_pictures_need_pixels() -> None:
    model = method("simmim")
    x, drawn = images(), mask(2, 49, 30)
    found = model(x, drawn)
    found.patches = found.patches[..., :1]
    with pytest.raises(ValueError, match="simmim predicts 1 values a patch, which has 16: "):
        model.painted(x, found)
