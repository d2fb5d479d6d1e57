"""Drive Hugging Face's SigLIP, which has no class token: the vision model or a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.backbones._hf import Form, HfBackbone, classifier
from foveate.core import TokenState, linear_cost, pool_mask, pool_tokens

__all__ = ["HfSiglip"]


class HfSiglip(HfBackbone):
    """Parts of ``SiglipVisionModel`` and ``SiglipForImageClassification``.

    A vision model without its pooling head answers with the mean of its tokens.
    """

    family = "Hugging Face SigLIP"
    library = ("siglip",)
    forms = {
        "SiglipVisionModel": Form(),
        "SiglipForImageClassification": classifier("vision_model"),
    }
    attention = "self_attn"
    out = "out_proj"
    norms = ("layer_norm1", "layer_norm2")
    layers = "encoder.layers"
    patches = "embeddings.patch_embedding"

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last layer."""
        return self.tower.post_layernorm(x)

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """Apply attention pooling, or the classifier on the mean, to the tokens that are left."""
        if self.form.tower:
            return {"logits": self.model.classifier(pool_tokens(state, "avg"))}
        return {"pooler_output": self._attended(state) if self.tower.use_head else None}

    def _attended(self, state: TokenState) -> Tensor:
        """Run the model's pooling head; padding and dead tokens are masked out."""
        head, tokens, mask = self.tower.head, state.tokens(), pool_mask(state)
        hidden = None
        if mask is not None:
            hidden = ~mask[:, 0, 0]
            # Attention over no token at all is NaN; such an image attends to its padding.
            hidden = hidden & ~hidden.all(1, keepdim=True)
        probe = head.probe.expand(len(tokens), -1, -1)
        x, _ = head.attention(probe, tokens, tokens, key_padding_mask=hidden, need_weights=False)
        return (x + head.mlp(head.layernorm(x)))[:, 0]

    def _headless(self, state: TokenState) -> Tensor:
        return pool_tokens(state, "avg")

    def _prefix(self, tower: Any) -> int:
        return 0

    def _pools(self, form: Form) -> bool:
        return True

    def _head_costs(self, model: Any, form: Form) -> tuple[int, int]:
        if form.tower or not model.use_head:
            return super()._head_costs(model, form)
        width = model.head.probe.shape[-1]
        # There is one query. Each token has a key, a value and two products with the query.
        once = width * width + linear_cost(model.head)
        return once, 2 * width * width + 2 * width
