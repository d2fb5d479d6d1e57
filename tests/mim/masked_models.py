"""What tests of pre-training share: tiny models, images, masks, and runs that can be killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small import noise, randomise
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from train.runs import DATA, LOOP, MODEL, _plant, ended, start

from foveate import config
from foveate.mim import Mask, MaskedImageModel, make_method
from foveate.mim.recipe import Pretrain
from foveate.mim.run import pretrain

GRID, PATCH, SIZE = (7, 7), (4, 4), 28
SMALL: dict[str, Any] = {
    **{"img_size": SIZE, "patch_size": 4, "in_chans": 1, "num_classes": 0},
    **{"embed_dim": 32, "depth": 2, "num_heads": 2},
}
DECODER: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    **{"mae": DECODER, "bootmae": DECODER, "simmim": {}},
    "conmim": {"projector_width": 24, "projector_out": 12},
}
SHARED: dict[str, Any] = {
    **{"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    **{"init_values": 0.1, "global_pool": "token", "use_fc_norm": False},
}


def vit(cls: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    """A ViT of 49 patches, 32 wide, with weights that are not symmetric."""
    torch.manual_seed(0)
    return cls(**{**SMALL, **options})


def beit(**options: Any) -> nn.Module:
    """SimMIM's, with a position bias that is not zero."""
    return vit(Beit, **{**SHARED, **options})


FORMS: dict[str, Any] = {
    "class token": vit,
    "no class token": lambda: vit(class_token=False, global_pool=""),
    "registers": lambda: vit(reg_tokens=3),
    "positions for patches alone": lambda: vit(reg_tokens=2, no_embed_class=True),
    "distilled": lambda: vit(VisionTransformerDistilled),
}


def method(name: str, model: nn.Module | None = None, **options: Any) -> MaskedImageModel:
    """A method on a tiny model in eval mode, all weights drawn at random and far from zero."""
    options = {**OPTIONS.get(name, {}), **options}
    found = make_method(name, vit() if model is None else model, options)
    randomise(found)
    return found.eval()


def forms(*names: str) -> dict[str, Callable[[], MaskedImageModel]]:
    """Methods on every form of the ViTs that they take."""
    found: dict[str, Callable[[], MaskedImageModel]] = {}
    for name in names:
        makers = dict(FORMS)
        if name in ("simmim", "conmim"):
            makers["shared bias"] = beit
            makers["bias and positions"] = lambda: beit(use_abs_pos_emb=True)
        for form, make in makers.items():
            found[f"{name}, {form}"] = lambda name=name, make=make: method(name, make())
    return found


def images(count: int = 2, size: tuple[int, int] = (SIZE, SIZE), channels: int = 1) -> Tensor:
    """Random ones, with some structure."""
    coarse = noise(count, channels, size[0] // 4, size[1] // 4, seed=1)
    smooth = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return smooth + 0.5 * noise(count, channels, *size, seed=2)


def mask(count: int = 2, patches: int = 49, hidden: int = 36, seed: int = 3) -> Mask:
    """Random patches hidden, as many in each image."""
    return Mask.from_noise(noise(count, patches, seed=seed), hidden)


def pixels(hidden: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    """A mask of patches ``[B, N]`` as one of pixels ``[B, 1, H, W]``."""
    wide = hidden.view(-1, 1, *grid)
    return wide.repeat_interleave(PATCH[0], 2).repeat_interleave(PATCH[1], 3)


def with_other(x: Tensor, hidden: Tensor, *, change: str) -> Tensor:
    """Images with other pixels in their hidden or in their visible patches."""
    shown = pixels(hidden) if change == "hidden" else ~pixels(hidden)
    return torch.where(shown, x + 3 * noise(*x.shape, seed=9), x)


def close(found: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    """Equal, but for the last digits."""
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)


# Runs --------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    "method": "mae",
    "options": DECODER,
    "model": MODEL,
    "data": DATA,
    "loop": LOOP,
}


def recipe(*overrides: str, **parts: Any) -> Pretrain:
    """8 updates with 16 images each on a model of 16 patches and 3 blocks."""
    return config.parse(Pretrain, {**TREE, **parts}, overrides)


def run(recipe: Pretrain, out: Path, **options: Any) -> dict[str, Any]:
    """Pre-train in this process."""
    return pretrain(recipe, out, progress=False, **options)


def elsewhere(recipe: Pretrain, out: Path, *, resume: bool = False, kill: str = "") -> int:
    """In a process of its own that kills itself where ``kill`` says, as ``runs.elsewhere``."""
    return ended(start(_pretrain, recipe, out, resume, kill))


def _pretrain(recipe: Pretrain, out: Path, resume: bool, kill: str) -> None:
    if kill:
        _plant(kill)
    run(recipe, out, resume=resume)
