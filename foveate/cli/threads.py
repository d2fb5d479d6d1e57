"""The option --threads of commands that time models, and the preparation of timing."""

from __future__ import annotations

import argparse

__all__ = ["add_threads", "check_threads", "prepare_timing"]


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads (default: one for each physical core)",
    )


def check_threads(args: argparse.Namespace) -> None:
    """Refuse a number of threads below 1."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")


def prepare_timing(args: argparse.Namespace) -> None:
    """Set device and threads for timing; malloc is tuned before torch is imported."""
    from foveate import machine

    args.device = machine.device_of(args.device)
    machine.tune_malloc(args.device)

    import torch

    torch.set_num_threads(args.threads or machine.physical_cores())
