"""``foveate.export``: what is written runs without foveate and answers as torch does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import needs
from PIL import Image
from small import images, logits, randomise, vit

import foveate
from foveate.cli import main
from foveate.convert import open_shipped
from foveate.data import Inputs, fashion_mnist_mini, normalise
from foveate.exports import Exported, graph, infer
from foveate.exports.infer import open_model, prepare

METHOD = "evit(keep=0.7, blocks=(1,))"
TOKENS = (37, 28)  # of 36 patches and a class token


def tiny(**options: object) -> torch.nn.Module:
    """A ViT of two blocks: capturing one takes seconds."""
    return randomise(vit(depth=2, **options)).eval()


def with_method(method: str = METHOD, **options: object) -> foveate.core.ReducedViT:
    model = foveate.apply(tiny(**options), method).eval()
    randomise(model.reducer, seed=1)
    return model


ALONE = """
import runpy, sys
for name in {hidden}:
    sys.modules[name] = None
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(folder: Path, *argv: object, hidden: tuple[str, ...] = ("foveate", "torch")) -> str:
    """Run an exported folder's own program where some packages cannot be imported."""
    words = [str(folder / "infer.py"), *map(str, argv)]
    code = ALONE.format(hidden=hidden, argv=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def photograph(path: Path, mode: str, size: tuple[int, int]) -> Path:
    """Write a picture of smooth colours."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(rows / (5 + n)) + np.cos(columns / (7 - n)) for n in range(3)]
    values = (np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    "format", ["onnx", "openvino", pytest.param("pt2", marks=pytest.mark.slow)]
)
def test_what_is_written(format: str, tmp_path: Path) -> None:
    needs(format)
    if format != "openvino":
        check_what_is_written(format, tmp_path)
        return
    # In a process of its own, as users have it: it once ended a process that had run all other
    # tests before.
    code = "import sys, pathlib; from test_exports import check_what_is_written as check\n"
    code += f"check('openvino', pathlib.Path({str(tmp_path)!r}))"
    folders = [
        Path(__file__).parent,
        Path(__file__).parents[1],
        Path(__file__).parents[1] / "contract",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def check_what_is_written(format: str, folder: Path) -> None:
    model, out = with_method(), folder / "deep" / "out"
    exported = foveate.export(model, out, format=format, name="small")
    any_batch_answers_as_torch(exported, model)
    the_blocks_compute_few_tokens(exported, model)
    the_folder_says_what_is_in_it(exported)
    it_runs_without_foveate(exported, model, folder)


def any_batch_answers_as_torch(exported: Exported, model: foveate.core.ReducedViT) -> None:
    run = exported.open(threads=1)
    known = exported.open(threads=1, batch=5)  # changes nothing but the plan
    for batch in (1, 2, 5):
        x = images(batch)
        wanted = logits(model, x).numpy()
        for ask in (run, known) if batch == 5 else (run,):
            (answer,) = ask(x.numpy())
            assert answer.shape == (batch, 10)
            assert np.abs(answer - wanted).max() < 1e-4 * np.abs(wanted).max()


def the_blocks_compute_few_tokens(exported: Exported, model: foveate.core.ReducedViT) -> None:
    assert exported.tokens == tuple(one[0] for one in model.trace(images(1)).counts())
    assert exported.tokens[1] < exported.tokens[0]
    assert exported.about["tokens"] == list(exported.tokens)


def the_folder_says_what_is_in_it(exported: Exported) -> None:
    assert exported.file.is_file() and not list(exported.folder.glob("*.partial"))
    about = json.loads((exported.folder / "model.json").read_text(encoding="utf-8"))
    assert about == exported.about
    text = (exported.folder / "README.md").read_text(encoding="utf-8")
    for part in (METHOD, exported.file.name, "[any, 10]", " ".join(map(str, exported.tokens))):
        assert part in text
    assert str(Path.home()) not in text and "Not checked" in text


def it_runs_without_foveate(
    exported: Exported, model: foveate.core.ReducedViT, folder: Path
) -> None:
    photos = [
        photograph(folder / "wide.png", "RGB", (71, 40)),
        photograph(folder / "tall.png", "RGBA", (33, 90)),
        photograph(folder / "own.png", "L", (48, 48)),
    ]
    hidden = ("foveate",) if exported.about["runtime"] == "torch" else ("foveate", "torch")
    out = folder / "answers.json"
    printed = alone(exported.folder, *photos, "--top", 2, "--json", out, hidden=hidden)
    assert printed.count("\n") == 3
    answers = json.loads(out.read_text(encoding="utf-8"))
    for found in foveate.predict(model, photos, top=2):
        mine = answers[found.image]
        assert [one["class"] for one in mine] == list(found.classes)
        assert np.allclose([one["confidence"] for one in mine], found.confidences, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (28, 28), (301, 300), (29, 28)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
def test_pictures_are_prepared_as_in_evaluation(size: tuple[int, int], crop_pct: float) -> None:
    """To the bit: the program beside the model repeats what evaluation does, by itself."""
    inputs = Inputs((28, 28), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct, "bicubic")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    about = {
        "channels": 3,
        "size": [28, 28],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
    }
    pixels = inputs.transform()({"image": image})["image"].as_subclass(torch.Tensor).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (inputs.mean, inputs.std))
    assert np.allclose(prepare(image, about), ((pixels - mean) / std).numpy(), atol=1e-6)


def test_pictures_fill_a_fixed_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is computed once, and keeps its own answer; all outputs are written."""
    about = {"channels": 1, "size": [2, 3], "mean": [0.0], "std": [1.0], "crop_pct": None}
    about |= {"batch": 2, "outputs": ["map_0", "map_1"], "labels": None, "runtime": "torch"}
    sizes = []

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        sizes.append(len(pixels))
        return [pixels, pixels[..., :1]]

    def infer_main(*argv: object) -> None:
        (tmp_path / "model.json").write_text(json.dumps(about))
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, argv)])
        infer.main()

    monkeypatch.setattr(infer, "__file__", str(tmp_path / "infer.py"))
    monkeypatch.setattr(infer, "open_model", lambda folder, threads, batch, bf16: (run, about))
    photos = [tmp_path / f"{level}.png" for level in (0, 51, 102, 153, 204)]
    for photo in photos:
        Image.new("L", (3, 2), int(photo.stem)).save(photo)
    infer_main(*photos, "--npz", tmp_path / "all.npz")
    assert sizes == [2, 2, 2]  # the last batch is filled up
    assert f"{photos[4]}: map_0 [1, 2, 3], map_1 [1, 2, 1]" in capsys.readouterr().out
    with np.load(tmp_path / "all.npz") as found:
        assert [found[name].shape for name in about["outputs"]] == [(5, 1, 2, 3), (5, 1, 2, 1)]
        assert np.allclose(found["map_1"][:, 0, 0, 0], [0, 0.2, 0.4, 0.6, 0.8])
    for words, said in (
        (["--npy", "one.npy"], "this model has 2"),
        (["--json", "a"], "for classes"),
        (["--bf16"], "--bf16 is for OpenVINO, and this model runs in torch"),
    ):
        with pytest.raises(SystemExit):
            infer_main(photos[0], *words)
        assert said in capsys.readouterr().err
    about |= {"batch": None, "outputs": ["logits"], "labels": ["a", "b"]}
    monkeypatch.setattr(
        infer,
        "open_model",
        lambda folder, threads, batch, bf16: (lambda x: [x.reshape(1, 6)[:, :2]], about),
    )
    infer_main(*photos[:3], "--npy", tmp_path / "one.npy", "--json", tmp_path / "answers.json")
    assert np.load(tmp_path / "one.npy").shape == (3, 2)
    assert list(json.loads((tmp_path / "answers.json").read_text())) == list(map(str, photos[:3]))


# Eight bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "method", "batch"),
    [
        pytest.param("openvino", "dynamicvit(keep=0.7, blocks=[1])", None, marks=pytest.mark.slow),
        pytest.param("openvino", METHOD, 3, marks=pytest.mark.slow),
        ("onnx", METHOD, 3),  # which does not divide the images
    ],
)
def test_eight_bits(
    format: str,
    method: str,
    batch: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    needs(format)
    found = foveate.export(
        with_method(method),
        tmp_path,
        format=format,
        int8=True,
        calibrate=images(8),
        batch=batch,
        check=True,
        images=images(16, seed=1),
        rounds=0,
    )
    assert found.tokens[1] < found.tokens[0]
    assert found.check is not None and found.check.passed
    assert found.check.images == 16 - 16 % (batch or 1)
    assert 1e-3 < found.check.error < 0.5  # rounding shows, and it is rounding
    assert found.check.agreement is not None and found.check.agreement > 0.5
    assert found.check.divergence is not None and 0 < found.check.divergence < 0.1
    assert "in 8 bits" in (tmp_path / "README.md").read_text(encoding="utf-8")
    # Whoever listens to the log hears as much as before.
    assert caplog.handler.level == logging.NOTSET
    logging.getLogger("foveate").warning("as before")
    assert caplog.messages[-1] == "as before"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("method", ["evit(keep=0.7)", "tome(r=3)"])
def test_eight_bits_lose_half_a_point_at_most(format: str, method: str, tmp_path: Path) -> None:
    """On the 2 000 test images that ship, fitted to training images."""
    needs(format)
    model = foveate.apply(open_shipped("demo"), method).eval()
    found = foveate.export(model, tmp_path, format=format, int8=True)
    tests = fashion_mnist_mini("test")
    pixels = normalise(tests.images)
    (answer,) = found.open()(pixels.numpy())
    with torch.no_grad():
        own = model(pixels).argmax(1)
    labels = torch.as_tensor(tests.labels)
    before, after = (
        100 * float((said == labels).float().mean())
        for said in (own, torch.from_numpy(answer).argmax(1))
    )
    assert before > 78
    assert after >= before - 0.5


# What a graph can hold ---------------------------------------------------------------------------


def test_gates_keep_a_number_and_are_their_own_again_afterwards(tmp_path: Path) -> None:
    model = with_method("svit(keep=0.7, blocks=[1])")
    found = foveate.export(model, tmp_path, format="pt2", check=True, rounds=0, batch=2)
    assert model.gate is None and not model.reducer.fixed_count
    assert found.notes[0].startswith("svit decides for each image how many patches it keeps")
    assert found.check is not None and found.check.passed and found.check.error < 1e-5
    assert "[2, 10]" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["ats", "atm(threshold=0.9)"])
def test_a_number_for_every_image_is_refused(method: str, tmp_path: Path) -> None:
    model = foveate.apply(vit(), method)
    with pytest.raises(ValueError, match="keeps a different number of tokens in each image"):
        foveate.export(model, tmp_path, format="pt2")


def test_without_a_method_all_tokens_are_computed(tmp_path: Path) -> None:
    model = tiny(class_token=False, global_pool="avg", num_classes=0).train()
    found = foveate.export(model, tmp_path, format="pt2")
    assert found.tokens == (36,) * 2
    assert found.about["outputs"] == ["features"] and found.about["method"] is None
    (answer,) = found.open()(images(2).numpy())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert np.abs(answer - model.eval()(images(2)).numpy()).max() < 1e-5


@pytest.mark.slow
def test_the_backbone_of_a_detector(tmp_path: Path) -> None:
    needs("onnx")
    model = open_shipped("demo_detector")
    found = foveate.export(model, tmp_path, image_size=(60, 40), check=True, rounds=0)
    assert found.check is not None and found.check.passed
    assert found.about["size"] == [64, 40] and found.about["batch"] == 1
    assert found.about["outputs"] == [f"map_{n}" for n in range(len(model.trunk.scales))]
    assert found.tokens[-1] < found.tokens[0]
    photos = [photograph(tmp_path / "wide.png", "RGB", (71, 40))]
    again = foveate.export(
        model, tmp_path / "b", format="pt2", check=True, images=photos, rounds=0, image_size=32
    )
    assert again.check is not None and again.check.passed and again.check.images == 1
    with pytest.raises(ValueError, match="an image size is for dense models"):
        foveate.export(vit(), tmp_path, format="pt2", image_size=64)


def test_openvino_computes_in_float32_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("openvino")
    import openvino

    made, x = foveate.export(with_method(), tmp_path, format="openvino"), images(2)
    asked, compile_model = [], openvino.compile_model

    def watched(model: object, device: str, settings: dict) -> object:
        asked.append(settings["INFERENCE_PRECISION_HINT"])
        return compile_model(model, device, settings)

    monkeypatch.setattr(openvino, "compile_model", watched)
    exact, coarse = made.open()(x.numpy())[0], made.open(bf16=True)(x.numpy())[0]
    assert asked == ["f32", "bf16"]
    np.testing.assert_allclose(coarse, exact, atol=0.1)  # equal where bf16 has no instructions


def test_bf16_is_for_openvino(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16 is for openvino: this model runs in torch"):
        foveate.export(tiny(), tmp_path, format="pt2").open(bf16=True)


def test_equal_scores_keep_their_order_in_a_pt2_file(tmp_path: Path) -> None:
    model = with_method("tome(r=4)")
    made = foveate.export(model, tmp_path, format="pt2", batch=2)
    program = torch.export.load(str(made.file))
    sorts = [node for node in program.graph.nodes if "sort" in str(node.target)]
    assert sorts and all(node.kwargs["stable"] is True for node in sorts)
    x = images(2)
    np.testing.assert_allclose(made.open()(x.numpy())[0], logits(model, x), atol=1e-4)


def test_all_images_are_compared_and_read_before_the_work(tmp_path: Path) -> None:
    """Not only those that fill a call; but a fixed batch has to be filled."""
    model, out = with_method(), tmp_path / "out"
    found = foveate.export(model, out, format="pt2", check=True, images=images(11), rounds=0)
    assert found.check is not None and found.check.images == 11
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "empty", "no images"),
        (images(3), "batches of 4 need at least 4 images"),
    ):
        with pytest.raises(ValueError, match=message):
            foveate.export(model, out, format="pt2", batch=4, check=True, images=given, rounds=0)


# Checks that fail --------------------------------------------------------------------------------


def test_a_file_that_answers_otherwise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has other weights than the model it is compared with."""
    other = foveate.apply(randomise(tiny(), seed=7), METHOD).eval()
    captured = graph.capture(other)
    monkeypatch.setattr("foveate.exports.make.capture", lambda *_: captured)
    found = foveate.export(with_method(), tmp_path, format="pt2", check=True, rounds=0)
    assert found.check is not None and not found.check.passed
    assert found.check.beyond == found.check.images == 64 and found.check.error > 0.1
    assert "differ by more than 1e-04: 64" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_file_that_runs_dense_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = graph.capture(tiny())
    assert captured.tokens == (37, 37)
    mixed = graph.Graph(**{**vars(captured), "tokens": TOKENS})
    monkeypatch.setattr("foveate.exports.make.capture", lambda *_: mixed)
    with pytest.raises(ValueError, match="the method has no effect in this file"):
        foveate.export(with_method(), tmp_path, format="pt2")


def test_times_stand_beside_the_dense_model(tmp_path: Path) -> None:
    model = with_method(drop_rate=0.1).train()
    model.vit.blocks[0].eval()
    before = [module.training for module in model.modules()]
    found = foveate.export(model, tmp_path, format="pt2", check=True, rounds=2, threads=1)
    assert [module.training for module in model.modules()] == before
    assert found.check is not None
    names = [speed.name for speed in found.check.speeds]
    assert names == [
        *("dense", "dense again", METHOD, "dense, torch", f"{METHOD}, torch, exported"),
    ]
    assert all(
        speed.ms > 0 and speed.low <= speed.times <= speed.high for speed in found.check.speeds
    )
    assert "a trial" in "\n".join(found.check.lines())


# What cannot be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of"),
        ({"format": "pt2", "int8": True}, "int8 is for onnx and openvino"),
        ({"format": "onnx", "opset": 11}, "opset must be at least 18, got 11"),
        ({"format": "pt2", "opset": 20}, "pt2 has none"),
        ({"format": "pt2", "batch": 0}, "batch must be a whole number from 1"),
        ({"format": "pt2", "rounds": -1}, "rounds must be a whole number from 0"),
        ({"format": "onnx", "int8": True}, "int8 needs images"),
        (
            {"format": "onnx", "int8": True, "calibrate": torch.zeros(2, 3, 8, 8)},
            "images must be",
        ),
    ],
)
def test_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        foveate.export(vit(), tmp_path, **options)


def test_weights_of_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights of bfloat16: export it in float32"):
        foveate.export(vit().bfloat16(), tmp_path, format="pt2")


def test_a_runtime_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.exports.make.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvino is not installed: pip install 'foveate\[openv"):
        foveate.export(vit(), tmp_path, format="openvino")


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        foveate.export(vit(), tmp_path / "out", int8=True, calibrate=tmp_path / "empty")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="file cannot be written to: File exists"):
        foveate.export(vit(), tmp_path / "file", format="pt2")


# The command -------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["export", "demo", METHOD, str(out), "--format", "pt2"]
    assert main([*words, "--check", "--rounds", "0", "--batch", "4"]) == 0
    printed = capsys.readouterr().out
    assert "tokens   50 37 37" in printed and "same most likely class  100.0%" in printed
    assert f"wrote    {out / 'model.pt2'}" in printed
    run, about = open_model(out)
    assert about["labels"][9] == "ankle boot" and about["batch"] == 4
    assert run(np.zeros((4, 1, 28, 28), np.float32))[0].shape == (4, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo"], "the folder OUT"),
        (["demo", "evit", "tome", "out"], "the folder OUT"),
        (["demo", "evit(keep=0.7)"], "is a method, and the folder OUT is missing"),
        (["demo_svit", "evit", "out"], "has its own method"),
        (["demo", "out", "--calibrate", "photos"], "--calibrate is for --int8"),
        (["demo", "out", "--images", "photos"], "which --check asks for"),
        (["demo", "out", "--batch", "many"], "--batch must be dynamic or a number from 1"),
        (["demo", "out", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words]) == 2
    assert message in capsys.readouterr().err
