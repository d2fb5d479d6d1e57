"""Train the small ViT that ships with the package, from scratch on the whole Fashion-MNIST.

python benchmarks/train_demo_model.py FOLDER_OF_FASHION_MNIST
python benchmarks/train_demo_model.py FOLDER --go-on --epochs 4 --rate 8e-4 --smoothing 0 --path 0

Plain supervised training, so that the demo shows what methods do to a model that never heard of
them. Writes foveate/data/files/demo_vit.safetensors (half precision) and, beside the other
results, benchmarks/results/demo_vit.json with settings, accuracy after every epoch and machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data import fashion_mnist, normalise
from foveate.data.demo import demo_arguments

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "foveate" / "data" / "files" / "demo_vit.safetensors"
LOG = ROOT / "benchmarks" / "results" / "demo_vit.json"


def augment(images: Tensor) -> Tensor:
    """Shift by up to two pixels and mirror half of the images."""
    rows, columns = torch.randint(0, 5, (2,)).tolist()
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    moved = padded[..., rows : rows + 28, columns : columns + 28]
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, moved.flip(-1), moved)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in per cent."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train()
    return 100 * right / len(labels)


def main() -> None:
    """Train, and save after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--path", type=float, default=0.05, help="stochastic depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="from the weights that are there")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, test = fashion_mnist(options.folder), fashion_mnist(options.folder, "test")
    images, held = normalise(train.images), normalise(test.images)
    model = timm.models.VisionTransformer(**demo_arguments(), drop_path_rate=options.path)
    runs = []
    if options.go_on:
        model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        runs = json.loads(LOG.read_text())["runs"]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=options.rate,
    )
    steps = options.epochs * (len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.rate, total_steps=steps, pct_start=0.1
    )

    @torch.compile  # twice as fast here as without, in bfloat16
    def compiled(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), y, label_smoothing=options.smoothing)

    settings = {k: v for k, v in vars(options).items() if k != "folder"}
    epochs, started = [], time.time()
    for epoch in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(options.batch):
            if len(chosen) < options.batch:
                continue
            loss = compiled(augment(images[chosen]), train.labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * options.batch
            if (step := schedule.last_epoch) % 50 == 0:
                print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
        epochs.append(
            {
                "epoch": epoch + 1,
                "loss": round(total / len(images), 4),
                "test_accuracy": round(accuracy(model, held, test.labels), 2),
                "minutes": round((time.time() - started) / 60, 1),
            }
        )
        print(epochs[-1], flush=True)
        save_file({k: v.half() for k, v in model.state_dict().items()}, WEIGHTS)
        record = {
            "what": "the demo model: supervised from scratch on 60 000 images of Fashion-MNIST",
            "command": "python benchmarks/train_demo_model.py FOLDER, once for each run",
            "model": demo_arguments(),
            "machine": {"cores": torch.get_num_threads(), "processor": platform.machine()},
            "torch": torch.__version__,
            "runs": [*runs, {"settings": settings, "epochs": epochs}],
        }
        LOG.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
