"""Make and drive the multi-scale ViT, whose first blocks see images at two scales.

Paper: "Multi-Scale And Token Mergence: Make Your ViT More Efficient", arXiv 2306.04897, section
3.4. The authors released no code.

The high scale has the ViT's own patches (196 at 224 px), the low scale a quarter as many (49). Each
scale has a class token and positions of its own, and both run through the first blocks. There the
attention of the high scale works on down-sampled tokens, ``X_h + UP(MHSA(DOWN(X_h)))``
(equation 6). Before the first reduction the scales are fused into one grid,
``X = PEG(X_h + LKA(UP(X_l)))`` (equation 5). UP is nearest-neighbour interpolation. LKA is the
large kernel attention of VAN: it multiplies its input by the result of a 5 x 5, a dilated 7 x 7 and
a 1 x 1 convolution. PEG adds a depth-wise 3 x 3 convolution to its input (CPVT).

The paper leaves some choices open. They are made as follows:

- The low scale embeds the image at half the size, where each pixel is the mean of four, with
  patches of the same size in pixels. Both scales share the patch projection and the first blocks.
  This gives the paper's number of parameters for DeiT-T (5.8 M) and -S (22.2 M), and that for -B
  (86.6 M) within 0.8 %. ``shared`` can give the low scale its own.
- DOWN is the mean of 2 x 2 tokens, after the block's first norm; ``down`` offers another choice.
  "Class token unchanged" is read as follows: the prefix tokens take part in attention, but DOWN and
  UP leave them as they are.
- The class token of the low scale is dropped; ``class_tokens="sum"`` adds it to the other.
- Down-sampling in all three first blocks of DeiT-S costs 2.98 and 2.27 G multiply-adds at keep
  rates of 0.7 and 0.5, but the paper prints 3.1 and 2.4. Here the last of the first blocks does not
  down-sample, which costs 3.10 and 2.38 G; ``downsampled`` sets the number.
- The last layers of LKA and PEG start at zero, so the low scale adds nothing at first. A model made
  from a plain one with ``downsampled=0`` gives the plain model's answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.checkpoint import checkpoint

from foveate.backbones._shared import (
    image_settings,
    named_classes,
    plain_class,
    same_modules,
    set_image_settings,
    set_named_classes,
)
from foveate.backbones._timm import SizedPatches
from foveate.backbones.timm_vit import (
    TimmViT,
    plain_vit,
    set_block_eps,
    vit_arguments,
)
from foveate.core import BackboneSpec, check_choice, linear_cost

__all__ = ["MultiScaleBackbone", "MultiScaleViT", "Scales", "multiscale"]

_SHARED = ("all", "blocks", "none")
_DOWN = ("mean", "nearest")
_CLASS_TOKENS = ("high", "sum")


@dataclass(frozen=True, kw_only=True)
class Scales:
    """How the two scales are made and joined.

    Attributes:
        early: number of first blocks, which run before the scales are fused; None takes a quarter
            of the depth.
        downsampled: number of first blocks in which the high scale attends on down-sampled tokens;
            None takes all first blocks but the last.
        shared: what the low scale shares with the high one: "all" (patch projection and blocks),
            "blocks" or "none".
        down: "mean" of 2 x 2 tokens, or "nearest", which takes one of the four.
        class_tokens: "high" keeps the class token of the high scale, "sum" adds both.
    """

    early: int | None = None
    downsampled: int | None = None
    shared: str = "all"
    down: str = "mean"
    class_tokens: str = "high"

    def __post_init__(self) -> None:
        check_choice("shared", self.shared, _SHARED)
        check_choice("down", self.down, _DOWN)
        check_choice("class_tokens", self.class_tokens, _CLASS_TOKENS)

    def resolved(self, depth: int) -> Scales:
        """Return these options with numbers of blocks in place of None."""
        early = max(1, depth // 4) if self.early is None else self.early
        if isinstance(early, bool) or not isinstance(early, int) or not 1 <= early < depth:
            raise ValueError(
                f"early must be a number of blocks in 1..{depth - 1} for {depth} blocks, "
                f"got {early!r}"
            )
        down = early - 1 if self.downsampled is None else self.downsampled
        if isinstance(down, bool) or not isinstance(down, int) or not 0 <= down <= early:
            raise ValueError(
                f"downsampled must lie in 0..{early}, the number of first blocks, got {down!r}"
            )
        return replace(self, early=early, downsampled=down)


class TwoScalePatches(SizedPatches):
    """Makes patches of the image and of the image at half the size."""

    whose = "multi-scale ViT"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.low_proj: nn.Conv2d | None = None  # set if the low scale has its own
        _low_grid(self.grid_size, self.patch_size)

    def patches(self, images: Tensor) -> Tensor:
        """Make patches ``[B, H*W + H*W/4, C]``, the high scale's first."""
        low = self.proj if self.low_proj is None else self.low_proj
        scales = (self.proj(images), low(avg_pool2d(images, 2)))
        return torch.cat([patches.flatten(2).transpose(1, 2) for patches in scales], 1)


class LargeKernelAttention(nn.Module):
    """Multiplies a map by convolutions that see a large neighbourhood of each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.far = nn.Conv2d(width, width, 7, padding=9, dilation=3, groups=width)
        self.mix = nn.Conv2d(width, width, 1)
        _zero(self.mix)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]``."""
        return x * self.mix(self.far(self.near(x)))


class PositionalEncoding(nn.Module):
    """Adds a depth-wise convolution of a map to the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        _zero(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]``."""
        return x + self.conv(x)


class MultiScaleViT(VisionTransformer):
    """A ViT on two scales, with timm's blocks and interface; ``multiscale`` makes it from a ViT.

    The first blocks are in ``early``. The others are in ``blocks``, counted from 0 again: these are
    the ones that methods see.

    Args:
        scales: how the scales are made and joined.
        eps: epsilon of the layer norms.
        block_eps: epsilon of the norms inside the blocks, if it differs.
        arguments: arguments of timm's ``VisionTransformer``, with a class token and positions;
            ``depth`` counts the first blocks too.
    """

    def __init__(
        self,
        *,
        scales: Scales | None = None,
        eps: float = 1e-6,
        block_eps: float | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            norm_layer=partial(nn.LayerNorm, eps=eps), embed_layer=TwoScalePatches, **arguments
        )
        _check_form(self)
        set_block_eps(self, block_eps)
        blocks = list(self.blocks)
        self.scales = (scales or Scales()).resolved(len(blocks))
        early = self.scales.early
        assert early is not None
        self.early = nn.ModuleList(blocks[:early])
        self.blocks = nn.Sequential(*blocks[early:])
        self.feature_info = self.feature_info[: len(self.blocks)]
        own_blocks = self.scales.shared == "none"
        self.low_blocks = copy.deepcopy(self.early) if own_blocks else None
        if self.scales.shared != "all":
            self.patch_embed.low_proj = copy.deepcopy(self.patch_embed.proj)
        width = self.embed_dim
        self.low_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.low_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + self.patch_embed.num_patches // 4, width)
        )
        nn.init.normal_(self.low_cls_token, std=1e-6)
        nn.init.trunc_normal_(self.low_pos_embed, std=0.02)
        self.lka, self.peg = LargeKernelAttention(width), PositionalEncoding(width)

    def fused(self, x: Tensor, low: Tensor, grid: tuple[int, int]) -> Tensor:
        """Run the first blocks on both scales and fuse them.

        Args:
            x: tokens of the high scale with their positions, prefix first, ``[B, P + H*W, C]``.
            low: patches of the low scale, ``[B, H*W/4, C]``.
            grid: patch rows and columns of the high scale.
        """
        front, small = self.num_prefix_tokens, _halved(grid)
        pos: Tensor = self.low_pos_embed
        if grid != tuple(self.patch_embed.grid_size):
            pos = _resized(pos, _halved(self.patch_embed.grid_size), small)
        low = torch.cat([self.low_cls_token.expand(low.shape[0], -1, -1), low], 1) + pos
        for number, block in enumerate(self.early):
            step: Callable[..., Tensor] = block
            if number < (self.scales.downsampled or 0):
                step = partial(self._downsampled, block, grid)
            low_block = block if self.low_blocks is None else self.low_blocks[number]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(step, x, use_reentrant=False)
                low = checkpoint(low_block, low, use_reentrant=False)
            else:
                x, low = step(x), low_block(low)
        prefix, patches = x[:, :front], x[:, front:]
        if self.scales.class_tokens == "sum":
            prefix = torch.cat([prefix[:, :1] + low[:, :1], prefix[:, 1:]], 1)
        patches = patches + _tokens(self.lka(_map(_up(low[:, 1:], small), grid)))
        return torch.cat([prefix, _tokens(self.peg(_map(patches, grid)))], 1)

    def _downsampled(self, block: Any, grid: tuple[int, int], x: Tensor) -> Tensor:
        """Run a block whose attention sees one token for each 2 x 2 patches (equation 6)."""
        front, y = self.num_prefix_tokens, block.norm1(x)
        down = _down(y[:, front:], grid, self.scales.down)
        y = block.attn(torch.cat([y[:, :front], down], 1))
        out = torch.cat([y[:, :front], _up(y[:, front:], _halved(grid))], 1)
        x = x + block.drop_path1(block.ls1(out))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add prefix tokens and positions to both scales; run all that comes before ``blocks``."""
        high, low = x.split([self.patch_embed.num_patches, self.patch_embed.num_patches // 4], 1)
        return self.fused(super()._pos_embed(high), low, tuple(self.patch_embed.grid_size))

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image size; positions of both scales are resized."""
        if patch_size is not None:
            raise ValueError("a multi-scale ViT keeps its patch size; give only img_size")
        sizes = self.patch_embed.img_size if img_size is None else img_size
        sizes = sizes if isinstance(sizes, (tuple, list)) else (sizes, sizes)
        patch = self.patch_embed.patch_size
        before = _halved(self.patch_embed.grid_size)
        after = _low_grid(tuple(n // p for n, p in zip(sizes, patch, strict=True)), patch)
        super().set_input_size(img_size=tuple(sizes))
        if before != after:
            resized = _resized(self.low_pos_embed, before, after)
            self.low_pos_embed = nn.Parameter(resized, self.low_pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return super().no_weight_decay() | {"low_pos_embed", "low_cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Sort parameters into layers, from the input to the output."""
        return {
            "stem": r"^(?:low_)?(?:cls_token|pos_embed)|^reg_token|^patch_embed",
            "early": r"^(?:early|low_blocks)\.(\d+)",
            "fusion": r"^(?:lka|peg)\.",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def multiscale(vit: nn.Module, **options: Any) -> MultiScaleViT:
    """Make a multi-scale ViT from a plain timm ViT; the weights are copied.

    New parts start with values that change the answers as little as possible.

    Args:
        vit: a ``VisionTransformer`` with a class token and positions (ViT, DeiT, DeiT-III, DINOv2).
        options: options of ``Scales``.
    """
    if isinstance(vit, MultiScaleViT):
        raise ValueError("the model has two scales already")
    unknown = sorted(set(options) - {f.name for f in fields(Scales)})
    if unknown:
        raise ValueError(
            f"a multi-scale ViT has no option {unknown[0]!r}; its options are "
            f"{', '.join(f.name for f in fields(Scales))}"
        )
    if plain_class(vit) is not VisionTransformer:
        raise ValueError(
            f"{type(vit).__name__} cannot be given a second scale: only a plain VisionTransformer "
            "of timm can"
        )
    TimmViT(vit)  # refuses a model that cannot be driven
    arguments = vit_arguments(vit)
    device = next(vit.parameters()).device
    with torch.device("meta"):
        if not same_modules(vit, plain_vit(**arguments)):
            raise ValueError(
                f"this {type(vit).__name__} cannot be given a second scale: it has layers or "
                "settings that its sizes do not show, such as another activation or dropout"
            )
    with device:
        model = MultiScaleViT(scales=Scales(**options), **_constructed(arguments))
    model.load_state_dict(_grown(vit.state_dict(), model), strict=False)
    model.to(next(vit.parameters()).dtype)
    set_image_settings(model, image_settings(vit))
    if names := named_classes(vit):
        set_named_classes(model, names)
    return model.train(vit.training)


class MultiScaleBackbone(TimmViT):
    """Parts of a multi-scale ViT: its first blocks belong to the embedding."""

    family = "multi-scale ViT"
    stock = (MultiScaleViT,)
    stem = TwoScalePatches
    needs_whole_images = "its first blocks mix all patches of both scales"

    def read_spec(self, model: Any) -> BackboneSpec:
        """Read the facts off a model, with what its first blocks cost."""
        return _with_early_blocks(super().read_spec(model), model)

    @property
    def early_blocks(self) -> list[nn.Module]:
        """The first blocks, without those that only the low scale runs."""
        return list(self.model.early)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return patch rows and columns; refuse images whose patches cannot be halved."""
        grid = super().grid_of(images)
        _low_grid(grid, self.spec.patch)
        return grid

    def _with_prefix(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        count = grid[0] * grid[1]
        high, low = patches.split([count, count // 4], 1)
        return self.model.fused(super()._with_prefix(high, grid), low, grid)

    def recipe(self) -> dict[str, Any] | None:
        """Return the arguments of ``MultiScaleViT``; None if they cannot make it again."""
        model = self.model
        arguments = _constructed(vit_arguments(model))
        arguments["depth"] += len(model.early)
        with torch.device("meta"):
            twin = MultiScaleViT(scales=model.scales, **arguments)
        if not same_modules(model, twin):
            return None
        return {"scales": asdict(model.scales), "arguments": arguments}

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make the model from a result of ``recipe``."""
        try:
            return MultiScaleViT(scales=Scales(**recipe["scales"]), **recipe["arguments"])
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise ValueError(f"the multi-scale ViT cannot be made again: {error}") from error


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check_form(model: VisionTransformer) -> None:
    """Refuse a form of ViT that the paper does not cover."""
    refused = (
        (model.cls_token is None, "needs a class token"),
        (model.pos_embed is None, "needs positions"),
        (
            not isinstance(model.norm_pre, nn.Identity),
            "cannot have a norm before the blocks, as in CLIP",
        ),
        (model.patch_embed.dynamic_img_pad, "cannot pad images"),
        (
            model.dynamic_img_size,
            "cannot take images of any size by itself: use set_input_size or foveate.apply",
        ),
    )
    for found, why in refused:
        if found:
            raise ValueError(f"a multi-scale ViT {why}")


def _constructed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``plain_vit`` without those that a multi-scale ViT does not take."""
    left_out = ("distilled", "dynamic_img_size")
    return {key: value for key, value in arguments.items() if key not in left_out}


def _grown(state: Mapping[str, Tensor], model: MultiScaleViT) -> dict[str, Tensor]:
    """Return a plain ViT's tensors under the names that they have in a multi-scale ViT."""
    early, grown = len(model.early), {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "blocks":
            number, _, rest = rest.partition(".")
            if int(number) < early:
                grown[f"early.{number}.{rest}"] = value
                if model.low_blocks is not None:
                    grown[f"low_blocks.{number}.{rest}"] = value
            else:
                grown[f"blocks.{int(number) - early}.{rest}"] = value
            continue
        grown[key] = value
        if key.startswith("patch_embed.proj.") and model.patch_embed.low_proj is not None:
            grown[key.replace("proj", "low_proj")] = value
    grown["low_cls_token"] = state["cls_token"]
    pos, front = state["pos_embed"], 0 if model.no_embed_class else model.num_prefix_tokens
    own = tuple(model.patch_embed.grid_size)
    patches = resample_abs_pos_embed(
        pos[:, front:], new_size=list(_halved(own)), old_size=list(own), num_prefix_tokens=0
    )
    first = pos[:, :1] if front else torch.zeros_like(pos[:, :1])
    grown["low_pos_embed"] = torch.cat([first, patches], 1)
    return grown


def _with_early_blocks(spec: BackboneSpec, model: Any) -> BackboneSpec:
    """Add to the facts what the embedding costs: a polynomial in the number of patches."""
    image = patch = pair = 0.0
    heads_width = spec.heads * spec.head_dim

    def add(linear: int, share: float, front: int, attention: bool) -> None:
        """Add the cost of layers for ``share`` of the patches and ``front`` prefix tokens."""
        nonlocal image, patch, pair
        image, patch = image + linear * front, patch + linear * share
        if attention:
            image += 2 * heads_width * front**2
            patch += 4 * heads_width * share * front
            pair += 2 * heads_width * share**2

    low_blocks = model.early if model.low_blocks is None else model.low_blocks
    for number, (block, low) in enumerate(zip(model.early, low_blocks, strict=True)):
        share = 0.25 if number < model.scales.downsampled else 1.0
        add(linear_cost(block.attn), share, spec.prefix, attention=True)
        add(linear_cost(block.mlp), 1.0, spec.prefix, attention=False)
        add(linear_cost(low.attn, low.mlp), 0.25, 1, attention=True)
    convs = [m for part in (model.lka, model.peg) for m in part.modules()]
    patch += sum(conv.weight.numel() for conv in convs if isinstance(conv, nn.Conv2d))
    patch += 1.25 * model.patch_embed.proj.weight.numel()
    return replace(
        spec,
        early=len(model.early),
        embed_cost=patch,
        embed_image_cost=image,
        embed_pair_cost=pair,
    )


# Between tokens and maps -------------------------------------------------------------------------


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return grid[0] // 2, grid[1] // 2


def _low_grid(grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the grid of the low scale; ValueError if the patches cannot be halved."""
    if grid[0] % 2 or grid[1] % 2:
        raise ValueError(
            f"images of {grid[0]} x {grid[1]} patches cannot be halved for the low scale: height "
            f"must be a multiple of {2 * patch[0]} pixels and width of {2 * patch[1]}"
        )
    return _halved(grid)


def _resized(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize positions of the low scale; the first one is its class token's."""
    return resample_abs_pos_embed(pos, new_size=list(new), old_size=list(old), num_prefix_tokens=1)


def _map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn tokens ``[B, H*W, C]`` into a map ``[B, C, H, W]``."""
    return x.transpose(1, 2).unflatten(2, grid)


def _tokens(x: Tensor) -> Tensor:
    """Turn a map ``[B, C, H, W]`` into tokens ``[B, H*W, C]``."""
    return x.flatten(2).transpose(1, 2)


def _down(x: Tensor, grid: tuple[int, int], how: str) -> Tensor:
    """Make one token of each 2 x 2: ``[B, H*W, C]`` to ``[B, H*W/4, C]``."""
    rows, columns = _halved(grid)
    cells = x.unflatten(1, (rows, 2, columns, 2))  # [B, H/2, 2, W/2, 2, C]
    one = cells.mean((2, 4)) if how == "mean" else cells[:, :, 0, :, 0]
    return one.flatten(1, 2)


def _up(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat each token of a grid (H, W) 2 x 2 times: ``[B, H*W, C]`` to ``[B, 4*H*W, C]``."""
    cells = x.unflatten(1, grid)[:, :, None, :, None]  # [B, H, 1, W, 1, C]
    return cells.expand(-1, -1, 2, -1, 2, -1).flatten(1, 4)
