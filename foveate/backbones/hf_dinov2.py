"""Hugging Face DINOv2, with and without register tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbones._hf import Form, HfBackbone, classifier
from foveate.core import Heads, TokenState, pool_tokens

__all__ = ["HfDinov2"]


class HfDinov2(HfBackbone):
    """Parts of ``Dinov2Model``, ``Dinov2WithRegistersModel`` and their classifiers."""

    family = "Hugging Face DINOv2"
    library = ("dinov2", "dinov2_with_registers")
    forms = {
        "Dinov2Model": Form(),
        "Dinov2ForImageClassification": classifier("dinov2"),
        "Dinov2WithRegistersModel": Form(),
        "Dinov2WithRegistersForImageClassification": classifier("dinov2_with_registers"),
    }
    norms = ("norm1", "norm2")
    layers = "encoder.layer"
    always_resizes = True

    def project(self, block: int, out: Tensor, heads: Heads) -> Tensor:
        """The output projection and LayerScale."""
        return self._blocks[block].layer_scale1(super().project(block, out, heads))

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Second norm, MLP and LayerScale."""
        return self._blocks[block].layer_scale2(super().feedforward(block, x))

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """One module serves both branches of a layer; None where its rate is zero."""
        module = self._blocks[block].drop_path
        return None if isinstance(module, nn.Identity) else module

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer."""
        return self.tower.layernorm(x)

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """The class token, or what the classifier makes of it and the mean of the patches."""
        token = state.prefix_tokens()[:, 0]
        if not self.form.tower:
            return {"pooler_output": token}
        pooled = torch.cat([token, pool_tokens(state, "avg")], 1)
        return {"logits": self.model.classifier(pooled)}

    def _prefix(self, tower: Any) -> int:
        registers = getattr(tower.embeddings, "register_tokens", None)
        return 1 if registers is None else 1 + int(registers.shape[1])

    def _pools(self, tower: Any, form: Form) -> bool:
        return bool(form.tower)
