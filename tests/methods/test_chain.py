"""Chains: two methods at every hook, and the combinations that cannot work."""

from __future__ import annotations

import pytest
import torch
from small import after_attention, built, images, logits, randomise, vit

import foveate
from foveate.core import Chain, ReducedViT
from foveate.methods import EViT, ToMe


def chained(method: str, **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method)
    randomise(model.reducer, seed=1)
    return model.eval()


def test_parts_act_in_order_in_one_block() -> None:
    both = chained("evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[1, 3])").trace(images())
    assert both.counts() == [(37,) * 3, (16,) * 3, (16,) * 3, (12,) * 3]
    other = chained("tome(r=4, blocks=[1, 3]) + evit(keep=0.5, blocks=[1])").trace(images())
    assert other.counts() == [(37,) * 3, (18,) * 3, (18,) * 3, (14,) * 3]


def test_later_parts_read_what_attention_saw() -> None:
    """The second method's scores are those of the block, carried past the first one's choice."""
    chain = chained("random(keep=0.5, blocks=[1]) + attention(keep=0.25, blocks=[1])")
    block = chain.trace(images()).blocks[1]
    merged = chained("tome(r=6, blocks=[1]) + attention(keep=0.25, blocks=[1])")
    second = merged.trace(images()).blocks[1]
    for model, found in ((chain, block), (merged, second)):
        with torch.no_grad():
            _, weights = after_attention(model.vit, 1, found.attended.tokens())
        row = weights.mean(1)[:, 0]
        assert found.fed.counts == (9,) * 3
        assert "seen.cls_row" not in found.fed.extras
        if model is merged:
            continue
        best = row[:, 1:].topk(9).indices + 1
        kept = found.fed.tokens()[:, 1:]
        with torch.no_grad():
            x, _ = after_attention(model.vit, 1, found.attended.tokens())
        expected = x.gather(1, best[..., None].expand(-1, -1, 48))
        torch.testing.assert_close(kept, expected, atol=2e-5, rtol=1e-5)


def test_a_fused_token_weighs_nothing_before_the_first_merge_too() -> None:
    """Sizes agree with the source map whichever method comes first."""
    chain = chained("evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[2, 3])", global_pool="avg")
    for block in chain.trace(images()).blocks[2:]:
        state = block.fed
        assert torch.equal(
            state.layout.rect(state.size)[:, 1:], state.layout.rect(state.sizes())[:, 1:]
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evit + evit", "each method once, got 'evit' twice"),
        ("svit + evit", "svit has tokens parked in blocks .* evit would change"),
        ("evit + svit", "svit has tokens parked"),
        ("evovit + tome", "evovit has tokens parked"),
        ("svit + evovit", "parked"),
        ("evit + tokenmergence(similarity='attention')", "only the first method of a chain"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chained(text)


def test_a_chain_needs_two() -> None:
    with pytest.raises(ValueError, match="at least two methods, got 1"):
        Chain(EViT())


def test_facts_follow_from_the_parts() -> None:
    chain = built("dynamicvit(keep=0.9, blocks=[1]) + tome(r=2)", grid=(6, 6))
    assert chain.hooks == ("before", "between") and chain.needs == {"key_mean"}
    assert chain.training_need == "required" and chain.gated and not chain.maskable
    assert chain.drops and not chain.parks and chain.proportional and chain.fixed_count
    assert not built("ats + tome(r=2)", grid=(6, 6)).fixed_count
    assert chain.acts == (0, 1, 2, 3)
    assert repr(chain) == repr(chain.members[0]) + " + " + repr(chain.members[1])


def test_instances_chain_too() -> None:
    model = randomise(vit()).eval()
    chain = Chain(EViT(keep=0.5, blocks=(1,)), ToMe(r=4, blocks=(1, 3)))
    text = "evit(keep=0.5, blocks=[1]) + tome(r=4, blocks=[1, 3])"
    by_instance, by_text = foveate.apply(model, chain), foveate.apply(model, text)
    assert torch.equal(logits(by_instance, images()), logits(by_text, images()))
    assert by_instance.reducer is not chain  # a given instance is a template


def test_losses_carry_their_methods_name() -> None:
    model = chained("dynamicvit(keep=0.8, blocks=[1]) + svit(blocks=[3])").train()
    outcome = model.run(images())
    assert set(model.reducer.losses(outcome.notes)) == {"dynamicvit.ratio", "svit.ratio"}


def test_gates_beside_a_method_without_a_masked_mode_do_not_train_by_default() -> None:
    model = chained("dynamicvit(keep=0.8, blocks=[1]) + tome(r=2)").train()
    with pytest.raises(ValueError, match="gates train masked"):
        model(images())
    model.mode = "gathered"
    model(images())
