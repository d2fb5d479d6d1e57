"""The ``foveate`` command: one file of this folder for each of its commands.

A command's file has a docstring, whose first line is its help, ``add_arguments(parser)`` and
``run(args)``. It imports whatever is heavy inside ``run``, so that help comes at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["COMMANDS", "main"]

COMMANDS = (
    *("adapt", "app", "bench", "compare", "convert", "data", "demo", "describe", "detect", "env"),
    *("eval", "export", "finetune", "list", "look", "pipeline", "predict", "pretrain", "probe"),
    *("push", "rauc", "reduce", "segment", "show", "tune"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    That is 0, or 2 for what the user can mend, said in one sentence. A command may return another
    code: 1 where it did only a part of the work.
    """
    parser, commands = _parsers()
    # Not list(...): the command of that name is an attribute of this package.
    given = [*(sys.argv[1:] if argv is None else argv)]
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(COMMANDS)}"
        parser.error(f"unknown command {given[0]!r}{hint}")
    args, rest = parser.parse_known_args(argv)
    # Between and after options argparse takes no more positional values.
    several = getattr(args, getattr(args, "more", "options"), None)
    if several is not None:
        several += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    command = commands[args.command]
    if rest:
        command.error(_unknown(rest[0], command))
    try:
        code = args.run(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"foveate {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if argv is None:  # the process ends now: a second Ctrl-C would only print a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return 130
    return code or 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, _Command]]:
    parser = _Command(
        prog="foveate", description="Vision transformers that look only where it matters."
    )
    parser.add_argument("--version", action=_Version)
    several = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Command
    )
    commands = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        text = str(module.__doc__)
        command = several.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error too"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        commands[name] = command
    return parser, commands


class _Command(argparse.ArgumentParser):
    """A command's parser.

    Attributes:
        more_help: gives what stands below the help of a command, and is asked for that alone: it
            may import what takes seconds.
    """

    more_help: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; argparse would put the whole usage in front of it."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says more\n")

    def format_help(self) -> str:
        more = "" if self.more_help is None else f"\n{self.more_help()}"
        return super().format_help() + more


class _Version(argparse.Action):
    """Look the version up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"foveate {importlib.metadata.version('foveate')}")
        parser.exit()


def _unknown(text: str, command: argparse.ArgumentParser) -> str:
    """Word the error about an argument that is not known, with the near miss of a flag."""
    flag = text.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument {text!r}"
    near = difflib.get_close_matches(flag, command._option_string_actions, n=1)
    return f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else "")
