"""Show versions and the machine, for a bug report.

In a terminal:
  foveate env
"""

from __future__ import annotations

import argparse
import re

__all__ = ["add_arguments", "run"]

_BROUGHT = "torchvision"  # by timm
_OURS = {"dev", "docs", "test"}  # extras of those who work on foveate
_REQUIREMENT = re.compile(r"([\w-]+).*?(?:extra == '(\w+)')?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print what matters."""
    import os
    import platform

    import torch

    from foveate.machine import malloc_untuned, physical_cores, version_of

    print(f"python           {platform.python_version()}")
    versions = {name: version_of(name) for name in ("foveate", *_libraries())}
    for name, version in versions.items():
        if version is not None:
            print(f"{name:16} {version}")
    missing = [name for name, version in versions.items() if version is None]
    print(f"not installed    {', '.join(missing) or 'nothing that foveate can use'}")
    print(f"system           {platform.system()} {platform.release()}, {platform.machine()}")
    print(f"cores            {os.cpu_count()}, {physical_cores()} of them physical")
    print(f"threads          {torch.get_num_threads()}")
    for number in range(torch.cuda.device_count()):
        print(f"cuda:{number}           {torch.cuda.get_device_name(number)}")
    if not torch.cuda.is_available():
        print("cuda             none")
    tuned = "no, `foveate bench` starts itself with it" if malloc_untuned("cpu") else "yes"
    print(f"malloc tuned     {tuned}")


def _libraries() -> list[str]:
    """Name the packages that foveate uses, as its own metadata says."""
    import importlib.metadata

    try:
        required = importlib.metadata.requires("foveate") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    found = [_REQUIREMENT.fullmatch(one) for one in required]
    names = {match[1] for match in found if match is not None and match[2] not in _OURS}
    return sorted({*names, _BROUGHT})
