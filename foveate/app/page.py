"""Lay out the page, three tabs, with gradio, and serve it.

The page works without a network: gradio's statistics are off, its fonts are those of the reader's
system, and the page's policy forbids the browser to ask other servers for anything. Nothing is
shared, no path is served, and an image is read only from the folder for uploads.
"""

from __future__ import annotations

import functools
import html
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.app import markup
from foveate.app.find import find
from foveate.app.look import MOST_METHODS, MOST_ROUNDS, Look, look
from foveate.app.models import Models
from foveate.app.photographs import example, read_upload, scene
from foveate.app.places import Places
from foveate.app.reports import report
from foveate.convert import SHIPPED
from foveate.registry import list_methods

__all__ = ["Page", "is_local", "running"]

_log = logging.getLogger(__name__)

_LOCAL = ("127.0.0.1", "localhost")
_PREVIEW = 768  # longer side, in pixels, of an image as the page shows it
_SESSIONS, _SECONDS = 16, 3600  # visitors whose photographs are kept, and for how long
_SHOWN = 20  # seconds that an error stays on the page, unless it is closed
_WAITING = 16  # clicks that wait for their turn
# What the browser may load for the page. Gradio's own scripts and styles stand in its HTML.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'"
)
_INTRO = (
    "# foveate\nSee which patches a model keeps, merges or brings back, what it then answers, and "
    "what that costs."
)
_METHODS = (
    f"Choose at most {MOST_METHODS}; type options as in evit(keep=0.5). Leave empty to run the "
    "model's own method."
)
_METHOD = "For a model without one, such as evit(keep=0.7). Leave empty to run the model as it is."
_RANDOM = "For a timm model. Without this, its weights are fetched, unless they are here already."
_AMOUNT = (
    "Leave empty for each method's own rate. A rate of 0.7 keeps that share; for tome, 8 merges 8 "
    "tokens in each block. A budget is 60%, 2.9 GMACs, 1.5x faster or 12 ms, for example."
)
# Clicks that compute run one at a time, for all visitors. Clicks that only draw do not wait.
_ALONE = {"concurrency_limit": 1, "concurrency_id": "computing", "api_visibility": "private"}
_QUICK = {"concurrency_limit": 4, "api_visibility": "private"}
_HINT = "<p class='fv-note'>{}</p>"


@dataclass(frozen=True)
class Page:
    """The page, and what it may do.

    Attributes:
        places: what may be opened.
        device: where models run.
        megabytes: size of the largest file that may be uploaded.
    """

    places: Places
    device: str = "cpu"
    megabytes: float = 20.0

    def blocks(self, uploads: Path) -> Any:
        """Lay out the page as ``gradio.Blocks``; it reads photographs only from ``uploads``."""
        gr = _gradio()
        models = Models(self.places, self.device)
        with gr.Blocks(
            title="foveate", analytics_enabled=False, delete_cache=(_SECONDS // 4, _SECONDS)
        ) as page:
            gr.Markdown(_INTRO)
            with gr.Tab("Photograph"):
                self._photograph(gr, models, uploads)
            with gr.Tab("Detection"):
                self._dense(gr, models, uploads)
            with gr.Tab("Runs"):
                self._runs(gr)
        page.queue(max_size=_WAITING, default_concurrency_limit=1)
        return page

    def _photograph(self, gr: Any, models: Models, uploads: Path) -> None:
        seen = gr.State(None, time_to_live=_SECONDS)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = self._image(gr, uploads, example, "Take an example garment")
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    model = gr.Dropdown(
                        self._models(dense=False),
                        value="demo",
                        label="Model",
                        info=self._where("name of timm, or a path"),
                        allow_custom_value=True,
                        min_width=240,
                    )
                    methods = gr.Dropdown(
                        list_methods(),
                        value=["evit", "tome(r=3)"],
                        label="Methods",
                        info=_METHODS,
                        multiselect=True,
                        allow_custom_value=True,
                        min_width=240,
                    )
                with gr.Row():
                    amount = gr.Textbox(
                        label="Rate or budget", info=_AMOUNT, min_width=240, max_length=100
                    )
                    rounds = gr.Slider(
                        0,
                        MOST_ROUNDS,
                        value=10,
                        step=1,
                        label="Timed rounds",
                        info="0 times nothing; numbers to publish need 30 on an idle machine.",
                        min_width=240,
                    )
                untrained = gr.Checkbox(
                    label="Random weights",
                    info=_RANDOM,
                )
                go = gr.Button("Look", variant="primary")
        block = gr.Slider(
            0,
            11,
            value=11,
            step=1,
            label="Block",
            interactive=True,
            visible=False,
            elem_id="block",
        )
        walk = gr.HTML(
            _HINT.format("Drop a photograph or take an example, then press Look."), elem_id="walk"
        )
        numbers, answers = gr.HTML(elem_id="numbers"), gr.HTML(elem_id="answers")

        bar = gr.Progress()

        def run(
            image: Any,
            name: str,
            chosen: list[str],
            how: str,
            times: float,
            new: bool,
            progress: Any = bar,
        ) -> Any:
            picture = _needed(image)
            progress(0.0, desc="opening the model")
            opened = models.open(name or "", untrained=new)
            progress(0.0, desc="looking")
            told = _told(progress, "timing, round")
            found = look(opened, picture, chosen or [], how or "", int(times), told)
            last = found.steps - 1
            slider = gr.Slider(0, last, value=last, visible=True)
            return (
                found,
                slider,
                markup.walk(found, last),
                markup.numbers(found),
                markup.answers(found),
            )

        def show(found: Look | None, number: float) -> str:
            return "" if found is None else markup.walk(found, int(number))

        go.click(
            said(run),
            [photo, model, methods, amount, rounds, untrained],
            [seen, block, walk, numbers, answers],
            show_progress_on=walk,
            **_ALONE,
        )
        block.input(
            said(show),
            [seen, block],
            walk,
            **_QUICK,
            show_progress="hidden",
            trigger_mode="always_last",
        )

    def _dense(self, gr: Any, models: Models, uploads: Path) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = self._image(gr, uploads, scene, "Take an example scene")
            with gr.Column(scale=2, min_width=280):
                model = gr.Dropdown(
                    self._models(dense=True),
                    value="demo_detector",
                    label="Detector or segmenter",
                    info=self._where("path"),
                    allow_custom_value=True,
                )
                with gr.Row():
                    method = gr.Textbox(
                        label="Method",
                        info=_METHOD,
                        min_width=240,
                        max_length=200,
                    )
                    least = gr.Slider(
                        0,
                        1,
                        value=0.5,
                        step=0.05,
                        label="Least score",
                        info="Objects below it are not shown.",
                        min_width=240,
                    )
                rounds = gr.Slider(
                    0, MOST_ROUNDS, value=10, step=1, label="Timed rounds", info="0 times nothing."
                )
                go = gr.Button("Find", variant="primary")
        seen = gr.HTML(
            _HINT.format("Drop a photograph or take an example, then press Find."), elem_id="found"
        )

        bar = gr.Progress()

        def run(
            image: Any,
            name: str,
            text: str,
            score: float,
            times: float,
            progress: Any = bar,
        ) -> str:
            picture = _needed(image)
            progress(0.0, desc="opening the model")
            told = _told(progress, "timing, round")
            return markup.found(
                find(models.dense(name or ""), picture, text or "", score, int(times), told)
            )

        go.click(said(run), [photo, model, method, least, rounds], seen, **_ALONE)

    def _runs(self, gr: Any) -> None:
        with gr.Row():
            folder = gr.Dropdown(
                self.places.reports(),
                value=None,
                label="Folder of a run, a comparison, a pipeline or an evaluation",
                info=self._where("path"),
                allow_custom_value=True,
                scale=4,
                min_width=280,
            )
            again = gr.Button("Search again", scale=1, min_width=140, size="sm")
        seen = gr.HTML(elem_id="report")

        def run(given: str | None) -> str:
            return markup.report(report(self.places.inside(given))) if given else ""

        def search() -> Any:
            return gr.Dropdown(self.places.reports())

        folder.change(said(run), folder, seen, **_ALONE)
        again.click(said(search), None, folder, **_QUICK)

    def _image(
        self, gr: Any, uploads: Path, examples: Callable[[int], tuple[str, Image.Image]], words: str
    ) -> Any:
        """Lay out a place to drop a photograph; return the state that holds it in full."""
        kept, number = gr.State(None, time_to_live=_SECONDS), gr.State(0)
        shown = gr.Image(
            label=f"Photograph, up to {self.megabytes:g} MB",
            sources=["upload", "clipboard"],
            type="pil",
            height=260,
            buttons=[],
        )
        another = gr.Button(words, size="sm")

        def take(given: Mapping[str, Any] | None) -> Any:
            if given is None:
                return None, None
            image = read_upload(_uploaded(given, uploads), self.megabytes)
            return _preview(image), image

        def give(count: int) -> Any:
            name, image = examples(count)
            return gr.Image(_preview(image), label=name), image, count + 1

        # With preprocess=False gradio does not read the file; only ``read_upload`` checks it.
        taken = shown.upload(said(take), shown, [shown, kept], preprocess=False, **_ALONE)
        taken.failure(lambda: (None, None), None, [shown, kept], **_QUICK)
        shown.clear(said(lambda: None), None, kept, **_QUICK)
        another.click(said(give), number, [shown, kept, number], **_QUICK)
        return kept

    def _models(self, *, dense: bool) -> list[tuple[str, str]]:
        shipped = [(name, name) for name, kind in SHIPPED.items() if (kind == "detector") == dense]
        return [*shipped, *self.places.models(dense=dense)]

    def _where(self, typed: str) -> str:
        roots = ", ".join(root.name for root in self.places.roots)
        return f"Or type a {typed} in {roots}." if roots else "foveate app --folders opens more."


def said(work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its errors become sentences on the page."""

    @functools.wraps(work)
    def worked(*args: Any, **options: Any) -> Any:
        try:
            return work(*args, **options)
        except (ValueError, OSError) as error:
            sentence = str(error)
        except Exception as error:  # a bug of ours: the terminal shows all of it
            _log.exception("the page met an unexpected error")
            sentence = f"{type(error).__name__}: see the terminal that runs foveate app"
        gradio: Any = _gradio()
        raise gradio.Error(html.escape(sentence), duration=_SHOWN, print_exception=False)

    return worked


def is_local(host: str) -> bool:
    """Tell whether only this machine can reach a server at that address."""
    return host in _LOCAL


@contextmanager
def running(page: Page, host: str = _LOCAL[0], port: int = 7860) -> Iterator[str]:
    """Serve a page in threads of this process until the block ends; yield its address.

    Args:
        page: what to serve.
        host: address to listen at; "0.0.0.0" means all addresses of this machine.
        port: port to listen at.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must lie in 1..65535, got {port}")
    gr = _gradio()
    with tempfile.TemporaryDirectory(prefix="foveate-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page.blocks(Path(folder))
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=int(page.megabytes * 2**20),
                allowed_paths=[],
                app_kwargs={"middleware": _middleware(host), "docs_url": None, "redoc_url": None},
                state_session_capacity=_SESSIONS,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                theme=gr.themes.Default(
                    primary_hue="teal",
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
                css_paths=str(Path(__file__).with_name("page.css")),
            )
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host}, port {port}: the port is in use, or the address is not "
                "one of this machine; choose others with --port and --host"
            ) from error
        try:
            yield str(address)
        finally:
            blocks.close(verbose=False)


def _gradio() -> Any:
    """Import gradio with its usage statistics turned off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'foveate[app]'") from None


def _middleware(host: str) -> list[Any]:
    """Make a local server answer only to local names, and add the policy to every answer."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = [*_LOCAL] if is_local(host) else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Policy)]


class _Policy:
    """Adds the page's policy to every answer; an ASGI application around another."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", _POLICY.encode())]
                own.append((b"referrer-policy", b"no-referrer"))
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, with_policy)


def _uploaded(given: Mapping[str, Any], uploads: Path) -> Path:
    """Return the path of an uploaded photograph; ValueError if it lies elsewhere."""
    path = Path(str(given.get("path"))).resolve()
    if not path.is_relative_to(uploads.resolve()):
        raise ValueError("the photograph was not uploaded to this page")
    return path


def _preview(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest < _PREVIEW:  # enlarge by a whole factor, to keep pixels sharp
        factor = max(1, _PREVIEW // (2 * longest))
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((_PREVIEW, _PREVIEW))
    return small


def _needed(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("there is no photograph yet: drop one, or take an example")
    return image


def _told(progress: Any, words: str) -> Callable[[int, int], None]:
    """Return a function that shows in gradio's bar how many rounds are done."""
    return lambda done, of: progress((done, of), desc=words)
