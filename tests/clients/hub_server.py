"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub asks over HTTP, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class HubServer:
    """Repositories in memory, `kind/owner/name` -> path -> content. `fails` makes every commit a server error."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    """A commit waits until it is set."""
    fails: bool = False

    def __enter__(self) -> HubServer:
        self.gate.set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._http.server_port}"


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        path = self._path()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('type') or 'model'}s/{wanted.get('organization') or 'me'}/{wanted['name']}"
            visibility = wanted.get("visibility")
            self.hub.private[name] = bool(wanted.get("private")) or visibility == "private"
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {})
            self._answer({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409 if exists else 200)
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in path:
            self.hub.gate.wait(20)
            if self.hub.fails:
                self._answer({"error": "the disk of the hub is full"}, 507)
                return
            repository = self.hub.repositories[path.removeprefix("/api/").partition("/commit/")[0]]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self.hub.url}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self._answer({}, 404)

    def do_GET(self) -> None:
        path = self._path()
        if "/tree/" in path:
            repository = self.hub.repositories.get(path.removeprefix("/api/").partition("/tree/")[0])
            if repository is None:
                self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in repository.items()]
            self._answer(entries)
        elif "/resolve/" in path:
            self._file(path, send=True)
        else:
            self._answer({}, 404)

    def do_HEAD(self) -> None:
        self._file(self._path(), send=False)

    def _file(self, path: str, send: bool) -> None:
        repository, _, rest = path.strip("/").partition("/resolve/")
        kind = repository if repository.count("/") == 2 else f"models/{repository}"
        content = self.hub.repositories[kind][rest.partition("/")[2]]
        self.send_response(200)
        for name, value in {"ETag": _oid(content), "X-Repo-Commit": COMMIT, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if send:
            self.wfile.write(content)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization") or "")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode("utf-8")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing: the calls are kept."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
