"""ToMe: the matching against a loop, sizes, and the ways to say r."""

from __future__ import annotations

import pytest
import torch
from small import built, eva, images, keep_masks, randomise, vit
from torch import Tensor

import foveate
from foveate.core import ReducedViT, TokenState


def tome(method: str = "tome(r=5)", **options: object) -> ReducedViT:
    return foveate.apply(randomise(vit(**options)).eval(), method).eval()


def states(model: ReducedViT, **options: object) -> list[TokenState]:
    blocks = model.trace(images(), **options).blocks
    return [state for block in blocks for state in (block.attention, block.mlp, block.output)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_sizes_add_up_and_prefix_tokens_stay_in_place(prefix: int, masked: bool) -> None:
    options = {"reg_tokens": max(0, prefix - 1), "class_token": prefix > 0}
    model = tome(global_pool="avg", **options)
    mask = keep_masks(3, (6, 6)) if masked else None
    patches = [36] * 3 if mask is None else mask.sum((1, 2)).tolist()
    for state in states(model, keep_mask=mask):
        assert state.prefix == prefix
        if state.size is not None:
            sizes = state.layout.rect(state.size)
            assert (sizes[:, :prefix] == 1).all()
            assert sizes[:, prefix:].sum(1).tolist() == patches
        assert torch.where(state.source < 0, 99, state.source).min() == prefix
    # Prefix tokens are what a block without merging makes of them.
    front = model.trace(images(), keep_mask=mask).blocks[0].mlp.prefix_tokens()
    nothing = tome("tome(r=0)", global_pool="avg", **options)
    same = nothing.trace(images(), keep_mask=mask).blocks[0].mlp.prefix_tokens()
    torch.testing.assert_close(front, same)


def naive_merge(keys: Tensor, prefix: int, r: int) -> list[set[int]]:
    """Groups of tokens of one image after bipartite soft matching, as methods.md 7.1 has it."""
    sources = [i for i in range(prefix, len(keys)) if i % 2 == 0]
    targets = [i for i in range(prefix, len(keys)) if i % 2 == 1]
    keys = keys / keys.norm(dim=1, keepdim=True)
    links = []
    for a in sources:
        best = max(targets, key=lambda b: float(keys[a] @ keys[b]))
        links.append((float(keys[a] @ keys[best]), a, best))
    links.sort(reverse=True)
    merged = {a: b for _, a, b in links[:r]}
    groups = {i: {i} for i in range(len(keys)) if i not in merged}
    for a, b in merged.items():
        groups[b].add(a)
    order = [*range(prefix), *(a for a in sources if a not in merged), *targets]
    return [groups[i] for i in order]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching(prefix: int) -> None:
    model = tome(
        global_pool="avg", reg_tokens=max(0, prefix - 1), class_token=prefix > 0, qk_norm=True
    )
    blocks = model.trace(images()).blocks
    for index, block in enumerate(blocks):
        stock, attended, fed = model.vit.blocks[index], block.attention, block.mlp
        with torch.no_grad():
            y = stock.norm1(attended.x)
            keys = stock.attn.qkv(y).chunk(3, -1)[1].unflatten(-1, (3, -1))
            keys = stock.attn.k_norm(keys).mean(1)
        keys = attended.layout.rect(keys)
        size = attended.size
        size = torch.ones(attended.layout.total) if size is None else size
        size = attended.layout.rect(size)
        for b in range(3):
            groups = naive_merge(keys[b], prefix, 5)
            expected = [float(size[b, list(group)].sum()) for group in groups]
            assert fed.layout.rect(fed.size)[b].tolist() == expected
            for patch in range(36):
                carrier = int(attended.source[b, patch])
                assert carrier in groups[int(fed.source[b, patch])]


def test_merged_values_are_means_over_all_patches_of_a_token() -> None:
    """With attention and MLP switched off, a token is the mean of the patches it carries."""
    model = tome("tome(r=9)")
    with torch.no_grad():
        for block in model.vit.blocks:
            block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()
            block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
    blocks = model.trace(images()).blocks
    patches, last = blocks[0].attention.tokens()[:, 1:], blocks[-1].output
    assert last.counts == (5, 5, 5)  # 36, 27, 18, 9, and then no more than half of 9
    for b in range(3):
        for token in range(1, last.layout.longest):
            group = last.source[b] == token
            torch.testing.assert_close(last.tokens()[b, token], patches[b, group].mean(0))


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ("r=5", [5, 5, 5, 5]),
        ("r=[9, 0, 3]", [9, 0, 3, 0]),
        ("r=4, inflection=-1.0", [8, 5, 2, 0]),
        ("r=4, inflection=1.0", [0, 2, 5, 8]),
        ("r=4, inflection=0.5", [2, 3, 4, 6]),
        ("r=3, blocks=[1, 3]", [0, 3, 0, 3]),
        ("r=18", [18, 9, 4, 2]),  # never more than half of what is there
        ("r=0.1", [4, 4, 4, 4]),
        ("r=[0.25, 0.1, 3]", [9, 4, 3, 0]),
        ("r=0.1, inflection=-1.0", [7, 5, 2, 0]),
    ],
)
def test_ways_to_say_r(options: str, removed: list[int]) -> None:
    model = tome(f"tome({options})")
    counts = [37, *(c[0] for c in model.trace(images()).counts())]
    assert [a - b for a, b in zip(counts, counts[1:], strict=False)] == removed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("r=-1", "at least 0, or a share .*; got -1"),
        ("r=1.5", "a share of the patches between 0 and 1; got 1.5"),
        ("r=0.6", "at most 0.5 of the patches in a block, got 0.6"),
        ("r=19", r"r must lie in 0..18 \(half of the 36 patches"),
        ("r=[1, 2, 3, 4, 5]", "5 entries for 4 blocks"),
        ("r=[1, 2], inflection=0.5", "inflection spreads a single r"),
        ("inflection=2", r"\[-1, 1\], got 2"),
        ("r=10, inflection=1.0", "got 20"),
        ("blocks=[4]", "0..3"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome(f"tome({options})")


def test_a_share_is_of_each_images_own_patches() -> None:
    model = tome("tome(r=0.1)")
    several = [images(1, size=size)[0] for size in ((24, 24), (48, 24), (48, 64))]
    with torch.no_grad():
        counts = model.trace(several).counts()
        together = model(several)
        for number, image in enumerate(several):
            alone = [block[0] for block in model.trace(image[None]).counts()]
            assert [block[number] for block in counts] == alone
            torch.testing.assert_close(together[number], model(image[None])[0])
    assert counts[0] == (1 + 9 - 1, 1 + 18 - 2, 1 + 48 - 5)


def test_proportional_attention_is_a_switch() -> None:
    assert built("tome(r=1)", grid=(6, 6)).proportional
    with_size, without = tome("tome(r=5)"), tome("tome(r=5, prop_attn=False)")
    first, second = with_size.trace(images()), without.trace(images())
    torch.testing.assert_close(first.blocks[0].output.x, second.blocks[0].output.x)
    assert not torch.allclose(
        first.blocks[1].output.prefix_tokens(), second.blocks[1].output.prefix_tokens(), atol=1e-3
    )


def test_matching_of_a_rotary_model_reads_the_rotated_keys() -> None:
    """No short cut through the weights: keys that rotation changed are averaged as they are."""
    model = foveate.apply(randomise(eva(use_rot_pos_emb=True)).eval(), "tome(r=5)").eval()
    x = images()
    seen: list[Tensor] = []
    original = type(model.backbone).qkv

    def spy(self: object, block: int, *args: object) -> object:
        heads = original(self, block, *args)
        seen.append(heads.k.mean(1))
        return heads

    model.backbone.qkv = spy.__get__(model.backbone)
    blocks = model.trace(x).blocks
    keys = blocks[0].attention.layout.rect(seen[0])
    for b in range(3):
        groups = naive_merge(keys[b], 1, 5)
        for patch in range(36):
            assert patch + 1 in groups[int(blocks[0].mlp.source[b, patch])]
