"""Running means, rates that follow the training, counts, pictures, and results that are honest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import checkpoint, exported, finetune, reduce, run, small_model
from small import noise

import foveate
from foveate.data import Loader, Preprocessing, device_batches, eval_transform, limited, open_images
from foveate.measure import accuracy
from foveate.measure.curves import seconds
from foveate.train.checkpoints import Checkpoints
from foveate.train.finetune import FinetuneTask
from foveate.train.logs import MetricsFile, read_metrics
from foveate.train.module import Module


def logged(out: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_metrics(out / "metrics.csv") if name in row]


def test_the_running_mean_is_what_is_exported(tmp_path: Path) -> None:
    """One step of it an update, not a batch; its decay grows with them to what was asked for."""
    start = checkpoint(tmp_path / "start.safetensors")
    recipe = finetune(
        *("loop.ema=0.2", "loop.accumulate=2", "loop.save_every=1", "loop.keep_last=9"),
        *("loop.epochs=1", "data.batch=8", "optim.lr=0.01"),
        model={"start": start},
    )
    run(recipe, tmp_path / "run")
    mean = {key: value.clone() for key, value in small_model().state_dict().items()}
    for update in range(1, 5):
        path = tmp_path / "run" / "checkpoints" / f"update-{update:08d}.ckpt"
        content = torch.load(path, weights_only=True)
        decay = min(0.2, (update - 1) / (update + 9))
        for key in mean:
            new = content["state_dict"][f"task.model.{key}"]
            mean[key] = decay * mean[key] + (1 - decay) * new
        for key, value in mean.items():
            kept = content["state_dict"][f"mean.module.{key}"]
            torch.testing.assert_close(kept, value, atol=1e-6, rtol=1e-5)
    found = exported(tmp_path / "run")
    assert found.keys() == mean.keys()
    for key, value in mean.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)
    last = content["state_dict"]["task.model.head.weight"]
    assert float((found["head.weight"] - last).abs().max()) > 1e-4


RATES = "evit(keep=0.5, blocks=[1], warmup=[0.25, 0.75])"


def test_the_rate_sinks_over_the_training(tmp_path: Path) -> None:
    recipe = reduce(RATES, "loop.epochs=8", "loop.statistics=true", "data.batch=32", "loop.ema=0.5")
    run(recipe, tmp_path)
    model = foveate.apply(small_model(), RATES).eval()
    wanted = []
    for epoch in range(1, 9):
        model.set_progress(epoch / 8)
        counts = model.trace(noise(1, 1, 28, 28)).counts()
        wanted.append([float(count[0]) for count in counts])
    found = [logged(tmp_path, f"tokens/block{block:02d}") for block in range(3)]
    assert [list(row) for row in zip(*found, strict=True)] == wanted
    last = [row[-1] for row in wanted]
    assert last == sorted(last, reverse=True) and last[0] == 17 and last[-1] == 10


def test_evolution_goes_from_layers_to_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = Module.training_step

    def step(self: Module, *arguments: Any) -> Any:
        seen.append(self.task.model.reducer.active_blocks)  # type: ignore[union-attr]
        return original(self, *arguments)

    monkeypatch.setattr(Module, "training_step", step)
    method = "evovit(keep=0.5, starts=[1, 3], layerwise=0.6667)"
    run(reduce(method, "model.options.depth=4", "loop.epochs=3", "data.batch=32"), tmp_path)
    assert seen == [(1, 2, 3)] * 5 + [(1, 3)]  # updates 0 to 4 of 6 lie in the first two thirds


def test_pictures(tmp_path: Path) -> None:
    recipe = reduce(
        "evit(keep=0.5)",
        *("loop.epochs=4", "loop.pictures_every=2", "loop.check_every=3", "data.batch=64"),
    )
    run(recipe, tmp_path)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["epoch-002.png", "epoch-004.png"]
    sizes = set()
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 50
            sizes.add(picture.size)
    assert len(sizes) == 1


# What result.json says --------------------------------------------------------------------------


def measured(model: Any) -> float:
    """Accuracy on the recipes' evaluation images, by other code than the training's."""
    prepared = Preprocessing.of(model)
    loader = Loader(
        limited(open_images("fashion-mnist", "val"), 32, balanced=False),
        eval_transform((28, 28), 1, 0.875, "bilinear"),
        **{"batch": 8, "train": False},
    )
    batches = lambda: device_batches(loader, prepared.mean, prepared.std, "cpu")  # noqa: E731
    return accuracy(model, batches).top1


@pytest.mark.parametrize(
    "overrides",
    [
        ["loop.epochs=3", "loop.check_every=2"],  # the last epoch is not evaluated by itself
        ["loop.ema=0.9", "loop.epochs=3", "loop.check_every=2"],  # the mean is exported
        ["loop.max_steps=6"],
        ["loop.max_steps=4"],  # exactly at an epoch's end
    ],
)
@pytest.mark.parametrize("job", ["finetune", "reduce"])
def test_the_result_is_of_the_exported_weights(
    job: str, overrides: list[str], tmp_path: Path
) -> None:
    settings = (*overrides, "optim.lr=0.01", "data.augment.interpolation=bilinear")
    recipe = finetune(*settings) if job == "finetune" else reduce(RATES, *settings)
    result = run(recipe, tmp_path)
    model = foveate.load(tmp_path).eval()
    assert result["accuracy"] == pytest.approx(measured(model), abs=0.01)
    assert result["updates"] == (recipe.loop.max_steps or 12)
    if recipe.loop.ema is not None:
        assert result["accuracy_without_ema"] == pytest.approx(
            logged(tmp_path, "val/accuracy")[-1], abs=0.01
        )


# metrics.csv -------------------------------------------------------------------------------------


def test_metrics_grow_new_columns_and_survive_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path)
    log.log_metrics({"train/loss": 2.5, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 2.25, "epoch": 0}, 1)
    log.log_metrics({"val/accuracy": 10.0, "epoch": 0}, 1)
    log.log_metrics({"train/loss": 2.0, "epoch": 1}, 2)
    rows = read_metrics(path)
    assert path.read_text().splitlines()[0] == "step,epoch,train/loss,val/accuracy"
    assert rows[2] == {"step": "1", "epoch": "0", "val/accuracy": "10"}
    with path.open("a") as file:
        file.write("3,1,1.")  # a process that was killed while it wrote
    again = MetricsFile(path, resumed=2)
    again.log_metrics({"train/loss": 1.5, "epoch": 1}, 2)
    assert [(row["step"], row.get("train/loss")) for row in read_metrics(path)] == [
        *(("0", "2.5"), ("1", "2.25"), ("1", None), ("2", "1.5"))
    ]
    assert MetricsFile(path) and not path.exists()  # a new run begins a new file


@pytest.mark.parametrize(("slow", "name"), [(Checkpoints, "save"), (FinetuneTask, "collate")])
def test_waiting_is_for_images_alone(
    slow: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(slow, name)

    def slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return plain(*args)

    monkeypatch.setattr(slow, name, slowly)
    settings = ("loop.epochs=1", "data.batch=8", "data.limit=32", "loop.save_every=1")
    found = run(finetune(*settings), tmp_path / "run")["throughput"]
    assert 0 < found["images_per_second"] < 24 / 0.6  # three batches, of which two are slow
    share = found["share_waiting_for_images"]
    assert share < 0.5 if name == "save" else share > 0.5


def test_seconds_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By epoch, without evaluation, and going on where a run is resumed."""
    spun = FinetuneTask.validation_step

    def slow(*args: Any) -> None:
        ends = time.process_time() + 0.5
        while time.process_time() < ends:
            pass
        spun(*args)

    monkeypatch.setattr(FinetuneTask, "validation_step", slow)
    run(finetune("loop.max_steps=4"), tmp_path / "run")
    first = seconds(tmp_path / "run")
    assert list(first) == [0, 1] and 0 < first[1]
    run(finetune("loop.max_steps=8"), tmp_path / "run", resume=True)
    both = seconds(tmp_path / "run")
    assert list(both) == [0, 1, 2] and both[1] == first[1] < both[2]
    assert both[2] - both[1] < 3 * both[1] + 0.5  # each of two batches of evaluation takes 0.5
