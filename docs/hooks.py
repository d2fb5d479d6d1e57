"""Adds to the site what is made and not written: methods' pages, plots, and files at the root."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from method_pages import all_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pictures import machine, speed_plot, speed_table

import foveate

ROOT = Path(__file__).parents[1]
BORROWED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measurements.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name every method in the navigation."""
    pages = ["methods/index.md", *(f"methods/{name}.md" for name in foveate.list_methods())]
    config.nav = [
        {"Methods": pages} if item == {"Methods": "methods/"} else item for item in config.nav
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that exist only in the site."""
    made = dict(all_pages())
    made |= {page: borrowed(source) for source, page in BORROWED.items()}
    made |= {f"assets/speed-{name}.svg": speed_plot(name == "dark") for name in ("light", "dark")}
    for address, content in made.items():
        files.append(File.generated(config, address, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in what the result files say."""
    markdown = markdown.replace("<!-- speed table -->", speed_table())
    return markdown.replace("<!-- speed machine -->", machine())


def borrowed(source: str) -> str:
    """A file from elsewhere in the repository as a page, its links turned to the site's."""
    folder = posixpath.dirname(source)

    def turned(match: re.Match[str]) -> str:
        target, mark, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(folder, target))
        return f"]({BORROWED.get(path, path.removeprefix('docs/'))}{mark}{anchor})"

    text = (ROOT / source).read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", turned, text)
