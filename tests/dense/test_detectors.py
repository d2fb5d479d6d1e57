"""torchvision's detectors on dense backbones: losses, answers, and every image by itself."""

from __future__ import annotations

import math

import pytest
import torch
from models import METHODS, backbone, photos, reduced
from small import close, randomise, vit
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import foveate
from foveate.dense import adapter, faster_rcnn, mask_rcnn, pyramid, samples

SMALL = dict(channels=16, box_channels=24, proposals=(40, 30), detections=10, image_size=None)
SMALL_MASK = dict(**SMALL, mask_channels=16, mask_layers=1)


def targets(images: list[Tensor], masks: bool = True) -> list[dict[str, Tensor]]:
    """An object in the middle of each image, and none in the last."""
    found = []
    for number, image in enumerate(images):
        h, w = image.shape[-2:]
        count = 0 if number == len(images) - 1 else 1
        box = torch.tensor([[w * 0.2, h * 0.2, w * 0.8, h * 0.8]] * count).reshape(-1, 4)
        target = {"boxes": box, "labels": torch.ones(count, dtype=torch.long)}
        if masks:
            mask = torch.zeros(count, h, w, dtype=torch.uint8)
            mask[:, h // 4 : h // 2, w // 4 : w // 2] = 1
            target["masks"] = mask
        found.append(target)
    return found


def detector(kind: str = "pyramid", method: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return mask_rcnn(backbone(kind, method), num_classes=3, **SMALL_MASK).eval()


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_training_step_gives_finite_losses(method: str | None) -> None:
    model = detector("adapter", method).train()
    images = photos()
    losses = model(images, targets(images))
    named = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness"}
    named |= {"loss_rpn_box_reg"} | ({"loss_ratio"} if model.reducer.gated else set())
    assert set(losses) == named
    total = sum(losses.values())
    total.backward()
    assert math.isfinite(float(total.detach()))
    for part in ("backbone.fpn", "backbone.body.injectors", "backbone.body.body.vit.blocks"):
        grads = [p.grad for p in model.get_submodule(part).parameters() if p.grad is not None]
        assert grads and all(torch.isfinite(g).all() for g in grads), part


@torch.no_grad()
def test_evaluation_gives_torchvisions_dictionaries() -> None:
    model = detector(method="svit(keep=0.7)")
    model.roi_heads.score_thresh = 0.0
    images = photos()
    answers, outcome = model.run(images)
    assert outcome.state.batch == 3
    for image, answer in zip(images, answers, strict=True):
        count = len(answer["boxes"])
        assert set(answer) == {"boxes", "labels", "scores", "masks"} and 0 < count <= 10
        assert answer["masks"].shape == (count, 1, *image.shape[1:])
        assert 0 <= answer["labels"].min() and answer["labels"].max() <= 2
        assert (answer["boxes"] >= 0).all()
        assert answer["boxes"][:, 2].max() <= image.shape[2]


@pytest.mark.parametrize("kind", ["pyramid", "adapter"])
@torch.no_grad()
def test_an_image_has_the_same_boxes_alone_and_in_a_batch(kind: str) -> None:
    model = detector(kind, "svit(keep=0.7)")
    randomise(model.rpn, seed=5)
    randomise(model.roi_heads, seed=6)
    model.roi_heads.score_thresh = 0.0
    together = model(photos())
    for image, answer in zip(photos(), together, strict=True):
        (alone,) = model([image])
        far = (answer["boxes"][:, None] - alone["boxes"]).abs().amax(-1)
        far = far + (answer["labels"][:, None] != alone["labels"]) * 100
        nearest, other = far.min(1)
        same_box = nearest < 0.02  # pixels
        # Among boxes of equal score rounding chooses the order, and who is the tenth.
        assert same_box.sum() >= 8, nearest
        for name in ("scores", "masks"):
            close(answer[name][same_box], alone[name][other[same_box]], 1e-3)


@torch.no_grad()
def test_no_anchor_stands_in_the_padding() -> None:
    model = detector()
    batch, _ = model.transform(photos())
    maps = model.backbone.features(batch).maps
    for anchors, (height, width) in zip(
        model.rpn.anchor_generator(batch, list(maps.values())), batch.image_sizes, strict=True
    ):
        middle = (anchors[:, :2] + anchors[:, 2:]) / 2
        inside = (middle < torch.tensor([width, height])).all(1)
        assert inside.any() and (middle[~inside] > 1000).all()


@pytest.mark.parametrize("most", [60, 1000])
@torch.no_grad()
def test_an_image_has_the_same_proposals_alone_and_beside_a_larger_one(most: int) -> None:
    """Whether few or all anchors of a level may propose, no padding takes a place."""
    model, images = detector(), photos((64, 160), (40, 48))
    randomise(model.rpn, seed=5)
    model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"] = most, 5000

    def proposals(images: list[Tensor]) -> list[Tensor]:
        batch, _ = model.transform(images)
        found: list[Tensor] = model.rpn(batch, model.backbone.features(batch).maps)[0]
        return found

    for image, together in zip(images, proposals(images), strict=True):
        (alone,) = proposals([image])
        far = (together[:, None] - alone).abs().amax(-1)
        # Of two that score alike rounding may choose which one suppresses the other.
        assert (far.amin(0) > 0.05).sum() <= 1 and (far.amin(1) > 0.05).sum() <= 1


def test_the_padding_is_never_sampled() -> None:
    model, images = detector().train(), photos((64, 160), (40, 48))
    model.rpn.fg_bg_sampler.batch_size_per_image = 64
    given: list[list[Tensor]] = []

    def sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given.append(labels)
        return found(labels)  # type: ignore[no-any-return]

    found, model.rpn.fg_bg_sampler = model.rpn.fg_bg_sampler, sampler
    model(images, targets(images))  # without an object in the second
    batch, _ = model.transform(images)
    maps = list(model.backbone.features(batch).maps.values())
    for labels, anchors in zip(given[0], model.rpn.anchor_generator(batch, maps), strict=True):
        padding = anchors[:, 0] > 5000
        assert (labels[padding] == -1).all() and (labels[~padding] == 0).sum() > 64
    assert padding.float().mean() > 0.5


def test_processes_together_learn_from_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a batch, as two processes have them, have the losses of all of it on average."""
    model, images, seeds = detector().train(), photos(), [5, 6, 7]
    randomise(model.rpn, seed=5)
    for network in (model.rpn, model.roi_heads):
        network.fg_bg_sampler.batch_size_per_image = 24
    wanted, counted = targets(images), []

    def losses(*numbers: int, seeds: list[int] | None = seeds) -> dict[str, Tensor]:
        own = seeds and [seeds[n] for n in numbers]
        found: dict[str, Tensor] = model(
            *([given[n] for n in numbers] for given in (images, wanted)), own
        )
        return found

    def alone(counts: Tensor) -> Tensor:
        counted.append(counts)
        return counts

    monkeypatch.setattr(samples, "of_a_process", alone)
    state = torch.get_rng_state()
    whole = losses(0, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else draws
    parts = [losses(0, 1), losses(2)]
    together, first, second = counted
    assert torch.equal(together, first + second) and not torch.equal(first, second)
    monkeypatch.setattr(samples, "of_a_process", lambda _: together / 2)
    for name, value in whole.items():
        mean = sum(part[name] for part in (losses(0, 1), losses(2))) / 2
        close(mean, value, 1e-4)
        plain = sum(part[name] for part in parts) / 2
        assert (plain - value).abs() > 1e-3 * value.abs(), name
    other = losses(0, 1, 2, seeds=[8, 6, 7])
    assert any(not torch.equal(other[name], whole[name]) for name in whole)
    torch.manual_seed(0)
    by_torch = losses(0, 1, 2, seeds=None)
    assert not torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(by_torch[name], whole[name]) for name in whole)


def test_the_papers_settings() -> None:
    model = mask_rcnn(pyramid(vit(patch_size=16, img_size=64)), num_classes=80)
    generator = model.rpn.anchor_generator
    assert generator.sizes == ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    assert generator.strides[0] == (4.0, 4.0) and generator.strides[-1] == (64.0, 64.0)
    assert generator.aspect_ratios[0] == (0.5, 1.0, 2.0)
    assert model.backbone.out_channels == 256
    assert model.roi_heads.box_roi_pool.output_size == (7, 7)
    assert model.roi_heads.mask_roi_pool.output_size == (14, 14)
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert model.rpn.nms_thresh == 0.7 and model.roi_heads.nms_thresh == 0.5
    assert model.roi_heads.score_thresh == 0.05 and model.roi_heads.detections_per_img == 100
    assert model.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert model.roi_heads.box_predictor.cls_score.out_features == 81
    assert model.transform.min_size == (800,) and model.transform.max_size == 1333
    assert model.transform.size_divisible == 32


@torch.no_grad()
def test_faster_rcnn_and_a_size_of_its_own() -> None:
    torch.manual_seed(0)
    model = faster_rcnn(
        adapter(reduced("tome(r=3)"), stem=8), 3, **{**SMALL, "image_size": (32, 48)}
    ).eval()
    assert model.transform(photos())[0].image_sizes == [(32, 32), (30, 48), (27, 48)]
    assert set(model(photos())[0]) == {"boxes", "labels", "scores"}


def test_a_method_is_applied_to_a_detector() -> None:
    dense = detector()
    sparse = foveate.apply(dense, "svit(keep=0.7)", check=False)
    assert type(sparse) is type(dense) and sparse.rpn is dense.rpn
    assert sparse.reducer.name == "svit" and dense.reducer.name == "dense"
    images = photos()
    assert "loss_ratio" in sparse.train()(images, targets(images))
    assert "backbone.body.body.vit.pos_embed" in sparse.no_weight_decay()
    assert len(sparse.eval().trace(images[:1]).blocks) == 4


def test_wrong_targets_are_named() -> None:
    model, images = detector().train(), photos()
    with pytest.raises(ValueError, match="a target for each of 3 images, got none"):
        model(images)
    wrong = targets(images)
    wrong[1]["labels"] = wrong[1]["labels"] + 2
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got 3..3 for image 1"):
        model(images, wrong)
    flat = targets(images)
    flat[0]["boxes"][0, 2] = flat[0]["boxes"][0, 0]
    with pytest.raises(ValueError, match="of image 0 has no area"):
        model(images, flat)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        faster_rcnn(vit(), 0)
    for mode in (True, False):
        with pytest.raises(ValueError, match="at least one image is needed, got none"):
            model.train(mode)([], [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"masks": None}, "target of image 0 has no 'masks'.* it has boxes, labels"),
        ({"labels": None}, "target of image 0 has no 'labels'"),
        ({"boxes": None}, "target of image 0 has no 'boxes'"),
        (
            {"masks": torch.ones(1, 9, 9)},
            r"masks must be \[1, 48, 48\].* got \[1, 9, 9\]",
        ),
        ({"masks": torch.ones(2, 48, 48)}, r"masks must be \[1, 48, 48\].* got \[2, 48, 48\]"),
        ({"boxes": torch.tensor([[0.0, 1, math.nan, 9]])}, "image 0 contains NaN or infinity"),
        ({"boxes": torch.tensor([[0.0, 1, math.inf, 9]])}, "image 0 contains NaN or infinity"),
        ({"boxes": torch.tensor([[48.0, 1, 60, 9]])}, "of image 0 lies outside of its 48 x 48"),
        ({"boxes": torch.tensor([[1.0, -9, 9, 0]])}, "of image 0 lies outside of its 48 x 48"),
    ],
)
def test_what_nothing_can_be_learnt_from_is_refused(changes: dict[str, object], words: str) -> None:
    """NaN would end in the losses, and an infinite box in a crash of RoIAlign."""
    model, images = detector().train(), photos()[:2]
    wrong = targets(images)
    wrong[0] = {k: v for k, v in {**wrong[0], **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        model(images, wrong)


def test_boxes_may_reach_out_of_the_image_and_need_no_masks() -> None:
    torch.manual_seed(0)
    model, images = faster_rcnn(backbone("pyramid"), 3, **SMALL).train(), photos()[:2]
    given = targets(images, masks=False)
    given[0]["boxes"] = torch.tensor([[-3.0, 20, 20, 55]])
    assert all(torch.isfinite(value) for value in model(images, given).values())


@pytest.mark.parametrize("size", [(24, 40), (64, 90)])
def test_training_and_evaluation_resize_alike(size: tuple[int, int]) -> None:
    """Images with antialiasing; boxes and masks as torchvision resizes them."""
    model, images = (
        mask_rcnn(backbone("pyramid"), 3, **{**SMALL_MASK, "image_size": size}),
        photos(),
    )
    given = targets(images)
    batch, found = model.train().transform(images, given)
    assert torch.equal(batch.tensors, model.eval().transform(images)[0].tensors)
    plain = GeneralizedRCNNTransform(*size, [0.0] * 3, [1.0] * 3, size_divisible=16)
    sizes, expected = plain(images, given)
    assert batch.image_sizes == sizes.image_sizes
    for mine, its in zip(found, expected, strict=True):
        assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in its)
    assert given[0]["masks"].shape[1:] == images[0].shape[1:]  # what was given stays


def test_half_precision() -> None:
    model = detector("adapter", "svit(keep=0.7)").train()
    images = photos()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets(images))
        assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert len(model.eval()(images)) == 3
