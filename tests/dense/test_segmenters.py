"""Semantic segmentation heads on dense backbones."""

from __future__ import annotations

import pytest
import torch
from models import backbone, photos
from small import close, randomise, vit
from torch import nn

import foveate
from foveate.dense import segmenter

HEADS = ("fpn", "upernet")


def network(head: str, kind: str = "pyramid", method: str | None = "svit(keep=0.7)") -> nn.Module:
    model = segmenter(backbone(kind, method), 5, head=head, channels=16)
    randomise(model.head, seed=4)
    return model.eval()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["pyramid", "adapter"])
@torch.no_grad()
def test_an_image_is_labelled_alike_alone_and_in_a_batch(head: str, kind: str) -> None:
    model = network(head, kind)
    together = model.scores(photos())
    for image, scores in zip(photos(), together, strict=True):
        assert scores.shape == (5, *image.shape[1:])
        close(scores, model.scores([image])[0], 2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_training_gives_losses_and_evaluation_labels(head: str) -> None:
    model, images = network(head, "adapter").train(), photos()
    labels = [torch.randint(5, image.shape[1:]) for image in images]
    labels[0][:10] = 255
    losses, outcome = model.run(images, labels)
    assert set(losses) == {"loss_segment", "loss_ratio"} and outcome.state.batch == 3
    sum(losses.values()).backward()
    assert model.head.classify.weight.grad.abs().max() > 0
    with torch.no_grad():
        answers = model.eval()(images)
    assert [answer.shape for answer in answers] == [image.shape[1:] for image in images]


def test_ignored_pixels_do_not_count() -> None:
    model = network("fpn", method=None).train()
    image = photos()[:1]
    labels = torch.full(image[0].shape[1:], 255)
    assert float(model(image, [labels])["loss_segment"].detach()) == 0
    labels[5, 7] = 2
    with torch.no_grad():
        score = model.scores(image)[0][:, 5, 7]
    close(model(image, [labels])["loss_segment"], -score.log_softmax(0)[2])


def test_methods_are_applied_and_errors_named() -> None:
    model = network("fpn", method=None)
    sparse = foveate.apply(model, "evit(keep=0.7)", check=False)
    assert sparse.head is model.head and sparse.reducer.name == "evit"
    with pytest.raises(ValueError, match="head"):
        segmenter(vit(), 5, head="fcn")
    with pytest.raises(ValueError, match="a map of labels for each of 3 images, got none"):
        model.train()(photos())
    with pytest.raises(ValueError, match=r"the labels of image 0 are \[4, 4\]"):
        model(photos()[:1], [torch.zeros(4, 4)])
    for mode in (True, False):
        with pytest.raises(ValueError, match="at least one image is needed, got none"):
            model.train(mode)([], [])


@pytest.mark.parametrize("label", [5, -1])
def test_labels_without_a_class_are_refused(label: int) -> None:
    model, images = network("fpn", method=None).train(), photos()
    labels = [torch.full(image.shape[1:], 255, dtype=torch.int16) for image in images]
    labels[1][3, 4] = label
    with pytest.raises(ValueError, match=f"in 0..4 or be 255, .* got {label} for image 1"):
        model(images, labels)


@torch.no_grad()
def test_labels_have_the_size_of_the_image_also_where_it_is_resized() -> None:
    model = segmenter(backbone("pyramid"), 5, channels=16, image_size=(24, 40)).eval()
    answers = model(photos())
    assert [answer.shape for answer in answers] == [image.shape[1:] for image in photos()]
