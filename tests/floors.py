"""Lowest versions that the package promises, for ``make oldest``: write them down, or check them.

    python tests/floors.py test                   # constraints for pip
    python tests/floors.py --check test           # fail where another version is installed

The promises are read from the metadata of the installed package; ``--no-deps`` is enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGE = "foveate"
# What releases at the floors do not say of themselves.
BESIDE = [
    "pyarrow<26",  # imports numpy 2 alone from 26 on, and does not require it
    "onnx-ir<0.1.13",  # its later inliner leaves functions behind, which onnxscript 0.4 refuses
]


def floors(extras: Iterable[str]) -> dict[str, Version]:
    """Find the floor of everything that the package requires, alone and with each extra."""
    unknown = set(extras) - set(metadata.metadata(PACKAGE).get_all("Provides-Extra") or [])
    if unknown:
        raise SystemExit(f"{PACKAGE} has no extra {', '.join(sorted(unknown))}")
    found: dict[str, Version] = {}
    for line in metadata.requires(PACKAGE) or []:
        needed = Requirement(line)
        if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in ["", *extras]):
            continue
        lowest = [Version(s.version) for s in needed.specifier if s.operator == ">="]
        if not lowest:
            raise SystemExit(f"{line}: no floor; write it as NAME>=VERSION")
        # A name may stand in several extras; only the highest of its floors satisfies all.
        found[needed.name] = max([*lowest, *filter(None, [found.get(needed.name)])])
    return found


def differences(wanted: dict[str, Version]) -> list[str]:
    """Name every package whose installed version is not its floor."""
    wrong = []
    for name, floor in wanted.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name}: the floor is {floor}, nothing is installed")
            continue
        # A build such as 2.6.0+cpu is of the release 2.6.
        if Version(Version(installed).public) != floor:
            wrong.append(f"{name}: the floor is {floor}, {installed} is installed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", help="extras of the package, with commas between")
    parser.add_argument("--check", action="store_true", help="compare with what is installed")
    args = parser.parse_args()
    wanted = floors(args.extras.split(","))
    if not args.check:
        print("\n".join([*(f"{name}=={floor}" for name, floor in wanted.items()), *BESIDE]))
    elif wrong := differences(wanted):
        raise SystemExit("\n".join(["these are not the lowest versions promised:", *wrong]))
    else:
        print(f"the lowest versions of all {len(wanted)} packages are installed")


if __name__ == "__main__":
    main()
