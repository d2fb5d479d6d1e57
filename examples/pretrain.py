"""Masked token optimisation on a method of one's own, in a loop of one's own.

python examples/pretrain.py

A method is a ViT, what is added to it, and a forward pass that gives losses and the tokens of each
layer. Losses of MTO, analysis and `foveate pretrain` need no more. Tiny: it ends in seconds.
"""

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from foveate.data import fashion_mnist_mini, normalise
from foveate.mim import (
    Hiding,
    Mask,
    MaskedImageModel,
    Mto,
    Prediction,
    States,
    mto_losses,
    register,
)
from foveate.mim.layers import measure_layers
from foveate.mim.targets import patchify
from foveate.train.draws import Draws


@register("means")
class Means(MaskedImageModel):
    """Predicts the mean brightness of every hidden patch."""

    paper = "none"
    hiding = Hiding(kind="random", ratio=0.5)

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        width = self.backbone.spec.width
        self.token, self.head = nn.Parameter(torch.zeros(width)), nn.Linear(width, 1)

    @property
    def depth(self) -> int:
        return self.backbone.spec.depth

    def forward(self, images: Tensor, mask: Mask, *, states: bool = False) -> Prediction:
        backbone, prefix = self.backbone, self.backbone.spec.prefix
        initial: list[Tensor] = []

        def hide(patches: Tensor) -> Tensor:
            initial.append(torch.where(mask.hidden[..., None], self.token, patches))
            return initial[0]

        embedded = backbone.embed(images, hide)
        layers = [embedded.x]
        x = backbone.norm(backbone.through(embedded.x, embedded.grid, layers.append))
        guess = self.head(x[:, prefix:])
        target = patchify(images, backbone.spec.patch).mean(-1, keepdim=True)
        error = (guess - target).square()[..., 0]
        loss = (error * mask.hidden).sum() / mask.hidden.sum()
        seen = States([layer[:, prefix:] for layer in layers], initial[0])
        return Prediction({"mean": loss}, guess, mask, (seen,) if states else ())

    def pixels(self, images: Tensor, patches: Tensor) -> Tensor:
        return patches.expand(-1, -1, self.values)  # for pictures

    def initialise(self) -> None:
        nn.init.normal_(self.token, std=0.02)


def main() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, embed_dim=48, depth=3, num_heads=3, num_classes=0
    )
    model = Means(vit)
    model.initialise()
    images = normalise(fashion_mnist_mini("train")[0])
    hiding, choices, steps = Hiding().filled(model.hiding), Mto(), 40
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        mask = hiding.draw(len(batch), (7, 7), (4, 4), Draws(0, 0, step))
        found = model(batch, mask, states=True)
        losses = {**found.losses, **mto_losses(found.states, mask, choices)}
        weights = choices.weights_at(step / steps)
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0:
            print(step, {name: round(value.item(), 3) for name, value in losses.items()})
    (layers,) = measure_layers(model.eval(), images[:64], mask)
    print("heterogeneity by layer:", [round(level, 2) for level in layers.heterogeneity])


if __name__ == "__main__":
    main()
