"""The command: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import as_dynamicvit, mae, parts, reduced, write
from safetensors.torch import load_file
from small import images, logits, randomise, vit

import foveate
from foveate.cli import COMMANDS, main


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "foveate", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write({"model": randomise(vit()).state_dict()}, tmp_path / "plain.pth")


def test_help_comes_at_once() -> None:
    """Nothing heavy is imported for it: torch alone takes seconds."""
    heavy = "torch", "timm", "numpy", "transformers"
    code = f"""
import sys
from foveate.cli import main
try:
    main(["--help"])
finally:
    print("heavy:", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "heavy: []" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)
    start = time.perf_counter()
    assert run("convert", "--help").returncode == 0
    assert time.perf_counter() - start < 2


def test_version() -> None:
    assert run("--version").stdout.startswith("foveate ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "required: COMMAND"),
        (("convrt",), "did you mean convert"),
        (("convert",), "required: CHECKPOINT, OUT"),
        (("convert", "a", "b", "--orgin", "evit"), "unknown option --orgin; did you mean --origin"),
        (("convert", "a", "b", "--image-size", "x"), "--image-size"),
        (("convert", "a", "b", "--weights", "best"), "invalid choice"),
    ],
)
def test_wrong_command_lines(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistake_is_one_sentence_and_debug_shows_where(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.pth")
    words = ("convert", missing, str(tmp_path / "out"))
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"foveate convert: {missing} does not exist; expected a checkpoint or a folder\n"
    )
    done = run(*words, "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_method_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reduced("dynamicvit(keep=0.6)")
    path = write({"model": as_dynamicvit(model)}, tmp_path / "x.pth")
    assert convert(path, tmp_path / "out", "keep=0.6", "--num-heads", 3) == 0
    printed = capsys.readouterr().out
    assert "origin   dynamicvit" in printed
    assert "width 48, depth 4, 3 heads, patch 8 x 8, grid 6 x 6, 10 classes" in printed
    assert "method   dynamicvit(keep=0.6)" in printed and "note     took model" in printed
    again = foveate.load(tmp_path / "out").eval()
    assert torch.equal(logits(again, images()), logits(model, images()))


def test_options_stand_anywhere(tmp_path: Path) -> None:
    model = reduced("evit(keep=[0.9, 0.6], blocks=[1, 2], rest='drop')")
    path = write(parts(model), tmp_path / "x.pth")
    heads = ("--num-heads", 3)
    words = ("keep=0.9,0.6", "blocks=[1, 2]", "rest=drop")
    for order in (
        (path, tmp_path / "out", *words, "--origin", "evit", *heads),
        ("--origin", "evit", *heads, path, tmp_path / "out", *words),
        (path, tmp_path / "out", "--origin", "evit", words[0], *heads, *words[1:]),
        (path, *heads, tmp_path / "out", *words, "--origin=evit"),
    ):
        assert convert(*order) == 0
        again = foveate.load(tmp_path / "out").eval()
        assert again.reducer.config() == model.reducer.config()


def test_a_plain_model_becomes_a_file_for_timm(tmp_path: Path) -> None:
    model = randomise(timm.create_model("deit_tiny_patch16_224", depth=2)).eval()
    path = write({"model": model.state_dict()}, tmp_path / "x.pth")
    assert convert(path, tmp_path / "new" / "x.safetensors") == 0
    twin = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
    twin.load_state_dict(load_file(tmp_path / "new" / "x.safetensors"))
    x = images(1, (224, 224))
    assert torch.equal(logits(twin, x), logits(model, x))
    (file,) = (tmp_path / "new").iterdir()
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode  # readable for the same people


def test_a_plain_model_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write({"model": mae()}, tmp_path / "mae.pth"), tmp_path / "mae.safetensors"
    assert convert(path, out, "--num-heads", 3, "--image-size", "64x48", "--no-antialias") == 0
    printed = capsys.readouterr().out
    assert "left out decoder_embed.weight" in printed and "grid 8 x 6, 0 classes" in printed
    assert "positions resized from 6 x 6 to 8 x 6 patches, without antialiasing" in printed
    expected = foveate.load(path, num_heads=3, image_size=(64, 48), antialias=False)
    x = images(1, (64, 48))
    assert torch.equal(logits(foveate.load(out), x), logits(expected, x))


def test_a_plain_model_with_a_method(plain: Path, tmp_path: Path) -> None:
    words = (plain, tmp_path / "out", "--num-heads", 3, "--method")
    assert convert(*words, "tome", "r=4") == 0
    assert repr(foveate.load(tmp_path / "out").reducer) == "tome(r=4)"
    assert convert(*words, "evit(keep=0.8, blocks=(1,)) + tome(r=2, blocks=(2,))") == 0
    assert (
        repr(foveate.load(tmp_path / "out").reducer)
        == "evit(keep=0.8, blocks=(1,)) + tome(r=2, blocks=(2,))"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("out",), "out must end in .safetensors: a model without a method is one file"),
        (("out.safetensors", "--method", "tome"), "must be a folder: the model has a method"),
        (("plain.safetensors",), "is the checkpoint itself"),
        (("out", "--method", "tome", "r"), "go as OPTION=VALUE, got 'r'"),
        (("out", "--method", "tome", "s=3"), "unknown option of tome 's'"),
        (("out", "keep=0.5"), "unknown keyword 'keep'"),
        (("file", "--method", "tome"), "file must be a folder"),
        (("file/out", "--method", "tome"), "file"),
        (("file/out.safetensors",), "file"),
    ],
)
def test_what_cannot_be_written(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    torch.save(randomise(vit()).state_dict(), "plain.safetensors")  # by content, not by name
    before = sorted(tmp_path.iterdir())
    assert convert("plain.safetensors", *words, "--num-heads", 3) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.iterdir()) == before
