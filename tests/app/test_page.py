"""The page and its server: what it serves, what it refuses, and a visit with a real browser."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from PIL import Image

from foveate.app.page import Page, _uploaded, is_local, running, said
from foveate.app.places import Places
from foveate.cli import main

# Looked for and not imported: gradio loads for seconds, in every worker that collects tests.
pytestmark = pytest.mark.skipif(
    find_spec("gradio") is None, reason="the page needs gradio: pip install 'foveate[app]'"
)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page for all tests of this file."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    (folder / "one" / "recipe.yaml").write_text("job: finetune\n")
    with running(Page(Places([folder]), megabytes=1), port=free_port()) as found:
        yield found


def answer(url: str, headers: dict[str, str] | None = None) -> tuple[int, str, Any]:
    """Ask past any proxy; return status, text and headers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers or {}), timeout=60) as found:
            return found.status, found.read().decode(), found.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_no_file_is_served(address: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    inside = Path(__file__).parents[2] / "foveate" / "app" / "page.css"
    for path in ("/etc/passwd", str(tmp_path / "secret.txt"), str(inside), "README.md"):
        for route in ("gradio_api/file=", "file="):
            status, text, _ = answer(f"{address}{route}{path}")
            assert status in (403, 404) and "secret" not in text.replace(path, "")
    status, _, _ = answer(f"{address}gradio_api/file=http://127.0.0.1/")
    assert status == 403


def test_what_the_server_tells(address: str) -> None:
    status, text, headers = answer(address)
    assert status == 200 and "fonts.googleapis" not in text
    assert "default-src 'self'" in headers["content-security-policy"]
    assert answer(address, {"Host": "elsewhere.example"})[0] == 400
    config = json.loads(answer(f"{address}config")[1])
    assert config["analytics_enabled"] is False and config["max_file_size"] == 2**20
    named = json.loads(answer(f"{address}gradio_api/info")[1])
    assert named == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for route in ("docs", "redoc", "monitoring"):
        assert answer(address + route)[0] in (403, 404)


def test_only_uploads_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert _uploaded({"path": str(tmp_path / "mine")}, tmp_path) == tmp_path / "mine"
    for path in ("/etc/passwd", str(tmp_path / "link"), f"{tmp_path}/../x", "mine", None):
        with pytest.raises(ValueError, match="was not uploaded to this page"):
            _uploaded({"path": path}, tmp_path)


def test_errors_are_sentences(caplog: pytest.LogCaptureFixture) -> None:
    import gradio

    def foreseen() -> None:
        raise ValueError("keep must lie in (0, 1], got <2>")

    def unforeseen() -> None:
        raise KeyError("a fault of ours")

    with pytest.raises(gradio.Error) as error:
        said(foreseen)()
    assert error.value.message == "keep must lie in (0, 1], got &lt;2&gt;" and not caplog.records
    with pytest.raises(gradio.Error) as error:
        said(unforeseen)()
    assert error.value.message == "KeyError: see the terminal that runs foveate app"
    assert "a fault of ours" in str(caplog.records[0].exc_info)


def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.machine.tune_malloc", lambda device: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = str(taken.getsockname()[1])
        for words, sentence in (
            (["--port", "0"], "--port must lie in 1..65535, got 0"),
            (["--port", busy], f"cannot listen at 127.0.0.1, port {busy}: the port is in use"),
            (["--max-upload", "0"], "--max-upload must be above 0, got 0"),
            (["--max-upload", "nan"], "--max-upload must be above 0, got nan"),
            (["--folders", str(tmp_path / "gone")], "gone is not one"),
            (["--threads", "0"], "--threads must be at least 1"),
            (["--device", "tpu7"], "device must be auto, cpu, cuda"),
        ):
            assert main(["app", *words]) == 2
            said_there = capsys.readouterr().err
            assert sentence in said_there and "Traceback" not in said_there
    assert is_local("127.0.0.1") and is_local("localhost") and not is_local("0.0.0.0")


def test_a_host_that_others_reach_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.machine.tune_malloc", lambda device: None)
    monkeypatch.setattr("foveate.app.page.running", lambda page, host, port: nullcontext(host))
    monkeypatch.setattr("threading.Event.wait", interrupted)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        assert main(["app", "--host", host]) == 130
        said_there = capsys.readouterr().out
        assert f"open     {host}" in said_there and ("no password" in said_there) is warned


def photograph(path: Path) -> Path:
    rows, columns = np.mgrid[:90, :120]
    pixels = np.stack([2 * rows, columns, (rows * columns) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.slow
def test_a_visit(address: str, tmp_path: Path) -> None:
    """Upload, look, move the slider, find objects, open a run; nothing is asked elsewhere."""
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Look").click()
        page.get_by_text("there is no photograph yet").wait_for()

        upload = page.locator("input[type=file]").first
        (tmp_path / "empty.png").touch()
        upload.set_input_files(tmp_path / "empty.png")
        page.get_by_text("empty.png: not an image").wait_for()
        page.get_by_text("Click to Upload").first.wait_for()  # it was taken away again

        upload.set_input_files(photograph(tmp_path / "photo.png"))
        page.locator(".image-frame img").first.wait_for()
        page.get_by_label("Timed rounds").first.fill("1")
        page.get_by_role("button", name="Look").click()
        last = page.locator("#walk figure >> nth=1 >> img")
        last.wait_for()
        assert page.locator("#walk figure").count() == 3  # the input, evit and tome
        before = last.get_attribute("src")
        page.locator("#block input[type=range]").fill("1")
        page.get_by_text("block 1: 49 of 49 patches").first.wait_for()
        assert last.get_attribute("src") != before

        page.get_by_role("tab", name="Detection").click()
        page.get_by_role("button", name="Take an example scene").click()
        page.get_by_text("example: scene").wait_for()
        page.get_by_role("button", name="Find").click()
        page.locator("#found img").nth(1).wait_for()

        page.get_by_role("tab", name="Runs").click()
        page.get_by_label("Folder of a run").fill("/etc")
        page.keyboard.press("Enter")
        page.get_by_text("/etc is not in the folders that this page may open").wait_for()
        page.get_by_label("Folder of a run").fill("one")
        page.keyboard.press("Enter")
        page.get_by_text("This run has not finished").wait_for()
        assert "Traceback" not in page.content()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert len(asked) > 20 and not elsewhere
