"""The small commands: list, describe, env, data, and what all of them share."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from small import vit

import foveate
from foveate import machine
from foveate.cli import COMMANDS, _parsers, main
from foveate.config import explain, headers, meanings, recipe_class
from foveate.data.sources import KINDS
from foveate.registry import method_class
from foveate.train.screens import last_screen


def said(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> str:
    """What a command prints, on the stream that goes with its exit code."""
    assert main(command) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if code else out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"In a terminal:\n  foveate {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["adapt", "finetune", "reduce", "pretrain", "probe"])
def test_the_help_of_a_job(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What data there are, where a run goes, and a sentence for each setting."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    about = text.partition("data.train=")[2].partition("data.val=")[0]
    assert all(kind in about for kind in KINDS)
    assert f"(default: runs/{command}-RECIPE)" in text
    assert (f"foveate {command} --resume FOLDER; with a larger loop.epochs" in text) is (
        command != "probe"
    )
    assert ("mto.spa (set by the preset) (number or null)" in text) is (command == "pretrain")
    settings = re.findall(r"^  (\S+).*\n((?: {6}.*\n?)+)", explain(recipe_class(command)), re.M)
    assert len(settings) > 30
    for key, words in settings:
        assert re.match(r'["A-Z]', words.strip()) and words.strip().endswith("."), key


def test_the_documented_commands_parse() -> None:
    """Every line of all pages that starts with foveate; one page has every command."""
    root = Path(__file__).parents[2]
    lines = [
        line.removeprefix("$ ").partition("  #")[0]
        for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("$ foveate ")
    ]
    assert {line.split()[1] for line in lines} == set(COMMANDS)
    parser, _ = _parsers()
    for line in lines:
        _, rest = parser.parse_known_args(shlex.split(line)[1:])
        assert all("=" in text for text in rest), line  # settings may follow options


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["lst"])
    assert left.value.code == 2
    assert "unknown command 'lst'; did you mean list?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evall", "foveate: unknown command 'evall'; did you mean eval?; foveate --help says more"),
        ("predict demo", "foveate predict: the following arguments are required: --images; "),
        ("describe", "foveate describe: the following arguments are required: MODEL; "),
        ("describe demo --image-size 28x", "pixels, such as 384 or 224x384 (height x width), got"),
        ("eval demo --limit few", "foveate eval: argument --limit: invalid int value: 'few'; "),
        ("show demo --images . --out x.png --kind kep", "invalid choice: 'kep'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(command.split())
    said = capsys.readouterr().err
    assert left.value.code == 2 and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "eval demo nomethod --out made/here",
        "look nowhere --out made/here",
        "rauc nowhere nothing --out made/here",
        "predict demo --images nowhere --out made/here.json --pictures made/pictures",
        "show demo evit --images nowhere --out made/here/sheet.png",
        "bench demo --images nowhere --out made/here.json --plot made/here.png",
        "tune demo --images nowhere --out made/here",
        "export demo evit made/here --check --images nowhere",
        "finetune fashion_part_full data.train=folder:nowhere --out made/here",
        "probe fashion_part model.start=nowhere --out made/here",
    ],
)
def test_a_mistake_leaves_no_folder(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "foveate " in said(capsys, *command.split(), code=2)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        words = said(capsys, "rauc", "a", "b", "--out", str(out), code=2)
        assert f"{out} cannot be written to: " in words


@pytest.mark.parametrize("job", ["adapt", "finetune", "reduce", "detect", "segment"])
def test_the_commands_that_a_run_suggests_parse(job: str) -> None:
    score = {"detect": "box_ap", "segment": "miou"}.get(job, "accuracy")
    result = {score: 0.5, "images": {"val": 9}, "model": "model", "splits": {"test": {}}}
    result |= {"score": score}
    lines = last_screen(job, result, Path("runs/it")).splitlines()[1:]
    parser, _ = _parsers()
    for line in lines:
        assert parser.parse_args(shlex.split(line.partition("foveate ")[2].partition(" #")[0]))
    assert len(lines) == 2 + (job in ("detect", "segment"))


def test_the_lists_of_recipes_are_whole_sentences() -> None:
    """--list shows the first line of a recipe, which must not break off."""
    jobs = ["adapt", "compare", "detect", "finetune", "pipeline", "pretrain", "probe", "reduce"]
    for job in [*jobs, "segment"]:
        for name, header in headers(job).items():
            assert re.fullmatch(r"[A-Z0-9].{19,98}[.]", header), (job, name, header)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "list")
    for name in foveate.list_methods():
        assert f"\n{name} " in text
    rows = json.loads(said(capsys, "list", "--json"))
    assert [row["method"] for row in rows] == foveate.list_methods()
    assert json.loads(said(capsys, "list", "tome", "--json"))[0]["options"]["r"] == 13
    assert "reactivate=True" in said(capsys, "list", "svit")
    assert "did you mean 'tome'?" in said(capsys, "list", "tomee", code=2)


@pytest.mark.parametrize("method", foveate.list_methods())
def test_list_explains_every_option(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is that of the method's page; it says something about each option."""
    known = meanings(method_class(method))
    _, _, options = said(capsys, "list", method).partition("options:\n")
    text = " ".join(options.split())
    for field in dataclasses.fields(method_class(method)):
        default, meaning = f"{field.name}={field.default!r}", known[field.name].replace("``", "")
        assert f"{default} {meaning.split()[0]} " in f"{text} ", default


def test_describe_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "describe", "deit_tiny_patch16_224", "evit", "tome", "--budget", "0.6x")
    assert text.count("(60%)") == 2 and text.startswith("evit(keep=")
    text = said(capsys, "describe", "deit_tiny_patch16_224", "--image-size", "224x448")
    assert text.startswith("deit_tiny_patch16_224, without a method\ntokens per block: 393 ")


def test_describe_a_saved_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foveate.save(foveate.apply(vit(), "evit(keep=0.5)"), tmp_path, everything=True)
    assert said(capsys, "describe", str(tmp_path)).startswith("evit(keep=0.5) on timm Vision")
    text = said(capsys, "describe", str(tmp_path), "tome", code=2)
    assert "has its own method evit(keep=0.5): give no other" in text


def test_describe_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "describe", "deit_tny_patch16_224", "evit", code=2)
    assert "OWNER/NAME); did you mean deit_tiny_patch16_224, " in text
    text = said(capsys, "describe", "deit_tiny_patch16_224", "--budget", "0.6x", code=2)
    assert "--budget sets the rate of a METHOD" in text
    text = said(capsys, "describe", "deit_tiny_patch16_224", "evit(keep=2)", code=2)
    assert "keep must lie in (0, 1], got 2" in text


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="keep must lie in"):
        main(["describe", "deit_tiny_patch16_224", "evit(keep=2)", "--debug"])


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages that foveate can use, those of extras too, and none that its tests need."""
    known = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: None if name == "ray" else known(name))
    text = said(capsys, "env")
    assert f"torch            {torch.__version__.split('+')[0]}" in text and "threads " in text
    assert "huggingface-hub  " in text and "lightning  " in text and "pytest" not in text
    assert "not installed    ray\n" in text


def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "MIT licence" in said(capsys, "data", "fashion-mnist")
    text = said(capsys, "data", "fashion-mnist", str(tmp_path), code=2)
    assert "holds no train-images-idx3-ubyte.gz" in text
    assert "unknown data set 'imagenet'" in said(capsys, "data", "imagenet", code=2)
