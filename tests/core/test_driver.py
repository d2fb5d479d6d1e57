"""ReducedViT: its switches, what it records, and features on the grid."""

from __future__ import annotations

import pytest
import torch
from small import images, keep_masks, logits, randomise, vit

import foveate
from foveate.core import ReducedViT


def made(method: str = "evit(keep=0.5)", **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


# Switches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "mode", "message"),
    [
        ("evit", "fast", "'auto', 'masked', 'gathered', 'packed'; got 'fast'"),
        ("evit", "masked", "evit has no masked mode"),
        ("ats", "gathered", "ats keeps a different count for every image"),
        ("svit", "gathered", "svit keeps a different count"),
        ("spvit", "gathered", "spvit keeps a different count"),
    ],
)
def test_modes_that_a_method_does_not_have(method: str, mode: str, message: str) -> None:
    model = made(method)
    with pytest.raises(ValueError, match=message):
        model.mode = mode
    assert model.mode == "auto"


def test_auto_chooses() -> None:
    mask = keep_masks(3, (6, 6))
    for method, evaluation, training in (
        ("evit", "gathered", "gathered"),
        ("ats", "packed", "packed"),
        ("dynamicvit", "gathered", "masked"),
        ("svit", "packed", "masked"),
        ("spvit", "packed", "masked"),
    ):
        model = made(method)
        assert model.run(images()).notes["mode"] == evaluation
        assert model.run(images(), keep_mask=mask).notes["mode"] == "packed"
        assert model.train().run(images()).notes["mode"] == training


def test_gate_switch() -> None:
    model = made("dynamicvit")
    assert model.gate is None
    for how in ("argmax", "topk", "sample", None):
        model.gate = how
        assert model.gate == how == model.reducer.gate
        model(images())
    with pytest.raises(ValueError, match="'sample', 'argmax', 'topk'; got 'best'"):
        model.gate = "best"
    with pytest.raises(ValueError, match="evit has no gates"):
        made().gate = "argmax"
    chain = made("dynamicvit(keep=0.9, blocks=[1]) + svit(blocks=[3])")
    chain.gate = "argmax"
    assert [part.gate for part in chain.reducer.members] == ["argmax", "argmax"]


def test_progress() -> None:
    model = made("evit(keep=0.5, blocks=[1], warmup=[0.0, 1.0]) + tome(r=2, blocks=[3])")
    counts = []
    for progress in (0, 0.5, 1):
        model.set_progress(progress)
        counts.append(model.trace(images()).counts()[1][0])
    assert counts == [37, 29, 20]
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]"):
            model.set_progress(wrong)


# Records -----------------------------------------------------------------------------------------


def test_trace_counts_depth_and_activity() -> None:
    trace = made("attention(keep=0.5)").trace(images())
    assert trace.counts() == [(37,) * 3, (19,) * 3, (10,) * 3, (5,) * 3]
    active = torch.stack([block.active() for block in trace.blocks])
    assert active.sum(2)[:, 0].tolist() == [36, 18, 9, 4]
    assert torch.equal(trace.depth(), active.sum(0))
    assert trace.depth()[0].sort().values.tolist() == [1] * 18 + [2] * 9 + [3] * 5 + [4] * 4
    assert torch.equal(trace.logits, logits(made("attention(keep=0.5)"), images()))
    assert "tokens per block" in repr(trace) and len(repr(trace)) < 200


def test_a_trace_leaves_no_graph_and_a_run_does() -> None:
    model = made()
    trace = model.trace(images())
    assert not trace.logits.requires_grad and not trace.final.x.requires_grad
    assert model.run(images()).logits.requires_grad
    assert not model.run(images()).state.tracked and model.run(images(), track=True).state.tracked


def test_parameter_groups() -> None:
    model = made("dynamicvit")
    groups = model.parameter_groups()
    assert {id(p) for p in groups["new"]} == {id(p) for p in model.reducer.parameters()}
    assert {id(p) for p in groups["backbone"]} == {id(p) for p in model.vit.parameters()}
    model.vit.pos_embed.requires_grad_(False)
    model.reducer.predictors[0].requires_grad_(False)
    groups = model.parameter_groups()
    assert all(p.requires_grad for group in groups.values() for p in group)
    assert sum(map(len, groups.values())) < len(list(model.parameters()))


# Features ----------------------------------------------------------------------------------------


def test_final_features_are_normed_tokens() -> None:
    model = made("attention(keep=0.5)")
    state = model.forward_features(images())
    assert state.layout.lengths == (5,) * 3
    with torch.no_grad():
        assert torch.equal(model.vit.head(state.prefix_tokens()[:, 0]), logits(model, images()))
    last, zero = state.restore(), state.restore("zero")
    gone = state.source < 0
    assert gone.sum(1).tolist() == [32] * 3
    assert (zero[gone] == 0).all() and torch.equal(last[~gone], zero[~gone])
    # What is gone has its last value, under the same norm.
    raw = model.trace(images()).blocks[-1].left.restore()
    torch.testing.assert_close(last, model.vit.norm(raw))


def test_dense_features_equal_timms_own() -> None:
    model = made("random(keep=1.0)")
    with torch.no_grad():
        own = model.vit.forward_intermediates(images(), norm=True, intermediates_only=True)
        mine = model.forward_intermediates(images(), norm=True)
        flat = model.forward_intermediates(images(), norm=True, output_fmt="NLC")
    for a, b, c in zip(mine, own, flat, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        assert torch.equal(a.flatten(2).transpose(1, 2), c)


def test_which_intermediates() -> None:
    model = made("attention(keep=0.5)")
    every = model.forward_intermediates(images())
    assert len(every) == 4 and every[0].shape == (3, 48, 6, 6)
    for indices, blocks in ((2, [2, 3]), ([0, 2], [0, 2]), ([3, 1], [3, 1]), ([-1, -4], [3, 0])):
        some = model.forward_intermediates(images(), indices)
        assert all(torch.equal(a, every[b]) for a, b in zip(some, blocks, strict=True))
    zero = model.forward_intermediates(images(), [3], gone="zero")[0]
    assert ((zero == 0).all(1).sum((1, 2)) == 32).all()
    mask = keep_masks(3, (6, 6))
    masked = model.forward_intermediates(images(), [0], keep_mask=mask, gone="zero")[0]
    assert torch.equal((masked != 0).any(1), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 0}, "1..4 blocks, got 0"),
        ({"indices": 5}, "1..4 blocks, got 5"),
        ({"indices": -1}, "1..4 blocks, got -1"),
        ({"indices": [4]}, "-4..3, got 4"),
        ({"indices": [0, -5]}, "-4..3, got -5"),
        ({"indices": []}, "at least one block"),
        ({"output_fmt": "NHWC"}, "'NCHW', 'NLC'; got 'NHWC'"),
        ({"gone": "mean"}, "'last' or 'zero'"),
    ],
)
def test_refused_intermediates(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made().forward_intermediates(images(), **options)


def test_untokened_pooling_needs_equal_counts() -> None:
    """A model that returns its tokens cannot return ragged ones."""
    model = made("evit(keep=0.5)", global_pool="", num_classes=0)
    assert logits(model, images()).shape == (3, 8, 48)
    with pytest.raises(ValueError, match="kept different counts: use forward_features"):
        model(images(), keep_mask=keep_masks(3, (6, 6)))
    model = made("evit(keep=0.5, preserve=True)", global_pool="", num_classes=0)
    assert logits(model, images(), keep_mask=keep_masks(3, (6, 6))).shape == (3, 37, 48)


# What is changed after apply ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["evit(keep=0.5)", "spvit", "tome(r=4)", "evovit", "static"])
def test_a_model_given_another_head_and_pooling_later(method: str) -> None:
    """As for fine-tuning: no fused, package or representative token enters the mean."""
    early = made(method)
    early.vit.reset_classifier(5, "avg")
    randomise(early.vit.head)
    late = foveate.apply(early.vit, method)
    late.reducer.load_state_dict(early.reducer.state_dict())
    assert torch.equal(logits(early, images()), logits(late.eval(), images()))


def test_a_block_replaced_later() -> None:
    model = made("random(keep=1.0)")
    model.vit.blocks[2] = randomise(type(model.vit.blocks[2])(48, 3), seed=7).eval()
    torch.testing.assert_close(
        logits(model, images()), model.vit(images()).detach(), atol=1e-4, rtol=1e-4
    )


def test_a_model_resized_later() -> None:
    model = made("evit(keep=0.5)")
    model.vit.set_input_size(img_size=64)
    again = foveate.apply(model.vit, "evit(keep=0.5)").eval()
    x = images(2, (64, 64))
    assert torch.equal(logits(model, x), logits(again, x))
