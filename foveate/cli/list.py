"""List the methods, and what each does and needs.

In a terminal:
  foveate list
  foveate list evit tome
  foveate list --json
"""

from __future__ import annotations

import argparse
import json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument(
        "methods", nargs="*", default=[], metavar="METHOD", help="methods to list (default: all)"
    )
    parser.set_defaults(more="methods")
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from dataclasses import MISSING, fields

    import foveate
    from foveate.registry import method_class

    rows = []
    for name in args.methods or foveate.list_methods():
        method = method_class(name)
        options = {f.name: None if f.default is MISSING else f.default for f in fields(method)}
        rows.append(
            {
                "method": name,
                "what it does": method.summary,
                "training": method.training_need,
                "tokens": "fixed" if method().fixed_count else "per image",
                "options": options,
                "paper": method.paper,
            }
        )
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    _print(rows, wide=bool(args.methods))


def _print(rows: list[dict[str, object]], *, wide: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if wide:
        for row in rows:
            options = row.pop("options")
            assert isinstance(options, dict)
            console.print(f"[bold]{row.pop('method')}[/bold]")
            for key, value in row.items():
                console.print(f"  {key}: {value}", highlight=False, soft_wrap=True)
            listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
            console.print(f"  options: {listed}", highlight=False, soft_wrap=True)
        return
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name in ("method", "what it does", "training", "tokens"):
        table.add_column(name, overflow="fold", no_wrap=name == "method")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("method", "what it does", "training", "tokens"))
        )
    console.print(table)
    console.print('\n`foveate list METHOD` has its options; several run as "evit + tome(r=4)".')
