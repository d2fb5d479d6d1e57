"""Capture a model as one graph of torch, from which every format is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.backbones import backbone_of
from foveate.core import Backbone, ReducedViT
from foveate.core.evaluation import answering
from foveate.core.executed import watched_weights
from foveate.data import Inputs
from foveate.dense import DenseBackbone, DenseModel, Hosting

__all__ = ["Graph", "answers", "capture", "fixed", "input_size", "reduced_of"]

_MOST = 4096  # images in a batch
_CHOICES = {
    torch.ops.aten.argmax.default,
    torch.ops.aten.argsort.default,
    torch.ops.aten.max.dim,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.topk.default,
}
_PRODUCTS = {
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
}


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model and its properties.

    Attributes:
        program: the graph; its weights are the model's own.
        size: height and width of an image.
        channels: number of channels of an image.
        batch: number of images; None for any.
        outputs: names of the outputs.
        shapes: shape of each output, in words.
        layers: for each block, the name of the output of its last linear layer but one, which is
            in the feed-forward network. Its size in a runtime shows how many tokens the block
            really computed.
        tokens: for each block, the number of tokens that an image must have there.
        deciding: names of values that are computed with weights of the method, and of the products
            from which tokens are chosen. They stay in float32 where the rest is in 8 bits, so that
            rounding them does not choose the tokens.
    """

    program: torch.export.ExportedProgram
    size: tuple[int, int]
    channels: int
    batch: int | None
    outputs: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    deciding: tuple[str, ...]

    def calls(self, images: np.ndarray) -> list[np.ndarray]:
        """Split images into the inputs of single calls.

        Each call has one image if the batch is free. A last call that the images do not fill takes
        the first images once more.
        """
        step, count = self.batch or 1, len(images)
        order = np.arange(-(-count // step) * step) % count
        return list(images[order].reshape(-1, step, *images.shape[1:]))


@contextmanager
def fixed(model: nn.Module) -> Iterator[str]:
    """Make a method keep the same number of tokens in every image, as a graph requires.

    Yields a sentence about what this changes, or "". The model is restored afterwards. Raises
    ValueError for a method that cannot do so.
    """
    reduced = reduced_of(model)
    if reduced is None or reduced.reducer.fixed_count:
        yield ""
        return
    name = reduced.reducer.name
    gated: list[Any] = [part for part in reduced.reducer.members if hasattr(part, "gate")]
    before = [part.gate for part in gated]
    try:
        for part in gated:
            part.gate = "topk"
        if not reduced.reducer.fixed_count:
            raise ValueError(
                f"{name} keeps a different number of tokens in each image, but an exported graph "
                "has one number for all: use a method with a fixed count, such as evit, tome or "
                "dynamicvit"
            )
        yield (
            f"{name} decides for each image how many patches it keeps, but an exported graph has "
            "one number for all: there its gates keep the highest scores, as many as its rates say"
        )
    finally:
        for part, gate in zip(gated, before, strict=True):
            part.gate = gate


def answers(model: nn.Module) -> nn.Module:
    """Return a model that returns plain tensors, whatever its family or library.

    For a detector or segmenter this is the backbone, which returns all maps.
    """
    return _Answers(model.trunk if isinstance(model, DenseModel) else model)


class _Answers(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        model = self.model
        if isinstance(model, DenseBackbone):
            return tuple(model(images).values())
        if isinstance(model, ReducedViT):
            return model.backbone.head(model.tokens(images, track=False))
        return backbone_of(model).native(images)


def reduced_of(model: nn.Module) -> ReducedViT | None:
    """Return the driven ViT in a model, or None if a plain one was given."""
    inside = model.reduced if isinstance(model, Hosting) else model
    return inside if isinstance(inside, ReducedViT) else None


def input_size(model: nn.Module, wanted: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return height and width of the images that a model is captured for.

    Args:
        model: model as for ``capture``.
        wanted: size for a dense model; it is rounded up so that the maps have whole cells.
    """
    if isinstance(model, Hosting):
        multiple = model.trunk.size_divisible
        rows, columns = (-(-side // multiple) * multiple for side in wanted or model.input_size)
        return rows, columns
    if wanted is not None:
        raise ValueError(
            "an image size is for dense models; foveate.load(..., image_size=...) resizes a ViT"
        )
    return Inputs.of(model).size


def capture(
    model: nn.Module,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    by_image: bool = False,
) -> Graph:
    """Capture a model as a graph.

    Args:
        model: a plain ViT or one from ``foveate.apply``; a dense backbone, detector or segmenter,
            of which the backbone is captured, with its maps.
        batch: number of images; None for any number.
        size: height and width of an image; None for the model's own.
        by_image: let the layers of a driven model see tokens ``[B, N, C]`` instead of flat ones.
    """
    size = size or input_size(model)
    if isinstance(model, DenseModel):
        model = model.trunk
    reduced = model.reduced if isinstance(model, Hosting) else model
    backbone = backbone_of(reduced)
    like = next(model.parameters())
    if like.dtype != torch.float32:
        raise ValueError(
            f"the model has weights of {str(like.dtype).removeprefix('torch.')}: export it in "
            "float32 (model.float()); int8 makes it smaller"
        )
    if like.device.type != "cpu":
        raise ValueError(f"the model is on {like.device}: export it from the CPU (model.cpu())")
    channels = backbone.channels
    # Capture with two images: with one, torch would treat the batch as a constant.
    images = torch.zeros(batch or 2, channels, *size)
    asked = _Answers(model)
    with answering(asked), _shaped(reduced, by_image):
        shapes = None if batch else ({0: torch.export.Dim("batch", min=1, max=_MOST)},)
        try:
            program = torch.export.export(asked, (images,), dynamic_shapes=shapes)
        except torch._dynamo.exc.UserError as error:
            if batch or "specialized it to be a constant" not in str(error):
                raise
            raise ValueError(
                f"torch cannot capture a {backbone.spec.family} for any number of images: give a "
                "fixed number (batch, --batch N)"
            ) from error
        tokens = _tokens(model, backbone, images[:1])
    products = _Products(program, asked)
    weights = watched_weights(backbone)
    own = reduced.reducer.parameters() if isinstance(reduced, ReducedViT) else ()
    return Graph(
        program,
        size,
        channels,
        batch,
        outputs=_outputs(model, backbone),
        shapes=_shapes(program, batch),
        layers=tuple(products.of(weight)[0] for weight in weights),
        tokens=tokens,
        deciding=tuple(
            dict.fromkeys(
                [*(name for weight in own for name in products.of(weight)), *products.choosing()]
            )
        ),
    )


@contextmanager
def _shaped(reduced: nn.Module, by_image: bool) -> Iterator[None]:
    """Let a driven model give its layers tokens by image for a while."""
    if not isinstance(reduced, ReducedViT):
        yield
        return
    before, reduced.by_image = reduced.by_image, by_image
    try:
        yield
    finally:
        reduced.by_image = before


def _outputs(model: nn.Module, backbone: Backbone) -> tuple[str, ...]:
    if isinstance(model, DenseBackbone):
        return tuple(f"map_{number}" for number in range(len(model.scales)))
    return ("logits" if backbone.classifies else "features",)


def _tokens(model: nn.Module, backbone: Backbone, image: Tensor) -> tuple[int, ...]:
    """Count the tokens of one image that each block feeds forward."""
    if isinstance(model, ReducedViT | DenseBackbone):
        return tuple(counts[0] for counts in model.trace(image).counts())
    spec = backbone.spec
    return (spec.prefix + spec.grid[0] * spec.grid[1],) * spec.depth


def _shapes(
    program: torch.export.ExportedProgram, batch: int | None
) -> tuple[tuple[str, ...], ...]:
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    values = (node.meta["val"] for node in output.all_input_nodes)
    return tuple((str(batch or "any"), *map(str, value.shape[1:])) for value in values)


class _Products:
    """Finds the values in a graph that are computed with a weight, or that tokens are chosen by."""

    def __init__(self, program: torch.export.ExportedProgram, answers: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in answers.named_parameters()}
        signature = program.graph_signature
        self._entries = {name: entry for entry, name in signature.inputs_to_parameters.items()}
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._constant: set[torch.fx.Node] = set()
        given = {*signature.user_inputs}
        for node in program.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "placeholder" and node.name not in given:
                self._constant.add(node)
            elif inputs and all(one in self._constant for one in inputs):
                self._constant.add(node)

    def of(self, weight: nn.Parameter) -> list[str]:
        """Name the values computed from a weight, perhaps sliced or transposed, and an input."""
        entry = self._entries.get(self._names[id(weight)])
        found, following = [], [] if entry is None else [self._nodes[entry]]
        while following:
            for user in following.pop().users:
                if user in self._constant:
                    following.append(user)
                elif user.op != "output":
                    found.append(user.name)
        return found

    def choosing(self) -> list[str]:
        """Name the products without weights, as of queries and keys, that choices are made from.

        Of the products that lead to a choice these are the last ones.
        """
        found: list[str] = []
        following = [node for node in self._nodes.values() if node.target in _CHOICES]
        seen = {*following, *self._constant}
        while following:
            for source in following.pop().all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                if source.target not in _PRODUCTS:
                    following.append(source)
                elif self._constant.isdisjoint(source.all_input_nodes):
                    found.append(source.name)
        return found
