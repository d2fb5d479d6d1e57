"""Write the files beside an exported model: model.json, infer.py and a README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from foveate.exports import onnx, openvino, pt2
from foveate.exports.check import Check
from foveate.files import write_text

__all__ = ["former_files", "model_files", "write_about", "write_readme", "write_script"]

_FILES = {
    onnx.FILE: (onnx.FILE, onnx.WEIGHTS),
    openvino.FILE: (openvino.FILE, openvino.WEIGHTS),
    pt2.FILE: (pt2.FILE,),
}

_README = """\
# {title}

A vision transformer, exported by foveate {version}.

    pip install {needs}
    python infer.py photo.jpg

- **file**: `{file}`, for {runtime}{precision}
- **input**: `images`, float32 [{batch}, {channels}, {height}, {width}]; `infer.py` makes
  it from a picture, with the mean and standard deviation in `model.json`
- **output**: {outputs}
- **method**: {method}
- **tokens in each block**, counted in this file while it ran: {tokens}
- **multiply-adds**: {macs}
{notes}
## Check

{check}
"""


def model_files(file: Path) -> list[Path]:
    """Return a model's file, and the one of its weights where that lies beside it."""
    paths = [file.with_name(name) for name in _FILES[file.name]]
    return [path for path in paths if path.is_file()]


def former_files(folder: Path) -> list[Path]:
    """Return the files of the model that was exported to a folder before, if there was one."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        return model_files(folder / Path(about["file"]).name)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not ours
        return []


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write model.json: what a program needs to know to run the model."""
    write_text(folder / "model.json", json.dumps(about, indent=1) + "\n")


def write_script(folder: Path) -> None:
    """Write infer.py, which runs the model without foveate."""
    text = files("foveate.exports").joinpath("infer.py").read_text(encoding="utf-8")
    write_text(folder / "infer.py", text)


def write_readme(
    folder: Path, about: Mapping[str, Any], shapes: Sequence[str], check: Check | None
) -> None:
    """Write the README: what a person needs to know to use the model."""
    unchecked = "Not checked: `foveate export ... --check` compares the file with torch."
    said = [unchecked] if check is None else check.lines()
    height, width = about["size"]
    notes = "".join(f"- {note}\n" for note in about["notes"])
    text = _README.format(
        title=f"{about['model']}, {about['method'] or 'dense'}",
        version=about["foveate"],
        needs=f"numpy pillow {about['runtime']}",
        file=about["file"],
        runtime=about["runtime"],
        precision=", matrix products in 8 bits" if about["int8"] else "",
        batch=about["batch"] or "any",
        channels=about["channels"],
        height=height,
        width=width,
        outputs=", ".join(shapes),
        method=f"`{about['method']}`" if about["method"] else "none, all tokens",
        tokens=" ".join(map(str, about["tokens"])),
        macs=about["macs"],
        notes=notes,
        check="\n".join(said if check is None else [f"    {line}" for line in said]),
    )
    write_text(folder / "README.md", text)
