"""The option --threads of commands that time what runs on a CPU."""

from __future__ import annotations

import argparse

__all__ = ["add_threads", "check_threads"]


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads (default: the physical cores)",
    )


def check_threads(args: argparse.Namespace) -> None:
    """Refuse a number that no processor has."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
