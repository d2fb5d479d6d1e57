"""Put a saved model on the Hugging Face hub: weights, configuration, record and card.

The folder is one that foveate.save wrote, or a run that ended with a model; runs/NAME/best is the
one with its best weights. Nothing else in it is uploaded. README.md is the model card: look at it
before. Log in once with `hf auth login`, or set HF_TOKEN.

In a terminal:
  foveate push runs/reduce-photos anna/photos-evit
  foveate push runs/reduce-photos/best anna/photos-evit --private --license apache-2.0
  foveate eval runs/reduce-photos --speed 1 8 --out results/
  foveate push runs/reduce-photos anna/photos-evit --results results/
  foveate push evit/ anna/photos-evit --revision keep-0.5 --message "keep half of the tokens"
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="folder of a saved model or of a run")
    add("repository", metavar="OWNER/NAME", help="repository, made if it is missing")
    add("--license", metavar="ID", help="the model's license for the card, such as apache-2.0")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder of foveate eval --out, whose numbers of this model go on the card",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="branch, made if it is missing (default: main)")
    add(
        "--create-pr", action="store_true", help="open a pull request to main instead of committing"
    )
    add(
        "--message",
        default="Add a model of foveate",
        help="message of the commit (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Upload, and print what and where."""
    if not args.folder.exists():  # checked before seconds of imports
        raise ValueError(f"{args.folder} does not exist; expected the folder of a saved model")

    from foveate.convert import push_to_hub, shared_files

    address = push_to_hub(
        args.folder,
        args.repository,
        license=args.license,
        results=args.results,
        commit_message=args.message,
        revision=args.revision,
        create_pr=args.create_pr,
        private=args.private or None,
    )
    for path in shared_files(args.folder):
        print(f"file     {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"pushed   {address}")
    where = args.repository if args.revision is None else f"{args.repository}@{args.revision}"
    merged = ", once the pull request is merged" * args.create_pr
    print(f"load     foveate.load('hf-hub:{where}'){merged}")
