"""Masked token optimisation: the formulas by hand, their signs, limits and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_models import GRID, beit, images, mask, method, recipe, run, vit
from small import noise
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import config
from foveate.mim import (
    Hiding,
    Mask,
    MaskedImageModel,
    Mto,
    Prediction,
    States,
    mto_losses,
    register,
)
from foveate.mim.heterogeneity import (
    SIMILARITIES,
    Similarity,
    entropy,
    heterogeneity,
    visible_cosine,
)
from foveate.mim.mae import Decoder
from foveate.mim.method import METHODS
from foveate.mim.mto import PRESETS
from foveate.mim.recipe import Pretrain
from foveate.mim.targets import gathered, patchify
from foveate.mim.task import PretrainTask
from foveate.train.draws import Draws
from foveate.train.task import total

DEPTH, PATCHES, WIDTH = 4, 12, 8
ONES: dict[str, Any] = {"spa": 1.0, "e": 1.0, "r": 1.0}


def network(
    batch: int = 3, scale: float = 1.0, seed: int = 0, hiding: Mask | None = None
) -> States:
    """Random states that learn; hidden tokens of the first are the same, as they are in a model."""
    parts = noise(DEPTH + 2, batch, PATCHES, WIDTH, seed=seed) * scale
    initial, *tokens = (part.clone() for part in parts)
    if hiding is not None:
        initial = torch.where(hiding.hidden[..., None], initial[:1, :1], initial)
    return States([x.requires_grad_() for x in tokens], initial.requires_grad_())


def hiding(batch: int = 3, hidden: int = 7) -> Mask:
    return mask(batch, PATCHES, hidden)


def ragged(hidden: Tensor) -> Mask:
    """Without the places of even masks, so that the general path is taken."""
    return Mask(hidden)


# By hand -----------------------------------------------------------------------------------------


def alike(kind: str, temperature: float, a: Tensor, b: Tensor) -> Tensor:
    if kind == "raw":
        return a @ b
    if kind == "scaled":
        return a @ b / len(a) ** 0.5
    if kind == "cosine":
        return a @ b / (a.norm() * b.norm()) / temperature
    a, b = ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in (a, b))
    return a @ b / len(a) ** 0.5


def level(x: Tensor, hidden: Tensor, m: Mto) -> Tensor:
    """Equation 2, a mean over images that have something to compare."""
    each = []
    for tokens, out in zip(x, hidden, strict=True):
        rows, columns = (part.nonzero().flatten().tolist() for part in (out, ~out))
        if not rows or len(columns) < 2:
            continue
        found = []
        for i in rows:
            row = [alike(m.similarity, m.temperature, tokens[i], tokens[j]) for j in columns]
            p = torch.stack(row).softmax(0)
            found.append(-(p * p.log()).sum())
        mean = torch.stack(found).mean()
        each.append(mean / math.log(len(columns)) if m.normalise else mean)
    return torch.stack(each).mean()


def separation(x: Tensor, hidden: Tensor, m: Mto) -> Tensor:
    """Equation 3, or the mass that visible tokens leave to hidden ones."""
    each = []
    for tokens, out in zip(x, hidden, strict=True):
        visible = (~out).nonzero().flatten().tolist()
        found = []
        for i in visible:
            places = [j for j in range(len(tokens)) if m.include_self or j != i]
            row = [alike(m.similarity, m.temperature, tokens[i], tokens[j]) for j in places]
            p = torch.stack(row).softmax(0)
            if m.form == "mass":
                found.append(-p[~out[places]].sum().log())
            else:
                value = -(p * p.log()).sum()
                found.append(value / math.log(len(places)) if m.normalise else value)
        some = torch.stack(found)
        each.append(some.mean() if m.reduction == "mean" else some.sum())
    return torch.stack(each).mean()


def by_hand(states: States, hidden: Tensor, m: Mto) -> dict[str, Tensor]:
    first = states.initial if m.initial == "pre_pos" else states.tokens[0]
    start = level(first, hidden, m)
    levels = [level(states.tokens[n], hidden, m) if n else start for n in m.chosen(DEPTH)]
    sign = 1 if m.direction == "decreasing" else -1
    steps = [
        (1 + (sign * (b - a) + m.margin).exp()).log()
        for a, b in zip(levels[:-1], levels[1:], strict=True)
    ]
    ranks = torch.stack(steps)
    return {
        "mto_spa": separation(first, hidden, m),
        "mto_e": 1 / (start + m.eps),
        "mto_r": ranks.mean() if m.reduction == "mean" else ranks.sum(),
    }


CHOICES: dict[str, dict[str, Any]] = {
    **{kind: {"similarity": kind} for kind in SIMILARITIES},
    "another temperature": {"temperature": 0.5},
    "not normalised": {"normalise": False},
    "sums": {"reduction": "sum"},
    "with itself": {"include_self": True},
    "mass": {"form": "mass"},
    "mass with itself": {"form": "mass", "include_self": True, "reduction": "sum"},
    "with positions": {"initial": "post_pos"},
    "as printed": {"direction": "as_printed"},
    "margin": {"margin": 0.3},
    "every second layer": {"layers": 2},
    "some layers": {"layers": (1, 4)},
    "paper": {"preset": "paper", "temperature": 1.0},
}


@pytest.mark.parametrize("together", [False, True])  # on a GPU all layers go in one pass
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_the_losses_and_their_gradients_by_hand(
    name: str, uneven: bool, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if together:
        monkeypatch.setattr("foveate.mim.mto._at_once", lambda tokens, layers: layers)
    choices = Mto(**{**ONES, **CHOICES[name]})
    drawn = (
        Mask.of(noise(3, PATCHES) > torch.tensor([[-0.5], [0.2], [0.6]])) if uneven else hiding()
    )
    assert (drawn.visible is None) == uneven
    ours = network(hiding=drawn, scale=0.7)
    theirs = copy.deepcopy(ours)
    found, wanted = mto_losses([ours], drawn, choices), by_hand(theirs, drawn.hidden, choices)
    assert found.keys() == wanted.keys() == choices.weights.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-4, msg=key)
    for losses in (found, wanted):
        (losses["mto_spa"] + 2 * losses["mto_e"] + 3 * losses["mto_r"]).backward()
    pairs = [*zip(ours.tokens, theirs.tokens, strict=True)]
    for a, b in ((ours.initial, theirs.initial), *pairs):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            one, two = a.grad, b.grad
            if a is ours.initial:  # one of the equal hidden rows stands for all
                one, two = (_summed(grad, drawn.hidden) for grad in (one, two))
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


def _summed(grad: Tensor, hidden: Tensor) -> Tensor:
    """With the rows of hidden tokens added up."""
    out = hidden[..., None]
    return torch.cat([grad * ~out, (grad * out).sum(1, keepdim=True)], 1)


def test_an_even_mask_and_its_general_path() -> None:
    """T3: gathered rows and columns, and all of them with some left out."""
    drawn = hiding()
    for name, changes in CHOICES.items():
        choices = Mto(**{**ONES, **changes})
        states = network(hiding=drawn)
        one = mto_losses([states], drawn, choices)
        two = mto_losses([states], ragged(drawn.hidden), choices)
        for key in one:
            torch.testing.assert_close(
                one[key], two[key], atol=1e-5, rtol=1e-4, msg=f"{name} {key}"
            )


def test_images_with_nothing_to_compare() -> None:
    """One that hides nothing and one that shows a single patch do not count in heterogeneity."""
    hidden = hiding(4).hidden.clone()
    hidden[1], hidden[2] = False, True
    hidden[2, 3] = False
    states = network(4, hiding=Mask(hidden))
    found = mto_losses([states], Mask.of(hidden), Mto(**ONES))
    sum(found.values()).backward()
    rest = [0, 3]
    some = States([x[rest] for x in states.tokens], states.initial[rest])
    wanted = mto_losses([some], Mask.of(hidden[rest]), Mto(**ONES))
    for key in ("mto_e", "mto_r"):
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-5)
    assert found["mto_spa"].isfinite()
    assert all(x.grad.isfinite().all() for x in (states.initial, *states.tokens[1:]))
    # A single visible patch has no other to keep its mass, nor has none at all.
    nothing = torch.ones(1, PATCHES, dtype=torch.bool)
    for out in (hidden, hidden[2:3], nothing):
        states = network(len(out))
        found = mto_losses([states], Mask.of(out), Mto(**ONES, form="mass"))
        assert all(value.isfinite() for value in found.values())
        sum(found.values()).backward()
        assert states.initial.grad is not None and states.initial.grad.isfinite().all()


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_tokens_that_are_all_alike_are_most_heterogeneous(kind: str) -> None:
    """T1: the logarithm of the number of visible tokens, where "e" has its floor."""
    same = noise(1, 1, WIDTH).expand(3, PATCHES, WIDTH)
    drawn, choices = hiding(), Mto(**ONES, similarity=kind)
    for how in (drawn, ragged(drawn.hidden)):
        nats = heterogeneity(same, how, Similarity(kind), normalise=False)
        torch.testing.assert_close(nats, torch.full((3,), math.log(5)))
        torch.testing.assert_close(heterogeneity(same, how, Similarity(kind)), torch.ones(3))
    found = mto_losses([States([same] * (DEPTH + 1), same)], drawn, choices)
    assert found["mto_e"].item() == pytest.approx(1 / 1.001, rel=1e-5)
    assert found["mto_r"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert found["mto_spa"].item() == pytest.approx(1, rel=1e-5)
    states = network(hiding=drawn)
    assert mto_losses([states], drawn, choices)["mto_e"] > found["mto_e"]


@pytest.mark.parametrize("kind", ["raw", "scaled", "cosine"])
def test_tokens_that_have_found_their_own_have_none(kind: str) -> None:
    """T1: each hidden token is like one visible token and like no other."""
    tokens = torch.eye(WIDTH)[torch.arange(PATCHES) % 6].expand(2, -1, -1) * 200
    hidden = (torch.arange(PATCHES) >= 6).expand(2, -1)
    for how in (Mask.of(hidden), ragged(hidden)):
        assert heterogeneity(tokens, how, Similarity(kind, 0.01)).abs().max() < 1e-5


def test_entropy_without_holes_is_the_same() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    whole, general = entropy(logits, holes=False), entropy(logits)
    torch.testing.assert_close(whole, general)
    torch.testing.assert_close(whole, -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    grads = [torch.autograd.grad(found.sum(), logits)[0] for found in (whole, general)]
    torch.testing.assert_close(*grads)


def test_entropy_of_places_that_are_left_out() -> None:
    gone = -math.inf
    logits = torch.tensor([[1.0, gone, 1.0], [gone, gone, 3.0], [gone, gone, gone]])
    logits = logits.requires_grad_()
    found = entropy(logits)
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0, 0]))
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_stay_finite_with_huge_logits(preset: str, dtype: torch.dtype) -> None:
    """T1: products of about 10^4, also of half-precision tokens."""
    drawn = hiding()
    states = network(scale=60, hiding=drawn)
    leaves = [states.initial, *states.tokens]
    cast = [x.to(dtype) for x in leaves]
    assert float((leaves[1] @ leaves[1].mT).detach().abs().max()) > 1e4
    for how in (drawn, ragged(drawn.hidden)):
        found = mto_losses([States(cast[1:], cast[0])], how, Mto(preset=preset))
        assert {x.dtype for x in found.values()} == {torch.float32}
        loss = torch.stack([*found.values()]).sum()
        loss.backward(retain_graph=True)
        assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in leaves)


def test_half_precision_tokens_lose_little() -> None:
    drawn = hiding()
    states = network(hiding=drawn)
    half = States([x.bfloat16() for x in states.tokens], states.initial.bfloat16())
    wanted = mto_losses([states], drawn, Mto(**ONES))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mto_losses([states], drawn, Mto(**ONES))
    for key, value in mto_losses([half], drawn, Mto(**ONES)).items():
        assert value.item() == pytest.approx(wanted[key].item(), rel=0.05)
        assert torch.equal(inside[key], wanted[key])  # autocast does not reach in


def test_the_order_of_tokens_does_not_matter() -> None:
    """T2: hidden tokens change places among themselves, visible ones too."""
    drawn = hiding()
    assert drawn.visible is not None and drawn.masked is not None
    states, order = network(), torch.empty(3, PATCHES, dtype=torch.long)
    for places in (drawn.visible, drawn.masked):
        order.scatter_(1, places, places.roll(1, 1))
    other = States([gathered(x, order) for x in states.tokens], gathered(states.initial, order))
    for preset in PRESETS:
        choices = Mto(preset=preset, **ONES, initial="post_pos")
        one, two = (mto_losses([each], drawn, choices) for each in (states, other))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        visible_cosine(states.tokens[1], drawn), visible_cosine(other.tokens[1], drawn)
    )


@pytest.mark.parametrize(
    ("kind", "stays"), [(k, k in ("cosine", "layernorm")) for k in SIMILARITIES]
)
def test_norms_do_not_matter_to_cosines(kind: str, stays: bool) -> None:
    """T8."""
    drawn, x = hiding(), network().tokens[0].detach()
    one, ten = (heterogeneity(scale * x, drawn, Similarity(kind)) for scale in (1, 10))
    assert torch.allclose(one, ten, atol=1e-4) == stays


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_similarities_and_their_gradients_are_those_of_plain_torch(
    kind: str, detached: bool
) -> None:
    states, drawn = network(), hiding()
    layers = [states.tokens[1], states.tokens[2], states.tokens[1].bfloat16()]
    for chosen in (drawn.visible, None):
        found = Similarity(kind, 0.2)(*layers, chosen=chosen, detach_chosen=detached)
        wanted = torch.cat([plain(x, kind, chosen, detached) for x in layers])
        torch.testing.assert_close(found, wanted)
        weight = torch.randn_like(found)
        leaves = states.tokens[1:3]
        ours, theirs = (torch.autograd.grad(x, leaves, weight) for x in (found, wanted))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def plain(tokens: Tensor, kind: str, chosen: Tensor | None, detached: bool) -> Tensor:
    x = tokens.float()
    if kind == "cosine":
        x = F.normalize(x, dim=-1)
    elif kind == "layernorm":
        x = F.layer_norm(x, (WIDTH,))
    columns = x if chosen is None else x.take_along_dim(chosen[:, :, None], 1)
    scale = {"cosine": 5, "raw": 1}.get(kind, WIDTH**-0.5)
    return x @ (columns.detach() if detached else columns).mT * scale


def test_similarity_of_tokens_that_are_nothing() -> None:
    """Cosines of zeros are 0, and so is what norms would pull."""
    tokens = torch.zeros(1, PATCHES, WIDTH, requires_grad=True)
    found = Similarity()(tokens)
    found.sum().backward()
    assert not found.any() and tokens.grad is not None and not tokens.grad.any()


def test_with_itself_and_huge_norms_nothing_is_left_to_separate() -> None:
    """T9: why the printed formula with raw products is empty."""
    drawn, printed = hiding(), Mto(preset="paper")
    states = network(scale=100)
    assert mto_losses([states], drawn, printed)["mto_spa"] < 1e-3
    without = Mto(preset="paper", include_self=False, similarity="cosine", temperature=0.1)
    assert mto_losses([states], drawn, without)["mto_spa"] > 0.5


def test_visible_cosine_by_hand() -> None:
    x, drawn = network().tokens[0].detach(), hiding()
    for image, hidden, found in zip(x, drawn.hidden, visible_cosine(x, drawn), strict=True):
        seen = image[~hidden]
        pairs = [
            torch.cosine_similarity(a, b, 0)
            for i, a in enumerate(seen)
            for j, b in enumerate(seen)
            if i != j
        ]
        assert found.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    assert visible_cosine(x[:, :1].expand_as(x), drawn).tolist() == pytest.approx([1] * 3)


# Directions and who learns -----------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "sign"), [("decreasing", 1), ("as_printed", -1)])
def test_what_ranking_asks_of_the_last_layer(direction: str, sign: int) -> None:
    """T4: heterogeneity there is to sink; the printed formula asks that it rise."""
    drawn, states = hiding(), network()
    factor = torch.tensor(1.0, requires_grad=True)  # of all products: larger is more peaked
    last = states.tokens[-1].detach() * factor
    states = States([*(x.detach() for x in states.tokens[:-1]), last], states.initial.detach())
    choices = Mto(spa=0, e=0, r=1, direction=direction, similarity="scaled")
    (loss,) = mto_losses([states], drawn, choices).values()
    high = heterogeneity(last, drawn, Similarity("scaled")).mean()
    (of_loss,) = torch.autograd.grad(loss, factor, retain_graph=True)
    (of_level,) = torch.autograd.grad(high, factor)
    assert of_level < 0 and sign * of_loss * of_level > 0


def test_falling_levels_cost_less_and_the_printed_formula_says_the_contrary() -> None:
    drawn, base = hiding(), network().tokens[0].detach()
    falling = States([base * 1.5**n for n in range(DEPTH + 1)], base)
    rising = States([base * 0.7**n for n in range(DEPTH + 1)], base)
    for direction, better in (("decreasing", falling), ("as_printed", rising)):
        choices = Mto(spa=0, e=0, r=1, direction=direction, similarity="scaled")
        worse = rising if better is falling else falling
        a, b = (mto_losses([x], drawn, choices)["mto_r"] for x in (better, worse))
        assert a < math.log(2) < b


def grads(drawn: Mask, **changes: Any) -> list[Tensor]:
    states = network()
    choices = Mto(**{**ONES, "initial": "post_pos", **changes})
    torch.stack([*mto_losses([states], drawn, choices).values()]).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in states.tokens]


@pytest.mark.parametrize("general", [False, True])
def test_visible_tokens_learn_nothing_if_they_are_detached(general: bool) -> None:
    drawn = ragged(hiding().hidden) if general else hiding()
    seen = ~drawn.hidden
    for detached in (False, True):
        found = grads(drawn, spa=0, detach_visible=detached)
        assert all(x[drawn.hidden].abs().sum() > 0 for x in found)
        assert all((x[seen].abs().sum() == 0) == detached for x in found)
    # What separates teaches visible tokens all the same.
    assert grads(drawn, detach_visible=True)[0][seen].abs().sum() > 0


def test_earlier_layers_learn_nothing_of_a_pair_if_they_are_detached() -> None:
    only = {"spa": 0, "e": 0, "layers": (0, 1, 3)}
    moved = [bool(x.any()) for x in grads(hiding(), **only)]
    assert moved == [True, True, False, True, False]
    moved = [bool(x.any()) for x in grads(hiding(), **only, detach_prev=True)]
    assert moved == [False, True, False, True, False]


def test_losses_without_a_weight_are_not_computed() -> None:
    for name in ("spa", "e", "r"):
        choices = Mto(**{**dict.fromkeys(ONES, 0.0), name: 0.5})
        assert mto_losses([network()], hiding(), choices).keys() == {f"mto_{name}"}


def test_means_over_networks() -> None:
    one, two, drawn = network(), network(seed=1), hiding()
    parts = [mto_losses([each], drawn, Mto(**ONES)) for each in (one, two)]
    for key, value in mto_losses([one, two], drawn, Mto(**ONES)).items():
        torch.testing.assert_close(value, (parts[0][key] + parts[1][key]) / 2)


# Choices -----------------------------------------------------------------------------------------


def test_presets() -> None:
    default, paper = Mto(), Mto(preset="paper")
    for choices in (default, paper):
        assert {k: getattr(choices, k) for k in PRESETS[choices.preset]} == PRESETS[choices.preset]
    assert paper.weights == {"mto_spa": 1, "mto_e": 1, "mto_r": 1}
    assert (paper.similarity, paper.reduction, paper.direction) == ("raw", "sum", "as_printed")
    assert (default.similarity, default.reduction, default.eps) == ("cosine", "mean", 1e-3)
    mine = Mto(preset="paper", direction="decreasing", r=0.0, include_self=False)
    assert (mine.direction, mine.r, mine.include_self) == ("decreasing", 0, False)
    assert mine.spa == 1 and mine.similarity == "raw"


def test_presets_in_recipes() -> None:
    """Written out in full, and the same when read again."""
    read = recipe("mto.preset=paper", "mto.r=0.2", "mto.layers=[1,2]").mto
    assert read == Mto(preset="paper", r=0.2, layers=(1, 2))
    assert recipe().mto is None and recipe("mto.preset=default").mto == Mto()
    written = config.dump(recipe("mto.preset=paper", "mto.r=0.2"))
    assert "similarity: raw" in written and "r: 0.2" in written


def test_another_preset_begins_the_group_anew(tmp_path: Path) -> None:
    """A resolved recipe has all values of its own preset."""
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe("mto.preset=default", "mto.spa=0.3")))
    assert config.read(Pretrain, path).mto == Mto(spa=0.3)
    assert config.read(Pretrain, path, ["mto.e=0.2"]).mto == Mto(spa=0.3, e=0.2)
    assert config.read(Pretrain, path, ["mto.preset=paper"]).mto == Mto(preset="paper")
    both = config.read(Pretrain, path, ["mto.r=0.5", "mto.preset=paper"]).mto
    assert both == Mto(preset="paper", r=0.5)


def test_too_few_visible_patches() -> None:
    model = method("mae", vit(img_size=8), decoder_depth=2)
    with pytest.raises(ValueError, match="compares visible patches, and 1 is too few"):
        PretrainTask(model, Hiding(kind="random", ratio=0.75), Mto())
    PretrainTask(model, Hiding(kind="random", ratio=0.75))
    PretrainTask(model, Hiding(kind="random", ratio=0.5), Mto())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_not_that_of_the_losses(preset: str, dtype: torch.dtype) -> None:
    """Layer 0 is in half precision under autocast; its products are not."""
    torch.manual_seed(0)
    drawn, choices = hiding(), Mto(preset=preset, **ONES)
    made = network(scale=0.5, hiding=drawn)
    found = []
    for kind in (dtype, torch.float32):
        parts = (made.initial, *made.tokens[1:])  # before the first block: as initial, moved
        rounded = [x.detach().to(dtype).to(kind).requires_grad_() for x in parts]
        losses = mto_losses([States([rounded[0], *rounded[1:]], rounded[0])], drawn, choices)
        grads = torch.autograd.grad(sum(losses.values()), rounded)
        found.append((losses, grads))
    for key, value in found[1][0].items():
        torch.testing.assert_close(found[0][0][key], value, rtol=1e-5, atol=1e-6)
    for half, whole in zip(found[0][1], found[1][1], strict=True):
        error = (half.float() - whole).norm() / whole.norm().clamp_min(1e-3)
        assert error < 1e-2  # a gradient is rounded to what its tokens are


def test_weights_grow() -> None:
    choices = Mto(spa=1.0, e=0.5, r=0.0, ramp=0.2)
    for done, share in ((0, 0), (0.05, 0.25), (0.1, 0.5), (0.2, 1), (0.7, 1), (1, 1)):
        wanted = {"mto_spa": share, "mto_e": 0.5 * share, "mto_r": 0}
        assert choices.weights_at(done) == pytest.approx(wanted)
    assert Mto(preset="paper").weights_at(0) == Mto(preset="paper").weights
    assert not Mto(spa=0, e=0, r=0).active and choices.active


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (2, [0, 2, 4, 6]),
        (4, [0, 4]),
        ((2, 5), [2, 5]),
        ((5, 0, 2), [0, 2, 5]),
        ([6, 3], [3, 6]),
    ],
)
def test_layers(layers: Any, chosen: list[int]) -> None:
    assert Mto(layers=layers).chosen(6) == chosen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "papers"}, "mto.preset"),
        ({"similarity": "cosines"}, "mto.similarity"),
        ({"initial": "pre"}, "mto.initial"),
        ({"reduction": "none"}, "mto.reduction"),
        ({"direction": "up"}, "mto.direction"),
        ({"form": "masses"}, "mto.form"),
        ({"spa": -1}, "^mto.spa must be at least 0, got -1$"),
        ({"e": math.inf}, "^mto.e must be at least 0, got inf$"),
        ({"r": math.nan}, "^mto.r must be at least 0, got nan$"),
        ({"margin": -0.1}, "^mto.margin must be at least 0, got -0.1$"),
        ({"temperature": 0}, "^mto.temperature must be above 0, got 0$"),
        ({"eps": 0}, "^mto.eps must be above 0, got 0$"),
        ({"ramp": 1.5}, r"^mto.ramp is a share of the run and lies in \[0, 1\], got 1.5$"),
        ({"layers": 0}, "^mto.layers must be at least 1, got 0$"),
        ({"layers": []}, r"^mto.layers must name at least 2 to rank, got \[\]$"),
        ({"layers": (4,)}, r"^mto.layers must name at least 2 to rank, got \[4\]$"),
    ],
)
def test_choices_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mto(**changes)


def task(
    name: str, mto: Mto | None, model: nn.Module | None = None, **options: Any
) -> PretrainTask:
    return PretrainTask(method(name, model, **options), Hiding(kind="random"), mto)


def test_a_network_that_is_too_shallow(caplog: pytest.LogCaptureFixture) -> None:
    """T10: one block has one pair to rank, and that is said; nothing to rank is refused."""
    forms: tuple[tuple[str, dict[str, Any], set[str]], ...] = (
        ("mae", {"decoder_depth": 1}, {"pixel"}),
        ("simmim", {"model": vit(depth=1)}, {"pixel"}),
        ("bootmae", {"decoder_depth": 1}, {"pixel", "feature"}),
        ("conmim", {"model": vit(depth=1)}, {"contrast"}),
    )
    for name, parts, own in forms:
        shallow = task(name, Mto(), **parts)
        assert "a network of 1 block has a single pair of them" in caplog.text
        caplog.clear()
        found = shallow.training_step({"image": images()}, Draws(0, 0, 0))
        assert found.keys() == own | {"mto_spa", "mto_e", "mto_r"}
    task("mae", Mto(r=0), decoder_depth=1)
    task("mae", Mto())
    assert not caplog.records
    task("mae", Mto(layers=2))  # the last against the first
    with pytest.raises(
        ValueError,
        match="^masked token optimisation ranks layers, and 0 of a network of depth 2 is ",
    ):
        task("mae", Mto(layers=3))
    with pytest.raises(ValueError, match=r"^mto.layers must lie in 0..2, got 3$"):
        task("mae", Mto(layers=(1, 3)))
    one = task("mae", Mto(r=0), decoder_depth=1)
    found = one.training_step({"image": images()}, Draws(0, 0, 0))
    assert found.keys() == {"pixel", "mto_spa", "mto_e"}
    assert task("mae", None, decoder_depth=1).mto is None


# In training -------------------------------------------------------------------------------------


def losses_and_grads(found: PretrainTask, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    found.set_progress(progress, found.model)
    losses = found.training_step({"image": images()}, Draws(0, 0, 0))
    loss = total(losses, found.weights)
    loss.backward()
    named = found.model.named_parameters()
    return loss.detach(), {key: p.grad for key, p in named if p.grad is not None}


@pytest.mark.parametrize("name", ["mae", "simmim", "bootmae", "conmim"])
def test_weights_of_zero_are_no_optimisation_at_all(name: str) -> None:
    """T6: to the bit, and also while weights have not grown yet."""
    wanted, plain = losses_and_grads(task(name, None), 0.5)
    for mto, progress in ((Mto(spa=0, e=0, r=0), 0.5), (Mto(ramp=0.1), 0.0)):
        loss, grad = losses_and_grads(task(name, mto), progress)
        assert torch.equal(loss, wanted) and grad.keys() == plain.keys()
        assert all(torch.equal(grad[key], plain[key]) for key in plain)
    assert not task(name, Mto(spa=0, e=0, r=0)).mto
    loss, grad = losses_and_grads(task(name, Mto(ramp=0.1)), 0.05)
    changed = {key for key in plain if not torch.equal(grad[key], plain[key])}
    assert loss != wanted and any("mask_token" in key for key in changed)
    assert "vit.patch_embed.proj.weight" in changed


def test_the_sum_of_a_step() -> None:
    found = task("simmim", Mto(spa=0.5, e=0.25, r=2.0, ramp=0.5), beit())
    found.set_progress(0.25, found.model)
    losses = found.training_step({"image": images()}, Draws(0, 0, 0))
    assert losses.keys() == {"pixel", "mto_spa", "mto_e", "mto_r"}
    parts = {"pixel": 1.0, "mto_spa": 0.25, "mto_e": 0.125, "mto_r": 1.0}
    wanted = sum(weight * losses[key].item() for key, weight in parts.items())
    assert total(losses, found.weights).item() == pytest.approx(wanted)


class Two(MaskedImageModel):
    """Two decoders, of which the second predicts what a network that does not learn says."""

    hiding = Hiding(kind="random", ratio=0.5)

    def __init__(self, vit: nn.Module, width: int = 16) -> None:
        super().__init__(vit)
        values = (self.values, 32)
        self.decoders = nn.ModuleList(
            Decoder(32, width, 2, 1, value, self.backbone.spec.grid, 1) for value in values
        )
        self.target = [copy.deepcopy(vit)]  # not registered: it is no part of what learns

    @property
    def depth(self) -> int:
        return 2

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        backbone = self.backbone
        embedded = backbone.embed(images)
        assert mask.visible is not None
        seen = gathered(embedded.x[:, 1:], mask.visible)
        x = backbone.norm(backbone.through(torch.cat([embedded.x[:, :1], seen], 1), GRID))
        found = [decoder(x, mask, GRID, states=states) for decoder in self.decoders]
        with torch.no_grad():
            features = self.target[0].forward_features(images)[:, 1:]
        losses = {
            "pixel": (found[0][0] - patchify(images, (4, 4))).square().mean(),
            "feature": (found[1][0] - features).square().mean(),
        }
        kept = tuple(state for _, some in found for state in some)
        return Prediction(losses, found[0][0], mask, kept)

    def initialise(self) -> None:
        pass


@pytest.fixture
def two() -> Iterator[None]:
    """A method of a user's own."""
    register("two")(Two)
    yield
    del METHODS["two"]


def test_a_method_of_ones_own(two: None) -> None:
    model = method("two", vit())
    found = PretrainTask(model, None, Mto(**ONES, ramp=0.0))
    assert found.masking == Hiding(kind="random", ratio=0.5)
    losses = found.training_step({"image": images()}, Draws(0, 0, 0))
    drawn = found.masking.draw(2, GRID, (4, 4), Draws(0, 0, 0))
    networks = model(images(), drawn, states=True).states
    assert len(networks) == 2
    for key in ("mto_spa", "mto_e", "mto_r"):
        parts = [mto_losses([each], drawn, Mto(**ONES))[key] for each in networks]
        torch.testing.assert_close(losses[key], torch.stack(parts).mean())
    assert losses.keys() == {"pixel", "feature", "mto_spa", "mto_e", "mto_r"}
    total(losses, found.weights).backward()
    assert all(p.grad is None for p in model.target[0].parameters())  # T7
    for decoder in model.decoders:
        assert decoder.mask_token.grad is not None and decoder.mask_token.grad.any()


def test_a_method_of_ones_own_in_a_run(two: None, tmp_path: Path) -> None:
    options = ("method=two", "loop.max_steps=2", "layers_every=1", "model.options.patch_size=4")
    result = run(recipe(*options, options={"width": 16}, mto={"preset": "default"}), tmp_path)
    assert result["updates"] == 2
    header = (tmp_path / "metrics.csv").read_text().split("\n", 1)[0]
    assert "train/feature" in header and "train/mto_r" in header
