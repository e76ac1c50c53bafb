"""What `hub_server` answers to uploads: tokens, repositories, branches, git LFS's batches and objects, commits.

A server without Xet storage: asked for a Xet token it says 404. Small text files travel in the commit; what
`.gitattributes` names, what holds a zero byte and what is larger than `HubServer.lfs_above` goes to the LFS store.
A commit that brings an LFS file which no pattern names adds a line to `.gitattributes`, as the Hub does.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import math
import re
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.hub_server import HubServer, Repository

    class _Base:
        """What the handler gives these answers."""

        headers: Any
        rfile: Any
        connection: socket.socket
        close_connection: bool
        hub: HubServer

        def _json(self, content: Any, status: int = 200) -> None: ...
        def _refuse(self, status: int, code: str | None, message: str, commit: str | None = None) -> None: ...
        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None: ...
        def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None: ...

else:
    _Base = object

ATTRIBUTES = ".gitattributes"
INITIAL = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.bin", "*.model", "*.npy", "*.pt", "*.pth", "*.safetensors", "*.zip", "*tfevents*")
)


class Uploads(_Base):
    """Answers, to be mixed into the request handler."""

    def user(self) -> str | None:
        """Whose token the request carries; "" without one. A wrong one is answered here (None)."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given or not self.hub.tokens:
            return ""
        if given not in self.hub.tokens:
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        return self.hub.tokens[given]

    def whoami(self) -> None:
        if user := self.user():
            self._json({"type": "user", "name": user, "fullname": user, "orgs": []})
        elif user == "":
            self._refuse(401, None, "Invalid username or password.")

    def create(self) -> None:
        asked, user = json.loads(self.body()), self.user()
        if user is None:
            return
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not user or asked.get("organization", user) != user:
            return self._refuse(403, None, f"no right to create a repository of {name.split('/')[0]}")
        url = f"{self.hub.url}/{name}"
        if self.hub.repository("model", name):
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.commit(name, {ATTRIBUTES: INITIAL.encode()}, private=asked.get("visibility") == "private")
        self._json({"url": url, "name": name, "id": name})

    def branch(self, kind: str, name: str, branch: str) -> None:
        asked, found = json.loads(self.body() or b"{}"), self._find(kind, name, "main")
        if not found or not self._writer():
            return
        repository, _ = found
        if branch in repository.refs:
            return self._refuse(409, None, f"branch {branch} already exists")
        start = repository.resolve(asked.get("startingPoint", "main"))
        if start is None:
            return self._refuse(404, "RevisionNotFound", "no such starting point")
        repository.refs[branch] = start
        self._json({})

    def refs(self, kind: str, name: str) -> None:
        if found := self._find(kind, name, "main"):
            named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found[0].refs.items()]
            self._json({"branches": named, "converts": [], "tags": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        if found := self._find(kind, name, revision):
            repository, commit = found
            line = []
            while commit:
                line.append({"id": commit, "title": "", "message": "", "authors": [], "date": "2023-05-26T00:00:00Z"})
                commit = repository.parents.get(commit, "")
            self._json(line)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        asked, found = json.loads(self.body()), self._find(kind, name, revision)
        if not found or not self._writer():
            return
        files = found[0].commits[found[1]]
        modes = []
        for file in asked["files"]:
            large = file["size"] > self.hub.lfs_above or b"\0" in base64.b64decode(file["sample"])
            lfs = large or is_lfs(file["path"], files)
            old = files.get(file["path"])
            oid = None if old is None else blob_oid(file["path"], old, files)
            mode = "lfs" if lfs else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": modes, "commitOid": found[1]})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body())
        found = self._find("model", name, asked.get("ref", {}).get("name", "main"))
        if not found or not self._writer():
            return
        objects = [self._actions(entry["oid"], entry["size"]) for entry in asked["objects"]]
        self._json({"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects})

    def _actions(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        # What such addresses carry on the Hub: whoever has it may write.
        upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}?X-Amz-Signature=signed-for-an-hour"}
        step = self.hub.part_size
        if step:
            parts = {str(i + 1): f"{self.hub.url}/lfs/{oid}/{i + 1}" for i in range(math.ceil(size / step))}
            upload["header"] = {"chunk_size": str(step), **parts}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}}

    def put(self, oid: str, part: str = "") -> None:
        fault = self.hub.fault("PUT") or self.hub.fault(oid)
        if fault is not None and fault.after is not None:
            self.rfile.read(fault.after)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = self.body()
        if fault is not None and fault.status is not None:
            return self._refuse(fault.status, None, "the store is out of order")
        if part:
            self.hub.parts[oid, int(part)] = content
            return self._send(200, b"", {"ETag": f'"{part}"'})
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, None, "these are other bytes than were announced")
        self.hub.store(oid, content)
        self._send(200, b"", {})

    def complete(self, oid: str) -> None:
        asked = json.loads(self.body())
        content = b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in asked["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, None, "these are other bytes than were announced")
        self.hub.store(oid, content)
        self._json({})

    def verify(self) -> None:
        asked = json.loads(self.body())
        held = self.hub.objects.get(asked["oid"])
        if held is None or len(held) != asked["size"]:
            return self._refuse(404, None, "no such object")
        self._json({})

    def add_commit(self, kind: str, name: str, revision: str) -> None:
        body, found = self.body(), self._find(kind, name, revision)
        fault = self.hub.fault("commit")
        if fault is not None and fault.status is not None and fault.after is None:
            return self._refuse(fault.status, None, "the commit did not come through")
        if not found or not self._writer():
            return
        repository, head = found
        files = dict(repository.commits[head])
        for line in body.splitlines():
            entry = json.loads(line)
            if error := self._apply(files, head, entry["key"], entry["value"]):
                return self._refuse(*error)
        commit = self.hub.commit(name, files, branch=revision)
        if fault is not None:  # done, but the answer is lost
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _apply(
        self, files: dict[str, bytes], head: str, key: str, value: dict[str, Any]
    ) -> tuple[int, str | None, str] | None:
        """One line of a commit; what is wrong with it."""
        if key == "header":
            expected = value.get("parentCommit", head)
            return None if expected == head else (412, None, "A commit has happened since. Please refresh")
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                return 400, None, f"{value['path']}: its object was not uploaded"
            files[value["path"]] = self.hub.objects[value["oid"]]
            if not is_lfs(value["path"], files):
                files[ATTRIBUTES] += f"{value['path']} filter=lfs diff=lfs merge=lfs -text\n".encode()
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            return 400, None, f"{key} is not known here"
        return None

    def validate(self) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body())["content"], re.DOTALL)
        if found and "\t" in found[1]:
            return self._json({"errors": [{"message": "the front matter is no YAML"}], "warnings": []}, 400)
        self._json({"errors": [], "warnings": []})

    def _writer(self) -> bool:
        user = self.user()
        if user == "":
            self._refuse(401, None, "Invalid username or password.")
        return bool(user)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return bytes(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def is_lfs(path: str, files: Mapping[str, bytes]) -> bool:
    """Whether a commit's .gitattributes sends a file to the LFS store."""
    lines = [line.split() for line in files.get(ATTRIBUTES, b"").decode().splitlines()]
    return any(fnmatch.fnmatch(path, words[0]) for words in lines if "filter=lfs" in words)


def blob_oid(path: str, content: bytes, files: Mapping[str, bytes]) -> str:
    """What the Hub calls a file's content: SHA-256 of one in the LFS store, git's hash of another."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, files) else git_oid(content)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: str, content: bytes, files: Mapping[str, bytes]) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path, files):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry |= {"oid": git_oid(pointer), "lfs": {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}}
    return entry
