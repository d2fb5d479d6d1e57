"""A job of one's own: a detector of torchvision on a ViT, without a line of the engine changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small import vit
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.detection import IntersectionOverUnion
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

from foveate import config
from foveate.data import DatasetSource, Splits, Transform
from foveate.train.draws import Draws
from foveate.train.recipe import Recipe
from foveate.train.run import fit
from foveate.train.task import Task

SIDE = 64  # the detector pads images to multiples of 32


class Squares(torch.utils.data.Dataset):
    """Bright squares on noise, with their boxes."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        pixels = torch.randint(0, 60, (3, SIDE, SIDE), generator=draw)
        side = int(torch.randint(18, 26, (1,), generator=draw))
        left, top = torch.randint(0, SIDE - side, (2,), generator=draw).tolist()
        pixels[:, top : top + side, left : left + side] += 180
        boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        return {
            "image": tv_tensors.Image(pixels.to(torch.uint8)),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(SIDE, SIDE)),
            "labels": torch.ones(1, dtype=torch.int64),
        }


class Grid(nn.Module):
    """The final patches of a ViT as one feature map."""

    out_channels = 48

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(img_size=SIDE, patch_size=8, num_classes=0)  # 48 wide

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(images)[:, 1:]
        return tokens.mT.unflatten(2, (SIDE // 8, SIDE // 8))


class Detection(Task):
    """What the engine must be told of a detector."""

    score: ClassVar[str] = "iou"
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        grid = Grid()
        detector = FasterRCNN(
            grid,
            num_classes=2,
            min_size=SIDE,
            max_size=SIDE,
            rpn_anchor_generator=AnchorGenerator(((22,),), ((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
            box_detections_per_img=1,
        )
        super().__init__(detector, {"loss_rpn_box_reg": 2.0})
        self.updates = nn.Buffer(torch.zeros(()))

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone.vit  # type: ignore[union-attr,return-value]

    def transforms(self) -> tuple[Transform, Transform]:
        floats = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
        return v2.Compose([v2.RandomHorizontalFlip(), floats]), floats

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "images": [sample["image"].as_subclass(Tensor) for sample in samples],
            "targets": [
                {"boxes": s["boxes"].as_subclass(Tensor), "labels": s["labels"]} for s in samples
            ],
        }

    def training_step(self, batch: dict[str, Any], draws: Draws) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.model(batch["images"], batch["targets"])
        return losses

    def after_update(self) -> None:
        self.updates += 1

    def metrics(self) -> dict[str, Metric]:
        return {"iou": _Overlap()}

    def validation_step(
        self, model: nn.Module, batch: dict[str, Any], metrics: Mapping[str, Metric], number: int
    ) -> None:
        metrics["iou"].update(model(batch["images"]), batch["targets"])

    def export(self, model: nn.Module, folder: Path) -> Path:
        path = folder / "detector.pt"
        torch.save(model.state_dict(), path)
        return path


class _Overlap(IntersectionOverUnion):
    def compute(self) -> Any:
        return super().compute()["iou"]


def settings(**changes: Any) -> Recipe:
    tree = {
        "data": {"batch": 8, "val_batch": 10},
        "optim": {"lr": 2e-3, "layer_decay": 0.9, "backbone_scale": 0.5, "clip": 1.0},
        "loop": {"epochs": 5, "log_every": 1, "loggers": [], "ema": 0.9, **changes},
    }
    return config.parse(Recipe, tree)


def build(recipe: Recipe) -> tuple[Task, Splits]:
    splits = Splits(DatasetSource(Squares(64, 1), "train"), DatasetSource(Squares(20, 2), "val"))
    return Detection(), splits


def detected(out: Path, recipe: Recipe, **options: Any) -> Any:
    return fit(recipe, out, build, progress=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return detected(tmp_path_factory.mktemp("whole") / "run", settings())


def test_a_detector_learns(whole: Any) -> None:
    assert whole["score"] == "iou" and whole["job"] == "recipe" and whole["updates"] == 40
    history = whole.history
    losses = [f"train/{name}" for name in ("loss_classifier", "loss_box_reg", "loss_objectness")]
    assert {*losses, "train/loss_rpn_box_reg", "val/iou", "val/iou_ema"} <= set(history)
    parts = history[[*losses]].sum(axis=1) + 2 * history["train/loss_rpn_box_reg"]
    assert (parts - history["train/loss"]).dropna().abs().max() < 1e-4
    scores = history["val/iou"].dropna().tolist()
    assert scores[-1] > 0.8 > scores[0]
    assert whole["best"]["score"] == pytest.approx(max(history["val/iou_ema"].dropna()), abs=1e-3)
    assert (whole.path / "detector.pt").is_file()


@pytest.mark.slow
def test_what_a_task_counts_goes_on(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third epoch and gone on: the same weights, and the task's own state too."""
    original, steps = Detection.training_step, iter(range(1000))

    def step(self: Detection, *arguments: Any) -> dict[str, Tensor]:
        if next(steps) == 19:
            raise ZeroDivisionError("of the task itself")
        return original(self, *arguments)

    monkeypatch.setattr(Detection, "training_step", step)
    with pytest.raises(ZeroDivisionError, match="of the task itself"):
        detected(tmp_path / "run", settings(save_every=1))
    assert not (tmp_path / "run/result.json").exists()
    detected(tmp_path / "run", settings(save_every=1), resume=True)
    one, other = (torch.load(path / "detector.pt") for path in (whole.path, tmp_path / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    last = max((tmp_path / "run/checkpoints").iterdir())
    assert torch.load(last)["state_dict"]["task.updates"] == 40
