"""DeiT-S at 800 x 1344: the same promises where they are needed."""

from __future__ import annotations

import pytest
import timm
import torch
from models import same
from small import close, noise

import foveate
from foveate.dense import adapter, mask_rcnn, pyramid, windowed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224", num_classes=0).eval()


@pytest.mark.parametrize("kind", [pyramid, adapter])
@torch.no_grad()
def test_gates_open_equal_dense(kind, vit: torch.nn.Module) -> None:
    dense = kind(vit).eval()
    opened = foveate.apply(dense, "svit(keep=1.0, gate='topk')").eval()
    image = noise(1, 3, 800, 1344)
    maps = dense(image)
    assert [tuple(v.shape[2:]) for v in maps.values()] == [
        (200, 336),
        (100, 168),
        (50, 84),
        (25, 42),
    ]
    same(opened(image), maps)


@torch.no_grad()
def test_a_small_image_beside_a_large_one(vit: torch.nn.Module) -> None:
    model = adapter(foveate.apply(vit, "svit"), norm="layer").eval()
    images = [noise(3, 800, 1333), noise(3, 500, 333, seed=1)]
    together = model(images)
    alone = model(images[1:])
    for name, values in alone.items():
        rows, columns = values.shape[2:]
        close(together[name][1:, :, :rows, :columns], values)


def test_a_detector_trains_and_detects(vit: torch.nn.Module) -> None:
    torch.manual_seed(0)
    model = mask_rcnn(adapter(foveate.apply(vit, "svit"), norm="layer"), num_classes=80).train()
    image = torch.rand(3, 480, 640)
    masks = torch.zeros(1, 480, 640, dtype=torch.uint8)
    masks[:, 100:300, 50:200] = 1
    target = {
        "boxes": torch.tensor([[50.0, 100.0, 200.0, 300.0]]),
        "labels": torch.tensor([7]),
        "masks": masks,
    }
    losses = model([image], [target])
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and "loss_ratio" in losses
    with torch.no_grad():
        assert set(model.eval()([image])[0]) == {"boxes", "labels", "scores", "masks"}


@torch.no_grad()
def test_windows_at_full_size(vit: torch.nn.Module) -> None:
    model = pyramid(windowed(vit)).eval()
    assert all(torch.isfinite(v).all() for v in model(noise(1, 3, 800, 1344)).values())
