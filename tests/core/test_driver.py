"""ReducedViT: its switches, what it records, and features on the grid."""

from __future__ import annotations

import pytest
import torch
from small import close, images, keep_masks, logits, noise, randomise, vit

import foveate
from foveate.core import ReducedViT
from foveate.core.executed import executed_tokens


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
        assert model.run(images()).state.context.mode == evaluation
        assert model.run(images(), keep_mask=mask).state.context.mode == "packed"
        assert model.resolved_mode() == evaluation and model.resolved_mode(True) == "packed"
        assert model.train().run(images()).state.context.mode == training


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
    assert chain.gate == "argmax"
    chain.reducer.members[0].gate = "topk"
    assert chain.gate is None  # they differ
    mixed = made("svit(blocks=[1]) + evit(blocks=[3])")
    mixed.gate = "topk"
    assert mixed.gate == "topk"  # a part without gates does not count
    assert made().gate is None


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
    assert model.run(images()).state.source is None
    assert model.run(images(), track=True).state.source is not None


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


# One step at a time ------------------------------------------------------------------------------

STEPPED = ("evit(keep=0.5)", "dynamicvit", "ats(K=12)", "tome(r=4)", "evovit", "svit", "spvit")


@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("training", [False, True])
def test_looking_on_between_the_steps_changes_nothing(method: str, training: bool) -> None:
    model = made(method).train(training)
    torch.manual_seed(0)
    whole = model.run(images(), track=True)
    torch.manual_seed(0)
    state = model.begin(images(), track=True)
    assert state.block == 0 and state.context.training == training
    assert state.context.mode == model.resolved_mode()
    for block in range(4):
        before, seen = state, []
        state = model.step(block, state, lambda name, now, seen=seen: seen.append((name, now)))
        assert state.block == block + 1 and before.block == block
        assert [name for name, _ in seen] == ["attention", "mlp", "output"]
        assert seen[-1][1] is state
        state.restore(), state.tokens(), state.patch_counts()
    state = model.end(state)
    assert torch.equal(state.x, whole.state.x)
    assert state.layout.lengths == whole.state.layout.lengths
    assert torch.equal(model.backbone.head(state), whole.logits)
    for gone in ("last", "zero"):
        assert torch.equal(state.restore(gone), whole.state.restore(gone))
    assert state.notes.keys() == whole.notes.keys()


def test_what_is_written_between_two_steps_arrives() -> None:
    """Without a reduction it is what the model's own blocks make of the written tokens."""
    model = made("random(keep=1.0)")
    values = noise(3, 36, 48)
    state = model.begin(images(), track=True)
    x = state.tokens()
    for block in range(4):
        state = model.step(block, state)
        x = model.vit.blocks[block](x)
        if block == 1:
            state = state.add(values)
            x = x + torch.cat([torch.zeros(3, 1, 48), values], 1)
        if block == 2:
            state = state.with_tokens(state.tokens().roll(1, 2))
            x = x.roll(1, 2)
    end = model.end(state)
    close(end.tokens(), model.vit.norm(x), 1e-4)
    close(model.backbone.head(end), model.vit.forward_head(model.vit.norm(x)), 1e-4)


@pytest.mark.parametrize("method", STEPPED)
def test_what_is_added_between_two_steps_arrives_with_every_method(method: str) -> None:
    model, values = made(method), noise(3, 36, 48)
    plain = model.tokens(images()).restore().detach()
    state = model.begin(images(), track=True)
    for block in range(4):
        state = model.step(block, state)
        if block == 3:
            before = state.restore()
            state = state.add(values)
            # Who has his token to himself, or none any more, got all of it.
            alone = state.patch_counts() == 1
            source = state.source
            kept = source >= 0
            alone = state.layout.rect(alone.float()).gather(1, source.clamp_min(0)) > 0
            mine = ~kept | alone
            assert mine.any()
            close(state.restore()[mine], (before + values)[mine])
    after = model.end(state).restore()
    assert ((after - plain).abs().amax(-1) > 1e-4).all()  # it reached every patch


def test_steps_out_of_order() -> None:
    model = made()
    state = model.begin(images())
    for block in (1, 3, 4, -1):
        with pytest.raises(ValueError) as error:
            model.step(block, state)
        sentence = f"step({block}) is out of order: block 0 of 0..3 comes next"
        assert str(error.value) == sentence
    state = model.step(0, state)
    with pytest.raises(ValueError, match=r"step\(0\) is out of order: block 1 of 0..3 comes next"):
        model.step(0, state)
    with pytest.raises(ValueError, match="end comes after block 3, but for these tokens block 1 "):
        model.end(state)
    for block in (1, 2, 3):
        state = model.step(block, state)
    for block in (3, 4):
        with pytest.raises(ValueError, match=rf"step\({block}\): all 4 blocks are done; end comes"):
            model.step(block, state)
    model.end(state)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3, 48, 48), "the batch is empty: at least one image is needed"),
        (torch.zeros(3, 48, 48), r"images must be \[B, channels, H, W\], got \[3, 48, 48\]"),
    ],
)
def test_images_that_are_none(x: torch.Tensor, message: str) -> None:
    for call in (made(), made().begin, made().trace):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 6, 6), r"bool \[3, 6, 6\] or \[3, 36\], got torch.float32 \[3, 6, 6\]"),
        (torch.ones(3, 35).bool(), r"got torch.bool \[3, 35\]"),
        (torch.ones(2, 36).bool(), r"got torch.bool \[2, 36\]"),
    ],
)
def test_masks_that_do_not_fit(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made().begin(images(), mask)


def test_a_mask_in_the_gathered_mode_is_refused() -> None:
    model = made()
    model.mode = "gathered"
    with pytest.raises(ValueError, match="images with a keep_mask differ in their token count"):
        model.begin(images(), keep_masks(3, (6, 6)))


@pytest.mark.parametrize("mode", ["packed", "masked"])
def test_a_mask_holds_from_the_beginning(mode: str) -> None:
    model, mask = made("dynamicvit"), keep_masks(3, (6, 6))
    model.mode = mode
    state = model.begin(images(), mask, track=True)
    assert torch.equal(state.context.mask, mask.flatten(1))
    assert state.context.original == tuple(mask.sum((1, 2)).tolist())
    shown = (state.restore("zero") != 0).any(-1)
    assert torch.equal(shown, mask.flatten(1))


# What comes back ---------------------------------------------------------------------------------

RECALLED = (
    "evit(keep=0.5, blocks=[1], recall_before={})",
    "tome(r=6, blocks=[0, 1], recall_before={})",
    "dynamicvit(keep=0.5, blocks=[1], recall_before={})",
    "dynamicvit(keep=0.5, blocks=[1], gate='argmax', recall_before={})",
    "ats(K=12, blocks=[1], recall_before={})",
    "spvit(keep=[0.5], blocks=[1], recall_before={})",
)


@pytest.mark.parametrize("method", RECALLED)
@pytest.mark.parametrize("block", [2, 3])
def test_the_block_that_recalls_works_on_every_patch(method: str, block: int) -> None:
    model = made(method.format(block))
    trace = model.trace(images())
    for number in range(2, 4):
        record = trace.blocks[number]
        whole = torch.stack([record.active().sum(1), torch.tensor(record.mlp.counts)], 1) == 36
        assert whole.all(1).tolist() == [number >= block] * 3
        if number >= block:
            assert record.attention.layout.lengths == (37,) * 3
            assert (record.attention.source == torch.arange(1, 37)).all()
    # Every patch comes back with the value that it had last, and so does the prefix.
    left, entered = trace.blocks[block - 1].output, trace.blocks[block].attention
    assert torch.equal(entered.tokens()[:, 1:], left.restore())
    assert torch.equal(entered.prefix_tokens(), left.prefix_tokens())


@pytest.mark.parametrize("method", RECALLED)
@pytest.mark.parametrize("mask", [False, True])
def test_what_is_recalled_before_the_head_is_normed_and_pooled(method: str, mask: bool) -> None:
    """Every patch counts once in the mean, whatever became of it."""
    given = keep_masks(3, (6, 6)) if mask else None
    model = made(method.format("'head'"), global_pool="avg")
    trace = model.trace(images(), given)
    last = trace.blocks[-1].output
    counts = trace.final.layout.lengths
    assert counts == ((37,) * 3 if given is None else tuple(1 + n for n in given.sum((1, 2))))
    grid, vit_ = last.recalled().restore(), model.vit
    there = torch.ones(3, 36) if given is None else given.flatten(1).float()
    mean = (vit_.norm(grid) * there[..., None]).sum(1) / there.sum(1, keepdim=True)
    with torch.no_grad():
        close(trace.logits, vit_.head(vit_.fc_norm(mean)), 1e-4)


@pytest.mark.parametrize("mode", ["packed", "masked"])
def test_recalled_patches_are_those_of_the_mask(mode: str) -> None:
    mask = keep_masks(3, (6, 6))
    model = made("dynamicvit(keep=0.5, blocks=[1], recall_before=3)")
    model.mode = mode
    trace = model.trace(images(), mask)
    assert torch.equal(trace.blocks[3].active(), mask.flatten(1))
    assert (trace.blocks[2].active().sum(1) < mask.sum((1, 2))).all()


@pytest.mark.parametrize("block", ["0", "4", "-1", "'tail'", "7"])
def test_blocks_that_recall_nothing(block: str) -> None:
    for method in ("evit", "dynamicvit", "tome"):
        with pytest.raises(ValueError) as error:
            made(f"{method}(recall_before={block})")
        sentence = f"recall_before must be a block in 1..3 or 'head', got {block}"
        assert str(error.value) == sentence


@pytest.mark.parametrize("name", ["svit", "evovit"])
@pytest.mark.parametrize("block", ["2", "'head'"])
def test_a_method_that_keeps_every_token_recalls_none(name: str, block: str) -> None:
    sentence = f"recall_before={block} has no effect: {name} keeps every token"
    with pytest.raises(ValueError, match=sentence):
        made(f"{name}(recall_before={block})")


# Features ----------------------------------------------------------------------------------------


def test_final_tokens_are_normed() -> None:
    model = made("attention(keep=0.5)")
    state = model.tokens(images())
    assert state.layout.lengths == (5,) * 3
    with torch.no_grad():
        assert torch.equal(model.vit.head(state.prefix_tokens()[:, 0]), logits(model, images()))
    last, zero = state.restore(), state.restore("zero")
    gone = state.source < 0
    assert gone.sum(1).tolist() == [32] * 3
    assert (zero[gone] == 0).all() and torch.equal(last[~gone], zero[~gone])
    # What is gone has its last value, under the same norm.
    raw = model.trace(images()).blocks[-1].output.restore()
    torch.testing.assert_close(last, model.vit.norm(raw))


@pytest.mark.parametrize("method", STEPPED)
def test_final_features_are_the_prefix_and_every_patch_in_its_place(method: str) -> None:
    model = made(method)
    features = model.forward_features(images())
    assert isinstance(features, torch.Tensor) and features.shape == (3, 37, 48)
    state = model.tokens(images())
    assert torch.equal(features[:, :1], state.prefix_tokens())
    assert torch.equal(features[:, 1:], state.restore())


def test_dense_features_equal_timms_own() -> None:
    model = made("random(keep=1.0)")
    with torch.no_grad():
        close(model.forward_features(images()), model.vit.forward_features(images()))
    for options in (
        {},
        {"norm": True},
        {"output_fmt": "NLC"},
        {"indices": 2, "return_prefix_tokens": True},
        {"indices": [0, 2], "norm": True, "stop_early": True},
        {"indices": [-1, -4], "intermediates_only": True},
        {"intermediates_only": True, "return_prefix_tokens": True},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True},
    ):
        with torch.no_grad():
            own = model.vit.forward_intermediates(images(), **options)
            mine = model.forward_intermediates(images(), **options)
        same(mine, own)


def same(mine: object, own: object) -> None:
    """Equal tensors in equal forms."""
    if isinstance(own, torch.Tensor):
        assert isinstance(mine, torch.Tensor)
        torch.testing.assert_close(mine, own, atol=2e-5, rtol=1e-5)
    elif isinstance(own, dict):
        assert isinstance(mine, dict) and mine.keys() == own.keys()
        same(list(mine.values()), [own[key] for key in mine])
    else:
        assert type(mine) is type(own) and len(mine) == len(own)
        for one, other in zip(mine, own, strict=True):
            same(one, other)


def test_layers_as_timm_and_dino_name_them() -> None:
    model = made("random(keep=1.0)")
    for options in ({"n": 2}, {"n": [1, 3], "reshape": True}, {"n": 1, "norm": True}):
        with torch.no_grad():
            own = model.vit.get_intermediate_layers(images(), **options)
            mine = model.get_intermediate_layers(images(), **options)
        same(list(mine), list(own))


def only(model: ReducedViT, *args: object, **options: object) -> list[torch.Tensor]:
    return model.forward_intermediates(images(), *args, intermediates_only=True, **options)


def test_which_intermediates() -> None:
    model = made("attention(keep=0.5)")
    every = only(model)
    assert len(every) == 4 and every[0].shape == (3, 48, 6, 6)
    # In the order of the blocks, however they were named.
    for indices, blocks in ((2, [2, 3]), ([0, 2], [0, 2]), ([3, 1], [1, 3]), ([-1, -4], [0, 3])):
        some = only(model, indices)
        assert len(some) == len(blocks)
        assert all(torch.equal(a, every[b]) for a, b in zip(some, blocks, strict=True))
    final, some = model.forward_intermediates(images(), [1])
    assert torch.equal(final, model.forward_features(images())) and torch.equal(some[0], every[1])
    zero = only(model, [3], gone="zero")[0]
    assert ((zero == 0).all(1).sum((1, 2)) == 32).all()
    mask = keep_masks(3, (6, 6))
    masked = only(model, [0], keep_mask=mask, gone="zero")[0]
    assert torch.equal((masked != 0).any(1), mask)


def test_stopping_early_runs_no_further_block() -> None:
    model, ran = made("attention(keep=0.5)"), []
    for block in range(4):
        model.vit.blocks[block].register_forward_hook(lambda *_, n=block: ran.append(n))
    final, some = model.forward_intermediates(images(), [1], stop_early=True)
    assert ran == [0, 1]
    grid = model.trace(images()).blocks[1].output
    normed = model.vit.norm(torch.cat([grid.prefix_tokens(), grid.restore()], 1))
    torch.testing.assert_close(final, normed)
    assert torch.equal(some[0].flatten(2).transpose(1, 2), grid.restore())


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
    with pytest.raises(ValueError, match="kept different numbers of them: use forward_features"):
        model(images(), keep_mask=keep_masks(3, (6, 6)))
    for method in ("ats(K=12, recall_before='head')", "evit(keep=0.5, recall_before='head')"):
        model = made(method, global_pool="", num_classes=0)
        assert logits(model, images()).shape == (3, 37, 48)
        with pytest.raises(ValueError, match="kept different numbers"):  # what comes back is masked
            model(images(), keep_mask=keep_masks(3, (6, 6)))


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


# In effect --------------------------------------------------------------------------------------


def test_a_model_that_runs_dense_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("evit(keep=0.5)")
    assert executed_tokens(model.backbone, lambda: model.vit(images(2))) == (2 * 37,) * 4
    assert model.check_in_effect(images(2))[-1][0] < 37
    with monkeypatch.context() as patch:
        patch.setattr(model, "run", lambda x, keep_mask: model.vit(x))
        with pytest.raises(RuntimeError, match=r"not in effect: block \d computed 74 tokens"):
            model.check_in_effect(images(2))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="its tokens cannot be counted: run without autocast"),
    ):
        model.check_in_effect(images(2))


def test_masked_mode_is_not_in_effect() -> None:
    model = made("dynamicvit(keep=0.5)").train()
    with pytest.raises(RuntimeError, match="masked mode, which computes all tokens"):
        model.check_in_effect(images(2))
    model.eval().check_in_effect(images(2))


def test_gates_that_sample_are_in_effect() -> None:
    model = made("dynamicvit(keep=0.5)")
    model.gate = "sample"
    drawn = {tuple(model.check_in_effect(images(2))) for _ in range(8)}
    assert len(drawn) > 1  # both of its runs draw alike, and the next ones draw anew


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("method", ["evit(keep=0.5)", "tome(r=4)", "dynamicvit(keep=0.5)"])
def test_layers_may_get_tokens_by_image(method: str, hooked: bool) -> None:
    """Stochastic depth and hooks included."""
    model = made(method, drop_path_rate=0.5).train()
    seen: list[int] = []
    model.vit.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0].ndim))
    if hooked:
        model.vit.blocks[0].attn.register_forward_hook(lambda _, __, out: 2 * out)
    found = []
    for model.by_image in (False, True):
        torch.manual_seed(0)
        found.append(model(images()))
    close(found[1], found[0])
    assert seen == [2, 3]
