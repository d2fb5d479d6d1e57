"""Cropr: scores by hand, what trains what, and the last block that sees all patches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from small import batch_state, built, hf, images, keep_masks, logits, noise, randomise, vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate
import foveate.methods.cropr  # noqa: F401
from foveate.core import ReducedViT, TokenState
from foveate.methods.cropr import Scorer
from foveate.train.draws import Draws
from foveate.train.reduce import ReduceTask, own_weights
from foveate.train.task import total

AUX = "cropr.aux_logits"
LABELS = torch.tensor([1, 4, 9])
OPTIONS = ["", "queries=3", "heads=3", "norm=True, proj=True", "queries=2, proj=True, heads=4"]


def cropr(options: str = "r=6", model: nn.Module | None = None, **changes: object) -> ReducedViT:
    model = randomise(vit(**changes)).eval() if model is None else model
    return foveate.apply(model, f"cropr({options})", check=False).eval()


def scorers(model: ReducedViT) -> list[Scorer]:
    return list(model.reducer.scorers)


def leaving(model: ReducedViT, x: Tensor) -> list[tuple[TokenState, TokenState]]:
    """Tokens before and after each module acts."""
    seen: list[tuple[TokenState, TokenState]] = []
    after = model.reducer.after

    def spy(block: int, state: TokenState) -> TokenState:
        left = after(block, state)
        if block in model.reducer.active_blocks:
            seen.append((state, left))
        return left

    model.reducer.after = spy
    with torch.no_grad():
        model.tokens(x)
    del model.reducer.after
    return seen


# Scores and selection ----------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_a_module_by_hand(ragged: bool) -> None:
    """Two queries, (1, 0) and (0, 2): a token (a, b) scores a + 2 b, and the lowest leave."""
    reducer = built("cropr(r=2, queries=2, blocks=[1], extra_first=0)", width=2)
    with torch.no_grad():
        reducer.scorers[0].queries.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    first = [[-9.0, -9.0], [1.0, 0.0], [0.0, 1.0], [-3.0, 1.0], [0.0, 4.0]]  # 1, 2, -1, 8
    other = [[-9.0, -9.0], [5.0, -2.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.5]]  # 1, 0, 2, 1 / 0.5
    other[4] = [0.0, 0.25]
    if ragged:
        other = other[:4]
    lengths = [4, len(other) - 1]
    state = batch_state(lengths if ragged else 4, width=2)
    x = torch.tensor(first + other)
    left = reducer.after(1, state.with_tokens(x))
    kept = [first[0], first[4], first[2], other[0], other[3]] + ([] if ragged else [other[1]])
    assert left.x.tolist() == kept
    assert left.layout.lengths == (3, 2 if ragged else 3)
    assert torch.equal(reducer.after(0, state).x, state.x)


def textbook(scorer: Scorer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Raw products ``[H, M, N]`` and what heads gather, of one image's tokens ``[N, C]``."""
    heads, x = scorer.heads, scorer.norm(x)
    projected = isinstance(scorer.key, nn.Linear)
    keys = x @ scorer.key.weight if projected else x  # the weight is that of the keys, transposed
    q, k, v = (
        t.unflatten(-1, (heads, -1)).transpose(0, 1)
        for t in (scorer.query(scorer.queries), keys, scorer.value(x))
    )
    raw = q @ k.transpose(1, 2)
    gathered = (raw / k.shape[-1] ** 0.5).softmax(-1) @ v
    return raw, gathered.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_summed_query_scores_as_all_queries_and_heads(options: str) -> None:
    scorer = randomise(built(f"cropr({options})").scorers[0])
    x = noise(20, 48)
    raw, _ = textbook(scorer, x)
    torch.testing.assert_close(scorer(x), raw.sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [7, [5, 9]])
@pytest.mark.parametrize("options", OPTIONS)
def test_auxiliary_logits_by_the_textbook(options: str, counts: int | list[int]) -> None:
    scorer = randomise(built(f"cropr({options})", classes=10).scorers[0])
    state = batch_state(counts, width=48)
    found = scorer.logits(state)
    for row, x in zip(found, state.x.split(list(state.layout.lengths)), strict=True):
        z = scorer.out(textbook(scorer, x)[1])
        y = z + scorer.mlp(z)
        torch.testing.assert_close(row, scorer.head(y).mean(0), rtol=1e-4, atol=1e-5)


def test_counts_of_the_paper() -> None:
    """ViT-L at 224 pixels, 8 a module: 188, 180, ... 20 tokens are left after blocks 0 to 21."""
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
        reduced = foveate.apply(model, "cropr")
    assert foveate.count(reduced).tokens == (197, *range(188, 19, -8), 197)
    new = sum(p.numel() for p in reduced.reducer.parameters())
    assert new / 1e6 == pytest.approx(207.3, abs=0.1)


@pytest.mark.parametrize("recall", ["'last'", "'head'", "None"])
def test_nothing_removed_is_the_dense_model(recall: str) -> None:
    model = cropr(f"r=0, extra_first=0, recall_before={recall}")
    torch.testing.assert_close(logits(model, images()), logits(model.vit, images()))


def test_r_for_each_module() -> None:
    assert foveate.count(cropr("r=[5, 12]")).tokens == (37, 32, 20, 37)
    assert foveate.count(cropr("r=5")).tokens == (37, 31, 26, 37)
    assert foveate.count(cropr("r=5, recall_before=None")).tokens == (37, 31, 26, 21)
    assert foveate.count(cropr("r=5, recall_before='head'")).tokens == (37, 31, 26, 21)
    assert foveate.count(cropr("r=5, recall_before=2")).tokens == (37, 31, 37, 37)


def test_a_share_is_of_the_patches_of_an_image() -> None:
    model = cropr("r=0.25")
    with torch.no_grad():
        large = model.trace([images(1, size=(48, 24))[0], images(1, size=(24, 24))[0]]).counts()
        own = model.trace(images()).counts()
    assert [block[0] for block in own] == [37, 28, 19, 37]
    assert [block[0] for block in large] == [19, 15, 11, 19]
    assert [block[1] for block in large] == [10, 8, 6, 10]


def test_small_images_keep_a_patch() -> None:
    trace = cropr("r=15").trace(images(2, (16, 16)))
    assert trace.counts() == [(5, 5), (2, 2), (2, 2), (5, 5)]


# Last layer fusion -------------------------------------------------------------------------------


def test_the_last_block_works_on_all_patches_as_they_were_when_they_left() -> None:
    model = cropr()
    trace = model.trace(images())
    assert trace.counts() == [(37,) * 3, (30,) * 3, (24,) * 3, (37,) * 3]
    assert trace.blocks[3].active().all()
    entering = trace.blocks[3].attention
    assert torch.equal(entering.source, torch.arange(1, 37).expand(3, -1))
    last = trace.blocks[2].output.tokens()[:, 1:]
    expected = trace.blocks[2].output.restore("last")
    dropped = [left.canvas for _, left in leaving(model, images())]
    assert torch.equal(entering.tokens()[:, 1:], expected)
    for image in range(3):
        source = trace.blocks[2].output.source[image]
        early = trace.blocks[1].attention.source[image] < 0
        assert int(early.sum()) == 7 and int((source < 0).sum()) == 13
        assert torch.equal(expected[image][early], dropped[0][image][early])
        assert torch.equal(expected[image][source >= 0], last[image][source[source >= 0] - 1])


def test_tokens_that_enter_the_last_block_are_those_that_left_and_those_that_stayed() -> None:
    model, x = cropr(), images(1)
    parts = []
    for state, left in leaving(model, x):
        there, stayed = state.x.tolist(), left.x.tolist()
        parts += [row for row in there if row not in stayed]
    blocks = model.trace(x).blocks
    parts += blocks[2].output.x.tolist()
    assert len(parts) == 37 and sorted(blocks[3].attention.x.tolist()) == sorted(parts)


def test_without_it_tokens_are_dropped_for_good() -> None:
    blocks = cropr("r=6, recall_before=None").trace(images()).blocks
    gone = [block.output.source < 0 for block in blocks]
    assert [int(g.sum(1)[0]) for g in gone] == [7, 13, 19, 19]
    for earlier, later in zip(gone, gone[1:], strict=False):
        assert not (earlier & ~later).any()


@pytest.mark.parametrize("where", ["last", "head", 2, None])
def test_the_option_that_says_where_patches_come_back(where: int | str | None) -> None:
    """What is resolved for one model does not stick to the next."""
    model = cropr(f"r=6, recall_before={where!r}")
    assert model.reducer.config()["recall_before"] == where
    deeper = foveate.apply(vit(depth=6), model.reducer.__class__(r=2, recall_before=where))
    blocks = {"last": {5}, "head": {6}, 2: {2}, None: set()}
    assert deeper.reducer.recall_blocks == blocks[where]


def test_prefix_tokens_stay_whatever_they_score() -> None:
    model = cropr("r=10", randomise(vit(VisionTransformerDistilled)).eval())
    for scorer in scorers(model):
        state = leaving(model, images())[0][0]
        prefix, patches = state.prefix_tokens(), state.after_prefix(state.x)
        away = patches.mean((0, 1)) - prefix.mean((0, 1))  # here the prefix scores lowest
        scorer.queries.data.copy_(away[None])
    for state, left in leaving(model, images()):
        assert state.prefix == left.prefix == 2
        assert torch.equal(left.prefix_tokens(), state.prefix_tokens())


def test_masked_images_are_as_alone() -> None:
    model, x, mask = cropr(), images(), keep_masks(3, (6, 6))
    mask[2] = False
    mask[2, 0, :3] = True  # fewer patches than a module removes
    together = logits(model, x, keep_mask=mask)
    for i in range(3):
        alone = logits(model, x[i : i + 1], keep_mask=mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    lengths = model.trace(x, keep_mask=mask).counts()
    assert [n[2] for n in lengths] == [4, 2, 2, 4]


# Training ----------------------------------------------------------------------------------------


def training(options: str = "r=6") -> ReducedViT:
    return cropr(options).train()


def test_the_auxiliary_loss_trains_the_modules_alone() -> None:
    model = training("r=6, norm=True, proj=True, heads=3")
    outcome = model.run(images())
    model.reducer.losses(outcome, LABELS)["aux"].backward()
    assert all(p.grad is None for p in model.vit.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.reducer.parameters())


def test_the_main_loss_does_not_reach_the_modules() -> None:
    model = training()
    F.cross_entropy(model.run(images()).logits, LABELS).backward()
    assert all(p.grad is None for p in model.reducer.parameters())
    assert all(p.grad is not None for p in model.vit.parameters())


def test_each_module_sees_what_reached_it_and_losses_are_summed() -> None:
    model = training()
    outcome = model.run(images())
    expected = [
        scorer.logits(state)
        for scorer, (state, _) in zip(scorers(model), leaving(model, images()), strict=True)
    ]
    assert len(outcome.notes[AUX]) == 2
    for found, wanted in zip(outcome.notes[AUX], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    soft = F.one_hot(LABELS, 10) * 0.9 + 0.01
    for targets in (LABELS, soft):
        wanted = sum(F.cross_entropy(part, targets) for part in expected)
        torch.testing.assert_close(model.reducer.losses(outcome, targets)["aux"], wanted)
    assert model.reducer.losses(outcome) == {}


def test_a_step_of_the_task() -> None:
    model = training()
    assert own_weights(model) == {"aux": 1.0}
    task = ReduceTask(model, 10, weights={"aux": 0.5}).train()
    assert task.backbone is model.vit
    optimiser = torch.optim.AdamW(task.parameters(), 1e-3)
    seen = []
    for _ in range(8):
        losses = task.training_step({"image": images(), "label": LABELS}, Draws(0, 0, 0))
        assert set(losses) == {"class", "aux"}
        loss = total(losses, task.weights)
        torch.testing.assert_close(loss, losses["class"] + 0.5 * losses["aux"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append({name: float(value.detach()) for name, value in losses.items()})
    assert seen[-1]["class"] < 0.1 * seen[0]["class"] and seen[-1]["aux"] < 0.9 * seen[0]["aux"]


def test_queries_learn_to_find_what_tells_classes_apart() -> None:
    """One token of nine shows the class, on top of a mark that all of them share."""
    torch.manual_seed(0)
    scorer = built("cropr(r=1)", classes=4, width=16, heads=1).scorers[0]
    shown, mark = 3 * torch.eye(16)[:4], 3 * torch.eye(16)[15]
    scorer.queries.data.copy_(-0.3 * mark[None])  # looks at all others at first
    optimiser = torch.optim.Adam(scorer.parameters(), 3e-2)
    found = []
    for _ in range(60):
        labels, place = torch.randint(4, (32,)), torch.randint(1, 10, (32,))
        x = torch.randn(32, 10, 16) * 0.5
        x[torch.arange(32), place] += shown[labels] + mark
        state = batch_state([9] * 32, width=16).with_tokens(x)
        loss = F.cross_entropy(scorer.logits(state), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        best = scorer(x.flatten(0, 1)).view(32, 10)[:, 1:].argmax(1) + 1
        found.append(float((best == place).float().mean()))
    assert sum(found[-5:]) / 5 > 0.95 and found[0] < 0.2


def test_labels_of_transformers_train_the_modules_too() -> None:
    pytest.importorskip("transformers")
    model = randomise(hf("ViTForImageClassification"))
    model = foveate.apply(model, "cropr(r=6)", check=False).train()
    output, outcome = model(images(), labels=LABELS), model.run(images())
    task = F.cross_entropy(outcome.logits, LABELS)
    aux = model.reducer.losses(outcome, LABELS)["aux"]
    assert float(aux.detach()) > 1
    torch.testing.assert_close(output.loss, task + aux)
    model.reducer.loss_weights["aux"] = 0.25
    torch.testing.assert_close(model(images(), labels=LABELS).loss, task + 0.25 * aux)
    evaluated = model.eval()(images(), labels=LABELS)
    torch.testing.assert_close(evaluated.loss, F.cross_entropy(evaluated.logits, LABELS))


def test_without_classes_there_is_nothing_to_train() -> None:
    model = cropr(num_classes=0).train()
    outcome = model.run(images())
    assert AUX not in outcome.notes and own_weights(model) == {}
    assert model.reducer.losses(outcome, LABELS) == {}
    assert model.parameter_groups()["new"] == []
    assert [name for name, _ in model.reducer.named_parameters()] == [
        "scorers.0.queries",
        "scorers.1.queries",
    ]


# Deployed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["r=6, queries=4", "r=6, norm=True, proj=True, heads=3"])
def test_deployed_a_module_is_one_product_a_token(options: str) -> None:
    model, x = cropr(options), images(1)
    assert AUX not in model.run(x).notes
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        logits(model, x)
    counted = foveate.count(model)
    assert 2 * counted.macs == flops.get_total_flops()
    folding = 2 * 2 * 48 * 48 if "proj" in options else 0  # once a batch, not once a token
    assert counted.method_macs == (37 + 30) * 48 + folding


def test_budgets() -> None:
    model = foveate.apply(vit(), "cropr", budget="0.8x", check=False)
    assert foveate.count(model).ratio == pytest.approx(0.8, abs=0.01)
    reducer = model.reducer
    assert reducer.at_level(0.0) == {"r": (0, 0)}
    assert reducer.at_level(1.0) == {"r": (18, 17)}
    assert foveate.count(cropr("r=[18, 17]")).tokens == (37, 19, 2, 37)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = cropr("r=[6, 4], queries=2, heads=2")
    randomise(model.reducer, seed=3)
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path, copy.deepcopy(model.vit)).eval()
    assert again.reducer.config() == model.reducer.config()
    assert torch.equal(logits(again, images()), logits(model, images()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("r=-1", "r must be a whole number of at least 0, or a share .*; got -1"),
        ("r=[3, -2]", "r must be a whole number of at least 0, or a share .*; got -2"),
        ("r=0.5", "removes 1 of the patches in 2 modules, .* r must be below 0.5 on average"),
        ("r=True", "r must be a number or several, each a number, got True"),
        ("r=[3]", "r has 1 numbers for 2 modules"),
        ("r=18", "removes 37 of 36 patches in 2 modules, and one must be left: r may be 17 on"),
        ("extra_first=-1", "extra_first must be at least 0"),
        ("queries=0", "queries must be at least 1"),
        ("heads=5", "heads must divide the width 48, got 5"),
        ("mlp_ratio=0.0", "mlp_ratio must be above 0"),
        ("recall_before='end'", "recall_before must be one of 'last', 'head'; got 'end'"),
        ("recall_before=4", r"recall_before must be a block in 1\.\.3"),
        ("recall_before=1", "leaves no block of 4 to act after"),
        ("blocks=[4]", r"0\.\.3"),
        ("blocks=[2, 1]", "ascend"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cropr(options)
