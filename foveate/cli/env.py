"""Show versions and the machine, for a bug report.

In a terminal:
  foveate env
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]

_LIBRARIES = (
    "foveate",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "safetensors",
    "numpy",
    "matplotlib",
    "pillow",
    "rich",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print what matters."""
    import os
    import platform

    import torch

    from foveate.machine import malloc_untuned, physical_cores, version_of

    print(f"python        {platform.python_version()}")
    for name in _LIBRARIES:
        print(f"{name:13} {version_of(name) or 'not installed'}")
    print(f"system        {platform.system()} {platform.release()}, {platform.machine()}")
    print(f"cores         {os.cpu_count()}, {physical_cores()} of them physical")
    print(f"threads       {torch.get_num_threads()}")
    for number in range(torch.cuda.device_count()):
        print(f"cuda:{number}        {torch.cuda.get_device_name(number)}")
    if not torch.cuda.is_available():
        print("cuda          none")
    tuned = "no, `foveate bench` starts itself with it" if malloc_untuned("cpu") else "yes"
    print(f"malloc tuned  {tuned}")
