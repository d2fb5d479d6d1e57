"""Chains: several methods, each in its own blocks, and the combinations that cannot work."""

from __future__ import annotations

import pytest
import torch
from small import built, images, logits, randomise, vit

import foveate
from foveate.core import Chain, ReducedViT
from foveate.methods import EViT, ToMe


def chained(method: str, **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


def test_parts_act_each_in_its_own_blocks() -> None:
    both = chained("evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[2, 3])").trace(images())
    assert both.counts() == [(37,) * 3, (20,) * 3, (16,) * 3, (12,) * 3]
    other = chained("tome(r=4, blocks=[1, 3]) + evit(keep=0.5, blocks=[2])").trace(images())
    assert other.counts() == [(37,) * 3, (33,) * 3, (18,) * 3, (14,) * 3]


def test_a_fused_token_weighs_nothing_before_the_first_merge_too() -> None:
    """Sizes agree with the source map whichever method comes first."""
    chain = chained("evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[2, 3])", global_pool="avg")
    for block in chain.trace(images()).blocks[2:]:
        state = block.mlp
        assert torch.equal(
            state.layout.rect(state.size)[:, 1:], state.layout.rect(state.patch_counts())[:, 1:]
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evit + evit", "each method once, got 'evit' twice"),
        ("svit + evit", "svit and evit both act in block 1: give each its own blocks"),
        ("evit + tome(r=2, blocks=[2])", "evit and tome both act in block 2"),
        ("evovit(starts=[1]) + tome(r=2, blocks=[0])", "both act in block 0"),
        ("evit(blocks=[1], recall_before=3) + svit(blocks=[3])", "svit has tokens parked"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chained(text)


def test_a_chain_needs_two() -> None:
    with pytest.raises(ValueError, match="at least two methods, got 1"):
        Chain(EViT())


def test_facts_follow_from_the_parts() -> None:
    chain = built("dynamicvit(keep=0.9, blocks=[1]) + tome(r=2, blocks=[0, 2, 3])", grid=(6, 6))
    assert chain.hooks == ("before", "between") and chain.reads == {"key_direction"}
    assert chain.training_need == "required" and chain.gated and not chain.maskable
    assert chain.drops and not chain.parks and chain.proportional and chain.fixed_count
    assert not built("ats(blocks=[1]) + tome(r=2, blocks=[2])", grid=(6, 6)).fixed_count
    assert chain.active_blocks == (0, 1, 2, 3)
    assert repr(chain) == repr(chain.members[0]) + " + " + repr(chain.members[1])


def test_instances_chain_too() -> None:
    model = randomise(vit()).eval()
    chain = Chain(EViT(keep=0.5, blocks=(1,)), ToMe(r=4, blocks=(2, 3)))
    text = "evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[2, 3])"
    by_instance, by_text = foveate.apply(model, chain), foveate.apply(model, text)
    assert torch.equal(logits(by_instance, images()), logits(by_text, images()))
    assert by_instance.reducer is not chain  # a given instance is a template


def test_losses_carry_their_methods_name() -> None:
    model = chained("dynamicvit(keep=0.8, blocks=[1]) + svit(blocks=[3])").train()
    outcome = model.run(images())
    assert set(model.reducer.losses(outcome)) == {"dynamicvit.ratio", "svit.ratio"}


def test_two_auxiliary_heads_are_two_losses() -> None:
    chain = "cropr(r=4, blocks=[0], recall_before=None) + evovit(aux=True, starts=[3])"
    model = chained(chain).train()
    labels = torch.tensor([1, 4, 7])
    found = model.reducer.losses(model.run(images()), labels)
    assert set(found) == {"cropr.aux", "evovit.aux"}
    assert model.reducer.loss_weights == {"class": 0.5, "cropr.aux": 1.0, "evovit.aux": 0.5}


def test_gates_beside_a_method_without_a_masked_mode_do_not_train_by_default() -> None:
    model = chained("dynamicvit(keep=0.8, blocks=[1]) + tome(r=2, blocks=[2])").train()
    with pytest.raises(ValueError, match="gates train masked"):
        model(images())
    model.mode = "gathered"
    model(images())
