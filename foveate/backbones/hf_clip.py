"""Drive Hugging Face's CLIP: the vision model alone, with its projection or a classifier."""

from __future__ import annotations

from torch import Tensor

from foveate.backbones._hf import Form, HfBackbone, classifier
from foveate.core import Embedded, TokenState, pool_tokens

__all__ = ["HfClip"]


class HfClip(HfBackbone):
    """Parts of ``CLIPVisionModel``, with a projection or not, and ``CLIPForImageClassification``.

    The last norm belongs to the head, so the tokens of the last layer are not normed.
    """

    family = "Hugging Face CLIP"
    library = ("clip",)
    forms = {
        "CLIPVisionModel": Form(),
        "CLIPVisionModelWithProjection": Form(
            "vision_model", "CLIPVisionModelOutput", "image_embeds"
        ),
        "CLIPForImageClassification": classifier("vision_model"),
    }
    attention = "self_attn"
    out = "out_proj"
    norms = ("layer_norm1", "layer_norm2")
    layers = "encoder.layers"
    patches = "embeddings.patch_embedding"

    def embed(self, images: Tensor) -> Embedded:
        """Run the model's own embeddings and the norm before the layers."""
        embedded = super().embed(images)
        return Embedded(self.tower.pre_layrnorm(embedded.x), embedded.grid)

    def norm(self, x: Tensor) -> Tensor:
        """Return tokens unchanged: the head norms the class token."""
        return x

    def answers(self, state: TokenState) -> dict[str, Tensor | None]:
        """Return the normed class token, its projection, or logits from the patches' mean."""
        model = self.model
        if self.form.main == "logits":
            return {"logits": model.classifier(pool_tokens(state, "avg"))}
        token = self.tower.post_layernorm(state.prefix_tokens()[:, 0])
        if not self.form.tower:
            return {"pooler_output": token}
        return {"image_embeds": model.visual_projection(token)}

    def _pools(self, form: Form) -> bool:
        return form.main == "logits"
