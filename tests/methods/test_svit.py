"""SViT: gates that close altogether, reactivation, the mix that trains the gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import images, keep_masks, logits, randomise, vit
from torch import Tensor

import foveate
from foveate.core import ReducedViT
from foveate.core import gated as module


def svit(method: str = "svit(keep=0.7)", **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


@pytest.fixture
def close_gates(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Make the gates of some images drop every token, whatever they see."""
    decide = module.decide

    def closing(closed: list[int]) -> None:
        def closed_decide(*args: object, **options: object) -> Tensor:
            keep = decide(*args, **options)
            factor = torch.ones(len(keep), 1)
            factor[closed] = 0
            return keep * factor

        monkeypatch.setattr(module, "decide", closed_decide)

    return closing


FORMS = pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["prefix 1", "prefix 0"]
)


@FORMS
@pytest.mark.parametrize("closed", [[1], [0, 1, 2], [2]], ids=str)
def test_an_image_without_active_patches_skips_the_block(
    options: dict, closed: list[int], close_gates: Callable[[list[int]], None]
) -> None:
    model = svit(**options)
    open_trace = model.trace(images())
    close_gates(closed)
    trace = model.trace(images())
    front = model.backbone.spec.prefix
    for before, block in zip(trace.blocks, trace.blocks[1:], strict=False):
        old, new = before.output.tokens(), block.output.tokens()
        for b in range(3):
            same = (new[b, front:] == old[b, front:]).all(-1)
            if b in closed:
                assert same.all() and block.mlp.layout.lengths[b] == front
            else:
                assert not same.all()
                torch.testing.assert_close(
                    block.output.tokens()[b],
                    open_trace.blocks[trace.blocks.index(block)].output.tokens()[b],
                    atol=1e-5,
                    rtol=1e-5,
                )
    assert torch.isfinite(trace.logits).all()
    model.mode = "masked"
    masked = model.trace(images())
    torch.testing.assert_close(masked.logits, trace.logits, atol=1e-4, rtol=1e-4)
    for one, other in zip(masked.blocks, trace.blocks, strict=True):
        assert torch.equal(one.active(), other.active())
    model.mode = "packed"
    for b in closed:  # alone, where the layout is even
        close_gates([0])
        alone = logits(model, images()[b : b + 1])
        torch.testing.assert_close(alone[0], trace.logits[b], atol=1e-5, rtol=1e-5)


@FORMS
def test_all_gates_closed_still_trains(
    options: dict, close_gates: Callable[[list[int]], None]
) -> None:
    model = svit(**options).train()
    close_gates([0, 1, 2])
    outcome = model.run(images())
    loss = outcome.logits.square().sum() + model.reducer.losses(outcome)["ratio"]
    loss.backward()
    for p in model.reducer.parameters():
        assert torch.isfinite(p.grad).all()


def test_the_classifier_token_may_wait_in_the_last_block() -> None:
    model = svit("svit(keep=0.7, gate_prefix_last=True)")
    model.reducer.gates[-1][-1].bias.data.copy_(torch.tensor([-50.0, 50.0]))
    trace = model.trace(images())
    assert trace.blocks[3].mlp.layout.total == 0  # nobody is left, class token included
    assert torch.equal(trace.blocks[3].output.x, trace.blocks[2].output.x)
    default = svit("svit(keep=0.7)")
    default.reducer.gates[-1][-1].bias.data.copy_(torch.tensor([-50.0, 50.0]))
    assert default.trace(images()).blocks[3].mlp.layout.lengths == (1, 1, 1)


@pytest.mark.parametrize("mode", ["packed", "masked"])
def test_skipped_patches_keep_their_value_and_may_return(mode: str) -> None:
    model = svit()
    model.mode = mode
    blocks = model.trace(images()).blocks
    active = [block.active() for block in blocks]
    back = False
    for before, block, now in zip(blocks, blocks[1:], active[1:], strict=False):
        old, new = before.output.restore(), block.output.restore()
        assert torch.equal(new[~now], old[~now])
        assert (new[now] != old[now]).any(-1).all()
    for one, two in zip(active[1:], active[2:], strict=False):
        back = back or bool((two & ~one).any())
    assert back
    stay_out = svit("svit(keep=0.7, reactivate=False)")
    stay_out.mode = mode
    active = [block.active() for block in stay_out.trace(images()).blocks]
    for one, two in zip(active[1:], active[2:], strict=False):
        assert not (two & ~one).any()
    assert active[1].sum() > active[3].sum() > 0


def test_gates_learn_from_the_mix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gate in the last block only, d loss / d m = block(x) - x at every token."""
    model = svit("svit(blocks=[3])", global_pool="avg", fc_norm=False).train()
    kept: list[Tensor] = []
    decide = module.decide

    def spy(*args: object, **options: object) -> Tensor:
        keep = decide(*args, **options)
        if keep.requires_grad:
            keep.retain_grad()
            kept.append(keep)
        return keep

    monkeypatch.setattr(module, "decide", spy)
    torch.manual_seed(0)
    outcome = model.run(images())
    torch.manual_seed(0)
    blocks = model.trace(images()).blocks
    direction = outcome.logits.detach()
    (outcome.logits * direction).sum().backward()
    keep = kept[0]
    with torch.no_grad():
        before = blocks[2].output.tokens()
        visible = torch.cat([torch.ones(3, 1), keep.detach()], 1).bool()
        done = model.vit.blocks[3](before, attn_mask=visible[:, None, None, :])
        norm, head = model.vit.norm, model.vit.head
    gate = keep.detach().clone().requires_grad_()
    mixed = gate[..., None] * done[:, 1:] + (1 - gate[..., None]) * before[:, 1:]
    (head(norm(mixed).mean(1)) * direction).sum().backward()
    torch.testing.assert_close(keep.grad, gate.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", ["dynamic", "fixed"])
def test_the_ratio_loss(ratio: str) -> None:
    model = svit(f"svit(keep=[0.7, 0.4, 0.2], ratio='{ratio}')").train()
    torch.manual_seed(0)
    outcome = model.run(images())
    torch.manual_seed(0)
    terms = []
    for block, target in zip(model.trace(images()).blocks[1:], (0.7, 0.4, 0.2), strict=True):
        share = block.active().float().mean(1)
        value = share.mean() if ratio == "dynamic" else share
        terms.append(((value - target) ** 2).mean())
    got = model.reducer.losses(outcome)["ratio"]
    torch.testing.assert_close(got, torch.stack(terms).mean())
    assert model.reducer.loss_weights == {"ratio": 4.0}


def test_targets_fall_by_thirds() -> None:
    model = foveate.apply(vit(depth=12, embed_dim=12), "svit", check=False)
    targets = [model.reducer.target(stage) for stage in range(9)]
    assert targets == pytest.approx([0.7] * 3 + [0.49] * 3 + [0.343] * 3)


def test_top_k_gates_take_exactly_their_share() -> None:
    model = svit("svit(keep=[0.7, 0.4, 0.2], gate='topk')")
    assert model.trace(images()).counts()[1:] == [(1 + n,) * 3 for n in (25, 14, 7)]


def test_a_keep_bias_opens_new_gates() -> None:
    torch.manual_seed(0)
    model = foveate.apply(vit(), "svit(keep_bias=40.0)")
    assert model.trace(images()).counts() == [(37,) * 3] * 4


def test_evaluation_does_not_sample_unless_asked() -> None:
    model = svit()
    assert torch.equal(logits(model, images()), logits(model, images()))
    model.gate = "sample"
    assert not torch.equal(logits(model, images()), logits(model, images()))


@pytest.mark.parametrize("form", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        "keep=[0.3, 0.6, 0.2], gate='topk', reactivate=False",
        "keep=0.7, gate='topk', reactivate=False, gate_prefix_last=True",
        "keep=0.7, gate='topk', gate_prefix_last=True",
    ],
)
def test_top_k_is_the_same_in_every_mode_and_batch(options: str, form: dict) -> None:
    """With real tensors of static size, packed, masked, and each image alone."""
    model, traces = svit(f"svit({options})", **form), {}
    expected = foveate.count(model).tokens
    for mode in ("gathered", "packed", "masked"):
        model.mode = mode
        traces[mode] = trace = model.trace(images())
        torch.testing.assert_close(trace.logits, traces["gathered"].logits, atol=1e-4, rtol=1e-4)
        active = [block.active() for block in trace.blocks]
        for before, block, now in zip(active[1:], active[2:], range(2, 4), strict=False):
            if "reactivate" in options:
                assert not (block & ~before).any(), now
        if mode != "masked":
            assert trace.counts() == [(tokens,) * 3 for tokens in expected]
            alone = logits(model, images()[1:2])
            torch.testing.assert_close(alone[0], trace.logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", ["gate='topk'", "gate='topk', reactivate=False", "gate='argmax'"]
)
def test_shares_are_of_what_a_keep_mask_leaves(options: str) -> None:
    """Counts and ratio loss do not change with the mode, nor with what lies under the mask."""
    model, mask = svit(f"svit(keep=0.7, {options})"), keep_masks(3, (6, 6))
    outcomes = []
    for mode in ("packed", "masked"):
        model.mode = mode
        with torch.no_grad():
            outcomes.append(model.run(images(), keep_mask=mask))
    packed, masked = outcomes
    torch.testing.assert_close(masked.logits, packed.logits, atol=1e-4, rtol=1e-4)
    losses = [model.reducer.losses(outcome)["ratio"] for outcome in outcomes]
    torch.testing.assert_close(losses[0], losses[1])
    if "topk" in options:
        shares = [share for _, share in sorted(packed.notes["svit.kept_share"].items())]
        for target, share in zip((0.7, 0.49, 0.343), shares, strict=True):
            patches = mask.sum((1, 2))
            torch.testing.assert_close(share, (target * patches).round() / patches)
