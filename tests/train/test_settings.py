"""Recipes as data: what is unknown, of a wrong type or out of range is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import finetune

from foveate import config
from foveate.train import recipe as recipes


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lrr=1", r"unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
        ("lop.epochs=1", r"unknown setting 'lop'; did you mean 'loop'"),
        ("data.augment.flp=0", r"unknown setting 'data.augment.flp'; did you mean 'data.augment.f"),
        ("optim.lr=fast", r"settings: optim.lr: expected a number. Got value: fast"),
        ("loop.epochs=1.5", r"settings: .*epochs.*1.5"),
        ("loop=3", r"loop is a group of settings, got 3"),
        ("optim.lr.peak=3", r"settings: .*lr.*peak"),
        ("loop.epochs=2 loop.epochs.first=3", r"epochs is a single value, not a group"),
        ("optim.milestones=0.5", r"milestones: expected a list, such as \[1, 2\]. Got value: 0.5"),
        ("epochs", r"'epochs' is not a setting: expected key=value, such as optim.lr"),
        ("optim.lr=[", r"the value cannot be read"),
        ("optim.lr=0", r"optim.lr must be a number above 0, got 0"),
        ("optim.lr=.inf", r"optim.lr must be a number above 0, got inf"),
        ("optim.betas=[0.9, 1.0]", r"optim.betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        ("data.crop_pct=0", r"data.crop_pct must lie in \(0, 1\], got 0"),
        ("optim.layer_decay=1.5", r"optim.layer_decay must lie in \(0, 1\], got 1.5"),
        ("optim.clip=-1", r"optim.clip must be above 0"),
        ("loop.epochs=0", r"loop.epochs must be at least 1, got 0"),
        ("loop.precision=fp8", r"loop.precision"),
        ("loop.ema=1", r"loop.ema must lie in \[0, 1\), got 1"),
        ("masking.ratios=[0.5, 1.5]", r"masking.ratios must lie in \[0, 1\], got 1.5"),
        ("mix.cutmix=-1", r"mix.cutmix must be at least 0"),
        ("data.mean=null", r"data.mean and data.std are given together"),
        ("data.std=[0]", r"data.std must be above 0"),
        ("distill.kind=sfot", r"distill.kind must be .*soft"),
        ("model.name=null", r"model.name or model.start must say which model"),
        ("model.pool=max", r"model.pool"),
    ],
)
def test_settings(setting: str, words: str) -> None:
    texts = setting.split(" l")[:1] + [f"l{text}" for text in setting.split(" l")[1:]]
    if setting == "model.name=null":
        texts.append("model.options={}")
    with pytest.raises(ValueError, match=words) as error:
        finetune(*texts, distill={})
    assert "\n" not in str(error.value)


def test_overrides_are_read_as_yaml() -> None:
    recipe = finetune(
        *("optim.lr=1e-4", "optim.clip=null", "data.train=folder:a=b", "masking.ratios=[0, 0.5]"),
        *("data.mean=[0.5]", "optim.fixed=[pos_embed]", "model.options.depth=2"),
    )
    assert recipe.optim.lr == 1e-4 and recipe.optim.clip is None
    assert recipe.data.train == "folder:a=b" and recipe.masking.ratios == (0, 0.5)
    assert recipe.optim.fixed == ("pos_embed",) and recipe.model.options["depth"] == 2
    assert recipe.model.options["embed_dim"] == 32  # beside it stays


@pytest.mark.parametrize(
    ("job", "wrong", "words"),
    [
        ("finetune", "data.augment.crop=none2", "crop must be one of"),
        ("reduce", "method.keep=half", "keep must be a number"),
        ("reduce", "method.kep=1", "unknown option of evit 'kep'"),
        ("detect", "backbone.no=1", "unknown option of backbone.name=pyramid 'no'"),
    ],
)
def test_a_message_says_where_the_setting_was_given(
    job: str, wrong: str, words: str, tmp_path: Path
) -> None:
    path, cls = tmp_path / "mine.yaml", config.recipe_class(job)
    tree: dict[str, Any] = {"model": {"start": "demo"}}
    if job == "reduce":
        tree["method"] = {"name": "evit"}
    if job == "detect":
        tree["backbone"] = {"name": "pyramid"}
    path.write_text(config.dump(tree))
    with pytest.raises(ValueError, match=f"^the command line: {words}"):
        config.read(cls, path, ["loop.epochs=1", wrong])
    *groups, last = wrong.partition("=")[0].split(".")
    inner: Any = tree
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = wrong.partition("=")[2]
    path.write_text(config.dump(tree))
    with pytest.raises(ValueError, match=f"mine.yaml: {words}"):
        config.read(cls, path, ["loop.epochs=1"])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match="mine.yaml does not exist"):
        config.read(recipes.Finetune, path)
    path.write_text("model: {start: demo\n")
    with pytest.raises(ValueError, match="mine.yaml is not readable YAML"):
        config.read(recipes.Finetune, path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="mine.yaml must hold keys and values, got list"):
        config.read(recipes.Finetune, path)
    path.write_text("model: {start: demo}\nmodle: 1\n")
    with pytest.raises(
        ValueError, match="mine.yaml: unknown setting 'modle'; did you mean 'model'"
    ):
        config.read(recipes.Finetune, path)
    path.write_text("model: {start: demo}\nmethod: evit\nweights: {kl: -1}\n")
    with pytest.raises(ValueError, match=r"mine.yaml: .*weights.kl must be at least 0, got -1.0"):
        config.read(recipes.Reduce, path)
    path.write_text("model: {start: demo}\n")
    with pytest.raises(ValueError, match="mine.yaml: .*method"):
        config.read(recipes.Reduce, path)
    with pytest.raises(ValueError, match="unknown recipe for reduce 'fashion_part_dynamic'; did y"):
        config.find_recipe("reduce", "fashion_part_dynamic")
