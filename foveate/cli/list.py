"""List the methods, and what each does and needs.

In a terminal:
  foveate list
  foveate list evit tome
  foveate list --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

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
    from foveate.config import meanings
    from foveate.registry import method_class

    rows, about = [], {}
    for name in args.methods or foveate.list_methods():
        method = method_class(name)
        about[name] = meanings(method)
        options = {f.name: None if f.default is MISSING else f.default for f in fields(method)}
        if method.rate:  # the option that matters most comes first
            options = {method.rate: options[method.rate], **options}
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
    if args.methods:
        _print_methods(rows, about)
    else:
        _print_table(rows)


def _print_methods(rows: list[dict[str, Any]], about: dict[str, dict[str, str]]) -> None:
    """Print all facts about each method, and what each option means."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console = Console(highlight=False)
    for row in rows:
        name, options = row.pop("method"), row.pop("options")
        console.print(f"[bold]{name}[/bold]")
        for key, value in row.items():
            console.print(f"  {key}: {escape(str(value))}", soft_wrap=True)
        console.print("  options:")
        table = Table.grid(padding=(0, 2))
        for option, value in options.items():
            meaning = about[name].get(option, "").replace("``", "")
            table.add_row(escape(f"{option}={value!r}"), escape(meaning))
        console.print(Padding(table, (0, 0, 0, 4)))


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name in ("method", "what it does", "training", "tokens"):
        table.add_column(name, overflow="fold", no_wrap=name == "method")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("method", "what it does", "training", "tokens"))
        )
    console.print(table)
    console.print('\n`foveate list METHOD` has its options; several run as "evit + tome(r=4)".')
