"""Losses against numbers that are computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import checkpoint, finetune, reduce, run, small_model
from small import noise
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.core.losses import distillation, hard_distillation, token_distillation
from foveate.train.build import make_finetune, make_reduce
from foveate.train.draws import Draws, seed_step
from foveate.train.finetune import FinetuneTask
from foveate.train.images import ClassificationTask
from foveate.train.optim import make_optimiser
from foveate.train.recipe import Data, Distill, Mix, Optim
from foveate.train.reduce import ReduceTask, own_weights
from foveate.train.task import total

DRAWS = Draws(0, 0, 0)


def probabilities(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def divergence(of: list[float], other: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(of, other, strict=True))


def test_distillation_is_teacher_against_student() -> None:
    student, teacher = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], [[0.0, 3.0, 0.5], [1.0, 1.0, -2.0]]
    pairs = [
        (probabilities(t, 2.0), probabilities(s, 2.0))
        for s, t in zip(student, teacher, strict=True)
    ]
    wanted = 4.0 * sum(divergence(t, s) for t, s in pairs) / 2  # tau^2, a mean over images alone
    other = 4.0 * sum(divergence(s, t) for t, s in pairs) / 2
    found = float(distillation(torch.tensor(student), torch.tensor(teacher), 2.0))
    assert found == pytest.approx(wanted, rel=1e-5) and abs(found - other) > 0.1
    assert float(distillation(torch.tensor(student), torch.tensor(student))) == pytest.approx(0)


def test_hard_distillation_takes_the_decision() -> None:
    student = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]
    teacher = torch.tensor([[0.0, 3.0, 0.5], [1.0, 0.0, 0.0]])  # decides 1 and 0
    wanted = -(
        math.log(probabilities(student[0], 1)[1]) + math.log(probabilities(student[1], 1)[0])
    )
    found = float(hard_distillation(torch.tensor(student), teacher))
    assert found == pytest.approx(wanted / 2, rel=1e-5)


def test_token_distillation_counts_kept_tokens() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 1.0], [5.0, 5.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.0], [9.0, 9.0]], [[3.0, 3.0], [0.0, 1.0]]])
    kept = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    square = token_distillation(tokens, teacher, kept)
    each = [(1 + 4) / 2, (0 + 4) / 2, (25 + 16) / 2]
    assert float(square.detach()) == pytest.approx(sum(each) / 3)
    square.backward()
    assert kept.grad is None and not tokens.grad[0, 1].any() and tokens.grad[1, 1].all()
    pairs = [([0.0, 0.0], [1.0, 2.0]), ([3.0, 3.0], [3.0, 1.0]), ([0.0, 1.0], [5.0, 5.0])]
    wanted = [divergence(probabilities(t, 1), probabilities(s, 1)) for t, s in pairs]
    found = float(token_distillation(tokens.detach(), teacher, kept.detach(), "kl"))
    assert found == pytest.approx(sum(wanted) / 3, rel=1e-5)


@pytest.mark.parametrize("how", ["mse", "kl"])
def test_nothing_kept_costs_nothing(how: str) -> None:
    tokens = noise(2, 3, 4).requires_grad_()
    loss = token_distillation(tokens, noise(2, 3, 4, seed=1), torch.zeros(2, 3), how)
    loss.backward()
    assert float(loss.detach()) == 0 and tokens.grad is not None and not tokens.grad.any()


def test_the_sum_weighs_and_leaves_out() -> None:
    losses = {"class": torch.tensor(2.0), "kl": torch.tensor(3.0), "bad": torch.tensor(math.nan)}
    assert float(total(losses, {"kl": 0.5, "bad": 0.0})) == 3.5


def mixing(mix: Mix, mean: float, std: float, batch: int = 2) -> ClassificationTask:
    data = Data(mean=(mean,), std=(std,), batch=batch)
    return ClassificationTask(small_model(num_classes=4), 4, data, mix)


def batch_of(pixels: Tensor, labels: list[int]) -> dict[str, Tensor]:
    return {"image": pixels, "label": torch.tensor(labels)}


def test_label_smoothing() -> None:
    task = mixing(Mix(smoothing=0.1), 0.5, 0.25)
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    x, soft = task.mixed(batch_of(pixels, [1, 3]))
    assert x.flatten().tolist() == pytest.approx([-2.0, 2.0])
    assert soft.tolist() == [
        pytest.approx([0.025, 0.925, 0.025, 0.025]),
        pytest.approx([0.025, 0.025, 0.025, 0.925]),
    ]
    logits = noise(2, 4)
    wanted = F.cross_entropy(logits, torch.tensor([1, 3]), label_smoothing=0.1)
    assert float(F.cross_entropy(logits, soft)) == pytest.approx(float(wanted), rel=1e-5)
    plain = mixing(Mix(), 0.5, 0.25)
    assert plain.mixed(batch_of(pixels, [1, 3]))[1].tolist() == [1, 3]
    done = torch.tensor([[[[0.5]]], [[[-3.0]]]])  # a data set's own transform has normalised these
    assert plain.pixels({"image": done}) is done


def test_mixup_mixes_images_and_labels_alike() -> None:
    task = mixing(Mix(mixup=1.0, smoothing=0.2), 0.0, 1.0, batch=4)
    pixels = torch.tensor([0, 85, 170, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    seed_step(0, 0, 0)
    x, soft = task.mixed(batch_of(pixels.expand(-1, -1, 4, 4), [0, 1, 2, 3]))
    first, last = x[0, 0, 0, 0].item(), x[3, 0, 0, 0].item()
    share = 1 - first  # of image 0, which is black; its partner is the white image 3
    assert 0.01 < share < 0.99 and last == pytest.approx(share, abs=1e-5)
    on, off = 0.85, 0.05
    wanted = [share * on + (1 - share) * off, off, off, share * off + (1 - share) * on]
    assert soft[0].tolist() == pytest.approx(wanted, abs=1e-5)
    assert soft.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_erasing_is_for_training() -> None:
    task = mixing(Mix(erase=1.0), 0.5, 0.5)
    pixels = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    seed_step(0, 0, 0)
    x, _ = task.mixed(batch_of(pixels, [0, 1]))
    assert all(0 < int((image != 1).sum()) < 64 for image in x)
    assert bool((task.pixels({"image": pixels}) == 1).all()) and int(pixels.min()) == 255


# Methods -----------------------------------------------------------------------------------------

PAPERS = {
    "dynamicvit": {"ratio": 2.0, "kl": 0.5, "token": 0.5},
    "spvit(keep=0.7)": {"ratio": 2.0, "kl": 0.5, "token": 0.5},
    "svit": {"ratio": 4.0},
    "evovit(aux=True)": {"class": 0.5, "aux": 0.5},
    "evovit": {},
    "evit": {},
    "dynamicvit(blocks=[1]) + svit(blocks=[2])": {
        **{"dynamicvit.ratio": 2.0, "kl": 0.5, "token": 0.5, "svit.ratio": 4.0}
    },
}


def images(count: int = 4) -> Tensor:
    return noise(count, 1, 28, 28)


def step() -> dict[str, Tensor]:
    """A batch of images that are normalised already, of four classes."""
    return {"image": images(), "label": torch.arange(4)}


def taught(model: Any, teacher: Any = None, **options: Any) -> ReduceTask:
    task = ReduceTask(model, 10, **options)
    if teacher is not None and task.needs_teacher:
        task.learn_from(teacher)
    return task


@pytest.mark.parametrize("method", PAPERS)
def test_weights_are_the_papers(method: str) -> None:
    """The method's own, and what the sum of a step is then made of."""
    model = foveate.apply(small_model(), method, check=False).train()
    assert own_weights(model) == PAPERS[method]
    legal = {"class": 1.0, "kl": 0.0, **PAPERS[method]}
    task = taught(model, small_model(depth=2)).train()
    assert task.weights == legal
    torch.manual_seed(0)
    losses = task.training_step(step(), DRAWS)
    torch.manual_seed(0)
    logits = task.model.run(images()).logits.detach()
    losses = {name: value.detach() for name, value in losses.items()}
    computed = set(losses)
    assert computed == {name for name, weight in legal.items() if weight}
    assert float(losses["class"]) == pytest.approx(float(F.cross_entropy(logits, torch.arange(4))))
    wanted = sum(legal[name] * float(value) for name, value in losses.items())
    assert float(total(losses, task.weights)) == pytest.approx(wanted, rel=1e-5)


def test_weights_can_be_given() -> None:
    model = foveate.apply(small_model(), "dynamicvit", check=False)
    task = taught(model, weights={"kl": 0, "token": 0, "ratio": 7})
    assert task.weights == {"class": 1.0, "ratio": 7, "kl": 0, "token": 0}
    with pytest.raises(ValueError, match="unknown loss of dynamicvit 'rato'; did you mean 'ratio'"):
        taught(model, weights={"rato": 1.0})
    with pytest.raises(ValueError, match="the losses kl and token need a teacher"):
        taught(model).train().training_step(step(), DRAWS)
    with pytest.raises(ValueError, match="the teacher has width 48, the student 32"):
        taught(model, small_model(embed_dim=48))


def shares(task: ReduceTask) -> Any:
    """What each gate kept of each image: of the patches, and what it aims at."""
    outcome = task.model.run(images())
    part = task.model.reducer
    return outcome.notes[f"{part.name}.kept_share"], task.model.reducer.losses(outcome)


def test_ratio_losses_of_images_and_of_batches() -> None:
    for method, of_batch in (
        ("dynamicvit(keep=0.5)", False),
        ("svit(keep=0.5)", True),
        ("svit(keep=0.5, ratio='fixed')", False),
        ("spvit(keep=0.5)", True),
    ):
        task = taught(foveate.apply(small_model(), method, check=False), small_model()).train()
        torch.manual_seed(3)
        with torch.no_grad():
            kept, losses = shares(task)
        stages = len(kept)
        assert stages == len(task.model.reducer.active_blocks) > 1
        wanted = 0.0
        for stage, share in kept.items():
            aim = 0.5 ** (stage + 1) if "svit" not in method else 0.5 ** (1 + 3 * stage // stages)
            values = [float(share.mean())] if of_batch else share.tolist()
            wanted += sum((value - aim) ** 2 for value in values) / len(values) / stages
        assert float(losses["ratio"]) == pytest.approx(wanted, rel=1e-4), method


def test_auxiliary_loss_of_evovit() -> None:
    model = foveate.apply(small_model(), "evovit(aux=True)", check=False)
    task = taught(model).train()
    with torch.no_grad():
        notes = model.run(images()).notes
        wanted = F.cross_entropy(notes["evovit.aux_logits"], torch.arange(4))
        losses = task.training_step(step(), DRAWS)
    assert float(losses["aux"]) == pytest.approx(float(wanted))
    assert abs(float(losses["aux"]) - float(losses["class"])) > 1e-4


def test_final_tokens_are_compared_where_they_were_kept() -> None:
    start, teacher = small_model(), small_model()
    task = taught(foveate.apply(start, "dynamicvit(keep=0.5)", check=False), teacher).train()
    torch.manual_seed(5)
    found = task.training_step(step(), DRAWS)
    torch.manual_seed(5)
    with torch.no_grad():
        outcome = task.model.run(images())
        kept = outcome.state.alive[:, 1:]
        assert 0 < float(kept.mean()) < 1
        wanted = teacher.forward_features(images())[:, 1:]
        each = (outcome.state.tokens()[:, 1:] - wanted).square().mean(-1)
        logits = teacher(images())
    token = float((each * kept).sum() / kept.sum())
    assert float(found["token"].detach()) == pytest.approx(token, rel=1e-4)
    own, its = (x.double().log_softmax(-1) for x in (outcome.logits, logits))
    kl = float((its.exp() * (its - own)).sum(1).mean())
    assert float(found["kl"].detach()) == pytest.approx(kl, rel=1e-2)


# The teacher -------------------------------------------------------------------------------------


def tasks() -> dict[str, ClassificationTask]:
    reduced = foveate.apply(small_model(), "dynamicvit", check=False)
    soft, teacher = Distill(kind="soft"), small_model(depth=2)
    return {
        "finetune": FinetuneTask(small_model(), 10, distill=soft, teacher=teacher),
        "reduce": taught(reduced, small_model(depth=2)),
    }


@pytest.mark.parametrize("job", ["finetune", "reduce"])
def test_the_teacher_stays_as_it_is(job: str) -> None:
    """In evaluation mode, without gradients, in no group; but it is saved with the run."""
    task = tasks()[job]
    teacher = task.teacher
    assert teacher is not None and not teacher.training
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    task.train()
    assert task.model.training and not any(part.training for part in teacher.modules())
    optimiser = make_optimiser(task, Optim(), 0.1)
    losses = task.training_step(step(), DRAWS)
    total(losses, task.weights).backward()
    optimiser.step()
    mine = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert all(p.grad is None and id(p) not in mine for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert len(task.state_dict()) == len(task.model.state_dict()) + len(before)


def test_the_start_teaches_as_it_was(tmp_path: Path) -> None:
    """Without a name the teacher is the start, and training does not reach it."""
    start = checkpoint(tmp_path / "start.safetensors")
    recipe = finetune(model={"start": start}, distill={"kind": "soft"})
    task = make_finetune(recipe, 10)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1)
    assert task.teacher is not None
    with torch.no_grad():
        assert torch.equal(task.teacher(images()), small_model().eval()(images()))
    run(recipe, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        for part in ("model", "teacher"):
            prefix = f"task.{part}."
            names = {k.removeprefix(prefix) for k in content["state_dict"] if k.startswith(prefix)}
            assert names == {*small_model().state_dict()}
        taught = content["state_dict"]["task.teacher.head.weight"]
        assert torch.equal(taught, small_model().head.weight)


def test_a_teacher_that_is_used_to_other_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = finetune("loop.max_steps=1", distill={"kind": "soft", "teacher": "demo"})
    recipe.model.options = {**recipe.model.options, "patch_size": 4}
    run(recipe, tmp_path / "same")
    assert "teacher" not in caplog.text
    recipe.data.mean = (0.5,)
    run(recipe, tmp_path / "other")
    assert "the teacher knows images of mean [0.286" in caplog.text
    assert "is shown the model's, of [0.5]" in caplog.text


def test_a_new_head_cannot_teach(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start.safetensors", num_classes=0)
    with pytest.raises(ValueError, match="cannot teach, its head for 10 classes is new"):
        make_finetune(finetune(model={"start": start}, distill={"kind": "soft"}), 10)
    with pytest.raises(ValueError, match="cannot teach, its head for 10 classes is new"):
        make_reduce(reduce("dynamicvit", model={"start": start}), 10)
    with pytest.raises(ValueError, match="nothing to learn from: the model starts from scratch"):
        make_reduce(reduce("dynamicvit"), 10)
    make_reduce(reduce("dynamicvit", "weights.kl=0", "weights.token=0"), 10)
