"""Drive Hugging Face's ViT and DeiT. DeiT has a distillation token beside its class token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.backbones._hf import Form, HfBackbone, classifier
from foveate.core import TokenState, linear_cost

__all__ = ["HfViT"]


class HfViT(HfBackbone):
    """Parts of ``ViTModel``, ``DeiTModel`` and the classifiers built on them."""

    family = "Hugging Face ViT"
    library = ("vit", "deit")
    forms = {
        "ViTModel": Form(),
        "ViTForImageClassification": classifier("vit"),
        "DeiTModel": Form(),
        "DeiTForImageClassification": classifier("deit"),
        "DeiTForImageClassificationWithTeacher": Form(
            "deit", "DeiTForImageClassificationWithTeacherOutput", "logits", tokens=False
        ),
    }
    norms = ("layernorm_before", "layernorm_after")
    layers = "layers"

    def scale(self, block: int, out: Tensor) -> Tensor:
        """Apply dropout."""
        return self._blocks[block].dropout(out)

    def feedforward(self, block: int, x: Tensor) -> Tensor:
        """Apply second norm, MLP and dropout."""
        return self._blocks[block].dropout(super().feedforward(block, x))

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last layer."""
        return self.tower.layernorm(x)

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """Apply the pooler, the classifier or both of DeiT's heads to the prefix tokens."""
        model, tokens = self.model, state.prefix_tokens()
        if not self.form.tower:
            return {"pooler_output": None if model.pooler is None else model.pooler(tokens)}
        if hasattr(model, "classifier"):
            return {"logits": model.classifier(tokens[:, 0])}
        token, distilled = tokens[:, :2].unbind(1)
        cls_logits = model.cls_classifier(token)
        distillation_logits = model.distillation_classifier(distilled)
        return {
            "logits": (cls_logits + distillation_logits) / 2,
            "cls_logits": cls_logits,
            "distillation_logits": distillation_logits,
        }

    def _prefix(self, tower: Any) -> int:
        return 2 if hasattr(tower.embeddings, "distillation_token") else 1

    def _head_costs(self, model: Any, form: Form) -> tuple[int, int]:
        if form.tower:
            return super()._head_costs(model, form)
        return linear_cost(model.pooler), 0

    def _arguments(self) -> dict[str, Any]:
        if self.form.tower:
            return {}
        return {
            "add_pooling_layer": self.tower.pooler is not None,
            "use_mask_token": self.tower.embeddings.mask_token is not None,
        }
