"""Open a page in the browser: drop a photograph and see what methods keep, merge and bring back.

The page has a tab for a photograph and any ViT, one for detectors and segmenters, and one for the
results of runs and comparisons. It works without a network, can be reached from this machine alone,
and opens only files in --folders and uploads. Ctrl-C ends it.
It needs gradio: pip install 'foveate[app]'

In a terminal:
  foveate app
  foveate app --folders runs/ results/ --port 8000
  foveate app --folders runs/ --device cuda --max-upload 50
"""

from __future__ import annotations

import argparse

from foveate.cli.threads import add_threads, check_threads

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add(
        "--folders",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders whose runs, models and comparisons the page may open (default: none)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, which this machine alone can reach)",
    )
    add("--port", type=int, default=7860, metavar="N", help="port to listen at (default: 7860)")
    add(
        "--max-upload",
        type=float,
        default=20.0,
        metavar="MB",
        help="size of the largest photograph that is taken (default: 20 megabytes)",
    )
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default)")
    add_threads(parser)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    check_threads(args)
    if not args.max_upload > 0:
        raise ValueError(f"--max-upload must be above 0, got {args.max_upload:g}")
    from foveate import machine

    device = machine.device_of(args.device)
    machine.tune_malloc(device)
    import threading

    import torch

    from foveate.app.page import Page, is_local, running
    from foveate.app.places import Places

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    page = Page(Places(args.folders), device, args.max_upload)
    with running(page, args.host, args.port) as address:
        if not is_local(args.host):
            print(
                f"warning  at {args.host} everybody who can reach this machine can use the page: "
                "it has no password"
            )
        print(f"open     {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
