"""From images to tensors: sizes, channels, normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small import close, hf, vit

import foveate
from foveate.data import FITS, Preprocessing

GREY = Image.new("RGB", (90, 60), (128, 128, 128))


@pytest.mark.parametrize(
    ("fit", "size", "grid", "box"),
    [
        ("stretch", (90, 60), (6, 6), (0, 0, 90, 60)),
        ("crop", (90, 60), (6, 6), (15, 0, 75, 60)),
        ("crop", (60, 90), (6, 6), (0, 15, 60, 75)),
        ("aspect", (90, 60), (5, 7), (0, 0, 90, 60)),
        ("aspect", (60, 90), (7, 5), (0, 0, 60, 90)),
        ("aspect", (5000, 10), (1, 36), (0, 0, 5000, 10)),
        ("aspect", (1, 1), (6, 6), (0, 0, 1, 1)),
    ],
)
def test_fits(fit: str, size: tuple, grid: tuple, box: tuple) -> None:
    prepared = Preprocessing.of(vit(), fit=fit)(GREY.resize(size))
    assert prepared.tensor.shape == (3, 8 * grid[0], 8 * grid[1])
    assert prepared.box == box


def test_normalisation_is_timms_own() -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with torch.device("meta"):
        model = timm.create_model(name)
    assert Preprocessing.of(model).mean == (0.5, 0.5, 0.5)
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**data, "crop_pct": 1.0}, is_training=False)
    image = Image.linear_gradient("L").convert("RGB").resize((224, 224))
    close(Preprocessing.of(model)(image).tensor, transform(image), 1e-5)
    assert Preprocessing.of(vit()).mean == pytest.approx((0.485, 0.456, 0.406))


def test_grey_models_take_grey_images() -> None:
    model = vit(in_chans=1)
    assert Preprocessing.of(model).mean == (0.5,)
    assert Preprocessing.of(model)(GREY).tensor.shape == (1, 48, 48)
    model.pretrained_cfg = {"mean": (0.286,), "std": (0.353,)}
    found = Preprocessing.of(foveate.apply(model, "evit"))
    assert (found.mean, found.std) == ((0.286,), (0.353,))
    expected = torch.full((1, 48, 48), (128 / 255 - 0.286) / 0.353)
    close(found(GREY).tensor, expected)
    given = Preprocessing.of(model, mean=(0.1,), std=(0.2,))
    assert (given.mean, given.std) == ((0.1,), (0.2,))


def test_hugging_face_models(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name, mean in (
        ("ViTForImageClassification", 0.5),
        ("Dinov2Model", 0.485),
        ("CLIPVisionModel", 0.48145466),
        ("SiglipVisionModel", 0.5),
    ):
        assert Preprocessing.of(hf(name)).mean[0] == pytest.approx(mean)
    hf("ViTForImageClassification").save_pretrained(tmp_path)
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    from foveate.backbones import from_folder

    found = Preprocessing.of(from_folder(tmp_path))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_wrong_options_are_named() -> None:
    for options, message in (
        ({"fit": "pad"}, f"fit must be one of {', '.join(map(repr, FITS))}"),
        ({"mean": (0.1, 0.2)}, "mean and std need one value each"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing.of(vit(), **options)
    with pytest.raises(ValueError, match="images of 5 channels"):
        Preprocessing.of(vit(in_chans=5))
