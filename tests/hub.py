"""A server that answers as the Hub does: repositories are made, filled by commits, listed and downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "secret" * 6
_LARGE = 10_000  # bytes from which on a file goes to the store of large files, as safetensors do


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: int = 1

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """What the server holds.

    `refuse`: the status of every request to write, in place of an answer. `stuck`: called at each large file.
    """

    url: str = ""
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # paths of the files that were asked for
    large: dict[str, bytes] = field(default_factory=dict)
    refuse: int = 0
    stuck: Callable[[], object] = bool

    def environ(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that knows this Hub alone, with a cache of its own."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return {
            **keep, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            repository = getattr(self.hub, found[1]).get(found[2])
            if repository is None:
                return self._missing()
            siblings = [{"rfilename": name} for name in repository.files]
            return self._json({"id": found[2], "sha": repository.sha, "siblings": siblings})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+", path):
            files = getattr(self.hub, found[1])[found[2]].files
            return self._json([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()])
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.hub.asked.append(path)
            repository = (self.hub.datasets if found[1] else self.hub.models).get(found[2])
            if repository is None or found[3] not in repository.files:
                return self._missing("EntryNotFound" if repository else "RepoNotFound")
            content = repository.files[found[3]]
            etag = hashlib.sha1(content).hexdigest()
            return self._answer(200, content, {"X-Repo-Commit": repository.sha, "ETag": f'"{etag}"'})
        return self._missing()

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.hub.stuck()
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, b"", {})

    def do_POST(self) -> None:  # noqa: PLR0911
        path, body = self.path, self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.hub.refuse or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "refused"}, self.hub.refuse or 401)
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            there = name in self.hub.models
            self.hub.models.setdefault(name, Repository())
            return self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > _LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines() if line])
        return self._missing()

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.models[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _missing(self, what: str = "RepoNotFound") -> None:
        self._answer(404, b"{}", {"X-Error-Code": what})

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
