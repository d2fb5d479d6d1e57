"""Drive Hugging Face's vision transformers: the code that all their families share.

Their blocks differ only in the names of their parts. Only ``library_class`` imports transformers:
the classes of a given model are recognised by their module and name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.backbones._shared import patch_grid, plain_class, refuse, same_modules
from foveate.core import (
    Backbone,
    BackboneSpec,
    Embedded,
    Heads,
    Outcome,
    ReducedViT,
    TokenState,
    linear_cost,
)
from foveate.core.host import on_grid

__all__ = ["OLDEST", "Form", "HfBackbone", "ReducedHf", "classifier", "library_class"]

# In this release DINOv2, the last family to change, got the same layers as the others.
OLDEST = "5.18"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """One model class of a family: where its encoder is, and what its answer holds.

    Attributes:
        tower: attribute that holds the encoder; empty if the model itself is the encoder.
        output: name of the class of the answer.
        main: the field of the answer that ``run`` and ``trace`` call logits.
        tokens: whether the answer has a ``last_hidden_state``.
        labels: whether the model computes a loss.
    """

    tower: str = ""
    output: str = "BaseModelOutputWithPooling"
    main: str = "pooler_output"
    tokens: bool = True
    labels: bool = False


def classifier(tower: str) -> Form:
    """Make the form of an image classifier."""
    return Form(tower, "ImageClassifierOutput", "logits", tokens=False, labels=True)


class ReducedHf(ReducedViT):
    """A Hugging Face model that runs with few tokens and answers as the model itself does."""

    main_input_name = "pixel_values"

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        keep_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        gone: str = "last",
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> Any:
        """Return the model's own kind of answer for ``pixel_values [B, 3, H, W]``.

        ``last_hidden_state`` and ``hidden_states`` are ``[B, prefix + H*W, C]`` whatever was
        dropped or merged: prefix tokens first, then every patch in its place. In training mode the
        method's own weighted losses are part of ``loss``.

        Args:
            pixel_values: preprocessed images of any size that the patch divides.
            keep_mask: patches that take part, as in ``ReducedViT.begin``.
            labels: labels of the images, as the model itself takes them.
            output_hidden_states: True returns the tokens after the embedding and after each block;
                numbers select some of them, 0 those after the embedding.
            return_dict: False returns a tuple.
            gone: value of a patch whose token is gone, as in ``TokenState.restore``.
            interpolate_pos_encoding: ignored; positions are resized if the image needs it.
            output_attentions: True is refused, because there are no attention maps.
            attention_mask: refused; use ``keep_mask``.
            bool_masked_pos: refused; use ``keep_mask``.
        """
        backbone, config = self.backbone, self.vit.config
        assert isinstance(backbone, HfBackbone)
        form, own = backbone.form, backbone.tower.config
        if own.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "attention stays fused, so there are no attention maps: leave out output_attentions"
            )
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is not supported: keep_mask says which patches take part"
            )
        if bool_masked_pos is not None:
            raise ValueError(
                "bool_masked_pos is not supported: a reduced model does no masked "
                "modelling; keep_mask leaves patches out"
            )
        if labels is not None and not form.labels:
            raise ValueError(
                f"{type(self.vit).__name__} has no loss: labels are for image classifiers"
            )
        if output_hidden_states is None:
            output_hidden_states = own.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict
        wanted = _selected(output_hidden_states, backbone.spec.depth + 1)
        hidden: list[Tensor | None] = []

        def visit(state: TokenState) -> None:
            hidden.append(on_grid(state, gone) if len(hidden) in wanted else None)

        state = self.tokens(
            pixel_values,
            keep_mask,
            track=form.tokens or bool(wanted),
            visit=visit if wanted else None,
        )
        fields: dict[str, Any] = dict(backbone.answers(state))
        if form.tokens:
            fields["last_hidden_state"] = on_grid(state, gone)
        if labels is not None:
            fields["loss"] = self._loss(labels, fields["logits"], state)
        if wanted:
            fields["hidden_states"] = tuple(hidden)
        output = backbone.output(**fields)
        return output if return_dict else output.to_tuple()

    def _loss(self, labels: Tensor, logits: Tensor, state: TokenState) -> Tensor:
        """Return the model's loss; in training, add the method's own weighted losses."""
        loss = self.vit.loss_function(labels, logits, self.vit.config)
        if not self.training:
            return loss
        single = self.vit.config.problem_type == "single_label_classification"
        targets = labels.flatten() if single else None
        own = self.reducer.weighted_losses(Outcome(logits, state), targets)
        return self.reducer.loss_weights.get("class", 1.0) * loss + sum(own.values())

    def can_generate(self) -> bool:
        """Return False: pipelines of transformers ask whether a model generates text."""
        return False


def _selected(which: bool | int | Sequence[int] | None, count: int) -> frozenset[int]:
    """Return which of ``count`` hidden states are wanted."""
    if which is None or isinstance(which, bool):
        return frozenset(range(count) if which else ())
    numbers = [which] if isinstance(which, int) else which
    for number in numbers:
        if not -count <= number < count:
            raise ValueError(f"hidden states are numbered {-count}..{count - 1}, got {number}")
    return frozenset(number % count for number in numbers)


class HfBackbone(Backbone):
    """Parts of a Hugging Face vision transformer; families fill in names and heads.

    Attributes:
        library: modules of transformers that define the family.
        forms: the classes that can be driven, by name.
        attention, out, norms: names of a layer's attention, of its output projection and of the
            layer's two norms.
        layers: where the encoder keeps its layers.
        patches: where the encoder keeps the convolution that makes the patches.
        always_resizes: whether positions are resized to any image without an argument.
    """

    driver = ReducedHf
    library: ClassVar[tuple[str, ...]]
    forms: ClassVar[Mapping[str, Form]]
    attention: ClassVar[str] = "attention"
    out: ClassVar[str] = "o_proj"
    norms: ClassVar[tuple[str, str]]
    layers: ClassVar[str]
    patches: ClassVar[str] = "embeddings.patch_embeddings.projection"
    always_resizes: ClassVar[bool] = False

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Accept every model of the family; the constructor refuses what is not plain."""
        return _library_class(type(model), cls.library) is not None

    def __init__(self, model: Any) -> None:
        super().__init__(model, self._facts(model))

    def bind(self, model: nn.Module) -> None:
        """Find the encoder, its layers and the class of the model's answers, and keep them."""
        super().bind(model)
        self.form = self.forms[type(model).__name__]
        self.tower: Any = _find(model, self.form.tower)
        self.output: Any = getattr(sys.modules[type(model).__module__], self.form.output)
        self._blocks: list[Any] = list(_find(self.tower, self.layers))
        self._size = _size(self.tower.embeddings)

    # The model as it is ------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's own layers."""
        return self._blocks

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier; CLIP's projection has outputs and no classes."""
        return self.spec.classes > 0 and self.form.main == "logits"

    @property
    def channels(self) -> int:
        """Channels that the patch projection takes."""
        return int(_find(self.tower, self.patches).in_channels)

    def native(self, images: Tensor) -> Tensor:
        """Return the main field of the model's answer; if it is None, the class or mean token."""
        resize = {} if self.always_resizes else {"interpolate_pos_encoding": self._resizes(images)}
        output = self.model(images, output_hidden_states=False, return_dict=True, **resize)
        answer = getattr(output, self.form.main)
        if answer is None:
            last = output.last_hidden_state
            answer = last[:, 0] if self.spec.class_token else last.mean(1)
        return answer

    def current(self) -> bool:
        """Tell whether head and layers are still the same."""
        return (
            _outputs(self.model, self.form) == self.spec.classes
            and list(_find(self.tower, self.layers)) == self._blocks
        )

    @property
    def checkpointing(self) -> bool:
        """Whether the layers checkpoint themselves, which they do only in training."""
        return any(layer.gradient_checkpointing and layer.training for layer in self._blocks)

    def recipe(self) -> dict[str, Any] | None:
        """Return class name, configuration and arguments; None if they cannot make it again."""
        model = self.model
        config = {k: v for k, v in model.config.to_dict().items() if not _left_out(k)}
        recipe = {
            "transformers": type(model).__name__,
            "config": config,
            "arguments": self._arguments(),
        }
        try:
            recipe = json.loads(json.dumps(recipe))
            with torch.device("meta"):
                twin = self.rebuild(recipe)
        except (TypeError, ValueError) as error:
            _log.warning("the model cannot be made again from its configuration: %s", error)
            return None
        return recipe if same_modules(model, twin) else None

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any]) -> nn.Module:
        """Make a model of one of the known classes; nothing is downloaded, no other code runs."""
        name, config = recipe["transformers"], recipe["config"]
        if name not in cls.forms:
            raise ValueError(f"no {cls.family} model is called {name!r}")
        kind = library_class(name)
        plain = {k: v for k, v in dict(config).items() if not _left_out(k)}
        try:
            made = kind.config_class.from_dict(plain)
            made._attn_implementation = "sdpa"
            return kind(made, **recipe.get("arguments", {}))
        except Exception as error:  # each configuration class raises errors of its own
            raise ValueError(f"{name} cannot be made again: {error}") from error

    def _arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments besides the configuration."""
        return {}

    # The model in parts ------------------------------------------------------------------------

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return patch rows and columns; refuse images that the patch does not divide."""
        return patch_grid(images, self.spec.patch)

    def embed(self, images: Tensor) -> Embedded:
        """Run the model's own embeddings, which resize positions if the image needs it."""
        grid = self.grid_of(images)
        resizes = self._resizes(images)
        rows, columns = self.spec.grid
        if resizes and rows != columns:
            raise ValueError(
                f"this model has positions for {rows} x {columns} patches, and transformers "
                f"resizes only square grids: images must be {self._size[0]} x {self._size[1]}, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            )
        options = {} if self.always_resizes else {"interpolate_pos_encoding": resizes}
        images = images.to(_find(self.tower, self.patches).weight.dtype)
        return Embedded(self.tower.embeddings(images, **options), grid)

    def _resizes(self, images: Tensor) -> bool:
        return tuple(images.shape[-2:]) != self._size

    def attention_of(self, block: int) -> nn.Module:
        """Return a layer's attention."""
        return getattr(self._blocks[block], self.attention)

    def wrap(self, out: Tensor) -> Any:
        """Return a pair, as attention modules of transformers do; there are no attention maps."""
        return out, None

    def attention_input(self, block: int, x: Tensor) -> Tensor:
        """Apply the first norm."""
        return getattr(self._blocks[block], self.norms[0])(x)

    def qkv(self, block: int, y: Tensor, rotary: Tensor | None) -> Heads:
        """Apply the three projections."""
        attn: Any = self.attention_of(block)
        shape = (self.spec.heads, attn.head_dim)
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (layer(y).unflatten(-1, shape).flatten(0, -3) for layer in layers)
        return Heads(q, k, v, _scale(attn), _dropout(attn) if attn.training else 0.0)

    def project(self, block: int, out: Tensor, y: Tensor) -> Tensor:
        """Apply the output projection."""
        return getattr(self.attention_of(block), self.out)(out)

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply second norm and MLP."""
        layer = self._blocks[block]
        return layer.mlp(getattr(layer, self.norms[1])(x))

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """Return None: most families have no stochastic depth."""
        return None

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """Return the fields of the model's answer, except the tokens, from normed tokens."""
        raise NotImplementedError

    def head(self, state: TokenState) -> Tensor:
        """Return the main field of the answer, or ``_headless`` if the model has no head."""
        answer = self.answers(state)[self.form.main]
        return self._headless(state) if answer is None else answer

    def _headless(self, state: TokenState) -> Tensor:
        """Return what a model without a head answers: the class token."""
        return state.prefix_tokens()[:, 0]

    # Reading the facts -------------------------------------------------------------------------

    def _facts(self, model: Any) -> BackboneSpec:
        kind = plain_class(model)
        if _library_class(kind, self.library) is not kind:
            raise refuse(model, "a class of its own")
        if kind.__name__ not in self.forms:
            raise refuse(model, f"a form other than {', '.join(self.forms)}")
        form = self.forms[kind.__name__]
        tower = _find(model, form.tower)
        blocks: list[Any] = self._checked(model, tower)
        attn, conv = getattr(blocks[0], self.attention), _find(tower, self.patches)
        patch = tuple(conv.kernel_size)
        height, width = _size(tower.embeddings)
        if self.always_resizes and height != width:
            raise refuse(model, "positions on a grid that is not square")
        head_cost, pool_cost = self._head_costs(model, form)
        return BackboneSpec(
            family=self.family,
            width=conv.out_channels,
            depth=len(blocks),
            heads=attn.q_proj.out_features // attn.head_dim,
            head_dim=attn.head_dim,
            prefix=self._prefix(tower),
            class_token=self._prefix(tower) > 0,
            patch=patch,
            grid=(height // patch[0], width // patch[1]),
            classes=_outputs(model, form),
            rotary=False,
            pools_patches=self._pools(form),
            qkv_cost=tuple(linear_cost(getattr(layer, self.attention)) for layer in blocks),
            mlp_cost=tuple(linear_cost(layer.mlp) for layer in blocks),
            embed_cost=conv.weight.numel(),
            head_cost=head_cost,
            pool_cost=pool_cost,
        )

    def _checked(self, model: Any, tower: Any) -> list[Any]:
        """Return the layers; refuse any that is not the family's own."""
        try:
            layers = list(_find(tower, self.layers))
            for layer in layers:
                attn = getattr(layer, self.attention)
                for part in (layer, attn, layer.mlp):
                    if _library_class(plain_class(part), self.library) is not plain_class(part):
                        raise refuse(model, f"{type(part).__name__} in its layers")
                _ = attn.q_proj, attn.head_dim
        except AttributeError:
            raise ValueError(
                f"this {type(model).__name__} has the layers of an older transformers: "
                f"{OLDEST} or newer is needed, pip install 'transformers>={OLDEST}'"
            ) from None
        return layers

    def _prefix(self, tower: Any) -> int:
        """Return the number of tokens in front of the patches."""
        return 1

    def _pools(self, form: Form) -> bool:
        """Return whether the head reads patches."""
        return False

    def _head_costs(self, model: Any, form: Form) -> tuple[int, int]:
        """Return the head's multiply-adds per image, and per patch that it reads."""
        outside = [part for name, part in model.named_children() if name != form.tower]
        return linear_cost(*outside) if form.tower else 0, 0


def library_class(name: str) -> Any:
    """Return a class of transformers by its name; ImportError says what to install."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Hugging Face models need transformers: pip install 'foveate[hf]'"
        ) from error
    return getattr(transformers, name)


def _library_class(kind: type, modules: Sequence[str]) -> type | None:
    """Return the first of a class and its bases that these modules define, or None."""
    for base in kind.__mro__:
        if base.__module__.startswith(tuple(f"transformers.models.{m}." for m in modules)):
            return base
    return None


def _left_out(key: str) -> bool:
    """Tell whether a recipe leaves out this entry, which may name code to run or a path."""
    code = ("auto_map", "custom_pipelines", "quantization_config")
    return key in (*code, "_name_or_path") or "attn_impl" in key


def _find(model: Any, path: str) -> Any:
    """Return the module at a dotted path; the model itself if the path is empty."""
    for name in path.split(".") if path else ():
        model = getattr(model, name)
    return model


def _size(embeddings: Any) -> tuple[int, int]:
    """Return the image height and width that the positions were made for."""
    holder = getattr(embeddings, "patch_embeddings", embeddings)
    size = holder.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _outputs(model: Any, form: Form) -> int:
    """Return the number of outputs of the head; 0 without a head."""
    for name in ("classifier", "cls_classifier", "visual_projection"):
        if form.tower and hasattr(model, name):
            return int(getattr(getattr(model, name), "out_features", 0))
    return 0


def _scale(attn: Any) -> float:
    return attn.scaling if hasattr(attn, "scaling") else attn.scale


def _dropout(attn: Any) -> float:
    rate = attn.dropout if hasattr(attn, "dropout") else attn.attention_dropout
    return float(rate)
