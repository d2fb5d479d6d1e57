"""The jobs as functions: models and data sets of one's own, groups of settings, results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import DATA, LOOP, MODEL, checkpoint, exported, finetune, run, small_model
from torch.utils.data import Dataset

import foveate
from foveate.data import DatasetSource, Loader, fashion_mnist_mini, normalise
from foveate.measure import select
from foveate.train import recipe as recipes

QUIET: dict[str, Any] = {"progress": False, "say": lambda _: None}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Clothes(Dataset):
    """Images of the set that ships, in one form or another."""

    def __init__(self, first: int, count: int, form: str = "picture") -> None:
        images, labels = fashion_mnist_mini("train")
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
        chosen = order[first : first + count]
        self.images, self.labels, self.form = images[chosen], labels[chosen].tolist(), form

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        pixels = self.images[index]
        image: Any = {
            "picture": lambda: Image.fromarray(pixels[0].numpy()),
            "array": lambda: pixels[0].numpy(),
            "bytes": lambda: pixels,
            "floats": lambda: normalise(pixels[None])[0],
        }[self.form]()
        return image, self.labels[index]


# Data sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["picture", "array", "bytes", "floats"])
def test_a_data_set_is_the_source_that_it_holds(form: str) -> None:
    """The same images as what ships, in whatever form they come."""
    data = {**DATA, "train": Clothes(0, 64, form), "val": Clothes(64, 32, form), "limit": None}
    data["augment"] = {"crop": "none", "flip": 0.0}
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loop, optim = {**LOOP, "epochs": 1}, {"name": "sgd", "lr": 0.1}
    result = foveate.finetune(model, data, loop=loop, optim=optim, **QUIET)
    assert result.model is model and result.path == Path("runs/finetune")
    moved = [
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert len(moved) == len(before)  # the module that was given is what has learnt
    expected = exported_of("picture") if form != "picture" else exported(result.path)
    for key, value in exported(result.path).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def exported_of(form: str) -> dict[str, Any]:
    data = {**DATA, "train": Clothes(0, 64, form), "val": Clothes(64, 32, form), "limit": None}
    data["augment"] = {"crop": "none", "flip": 0.0}
    loop, optim = {**LOOP, "epochs": 1}, {"name": "sgd", "lr": 0.1}
    done = foveate.finetune(small_model(), data, loop=loop, optim=optim, out=form, **QUIET)
    return exported(done.path)


def test_a_set_without_validation_images_is_divided() -> None:
    data = {**DATA, "train": Clothes(0, 200), "val_share": 0.2, "limit": None, "val_limit": None}
    result = foveate.finetune(small_model(), data, loop={**LOOP, "max_steps": 2}, **QUIET)
    images = result["images"]
    assert images["train"] + images["val"] == 200 and 20 < images["val"] < 60
    assert result["splits"]["val"]["held_out_of"] == "Clothes (200 items)"
    written = yaml.safe_load((result.path / "recipe.yaml").read_text())
    assert (
        written["data"]["train"] == "<Clothes>"
        and written["model"]["start"] == "<VisionTransformer>"
    )


def test_what_is_random_in_a_data_set_resumes() -> None:
    """Its own transform draws from the global generators; killed and resumed it draws the same."""

    class Noisy(Clothes):
        fails_after = 1000

        def __getitem__(self, index: int) -> Any:
            self.fails_after -= 1
            if not self.fails_after:
                raise ZeroDivisionError("of the data set itself")
            image, label = super().__getitem__(index)
            noise = torch.rand(1, 28, 28) + float(np.random.rand())
            return image + noise, label

    def started(out: str, dataset: Any, resume: bool = False) -> Any:
        data = {**DATA, "train": dataset, "val": Clothes(64, 32, "floats")}
        loop = {**LOOP, "save_every": 1}
        return foveate.finetune(small_model(), data, loop=loop, out=out, resume=resume, **QUIET)

    whole = started("whole", Noisy(0, 64, "floats"))
    failing = Noisy(0, 64, "floats")
    # Some labels are looked at, and it is compared with the validation images, before it trains.
    failing.fails_after = 8 + 64 + 64 + 40
    with pytest.raises(ZeroDivisionError, match="of the data set itself"):
        started("cut", failing)
    assert Path("cut/checkpoints/update-00000006.ckpt").is_file()
    started("cut", Noisy(0, 64, "floats"), resume=True)
    one, other = exported(whole.path), exported(Path("cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (iter([]), "list_iterator has no __getitem__ and no __len__: images are read by their num"),
        ([], r"list \(0 items\) is empty"),
        (Clothes, "the class Clothes is not a data set: give an object of it"),
        ([(Image.new("L", (28, 28)), 0.5)] * 40, "has the label 0.5: a whole number is needed"),
        ([("no image", 1)] * 40, "gives str: an image of Pillow, a uint8 array .* is needed"),
        (
            [(np.zeros((28, 28)), 1)] * 40,
            r"item 0 of list .* gives an array of float64 \[28, 28\]: an image",
        ),
        (
            [(torch.rand(1, 27, 27), i % 2) for i in range(40)],
            r"is \[1, 27, 27\], and the model t",
        ),
        ([(Image.new("L", (28, 28)), 0)] * 40, "has the class 0 alone: two are needed at least"),
        ([(Image.new("L", (28, 28)), -1)] * 40, "has labels below 0: classes are counted from 0"),
        ([Image.new("L", (28, 28))] * 40, "has no labels, which this job needs"),
        ([(Image.new("L", (28, 28)), i % 2) for i in range(40)], "two that differ are needed"),
    ],
)
def test_data_sets_that_do_not_do(dataset: Any, words: str) -> None:
    data = {"train": dataset, "batch": 8}
    with pytest.raises(ValueError, match=words) as error:
        foveate.finetune(small_model(num_classes=2), data, loop=LOOP, **QUIET)
    assert "\n" not in str(error.value) and not Path("runs/finetune").exists()


def test_the_same_set_twice() -> None:
    dataset = Clothes(0, 64)
    with pytest.raises(ValueError, match="data.train and data.val name the same images, Clothes"):
        foveate.finetune(small_model(), {"train": dataset, "val": dataset}, **QUIET)
    with pytest.raises(ValueError, match="1 of 32 validation images are training images too"):
        foveate.finetune(small_model(), {"train": Clothes(0, 64), "val": Clothes(63, 32)}, **QUIET)
    named = {"train": Clothes(0, 64), "val": [(Image.new("L", (28, 28)), 10)] * 8}
    with pytest.raises(ValueError, match="have the class 10, which no training image of Clothes"):
        foveate.finetune(small_model(), named, **QUIET)


def test_items_as_dictionaries_and_unlabelled_ones() -> None:
    image = Image.new("RGBA", (9, 7), (255, 0, 0, 128))
    source = DatasetSource([{"image": image, "label": np.int64(1), "name": "a"}], "all")
    found = source.sample(0)
    assert found["label"] == 1 and found["name"] == "a" and found["image"].mode == "RGB"
    assert source.classes == ("0", "1") and source.channels == 3 and source.label(0) == 1
    bare = DatasetSource([image], "all", labels=False)
    assert bare.classes is None and set(bare.sample(0)) == {"image"} and bare.targets(0) == {}


# Settings ----------------------------------------------------------------------------------------


def test_a_function_is_its_recipe(tmp_path: Path) -> None:
    """Groups as dictionaries or as classes, over a recipe or alone: the same run."""
    start = checkpoint(tmp_path / "start.safetensors")
    wanted = finetune("optim.lr=0.01", model={"start": start}, masking={"ratios": [0.5]})
    run(wanted, tmp_path / "wanted")
    Path("mine.yaml").write_text(yaml.safe_dump({"data": DATA, "optim": {"lr": 0.5}}))
    calls: list[dict[str, Any]] = [
        {"data": DATA, "optim": {"lr": 0.01}, "masking": recipes.Masking(ratios=(0.5,))},
        {"recipe": "mine.yaml", "optim": {"lr": 0.01}, "masking": {"ratios": [0.5]}},
    ]
    for number, call in enumerate(calls):
        result = foveate.finetune(start, loop=LOOP, out=str(number), **call, **QUIET)
        assert Path("wanted/recipe.yaml").read_text() == (result.path / "recipe.yaml").read_text()
        one, other = exported(tmp_path / "wanted"), exported(result.path)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_model_with_its_method_and_a_method_in_parts() -> None:
    model = foveate.apply(small_model(), "svit(keep=0.5)", check=False)
    kept = {key: value.clone() for key, value in model.reducer.state_dict().items()}
    assert kept
    loop = {**LOOP, "max_steps": 1}
    result = foveate.reduce(model, data=DATA, loop=loop, weights={"kl": 0.0}, **QUIET)
    assert result.model.vit is model.vit and repr(result.model.reducer) == repr(model.reducer)
    assert yaml.safe_load((result.path / "recipe.yaml").read_text())["method"] == "svit(keep=0.5)"
    with pytest.raises(ValueError, match=r"has its own method svit\(keep=0.5\): give no other"):
        foveate.reduce(model, "evit", DATA, **QUIET)
    parts = {"name": "tome", "r": 2}
    found = foveate.reduce(small_model(), parts, DATA, loop=loop, out="tome", **QUIET)
    assert repr(found.model.reducer) == "tome(r=2)"


def test_what_a_call_says_changes_single_keys_of_a_recipe() -> None:
    """In groups of groups too; a class, or a model that is given, stands for its whole group."""
    tree = {"model": MODEL, "data": DATA, "optim": {"lr": 0.5, "clip": 1.0}}
    Path("mine.yaml").write_text(yaml.safe_dump({**tree, "loop": {**LOOP, "max_steps": 1}}))

    def said(**call: Any) -> Any:
        done = foveate.finetune(recipe="mine.yaml", **call, **QUIET)
        return yaml.safe_load((done.path / "recipe.yaml").read_text())

    found = said(data={"augment": {"flip": 0.0}}, optim={"lr": 0.25})
    assert found["data"]["augment"]["crop"] == "pad" and found["data"]["augment"]["flip"] == 0
    assert found["optim"]["clip"] == 1.0 and found["optim"]["lr"] == 0.25
    found = said(optim=recipes.Optim(lr=0.25), model=small_model())
    assert found["optim"]["clip"] is None
    assert found["model"]["name"] is None and found["model"]["options"] == {}


def test_gates_that_were_trained_go_on() -> None:
    model = foveate.apply(small_model(), "svit(keep=0.5)", check=False)
    for parameter in model.reducer.parameters():
        torch.nn.init.constant_(parameter, 0.125)
    optim, weights = {"lr": 1e-9, "weight_decay": 0.0}, {"kl": 0.0}
    loop = {**LOOP, "max_steps": 1}
    done = foveate.reduce(model, data=DATA, optim=optim, loop=loop, weights=weights, **QUIET)
    for parameter in done.model.reducer.parameters():
        assert torch.allclose(parameter, torch.tensor(0.125), atol=1e-6)


def test_a_model_may_teach_itself() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loop = {**LOOP, "max_steps": 1}
    foveate.reduce(model, "dynamicvit(keep=0.5)", DATA, teacher=model, loop=loop, **QUIET)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_data_set_that_is_a_dataclass() -> None:
    @dataclass
    class Small:
        count: int

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> Any:
            return Clothes(0, self.count)[index]

    data = {**DATA, "train": Small(64), "val": Clothes(64, 32)}
    loop = {**LOOP, "max_steps": 1}
    assert foveate.finetune(small_model(), data, loop=loop, **QUIET)["updates"] == 1


def test_every_evaluation_of_random_images_is_the_same() -> None:
    class Noisy(Clothes):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image + torch.rand(1, 28, 28), label

    plain = lambda sample: sample  # noqa: E731
    loader = Loader(DatasetSource(Noisy(0, 20, "floats"), "val"), plain, batch=8, train=False)
    first, second = ([batch["image"] for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match="foveate.finetune: unknown setting 'optim.lrr'; did you m"
    ):
        foveate.finetune(small_model(), DATA, optim={"lrr": 1}, **QUIET)
    with pytest.raises(ValueError, match="vit_tiny_patch61 is neither a file, a folder nor a mode"):
        foveate.finetune("vit_tiny_patch61", DATA, **QUIET)
    with pytest.raises(ValueError, match="model.start=pretrained needs|model.name or model.start"):
        foveate.finetune(None, DATA, **QUIET)


def test_folders_are_not_written_over() -> None:
    loop = {**LOOP, "max_steps": 1}
    paths = [foveate.finetune(small_model(), DATA, loop=loop, **QUIET).path for _ in range(2)]
    assert paths == [Path("runs/finetune"), Path("runs/finetune-2")]
    with pytest.raises(ValueError, match="resume=True continues the run in the folder out: name"):
        foveate.finetune(small_model(), DATA, loop=loop, resume=True, **QUIET)


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(ValueError, match="would choose its own folder: name one, such as out='run"):
        foveate.finetune(small_model(), DATA, loop={**LOOP, "devices": 2}, **QUIET)
    with pytest.raises(ValueError, match="this machine has no GPU that torch can use"):
        foveate.finetune(small_model(), DATA, loop={**LOOP, "device": "cuda"}, **QUIET)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="would choose its own folder: name one, such as out='run"):
        foveate.probe(small_model(), DATA)
    assert not Path("runs").exists()


def test_an_object_among_the_options_of_a_model() -> None:
    options = {**MODEL["options"], "norm_layer": torch.nn.Identity}
    model = {"name": MODEL["name"], "options": options}
    result = foveate.finetune(model, DATA, loop={**LOOP, "max_steps": 1}, **QUIET)
    assert isinstance(result.model.blocks[0].norm1, torch.nn.Identity)
    with pytest.raises(ValueError, match="foveate.reduce: weights: expected a number"):
        foveate.reduce(small_model(), "evit", DATA, weights={"class": torch.nn.Identity()}, **QUIET)


# Results and the other jobs ----------------------------------------------------------------------


def test_a_result() -> None:
    result = foveate.finetune(small_model(), DATA, loop=LOOP, **QUIET)
    assert result.metrics["accuracy"] == result["accuracy"] and "updates" not in result.metrics
    history = result.history
    assert list(history.index[history["train/loss"].notna()]) == list(range(8))
    assert history["val/accuracy"].dropna().iloc[-1] == pytest.approx(result["accuracy"], abs=0.01)
    assert repr(result).startswith("Result(runs/finetune: loss ")
    figure = result.plot()
    losses, scores = figure.axes
    assert losses.get_title() == "loss" and scores.get_title() == "accuracy, %"
    assert [line.get_label() for line in losses.lines] == ["training", "validation"]
    assert len(losses.lines[0].get_xdata()) == 8


def test_pretrain_and_probe() -> None:
    tiny = {"name": MODEL["name"], "options": MODEL["options"]}
    images = [Clothes(0, 64)[i][0] for i in range(64)]
    done = foveate.pretrain(
        tiny,
        {"train": images, "val": "none", "batch": 16},
        options={"decoder_width": 32, "decoder_depth": 2},
        loop={**LOOP, "epochs": 1},
        **QUIET,
    )
    assert done["updates"] == 4 and (done.path / "model.safetensors").is_file()
    own = small_model(num_classes=0)
    data = {"train": images, "val": "none", "batch": 16}
    options = {"decoder_width": 32, "decoder_depth": 1}
    again = foveate.pretrain(own, data, options=options, loop={**LOOP, "epochs": 1}, **QUIET)
    assert again.model is not None and again.model.vit is own
    read = foveate.probe(
        done.path,
        {"train": Clothes(0, 200), "val": Clothes(200, 100), "batch": 50},
        neighbours=5,
        epochs=2,
    )
    assert read["images"] == {"all": 100, "train": 200} and read["knn"] > 25  # chance is 10


def test_evaluate() -> None:
    """A model and a data set of one's own, with a method: what a count by hand gives."""
    model, images = small_model().train(), Clothes(0, 100, "floats")
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    found = foveate.evaluate(model, images, "evit(keep=0.5)", batch=32, device="cpu")
    assert [module.training for module in model.modules()] == before
    x = torch.stack([images[i][0] for i in range(100)])
    reduced = foveate.apply(model, "evit(keep=0.5)")
    for method, one in (("", model), ("evit(keep=0.5)", reduced)):
        with torch.no_grad():
            right = (one.eval()(x).argmax(1) == torch.tensor(images.labels)).float().mean()
        rows = select(found.table, part="accuracy", metric="top1", method=method)
        assert rows["value"].tolist() == [pytest.approx(100 * float(right))]
        assert rows["run"].tolist() == ["VisionTransformer"]
    assert found.about["settings"]["data"] == "Clothes (100 items)"
    with pytest.raises(ValueError, match="part of foveate.evaluate 'bach'; did you mean 'b"):
        foveate.evaluate(model, images, bach=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["", "dynamicvit(keep=0.5)"])
def test_compiled_steps_are_the_same(method: str) -> None:
    weights = []
    for compiled in (False, True):
        loop = {**LOOP, "max_steps": 3, "compile": compiled}
        options = {"optim": {"name": "sgd", "lr": 0.1}, "loop": loop, "out": str(compiled)}
        if method:
            losses = {"kl": 0.0, "token": 0.0}
            argmax = method.replace(")", ", gate='argmax')")
            done = foveate.reduce(small_model(), argmax, DATA, weights=losses, **options, **QUIET)
        else:
            done = foveate.finetune(small_model(), DATA, **options, **QUIET)
        weights.append(exported(done.path))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
