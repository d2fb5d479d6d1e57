"""Pictures and statistics of dense models: images of different sizes, and objects in them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image
from small import noise, randomise, vit
from torch import nn
from torchvision import tv_tensors

import foveate
from foveate import viz
from foveate.core import Trace
from foveate.data import Source, open_source
from foveate.dense import DenseBackbone, faster_rcnn, pyramid
from foveate.viz.dense import covered, trace_pixels
from foveate.viz.steps import steps
from foveate.viz.usage import UsageSums

PATCH = 8
SIZES = ((48, 48), (29, 50), (40, 64))  # 6 x 6, 4 x 7 (padded to 32 x 56) and 5 x 8 patches


@lru_cache
def backbone(method: str = "svit(keep=0.7)", channels: int = 3) -> DenseBackbone:
    body = foveate.apply(randomise(vit(in_chans=channels)).eval(), method, check=False)
    randomise(body.reducer, seed=1)
    return pyramid(body, channels=8).eval()


def images() -> list[torch.Tensor]:
    return [noise(3, *size, seed=n) for n, size in enumerate(SIZES)]


def alone(number: int) -> Trace:
    return backbone().trace(images()[number : number + 1])


def test_an_image_has_the_same_picture_alone_and_among_larger_ones() -> None:
    together = backbone().trace(images())
    assert together.grid == (6, 8) and together.grids == ((6, 6), (4, 7), (5, 8))
    picture = Image.fromarray(np.asarray(photo(100, 58)))
    box = (0.0, 0.0, 112.0, 64.0)  # the image at twice its size, and its patches reach beyond it
    for draw in (viz.kept, viz.depth, viz.brought_back):
        here = draw(together, picture, index=1, box=box, model=backbone())
        by_itself = draw(alone(1), picture, box=box, model=backbone())
        assert np.array_equal(np.asarray(here), np.asarray(by_itself))


def test_padding_is_no_patch() -> None:
    together = backbone().trace(images())
    for index, (rows, columns) in enumerate(together.grids):
        for step, single in zip(steps(together, index), steps(alone(index)), strict=True):
            assert step.patches == rows * columns == single.patches
            assert step.left_out.sum() == single.left_out.sum()
            assert step.working.sum() + step.left_out.sum() == rows * columns


def test_draw_prepares_images_for_a_detector() -> None:
    model = faster_rcnn(backbone(), 3, channels=8, box_channels=16, image_size=(48, 96)).train()
    for kind in ("kept", "depth", "brought-back"):
        assert viz.draw(model, photo(150, 100), kind).width > 2 * 150
    both = {"reduced": model, "evit": foveate.apply(foveate.unwrap(model), "evit", check=False)}
    assert viz.sheet(both, [photo(150, 100)], kind="depth").mode == "RGB"
    assert model.training
    with pytest.raises(ValueError, match="prepares its images itself"):
        viz.draw(model, photo(), preprocessing=object())
    # 100 x 150 pixels become 48 x 72, which are 6 x 9 patches and nothing more.
    trace, cover = trace_pixels(model.eval(), torch.zeros(3, 100, 150, dtype=torch.uint8))
    assert trace.grid == (6, 9) and cover == pytest.approx((100, 150))
    trace, cover = trace_pixels(backbone(), torch.zeros(3, 29, 50, dtype=torch.uint8))
    assert trace.grid == (4, 7) and cover == pytest.approx((32, 56))


def test_patches_that_objects_cover() -> None:
    masks = torch.zeros(2, 29, 50, dtype=torch.uint8)
    masks[0, :8, :12] = 1  # one patch whole and half of the next one
    masks[1, 24:, 48:] = 1  # all that the image has of its last patch
    inside = covered({"masks": tv_tensors.Mask(masks)}, (29, 50), (4, 7), (32, 56))
    assert inside.nonzero().flatten().tolist() == [0, 1, 27]
    few = covered({"masks": tv_tensors.Mask(masks)}, (29, 50), (4, 7), (32, 56), least=0.6)
    assert few.nonzero().flatten().tolist() == [0, 27]
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[-3.0, 8.0, 16.0, 16.0]]), format="XYXY", canvas_size=(29, 50)
    )
    found = covered({"boxes": boxes}, (29, 50), (4, 7), (32, 56))
    assert found.nonzero().flatten().tolist() == [7, 8]
    with pytest.raises(ValueError, match="needs boxes or masks, but the sample has image, label"):
        covered({"image": 0, "label": 1}, (29, 50), (4, 7), (32, 56))


def test_usage_counts_patches_inside_and_outside() -> None:
    together = backbone().trace(images())
    inside = torch.rand(3, 48, generator=torch.manual_seed(0)) < 0.4
    sums = UsageSums((6, 8))
    sums.add(together, inside)
    found = sums.result()
    used, own = together.used().numpy(), together.own().numpy()
    flags = inside.numpy()
    assert found.images == 3 and own.sum() == 36 + 28 + 40
    assert found.foreground == pytest.approx((own & flags).sum() / own.sum())
    for block, now in enumerate(used):
        assert found.whole[block] == pytest.approx(now.sum() / own.sum())  # padding is never used
        for share, part in ((found.inside, own & flags), (found.outside, own & ~flags)):
            assert share[block] == pytest.approx((now & part).sum() / part.sum())
        out = own & ~now
        if out.any():
            back = (out & used[block + 1 :].any(0)).sum() / out.sum()
            assert found.reactivation[block] == pytest.approx(back)
        else:
            assert np.isnan(found.reactivation[block])
    assert (found.inside != found.outside).any() and np.nanmax(found.reactivation) > 0
    each = UsageSums((6, 8))
    for number, (rows, columns) in enumerate(together.grids):
        cut = inside[number].view(6, 8)[:rows, :columns].reshape(1, -1)
        each.add(alone(number), cut)
    for name in ("whole", "inside", "outside", "reactivation", "heat"):
        assert getattr(each.result(), name) == pytest.approx(getattr(found, name), nan_ok=True)


def test_usage_of_a_data_set() -> None:
    model, source = backbone(channels=1), open_source("scenes:size=48x64,seed=5", "val")
    found = viz.usage(model, source, images=6)
    assert found.images == 6 and 0 < found.foreground < 1
    assert found.heat.shape == (6, 8) and found.heat.max() <= len(found.whole) == 4
    # The same from a trace and the masks, by hand, for one image.
    sample = source.sample(0)
    trace, _ = trace_pixels(model, torch.from_numpy(sample["image"]).permute(2, 0, 1))
    cells = sample["masks"].as_subclass(torch.Tensor).any(0).float().view(6, PATCH, 8, PATCH)
    inside = (cells.mean((1, 3)) >= 0.5).flatten()
    used = trace.used()[:, 0, inside].double().mean(1)
    assert viz.usage(model, source, images=1).inside == pytest.approx(used.numpy())
    figure = viz.usage_figure(found, "svit on scenes")
    assert [panel.get_title() for panel in figure.axes[:3]] == [
        "used by each block",
        "used by a later block",
        "blocks that use a place",
    ]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert lines["outside"] == pytest.approx(100 * found.outside)


class Nothing(Source):
    """A set without images."""

    def __len__(self) -> int:
        return 0


def test_usage_of_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="no image was added"):
        viz.usage(backbone(), Nothing())
    with pytest.raises(ValueError, match="detector or segmenter is needed, got Linear"):
        viz.usage(nn.Linear(2, 2), Nothing())
    with pytest.raises(ValueError, match=r"inside must have shape \[1, 36\], .* got \[1, 9\]"):
        UsageSums().add(alone(0), torch.ones(1, 9, dtype=torch.bool))
