"""Pyramid and adapter: the same with every method, in every mode, alone and in a batch."""

from __future__ import annotations

import pytest
import torch
from models import METHODS, SIZES, backbone, corner, photos, reduced, same
from small import close, eva, images, noise, randomise, vit
from torch import nn
from torchvision.models.detection.image_list import ImageList

import foveate
from foveate.dense import DenseBackbone, adapter, pyramid, windowed

KINDS = ("pyramid", "adapter")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gates_open_equal_dense(kind: str) -> None:
    dense = backbone(kind)
    opened = foveate.apply(dense, "svit(keep=1.0, gate='topk')", check=False).eval()
    assert opened.reducer.name == "svit" and dense.reducer.name == "dense"
    for batch in (images(2), photos()):
        same(opened(batch), dense(batch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_alone_equals_itself_in_a_batch(kind: str, method: str) -> None:
    model, batch = backbone(kind, method), photos()
    together = model(batch)
    for number, image in enumerate(batch):
        alone = model([image])
        same(corner(together, number, alone), alone, 2e-5)
        for name, values in together.items():  # and nothing stands in the padding
            rows, columns = alone[name].shape[2:]
            assert not values[number, :, rows:].any() and not values[number, :, :, columns:].any()


@pytest.mark.parametrize(
    "method",
    ["svit(keep=0.7, gate='topk')", "svit(keep=0.7)", "dynamicvit(keep=0.7)", "ats(K=12)"],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_modes_agree_on_images_of_different_sizes(kind: str, method: str) -> None:
    model = backbone(kind, method)
    found = {}
    for mode in ("masked", "packed"):
        model.reduced.mode = mode
        found[mode] = model(photos())
    same(found["masked"], found["packed"], 2e-5)
    if model.reducer.fixed_count:
        model.reduced.mode = "gathered"
        for number, image in enumerate(photos()):
            alone = model([image])
            same(corner(found["packed"], number, alone), alone, 2e-5)


@torch.no_grad()
def test_one_image_is_gathered_and_a_batch_packed() -> None:
    model = backbone("adapter", "svit(keep=0.7)")
    assert model.features(photos()[2:]).state.layout.is_even
    state = model.features(photos()).state
    assert state.context.mode == "packed" and state.counts == (36, 40, 28)


@pytest.mark.parametrize("form", ["rotary", "register tokens", "no prefix"])
@torch.no_grad()
def test_other_families_alone_and_in_a_batch(form: str) -> None:
    made = {
        "rotary": lambda: eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
        "register tokens": lambda: vit(reg_tokens=4, no_embed_class=True),
        "no prefix": lambda: vit(class_token=False, global_pool="avg"),
    }[form]()
    body = reduced("svit(keep=0.7)", randomise(made).eval())
    model = randomise(adapter(body, stem=8), seed=3).eval()
    together = model(photos())
    for number, image in enumerate(photos()):
        alone = model([image])
        same(corner(together, number, alone), alone, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_method_the_vit_runs_as_it_is(kind: str) -> None:
    """The pyramid's tokens are the ViT's own; maps have the strides they claim."""
    model, batch = backbone(kind), images(2)
    maps = model(batch)
    reductions = model.feature_info.reduction()
    assert reductions == [2, 4, 8, 16]
    assert model.feature_info.channels() == [model.out_channels] * 4
    for values, step in zip(maps.values(), reductions, strict=True):
        assert values.shape == (2, model.out_channels, 48 // step, 48 // step)
    if kind == "pyramid":
        x = model.features(batch).state.restore()
        native = model.body.vit.forward_intermediates(
            batch, intermediates_only=True, output_fmt="NLC"
        )[-1]
        close(x, native)


@torch.no_grad()
def test_all_forms_of_a_batch_are_one() -> None:
    model = backbone("pyramid", "svit(keep=0.7)")
    batch = photos()
    padded = torch.zeros(3, 3, 48, 64)
    for number, image in enumerate(batch):
        padded[number, :, : image.shape[1], : image.shape[2]] = image
    same(model(ImageList(padded, list(SIZES))), model(batch), 1e-6)
    same(model(torch.stack([batch[0]] * 2)), model([batch[0]] * 2), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gone_zero_removes_and_last_preserves(kind: str) -> None:
    preserved = backbone(kind, "random(keep=0.5)")
    removed = backbone(kind, "random(keep=0.5)", gone="zero")
    batch = images(1)
    torch.manual_seed(0)
    last = preserved.features(batch).state
    torch.manual_seed(0)
    zero = removed.features(batch).state
    gone = last.source < 0
    assert gone.any()
    assert last.restore("last")[gone].abs().amax(-1).min() > 0
    assert not zero.restore(removed.gone)[zero.source < 0].any()


@torch.no_grad()
def test_a_trace_sees_the_pass_of_the_dense_model() -> None:
    model, batch = backbone("adapter", "svit(keep=0.7)"), images(1)
    trace = model.trace(batch)
    state = model.features(batch).state
    assert len(trace.blocks) == 4
    close(trace.final.x, state.x)
    plain = model.body.trace(batch)
    assert (trace.blocks[0].mlp.x - plain.blocks[0].mlp.x).abs().max() > 1e-2  # injectors act


def test_gradients_reach_the_gates_by_the_papers_path_alone() -> None:
    """Through m * block(x) + (1 - m) * x: where block(x) equals x a gate learns nothing."""
    model = backbone("adapter", "svit(keep=0.7)").train()
    torch.manual_seed(0)
    sum(v.square().mean() for v in model(photos()).values()).backward()
    for gate in model.reducer.gates:
        assert gate[-1].weight.grad.abs().max() > 0
    model.zero_grad()
    for block in model.body.vit.blocks:  # now no block changes its tokens
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
    torch.manual_seed(0)
    sum(v.square().mean() for v in model(photos()).values()).backward()
    for gate in model.reducer.gates:
        assert gate[-1].weight.grad.abs().max() < 1e-7


@pytest.mark.parametrize("method", METHODS)
def test_trains_with_every_method(method: str) -> None:
    model = backbone("adapter", method).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps, outcome = model.run(photos())
        losses = model.method_losses(outcome)
    assert ("loss_ratio" in losses) == model.reducer.gated
    total = sum(v.float().square().mean() for v in maps.values()) + sum(losses.values())
    total.backward()
    for name, p in model.named_parameters():
        if "head" not in name and name != "body.vit.norm.weight" and "body.vit.norm" not in name:
            assert p.grad is None or torch.isfinite(p.grad).all(), name
    assert model.body.vit.patch_embed.proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_padding_counts_in_no_ratio() -> None:
    """Small images in a large batch keep the share that they keep alone."""
    model = backbone("pyramid", "svit(keep=0.7, gate='argmax')")
    model.reduced.mode = "masked"
    key = "svit.kept_share"
    together = model.features(photos()).state.notes[key]
    for number, image in enumerate(photos()):
        alone = model.features([image]).state.notes[key]
        for stage, share in alone.items():
            close(together[stage][number : number + 1], share, 1e-6)


@torch.no_grad()
def test_prefix_none_leaves_the_class_token_out() -> None:
    model = backbone("adapter", "evit(keep=0.7)", prefix="none")
    state = model.features(images(2)).state
    assert state.prefix == 0
    with pytest.raises(ValueError, match="prefix must be 'keep' or 'none'|prefix"):
        backbone("adapter", prefix="drop")


@torch.no_grad()
def test_restore_copies_nothing_while_nothing_was_dropped() -> None:
    model = backbone("pyramid", "svit(keep=0.7)")
    for batch in (images(1), images(3)):
        state = model.features(batch).state
        grid = state.restore()
        assert grid.untyped_storage().data_ptr() == state.x.untyped_storage().data_ptr()
        change = noise(*grid.shape)
        close(state.add(change).restore(), grid + change)


def test_two_windows_and_a_method() -> None:
    with pytest.raises(ValueError, match="reduced by svit cannot run in windows"):
        windowed(reduced("svit"))
    dense = pyramid(windowed(vit(), size=4, every=2), channels=8)
    with pytest.raises(ValueError, match="in windows cannot be reduced"):
        foveate.apply(dense, "svit")


@torch.no_grad()
def test_windows_alone_and_in_a_batch() -> None:
    body = windowed(randomise(vit()).eval(), size=4, every=2)
    model: DenseBackbone = randomise(pyramid(body, channels=8), seed=2).eval()
    together = model(photos())
    for number, image in enumerate(photos()):
        alone = model([image])
        same(corner(together, number, alone), alone)


def test_applying_shares_weights_and_leaves_the_model_as_it_is() -> None:
    dense = backbone("adapter")
    sparse = foveate.apply(dense, "svit", keep=0.5, check=False)
    assert type(sparse) is type(dense) and sparse.reducer.name == "svit"
    assert sparse.prior is dense.prior and sparse.body.vit is dense.body.vit
    assert dense.reducer.name == "dense" and foveate.unwrap(sparse).reducer.name == "dense"
    missing = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert all("reducer" in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    groups = sparse.parameter_groups()
    assert sum(len(group) for group in groups.values()) == len(list(sparse.parameters()))
    assert {"level_embed", "body.vit.pos_embed"} <= sparse.no_weight_decay()


def test_other_patches_and_scales() -> None:
    model = pyramid(vit(patch_size=4, img_size=24), channels=8, scales=(1, 0.5, 0.25))
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 20, 24))
    assert model.size_divisible == 16 and model.feature_info.reduction() == [4, 8, 16]
    assert [tuple(v.shape[2:]) for v in maps.values()] == [(8, 8), (4, 4), (2, 2)]
    odd = adapter(vit(patch_size=14, img_size=28), stem=8).eval()
    with torch.no_grad():
        assert [tuple(v.shape[2:]) for v in odd(torch.zeros(1, 3, 28, 56)).values()] == [
            (8, 16),
            (4, 8),
            (2, 4),
            (1, 2),
        ]
    oblong = pyramid(vit(patch_size=(8, 12), img_size=48), channels=8, scales=(1, 0.5)).eval()
    side = oblong.size_divisible  # a multiple of 16 and of 24
    with torch.no_grad():
        canvas = oblong.features(torch.zeros(1, 3, side, side)).canvas
    assert side == 48 and canvas.images.shape == (1, 3, 48, 48)
    for wrong in ((3,), (1, 2), ()):
        with pytest.raises(ValueError, match="scales must"):
            pyramid(vit(), scales=wrong)


def test_wrong_input_is_named() -> None:
    model = backbone("pyramid")
    with pytest.raises(ValueError, match="batch is empty"):
        model([])
    with pytest.raises(ValueError, match=r"images must be \[B, channels, H, W\]"):
        model(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="gone must be"):
        pyramid(vit(), gone="never")
    with pytest.raises(ValueError, match="interactions must lie in 1..4"):
        adapter(vit(), interactions=5)
    with pytest.raises(ValueError, match="norm"):
        adapter(vit(), norm="group")


@pytest.mark.parametrize("norm", ["layer", "batch", "frozen"])
def test_norms_train_one_image(norm: str) -> None:
    model = adapter(vit(), stem=8, norm=norm)
    sum(v.mean() for v in model(images(1)).values()).backward()
    assert model.prior.stem[0].conv.weight.grad is not None
