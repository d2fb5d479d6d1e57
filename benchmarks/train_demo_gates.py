"""Train the gates that ship with the demo: four methods on the frozen demo model.

python benchmarks/train_demo_gates.py

Uses the shipped part of Fashion-MNIST alone. The backbone stays as it is, so one set of weights
serves all methods; what a method could reach if the backbone were trained with it is not shown.
Writes foveate/data/files/demo_METHOD/ and benchmarks/results/demo_gates.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import foveate
from foveate.data import fashion_mnist_mini, normalise
from foveate.data.demo import demo_vit
from foveate.demo.cells import TRAINED, accuracy, shipped_images

ROOT = Path(__file__).parents[1]
LOG = ROOT / "benchmarks" / "results" / "demo_gates.json"


def train(method: str, steps: int, batch: int, rate: float) -> dict:
    """Train one method's gates at keep 0.7 and save them."""
    torch.manual_seed(0)
    vit = demo_vit().requires_grad_(False)
    images, labels = fashion_mnist_mini("train")
    images = normalise(images)
    model = foveate.apply(vit, method, keep=0.7, check=False).train()
    optimiser = torch.optim.AdamW(model.parameter_groups()["new"], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    weights, started = model.reducer.loss_weights, time.time()
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        with torch.no_grad():
            teacher = vit(images[chosen])
        outcome = model.run(images[chosen])
        own = model.reducer.losses(outcome.notes)
        loss = F.cross_entropy(outcome.logits, labels[chosen])
        loss = loss + sum(weights[name] * value for name, value in own.items())
        loss = loss + F.kl_div(
            outcome.logits.log_softmax(1), teacher.softmax(1), reduction="batchmean"
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{method} step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    foveate.save(model, ROOT / "foveate" / "data" / "files" / f"demo_{method}")
    right = accuracy(model, *shipped_images())
    counted = foveate.count(model, images=shipped_images()[0][:500])
    return {
        "method": repr(model.reducer),
        "test_accuracy": right,
        "gmacs": counted.macs / 1e9,
        "minutes": round((time.time() - started) / 60, 1),
    }


def main() -> None:
    """Train all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=list(TRAINED))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-3)
    options = parser.parse_args()
    results = [
        train(method, options.steps, options.batch, options.rate) for method in options.methods
    ]
    record = {
        "what": "gates of the demo, backbone frozen, shipped training images",
        "command": "python benchmarks/train_demo_gates.py",
        "settings": vars(options),
        "torch": torch.__version__,
        "results": results,
    }
    LOG.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
