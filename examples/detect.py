"""A detector on a vision transformer, trained dense, then with fewer tokens.

python examples/detect.py

The two stages of the SViT paper in small: train dense, put gates on the same weights, fine-tune,
calibrate. Images are grey noise with bright squares, so that it ends in seconds; it shows how the
parts fit together, and no accuracy.
"""

import timm
import torch

import foveate
from foveate.dense import calibrate, mask_rcnn, pyramid

vit = timm.models.VisionTransformer(
    img_size=64, patch_size=8, in_chans=1, embed_dim=48, depth=4, num_heads=3, num_classes=0
)
backbone = pyramid(vit, scales=(2, 1, 0.5), channels=32)  # strides 4, 8 and 16
dense = mask_rcnn(
    backbone,
    num_classes=1,
    channels=32,
    box_channels=64,
    mask_channels=16,
    mask_layers=1,
    anchor_scale=4,
    proposals=(100, 50),
    image_size=None,  # images come as they are
)


def scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image of its own size with one square, and where the square is."""
    draw = torch.Generator().manual_seed(seed)
    height, width, side = torch.randint(40, 64, (3,), generator=draw).tolist()
    side //= 3
    top, left = (int(torch.randint(n - side, (1,), generator=draw)) for n in (height, width))
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top : top + side, left : left + side] = 1
    image = 0.3 * torch.rand(1, height, width, generator=draw) + 0.6 * mask
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return image, {"boxes": box, "labels": torch.zeros(1, dtype=torch.long), "masks": mask}


def train(model: torch.nn.Module, steps: int, lr: float) -> dict[str, float]:
    """Train for a few steps and return the last losses."""
    optimiser = torch.optim.AdamW(model.train().parameters(), lr)
    for step in range(steps):
        images, targets = zip(*(scene(4 * step + n) for n in range(4)), strict=True)
        losses = model(images, targets)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return {name: round(float(value), 3) for name, value in losses.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    print("dense:", train(dense, steps=15, lr=1e-3))
    sparse = foveate.apply(dense, "svit", keep=0.7)
    print(sparse.reducer, train(sparse, steps=5, lr=1e-4))

    images = [scene(1000 + n)[0] for n in range(4)]
    calibrate(sparse, [images])
    trace = sparse.trace(images)
    print("patches of each image:", [sum(block) for block in trace.blocks[0].active().tolist()])
    for number, block in enumerate(trace.blocks):
        print(f"in block {number}:", block.active().sum(1).tolist())
    print("boxes found:", [len(answer["boxes"]) for answer in sparse.eval()(images)])
