"""A model and a data set of one's own: train it, make it cheaper, look at the curves.

python examples/own_data.py

The first half stands for what a notebook has already: a data set with a transform of torchvision,
and the sizes of a ViT. The second half is foveate. It ends in seconds, because the model has three
blocks and the set 400 images.
"""

import tempfile

import timm
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import foveate
from foveate.data import CLASSES, fashion_mnist_mini


class Clothes(Dataset):
    """Images as finished tensors: what the transform makes of them is what the model sees."""

    def __init__(self, part: str, count: int, transform: v2.Transform) -> None:
        images, self.targets = fashion_mnist_mini(part)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        self.images, self.targets = images[order], self.targets[order]
        self.classes, self.transform = CLASSES, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(tv_tensors.Image(self.images[index])), int(self.targets[index])


plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.286], [0.353])])
augmented = v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip(), plain])
sizes = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
}

if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    model = timm.models.VisionTransformer(**sizes, num_classes=len(CLASSES))
    data = {"train": Clothes("train", 400, augmented), "val": Clothes("test", 200, plain)}
    data |= {"batch": 40, "val_batch": 200}

    trained = foveate.finetune(
        model, data, optim={"lr": 5e-3}, loop={"epochs": 4}, out=f"{folder}/plain", progress=False
    )
    cheaper = foveate.reduce(
        model, "evit(keep=0.5)", data, optim={"lr": 5e-4}, loop={"epochs": 1}, out=f"{folder}/evit",
        progress=False,
    )  # fmt: skip
    trained.plot().savefig(f"{folder}/curves.png")
    print(trained, cheaper, trained.history.tail(3), foveate.describe(cheaper.model), sep="\n\n")
