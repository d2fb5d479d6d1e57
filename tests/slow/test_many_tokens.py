"""Masked training where attention maps are large: DeiT-S at 4 225 patches fits in 6 GB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc"),
]

# One update in a process of its own, which prints the most memory that it ever had. What
# getrusage says would be at least what the process that started it had.
SCRIPT = """
import pathlib, re, sys, timm, torch, foveate
from foveate.core import attention

if sys.argv[1] == "whole":
    attention._SOFT_WHOLE = 10**6  # never in chunks
torch.manual_seed(0)
model = timm.create_model("deit_small_patch16_224", img_size=1040, num_classes=10)
model = foveate.apply(model, "dynamicvit(keep=0.7)", check=False).train()
model.set_grad_checkpointing(True)
image = torch.randn(1, 3, 1040, 1040)
assert model.resolved_mode() == "masked"
outcome = model.run(image)
assert outcome.state.layout.longest == 4226
losses = model.reducer.losses(outcome, torch.tensor([3]))
(outcome.logits.square().sum() + losses["ratio"]).backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[2])
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024)
"""


def update(kind: str, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """One update of masked training: peak memory in GB, and the gradients."""
    command = [sys.executable, "-c", SCRIPT, kind, str(folder / f"{kind}.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1e9, torch.load(folder / f"{kind}.pt")


def test_masked_training_fits_in_six_gigabytes(tmp_path: Path) -> None:
    memory, found = update("chunks", tmp_path)
    more, expected = update("whole", tmp_path)
    print(f"\npeak memory: {memory:.2f} GB in chunks, {more:.2f} GB with whole maps")
    assert memory < 6 and memory < more
    assert found.keys() == expected.keys() and len(found) > 150
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name
        )
        assert grad.any(), name
