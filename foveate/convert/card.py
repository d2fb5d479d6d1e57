"""Write the card of a saved model: its README.md, with only what was counted or measured.

A card is made only from the other files of its folder, so saving twice writes the same card twice.
Its last line has a checksum. It shows whether somebody changed the card; if so, the card is kept.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from foveate.convert.record import RECORD, read_record
from foveate.files import write_text

__all__ = [
    *("CARD", "HUB", "card_text", "is_generated", "model_name", "with_facts", "write_card"),
]

CARD = "README.md"
HUB = "hf-hub:OWNER/NAME"  # what a card calls its model until it is on the hub

_log = logging.getLogger(__name__)
_SEAL = "<!-- Written by foveate. A card that was changed is kept. Checksum: {} -->\n"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z")
_SHOWN = 12  # names of classes that a card lists
# Metrics that the tasks of foveate measure: the hub's name, our name and the unit.
_METRICS = {
    "accuracy": ("accuracy", "top-1 accuracy", " %"),
    "top5": ("accuracy", "top-5 accuracy", " %"),
    "box_ap": ("map", "AP of boxes (COCO, 0 to 1)", ""),
    "mask_ap": ("map", "AP of masks (COCO, 0 to 1)", ""),
    "miou": ("mean_iou", "mean IoU (0 to 1)", ""),
}
_NOUNS = {
    "image-classification": "A classifier of {classes} classes",
    "image-feature-extraction": "A model without a head, for features,",
    "object-detection": "A detector of {classes} classes (`{head}` on the maps of `{backbone}`)",
    "image-segmentation": "A segmenter of {classes} classes (`{head}` on the maps of `{backbone}`)",
}
_DENSE_USE = 'found = foveate.predictions.predict_dense(model, "photo.jpg")'
_USES = {
    "image-classification": 'print(foveate.predict(model, "photo.jpg")[0].label)',
    "image-feature-extraction": "features = model.forward_features(images)  # as timm's models do",
    "object-detection": _DENSE_USE,
    "image-segmentation": _DENSE_USE,
}
# What an evaluation would measure for each task.
_QUALITIES = {
    "image-classification": "accuracy",
    "image-feature-extraction": "quality of the features",
    "object-detection": "average precision",
    "image-segmentation": "mean IoU",
}


def with_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a folder's configuration; ValueError if it lacks the facts for a card."""
    if "about" not in config:
        raise ValueError(
            f"{folder} was saved by an earlier foveate, without the facts for a card: load the "
            "model and save it again"
        )
    return config


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model's card into its folder, unless there is one that somebody changed.

    Args:
        folder: the model's folder.
        config: the folder's configuration.
    """
    path = folder / CARD
    if path.exists() and not is_generated(path.read_text(encoding="utf-8")):
        _log.warning(
            "%s was not written by foveate, or was changed since, and is kept: check that it is "
            "still right, or delete it and save again",
            path,
        )
        return
    write_text(path, card_text(folder, config))


def is_generated(text: str) -> bool:
    """Tell whether a card is as foveate wrote it."""
    seal = _SEALED.search(text)
    return seal is not None and seal[1] == _checksum(text[: seal.start()])


def card_text(folder: Path, config: Mapping[str, Any], repository: str | None = None) -> str:
    """Write the text of a card.

    Args:
        folder: the model's folder.
        config: the folder's configuration.
        repository: OWNER/NAME on the hub; None if the folder is not on the hub.
    """
    about, record = config["about"], read_record(folder) or {}
    name = model_name(folder) if repository is None else repository.partition("/")[2]
    parts = [
        f"---\n{_metadata(name, about, record)}\n---\n",
        f"# {name}\n",
        _what(config),
        _use(config, HUB if repository is None else f"hf-hub:{repository}"),
        _facts(config),
        _measured(about, record),
        _made(record),
        _limits(about, record),
    ]
    text = "\n".join(parts) + "\n"
    return text + _SEAL.format(_checksum(text))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_name(folder: Path) -> str:
    """Name a model after its folder, or after the run if the folder is inside one."""
    *before, last = folder.resolve().parts
    best = False
    while last in ("model", "best") and before:
        best |= last == "best"
        last = before.pop()
    return last + "-best" * best


def _metadata(name: str, about: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Write what the hub reads: task, tags, licence, data sets and results."""
    datasets = record.get("datasets") or None
    results = [
        EvalResult(
            task_type=about["task"],
            dataset_type=str(one["hub_name"] or one["data"]),
            dataset_name=str(one["data"]),
            dataset_split=one["split"],
            metric_type=_METRICS[one["metric"]][0],
            metric_name=_METRICS[one["metric"]][1],
            metric_value=one["value"],
        )
        for one in _scores(record)
    ]
    data = ModelCardData(
        library_name="foveate",
        pipeline_tag=about["task"],
        license=about["license"],
        tags=["foveate", "vision-transformer", "token-reduction", *about["methods"]],
        datasets=datasets,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _what(config: Mapping[str, Any]) -> str:
    about = config["about"]
    noun = _NOUNS[about["task"]].format(classes=about["classes"], **(about["around"] or {}))
    runs = "uses all tokens"
    if about["method"]:
        runs = f"computes few tokens, with the method `{about['method']}`"
    named = f"`{about['model']}`, " if about["model"] else ""
    height, width = about["patch"]
    return (
        f"{noun} that {runs}. The vision transformer inside is {named}a {about['family']} of "
        f"{about['depth']} blocks and width {about['width']} on patches of {height} x {width} "
        f"pixels. Saved by foveate {config['foveate']}.\n"
    )


def _use(config: Mapping[str, Any], source: str) -> str:
    about, given, note = config["about"], ", vit", ""
    if not config.get("everything", True):
        note = (
            "Only the method's own parameters are here. `vit` is the plain model that they are for."
        )
    elif "model" in config and config["model"] is None:
        note = "`vit` is a plain model of the same form, made by its own code; it gets the weights."
    else:
        given = ""
    return (
        "## Use\n\nWith foveate installed (`pip install .` in a clone of its repository):\n\n"
        "```python\nimport foveate\n\n"
        f'model = foveate.load("{source}"{given})  # or the path of this folder\n'
        f"{_USES[about['task']]}\n```\n" + (f"\n{note}\n" if note else "")
    )


def _facts(config: Mapping[str, Any]) -> str:
    """Write the table of what goes in and what the model computes."""
    about = config["about"]
    rows = [("input", _input(about["inputs"])), *_counted(about)]
    names = config.get("class_names")
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        rows.append(("classes", f"{len(names)}: {', '.join(map(_cell, names[:_SHOWN]))}{more}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## What it computes\n\n| what | value |\n| --- | --- |\n{table}\n"


def _input(inputs: Mapping[str, Any]) -> str:
    """Say how images are prepared."""
    height, width = inputs["size"]
    channels = {1: "grey", 3: "RGB"}.get(inputs["channels"], f"{inputs['channels']} channels")
    parts = [f"{channels}, {height} x {width} pixels"]
    if inputs.get("resized"):
        short, long = inputs["resized"]
        parts = [f"{channels}, shorter side {short} and longer at most {long} pixels"]
    elif "resized" in inputs:
        parts = [f"{channels}, any size, not resized"]
    if "crop_pct" in inputs:
        short = int(min(height, width) / inputs["crop_pct"])
        cut = f" to {short}, then cropped to the middle" if short > min(height, width) else ""
        parts.append(f"resized ({inputs['interpolation']}){cut}")
    for key, words in (("mean", "mean {}"), ("std", "standard deviation {}")):
        if key in inputs:
            parts.append(words.format(" ".join(f"{value:g}" for value in inputs[key])))
    return "; ".join(parts)


def _counted(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of what was counted; they name the size if the input has no fixed size."""
    counts = about["counts"]
    if counts is None:
        return [("tokens in each block", "depend on the image, so nothing was counted")]
    how = {
        "exact": "the same for every image",
        "expected": "expected or largest numbers: they differ from image to image",
    }[counts["how"]]
    height, width = about["inputs"]["size"]
    size = f", {height} x {width} pixels" if "resized" in about["inputs"] else ""
    tokens = " ".join(f"{number:g}" for number in counts["tokens"])
    left_out = f"; left out: {counts['left_out']}" if counts["left_out"] else ""
    macs, dense = counts["macs"], counts["dense_macs"]
    return [
        (f"tokens in each block{size}", f"{tokens} ({how})"),
        (
            f"multiply-adds of an image{size}",
            f"{_many(macs)}, {macs / dense:.0%} of the {_many(dense)} without the method; "
            f"counted, not timed{left_out}",
        ),
        (
            "parameters",
            f"{counts['parameters']:,}, of which {counts['new_parameters']:,} are the method's",
        ),
    ]


def _many(value: float) -> str:
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.2f} million"


def _scores(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the scores, those of an evaluation first."""
    found = [*record.get("evaluated", []), *record.get("measured", [])]
    return [one for one in found if one["metric"] in _METRICS]


def _measured(about: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Say what was measured, and what was not."""
    rows = [_score(one, record.get("weights")) for one in _scores(record)]
    if not rows:
        rows.append(f"| {_QUALITIES[about['task']]} | not measured | |")
    timed = [one for one in record.get("evaluated", []) if one["metric"] == "speed"]
    rows += [_speed(one) for one in timed] or ["| speed | not measured | |"]
    table = "\n".join(rows)
    return (
        f"## What was measured\n\n| what | value | on |\n| --- | --- | --- |\n{table}\n\n"
        "Fewer multiply-adds are not always less time: `foveate bench` times a model with and "
        "without its method on your machine.\n"
    )


def _score(one: Mapping[str, Any], weights: str | None) -> str:
    _, name, unit = _METRICS[one["metric"]]
    kind = {"val": "validation ", "test": "test "}.get(one["split"], "")
    on = [f"{one['images']:,} {kind}images of `{_cell(one['data'])}`"]
    if one["held_out"]:
        held = one["held_out"]
        on.append(f"held out of its training images (share {held['share']:g}, seed {held['seed']})")
    if kind.startswith("val") and weights == "best":
        on.append("which also chose these weights")
    if one["seed"] is not None:
        on.append(f"seed of training {one['seed']}")
    return f"| {name} | {one['value']:g}{unit} | {'; '.join([*on, _commit(one)])} |"


def _speed(one: Mapping[str, Any]) -> str:
    return (
        f"| speed, batch {one['batch']} | {one['times']:.2f} times as fast as without the method "
        f"(95 % interval {one['low']:.2f} to {one['high']:.2f}), {one['per_second']:.4g} images a "
        f"second | {_cell(one['machine'])}; {one['precision']}; {one['rounds']:g} interleaved "
        f"rounds; {_commit(one)} |"
    )


def _commit(one: Mapping[str, Any]) -> str:
    commit, _, changes = (one["commit"] or "unknown").partition(" ")
    return f"foveate at commit {commit[:12]} {changes}".strip()


def _made(record: Mapping[str, Any]) -> str:
    if "recipe" not in record:
        return (
            "## How it was made\n\nIt was saved with `foveate.save`, outside of a training run, so "
            "nothing is recorded about its training.\n"
        )
    result, recipe = record["result"], record["recipe"]
    data, start = recipe.get("data", {}), recipe.get("model", {}).get("start")
    batch = f" of {data['batch']} images" if "batch" in data else ""
    began = f"`{_cell(start)}`" if start else "random weights"
    return (
        "## How it was made\n\n"
        f"It was made by `foveate {result['job']}`: {result['updates']:,} updates{batch}, "
        f"{result['epochs']:g} epochs, on {result['images']['train']:,} training images of "
        f"`{_cell(result['splits']['train']['data'])}`, from {began}. These are the "
        f"{record['weights']} weights of the run. `{RECORD}` has its recipe, data, versions and "
        "machine, and names files without their folders.\n"
    )


def _limits(about: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    lines = []
    if about["method"]:
        lines.append(
            "The method computes less for some parts of an image than for others, so it may miss "
            "small things. The table above is all that is known about how good the model is."
        )
    if not about["fixed_count"]:
        lines.append("The number of tokens depends on the image, and so do time and multiply-adds.")
    if any(one["split"] == "val" for one in _scores(record)):
        lines.append(
            "Scores on validation images may be too high: settings may have been chosen on them."
        )
    lines.append("Nothing was measured about fairness, robustness or safety.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _cell(text: Any) -> str:
    """Keep a name from breaking a table or a line of code."""
    return re.sub(r"[|`\n\r<>]", " ", str(text)).strip()
