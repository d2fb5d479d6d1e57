"""Every method on every form keeps the same promises."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from table import (
    FORMS,
    HF_FORMS,
    METHODS,
    OTHER_SIZES,
    Row,
    close,
    fitting,
    form,
    images,
    randomise,
    reduced,
    said,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import AttentionReader, ReducedViT, TokenState

rows = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.method)
MASKED = ["vit", "siglip", "dinov2_reg4", "dinov3", *(name for name in HF_FORMS if name in FORMS)]
FEW = [*MASKED, "multiscale"]  # which takes no keep mask


def crossed(forms: list[str], every: int) -> pytest.MarkDecorator:
    """Every row on the plain ViT, and on each other form every so many rows; the rest is crossings.

    What a form does differently is in its parts, and each part still meets many methods.
    """
    cases = []
    for i, row in enumerate(METHODS):
        for j, name in enumerate(forms):
            quick = name == "vit" or (i + j) % every == 0
            marks = () if quick else pytest.mark.crossing
            cases.append(pytest.param(row, name, id=f"{name}-{row.method}", marks=marks))
    return pytest.mark.parametrize("row, name", cases)


many, counted, few = crossed(list(FORMS), 5), crossed(list(FORMS), 11), crossed(FEW, 7)
masked = crossed(MASKED, 7)
halved = crossed([name for name in ("vit", "dinov3", "hf_vit") if name in FORMS], 5)


def run(model: ReducedViT, x: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return said(model, x, **options)


def state_of(trace) -> list[TokenState]:
    return [s for block in trace.blocks for s in (block.attention, block.mlp, block.output)]


@many
def test_modes_agree(row: Row, name: str) -> None:
    """Masked, gathered and packed take the same decisions to the same logits."""
    model = reduced(row, name)
    outputs = []
    for mode in row.modes:
        model.mode = mode
        outputs.append(run(model, images()))
    for other in outputs[1:]:
        close(other, outputs[0], 2e-4 if "masked" in row.modes else row.tolerance)


@many
def test_rows_stand_alone_and_batches_permute(row: Row, name: str) -> None:
    model, x = reduced(row, name), images(4)
    together = run(model, x)
    close(torch.cat([run(model, x[i : i + 1]) for i in range(4)]), together)
    order = torch.tensor([2, 0, 3, 1])
    close(run(model, x[order]), together[order])


@many
def test_state_stays_consistent(row: Row, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix in place, sizes and source agree, restore gives every patch its token."""
    begin = TokenState.begin.__func__

    def marked(cls, x, context, **options):
        state = begin(cls, x, context, **{**options, "place": True})
        mark = torch.arange(x.shape[1]).repeat(x.shape[0])
        return state.replace(extras={"mark": mark})

    monkeypatch.setattr(TokenState, "begin", classmethod(marked))
    model = reduced(row, name)
    prefix, patches = model.backbone.spec.prefix, 36
    trace = model.trace(images())
    for state in state_of(trace):
        layout = state.layout
        assert len(state.x) == layout.total == len(state.place)
        if "gate_prefix_last" not in row.method:
            front = layout.rect(state.extras["mark"])[:, :prefix]
            assert torch.equal(front, torch.arange(prefix).expand(3, -1))
        source = state.source
        assert ((source == -1) | (source >= prefix)).all() or "gate_prefix_last" in row.method
        lengths = torch.tensor(layout.lengths)[:, None]
        assert (source < lengths).all()
        sizes = layout.rect(state.patch_counts())
        assert torch.equal(sizes.sum(1), (source >= 0).sum(1).float())
        if state.size is not None:
            assert torch.equal(layout.rect(state.size)[:, prefix:], sizes[:, prefix:])
        placed = layout.rect(state.place, patches)
        assert (placed[:, :prefix] == patches).all() or "gate_prefix_last" in row.method
        carried = layout.rect(state.x)
        last, zero = state.restore("last"), state.restore("zero")
        for b in range(3):
            for p in range(patches):
                if source[b, p] >= 0 and state.alive is None:
                    assert torch.equal(last[b, p], carried[b, source[b, p]])
        if state.parked is None and state.alive is None:
            assert (zero[source < 0] == 0).all()
            assert torch.equal(last[source < 0], state.canvas[source < 0])
    assert trace.depth().max() <= 4
    if not model.reducer.drops:
        assert all((block.output.recalled().source >= 0).all() for block in trace.blocks)


@counted
def test_counted_is_what_runs(row: Row, name: str) -> None:
    """Multiply-adds counted without running equal those that torch counts on the real pass."""
    model, x = reduced(row, name), images(1)
    # Some releases of torch do not count the CPU's fused attention; as two products all do.
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        model(x)
    counted = [foveate.count(model)] if model.reducer.fixed_count else []
    counted.append(foveate.count(model, images=x))
    if not model.reducer.fixed_count and len(model.reducer.members) == 1:
        counted.append(foveate.count(model, trace=model.trace(x)))  # worked out from the counts
    assert {2 * c.macs for c in counted} == {flops.get_total_flops()}


@counted
def test_counts_follow_the_plan(row: Row, name: str) -> None:
    model = reduced(row, name)
    for size in ((48, 48), fitting(name, OTHER_SIZES[1])):  # the latter is not square
        grid = (size[0] // 8, size[1] // 8)
        trace = model.trace(images(3, size))
        assert model.check_in_effect(images(3, size)) == trace.counts()
        if model.reducer.fixed_count or row.name == "ats":
            expected = foveate.count(model, size).tokens
            for block, count in zip(trace.blocks, expected, strict=True):
                if model.reducer.fixed_count:
                    assert set(block.mlp.layout.lengths) == {count}
                else:
                    assert max(block.mlp.layout.lengths) <= count
        feats = model.tokens(images(3, size))
        assert feats.restore().shape == (3, grid[0] * grid[1], 48)
        maps = model.forward_intermediates(
            images(3, size), [1, 3], norm=True, intermediates_only=True
        )
        assert [tuple(m.shape) for m in maps] == [(3, 48, *grid)] * 2
        close(maps[1].flatten(2).transpose(1, 2), feats.restore())


@few
def test_gradients_reach_what_is_trained_and_only_that(row: Row, name: str) -> None:
    model = randomise(FORMS[name]()).train()
    driven = reduced(row, name, model).train()
    assert driven.resolved_mode() == ("masked" if driven.reducer.gated else driven.resolved_mode())
    for p in driven.backbone.blocks[0].parameters():
        p.requires_grad_(False)
    torch.manual_seed(0)
    outcome = driven.run(images())
    losses = driven.reducer.losses(outcome, torch.arange(3))
    assert set(losses) == ({"ratio"} if len(driven.reducer.members) == 1 else set(losses)) or (
        not driven.reducer.gated
    )
    total = outcome.logits.square().sum() + sum(losses.values())
    total.backward()
    groups = driven.parameter_groups()
    assert len(groups["new"]) == sum(p.requires_grad for p in driven.reducer.parameters())
    for p in groups["new"]:
        assert p.grad is not None and torch.isfinite(p.grad).all()
    if groups["new"]:
        reached = [bool(p.grad.abs().sum() > 0) for p in groups["new"]]
        assert sum(reached) > 0.7 * len(reached)
    assert all(p.grad is None for p in driven.backbone.blocks[0].parameters())
    for n, p in model.named_parameters():
        if p.requires_grad and "mask_token" not in n:  # which masked modelling alone reads
            assert p.grad is not None and torch.isfinite(p.grad).all(), n
    moved = [float(p.grad.abs().sum()) for p in driven.backbone.blocks[1].parameters()]
    assert max(moved) > 0


@masked
def test_keep_masks_are_honoured(row: Row, name: str) -> None:
    """What lies under a masked patch changes nothing, in any mode that takes masks."""
    model, x = reduced(row, name), images(3)
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[2] = True
    hidden = ~mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, images(3, seed=9), x)
    for mode in [m for m in row.modes if m != "gathered"] + ["auto"]:
        model.mode = mode
        base = run(model, x, keep_mask=mask)
        close(run(model, other, keep_mask=mask), base)
        close(run(model, x, keep_mask=mask.flatten(1)), base)
        assert (base[2] - run(model, x)[2]).abs().max() < 1e-4 * base.abs().max().clamp_min(1)
    trace = model.trace(x, keep_mask=mask)
    assert not (trace.blocks[0].active() & ~mask.flatten(1)).any()


@few
def test_half_precision_is_finite(row: Row, name: str) -> None:
    model = copy.deepcopy(reduced(row, name)).bfloat16()
    for mode in row.modes:
        model.mode = mode
        out = run(model, images().bfloat16())
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@halved
def test_autocast_trains(row: Row, name: str) -> None:
    """Mixed precision: float32 weights, half-precision products."""
    model = randomise(FORMS[name]()).train()
    driven = reduced(row, name, model).train()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = driven.run(images())
        loss = outcome.logits.float().square().sum()
        loss = loss + sum(driven.reducer.losses(outcome, torch.arange(3)).values())
    loss.backward()
    for p in driven.parameters():
        assert not p.requires_grad or (p.grad is not None and torch.isfinite(p.grad).all())


@few
def test_saved_and_loaded_models_are_equal(row: Row, name: str, tmp_path: Path) -> None:
    model = reduced(row, name)
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path, form(name)).eval()
    assert repr(again.reducer) == repr(model.reducer)
    assert torch.equal(run(again, images()), run(model, images()))


@few
def test_the_original_is_untouched_and_evaluation_repeats(row: Row, name: str) -> None:
    base = form(name)
    keys, before = list(base.state_dict()), run(base, images())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    model = reduced(row, name)
    first = run(model, images())
    run(model, images(2, seed=4))
    assert torch.equal(run(model, images()), first)
    assert foveate.unwrap(model) is base
    assert list(base.state_dict()) == keys and torch.equal(run(base, images()), before)
    assert (
        hooks == 0 == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method", foveate.list_methods())
def test_identity_where_a_method_has_one(method: str, name: str) -> None:
    cls = foveate.registry.method_class(method)
    exempt = {"ats", "structural"}
    assert (cls.identity is None) == (method in exempt)
    if cls.identity is None:
        return
    model = foveate.apply(form(name), method, check=False, **cls.identity).eval()
    close(run(model, images()), run(form(name), images()))


@rows
def test_declared_facts_are_true(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reduced(row, "vit")
    read: set[str] = set()
    for attribute, name in (
        ("cls_row_heads", "cls_row"),
        ("key_direction", "key_direction"),
        ("value_norm", "value_norm"),
        ("full_map", "full_map"),
    ):
        original = getattr(AttentionReader, attribute)

        def spy(self, original=original, name=name):
            read.add(name)
            return original(self)

        monkeypatch.setattr(AttentionReader, attribute, spy)
    trace = model.trace(images())
    assert read == model.reducer.reads
    parked = any(s.parked is not None for s in state_of(trace))
    assert parked == model.reducer.parks
    lost = any(bool((block.mlp.recalled().source < 0).any()) for block in trace.blocks)
    assert lost == model.reducer.drops
    assert ("masked" in row.modes) == model.reducer.maskable
    assert ("gathered" in row.modes) == model.reducer.fixed_count
    learns = any(True for _ in model.reducer.parameters())
    assert learns >= model.reducer.gated
    assert not learns or model.reducer.training_need == "required"
    for hook in ("before", "between", "after"):
        overridden = any(hook in part.hooks for part in model.reducer.members)
        assert overridden == (hook in model.reducer.hooks)


@rows
def test_forwards_do_not_meet(row: Row) -> None:
    """Two threads and two models over one backbone: no state is left anywhere."""
    models = [reduced(row, "vit"), reduced(row, "vit")]
    batches = [images(2, seed=s) for s in range(4)]
    expected = [run(models[0], x) for x in batches]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        got[i] = run(models[i % 2], batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        close(got[i], expected[i])
