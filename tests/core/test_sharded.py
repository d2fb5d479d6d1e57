"""Blocks sharded with ``fully_shard``: two processes compute what one computes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import images, randomise, vit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import foveate

METHODS = ("evit(keep=0.5)", "dynamicvit(keep=0.5)", "tome(r=4)", "ats(K=12)", "svit(keep=0.5)")


def made(method: str) -> nn.Module:
    model = foveate.apply(randomise(vit()), method, check=False).train()
    randomise(model.reducer, seed=1)
    return model


def trained(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # gates draw
    out = model(images())
    out.square().sum().backward()
    return out.detach()


def whole(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def compare(method: str, mesh: DeviceMesh) -> None:
    plain, model = made(method), made(method)
    for block in model.vit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sizes = [len(p.to_local()) / len(p) for p in model.vit.blocks[0].parameters()]
    assert set(sizes) == {0.5}, sizes  # half of every parameter is here
    assert torch.equal(trained(model), trained(plain))
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        grad = whole(found.grad)
        if expected.grad is None:
            assert grad is None or not grad.any(), name
        else:
            torch.testing.assert_close(grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for method in METHODS:
        compare(method, mesh)
    inside = made("evit(keep=0.5)")
    fully_shard(inside.vit, mesh=mesh)
    with pytest.raises(RuntimeError, match="on each of its blocks and on the reduced model"):
        inside(images())
    Path(folder, str(rank)).touch()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_blocks_compute_what_one_process_computes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
