"""Multiply-adds of dense models against what torch counts on the real pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import backbone, photos, reduced
from small import noise, randomise, vit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import facts
from foveate.dense import adapter, mask_rcnn, pyramid, segmenter, windowed

SIZE = (40, 61)  # patches of 8: 5 x 8, on a canvas of 6 x 8


def counter(model: nn.Module, images: Any) -> float:
    """What torch counts on the real pass, a multiply-add being two operations."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return flops.get_total_flops() / 2


@pytest.mark.parametrize(
    "kind, method",
    [
        ("adapter", "evit(keep=0.7)"),
        ("pyramid", None),
        ("pyramid", "tome(r=5)"),
        ("pyramid", "svit(gate='topk')"),
    ],
)
def test_fixed_counts_are_exact_without_an_image(kind: str, method: str | None) -> None:
    model = backbone(kind, method)
    counted = foveate.count(model, SIZE)
    assert counted.how == "exact" and counted.left_out == ""
    assert counted.macs == counter(model, [noise(3, *SIZE)]) == sum(counted.parts.values())
    assert counted.parts["heads"] == 0 < counted.parts["maps"]
    if method is None:
        assert counted.macs == counted.dense_macs and counted.method_macs == 0
    else:
        assert counted.dense_macs == foveate.count(backbone(kind), SIZE).macs > counted.macs


@pytest.mark.parametrize(
    "method, prefix",
    [
        ("svit(keep=0.7)", "none"),
        pytest.param("ats(K=12)", "keep", marks=pytest.mark.slow),
        pytest.param("ats(K=12)", "none", marks=pytest.mark.slow),
    ],
)
def test_counts_of_images_are_what_runs(method: str, prefix: str) -> None:
    model = backbone("adapter", method, prefix=prefix)
    images = photos()[1:]
    counted = foveate.count(model, images=images)
    each = [counter(model, [image]) for image in images]
    assert counted.how == "measured"
    assert counted.macs == pytest.approx(sum(each) / len(each), rel=1e-12)
    traced = foveate.count(model, trace=model.trace(images))
    assert traced.macs == pytest.approx(counted.macs, rel=1e-12)
    assert traced.tokens == pytest.approx(counted.tokens)


def test_a_method_without_a_formula_is_counted_by_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "has_formula", lambda reducer: False)
    model = backbone("pyramid", "atm(threshold=0.3)")
    images = photos()[:2]
    counted = foveate.count(model, images=images)
    assert counted.macs == pytest.approx(sum(counter(model, [i]) for i in images) / 2)
    assert counted.tokens[-1] < counted.tokens[0]
    with pytest.raises(ValueError, match="give images="):
        foveate.count(model, trace=model.trace(images))
    with pytest.raises(ValueError, match="depends on the image: give images="):
        foveate.count(model, SIZE)


def test_exact_counts_without_a_class_token() -> None:
    model = backbone("adapter", "evit(keep=0.7)", prefix="none")  # reads the whole map instead
    assert foveate.count(model, SIZE).macs == counter(model, [noise(3, *SIZE)])


def test_windows_cost_less_than_global_attention() -> None:
    model = adapter(windowed(randomise(vit()).eval(), size=3, every=2), stem=8).eval()
    counted = foveate.count(model, SIZE)
    assert counted.macs == counted.dense_macs == counter(model, [noise(3, *SIZE)])
    assert counted.method_macs == 0
    whole = foveate.count(adapter(vit(), stem=8), SIZE)
    assert (
        counted.parts["vit"] < whole.parts["vit"] and counted.parts["maps"] == whole.parts["maps"]
    )


def test_a_detector_leaves_out_what_depends_on_proposals() -> None:
    body = pyramid(reduced("svit(keep=0.7)"), channels=16)
    model = mask_rcnn(body, 3, channels=16, box_channels=32, mask_channels=8, image_size=(64, 96))
    model = model.eval()
    image = noise(3, 60, 90).abs()
    counted = foveate.count(model, images=[image])
    prepared = model.prepared([image])
    assert prepared.tensors.shape[-2:] == (64, 96)

    class Fixed(nn.Module):
        def forward(self, images: Any) -> None:
            found = model.backbone.features(images)
            model.rpn.head(list(found.maps.values()))

    assert counted.macs == counter(Fixed(), prepared)
    assert "proposals" in counted.left_out
    expected = foveate.count(model)  # at its own size, without any image
    assert expected.how == "expected" and expected.dense_macs == counted.dense_macs
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.new_parameters == sum(p.numel() for p in model.reducer.parameters())


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_a_segmenter_is_counted_whole(head: str) -> None:
    body = pyramid(reduced("evit(keep=0.7)"), channels=16)
    model = segmenter(body, 4, head=head, channels=16).eval()
    counted = foveate.count(model, SIZE)
    assert counted.macs == counter(model, [noise(3, *SIZE).abs()]) and counted.left_out == ""
    assert counted.parts["heads"] > 0


def test_counting_leaves_the_model_as_it_was() -> None:
    model = backbone("pyramid", "svit(keep=0.7)").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    foveate.count(model, SIZE)
    foveate.count(model, images=[noise(3, *SIZE)])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_sizes_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"image_size must be .* above 0, got \(0, 8\)"):
        foveate.count(backbone("pyramid"), (0, 8))
    with pytest.raises(ValueError, match="only a dense model takes a list"):
        foveate.count(reduced("evit(keep=0.7)"), images=photos())


@pytest.mark.slow
def test_the_table_of_the_docs() -> None:
    vit_t = timm.create_model("deit_tiny_patch16_224")
    body = adapter(foveate.apply(vit_t, "svit", check=False), prefix="none")
    counted = foveate.count(mask_rcnn(body, 80))
    found = [counted.parts["vit"], counted.parts["maps"], counted.parts["heads"], counted.macs]
    assert [round(macs / 1e9, 1) for macs in found] == [52.6, 42.1, 110.2, 204.9]
    assert round(counted.dense_macs / 1e9, 1) == 256.4


@pytest.mark.slow
def test_the_table_of_the_documentation() -> None:
    """Every number of it, counted anew at full size."""
    page = (Path(__file__).parents[2] / "docs/dense.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ViT-Adapter-(\w), (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for size, way, numbers in rows:
        name = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224"}[size]
        net: Any = timm.create_model(name)
        if "windows" in way:
            net = windowed(net, size=14)
        elif way == "SViT":
            net = foveate.apply(net, "svit", check=False)
        body = adapter(net, prefix="none")
        counted = foveate.count(mask_rcnn(body, num_classes=80), (800, 1333))
        found = [*counted.parts.values(), counted.macs]
        assert [f"{macs / 1e9:.1f}" for macs in found] == numbers.split(" | "), (size, way)
