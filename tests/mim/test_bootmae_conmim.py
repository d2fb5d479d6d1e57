"""Methods with a teacher: the originals' answers, losses by hand, schedules, views, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.golden_files import golden, released
from golden.golden_files import images as golden_images
from masked_models import GRID, PATCH, beit, close, forms, images, mask, method, vit
from small import noise
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

import foveate
from foveate.cli import main
from foveate.data import seeded
from foveate.mim import BootMAE, ConMIM, Hiding, Mask, Mto, TaughtModel, make_method
from foveate.mim.bootmae import emphasis
from foveate.mim.conmim import BatchNorm
from foveate.mim.encoders import sincos_positions
from foveate.mim.targets import patchify, unpatchify
from foveate.mim.task import PretrainTask
from foveate.mim.teacher import SecondView, follow, make_teacher
from foveate.mim.weights import load_weights, method_of, options_of
from foveate.train.draws import Draws
from foveate.train.optim import make_optimiser
from foveate.train.recipe import Optim
from foveate.train.task import total

BOTH = pytest.mark.parametrize("name", ["bootmae", "conmim"])
ALL = forms("bootmae", "conmim")
EVERY = pytest.mark.parametrize("form", ALL)


# The originals' answers --------------------------------------------------------------------------


def converted(name: str, tmp_path: Path) -> tuple[TaughtModel, dict[str, Tensor]]:
    """A released checkpoint through the command, opened as a run's weights are."""
    state, answers = golden(name)
    out = tmp_path / f"{name}.safetensors"
    words = ["convert", str(released(state, tmp_path)), str(out), "--pretraining"]
    assert main([*words, "--num-heads", "3"]) == 0
    assert method_of(out) == name
    model = make_method(name, foveate.load(out), options_of(out)).eval()
    load_weights(model, out)
    return model, answers


def test_the_reference_answers_of_bootmae(tmp_path: Path) -> None:
    model, answers = converted("bootmae", tmp_path)
    assert model.depth == 2 and model.options["decoder_width"] == 48
    order = answers["shuffle"].long()
    hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :49], False)
    hiding = Mask(hidden, order[:, :49], order[:, 49:])
    said: dict[str, Tensor] = {}
    model.feature.register_forward_hook(lambda _, __, out: said.update(features=out[0]))
    with torch.no_grad():
        found = model(golden_images(), hiding)
        target = model.target(golden_images())
    close(said["features"], answers["features"], 1e-4)
    close(target, answers["full_features"], 1e-4)
    drawn = unpatchify(found.patches, (14, 14), (16, 16))
    torch.testing.assert_close(drawn, answers["pixels"].float(), atol=2e-3, rtol=0)


def test_the_reference_answers_of_conmim(tmp_path: Path) -> None:
    model, answers = converted("conmim", tmp_path)
    assert isinstance(model.vit, Beit) and model.options["projector_out"] == 32
    model.train()  # its answers are of the batch's statistics
    with torch.no_grad():
        target = model.target(golden_images().flip(-1))
        found = model(golden_images(), Mask.of(answers["mask"].bool()), target=target)
    close(target, answers["teacher"], 1e-4)
    close(found.patches, answers["student"], 1e-4)
    close(found.losses["contrast"].reshape(-1), answers["loss"], 1e-4)


def test_released_encoders(tmp_path: Path) -> None:
    """With and without what was only pre-trained; without it somebody must say what it is."""
    for name in ("bootmae", "conmim"):
        state, answers = golden(name)
        own = ("decode_", "down", "lm_head", "de_pos", "mask_token", "projectors")
        alone = {key: value for key, value in state.items() if not key.startswith(own)}
        found = []
        for weights, options in ((state, {}), (alone, {"origin": name})):
            path = released(weights, tmp_path)
            model = foveate.load(path, num_heads=3, **options)
            with torch.no_grad():
                found.append(model.forward_features(golden_images()))
        assert torch.equal(*found)
        if name == "bootmae":
            target = answers["full_features"]
            wanted = F.layer_norm(target, (48,), state["norm.weight"], state["norm.bias"], 1e-6)
            close(found[0][:, 1:], wanted, 1e-4)
            with pytest.raises(ValueError, match="origin='bootmae' if it is BootMAE's encoder"):
                foveate.load(path, num_heads=3)


# What is seen ------------------------------------------------------------------------------------


def test_each_regressor_reads_a_layer_of_its_own() -> None:
    """Pixels the first block's tokens, features the last one's; both the encoder's output."""
    model, x, hiding = method("bootmae", vit(depth=3)), images(), mask()
    layers: list[Tensor] = []
    encoded = model.vit.norm(model.backbone.through(model.visible(x, hiding), GRID, layers.append))
    said: dict[str, tuple[Any, ...]] = {}
    for name in ("pixel", "feature"):
        part = getattr(model, name)
        part.register_forward_pre_hook(lambda _, given, name=name: said.update({name: given[:2]}))
    model(x, hiding)
    for name, layer in (("pixel", 0), ("feature", 2)):
        close(said[name][0], encoded)
        close(said[name][1], layers[layer])


@EVERY
def test_states(form: str) -> None:
    model, x, hiding = ALL[form](), images(), mask()
    with torch.no_grad():
        networks = model(x, hiding, states=True).states
        assert model(x, hiding).states == ()
    boot = model.name == "bootmae"
    owners = (model.pixel, model.feature) if boot else (model,)
    assert len(networks) == len(owners)
    for network, owner in zip(networks, owners, strict=True):
        assert len(network.tokens) == model.depth + 1 == 3
        hidden = network.initial[hiding.hidden]
        assert torch.equal(hidden, owner.mask_token[0].expand_as(hidden))
        if boot:  # positions are of hidden tokens alone
            places = network.tokens[0] - network.initial
            assert not places[~hiding.hidden].any()
            wanted = sincos_positions(GRID, places.shape[-1], 0).expand_as(places)
            close(places[hiding.hidden], wanted[hiding.hidden])


@pytest.mark.parametrize("size", [(36, 20), (28, 32)])
@BOTH
def test_images_of_another_size(name: str, size: tuple[int, int]) -> None:
    model, x = method(name), images(2, size)
    patches = size[0] * size[1] // 16
    found = model(x, mask(2, patches, int(0.7 * patches)), states=True)
    assert found.patches.shape[:2] == (2, patches)
    assert all(len(layer[0]) == patches for state in found.states for layer in state.tokens)
    assert sum(found.losses.values()).isfinite() and model.painted(x, found).shape == x.shape


# Losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_losses_of_bootmae_by_hand(channels: int) -> None:
    model = method("bootmae", vit(in_chans=channels))
    x, hiding = images(2, channels=channels), mask()
    said: dict[str, Tensor] = {}
    model.feature.register_forward_hook(lambda _, __, out: said.update(features=out[0]))
    target = noise(2, 49, 32, seed=4)
    found = model(x, hiding, target=target)
    wanted = {"pixel": 0.0, "feature": 0.0}
    for image in range(2):
        grid = hiding.hidden[image].view(GRID)
        for number in hiding.hidden[image].nonzero().flatten().tolist():
            row, column = divmod(number, 7)
            near = [
                float(grid[r, c])
                for r in range(row - 1, row + 2)
                for c in range(column - 1, column + 2)
                if 0 <= r < 7 and 0 <= c < 7
            ]
            weight = 1 + sum(near) / 9
            cut = x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            mean, var = (
                cut.mean((1, 2), keepdim=True),
                cut.var((1, 2), unbiased=False, keepdim=True),
            )
            cut = ((cut - mean) / (var + 1e-5).sqrt()).permute(1, 2, 0).flatten()
            error = (found.patches[image, number] - cut).square().mean()
            wanted["pixel"] += weight * error.item() / hiding.hidden.sum().item()
            mine, its = (
                (row - row.mean()) / (row.var(unbiased=False) + 1e-6).sqrt()
                for row in (said["features"][image, number], target[image, number])
            )
            error = (mine - its).square().mean()
            wanted["feature"] += weight * error.item() / hiding.hidden.sum().item()
    assert found.losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found.losses[name].item() == pytest.approx(value, rel=1e-4)


def test_the_loss_of_conmim_by_hand() -> None:
    model, x, hiding = method("conmim", beit(), temperature=0.2), images(), mask()
    target = noise(2, 49, 12, seed=4)
    found = model(x, hiding, target=target)
    each = []
    for image, number in hiding.hidden.nonzero().tolist():
        one = found.patches[image, number]
        row = torch.stack([F.cosine_similarity(one, key, 0) / 0.2 for key in target[image]])
        each.append(-row.log_softmax(0)[number])
    close(found.losses["contrast"], torch.stack(each).mean())


def test_masks_of_unequal_counts() -> None:
    """ConMIM compares images of their own; BootMAE says that it cannot."""
    hidden = noise(3, 49) > torch.tensor([[-1.0], [0.0], [1.0]])
    model, x = method("conmim", beit()), images(3)
    whole = model(x, Mask.of(hidden)).losses["contrast"]
    alone = [model(x[i : i + 1], Mask.of(hidden[i : i + 1])).losses["contrast"] for i in range(3)]
    close(whole, (hidden.sum(1) / hidden.sum() * torch.stack(alone)).sum())
    with pytest.raises(ValueError, match="^bootmae needs masks that hide as many patches in every"):
        method("bootmae")(x, Mask.of(hidden))


def test_emphasis_lies_between_one_and_two() -> None:
    """A5: zero where a patch is seen, less at the border, where the mean counts what is not."""
    hidden = mask().hidden
    found = emphasis(hidden, GRID)
    assert torch.equal(found > 0, hidden) and found[hidden].min() >= 1 and found.max() <= 2
    whole = emphasis(torch.ones(1, 49, dtype=torch.bool), GRID).view(GRID)
    close(whole[0, 0], torch.tensor(1 + 4 / 9))
    close(whole[0, 3], torch.tensor(1 + 6 / 9))
    assert (whole[1:-1, 1:-1] == 2).all()


def test_a_new_model_finds_nothing() -> None:
    """A6: close to log N, as if all patches were alike; finding all of them costs little."""
    torch.manual_seed(0)
    model = make_method("conmim", beit(), {"projector_width": 256, "projector_out": 256})
    model.initialise()
    model.train()
    loss = model(images(8), mask(8), target=noise(8, 49, 256, seed=1)).losses["contrast"].item()
    assert loss == pytest.approx(math.log(49), rel=0.1)
    target = F.one_hot(torch.arange(49), 49).float()[None]
    model.projector = nn.Identity()
    model._project = lambda tokens: target.expand(len(tokens), -1, -1)
    assert model(images(1), mask(1), target=target).losses["contrast"].item() < 0.01


# Pictures ----------------------------------------------------------------------------------------


def test_what_is_painted() -> None:
    """BootMAE's right answer is the image; ConMIM's is made of the patches that it finds."""
    x, hiding = images(channels=3), mask()
    boot = method("bootmae", vit(in_chans=3))
    true = patchify(x, PATCH).unflatten(-1, (-1, 3))
    var, mean = torch.var_mean(true, -2, unbiased=False, keepdim=True)
    found = boot(x, hiding)
    found.patches = ((true - mean) / (var + 1e-5).sqrt()).flatten(-2)
    close(boot.painted(x, found), x, 1e-4)
    con = method("conmim", vit(in_chans=3))
    found.patches = con.target(x)
    assert torch.equal(con.painted(x, found), x)
    found.patches = found.patches.roll(1, 1)
    moved = unpatchify(patchify(x, PATCH).roll(1, 1), GRID, PATCH)
    assert torch.equal(con.painted(x, found), moved)


# Teachers ----------------------------------------------------------------------------------------


def task(name: str, **options: Any) -> PretrainTask:
    return PretrainTask(method(name), Hiding(kind="random"), **options)


@BOTH
def test_a_teacher_gets_no_gradient_and_no_place_in_the_optimiser(name: str) -> None:
    """A7 and T7; and what is exported has none of it."""
    found = task(name, mto=Mto(ramp=0.0))
    assert found.teacher is not None
    losses = found.training_step({"image": images()}, Draws(0, 0, 0))
    assert losses.keys() > {"mto_spa", "mto_e", "mto_r"}
    total(losses, found.weights).backward()
    teachers = list(found.teacher.parameters())
    assert teachers and all(p.grad is None and not p.requires_grad for p in teachers)
    groups = make_optimiser(found, Optim(), 1e-3).param_groups
    known = {id(p) for group in groups for p in group["params"]}
    assert not known & {id(p) for p in teachers}
    assert not any("teacher" in key for key in found.model.state_dict())
    assert any(key.startswith("teacher.vit.") for key in found.state_dict())  # saved and resumed


@BOTH
def test_a_teacher_begins_as_a_copy_and_follows(name: str) -> None:
    found = task(name)
    teacher, before = found.teacher, copy.deepcopy(found.teacher.state_dict())
    mine = found.model.state_dict()
    assert before.keys() <= mine.keys() and all(torch.equal(v, mine[k]) for k, v in before.items())
    learnt = {key for key, _ in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1.0)
        for buffer in found.model.buffers():
            buffer.add_(1)
    momentum = 0.999 if name == "bootmae" else 0.996
    found.set_progress(0.0, found.model)
    found.after_update()
    for key, value in teacher.state_dict().items():
        close(value.float(), before[key] + (1 - momentum) * (key in learnt), 1e-6)


def test_the_teacher_of_bootmae_is_an_encoder_in_evaluation_mode() -> None:
    found = task("bootmae").train()
    assert found.model.training and not found.teacher.training
    assert not any(key.startswith(("pixel", "feature")) for key in found.teacher.state_dict())


def test_the_teacher_of_conmim_trains_its_batch_norms() -> None:
    """They see the batch, and keep statistics of their own."""
    found = task("conmim").train()
    assert found.teacher.training
    norms = [part.projector[1] for part in (found.teacher, found.model)]
    found.training_step({"image": images(), "view": images().flip(-1)}, Draws(0, 0, 0))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)
    assert not found.eval().teacher.training


def test_momentum_and_weights_of_bootmae() -> None:
    """A5 and A10: one value an epoch, in three pieces; features grow over a quarter."""
    model = method("bootmae")
    for epoch, wanted in (
        (0, 0.999),
        (50, 0.99945),
        (100, 0.9999),
        (250, 0.999945),
        (400, 0.99999),
        (799, 0.99999),
    ):
        for inside in (0.0, 0.5, 0.999):
            progress = (epoch + inside) / 800
            assert model.momentum_at(progress, 800) == pytest.approx(wanted, abs=1e-12)
            grown = min(1, 4 * (epoch + 1) / 800)
            assert model.weights_at(progress, 800) == {"feature": pytest.approx(grown)}
    assert model.momentum_at(1.0, 800) == pytest.approx(0.99999)
    for epochs in (3, 7, 60):  # a share of the run that is a hair below its epoch
        for epoch in range(epochs):
            step = epoch * 19 / (epochs * 19)
            assert model.weights_at(step, epochs)["feature"] == min(
                1.0, (epoch + 1) / epochs / 0.25
            )


def test_momentum_of_conmim() -> None:
    model = method("conmim")
    assert model.momentum_at(0.0, 800) == pytest.approx(0.996, abs=1e-12)
    assert model.momentum_at(0.5, 800) == pytest.approx(0.998, abs=1e-12)
    assert model.momentum_at(1.0, 800) == 1.0
    assert model.weights_at(0.5, 800) == {}


def test_the_task_sets_what_changes() -> None:
    found = task("bootmae", epochs=8, mto=Mto(ramp=0.5))
    assert found.weights == {"mto_spa": 0, "mto_e": 0, "mto_r": 0, "feature": 0.5}
    found.set_progress(0.25, found.model)
    assert found.weights["feature"] == 1 and found.weights["mto_e"] == pytest.approx(0.05)
    assert found._momentum == pytest.approx(0.9999 + (0.99999 - 0.9999) / 3)


def test_teachers_that_do_not_fit() -> None:
    student = method("conmim")
    other = method("conmim", vit(depth=3)).slow_copy()
    with pytest.raises(
        ValueError, match="^the teacher does not fit its student: vit.blocks.2.*miss"
    ):
        PretrainTask(student, Hiding(kind="random"), teacher=other)
    wide = method("conmim", projector_out=8).slow_copy()
    with pytest.raises(
        ValueError, match=r"projector.6.weight is \[8, 24\] in .* and \[12, 24\] in"
    ):
        make_teacher(student, wide)
    with pytest.raises(ValueError, match="^simmim has no teacher: leave it out$"):
        PretrainTask(method("simmim"), Hiding(kind="random"), teacher=wide)
    fitting = method("conmim").slow_copy()
    with torch.no_grad():
        fitting.projector[0].weight.zero_()
    found = PretrainTask(student, Hiding(kind="random"), teacher=fitting)
    assert not found.teacher.projector[0].weight.any()
    assert not any(p.requires_grad for p in found.teacher.parameters())
    own = PretrainTask(student, Hiding(kind="random"), teacher=student)
    assert own.model.mask_token.requires_grad and not own.teacher.mask_token.requires_grad
    with pytest.raises(ValueError, match="^the teacher of conmim must be a ConMIM, got Linear$"):
        PretrainTask(student, Hiding(kind="random"), teacher=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is .* in float16 in the teacher and "):
        PretrainTask(student, Hiding(kind="random"), teacher=method("conmim").half())
    heads = method("conmim", vit(num_heads=1))
    with pytest.raises(ValueError, match="the number of heads is 1 in the teacher and "):
        PretrainTask(student, Hiding(kind="random"), teacher=heads)


def test_the_teacher_of_bootmae_may_be_the_student_or_a_copy() -> None:
    student = method("bootmae")
    for given in (student, student.slow_copy()):
        found = PretrainTask(student, Hiding(kind="random"), teacher=given)
        assert found.teacher is not given
        assert not any(key.startswith(("pixel", "feature")) for key in found.teacher.state_dict())
    assert hasattr(student, "pixel") and hasattr(student, "feature")


def test_following_weighs_two_models() -> None:
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    before = one.weight.clone()
    follow(one, two, 0.75)
    close(one.weight, 0.75 * before + 0.25 * two.weight)
    follow(one, two, 0.0)
    assert torch.equal(one.weight, two.weight)


# Views -------------------------------------------------------------------------------------------


def test_two_views_of_one_crop() -> None:
    """Colours differ and places do not; the same image gives the same views."""
    found = PretrainTask(method("conmim", vit(in_chans=3)), Hiding(kind="random"))
    training, evaluation = found.transforms()
    picture = (torch.rand(40, 40, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture[:, :20] //= 4  # a side that stays the darker one
    drawn = []
    for number in range(40):
        with seeded((number,)):
            drawn.append(training({"image": picture.numpy(), "label": 3}))
    with seeded((7,)):
        again = training({"image": picture.numpy(), "label": 3})
    assert torch.equal(again["image"], drawn[7]["image"])
    assert torch.equal(again["view"], drawn[7]["view"]) and again["label"] == 3
    changed = [not torch.equal(one["image"], one["view"]) for one in drawn]
    assert 28 <= sum(changed)
    for one in drawn:
        assert one["view"].shape == one["image"].shape == (3, 28, 28)
        assert one["view"].dtype == torch.uint8
    batch = found.collate(drawn)
    assert batch["view"].shape == (40, 3, 28, 28)
    assert "view" not in evaluation({"image": picture.numpy()})
    assert "view" not in task("bootmae").transforms()[0]({"image": picture.numpy()})


def test_the_teacher_sees_its_view_and_the_student_the_image() -> None:
    found, x = task("conmim"), images()
    seen: list[Tensor] = []
    original = found.teacher.target
    found.teacher.target = lambda given: seen.append(given) or original(given)
    losses = found.training_step({"image": x, "view": -x}, Draws(0, 0, 0))
    (given,) = seen
    assert torch.equal(given, -x)
    drawn = found.masking.draw(2, GRID, PATCH, Draws(0, 0, 0))
    wanted = found.model(x, drawn, target=original(-x)).losses["contrast"]
    close(losses["contrast"], wanted)


def test_images_that_are_normalised_already_have_no_second_view() -> None:
    view = SecondView(lambda sample: sample, lambda image: image)
    with pytest.raises(ValueError, match="^holds torch.float32: the teacher's view is made of im"):
        view({"image": torch.zeros(1, 28, 28)})


# Training ----------------------------------------------------------------------------------------


def test_new_weights() -> None:
    boot = method("bootmae", vit(depth=3))
    boot.initialise()
    assert 0 < boot.vit.cls_token.abs().max() < 1e-5
    for part in (boot.pixel, boot.feature):
        assert 0.01 < part.mask_token.std() < 0.03
        weight = part.blocks[0].cross.q.weight
        assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5
    assert torch.equal(boot.vit.pos_embed[0, 1:], sincos_positions(GRID, 32, 0)[0])
    assert not boot.vit.pos_embed.requires_grad
    con = method("conmim", vit(depth=3))
    con.initialise()
    for number, block in enumerate(con.vit.blocks, 1):
        assert block.mlp.fc2.weight.std().item() == pytest.approx(
            0.02 / (2 * number) ** 0.5, rel=0.15
        )
    assert con.projector[0].weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_batch_norm_alone_is_torchs() -> None:
    mine, its = BatchNorm(6), nn.BatchNorm1d(6)
    x = noise(10, 6)
    assert torch.equal(mine(x), its(x))
    assert torch.equal(mine.running_var, its.running_var)


def test_the_projector() -> None:
    """Three layers without biases; the last norm has nothing to learn; prefix tokens take part."""
    model = method("conmim", vit(reg_tokens=3)).train()
    shapes = [list(p.shape) for p in model.projector.parameters()]
    assert shapes == [[24, 32], [24], [24], [24, 24], [24], [24], [12, 24]]
    found: list[Tensor] = []
    model.projector[0].register_forward_hook(lambda _, given, __: found.append(given[0]))
    target = model.target(images())
    assert found[0].shape == (2 * (4 + 49), 32) and target.shape == (2, 49, 12)
    assert isinstance(method("conmim", sync_norm=False).projector[1], nn.BatchNorm1d)
    assert not isinstance(method("conmim", sync_norm=False).projector[1], BatchNorm)


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("bootmae", {"momentum": (0.9, 0.99, 1.0)}, r"^momentum must lie in \[0, 1\), got 1.0$"),
        ("bootmae", {"momentum": (0.9, -0.1, 0.9)}, r"^momentum must lie in \[0, 1\), got -0.1$"),
        ("bootmae", {"momentum": 0.99}, "^momentum of bootmae is three numbers, got 0.99$"),
        (
            "bootmae",
            {"decoder_width": 34},
            "^decoder_width=34 must be a multiple of 4, for its pos",
        ),
        ("bootmae", {"decoder_depth": 0}, "^decoder_depth must be a whole number from 1, got 0$"),
        ("bootmae", {"decoder_heads": 0}, "^decoder_heads must be a whole number from 1, got 0$"),
        ("conmim", {"momentum": 1.0}, r"^momentum must lie in \[0, 1\), got 1.0$"),
        ("conmim", {"momentum": "slow"}, "^momentum must be a number, got 'slow'$"),
        ("conmim", {"temperature": 0}, "^temperature must be above 0, got 0$"),
        ("conmim", {"projector_out": 0}, "^projector_out must be a whole number from 1, got 0$"),
        ("conmim", {"projector_with": 8}, "did you mean 'projector_width'"),
        ("conmim", {"projector_width": True}, "^projector_width must be a whole number, got True$"),
        ("conmim", {"temperature": None}, "^temperature must be a number, got None$"),
        ("conmim", {"temperature": math.inf}, "^temperature must be finite, got inf$"),
        ("conmim", {"sync_norm": "false"}, "^sync_norm must be True or False, got 'false'$"),
        ("bootmae", {"learned_positions": "maybe"}, "^learned_positions must be True or False, "),
        ("bootmae", {"decoder_width": 32, "decoder_heads": 33}, "^decoder_heads=33 is more than d"),
        ("bootmae", {"feature_heads": 0}, "^feature_heads must be a whole number from 1, got 0$"),
        ("bootmae", {"feature_heads": 200}, "^feature_heads=200 is more than the encoder's width="),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_method(name, vit(), options)


def test_heads_that_do_not_divide_the_width() -> None:
    """The release's pixel regressor: 12 heads of 42 in 512."""
    model = make_method("bootmae", vit(), {"decoder_width": 32, "decoder_heads": 3})
    assert model.pixel.blocks[0].attn.q.weight.shape == (30, 32)
    assert model(images(), mask()).losses["pixel"].isfinite()


def test_too_little_to_tell_apart() -> None:
    with pytest.raises(ValueError, match="^bootmae reads shallow features after the first block"):
        make_method("bootmae", vit(depth=1))
    with pytest.raises(ValueError, match="^bootmae leaves patches out, which needs absolute posit"):
        make_method("bootmae", beit())
    with pytest.raises(
        ValueError, match="^conmim compares hidden patches of an image, and 1 is too"
    ):
        PretrainTask(method("conmim"), Hiding(kind="random", ratio=0.01))
    with pytest.raises(ValueError, match="^mask.unit=32 pixels must divide images of 28 x 28"):
        PretrainTask(method("conmim"))
    assert ConMIM.fewest_hidden == 2 and BootMAE.fewest_hidden == 1
