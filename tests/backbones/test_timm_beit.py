"""timm's Beit: with all tokens by its own blocks; nothing that leaves tokens out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from small import close, images, logits, noise, randomise, vit
from timm.models.beit import Attention, Beit, Block
from torch import Tensor

import foveate
from foveate.api import check_driven
from foveate.backbones import (
    TimmBeit,
    backbone_for,
    expand_position_bias,
    rebuild,
    shared_position_bias,
)
from foveate.backbones.timm_beit import SHARED_BIAS, TABLE
from foveate.core import Context, TokenState, dense
from foveate.viz.relevance import heat_map

RELATIVE = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
SHARED = RELATIVE | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
OURS = "relative position bias, and methods that drop tokens do not carry it; dense"


def beit(**options: object) -> Beit:
    return randomise(vit(Beit, **{**RELATIVE, **options})).eval()


FORMS: dict[str, Callable[[], Beit]] = {
    "blocks apart": beit,
    "shared": lambda: beit(**SHARED),
    "both": lambda: beit(use_shared_rel_pos_bias=True),
    "shared, absolute, class token": lambda: beit(
        **{**SHARED, "use_abs_pos_emb": True, "global_pool": "token"}
    ),
    "absolute": lambda: beit(use_rel_pos_bias=False, use_abs_pos_emb=True),
    "un-pooled": lambda: beit(global_pool=""),
    "normed first": lambda: beit(use_fc_norm=False, init_values=None),
    "headless": lambda: beit(num_classes=0),
    "no biases": lambda: beit(qkv_bias=False),
    "gated": lambda: beit(swiglu_mlp=True, scale_mlp=True),
    "grey, not square": lambda: beit(img_size=(32, 72), in_chans=1),
}


def input_of(model: Beit) -> Tensor:
    x = images(2, tuple(model.patch_embed.img_size))
    return x[:, : model.in_chans]


@pytest.mark.parametrize("name", FORMS)
def test_parts_equal_the_whole(name: str) -> None:
    model = FORMS[name]()
    backbone = backbone_for(model)
    assert type(backbone) is TimmBeit and backbone.current()
    check_driven(backbone)
    x, seen = input_of(model), []
    with torch.no_grad():
        embedded = backbone.embed(x)
        tokens = backbone.norm(backbone.through(embedded.x, embedded.grid, seen.append))
        state = TokenState.begin(tokens, Context(1, embedded.grid))
        close(backbone.head(state), model(x))
        assert torch.equal(backbone.whole(x).tokens(), tokens)
        assert len(seen) == 4 and torch.equal(backbone.norm(seen[-1]), tokens)
        assert torch.equal(tokens, model.forward_features(x))
    spec = backbone.spec
    assert (spec.prefix, spec.heads, spec.head_dim, spec.class_token) == (1, 3, 16, True)
    assert spec.grid == tuple(model.patch_embed.grid_size) and spec.classes == model.num_classes


def test_patches_are_edited_before_positions() -> None:
    model = beit(**{**SHARED, "use_abs_pos_emb": True})
    backbone, x, token = backbone_for(model), images(), noise(1, 1, 48)
    hidden = noise(3, 36, seed=3) > 0
    with torch.no_grad():
        found = backbone.embed(x, lambda p: torch.where(hidden[..., None], token, p)).x
        patches = torch.where(hidden[..., None], token, model.patch_embed(x))
        wanted = torch.cat([model.cls_token.expand(3, -1, -1), patches], 1) + model.pos_embed
    close(found, wanted)


@pytest.mark.parametrize("options", [RELATIVE, SHARED])
def test_checkpointing_changes_nothing(options: dict) -> None:
    model = beit(**options, drop_path_rate=0.2).train()
    backbone, x = backbone_for(model), images()
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        seen: list[Tensor] = []
        embedded = backbone.embed(x)
        out = backbone.through(embedded.x, embedded.grid, seen.append)
        (out.square().mean() + seen[1].square().mean()).backward()
        found.append([out, *(p.grad for n, p in model.named_parameters() if n[:4] in TRAINED)])
    assert all(grad is not None for grad in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


TRAINED = ("bloc", "rel_", "patc", "cls_")


def test_absolute_positions_take_any_size() -> None:
    model = beit(use_rel_pos_bias=False, use_abs_pos_emb=True)
    backbone = backbone_for(model)
    assert backbone.fixed_size is None
    large = backbone.whole(images(2, (64, 48)))
    assert large.grid == (8, 6) and large.tokens().shape == (2, 49, 48)
    some = backbone.through(noise(2, 10, 48), (6, 6))  # positions are in the tokens
    assert some.shape == (2, 10, 48)


@pytest.mark.parametrize("options", [RELATIVE, SHARED])
def test_relative_positions_take_their_own_size_and_all_tokens(options: dict) -> None:
    model = beit(**options)
    backbone = backbone_for(model)
    assert backbone.fixed_size == (48, 48)
    for size in ((64, 64), (32, 72)):  # the second has as many patches
        with pytest.raises(ValueError, match=f"images of 48 x 48, got {size[0]} x {size[1]}; its"):
            backbone.embed(images(2, size))
    for count, grid in ((10, (6, 6)), (37, (4, 9)), (36, (6, 6))):
        with pytest.raises(ValueError, match=f"6 x 6 patches and a class token, got {count} tok"):
            backbone.through(noise(2, count, 48), grid)
    model.set_input_size((64, 64))
    assert not backbone.current()
    assert backbone_for(model).whole(images(2, (64, 64))).grid == (8, 8)


def sentence(call: Callable[[], object], words: str = OURS) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nothing_that_drops_tokens_runs() -> None:
    model = beit()
    for check in (True, False):
        sentence(lambda check=check: foveate.apply(model, "evit", check=check))
    sentence(lambda: dense(backbone_for(model)))
    sentence(lambda: heat_map(model, images()))
    assert foveate.count(model).macs > 4 * 37 * (4 * 48 * 48 + 8 * 48 * 48)


def test_what_is_not_stock_is_refused() -> None:
    class Named(Beit):
        pass

    class Mine(Beit):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class MyBlock(Block):
        pass

    class MyAttention(Attention):
        pass

    assert backbone_for(vit(Named)).spec.family == backbone_for(beit()).spec.family
    with pytest.raises(ValueError, match="Mine with a class of its own, which overrides forward_f"):
        backbone_for(vit(Mine))
    model = beit()
    model.blocks[1].attn.__class__ = MyAttention
    with pytest.raises(ValueError, match="MyAttention attention"):
        backbone_for(model)
    model.blocks[1].__class__ = MyBlock
    with pytest.raises(ValueError, match="MyBlock blocks"):
        backbone_for(model)


def test_a_model_that_is_not_what_it_seems_is_found_out() -> None:
    model = beit(use_fc_norm=False)  # a norm at the end would hide the scale
    model.pos_drop.register_forward_hook(lambda _, __, out: out * 1.5)
    check_driven(backbone_for(model))  # a hook inside a part stays in force
    model.forward_features = lambda x: 2 * Beit.forward_features(model, x)
    with pytest.raises(ValueError, match="its (head|logits) differs from the model's own"):
        check_driven(backbone_for(model))


def test_a_named_model_can_be_made_again() -> None:
    model = timm.create_model("beit_base_patch16_224", depth=2, num_classes=3).eval()
    recipe = backbone_for(model).recipe()
    twin = rebuild("timm Beit", recipe).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, images(1, (224, 224))), logits(model, images(1, (224, 224))))


# Position biases -----------------------------------------------------------------------------


def test_a_shared_bias_is_expanded_and_shared_again() -> None:
    shared, apart = beit(**SHARED), beit()
    state = shared.state_dict()
    expanded = expand_position_bias(state, 4)
    apart.load_state_dict(expanded)
    close(logits(apart, images()), logits(shared, images()))
    again = shared_position_bias(expanded)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    tables = [expanded[f"blocks.{i}.attn.{TABLE}"] for i in range(4)]
    assert len({t.data_ptr() for t in tables}) == 4  # files hold each on its own
    # Blocks that had one of their own keep its part.
    both = beit(use_shared_rel_pos_bias=True)
    apart.load_state_dict(expand_position_bias(both.state_dict(), 4))
    close(logits(apart, images()), logits(both, images()))


def test_biases_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=f"expected {SHARED_BIAS}"):
        expand_position_bias(beit().state_dict(), 4)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.relative\S+ differs from block 0's"):
        shared_position_bias(beit().state_dict())
    with pytest.raises(ValueError, match="no position bias to share"):
        shared_position_bias(beit(**SHARED).state_dict())
    with pytest.raises(ValueError, match="and tables of the blocks"):
        shared_position_bias(beit(use_shared_rel_pos_bias=True).state_dict())
