"""PiToMe: its energies and matching against lists, what it protects, its counts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from small import batch_state, built, close, images, keep_masks, logits, noise, randomise, vit
from torch import Tensor

import foveate
from foveate.core import TokenState
from foveate.ops import unit


class Keys:
    """Stands in for the attention that a method reads keys off."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def key_direction(self) -> Tensor:
        return unit(self.keys)


def merged(method: str, state: TokenState, keys: Tensor, block: int = 1) -> TokenState:
    """Let the method act in a block of four on these keys ``[T, d]``, prefix included."""
    return built(method).between(block, state, Keys(keys))


def rows(state: TokenState) -> list[list[tuple[Tensor, float]]]:
    """Value and size of every token of every image."""
    size = torch.ones(len(state.x)) if state.size is None else state.size
    each = list(zip(state.x, size.tolist(), strict=True))
    ends = torch.tensor((0, *state.layout.lengths)).cumsum(0).tolist()
    return [each[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def naive(
    tokens: list[tuple[Tensor, float]],
    keys: Tensor,
    *,
    keep: float,
    margin: float = 0.9,
    alpha: float = 1.0,
    elu: bool = False,
    protect: bool = True,
) -> list[tuple[Tensor, float]]:
    """PiToMe on the patches of one image, pair by pair."""
    count = len(tokens)
    removed = math.floor(count - count * keep + 1e-9)
    if removed == 0:
        return tokens
    keys = keys / keys.norm(dim=1, keepdim=True)
    cosine = [[float(a @ b) for b in keys] for a in keys]

    def felt(c: float) -> float:
        if c >= margin:
            return c - margin if elu else c
        return alpha * (math.exp(c - margin) - 1)

    energy = [sum(map(felt, row)) / count for row in cosine]
    ranks = sorted(range(count), key=lambda i: -energy[i])
    pool = ranks[: 2 * removed] if protect else ranks
    sources, targets = pool[::2], pool[1::2]
    links = [max((cosine[a][b], b) for b in targets) for a in sources]
    best = sorted(range(len(sources)), key=lambda i: -links[i][0])[:removed]
    total = {b: tokens[b] for b in targets}
    for i in best:
        (x, s), (y, t) = tokens[sources[i]], total[links[i][1]]
        total[links[i][1]] = ((s * x + t * y) / (s + t), s + t)
    gone = {sources[i] for i in best}
    stay = [i for i in range(count) if i not in gone and i not in total]
    return [tokens[a] for a in stay] + list(total.values())


@pytest.mark.parametrize("counts", [12, 5, [12, 7, 1, 4], [9, 0, 3], [1, 1], [10]])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ("keep=0.7", {}),
        ("keep=0.5, margin=0.4, alpha=0.5", {"margin": 0.4, "alpha": 0.5}),
        ("keep=0.8, energy='elu', margin=-0.2", {"elu": True, "margin": -0.2}),
        ("keep=0.7, unprotected=[1]", {"protect": False}),
        ("keep=0.5, unprotected=[1], alpha=0.3", {"protect": False, "alpha": 0.3}),
    ],
)
def test_merging_pair_by_pair(
    counts: int | list[int], prefix: int, options: str, same: dict
) -> None:
    state = batch_state(counts, prefix=prefix)
    state = state.replace(size=1.0 + torch.arange(len(state.x)) % 3)
    keys = noise(len(state.x), 5, seed=1)
    after = merged(f"pitome({options})", state, keys)
    same = {"keep": float(options[5:8]), **same, "margin": 0.75 * same.get("margin", 0.9)}
    for before, now, key in zip(
        rows(state), rows(after), keys.split(list(state.layout.lengths)), strict=True
    ):
        expected = before[:prefix] + naive(before[prefix:], key[prefix:], **same)
        assert [size for _, size in now] == [size for _, size in expected]
        for (x, _), (y, _) in zip(now, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("keep", "path"),
    [
        (0.95, [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111]),
        (0.925, [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82]),
    ],
)
def test_the_path_of_a_deit(keep: float, path: list[int]) -> None:
    with torch.device("meta"):
        model = vit(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    assert list(foveate.count(foveate.apply(model, "pitome", keep=keep)).tokens) == path


def test_counts_are_exact_whatever_floats_make_of_them() -> None:
    for hundredths in range(50, 101):
        schedule = built(f"pitome(keep={hundredths / 100!r})").schedule
        for count in range(400):
            removed = math.floor(count * (1 - Fraction(hundredths, 100)))
            assert count - schedule.count(0, count, count) == removed
            assert 2 * removed <= count


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (5, 11, 12, 20), (20, 21, 22, 23)])
@pytest.mark.parametrize("energy", ["paper", "elu"])
def test_odd_tokens_among_equal_ones_are_protected(places: tuple[int, ...], energy: str) -> None:
    keys = noise(1, 8).repeat(25, 1)
    odd = torch.tensor(places) + 1
    keys[odd] = noise(4, 8, seed=2)
    state = batch_state([24])
    after = merged(f"pitome(keep=0.75, energy={energy!r})", state, keys)
    assert after.counts == (18,)
    for x in state.x[odd]:
        at = (after.x == x).all(1).nonzero().flatten()
        assert len(at) == 1 and after.size[at] == 1


def test_the_order_of_the_patches_does_not_matter() -> None:
    state, keys = batch_state(20), noise(42, 6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)) + 1
    order = torch.cat([torch.tensor([0]), order])
    order = torch.cat([order, order + 21])
    for options in ("keep=0.7", "keep=0.7, unprotected=[1]"):
        one = merged(f"pitome({options})", state, keys)
        other = merged(f"pitome({options})", state.with_tokens(state.x[order]), keys[order])
        # The same tokens, in another order.
        left, right = (s.x[s.x[:, 0].argsort()] for s in (one, other))
        torch.testing.assert_close(left, right)


def test_a_keep_of_one_is_the_dense_model() -> None:
    model = randomise(vit()).eval()
    with torch.no_grad():
        assert torch.equal(foveate.apply(model, "pitome(keep=1.0)")(images()), model(images()))
    driven = foveate.apply(model, "pitome(keep=[1.0, 0.5, 1.0, 0.75])")
    assert [c[0] for c in driven.trace(images()).counts()] == [37, 19, 19, 15]
    assert [driven.reducer.acts_between(b) for b in range(4)] == [False, True, False, True]


def test_ragged_images_are_as_if_alone() -> None:
    model = foveate.apply(randomise(vit()).eval(), "pitome(keep=0.8, unprotected=[0])").eval()
    x, mask = images(), keep_masks(3, (6, 6))
    together = model.trace(x, keep_mask=mask)
    for b in range(3):
        alone = model.trace(x[b : b + 1], keep_mask=mask[b : b + 1])
        close(alone.logits, together.logits[b : b + 1])
        assert [c[0] for c in alone.counts()] == [c[b] for c in together.counts()]
    for block in together.blocks:
        sizes = block.output.layout.rect(block.output.size)[:, 1:].sum(1)
        assert sizes.tolist() == mask.sum((1, 2)).tolist()


def test_no_gradient_through_the_matching() -> None:
    state, keys = batch_state(10), noise(22, 5).requires_grad_()
    state = state.with_tokens(state.x.requires_grad_())
    merged("pitome(keep=0.7)", state, keys).x.square().sum().backward()
    assert keys.grad is None


def test_a_budget_reaches_half_of_the_tokens_in_every_block() -> None:
    method = built("pitome")
    assert [method.at_level(level) for level in (0.0, 1.0)] == [{"keep": 1.0}, {"keep": 0.5}]


@pytest.mark.slow
def test_one_graph_serves_every_batch() -> None:
    model = foveate.apply(
        randomise(vit()).eval(), "pitome(keep=0.8, unprotected=[0, 1])", check=False
    ).eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in (2, 3, 5):
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0)
            close(logits(compiled, x), logits(model, images(batch)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("keep=0.4", r"keep must lie in \[0.5, 1\], since pairs merge; got 0.4"),
        ("keep=[0.9, 1.2]", "got 1.2"),
        ("keep=[0.9, 0.8]", "2 rates for 4 blocks"),
        ("margin=1.5", r"margin must lie in \[-1, 1\], got 1.5"),
        ("alpha=-1.0", "alpha must be a finite number of at least 0, got -1.0"),
        ("energy='gauss'", "energy must be one of 'paper', 'elu'; got 'gauss'"),
        ("blocks=[4]", "0..3"),
        ("blocks=[1, 2], unprotected=[0]", r"unprotected must name .* \[1, 2\], got 0"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(f"pitome({options})")
