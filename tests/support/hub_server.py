"""A Hugging Face Hub of one's own over loopback, as far as huggingface_hub's client asks: models and data sets by
branch, tag and commit, private and gated ones, uploads, and a network that fails on request.

    with HubServer() as hub:
        commit = hub.commit("someone/model", {"config.json": b"{}"}, tags=["v1"])
        hub.cut("model.safetensors", after=1000)     # the connection drops there, once
        ...                                          # a client with HF_ENDPOINT=hub.url
        assert ("GET", "/someone/model/resolve/main/config.json", None) in hub.requests

What is answered is the table `_ROUTES`, from method and path to a method of `_Handler`; those of uploads are in
`hub_uploads`, and end in `HubServer.commit`. Requests are served in threads, so a test may change faults while a client
runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from support.hub_uploads import Uploads, tree_entry


@dataclass
class Repository:
    """A model's or data set's files by commit, and the branches and tags that point to commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit names."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class Request(NamedTuple):
    """What a client asked: `span` is its Range header."""

    method: str
    path: str
    span: str | None


@dataclass
class _Fault:
    """What happens to a file's downloads, or to an upload, `times` times; None is for as long as the fault stands."""

    after: int | None
    status: int | None
    times: int | None


class HubServer:
    """The server; as a context manager it runs in threads of its own.

    Attributes:
        url: what HF_ENDPOINT must be.
        requests: everything asked so far, in the order in which it arrived.
        tokens: user by token; without any, everybody may read and nobody write.
        objects: the LFS store, content by SHA-256.
        stored: SHA-256 of every object that was uploaded whole, in order.
        part_size: bytes of a part, to ask for uploads in parts; None: whole objects.
        lfs_above: bytes that a file may have to travel in the commit.
        quoted: whether refusals repeat the request's credentials, as servers under repair may.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.tokens: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None
        self.lfs_above = 10_000_000
        self.quoted = False
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._faults: dict[str, _Fault] = {}
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go off the network: open connections end, new ones are refused."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._http.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    # -- what it holds -----------------------------------------------------------------------------------------------

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes] | Path,
        *,
        kind: str = "model",
        branch: str = "main",
        tags: Iterable[str] = (),
        gated: bool = False,
        private: bool | None = None,
    ) -> str:
        """Make `files` (by path, or a folder's) the whole content of a branch; the new commit's id.

        `kind` is "model" or "dataset"; a gated repository shows its files' names to everybody, their content to nobody.
        A private one (None: as it was) is for those with a token.
        """
        content = _folder(files) if isinstance(files, Path) else dict(files)
        repository = self._repositories.setdefault((kind, name), Repository())
        repository.gated = gated
        repository.private = repository.private if private is None else private
        seed = [name, branch, len(repository.commits), *sorted((k, _sha256(v)) for k, v in content.items())]
        commit = hashlib.sha1(repr(seed).encode()).hexdigest()
        repository.commits[commit] = content
        if branch in repository.refs:
            repository.parents[commit] = repository.refs[branch]
        repository.refs.update(dict.fromkeys([branch, *tags], commit))
        return commit

    def repository(self, kind: str, name: str) -> Repository | None:
        return self._repositories.get((kind, name))

    def store(self, oid: str, content: bytes) -> None:
        """Take an LFS object."""
        self.objects[oid] = content
        self.stored.append(oid)

    def asked(self, suffix: str, method: str = "GET") -> list[Request]:
        """Requests so far whose path ends in `suffix`."""
        return [
            request for request in list(self.requests) if request.method == method and request.path.endswith(suffix)
        ]

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def cut(self, file: str, after: int, times: int | None = 1) -> None:
        """Drop the connection when a download of `file` has come to byte `after` of it. "PUT" is the upload of an LFS
        object, whichever, a SHA-256 that of this one; "commit" is a commit, done but not answered."""
        self._faults[file] = _Fault(after, None, times)

    def fail(self, file: str, status: int, times: int | None = 1) -> None:
        """Answer downloads of `file` (the empty name: every request) with an HTTP status such as 503; uploads as in
        `cut`."""
        self._faults[file] = _Fault(None, status, times)

    def heal(self) -> None:
        """End all faults."""
        self._faults.clear()

    def fault(self, file: str) -> _Fault | None:
        """The fault that a download of `file` meets now; counts it."""
        with self._lock:
            fault = self._faults.get(file)
            if fault is None or fault.times == 0:
                return None
            if fault.times is not None:
                fault.times -= 1
            return fault


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(Uploads, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `HubServer.requests` instead."""

    def _route(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        fault = hub.fault("")
        if fault is not None and fault.status is not None:
            return self._refuse(fault.status, None, "the server is out of order")
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, **{key: unquote(value) for key, value in found.groupdict("").items()})
        self._refuse(404, None, f"nothing at {path}")

    # -- answers -----------------------------------------------------------------------------------------------------

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        found = self._find(kind, name, revision)
        if found:
            repository, commit = found
            siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
            private = repository.private
            self._json({"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, name: str, revision: str) -> None:
        found = self._find(kind, name, revision)
        if found:
            repository, commit = found
            files = repository.commits[commit]
            self._json([tree_entry(path, content, files) for path, content in sorted(files.items())])

    def file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._find(kind or "model", name, revision)
        if not found:
            return
        repository, commit = found
        content = repository.commits[commit].get(path)
        if repository.gated:
            return self._refuse(403, "GatedRepo", f"access to {name} is restricted", commit)
        if content is None:
            return self._refuse(404, "EntryNotFound", f"{path} is not in {name}", commit)
        self._send_file(path, content, commit)

    def _send_file(self, path: str, content: bytes, commit: str) -> None:
        fault = self.server.hub.fault(path) if self.command == "GET" else None
        if fault is not None and fault.status is not None:
            return self._refuse(fault.status, None, "the file cannot be had")
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_sha256(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.after is None:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : max(start, fault.after)])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- parts of answers --------------------------------------------------------------------------------------------

    def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit that a revision of it names; None where that has been answered already."""
        kind = kind.rstrip("s")
        repository, user = self.server.hub.repository(kind, name), self.user()
        if user is None:
            return None
        if repository is None or (repository.private and not user):
            self._refuse(404, "RepoNotFound", f"there is no {kind} {name}")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"{name} has no revision {revision}")
            return None
        return repository, commit

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str, commit: str | None = None) -> None:
        message += f" ({self.headers.get('Authorization')})" if self.hub.quoted else ""
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {key: value for key, value in headers.items() if value is not None})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_ROUTES = (
    ("GET", _API, _Handler.info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.add_commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", _Handler.put),
    ("POST", r"/lfs/(?P<oid>\w+)", _Handler.complete),
    ("POST", r"/verify", _Handler.verify),
    ("GET HEAD", rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.file),
)


def _folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
