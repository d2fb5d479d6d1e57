"""A hub on 127.0.0.1: as much of its HTTP interface as pushing and loading models needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_anna"
FILES = dict[str, bytes]


@dataclass
class Repository:
    """Commits with all of their files, and where branches and pull requests are."""

    private: bool = False
    gated: bool = False
    commits: dict[str, FILES] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: FILES, head: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.messages)}{head}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.heads[head] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> FILES:
        return self.commits[self.heads.get(revision, revision)]


class Hub:
    """What the server knows, and the requests that it got."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def add(self, name: str, files: FILES, **facts: bool) -> Repository:
        made = self.repositories[name] = Repository(**facts)
        made.commit(files)
        return made

    def fetched(self) -> list[str]:
        """Return the names of the files that were downloaded."""
        return [path.rsplit("/", 1)[1] for path in self.requests if path.startswith("GET /anna/")]


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self._route(path, body)
        except _Refused as refused:
            status, code, *url = refused.args
            body = json.dumps({"url": url[0]} if url else {}).encode()
            self._send(body, status, {"X-Error-Code": code} if code else {})

    def _route(self, path: str, body: bytes) -> None:
        routes = {
            r"/api/validate-yaml": self._validate,
            r"/api/repos/create": self._create,
            r"/api/models/(\w+/[\w.-]+)/branch/(.+)": self._branch,
            r"/api/models/(\w+/[\w.-]+)/preupload/(.+)": self._preupload,
            r"/api/models/(\w+/[\w.-]+)/commit/(.+)": self._commit,
            r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)/?": self._tree,
            r"/api/models/(\w+/[\w.-]+)(?:/revision/(.+))?": self._info,
            r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)": self._file,
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, path):
                answer(*found.groups(), **({"body": body} if self.command == "POST" else {}))
                return
        raise _Refused(404, "")

    def _send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        given = {"Content-Length": str(len(content)), "X-Request-Id": "1", **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    # Who may do what -----------------------------------------------------------------------------

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, revision: str | None = None) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known()):
            raise _Refused(401, "RepoNotFound")
        if found.gated and not self._known():
            raise _Refused(403, "GatedRepo")
        if revision is not None and revision not in {*found.heads, *found.commits}:
            raise _Refused(404, "RevisionNotFound")
        return found

    def _writer(self) -> None:
        if not self._known():
            raise _Refused(401, "")

    # Reading -------------------------------------------------------------------------------------

    def _info(self, name: str, revision: str | None = None) -> None:
        revision = revision or "main"
        found = self._repository(name, revision)
        sha = found.heads.get(revision, revision)
        names = [{"rfilename": file} for file in found.files(sha)]
        self._json({"id": name, "sha": sha, "private": found.private, "siblings": names})

    def _tree(self, name: str, revision: str) -> None:
        files = self._repository(name, revision).files(revision)
        self._json(
            [
                {"type": "file", "path": path, "size": len(text), "oid": _oid(text)}
                for path, text in files.items()
            ]
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name, revision)
        if path not in found.files(revision):
            raise _Refused(404, "EntryNotFound")
        text = found.files(revision)[path]
        sha = found.heads.get(revision, revision)
        self._send(text, headers={"ETag": f'"{_oid(text)}"', "X-Repo-Commit": sha})

    # Writing -------------------------------------------------------------------------------------

    def _validate(self, body: bytes) -> None:
        assert "content" in json.loads(body)
        self._json({"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        self._writer()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise _Refused(409, "", f"{self.hub.endpoint}/{name}")
        made = self.hub.repositories[name] = Repository()
        made.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made.commit({})
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _branch(self, name: str, branch: str, body: bytes) -> None:
        self._writer()
        found = self._repository(name)
        if branch in found.heads:
            raise _Refused(409, "")
        found.heads[branch] = found.heads["main"]
        self._json({})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        self._writer()
        self._repository(name, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
        self._json({"files": modes})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        self._writer()
        found = self._repository(name, revision)
        files, message, request = dict(found.files(revision)), "", "create_pr=1" in self.path
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        head = f"refs/pr/{len(found.heads)}" if request else revision
        sha = found.commit(files, head, message)
        address = f"{self.hub.endpoint}/{name}"
        self._json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{address}/commit/{sha}",
                "hookOutput": "",
                **({"pullRequestUrl": f"{address}/discussions/1"} if request else {}),
            }
        )


def _oid(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub, and let huggingface_hub take it for its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
