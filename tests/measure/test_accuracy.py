"""Accuracy, and accuracy at several rates."""

from __future__ import annotations

import pytest
import torch
from batches import demo_batches, made, small_batches
from small import hf, noise, randomise, vit
from torch import nn

import foveate
from foveate.core.evaluation import answering
from foveate.data.demo import demo_vit
from foveate.measure import Tally, accuracy, at_rate, costs, one, select, variants
from foveate.measure.accuracy import drops
from foveate.measure.table import frame
from foveate.measure.variants import fresh


def by_hand(model: nn.Module, batches, top: int = 1) -> float:
    right = total = 0
    for images, labels, _ in batches():
        with torch.no_grad():
            answer = model(images)
        best = getattr(answer, "logits", answer).topk(top).indices
        right += int((best == labels[:, None]).any(1).sum())
        total += len(labels)
    return 100 * right / total


def test_accuracy_is_what_counting_by_hand_gives() -> None:
    batches, model = demo_batches(), demo_vit()
    found = accuracy(model, batches, classes=10)
    assert found.images == 60
    assert found.top1 == by_hand(model, batches) and 50 < found.top1 < 100
    assert found.top5 == by_hand(model, batches, 5)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_batch_does_not_matter(batch: int) -> None:
    model = randomise(vit()).eval()
    assert accuracy(model, small_batches(batch=batch)) == accuracy(model, small_batches(batch=2))


def test_reduced_and_hugging_face_models() -> None:
    reduced = foveate.apply(demo_vit(), "ats(K=20)").eval()
    batches = demo_batches()
    assert accuracy(reduced, batches).top1 == by_hand(reduced, batches)
    model = randomise(hf("ViTForImageClassification")).eval()
    for each in (model, foveate.apply(model, "evit(keep=0.5)").eval()):
        assert accuracy(each, small_batches()).top1 == by_hand(each, small_batches())


def test_no_top5_of_few_classes() -> None:
    assert accuracy(vit(num_classes=5), small_batches(classes=5)).top5 is None
    assert accuracy(vit(num_classes=6), small_batches(classes=6)).top5 is not None


def test_the_model_is_left_in_the_modes_it_was_in() -> None:
    model = vit(proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    first = accuracy(model, small_batches())
    assert [module.training for module in model.modules()] == before
    assert accuracy(model, small_batches()) == first  # no dropout
    model(noise(1, 3, 48, 48)).sum().backward()  # nothing is left in inference mode


def test_bf16_is_mixed_precision() -> None:
    model = vit().eval()
    with answering(model, precision="bf16"):
        assert model(noise(1, 3, 48, 48)).dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'bf16'; got 'fp16'"):
        accuracy(model, small_batches(), precision="fp16")


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="has 12 classes and the model 10 outputs"):
        accuracy(vit(), small_batches(), classes=12)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, the model's outputs; got"):
        accuracy(vit(num_classes=2), small_batches())
    with pytest.raises(ValueError, match="gave no image"):
        accuracy(vit(), lambda: iter(()))
    with pytest.raises(ValueError, match="contain NaN or infinity"):
        Tally().add(torch.full((1, 3), float("nan")), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="are needed; the model answers"):
        Tally().add(torch.zeros(1, 3, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="no logits"):
        accuracy(hf("ViTModel"), made(noise(1, 3, 48, 48), torch.zeros(1).long(), 1))


# Rates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rates", "names"),
    [
        ("evit", (0.5, 0.7), ["evit(keep=0.5)", "evit(keep=0.7)"]),
        ("evit(rest='drop')", (0.5,), ["evit(keep=0.5, rest='drop')"]),
        ("tome", (2.0, 3), ["tome(r=2)", "tome(r=3)"]),
        ("ats", (20,), ["ats(K=20)"]),
    ],
)
def test_rows_by_rate(method: str, rates: tuple[float, ...], names: list[str]) -> None:
    model, batches = demo_vit(), demo_batches()
    found = variants(model, [method], rates)
    assert list(found) == ["dense", *names]
    table = costs(found, batches, classes=10)
    assert list(dict.fromkeys(table["method"])) == ["", *names]
    pictures = torch.cat([images for images, _, _ in batches()])
    for name, rate in zip(names, rates, strict=True):
        alone = foveate.apply(model, name, check=False).eval()
        own = select(table, method=name)
        assert one(own, "top1") == by_hand(alone, batches) and set(own["rate"]) == {rate}
        counted = foveate.count(alone, images=pictures) if method == "ats" else foveate.count(alone)
        assert one(own, "macs") == pytest.approx(counted.macs)
        assert one(own, "tokens") == counted.tokens[-1]
        assert one(own, "dense_macs") == foveate.count(model).macs
        assert ("measured" in set(own["metric"])) == (method == "ats")


def test_a_trained_model_keeps_its_parameters_at_another_rate() -> None:
    trained = randomise(foveate.apply(vit(), "dynamicvit(keep=0.7)"))
    other = at_rate(trained, None, 0.4)
    assert other.reducer.keep == 0.4 and other.vit is trained.vit
    text = "dynamicvit(keep=0.3, gate='argmax')"  # other options of its own method too
    named = variants(trained, [text])[text]
    for model in (other, named):
        for name, value in trained.reducer.state_dict().items():
            assert torch.equal(model.reducer.state_dict()[name], value)
    assert not fresh(trained, other) and fresh(vit(), at_rate(vit(), "dynamicvit", 0.4))


def test_rates_that_cannot_be() -> None:
    model = vit()
    with pytest.raises(ValueError, match="tome at rate 1.3: r must be a whole number"):
        at_rate(model, "tome", 1.3)
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\], got 1.5"):
        at_rate(model, "evit", 1.5)
    with pytest.raises(ValueError, match="has no rate that could be set to 2"):
        at_rate(model, "structural", 2)
    with pytest.raises(ValueError, match="gate='topk' keeps as much as keep says"):
        at_rate(model, "svit", 0.5)
    with pytest.raises(ValueError, match="has its own method evit"):
        at_rate(foveate.apply(model, "evit"), "tome", 2)
    with pytest.raises(ValueError, match="no method of its own"):
        at_rate(model, None, 0.5)
    with pytest.raises(ValueError, match="did you mean 'evit'"):
        variants(model, ["evitt"], [0.5])


def test_variants_of_a_model() -> None:
    model = vit()
    found = variants(model, ["evit", "tome(r=2)", "static"], [0.5, 0.7])
    assert list(found) == [
        *("dense", "evit(keep=0.5)", "evit(keep=0.7)", "tome(r=2)"),
        *("static(keep=0.5)", "static(keep=0.7)"),
    ]
    assert found["dense"] is model
    untrained = {name for name, variant in found.items() if fresh(model, variant)}
    assert untrained == {"static(keep=0.5)", "static(keep=0.7)"}
    reduced = foveate.apply(model, "evit(keep=0.7)")
    found = variants(reduced, (), [0.5])
    assert list(found) == ["dense", "evit(keep=0.7)", "evit(keep=0.5)"]
    assert found["dense"] is model and found["evit(keep=0.7)"] is reduced
    with pytest.raises(ValueError, match="has its own method evit"):
        variants(reduced, ["tome(r=2)"])


def test_new_parameters_follow_the_seed() -> None:
    model = vit()

    def drawn(seed: int) -> torch.Tensor:
        before = torch.random.get_rng_state()
        found = variants(model, ["dynamicvit"], seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return found["dynamicvit(keep=0.7)"].reducer.predictors[0].out[1].weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_several_models_in_one_pass() -> None:
    passes = 0

    def counted():
        nonlocal passes
        passes += 1
        return demo_batches()()

    model = demo_vit()
    table = costs(variants(model, ["random"], [0.3, 0.7]), counted)
    assert passes == 1
    dense = select(table, method="")
    assert one(dense, "top1") == accuracy(model, demo_batches()).top1
    assert one(dense, "macs") == one(dense, "dense_macs")
    with pytest.raises(ValueError, match="no model was given"):
        costs({}, counted)


def test_a_model_that_is_no_vit_has_an_accuracy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    table = costs({"linear": model}, demo_batches())
    assert one(table, "top1") == by_hand(model, demo_batches())
    assert "macs" not in set(table["metric"])


def test_drops_are_paired_by_seed() -> None:
    def top1(value: float, seed: int | None, method: str = "", run: str = "a") -> dict:
        return {
            **{"run": run, "part": "accuracy", "method": method, "seed": seed},
            **{"metric": "top1", "value": value},
        }

    table = frame(
        [
            *(top1(80, 0), top1(82, 1), top1(79, 0, "evit"), top1(85, 1, "evit")),
            *(top1(70, 2, "evit"), top1(60, None, run="b"), top1(50, 1, "evit", "b")),
        ]
    )
    found = drops(table)
    assert found[["run", "seed", "value"]].values.tolist() == [
        *(["a", 0, 1.0], ["a", 1, -3.0]),  # nothing to compare seed 2 with
        ["b", 1, 10.0],  # a dense model that all seeds share
    ]
    assert set(found["metric"]) == {"drop"} and set(found["method"]) == {"evit"}
