"""Run the model in this folder on images, and print its answers, one line for each image.

It needs numpy, Pillow and the package that model.json names as the runtime (onnxruntime, openvino
or torch), and nothing else.

    python infer.py photo.jpg photos/*.png
    python infer.py photo.jpg --top 1 --json answers.json
    python infer.py photo.jpg --npy output.npy         # the output, as it is
    python infer.py photo.jpg --npz outputs.npz        # all outputs, by their names
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Run = Callable[[np.ndarray], list[np.ndarray]]


def open_model(
    folder: Path, threads: int = 0, batch: int = 0, bf16: bool = False
) -> tuple[Run, dict[str, Any]]:
    """Open a model; return a function that runs it on images ``[B, C, H, W]``, and model.json.

    Args:
        folder: folder that ``foveate export`` wrote.
        threads: number of CPU threads; 0 leaves it to the runtime.
        batch: number of images in every call, which lets OpenVINO plan better; 0 allows any.
        bf16: let OpenVINO compute in bfloat16, which a processor with instructions for it does
            faster and less exactly. The other runtimes cannot.
    """
    about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    path, runtime = str(folder / about["file"]), about["runtime"]
    if bf16 and runtime != "openvino":
        raise ValueError(f"bf16 is for openvino: this model runs in {runtime}")
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        return lambda images: session.run(None, {about["input"]: images}), about
    if runtime == "openvino":
        import openvino

        model = openvino.Core().read_model(path)
        if batch:
            model.reshape([batch, about["channels"], *about["size"]])
        # Left to itself, OpenVINO takes bfloat16 on a processor that has instructions for it.
        settings = {"PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if bf16 else "f32"
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()

        def run(images: np.ndarray) -> list[np.ndarray]:
            found = request.infer([images])
            return [np.array(value) for value in found.values()]  # the next call reuses the memory

        return run, about
    import torch

    if threads:
        torch.set_num_threads(threads)
    module = torch.export.load(path).module()

    def ask(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = module(torch.from_numpy(images))
        return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]

    return ask, about


def prepare(image: Image.Image, about: Mapping[str, Any]) -> np.ndarray:
    """Turn an image into the model's input ``[C, H, W]``: resize, crop and normalise it."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if about["channels"] == 1 else "RGB")
    height, width = about["size"]
    if about["crop_pct"] is None:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    elif image.size != (width, height):
        to = _resized(image.size, (height, width), about["crop_pct"])
        image = image.resize(to, Image.Resampling[about["interpolation"].upper()])
        left, top = round((to[0] - width) / 2), round((to[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / np.float32(255)
    values = (values - np.float32(about["mean"])) / np.float32(about["std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale values of more than 8 bits to 0..255; Pillow's own conversion would clip them.

    16-bit files have a fixed range. Floats and 32-bit integers have none: the smallest usual range
    that holds all values is taken, or else the range of the values.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if not mode.startswith("I;16"):
        least, most = float(values.min()), float(values.max())
        usual = (1.0, 255.0, high) if mode == "F" else (255.0, high)
        low = min(least, 0.0)
        high = next((top for top in usual if least >= 0 and most <= top), most)
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return np.round(255 * scaled).clip(0, 255).astype(np.uint8)


def _resized(image: tuple[int, int], size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """Return the width and height at which an image covers the size divided by ``crop_pct``."""
    (width, height), (rows, columns) = image, (int(side / crop_pct) for side in size)
    if rows == columns:
        other = int(rows * max(height, width) / min(height, width))
        return (rows, other) if width <= height else (other, rows)
    ratio = min(height / rows, width / columns)
    return round(width / ratio), round(height / ratio)


def answer(logits: np.ndarray, labels: list[str] | None, top: int) -> list[dict[str, Any]]:
    """Return the most likely classes of one image with their confidences."""
    share = np.exp(logits - logits.max())
    share = share / share.sum()
    best = np.argsort(-share, kind="stable")[:top]
    return [
        {
            "class": int(number),
            "label": labels[number] if labels else f"class {number}",
            "confidence": float(share[number]),
        }
        for number in best
    ]


def batches(
    paths: Sequence[Path], about: Mapping[str, Any]
) -> Iterator[tuple[Sequence[Path], np.ndarray]]:
    """Read images in batches of the model's size, or one by one if it takes any size.

    The last batch is filled up with its last image.
    """
    size = about["batch"] or 1
    for first in range(0, len(paths), size):
        some = paths[first : first + size]
        pixels = [_read(path, about) for path in some]
        yield some, np.stack(pixels + pixels[-1:] * (size - len(some)))


def _read(path: Path, about: Mapping[str, Any]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return prepare(image, about)
    except Exception as error:  # decoders raise many kinds, some of them on damaged files alone
        sys.exit(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}")


def _writable(path: Path) -> bool:
    return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--top", type=int, default=5, help="number of classes to show (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0, all)")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (OpenVINO): faster, less exact"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the answers to")
    parser.add_argument("--npy", type=Path, metavar="FILE", help="file for the model's one output")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="file for all outputs, by name")
    args = parser.parse_args()
    if args.top < 1:
        parser.error(f"--top must be at least 1, got {args.top}")
    if args.threads < 0:
        parser.error(f"--threads must be at least 0, got {args.threads}")
    for path in (args.json, args.npy, args.npz):  # before the work
        if path is not None and not _writable(path):
            parser.error(f"{path} cannot be written to")
    folder = Path(__file__).resolve().parent
    about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    names, classes = about["outputs"], about["outputs"] == ["logits"]
    if args.json is not None and not classes:
        parser.error("--json is for classes, which this model does not give: use --npz FILE")
    if args.npy is not None and len(names) > 1:
        parser.error(f"--npy is for one output, this model has {len(names)}: use --npz FILE")
    if args.bf16 and about["runtime"] != "openvino":
        parser.error(f"--bf16 is for OpenVINO, and this model runs in {about['runtime']}")
    try:
        run, _ = open_model(folder, args.threads, about["batch"] or 1, args.bf16)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install {about['runtime']}")
    found: dict[str, Any] = {}
    raw: list[list[np.ndarray]] = []
    keep = args.npy is not None or args.npz is not None
    for some, images in batches(args.images, about):
        values = [value[: len(some)] for value in run(images)]
        if keep:
            raw.append(values)
        for number, path in enumerate(some):
            if classes:
                found[str(path)] = answer(values[0][number], about["labels"], args.top)
                words = [f"{one['label']} {one['confidence']:.1%}" for one in found[str(path)]]
            else:
                pairs = zip(names, values, strict=True)
                words = [f"{name} {list(value.shape[1:])}" for name, value in pairs]
            print(f"{path}: {', '.join(words)}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if keep:
        outputs = dict(zip(names, map(np.concatenate, zip(*raw, strict=True)), strict=True))
        if args.npy is not None:
            np.save(args.npy, outputs[names[0]])
        if args.npz is not None:
            np.savez(args.npz, **outputs)


if __name__ == "__main__":
    main()
