"""Stand-in for the Hugging Face Hub: an HTTP server with the endpoints that its client uses.

Files are kept in memory. Weights (``*.safetensors``) are uploaded by the LFS protocol.
"""

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
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "hf_ownerownerownerowner"
"""Token of the user ``me``, who may write to ``me/...``."""
READER = "hf_readerreaderreader1"
"""Token without write access."""
_PAGE = 10
_BLOCK_BYTES = 1 << 16


@dataclass
class Repository:
    """Commits and branches of a repository."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit to a branch and return its id."""
        number = f"{len(self.commits)}{branch}{message}".encode()
        oid = hashlib.sha1(number).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, or a commit's own id."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubStandIn:
    """State of the server.

    Attributes:
        repos: Repositories by id.
        blobs: Contents by SHA-256, of uploads by LFS.
        requests: Method, path and range of each request.
        hold_put: Number of the upload from which on uploads wait for `release`, or None.
        cut_get: Bytes of a file after which the connection of a download is cut, once.
        hold_get: Bytes of a file after which a download waits for `release`, by file name.
        damaged: Contents that downloads get in place of a file's, by file name.
        held: Set when an upload or download waits.
        race: Commits once to a repository when a client is about to commit.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.puts: list[str] = []
        self.hold_put: int | None = None
        self.cut_get: dict[str, int] = {}
        self.damaged: dict[str, bytes] = {}
        self.hold_get: dict[str, int] = {}
        self.held = threading.Event()
        self.stored = threading.Event()
        self.release = threading.Event()
        self.race: str | None = None
        self.lock = threading.Lock()
        self.address = ""

    def add(self, repo: str, files: dict[str, bytes], **options: Any) -> str:
        """Create a repository with files and return its commit."""
        made = self.repos.setdefault(repo, Repository(**options))
        return made.commit("main", files, "initial commit")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        found = self.repos[repo]
        return found.commits[found.find(revision) or ""]


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Start the server in a thread."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            for method, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    function(self, *found.groups())
                    return
            raise _RefusedError(404, "", f"no route {self.command} {path}")
        except _RefusedError as error:
            self._body()
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Error-Message": error.message} if error.message else {}
            self._send(error.status, {"error": error.message or str(error.status)}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _body(self) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        if left == 0 and self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        data = self.rfile.read(left) if left else b""
        del self.headers["Content-Length"]
        return data

    def _json(self) -> Any:
        return json.loads(self._body() or b"{}")

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _require_writer(self, repo: str) -> None:
        if not self._token():
            raise _RefusedError(401, "", "Invalid username or password.")
        if self._token() != OWNER or not repo.startswith("me/"):
            raise _RefusedError(403, "", f"You don't have the rights to write to {repo}")

    def _repo(self, name: str) -> Repository:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token() != OWNER):
            raise _RefusedError(
                404 if self._token() else 401, "RepoNotFound", "Repository not found"
            )
        return repo

    def _revision(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repo = self._repo(name)
        oid = repo.find(revision)
        if oid is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, oid, repo.commits[oid]

    def create(self) -> None:
        asked = self._json()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self._require_writer(name)
        url = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", **url})
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=is_private)
        return self._send(200, url)

    def info(self, name: str, revision: str | None = None) -> None:
        repo, oid, files = self._revision(name, revision or "main")
        siblings = [
            {"rfilename": path, **_described(path, data)} for path, data in sorted(files.items())
        ]
        self._send(
            200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def tree(self, name: str, revision: str) -> None:
        """Answer with a page of the files, and the address of the next one."""
        _, _, files = self._revision(name, revision)
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        entries = [
            {"type": "file", "path": path, "oid": _blob_id(data), **_described(path, data)}
            for path, data in sorted(files.items())
        ]
        headers = {}
        if start + _PAGE < len(entries):
            base = f"{self.hub.address}{urlsplit(self.path).path}"
            more = f"{base}?recursive=true&cursor={start + _PAGE}"
            headers["Link"] = f'<{more}>; rel="next"'
        self._send(200, entries[start : start + _PAGE], headers)

    def branch(self, name: str, branch: str) -> None:
        self._require_writer(name)
        repo = self._repo(name)
        self._body()
        if branch in repo.branches:
            raise _RefusedError(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._send(201, {})

    def preupload(self, name: str, revision: str) -> None:
        self._require_writer(name)
        _, _, old = self._revision(name, revision)
        files = []
        for file in self._json()["files"]:
            path, data = file["path"], old.get(file["path"])
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = None
            if data is not None:
                oid = hashlib.sha256(data).hexdigest() if mode == "lfs" else _blob_id(data)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def batch(self, name: str) -> None:
        self._require_writer(name)
        objects = []
        for each in self._json()["objects"]:
            href = f"{self.hub.address}/upload/{each['oid']}"
            actions = (
                {} if each["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            )
            objects.append({**each, **actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        with self.hub.lock:
            self.hub.puts.append(oid)
            is_held = self.hub.hold_put is not None and len(self.hub.puts) > self.hub.hold_put
        if is_held:
            self.hub.stored.wait(600)
            self.hub.held.set()
            self.hub.release.wait(600)
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise _RefusedError(400, "", "wrong digest")
        self.hub.blobs[oid] = data
        self.hub.stored.set()
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        self._require_writer(name)
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo, oid, old = self._revision(name, revision)
        if self.hub.race == name:
            self.hub.race = None
            oid = repo.commit(revision, {**old, "other.md": b"other"}, "another push")
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, oid):
            raise _RefusedError(
                412, "", "A commit has happened since. Please refresh and try again."
            )
        files = dict(old)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        made = repo.commit(revision, files, header["summary"])
        self._send(
            200, {"commitOid": made, "commitUrl": f"{self.hub.address}/{name}/commit/{made}"}
        )

    def validate(self) -> None:
        self._body()
        self._send(200, {"errors": [], "warnings": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        _, oid, files = self._revision(name, revision)
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else _blob_id(data)
        data = self.hub.damaged.get(path, data)
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", oid)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        hold = self.hub.hold_get.get(path)
        cut = self.hub.cut_get.pop(path, len(data))
        for at in range(start, len(data), _BLOCK_BYTES):
            if at >= cut:
                self.close_connection = True
                return
            if hold is not None and at >= hold and not self.hub.release.is_set():
                self.wfile.flush()
                self.hub.held.set()
                self.hub.release.wait(600)
            self.wfile.write(data[at : at + _BLOCK_BYTES])


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _described(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"size": len(data), "blobId": _blob_id(data)}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 128}
    return found


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/(\w+)", _Handler.upload),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
