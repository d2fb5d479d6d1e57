"""Pre-training on Fashion-MNIST, with and without MTO: runs and summary.

python benchmarks/pretraining.py run OUT     every run, one after another; several at once share
python benchmarks/pretraining.py sum OUT     tables, figures and numbers of what has finished

On the part that ships: MAE and SimMIM, each without MTO, with it, and with other choices of it, 3
seeds; then fine-tuning on 5 % of the labels from every backbone and from scratch. With
--fashion-mnist FOLDER the whole set: with and without MTO alone. Runs that have finished are
skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
MODEL = (
    "model.options={img_size: 28, patch_size: 4, in_chans: 1, embed_dim: 96, depth: 4, "
    "num_heads: 3}"
)
SHARED = (
    MODEL,
    *("data.batch=64", "loop.epochs=16", "loop.pictures_every=16", "loop.loggers=[]"),
    *("probe.every=4", "snapshots=4", "layers_every=4"),
)
WHOLE = (  # of the 60 000 images; what is said later wins
    *("data.train={FASHION}", "data.val={FASHION}", "probe.data={FASHION}", "probe.limit=10000"),
    *("data.batch=128", "loop.epochs=4", "loop.pictures_every=4", "probe.every=1"),
    *("snapshots=1", "layers_every=1"),
)
# Names of arms and what they change; the first of a method is what others are compared with.
ARMS = {
    "base": (),
    "mto": ("mto.preset=default",),
    "mto-as-printed": ("mto.preset=default", "mto.direction=as_printed"),
    "mto-raw": ("mto.preset=default", "mto.similarity=raw"),
    "mto-paper": ("mto.preset=paper",),
}
METHODS = ("mae", "simmim")
LABELS = (  # 150 of 3 000 images, 15 of each class
    *("data.limit=150", "data.batch=50", "data.val_batch=500", "loop.epochs=80"),
    *("loop.check_every=20", "loop.loggers=[]", "optim.lr=1e-3", "model.pool=avg"),
)


def jobs(seeds: tuple[int, ...], whole: bool) -> list[tuple[str, list[str]]]:
    """Name and command of every run, most needed first."""
    if whole:
        return [
            pre_training(m, a, s, WHOLE) for m in METHODS for s in seeds for a in ("base", "mto")
        ]
    found = [pre_training(m, a, s) for s in seeds for m in METHODS for a in ("base", "mto")]
    found += [job for seed in seeds for job in fine_tunings(seed)]
    variants = [arm for arm in ARMS if arm not in ("base", "mto")]
    found += [pre_training("mae", arm, seed) for seed in seeds for arm in variants]
    # SimMIM takes twice as long: one seed
    return found + [pre_training("simmim", arm, seeds[0]) for arm in variants]


def pre_training(
    method: str, arm: str, seed: int, more: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    """One backbone."""
    settings = [*SHARED, *more, *ARMS[arm], f"loop.seed={seed}"]
    return f"{method}-{arm}-{seed}", ["pretrain", f"fashion_part_{method}", *settings]


def fine_tunings(seed: int) -> list[tuple[str, list[str]]]:
    """From both methods with and without MTO, and from scratch."""
    starts = {
        f"{method}-{arm}": f"{method}-{arm}-{seed}" for method in METHODS for arm in ("base", "mto")
    }
    found = []
    for name, start in {"scratch": None, **starts}.items():
        settings = [MODEL, *LABELS, f"loop.seed={seed}"]
        if start is not None:
            settings.append(f"model.start={{OUT}}/{start}/model.safetensors")
        found.append((f"labels-{name}-{seed}", ["finetune", "fashion_part_full", *settings]))
    return found


def run(out: Path, seeds: tuple[int, ...], whole: Path | None) -> None:
    """Every job that no other process has begun."""
    out.mkdir(parents=True, exist_ok=True)
    for name, command in jobs(seeds, whole is not None):
        folder = out / name
        needed = [
            word.split("=")[1].replace("{OUT}", str(out)) for word in command if "{OUT}" in word
        ]
        if not all(Path(path).is_file() for path in needed):
            continue  # another process is at it; the next call comes back to this
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        words = [word.replace("{OUT}", str(out)) for word in command]
        words = [word.replace("{FASHION}", f"fashion-mnist:{whole}") for word in words]
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.call(
                [sys.executable, "-m", "foveate", *words, "--out", str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        print(name, "done" if code == 0 else f"failed with {code}", flush=True)


# Summary ------------------------------------------------------------------------------------------


def summarise(out: Path, results: Path, whole: bool) -> None:
    """Numbers of all finished runs as JSON, tables and figures."""
    from foveate.bench import machine

    results.mkdir(parents=True, exist_ok=True)
    runs = {path.parent.name: path.parent for path in sorted(out.glob("*/result.json"))}
    record: dict[str, Any] = {
        "commands": [
            f"python benchmarks/pretraining.py {what} OUT{' --fashion-mnist FOLDER' * whole}"
            for what in ("run", "sum")
        ],
        "machine": machine.facts("cpu"),
        "settings": {"shared": (*SHARED, *WHOLE * whole), "arms": ARMS, "labels": LABELS},
        "runs": {name: read_run(path) for name, path in runs.items()},
    }
    parts = []
    arms = [f"{method}-{arm}" for method in METHODS for arm in ARMS]
    arms = [arm for arm in arms if any(name.startswith(f"{arm}-") for name in runs)]
    seeds = {arm: seeds_of(runs, arm) for arm in arms}
    for metric in ("probe/linear", "probe/knn"):
        head, rows = ["arm, seeds"], []
        for arm in arms:
            curves = [record["runs"][name][metric] for name in seeds[arm]]
            epochs = sorted(curves[0], key=int)
            head = ["run (seeds)", *(f"epoch {epoch}" for epoch in epochs)]
            cells = [spread([curve[epoch] for curve in curves], 1) for epoch in epochs]
            rows.append([f"{arm} ({len(curves)})", *cells])
        parts.append(f"### {metric}, %\n\n" + table(head, rows))
    parts.append("### RAUC and epochs to match\n\n" + rauc_table(out, results, record, seeds))
    rows = []
    for arm in arms:
        found = [record["runs"][name]["heterogeneity"] for name in seeds[arm]]
        layers = [spread([run[layer] for run in found], 2) for layer in range(len(found[0]))]
        rows.append([arm, " ".join(layers)])
    parts.append(
        "### Heterogeneity by layer at the end (cosine, temperature 0.1)\n\n"
        + table(["run", "layer 0, 1, ..."], rows)
    )
    rows = []
    for start in ("scratch", *(f"{m}-{a}" for m in METHODS for a in ("base", "mto"))):
        found = [record["runs"][name]["accuracy"] for name in seeds_of(runs, f"labels-{start}")]
        if found:
            rows.append([start, str(len(found)), spread(found, 1)])
    if rows:
        parts.append(
            "### Fine-tuned on 5 % of the labels (150 images), top-1 %\n\n"
            + table(["start", "seeds", "accuracy"], rows)
        )
    what = "the whole of Fashion-MNIST" if whole else "the part of Fashion-MNIST that ships"
    (results / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "report.md").write_text(
        f"# Pre-training on {what}\n\n"
        + "Mean and standard deviation over seeds.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )
    draw(record, seeds, results)
    print("\n\n".join(parts))


def seeds_of(runs: dict[str, Path], arm: str) -> list[str]:
    """Names of an arm's finished runs."""
    return [f"{arm}-{seed}" for seed in SEEDS if f"{arm}-{seed}" in runs]


def read_run(path: Path) -> dict[str, Any]:
    """Its result, scores by epochs trained, and heterogeneity at the end."""
    result = json.loads((path / "result.json").read_text())
    found = {k: result[k] for k in ("loss", "accuracy", "updates") if k in result}
    if result["job"] != "pretrain":
        return found
    rows = list(csv.DictReader((path / "metrics.csv").open()))
    for name in ("probe/linear", "probe/knn", "val/loss"):
        # Epochs are counted from 0 in the file, and scored at their end.
        found[name] = {int(r["epoch"]) + 1: float(r[name]) for r in rows if r.get(name)}
        found[name] = {str(epoch): score for epoch, score in found[name].items()}
    layers = [name for name in rows[0] if name.startswith("heterogeneity/")]
    last = [row for row in rows if row.get(layers[0])][-1]
    found["heterogeneity"] = [float(last[name]) for name in layers]
    found["visible cosine"] = float(last["cosine/visible"])
    return found


def rauc_table(
    out: Path, results: Path, record: dict[str, Any], seeds: dict[str, list[str]]
) -> str:
    """Every arm against its method's base, over the seeds that both have."""
    from foveate.pretrain.rauc import compare, write

    rows = []
    for arm in seeds:
        method = arm.split("-")[0]
        if arm == f"{method}-base":
            continue
        for metric in ("probe/linear", "probe/knn"):
            pairs = [(f"{method}-base-{name[-1]}", name) for name in seeds[arm]]
            pairs = [pair for pair in pairs if pair[0] in record["runs"]]
            found = compare(
                [out / base for base, _ in pairs], [out / name for _, name in pairs], metric=metric
            )
            record.setdefault("rauc", {})[f"{arm} {metric}"] = found.json()
            said = [
                "never" if pair.reduction is None else f"{least(pair)}{100 * pair.reduction:.0f} %"
                for pair in found.pairs
            ]
            values = [pair.rauc for pair in found.pairs]
            rows.append([arm, metric, spread(values, 2), f"{found.mean.rauc:.2f}", ", ".join(said)])
            if arm.endswith("-mto") and metric == "probe/linear":
                write(found, results / f"rauc_{method}", command="foveate rauc, see report.md")
    head = ["run", "score", "RAUC by seed", "of the mean curves", "epochs saved, by seed"]
    return table(head, rows)


def least(pair: Any) -> str:
    """Where the first score is as good already, more may be saved."""
    return ">= " if pair.at_once else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown; the first column is words."""
    from foveate.evaluate.tables import Sheet, markdown_table

    return "\n".join(
        markdown_table(Sheet("", ("<" + head[0], *head[1:]), [tuple(row) for row in rows]))
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw(record: dict[str, Any], seeds: dict[str, list[str]], results: Path) -> None:
    """Progress and heterogeneity, one picture a method, a band of one standard deviation."""
    from foveate.evaluate.figures import Line, lines_figure
    from foveate.evaluate.style import save

    for method in METHODS:
        arms = [arm for arm in seeds if arm.startswith(f"{method}-")]
        if not arms:
            continue
        progress, layers = [], []
        for arm in arms:
            runs = [record["runs"][name] for name in seeds[arm]]
            epochs = sorted(runs[0]["probe/linear"], key=int)
            scores = [[run["probe/linear"][epoch] for run in runs] for epoch in epochs]
            progress.append(line(Line, arm, [int(e) for e in epochs], scores))
            levels = [run["heterogeneity"] for run in runs]
            layers.append(line(Line, arm, range(len(levels[0])), list(zip(*levels, strict=True))))
        up = "linear probe, %"
        save(lines_figure(progress, across="epochs", up=up), results / f"progress_{method}.svg")
        up = "heterogeneity (cosine, 0.1)"
        save(lines_figure(layers, across="layer", up=up), results / f"layers_{method}.svg")


def line(kind: Any, label: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Any:
    """A line of a picture, with a band where there are several seeds."""
    means = [statistics.mean(each) for each in values]
    off = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    return kind(
        label,
        tuple(x),
        tuple(means),
        tuple(m - s for m, s in zip(means, off, strict=True)),
        tuple(m + s for m, s in zip(means, off, strict=True)),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("run", "sum"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the whole set")
    parser.add_argument("--results", type=Path, help="folder of the summary")
    options = parser.parse_args()
    whole = options.fashion_mnist
    if options.what == "run":
        run(options.out.resolve(), tuple(options.seeds), whole and whole.resolve())
    else:
        name = "pretraining_fashion" if whole else "pretraining_fashion_part"
        here = Path(__file__).parent / "results" / name
        summarise(options.out.resolve(), options.results or here, whole is not None)
