"""A server that speaks as much of the Hugging Face Hub's protocol as its client uses to push and pull files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory: ``files[name][path]`` is content, ``private[name]``; ``log``: methods and paths asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        self.address = ""

    def sha(self, name: str) -> str:
        """The commit of a repository: a hash of what it holds."""
        state = sorted((path, content) for path, content in self.files[name].items())
        return hashlib.sha1(repr(state).encode()).hexdigest()

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        """What a commit says, one operation a line."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[name][value["path"]]
            else:
                assert line["key"] == "header", line["key"]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep stderr for the test."""

    def answer(self, value: Any = None, status: int = 200, content: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if content is None else "application/octet-stream")
        for header, text in headers.items():
            self.send_header(header.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, None, X_Error_Code=code, X_Error_Message=message)

    def route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        token = self.headers.get("Authorization")
        hub.tokens.add(token)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if token is None:
                return self.refuse(401, "", "Invalid username or password.")
            url = {"url": f"{hub.address}/{name}"}
            if name in hub.files:
                return self.answer(url | {"error": "You already created this model repo"}, 409)
            hub.files[name], hub.private[name] = (
                {".gitattributes": b""},
                given.get("visibility") == "private" or bool(given.get("private")),
            )
            return self.answer(url)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in hub.files:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        files, sha = hub.files[name], hub.sha(name)
        if rest[:1] == ["preupload"]:
            wanted = [f["path"] for f in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
        if rest[:1] == ["commit"]:
            hub.commit(name, [json.loads(line) for line in body.splitlines()])
            oid = hub.sha(name)
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid})
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
            return self.answer(tree)
        if rest[:1] == ["resolve"]:
            content = files.get("/".join(rest[2:]))
            if content is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(content=content, X_Repo_Commit=sha, ETag=tag)
        siblings = [{"rfilename": p} for p in files]
        return self.answer({"_id": "1", "id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []})

    def chunks(self) -> bytes:
        """A body that comes in pieces."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = route


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
