"""What methods are compared with: the oracle, the un-fused model; memory; images; gates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.table import FORMS, METHODS, Row, form, reduced
from small import close, images, logits, said, vit
from torch import Tensor, nn

import foveate
from foveate.bench import Counts, Images, Oracle, natural_images, read_images
from foveate.bench.gates import calibrate
from foveate.bench.images import images_for
from foveate.bench.memory import peak_memory
from foveate.bench.unfused import unfused
from foveate.core import Backbone, ReducedViT

ORACLE_FORMS = ("vit", "siglip", "lvvit", "dinov3", "rope_mixed", "eva_grouped", "hf_dinov2_reg4")
THERE = [name for name in ORACLE_FORMS if name in FORMS]


class Noting:
    """A backbone's parts, with the tokens noted that reach them."""

    def __init__(self, parts: Backbone) -> None:
        self.parts = parts
        self.attention: list[int] = []
        self.mlp: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.parts, name)

    def qkv(self, block: int, x: Tensor, rotary: Tensor | None) -> object:
        assert rotary is None or len(rotary) == len(x)
        self.attention.append(len(x))
        return self.parts.qkv(block, x, rotary)

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        self.mlp.append(len(x))
        return self.parts.feedforward(block, x)


def check_oracle(model: ReducedViT, x: Tensor) -> Oracle:
    trace = model.trace(x)
    oracle = Oracle.of(model, trace, x)
    noting = oracle._backbone = Noting(oracle._backbone)  # type: ignore[assignment]
    with torch.no_grad():
        outcome = oracle.run(x)
        out = outcome.logits
    assert noting.attention == [b.attention.layout.total for b in trace.blocks]
    assert noting.mlp == [b.mlp.layout.total for b in trace.blocks]
    assert outcome.state.layout.lengths == trace.blocks[-1].output.layout.lengths
    assert out.shape == trace.logits.shape and torch.isfinite(out).all()
    return oracle


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.method)
def test_the_oracle_has_the_methods_counts(row: Row) -> None:
    model = reduced(row, "vit")
    oracle = check_oracle(model, images())
    assert oracle.even == model.reducer.fixed_count


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize(
    "method", ["evit(keep=0.7)", "tome(r=5)", "svit(gate='topk')", "evovit(keep=0.5)", "svit"]
)
def test_the_oracle_works_on_every_family(method: str, name: str) -> None:
    check_oracle(reduced(method, name), images())


@pytest.mark.parametrize("name", THERE)
def test_without_reduction_the_oracle_is_the_model(name: str) -> None:
    model, x = reduced("evit(keep=1.0)", name), images()
    trace = model.trace(x)
    native = logits(form(name), x)
    close(logits(Oracle.of(model, trace, x), x), native, 1e-4)
    packed = Oracle(model.backbone, Counts.of(trace), trace.grid, False, x.device)
    close(logits(packed, x), native, 1e-4)


def test_tokens_wait_for_a_whole_stage() -> None:
    model, x = reduced("evovit(keep=0.5)", "vit"), images()
    counts = Counts.of(model.trace(x))
    assert counts.parked == (False, True, True, True)
    assert counts.waits == (False, False, True, False)  # stages of one and of two blocks
    steps = check_oracle(model, x).reducer.steps
    assert [step.parks for step in steps] == [False, True, True, False]
    assert [step.recall is not None for step in steps] == [False, True, False, True]


@pytest.mark.parametrize("method", ["evit(keep=0.7)", "tome(r=5)", "evovit(keep=0.5)", "svit"])
def test_the_oracle_puts_its_tokens_back_on_the_grid(method: str) -> None:
    """Dense backbones ask for every patch: the first ones have a token, the others a last value."""
    model, x = reduced(method, "vit"), images()
    oracle = Oracle.of(model, model.trace(x), x)
    with torch.no_grad():
        state = oracle.begin(x, track=True)
        for block in range(oracle.backbone.spec.depth):
            state = oracle.step(block, state)
        grid = state.recalled().restore("zero")
    assert grid.shape[:2] == (len(x), 36) and torch.isfinite(grid).all()
    left = [n - oracle.backbone.spec.prefix for n in state.recalled().layout.lengths]
    for image, count in zip(grid, left, strict=True):
        assert (image[:count] != 0).all() and (image[count:] == 0).all()


@pytest.mark.parametrize("open_", [True, False])
def test_gates_that_are_all_open_or_all_shut_have_an_oracle(open_: bool) -> None:
    model = reduced("svit", "vit")
    with torch.no_grad():
        for gate in model.reducer.gates:
            gate[-1].weight.zero_()
            gate[-1].bias.copy_(torch.tensor([1.0, -1.0] if open_ else [-1.0, 1.0]))
    trace = check_oracle(model, images()).counts
    gated = trace.mlp[-1][0]
    assert gated == (37 if open_ else 1) and any(trace.parked)


@pytest.mark.parametrize("name", [n for n in FORMS if n in THERE or n in ("clip", "hf_vit")])
def test_unfused_equals_fused(name: str) -> None:
    model, x = form(name), images()
    before = said(model, x)
    twin = unfused(model, x)
    close(said(twin, x), before, 1e-4)
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    flags = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    assert all(flags)  # the given model is as it was
    assert torch.equal(said(model, x), before)


def test_what_cannot_be_unfused_says_so() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match="Plain has no switch"):
        unfused(Plain(), torch.rand(1, 1, 4, 4))
    stubborn = Plain()
    stubborn.fused_attn = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="even with its switch off"):
        unfused(stubborn, torch.rand(1, 1, 4, 4))


def test_peak_memory_of_a_known_function() -> None:
    before = torch.ones(1000, dtype=torch.uint8)

    def call() -> Tensor:
        first = torch.empty(4 << 20, dtype=torch.uint8)
        second = torch.empty(8 << 20, dtype=torch.uint8)  # 12 MiB
        del first
        third = torch.empty(3 << 20, dtype=torch.uint8)  # 11 MiB
        return third[:2] + second[:2] + before[:2]

    assert peak_memory(call, "cpu") == 12 << 20
    assert peak_memory(lambda: torch.empty(256, dtype=torch.float32), "cpu") == 1024
    assert peak_memory(lambda: before.view(10, 100), "cpu") == 0


def test_images_of_every_source(tmp_path: object) -> None:
    given = torch.rand(3, 3, 48, 48)
    found = images_for(3, (48, 48), 8, 0, given)
    assert found.source == "given by the caller: 3, used again where a batch needs more"
    assert torch.equal(found.take(5), given[[0, 1, 2, 0, 1]])
    assert torch.equal(found.take(2, 2), given[[2, 0]])
    fashion = images_for(1, (28, 28), 8, 0, None)
    assert "Fashion-MNIST" in fashion.source and len(fashion.pixels) == 2000
    made = images_for(3, (48, 64), 4, 0, None)
    assert "synthetic" in made.source and made.pixels.shape == (4, 3, 48, 64)
    assert torch.equal(made.pixels, natural_images(4, (48, 64), 0))
    with pytest.raises(ValueError, match=r"must be \[N, 3, 48, 48\].* got \[3, 3, 40, 40\]"):
        images_for(3, (48, 48), 8, 0, Images(torch.rand(3, 3, 40, 40), "x"))


def test_images_are_read_as_the_model_takes_them(tmp_path: object) -> None:
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(f"{tmp_path}/{number}.png")
    found = read_images(vit(), [str(tmp_path)], 2)
    assert found.pixels.shape == (2, 3, 48, 48)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        ("svit(keep=0.7)", (1.0, 0.7, 0.49, 0.343)),
        ("dynamicvit(keep=0.7, gate='argmax')", (1.0, 0.7, 0.49, 0.343)),
        ("spvit(keep=(0.8, 0.5, 0.3))", (1.0, 0.8, 0.5, 0.3)),
    ],
)
def test_untrained_gates_keep_their_target(method: str, shares: tuple[float, ...]) -> None:
    model = foveate.apply(form("vit"), method, check=False).eval()
    x = natural_images(16, (48, 48), 1)
    assert calibrate(model, x)
    trace = model.trace(x)
    counts = [sum(block.active().sum(1).tolist()) for block in trace.blocks]
    for found, share in zip(counts, shares, strict=True):
        assert found == pytest.approx(16 * 36 * share, abs=16)
    assert len({n for block in trace.blocks for n in block.mlp.layout.lengths}) > 4
    assert "before" not in vars(model.reducer)


def test_gates_of_a_fixed_count_are_left_alone() -> None:
    model = foveate.apply(form("vit"), "dynamicvit", check=False).eval()
    before = [p.clone() for p in model.reducer.parameters()]
    assert not calibrate(model, images())
    assert all(map(torch.equal, before, model.reducer.parameters()))


def test_specs_tell_architectures_apart() -> None:
    spec = reduced("evit", "vit").backbone.spec
    assert spec == reduced("tome(r=2)", "vit").backbone.spec != replace(spec, width=1)
