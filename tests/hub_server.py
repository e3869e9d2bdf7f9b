"""A server on this machine that speaks the Hugging Face Hub's endpoints, for the real client; it fails when told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits, newest last, each (id, name -> content); and what branches stand for."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a state on top of a branch; returns its id."""
        state = repr((len(self.commits), sorted((name, hashlib.sha1(data).digest()) for name, data in files.items())))
        name = hashlib.sha1(state.encode()).hexdigest()
        self.commits.append((name, dict(files)))
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(id, files) of a branch or commit."""
        name = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == name), None)

    @property
    def files(self) -> dict[str, bytes]:
        """Those on the main branch."""
        found = self.at("main")
        return {} if found is None else found[1]


class HubServer:
    """The hub.

    Attributes:
        repositories: by "org/name".
        requests: "METHOD path" of all requests so far, "METHOD path bytes=5-" where a range was asked.
        unknown: requests that no endpoint took.
        cut: file name -> number of bytes after which the next transfers of it break off, one entry per transfer.
        refuse: (method, part of the path) -> status to answer with.
        watch: called with "METHOD path" before each answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.cut: dict[str, list[int]] = {}
        self.refuse: dict[tuple[str, str], int] = {}
        self.watch: Callable[[str], None] = lambda request: None
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        """Answer no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """A commit on top of a repository, which is made if there is none; returns its id."""
        return self.repositories.setdefault(name, Repository()).commit(files)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self._serve()

    do_GET = do_POST = do_PUT = do_HEAD

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        asked = self.headers.get("Range")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{request} {asked}" if asked else request)
            self.hub.watch(request)
        for (method, part), status in self.hub.refuse.items():
            if method == self.command and part in path:
                self._json({"error": "refused"}, status)
                return
        for pattern, answer in _ENDPOINTS:
            match = re.fullmatch(pattern, request)
            if match:
                with self.hub.lock:
                    todo = answer(self, **match.groupdict())
                todo()
                return
        self.hub.unknown.append(request)
        self._json({"error": "no such endpoint"}, 404)

    # --- answers, made under the lock and sent after it ------------------------------------------------------------

    def file(self, repo: str, revision: str, name: str) -> Callable[[], None]:
        found = self._found(repo, revision)
        if callable(found):
            return found
        commit, files = found
        if name not in files:
            return lambda: self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        total = len(data)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            data = data[start : int(asked[2]) + 1 if asked[2] else None]
            status = 206
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        cuts = self.hub.cut.get(name) if self.command == "GET" else None
        sent = data[: cuts.pop(0)] if cuts else data

        def send() -> None:
            self._send(data, status, headers, sent)

        return send

    def info(self, repo: str, revision: str = "main") -> Callable[[], None]:
        found = self._found(repo, revision)
        if callable(found):
            return found
        commit, files = found
        siblings = [{"rfilename": name} for name in files]
        return lambda: self._json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def tree(self, repo: str, revision: str, folder: str = "") -> Callable[[], None]:
        found = self._found(repo, revision)
        if callable(found):
            return found
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in found[1].items()
            if name.startswith(folder)
        ]
        if folder and not rows:
            return lambda: self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        return lambda: self._json(rows)

    def create(self) -> Callable[[], None]:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return lambda: self._json({"error": "exists", "url": url}, 409)
        self.hub.repositories[name] = Repository()
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return lambda: self._json({"url": url, "name": name, "id": name})

    def valid(self) -> Callable[[], None]:
        return lambda: self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> Callable[[], None]:
        found = self._found(repo, revision)
        if callable(found):
            return found
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for entry in json.loads(self.body)["files"]
        ]
        return lambda: self._json({"files": modes})

    def batch(self, repo: str) -> Callable[[], None]:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.hub.uploads else {**entry, "actions": action})
        return lambda: self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs(self, oid: str) -> Callable[[], None]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return lambda: self._json({"error": "other content"}, 400)
        self.hub.uploads[oid] = self.body
        return lambda: self._json({})

    def commit(self, repo: str, revision: str) -> Callable[[], None]:
        found = self._found(repo, revision)
        if callable(found):
            return found
        files = dict(found[1])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.hub.repositories[repo].commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return lambda: self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def nothing(self) -> Callable[[], None]:
        return lambda: self._json({})

    # ---------------------------------------------------------------------------------------------------------------

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | Callable[[], None]:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            return lambda: self._json({}, 401, {"X-Error-Code": "RepoNotFound"})
        if repository.gated and self.headers.get("Authorization") != "Bearer hf_friend":
            return lambda: self._json({}, 403, {"X-Error-Code": "GatedRepo"})
        return repository.at(revision) or (lambda: self._json({}, 404, {"X-Error-Code": "RevisionNotFound"}))

    def _json(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": kind, **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str], sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if sent is None else sent)
            if sent is not None and len(sent) < len(data):
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ENDPOINTS: list[tuple[str, Callable[..., Callable[[], None]]]] = [
    (rf"(?:HEAD|GET) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.file),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.valid),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs),
    (r"GET /api/agent-harnesses", _Handler.nothing),
]
