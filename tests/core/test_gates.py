"""Gates: hard decisions with the gradient of the keep probability."""

from __future__ import annotations

import pytest
import torch
from small import noise

from foveate.core import decide
from foveate.core.gates import DECISIONS


def options(how: str) -> dict:
    return {"how": how, "k": 3} if how == "topk" else {"how": how}


@pytest.mark.parametrize("how", DECISIONS)
@pytest.mark.parametrize("grad", [True, False])
def test_decisions_are_exactly_zero_or_one(how: str, grad: bool) -> None:
    logits = (20 * noise(5, 40, 2)).requires_grad_(grad)
    torch.manual_seed(0)
    keep = decide(logits, **options(how))
    assert keep.shape == (5, 40) and keep.dtype == torch.float32
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.requires_grad == grad


@pytest.mark.parametrize("how", ["argmax", "topk"])
def test_the_gradient_is_that_of_the_keep_probability(how: str) -> None:
    logits = noise(2, 8, 2).requires_grad_()
    direction = noise(2, 8, seed=1)
    (got,) = torch.autograd.grad((decide(logits, **options(how)) * direction).sum(), logits)
    keep = logits.softmax(-1)[..., 0]
    (expected,) = torch.autograd.grad((keep * direction).sum(), logits)
    torch.testing.assert_close(got, expected)
    assert (got != 0).all()  # of dropped tokens too


def test_a_sample_passes_the_gradient_of_the_noisy_probability() -> None:
    logits = noise(2, 8, 2).requires_grad_()
    torch.manual_seed(0)
    drawn = -torch.empty(2, 8, 2).exponential_().log()
    torch.manual_seed(0)
    keep = decide(logits, "sample")
    (got,) = torch.autograd.grad(keep.sum(), logits)
    soft = (logits + drawn).softmax(-1)[..., 0]
    (expected,) = torch.autograd.grad(soft.sum(), logits)
    torch.testing.assert_close(got, expected)
    assert torch.equal(keep.detach(), (soft > 0.5).float())


def test_samples_come_as_often_as_their_probability() -> None:
    probability = torch.tensor([0.02, 0.3, 0.5, 0.9])
    logits = torch.stack([probability.log(), (1 - probability).log()], -1).expand(40000, 4, 2)
    torch.manual_seed(0)
    share = decide(logits, "sample").mean(0)
    assert (share - probability).abs().max() < 0.01
    shifted = decide(logits + 7.0, "sample").mean(0)  # un-normalised logits mean the same
    assert (shifted - probability).abs().max() < 0.01


def test_samples_differ_and_repeat_with_the_seed() -> None:
    logits = torch.zeros(2, 50, 2)
    torch.manual_seed(1)
    first, second = decide(logits, "sample"), decide(logits, "sample")
    torch.manual_seed(1)
    assert torch.equal(decide(logits, "sample"), first) and not torch.equal(first, second)


def test_argmax_keeps_what_is_likelier_and_breaks_ties_towards_keeping() -> None:
    logits = torch.tensor([[[2.0, 1.0], [1.0, 2.0], [0.5, 0.5]]])
    assert decide(logits, "argmax").tolist() == [[1, 0, 1]]


def test_top_k_keeps_exactly_k() -> None:
    logits = noise(3, 10, 2)
    score = logits[..., 0] - logits[..., 1]
    for k, each in ((4, [4] * 3), ([1, 10, 0], [1, 10, 0])):
        keep = decide(logits, "topk", k=k)
        assert keep.sum(1).tolist() == each
        for b, n in enumerate(each):
            best = set(score[b].topk(n).indices.tolist())
            assert set(keep[b].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("how", DECISIONS)
def test_only_candidates_are_kept_or_get_gradient(how: str) -> None:
    logits = noise(4, 20, 2)
    logits[..., 0] += 1.0  # keeping is likely
    logits.requires_grad_()
    candidates = torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) > 0.5
    torch.manual_seed(0)
    keep = decide(logits, **options(how), candidates=candidates)
    assert not (keep.detach().bool() & ~candidates).any() and keep.detach().sum() > 4
    keep.sum().backward()
    assert ((logits.grad != 0).all(-1) == candidates).all()


@pytest.mark.parametrize("how", ["argmax", "sample"])
def test_at_least_one(how: str) -> None:
    logits = noise(3, 6, 2)
    logits[..., 1] += 50.0
    logits[1, 2, 0] += 100.0  # this image keeps one anyway
    torch.manual_seed(0)
    assert decide(logits, how).sum(1).tolist() == [0, 1, 0]
    assert decide(logits, how, at_least_one=True).sum(1).tolist() == [1, 1, 1]
    likeliest = (logits[..., 0] - logits[..., 1]).argmax(1)
    if how == "argmax":
        assert torch.equal(decide(logits, how, at_least_one=True).argmax(1), likeliest)
    candidates = torch.ones(3, 6, dtype=torch.bool)
    candidates[0, likeliest[0]] = False
    candidates[2] = False  # nothing to keep: nothing is kept
    keep = decide(logits, how, candidates=candidates, at_least_one=True)
    assert keep.sum(1).tolist() == [1, 1, 0] and keep[0, likeliest[0]] == 0


@pytest.mark.parametrize("how", DECISIONS)
def test_no_tokens_at_all(how: str) -> None:
    k = {"k": 0} if how == "topk" else {}
    assert decide(torch.zeros(2, 0, 2), how, at_least_one=True, **k).shape == (2, 0)


def test_half_precision_decides_in_full() -> None:
    logits = noise(2, 30, 2).bfloat16()
    assert torch.equal(decide(logits, "argmax"), decide(logits.float(), "argmax"))
    assert decide(logits, "argmax").dtype == torch.float32
