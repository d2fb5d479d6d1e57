"""Facts about the machine that numbers depend on: malloc, threads, versions, processors."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "command",
    "commit",
    "device_of",
    "facts",
    "has_int8",
    "malloc_untuned",
    "name",
    "physical_cores",
    "tune_malloc",
    "version_of",
]

# Without these, glibc returns large activations to the system after every call and the page faults
# make a dense DeiT-S up to 40 % slower, differently in every process.
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
_INT8 = ("vnni", "amx_int8", "asimddp", "i8mm")  # of x86 and ARM, as Linux names them
_ROOT = Path(__file__).resolve().parents[1]


def malloc_untuned(device: str) -> dict[str, str]:
    """Return the settings of malloc that this process should have been started with but was not.

    None are missing on CUDA, with a C library other than glibc, or under a preloaded malloc.
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return {}
    return {name: value for name, value in _MALLOC.items() if name not in os.environ}


def tune_malloc(device: str, program: str = "foveate") -> None:
    """Restart this program with malloc tuned, unless it is tuned already.

    Nothing happens in a process that is another program, such as one that imports this one.
    """
    missing = malloc_untuned(device)
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    # The script that pip makes is .../foveate; python -m foveate runs foveate/__main__.py.
    if not missing or program not in (main.name, main.parent.name):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def device_of(name: str) -> str:
    """Return the device of that name; "auto" is a GPU if there is one, else the CPU.

    The CPU and CUDA are legal: other devices are not tested, and timing waits for CUDA alone.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch finds no device {name}")
    return name


def physical_cores() -> int:
    """Count the cores that this process may use, hyper-threads once."""
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return len(usable)
    return max(1, len(cores))


def commit() -> str | None:
    """Return the commit that is measured, marked if the working tree differs; None if unknown.

    The variable FOVEATE_COMMIT replaces what git says, because the code may be a copy.
    """
    if said := os.environ.get("FOVEATE_COMMIT"):
        return said
    if not (_ROOT / ".git").exists():  # installed, perhaps into somebody else's repository
        return None
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "foveate", "benchmarks")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (" with uncommitted changes" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def command(program: str) -> str:
    """Return the command line after the program's name, without folders of this machine."""
    return f"{program} {shlex.join(map(_without_folder, sys.argv[1:]))}".strip()


def _without_folder(word: str) -> str:
    """Shorten absolute paths to their last part, also in ``key=/path`` and ``kind:/path``."""
    before, sign, path = re.fullmatch(r"(.*?)([=:]?)(/.*|)", word, re.S).groups()  # type: ignore
    if not path or (before and not sign):
        return word
    return f"{before}{sign}{Path(path).name}"


def facts(device: str) -> dict[str, Any]:
    """Return the versions and names that readers need to judge a number, and nothing private."""
    import timm
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": version_of("transformers"),
        "foveate": version_of("foveate"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": device,
        "malloc": {name: os.environ.get(name) for name in _MALLOC} if device == "cpu" else None,
        "malloc_tuned": not malloc_untuned(device),
        "preload": bool(os.environ.get("LD_PRELOAD")),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = card.name
        found["gpu_memory_gib"] = round(card.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def name(found: Mapping[str, Any]) -> str:
    """Return the processor that ``facts`` found, in a few words."""
    return str(found.get("gpu") or f"{found['cpu']}, {found['threads']} threads")


def version_of(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # not installed, or run from a checkout


def has_int8() -> bool:
    """Tell whether the processor has 8-bit product instructions; assume so if it is unknown."""
    text = _cpuinfo()
    return not text or any(flag in text for flag in _INT8)


def _cpu_name() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _cpuinfo() -> str:
    """Return what Linux says about the processor; "" on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
