"""Drive Hugging Face's DINOv2, with or without register tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.backbones._hf import Form, HfBackbone, classifier
from foveate.core import TokenState, pool_tokens

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

    def scale(self, block: int, out: Tensor) -> Tensor:
        """Apply LayerScale."""
        return self._blocks[block].layer_scale1(out)

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply second norm, MLP and LayerScale."""
        return self._blocks[block].layer_scale2(super().feedforward(block, x))

    def drop_path(self, block: int, branch: int) -> nn.Module | None:
        """Return the module that serves both branches; None if its rate is zero."""
        module = self._blocks[block].drop_path
        return None if isinstance(module, nn.Identity) else module

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last layer."""
        return self.tower.layernorm(x)

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """Return the class token, or the classifier's logits from it and the patches' mean."""
        token = state.prefix_tokens()[:, 0]
        if not self.form.tower:
            return {"pooler_output": token}
        pooled = torch.cat([token, pool_tokens(state, "avg")], 1)
        return {"logits": self.model.classifier(pooled)}

    def _prefix(self, tower: Any) -> int:
        registers = getattr(tower.embeddings, "register_tokens", None)
        return 1 if registers is None else 1 + int(registers.shape[1])

    def _pools(self, form: Form) -> bool:
        return bool(form.tower)
