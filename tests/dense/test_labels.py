"""Classes of patches, and the auxiliary heads that learn them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense.models import SIZES, photos
from small import close, noise, randomise, vit
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.dense import Canvas, make_dense, mask_rcnn, pyramid, segmenter
from foveate.dense.labels import NO_CLASS, classes_of_maps, classes_of_objects

AUX = "cropr.aux_logits"


def network(method: str | None = "cropr(r=0.1, heads=2)", classes: int = 5) -> torch.nn.Module:
    model = segmenter(pyramid(randomise(vit(num_classes=0)), channels=8), classes, channels=8)
    return model if method is None else foveate.apply(model, method, check=False)


def labels(*sizes: tuple[int, int], classes: int = 5) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(classes, size, generator=draw) for size in sizes or SIZES]


# Classes -----------------------------------------------------------------------------------------


def test_a_patch_has_the_label_in_its_middle() -> None:
    canvas = Canvas.of([noise(3, 16, 24), noise(3, 8, 10)], (8, 8), 1)
    one = torch.arange(16)[:, None] * 100 + torch.arange(24)
    other = torch.tensor([[7] * 10] * 4 + [[255] * 10] * 4)  # the middle is in the lower half
    found = classes_of_maps([one, other], 255, [(16, 24), (8, 10)], canvas, canvas.grid)
    none = NO_CLASS
    assert found.tolist() == [
        [[404, 412, 420], [1204, 1212, 1220]],
        [[none, none, none], [none, none, none]],
    ]
    # The image is shown at twice its size: the map stays in its own pixels.
    canvas = Canvas.of(noise(1, 3, 16, 24), (8, 8), 1)
    found = classes_of_maps([one[:8, :12]], 255, [(16, 24)], canvas, (2, 3))
    assert found.tolist() == [[[202, 206, 210], [602, 606, 610]]]


def test_the_smallest_object_counts_and_all_else_is_background() -> None:
    canvas = Canvas.of([noise(3, 16, 24), noise(3, 16, 16)], (8, 8), 1)
    large, small = [0.0, 0.0, 24.0, 16.0], [8.0, 0.0, 14.0, 16.0]
    boxes = {"boxes": torch.tensor([large, small]), "labels": torch.tensor([1, 2])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    sizes = [(16, 24), (16, 16)]
    found = classes_of_objects([boxes, empty], sizes, canvas, canvas.grid)
    assert found[0].tolist() == [[1, 2, 1], [1, 2, 1]]
    assert found[1].tolist() == [[0, 0, NO_CLASS], [0, 0, NO_CLASS]]
    masks = torch.zeros(2, 16, 24, dtype=torch.uint8)
    masks[0, :8], masks[1, 12:, 8:16] = 1, 1
    found = classes_of_objects([{**boxes, "masks": masks}, empty], sizes, canvas, canvas.grid)
    assert found[0].tolist() == [[1, 1, 1], [0, 2, 0]]


# Auxiliary heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, ((48, 48), (48, 48))], ids=["different", "alike"])
def test_every_place_says_its_class(sizes: tuple[tuple[int, int], ...]) -> None:
    model, images, maps = network().train(), photos(*sizes), labels(*sizes)
    maps[0][:20] = 255
    losses, outcome = model.run(images, maps)
    assert set(losses) == {"loss_segment", "loss_aux"}
    canvas = Canvas.of(model.prepared(images), (8, 8), model.backbone.multiple)
    grid = outcome.state.context.grid
    wanted = classes_of_maps(maps, 255, sizes, canvas, grid)
    assert wanted.shape == (len(sizes), *grid) and (wanted[0, :2] == NO_CLASS).all()
    each = outcome.notes[AUX]
    assert all(one.shape == (len(sizes), 5, *grid) for one in each)
    close(losses["loss_aux"], sum(F.cross_entropy(one, wanted) for one in each))
    losses["loss_aux"].backward()
    assert all(p.grad is None for p in model.backbone.reduced.vit.parameters())
    queries = model.reducer.scorers[0].queries
    assert queries.shape == (36, 48) and queries.grad.abs().sum() > 0


def test_in_a_detector_background_is_a_class_too() -> None:
    dense = mask_rcnn(
        pyramid(randomise(vit(num_classes=0)), channels=8),
        3,
        channels=8,
        box_channels=8,
        mask_channels=8,
        mask_layers=1,
        image_size=None,
    )
    model = foveate.apply(dense, "cropr(r=0.1)", check=False).train()
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]),
            "labels": torch.tensor([2]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in photos()
    ]
    losses, outcome = model.run([image.sigmoid() for image in photos()], targets)
    assert outcome.notes[AUX][0].shape[1] == 4 and float(losses["loss_aux"].detach()) > 0


def test_the_heads_learn_where_things_are() -> None:
    torch.manual_seed(0)
    model = network(classes=2).train()
    place = torch.zeros(48, 48, dtype=torch.long)
    place[:, 24:] = 1  # the right half of every image: a place, which the queries know
    optimiser = torch.optim.Adam(model.reducer.parameters(), 3e-2)
    seen = []
    for _ in range(30):
        loss = model(photos((48, 48), (48, 48)), [place, place])["loss_aux"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.3 * seen[0]


def test_trained_queries_stay(tmp_path: Path) -> None:
    """Saved, loaded, and handed to another model with as many classes."""
    parts = {"name": "pyramid", "channels": 8}, {"name": "fpn", "channels": 8}
    made = make_dense(randomise(vit(num_classes=0)), ["a", "b", "c"], *parts, None)
    model = foveate.apply(made, "cropr(r=0.1)", check=False)
    randomise(model.reducer, seed=3)
    before = {key: value.clone() for key, value in model.reducer.state_dict().items()}
    foveate.save(model, tmp_path / "model")
    again = foveate.load(tmp_path / "model")
    for found in (again, foveate.apply(foveate.unwrap(made), model.reducer, check=False)):
        state = found.reducer.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[key], value) for key, value in before.items())


def test_put_under_a_head_later_it_learns_the_classes() -> None:
    body = foveate.apply(randomise(vit(num_classes=0)), "cropr(r=0.1)", check=False)
    assert body.reducer.loss_weights == {}
    model = segmenter(pyramid(body, channels=8), 4, channels=8)
    assert model.reducer.loss_weights == {"aux": 1.0}
    assert model.reducer.scorers[0].head[1].out_features == 4
