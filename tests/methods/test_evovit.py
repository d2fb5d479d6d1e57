"""Evo-ViT: running scores, the representative, and the order afterwards."""

from __future__ import annotations

import pytest
import torch
from small import after_attention, images, keep_masks, randomise, vit
from torch import Tensor

import foveate
from foveate.core import BlockTrace, ReducedViT, TokenState
from foveate.methods.evovit import EvoViT

SCORE = "evovit.score"


def evovit(method: str = "evovit(keep=0.5)", **options: object) -> ReducedViT:
    return foveate.apply(randomise(vit(**options)).eval(), method).eval()


def score(state: TokenState) -> Tensor:
    """Running scores of the 36 patches, wherever their tokens stand, ``[B, 36]``."""
    rect = state.layout.rect(state.extras[SCORE])
    return rect.gather(1, state.source)


def waiting(block: BlockTrace) -> Tensor:
    """Patches that a block does not process."""
    return ~block.active()


def test_scores_follow_processed_tokens_only() -> None:
    """Depth 4: stages start at blocks 1 and 2; the first score is block 0's attention."""
    model = evovit("evovit(keep=0.5, tradeoff=0.3)")
    blocks = model.trace(images()).blocks
    vit_model = model.vit
    for index in range(4):
        with torch.no_grad():
            _, weights = after_attention(vit_model, index, blocks[index].attention.tokens())
        new = weights.mean(1)[:, 0]
        if index == 0:
            torch.testing.assert_close(score(blocks[0].output), new[:, 1:])
            continue
        old, now = (
            score(blocks[index - 1].output.recalled()),
            score(blocks[index].output.recalled()),
        )
        still = waiting(blocks[index])
        assert still.sum(1).tolist() == [18] * 3
        assert torch.equal(now[still], old[still])
        attended = blocks[index].attention
        fresh = new.gather(1, attended.source.clamp_min(0))
        expected = 0.7 * old + 0.3 * fresh
        torch.testing.assert_close(now[~still], expected[~still])


def test_a_stage_processes_the_best_and_restores_the_order() -> None:
    model = evovit()
    blocks = model.trace(images()).blocks
    for start, end in ((1, 1), (2, 3)):
        best = score(blocks[start - 1].output).topk(18).indices
        active = torch.zeros(3, 36, dtype=torch.bool).scatter(1, best, True)
        for index in range(start, end + 1):
            assert torch.equal(blocks[index].active(), active)
            assert blocks[index].mlp.layout.lengths == (1 + 18 + 1,) * 3
        left = blocks[end].output
        assert left.parked is None and left.layout.lengths == (37,) * 3
        assert torch.equal(left.source, torch.arange(1, 37).expand(3, -1))


@pytest.mark.parametrize("masked", [False, True])
def test_waiting_patches_follow_their_representative(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = evovit()
    mask = keep_masks(3, (6, 6)) if masked else None
    ends: dict[int, TokenState] = {}
    original = EvoViT.after

    def spy(self: EvoViT, block: int, state: TokenState) -> TokenState:
        ends[block] = state
        return original(self, block, state)

    monkeypatch.setattr(EvoViT, "after", spy)
    blocks = model.trace(images(), keep_mask=mask).blocks
    for start, end in ((1, 1), (2, 3)):
        before, inner, left = blocks[start - 1].output, blocks[start].attention, blocks[end].output
        there = before.source >= 0
        idle = waiting(blocks[start]) & there
        weight = torch.where(
            idle,
            before.layout.rect(before.extras[SCORE]).gather(1, before.source.clamp_min(0)),
            0.0,
        )
        patches = before.restore()
        for b in range(3):
            mean = (weight[b] / weight[b].sum()) @ patches[b]
            representative = inner.tokens()[b, inner.layout.lengths[b] - 1]
            torch.testing.assert_close(representative, mean, atol=1e-5, rtol=1e-5)
            processed = ends[end].tokens()[b, ends[end].layout.lengths[b] - 1]
            change = processed - representative
            assert change.abs().max() > 0.1
            moved = left.restore()[b, idle[b]] - patches[b, idle[b]]
            torch.testing.assert_close(moved, change.expand_as(moved), atol=1e-4, rtol=1e-4)


def test_the_released_deit_variant_leaves_them_as_they_are() -> None:
    blocks = evovit("evovit(keep=0.5, variant='deit')").trace(images()).blocks
    for start, end in ((1, 1), (2, 3)):
        idle = waiting(blocks[start])
        assert blocks[start].mlp.layout.lengths == (1 + 18,) * 3
        before, after = blocks[start - 1].output.restore(), blocks[end].output.restore()
        assert torch.equal(after[idle], before[idle])
        assert (after[~idle] != before[~idle]).any(-1).all()


def test_layerwise_selects_anew_in_every_block() -> None:
    blocks = evovit("evovit(keep=0.5, layerwise=True, starts=[1])").trace(images()).blocks
    stages = [block.active() for block in blocks[1:]]
    assert all(block.output.parked is None for block in blocks)
    assert all(stage.sum(1).tolist() == [18] * 3 for stage in stages)
    together = evovit("evovit(keep=0.5, starts=[1])").trace(images()).blocks
    assert all(torch.equal(block.active(), stages[0]) for block in together[1:])


def test_nothing_waits_at_keep_1() -> None:
    model = evovit("evovit(keep=1.0)")
    trace = model.trace(images())
    assert trace.counts() == [(37,) * 3] * 4
    assert "evovit.representative" not in trace.notes


def test_an_image_of_one_patch_has_no_representative() -> None:
    mask = keep_masks(3, (6, 6))
    mask[1] = False
    mask[1, 3, 3] = True
    trace = evovit().trace(images(), keep_mask=mask)
    for block in trace.blocks:
        assert block.mlp.layout.lengths[1] == 2
    assert torch.isfinite(trace.logits).all()


def test_the_auxiliary_head_has_a_loss_of_its_own() -> None:
    model = evovit("evovit(keep=0.5, aux=True)", global_pool="avg")
    outcome, labels = model.run(images()), torch.tensor([1, 4, 7])
    (loss,) = (losses := model.reducer.losses(outcome, labels)).values()
    assert list(losses) == ["aux"] and model.reducer.losses(outcome) == {}
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(outcome.notes["evovit.aux_logits"], labels)
    )
    assert model.reducer.loss_weights == {"class": 0.5, "aux": 0.5}
    assert evovit("evovit(keep=0.5)").reducer.loss_weights == {}
    assert len(model.parameter_groups()["new"]) == 4
    for options in ({"class_token": False, "global_pool": "avg"}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="needs a class token and a classification head"):
            evovit("evovit(aux=True)", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("starts=[0, 2]", "after block 0"),
        ("starts=[2, 1]", "ascend"),
        ("starts=[4]", "0..3"),
        ("tradeoff=0.0", r"tradeoff must lie in \(0, 1\]"),
        ("tradeoff=1.5", "got 1.5"),
        ("variant='levit'", "'paper', 'deit'; got 'levit'"),
        ("keep=0.0", "keep"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evovit(f"evovit({options})")
