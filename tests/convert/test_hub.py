"""Models on the Hugging Face hub, with huggingface_hub's own client and a hub on this machine."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from hub_server import TOKEN, Hub, serving
from safetensors.torch import save
from small import hf, randomise, vit
from timm.models import save_for_hf
from torch import Tensor, nn

import foveate
from foveate.cli import main
from foveate.convert import open_base
from foveate.convert.card import is_generated
from foveate.convert.hub import split_name
from foveate.core import ReducedViT
from foveate.train.models import make_model
from foveate.train.recipe import Model

FILES = {"README.md", "foveate.json", "foveate.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing on it, a cache with nothing in it, and Anna is logged in."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serving(monkeypatch) as found:
        yield found


@pytest.fixture
def signed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


def plain() -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "depth": 2, "num_classes": 5}
    return randomise(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def made(method: str = "evit(keep=0.5, blocks=[1])") -> ReducedViT:
    return foveate.apply(plain(), method)


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(pixels)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# There and back ----------------------------------------------------------------------------------


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub) -> None:
    model = made()
    address = foveate.push_to_hub(
        model, "anna/photos", private=True, license="mit", commit_message="first"
    )
    repository = hub.repositories["anna/photos"]
    assert address == f"{hub.endpoint}/anna/photos/commit/{repository.heads['main']}"
    assert set(repository.files()) == FILES
    assert repository.private and repository.messages[-1] == "first"
    card = repository.files()["README.md"].decode()
    assert is_generated(card) and "license: mit" in card and "\n# photos\n" in card
    assert 'foveate.load("hf-hub:anna/photos")' in card and "OWNER" not in card
    for again in (
        foveate.load("hf-hub:anna/photos"),
        foveate.from_pretrained("anna/photos"),
        open_base("hf-hub:anna/photos"),
    ):
        assert not again.training and torch.equal(answer(again), answer(model))


def test_only_files_on_the_list_are_uploaded(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    foveate.save(made(), folder, everything=True)
    for name in ("optimizer.pt", "events.out", "photo.jpg", "metrics.csv", "model.bin", "x.json"):
        (folder / name).write_bytes(b"private")
    (folder / "sub").mkdir()
    (folder / "sub" / "foveate.json").write_text("{}")
    foveate.push_to_hub(folder, "anna/photos")
    assert set(hub.repositories["anna/photos"].files()) == FILES


def test_only_files_on_the_list_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    foveate.save(made(), tmp_path / "mine", everything=True)
    bomb = pickle.dumps(print)
    more = {"pytorch_model.bin": bomb, "x.pkl": bomb, "code.py": b"1 / 0", "model.safetensors": b""}
    hub.add("anna/photos", {**files(tmp_path / "mine"), **more})
    foveate.load("hf-hub:anna/photos")
    assert set(hub.fetched()) == FILES


def test_a_revision_is_a_branch_a_commit_or_a_request(hub: Hub) -> None:
    foveate.push_to_hub(made("evit(keep=0.5, blocks=[1])"), "anna/photos")
    foveate.push_to_hub(made("tome(r=1)"), "anna/photos", revision="tome")
    request = foveate.push_to_hub(made("svit"), "anna/photos", create_pr=True)
    heads = hub.repositories["anna/photos"].heads
    assert request.endswith("/discussions/1") and len(heads) == 3
    for revision, method in (("tome", "tome"), (heads["tome"], "tome"), ("refs/pr/2", "svit")):
        assert foveate.from_pretrained("anna/photos", revision=revision).reducer.name == method
    assert foveate.load("hf-hub:anna/photos@tome").reducer.name == "tome"
    assert foveate.load("hf-hub:anna/photos").reducer.name == "evit"


def test_a_new_push_replaces_all_of_the_former(hub: Hub, tmp_path: Path) -> None:
    """A detector stood there, with its record."""
    before = {"dense.json": b"{}", "dense.safetensors": b"", "record.json": b"{}"}
    hub.add("anna/photos", {**before, "LICENSE": b"mine", "pictures/one.png": b""})
    foveate.push_to_hub(made(), "anna/photos")
    assert set(hub.repositories["anna/photos"].files()) == {*FILES, "LICENSE", "pictures/one.png"}


def test_dense_models_go_there_too(hub: Hub, tmp_path: Path) -> None:
    foveate.push_to_hub(open_base("demo_detector"), "anna/garments")
    assert {"dense.json", "dense.safetensors"} < set(hub.repositories["anna/garments"].files())
    repository = hub.repositories["anna/garments"]
    repository.commit({**repository.files(), "config.json": b"{}"})  # by which the hub counts
    assert foveate.load("hf-hub:anna/garments").reducer.name == "svit"


def test_the_method_alone_needs_its_backbone(hub: Hub, tmp_path: Path) -> None:
    foveate.save(made(), tmp_path / "small")
    foveate.push_to_hub(tmp_path / "small", "anna/small")
    assert torch.equal(answer(foveate.load("hf-hub:anna/small", plain())), answer(made()))
    with pytest.raises(ValueError, match="only the method's own parameters were saved"):
        foveate.load("hf-hub:anna/small")


# Cards -------------------------------------------------------------------------------------------


def test_a_card_written_on_the_hub_is_kept(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("anna/photos", {"README.md": b"# Written by Anna"})
    with caplog.at_level(logging.WARNING):
        foveate.push_to_hub(made(), "anna/photos")
    found = hub.repositories["anna/photos"].files()
    assert found["README.md"] == b"# Written by Anna" and set(found) == FILES
    assert "is kept" in caplog.text


def test_a_card_of_foveate_is_replaced_and_one_changed_here_is_uploaded(
    hub: Hub, tmp_path: Path
) -> None:
    repository = hub.add("anna/photos", {})
    foveate.push_to_hub(made(), "anna/photos")
    foveate.push_to_hub(made("tome(r=1)"), "anna/photos")
    assert "tome(r=1)" in repository.files()["README.md"].decode()
    foveate.save(made(), tmp_path, everything=True)
    own = (tmp_path / "README.md").read_text() + "\nTaken in my garden.\n"
    (tmp_path / "README.md").write_text(own)
    for _ in range(2):  # the one on the hub is changed too, the second time
        foveate.push_to_hub(tmp_path, "anna/photos")
        text = repository.files()["README.md"].decode()
        assert "in my garden" in text and "hf-hub:anna/photos" in text
    with pytest.raises(ValueError, match=r"README.md was changed by hand"):
        foveate.push_to_hub(tmp_path, "anna/photos", license="mit")


# Models of others --------------------------------------------------------------------------------


def test_plain_models_of_timm_keep_working(hub: Hub, tmp_path: Path) -> None:
    model = plain()
    save_for_hf(model, tmp_path / "timm", {"label_names": list("abcde")}, safe_serialization=True)
    hub.add("anna/plain", {**files(tmp_path / "timm"), "pytorch_model.bin": pickle.dumps(print)})
    found = open_base("hf-hub:anna/plain")
    assert type(found) is type(model) and torch.equal(answer(found), answer(model))
    assert foveate.backbones.class_names(found) == tuple("abcde")
    reduced = foveate.load("hf-hub:anna/plain", method="tome(r=1)")
    assert isinstance(reduced, ReducedViT)
    start = make_model(Model(start="hf-hub:anna/plain"), 5)  # as training opens it
    assert torch.equal(answer(start.eval()), answer(model))
    assert set(hub.fetched()) == {"config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="describes its model completely: leave image_size out"):
        foveate.load(tmp_path / "timm", image_size=64)


def test_models_of_transformers_load(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = randomise(hf("ViTForImageClassification", image_size=32)).eval()
    model.save_pretrained(tmp_path / "hf")
    hub.add("anna/hf", files(tmp_path / "hf"))
    found = foveate.load("hf-hub:anna/hf")
    assert torch.equal(answer(found).logits, answer(model).logits)


def test_pickles_are_never_loaded(hub: Hub, tmp_path: Path) -> None:
    save_for_hf(plain(), tmp_path / "timm", safe_serialization=False)
    assert (tmp_path / "timm" / "pytorch_model.bin").exists()
    hub.add("anna/old", files(tmp_path / "timm"))
    with pytest.raises(ValueError, match="has no model.safetensors"):
        foveate.load("hf-hub:anna/old")
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data.csv": b""}, "is not a model of foveate, timm or transformers"),
        ({"config.json": b'{"architecture": "megavit"}'}, "this timm .* lacks"),
        ({"config.json": b'{"architectures": ["LlamaForCausalLM"]}'}, "supported are ViT"),
        ({"config.json": b"["}, "not readable JSON"),
    ],
)
def test_what_cannot_be_used_is_said_before_its_weights_are_fetched(
    content: dict[str, bytes], message: str, hub: Hub
) -> None:
    weights = save({"a": torch.zeros(1)})
    hub.add("anna/other", {**content, "model.safetensors": weights, "model-00001.safetensors": b""})
    with pytest.raises(ValueError, match=rf"anna/other.*{message}"):
        foveate.load("hf-hub:anna/other")
    assert not {name for name in hub.fetched() if name.endswith("safetensors")}


def test_a_foreign_configuration_cannot_open_files(hub: Hub, tmp_path: Path) -> None:
    """timm reads a checkpoint from a path that the constructor's arguments name."""
    foveate.save(made(), tmp_path, everything=True)
    config = json.loads((tmp_path / "foveate.json").read_text())
    config["model"]["arguments"]["checkpoint_path"] = "/etc/passwd"
    hub.add("anna/bad", {**files(tmp_path), "foveate.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="arguments that load weights: checkpoint_path"):
        foveate.load("hf-hub:anna/bad")


# What can go wrong -------------------------------------------------------------------------------


def test_without_the_hub_the_cache_serves(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foveate.push_to_hub(made(), "anna/photos")
    foveate.from_pretrained("anna/photos", cache_dir=tmp_path / "own")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = len(hub.requests)
    for options in ({"local_files_only": True}, {}):
        found = foveate.from_pretrained("anna/photos", cache_dir=tmp_path / "own", **options)
        assert torch.equal(answer(found), answer(made()))
        with pytest.raises(ValueError, match="not wholly, in the cache, and the hub cannot be"):
            foveate.from_pretrained("anna/photos", cache_dir=tmp_path / "empty", **options)
    with pytest.raises(ValueError, match="the hub cannot be reached: .*refused"):
        foveate.push_to_hub(made(), "anna/photos")
    assert len(hub.requests) == asked


def test_what_the_hub_refuses_is_said_in_a_sentence(hub: Hub, signed_out: None) -> None:
    hub.add("anna/private", {}, private=True)
    hub.add("anna/gated", {}, gated=True)
    hub.add("anna/open", {})
    for name, message in (
        ("anna/private", "no repository anna/private that you may see"),
        ("anna/missing", "no repository anna/missing that you may see"),
        ("anna/gated", "anna/gated is gated: ask for access"),
        ("anna/open@v2", "anna/open on the hub has no revision 'v2'"),
    ):
        with pytest.raises(ValueError, match=message):
            foveate.load(f"hf-hub:{name}")
    with pytest.raises(ValueError, match="does not let you do that with anna/new: log in"):
        foveate.push_to_hub(made(), "anna/new")


@pytest.mark.parametrize(
    "name", ["photos", "hf-hub:photos", "a/b/c", "anna/", "anna/x@", "./out/x"]
)
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="OWNER/NAME"):
        foveate.from_pretrained(name)


def test_names_are_taken_apart() -> None:
    assert split_name("hf-hub:anna/vit-s.v1@refs/pr/2") == ("anna/vit-s.v1", "refs/pr/2")
    assert split_name("anna/photos") == ("anna/photos", None)


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    foveate.save(made(), tmp_path / "torn")
    (tmp_path / "torn" / "foveate.safetensors").write_bytes(b"torn")
    foveate.save(made(), tmp_path / "early")
    config = json.loads((tmp_path / "early" / "foveate.json").read_text())
    del config["about"]
    (tmp_path / "early" / "foveate.json").write_text(json.dumps(config))
    (tmp_path / "early" / "README.md").unlink()
    for model, message in (
        (vit(), "a VisionTransformer has no method: timm.models.push_to_hf_hub"),
        (tmp_path / "empty", "has neither foveate.json nor dense.json"),
        (tmp_path / "run", "is a plain model, which timm loads without foveate"),
        (tmp_path / "torn", "is damaged or not a safetensors file"),
        (tmp_path / "early", "was saved by an earlier foveate"),
    ):
        with pytest.raises(ValueError, match=message):
            foveate.push_to_hub(model, "anna/photos")
    with pytest.raises(ValueError, match="a pull request goes to main"):
        foveate.push_to_hub(made(), "anna/photos", revision="v2", create_pr=True)
    with pytest.raises(ValueError, match="give the branch as revision='v2'"):
        foveate.push_to_hub(made(), "anna/photos@v2")
    assert not hub.requests


# The command line --------------------------------------------------------------------------------


def test_the_command_pushes_a_folder_and_others_take_its_name(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foveate.save(made(), tmp_path / "mine", everything=True)
    words = ["push", str(tmp_path / "mine"), "anna/photos", "--license", "mit", "--private"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"/{name} (" in printed for name in FILES)
    assert f"pushed   {hub.endpoint}/anna/photos/commit/" in printed
    assert "foveate.load('hf-hub:anna/photos')" in printed
    assert hub.repositories["anna/photos"].private
    for more, line in (
        (["--revision", "half"], "foveate.load('hf-hub:anna/photos@half')\n"),
        (["--create-pr"], "foveate.load('hf-hub:anna/photos'), once the pull request is merged\n"),
    ):
        assert main([*words[:3], *more]) == 0
        assert line in capsys.readouterr().out
    assert main(["describe", "hf-hub:anna/photos"]) == 0
    assert "evit(keep=0.5, blocks=(1,)) on" in capsys.readouterr().out
    assert main(["push", str(tmp_path / "none"), "anna/photos"]) == 2
    assert "does not exist" in capsys.readouterr().err


# The documentation ------------------------------------------------------------------------------


def test_what_the_page_shows_of_the_hub_runs(hub: Hub, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "sharing.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    save_for_hf(plain(), tmp_path / "timm", safe_serialization=True)
    hub.add("anna/plain-vit", files(tmp_path / "timm"))
    names: dict[str, Any] = {"foveate": foveate, "model": made()}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["model"].reducer.name == "tome"
    assert hub.repositories["anna/photos-evit"].private
