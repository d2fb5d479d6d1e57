"""Masked fine-tuning and DynamicViT from Python: a recipe is a dataclass, a run is one call.

python examples/train.py

Tiny, so that it ends in seconds: 256 images that ship with the package and a model of two blocks.
`foveate finetune --list` shows recipes that train something.
"""

import tempfile
from pathlib import Path

import foveate
from foveate.data import Augment
from foveate.train import recipe as recipes
from foveate.train.run import train

DATA = recipes.Data(
    train="fashion-mnist",
    mean=(0.286,),
    std=(0.353,),
    augment=Augment(crop="pad", pad=2),
    batch=64,
    limit=256,
    val_limit=256,
)
SMALL = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
}


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    masked = recipes.Finetune(
        model=recipes.Model(name="vit_tiny_patch16_224", options=SMALL),
        data=DATA,
        optim=recipes.Optim(lr=2e-3, warmup_epochs=1, clip=1.0),
        loop=recipes.Loop(epochs=3, loggers=()),
        masking=recipes.Masking(ratios=(0.0, 0.25, 0.5, 0.75)),
    )
    print("masked:", train(masked, folder / "masked", progress=False)["accuracy"])

    reduced = recipes.Reduce(
        method="dynamicvit(keep=0.7)",
        model=recipes.Model(start=str(folder / "masked")),  # the dense start is the teacher too
        data=DATA,
        optim=recipes.Optim(lr=2e-3, backbone_scale=0.1, frozen_epochs=0.5),
        loop=recipes.Loop(epochs=2, loggers=()),
    )
    print("reduced:", train(reduced, folder / "reduced", progress=False)["accuracy"])

    model = foveate.load(folder / "reduced")  # a run's folder stands for its model
    print(foveate.describe(model))


if __name__ == "__main__":
    main()
