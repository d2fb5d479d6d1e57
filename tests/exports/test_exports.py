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
from foveate.data.images import to_rgb
from foveate.exports import Exported, graph, infer, make
from foveate.exports.check import compare
from foveate.exports.infer import open_model, prepare
from foveate.exports.pictures import for_check

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
    in_its_own_process("check_what_is_written", format, tmp_path)


def in_its_own_process(check: str, word: str, folder: Path) -> None:
    """Run a function of this file where a crash of a runtime ends no other test."""
    code = f"import pathlib; from test_exports import {check} as check\n"
    code += f"check({word!r}, pathlib.Path({str(folder)!r}))"
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


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        *(("F", 0, 1), ("F", 0, 255), ("F", -2, 3), ("F", 0, 80000)),
        *(("I", 0, 255), ("I", 0, 65535), ("I", -5, 70000), ("I;16", 0, 65535)),
        *(("RGBa", 0, 255), ("LA", 0, 255), ("1", 0, 255)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_mode_are_read_as_by_predict(
    mode: str, low: float, high: float, channels: int
) -> None:
    ramp = np.linspace(low, high, 12 * 16).reshape(12, 16)
    if mode in ("F", "I", "I;16"):
        image = Image.fromarray(ramp.astype({"F": np.float32, "I": np.int32}.get(mode, np.uint16)))
    elif mode == "RGBa":
        colours = Image.fromarray(ramp.astype(np.uint8)).convert(mode.upper())
        colours.putalpha(Image.fromarray(ramp.T.reshape(12, 16).astype(np.uint8)))
        image = colours.convert(mode)
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    assert image.mode == mode
    about = {"channels": channels, "size": [12, 16], "mean": [0.0], "std": [1.0], "crop_pct": 1.0}
    wanted = prepare(to_rgb(image), about)
    assert np.array_equal(prepare(image, about), wanted)
    assert wanted.max() - wanted.min() > 0.5


def test_the_program_refuses_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"channels": 1, "size": [2, 3], "mean": [0.0], "std": [1.0], "crop_pct": None}
    about |= {"batch": None, "outputs": ["logits"], "labels": ["a", "b"], "file": "model.xml"}
    photo, broken, huge = (tmp_path / f"{name}.png" for name in ("photo", "broken", "huge"))
    Image.new("L", (3, 2)).save(photo)
    Image.new("L", (300, 200)).save(huge)
    broken.write_bytes(photo.read_bytes()[:40])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(infer, "__file__", str(tmp_path / "infer.py"))
    before = {*tmp_path.iterdir(), tmp_path / "model.json"}

    def refuses(message: str, *argv: object) -> None:
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            infer.main()
        said = f"{stopped.value.code}\n{capsys.readouterr().err}"
        assert message in said and {*tmp_path.iterdir()} == before

    for runtime in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, runtime, None)
        (tmp_path / "model.json").write_text(json.dumps(about | {"runtime": runtime}))
        refuses(f"{runtime} is not installed: pip install {runtime}", photo)
    run = (lambda x: [x.reshape(1, 6)[:, :2]], about)
    monkeypatch.setattr(infer, "open_model", lambda *_: run)
    refuses(f"{huge} cannot be read: Image size (60000 pixels) exceeds limit", huge)
    refuses(f"{broken} cannot be read", broken)
    refuses(f"{tmp_path / 'no.png'} cannot be read", tmp_path / "no.png")
    refuses("--top must be at least 1, got 0", photo, "--top", 0)
    refuses("--threads must be at least 0, got -1", photo, "--threads", -1)
    for option in ("--json", "--npy", "--npz"):
        for place in (tmp_path / "none" / "file", tmp_path):
            refuses(f"{place} cannot be written to", photo, option, place)


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
@pytest.mark.parametrize("method", ["tome(r=4)", "pitome(keep=0.8)"])
def test_eight_bits_of_a_fixed_batch_where_tokens_merge(method: str, tmp_path: Path) -> None:
    needs("openvino")
    in_its_own_process("check_a_fixed_batch_in_eight_bits", method, tmp_path)


def check_a_fixed_batch_in_eight_bits(method: str, folder: Path) -> None:
    found = foveate.export(
        with_method(method),
        folder,
        format="openvino",
        int8=True,
        calibrate=images(8),
        batch=4,
        check=True,
        rounds=0,
    )
    assert found.tokens[1] < found.tokens[0]
    assert found.check is not None and found.check.passed and found.check.error < 0.5


@pytest.mark.parametrize(
    ("method", "products"),
    [
        ("tome(r=4)", 2),  # of keys, in each of both blocks
        ("pitome(keep=0.8)", 2),
        (METHOD, 1),  # of the class token's query and all keys
        ("random(keep=0.7, blocks=[1])", 0),
    ],
)
def test_products_that_tokens_are_chosen_by(method: str, products: int) -> None:
    captured = graph.capture(with_method(method))
    assert len(captured.deciding) == products
    nodes = {node.name: node for node in captured.program.graph.nodes}
    assert all("matmul" in str(nodes[name].target) for name in captured.deciding)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "method",
    ["tome(r=4)", METHOD, "dynamicvit(keep=0.7, blocks=[1])", "spvit(keep=0.7, blocks=[1])"],
)
def test_tokens_are_chosen_in_float32(format: str, method: str, tmp_path: Path) -> None:
    needs(format)
    model = with_method(method)
    made = foveate.export(model, tmp_path, format=format, int8=True, calibrate=images(8))
    read = read_by_onnx if format == "onnx" else read_by_openvino
    feeding = read(made.file)
    rounded = {name for name, kinds in feeding.items() if ROUNDING & kinds}
    with graph.fixed(model):
        deciding = graph.capture(model).deciding
    deciding = [name for name in deciding if not name.startswith("add")]  # sums have other names
    assert "linear" in rounded  # of the backbone
    assert deciding and {*deciding} <= {*feeding} and rounded.isdisjoint(deciding)


ROUNDING = {"DequantizeLinear", "FakeQuantize"}


def read_by_onnx(file: Path) -> dict[str, set[str]]:
    """Return the kinds of operations that each value is computed from."""
    import onnx

    nodes = onnx.load(str(file)).graph.node
    kind = {name: node.op_type for node in nodes for name in node.output}
    return {
        name: {kind.get(source, "") for source in node.input}
        for node in nodes
        for name in node.output
    }


def read_by_openvino(file: Path) -> dict[str, set[str]]:
    """As ``read_by_onnx``, with those that a product is computed from, to which a bias is added."""
    import openvino

    def sources(node: openvino.Node) -> list[openvino.Node]:
        return [port.get_source_output().get_node() for port in node.inputs()]

    found = {}
    for node in openvino.Core().read_model(str(file)).get_ops():
        near = sources(node)
        near += [far for one in near if one.get_type_name() == "MatMul" for far in sources(one)]
        for output in node.outputs():
            for name in output.get_names():
                found[name] = {one.get_type_name() for one in near}
    return found


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


@pytest.mark.parametrize("flags", ["fpu sse4_2 avx2", "fpu avx2 avx512_vnni", "fp asimddp", ""])
def test_a_processor_without_products_in_eight_bits_is_named(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.machine._cpuinfo", lambda: f"flags : {flags}" if flags else "")
    monkeypatch.setattr(make, "_check_asked", lambda *_: None)
    monkeypatch.setattr("foveate.exports.pt2.quantise", lambda *_: None, raising=False)
    found = foveate.export(tiny(), tmp_path, format="pt2", int8=True, calibrate=images(2))
    said = [note for note in found.notes if "lacks instructions for 8-bit products" in note]
    assert len(said) == (flags == "fpu sse4_2 avx2")
    assert all(note in (tmp_path / "README.md").read_text(encoding="utf-8") for note in said)


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


def test_a_fixed_batch_is_filled_however_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = foveate.export(
        tiny(), tmp_path, format="pt2", batch=70, check=True, images=images(80), rounds=0
    )
    assert found.check is not None and found.check.images == 70
    assert len(for_check(found.about, None, 70)[0]) == 70

    def never(*_: object) -> None:
        raise AssertionError("the images are counted before the work")

    monkeypatch.setattr("foveate.exports.make.capture", never)
    with pytest.raises(ValueError, match="batches of 70 need at least 70 images to compare, got 6"):
        foveate.export(tiny(), tmp_path, format="pt2", batch=70, check=True, images=images(6))


def test_a_new_export_takes_the_place_of_the_former(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "model.yaml"):
        (tmp_path / name).write_text("x" * 1000)
    (tmp_path / "model.json").write_text('{"file": "model.onnx"}')
    found = foveate.export(tiny(), tmp_path, format="pt2")
    names = ["README.md", "infer.py", "model.json", "model.pt2", "model.yaml"]  # not an export's
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert found.size == found.file.stat().st_size


# Checks that fail --------------------------------------------------------------------------------


def test_a_file_that_answers_otherwise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has other weights than the model it is compared with."""
    other = foveate.apply(randomise(tiny(), seed=7), METHOD).eval()
    captured = graph.capture(other)
    monkeypatch.setattr("foveate.exports.make.capture", lambda *_, **__: captured)
    found = foveate.export(with_method(), tmp_path, format="pt2", check=True, rounds=0)
    assert found.check is not None and not found.check.passed
    assert found.check.beyond == found.check.images == 64 and found.check.error > 0.1
    assert "differ by more than 1e-04: 64" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_outputs_that_are_not_numbers_fail(wrong: float, int8: bool) -> None:
    model, captured = tiny(), graph.capture(tiny())

    def ask(pixels: np.ndarray) -> list[np.ndarray]:
        found = logits(model, torch.from_numpy(pixels)).numpy()
        found[1:3, 4] = wrong
        return [found]

    found = compare(model, ask, images(8), "drawn", graph=captured, int8=int8)
    assert not found.passed and found.broken == 2
    assert "outputs that are not finite numbers: 2" in "\n".join(found.lines())


@pytest.mark.parametrize("by_image", [False, True])
def test_layers_may_see_the_tokens_of_each_image(by_image: bool) -> None:
    """Runtimes fuse fewer operations in 8 bits between layers that see flat tokens."""
    kinds = (torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default)
    model = with_method()
    captured = graph.capture(model, by_image=by_image)
    nodes = [node for node in captured.program.graph.nodes if node.target in kinds]
    inside, after = nodes[:12], nodes[12:]  # two norms and four linears in each of two blocks
    assert {node.meta["val"].ndim for node in inside} == {3 if by_image else 2} and len(after) == 2
    if by_image:
        seen = [node.args[0].meta["val"].shape[1] for node in inside]
        assert seen == [37] * 9 + [28] * 3  # EViT drops between attention and the feed forward
    assert captured.tokens == TOKENS and not model.by_image
    photos = images(3)
    found = captured.program.module()(photos)
    torch.testing.assert_close(found, logits(model, photos), rtol=1e-4, atol=1e-5)


def test_a_file_that_runs_dense_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = graph.capture(tiny())
    assert captured.tokens == (37, 37)
    mixed = graph.Graph(**{**vars(captured), "tokens": TOKENS})
    monkeypatch.setattr("foveate.exports.make.capture", lambda *_, **__: mixed)
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


@pytest.mark.parametrize("method", [True, False])
def test_other_formats_are_timed_in_the_same_run(method: bool, tmp_path: Path) -> None:
    model = with_method() if method else vit()
    found = foveate.export(
        model, tmp_path, format="pt2", check=True, beside=["onnx"], rounds=2, threads=1, batch=2
    )
    assert found.check is not None and found.check.passed and found.check.batch == 2
    names = [speed.name for speed in found.check.speeds]
    own = [METHOD, "dense, torch", f"{METHOD}, torch, exported"]
    own = own if method else ["dense, torch, exported"]
    also = ["dense, onnxruntime", *[f"{METHOD}, onnxruntime"] * method]
    assert names == ["dense", "dense again", *own, *also]
    assert "onnxruntime" in (tmp_path / "README.md").read_text()
    assert not [*tmp_path.glob("*.onnx")]  # made for the timing alone


def test_a_format_beside_that_runs_dense_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.exports.onnx.tokens", lambda *_: (37, 37))
    with pytest.raises(ValueError, match="the method has no effect in this file"):
        foveate.export(with_method(), tmp_path, format="pt2", check=True, beside=["onnx"], rounds=1)


@pytest.mark.parametrize(
    ("beside", "how", "message"),
    [
        (["onnx"], {}, "beside names formats to time"),
        (["onnx"], {"check": True, "rounds": 0}, "beside names formats to time"),
        (["pt2"], {"check": True}, "beside names pt2, which is timed already"),
        (["onnx", "onnx"], {"check": True}, "beside names onnx, which is timed already"),
        (["onxx"], {"check": True}, "beside must be one of 'onnx', 'openvino', 'pt2'"),
    ],
)
def test_formats_that_cannot_stand_beside(
    beside: list[str], how: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        foveate.export(vit(), tmp_path / "out", format="pt2", beside=beside, **how)
    assert not (tmp_path / "out").exists()


# What cannot be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of"),
        (
            {"format": "pt2", "int8": True},
            "int8 is for onnx and openvino: torch.export cannot capture",
        ),
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


def test_a_version_of_operators_that_is_too_new(tmp_path: Path) -> None:
    """What was exported before stays."""
    needs("onnx")
    (tmp_path / "model.onnx").write_text("former")
    with pytest.raises(ValueError, match="opset 99 is newer than torch can write"):
        foveate.export(tiny(), tmp_path, opset=99)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "former"


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
        (["demo", "out", "--beside", "onnx"], "--beside names formats to time"),
        (["demo", "out", "--batch", "many"], "--batch must be dynamic or a number from 1"),
        (["demo", "out", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words]) == 2
    assert message in capsys.readouterr().err
