"""Whatever hangs on a block or on its attention runs, although their forward does not."""

from __future__ import annotations

import logging

import pytest
import torch
from small import close, images, logits, randomise, vit
from torch import Tensor, nn

import foveate
from foveate.core import ReducedViT

# Tokens per block of three images: even, masked while training, and packed (all in one).
METHODS = ("evit(keep=0.5)", "dynamicvit(keep=0.5)", "ats(K=12)")
EACH = pytest.mark.parametrize("method", METHODS)
MODULE = pytest.mark.parametrize("part", ["block", "attention"])
BLOCK = 2


def made(method: str, **options: object) -> ReducedViT:
    model = foveate.apply(randomise(vit(**options)), method, check=False)
    randomise(model.reducer, seed=1)
    return model.train(method.startswith("dynamicvit"))  # there, gates train masked


def answer(model: ReducedViT) -> Tensor:
    torch.manual_seed(0)  # gates draw in training
    return model(images())


def hooked(model: ReducedViT, part: str) -> nn.Module:
    block = model.vit.blocks[BLOCK]
    return block if part == "block" else block.attn


def shapes(model: ReducedViT, part: str) -> tuple[list[int], list[int]]:
    """Of the tokens that enter and leave a module, as hooks see them."""
    torch.manual_seed(0)
    state, seen = model.begin(images()), {}
    for block in range(BLOCK + 1):
        state = model.step(block, state, seen.__setitem__)
    found = []
    for name in ("attention", "mlp" if part == "block" else "attention"):
        now = seen[name]
        found.append([3, now.layout.count, 48] if now.layout.is_even else [1, len(now.x), 48])
    return found[0], found[1]


@EACH
@MODULE
def test_hooks_see_the_tokens_once_a_pass(method: str, part: str) -> None:
    model = made(method)
    plain, module = answer(model), hooked(model, part)
    into, out = shapes(model, part)
    assert (len(into) == 3 and into[0] == 1) == method.startswith("ats")
    seen: list[tuple[str, list[int]]] = []

    def before(owner: nn.Module, given: tuple) -> None:
        assert owner.__dict__ is module.__dict__
        seen.append(("before", list(given[0].shape)))

    def after(owner: nn.Module, given: tuple, output: Tensor) -> None:
        seen.extend([("given", list(given[0].shape)), ("after", list(output.shape))])

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    got = answer(model)
    assert torch.equal(got, plain)
    assert seen == [("before", into), ("given", into), ("after", out)]
    for handle in handles:
        handle.remove()
    answer(model)
    assert len(seen) == 3


@EACH
@MODULE
def test_a_hook_may_change_what_enters(method: str, part: str) -> None:
    """Scaled tokens in a pre-hook are scaled tokens: told by a hook that runs after it."""
    model = made(method)
    plain, module, seen = answer(model), hooked(model, part), []
    module.register_forward_pre_hook(lambda _, given: (given[0] * 3,))
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    got = answer(model)
    assert not torch.allclose(got, plain, atol=1e-3)
    (tripled,) = seen
    module._forward_pre_hooks.clear()
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    answer(model)
    close(tripled, 3 * seen[1])


@EACH
@MODULE
def test_a_hook_may_change_what_leaves(method: str, part: str) -> None:
    """A block whose output is replaced by its input does nothing; attention without output adds
    nothing. The model inside, changed to do so itself, gives the same."""
    model = made(method)
    plain, module = answer(model), hooked(model, part)
    if part == "attention":
        handle = module.register_forward_hook(lambda _, given, output: output * 0)
    else:
        grown = []

        def double(_: nn.Module, given: tuple, output: Tensor) -> Tensor:
            grown.append(output)
            return output * 2

        handle = module.register_forward_hook(double)
    got = answer(model)
    handle.remove()
    assert torch.equal(answer(model), plain)
    assert not torch.allclose(got, plain, atol=1e-3)
    if part == "attention":
        with torch.no_grad():  # a projection of zeros
            for p in module.proj.parameters():
                p.zero_()
        close(got, answer(model))
        return
    torch.manual_seed(0)  # by hand, between two steps
    state = model.begin(images())
    for block in range(4):
        state = model.step(block, state)
        if block == BLOCK:
            close(state.x, grown[0].reshape(state.x.shape))
            state = state.with_tokens(state.x * 2)
    close(got, model.backbone.head(model.end(state)))


def test_hooks_on_the_attention_of_another_family_see_what_its_module_returns() -> None:
    """Those of transformers return tuples."""
    pytest.importorskip("transformers")
    from contract.table import HF_FORMS

    model = foveate.apply(randomise(HF_FORMS["hf_vit"]()).eval(), "evit(keep=0.5)", check=False)
    plain, seen = logits(model, images()), []
    attention = model.backbone.attention_of(3)
    assert attention is not model.backbone.blocks[3]

    def after(_: nn.Module, given: tuple, output: object) -> object:
        seen.append(type(output))
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handle = attention.register_forward_hook(after)
    got = logits(model, images())
    assert not torch.allclose(got, plain, atol=1e-4)
    handle.remove()
    assert seen == [type(attention(torch.zeros(1, 5, 48)))]  # as the module's own forward
    assert torch.equal(logits(model, images()), plain)


@EACH
@MODULE
def test_backward_hooks_see_the_gradients_of_tokens(method: str, part: str) -> None:
    model = made(method)
    module = hooked(model, part)
    into, out = shapes(model, part)
    answer(model).square().sum().backward()
    plain = module.norm1.weight.grad.clone() if part == "block" else module.qkv.weight.grad.clone()
    model.zero_grad()
    seen: list[tuple[str, list[int]]] = []

    def full(_: nn.Module, grad_in: tuple, grad_out: tuple) -> None:
        seen.append(("full", [list(grad_in[0].shape), list(grad_out[0].shape)]))
        assert (grad_in[0] != 0).any() and (grad_out[0] != 0).any()

    def early(_: nn.Module, grad_out: tuple) -> None:
        seen.append(("early", [list(grad_out[0].shape)]))

    module.register_full_backward_hook(full)
    module.register_full_backward_pre_hook(early)
    answer(model).square().sum().backward()
    assert seen == [("early", [out]), ("full", [into, out])]
    grad = module.norm1.weight.grad if part == "block" else module.qkv.weight.grad
    close(grad, plain)


@EACH
@pytest.mark.parametrize("name", ["mlp", "mlp.fc1", "attn.qkv", "norm2"])
def test_hooks_on_modules_within_a_block(method: str, name: str) -> None:
    """Those are called as ever."""
    model = made(method)
    plain, seen = answer(model), []
    module = model.vit.blocks[BLOCK].get_submodule(name)

    def after(owner: nn.Module, _: tuple, output: Tensor) -> Tensor:
        assert owner is module
        seen.append(output.shape)
        return output * 0

    handle = module.register_forward_hook(after)
    got = answer(model)
    assert len(seen) == 1 and not torch.allclose(got, plain, atol=1e-4)
    handle.remove()
    assert torch.equal(answer(model), plain)


def test_hooks_run_in_order_and_can_be_registered_for_all_modules() -> None:
    model, seen = made("evit(keep=0.5)"), []
    with torch.no_grad():
        plain = model(images())
        for number in (1, 2):
            model.vit.blocks[0].register_forward_hook(lambda *_, n=number: seen.append(n))
        handle = nn.modules.module.register_module_forward_hook(
            lambda owner, *_: seen.append("every") if hasattr(owner, "ls1") else None
        )
        try:
            got = model(images())
        finally:
            handle.remove()
    assert torch.equal(got, plain)
    assert seen == ["every", 1, 2, "every", "every", "every"]


@MODULE
def test_hooks_that_take_keywords_see_none(part: str) -> None:
    """As with timm's own blocks, whose only argument is the tokens."""
    model = made("evit(keep=0.5)")
    plain, module, seen = answer(model), hooked(model, part), []

    def before(_: nn.Module, given: tuple, keywords: dict) -> tuple[tuple, dict]:
        seen.append(keywords)
        return given, {}

    def after(_: nn.Module, given: tuple, keywords: dict, output: Tensor) -> None:
        seen.append(keywords)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)
    assert torch.equal(answer(model), plain)
    assert seen == [{}, {}]


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]])
def test_what_hooks_change_is_differentiated(method: str) -> None:
    model = made(method)
    shift = torch.zeros(48, requires_grad=True)
    model.vit.blocks[1].register_forward_hook(lambda _, given, output: output + shift)
    answer(model).square().sum().backward()
    assert (shift.grad != 0).all()


def test_a_block_compiled_by_itself_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = made("evit(keep=0.5)")
    plain = answer(model)
    model.vit.blocks[1].compile()
    with caplog.at_level(logging.WARNING, logger="foveate"):
        for _ in range(2):
            assert torch.equal(answer(model), plain)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("a Block was compiled on its own, which has no effect")
    assert text.endswith("compile the whole reduced model instead") and "\n" not in text


def test_checkpointing_keeps_hooks() -> None:
    def grad(checkpointing: bool, factor: float) -> Tensor:
        model = made("evit(keep=0.5)")
        model.vit.set_grad_checkpointing(checkpointing)
        model.vit.blocks[1].register_forward_hook(lambda _, given, output: output * factor)
        answer(model).square().sum().backward()
        return model.vit.blocks[0].norm1.weight.grad

    doubled = grad(False, 2.0)
    close(grad(True, 2.0), doubled)
    assert not torch.allclose(grad(True, 1.0), doubled, rtol=1e-2)
