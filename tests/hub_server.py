"""A Hub of our own on 127.0.0.1: enough of the Hugging Face Hub's API for the real client, in memory, faults on demand.

The `hub` fixture starts one and points huggingface_hub, transformers and child processes at it:

    def test_something(hub):
        branched.push_to_hub("user/name")           # the real client, with the token of `user`
        assert "config.json" in hub.files("user/name")
        hub.cut("GET", "ee_adapter", after=100)     # from now on, that download breaks after 100 bytes
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = (".safetensors", ".bin", ".pt", ".pkl", ".png")
"""Endings of the files that are uploaded apart from the commit; the others travel inside it."""


@dataclass
class Commit:
    """One state of a repository."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A model repository: commits by id, and where each branch stands."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    """Commit ids of each branch, the oldest first."""

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """Put a new state on top of a branch."""
        oid = hashlib.sha1(f"{title} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        self.branches.setdefault(branch, []).append(oid)
        return self.commits[oid]


@dataclass
class Fault:
    """What goes wrong with requests of this method whose path holds this text."""

    method: str
    part: str
    times: int | None = None
    """How often; None: always."""
    status: int | None = None
    after: int | None = None
    """Bytes of the body, sent or received, after which the connection breaks."""
    unheard: bool = False
    """Do what is asked, then break the connection in place of answering."""


class Refused(Exception):
    """An answer other than success, with the headers from which the client tells what is wrong."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Hub:
    """The server, its repositories and its log.

    Args:
        tokens: who each token belongs to.
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {"hf_user": "user", "hf_other": "other"}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """Contents of large files by SHA-256, committed or not."""
        self.log: list[tuple[str, str]] = []
        """Method and path of every request, in order."""
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after `stop`, at the same address again."""
        self._server = _Server(self, self.port)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and break those that are open."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self.connections):
            _break(connection)

    # --- faults

    def fail(self, method: str, part: str, status: int, times: int | None = None) -> None:
        """Answer such requests with a status such as 500."""
        self.faults.append(Fault(method, part, times, status=status))

    def cut(self, method: str, part: str, after: int = 0, times: int | None = None) -> None:
        """Break the connection of such requests after this many bytes of the body."""
        self.faults.append(Fault(method, part, times, after=after))

    def mishear(self, method: str, part: str, times: int | None = None) -> None:
        """Do what such requests ask for, but let the answer be lost."""
        self.faults.append(Fault(method, part, times, unheard=True))

    def mend(self) -> None:
        """No faults any more."""
        self.faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.part in path and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    # --- looking at it, and putting things there without the client

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return dict(self.at(self.repos[repo], revision).files)

    def history(self, repo: str, branch: str = "main") -> list[str]:
        """Commit ids of a branch, the oldest first; making a repository is a commit of its own, as on the Hub."""
        return list(self.repos[repo].branches[branch])

    def asked(self, part: str, method: str = "") -> list[str]:
        """Paths of requests so far that hold this text."""
        return [path for how, path in self.log if part in path and method in how]

    def create(self, repo: str, private: bool = False) -> Repo:
        """An empty repository."""
        self.repos[repo] = Repo(private)
        self.repos[repo].commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.repos[repo]

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch in one commit; the repository is made where it is not there yet."""
        found = self.repos.get(repo) or self.create(repo)
        return found.commit(branch, "put", {**self.at(found, branch).files, **files}).oid

    def at(self, repo: Repo, revision: str) -> Commit:
        """The commit of a branch or commit id."""
        oid = repo.branches[revision][-1] if revision in repo.branches else revision
        if oid not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[oid]


def is_lfs(path: str) -> bool:
    """Whether a file is uploaded apart from the commit."""
    return path.endswith(LFS)


def blob_id(path: str, content: bytes) -> str:
    """What the Hub names a content by: SHA-256 of a large file, git's SHA-1 of a small one."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _break(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    """One request: the log, the faults, the token, then the route."""

    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        self.fault = self.hub.fault(self.command, self.path)
        with self.hub.lock:
            self.hub.log.append((self.command, self.path))
        size = int(self.headers.get("Content-Length") or 0)
        if self.fault is not None and self.fault.after is not None and self.command in ("POST", "PUT"):
            self.rfile.read(min(size, self.fault.after))
            return self.hang_up()
        self.body = self.rfile.read(size)
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refused(self.fault.status, "as the test wants it")
            self.user = self.who()
            self.route()
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self.answer({"error": refused.message}, refused.status, headers)
        return None

    def hang_up(self) -> None:
        self.close_connection = True
        _break(self.connection)

    def who(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.unheard:
            return self.hang_up()
        raw = isinstance(content, bytes)
        body = content if raw else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if raw else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault is not None and self.fault.after is not None:
            self.wfile.write(body[: self.fault.after])
            return self.hang_up()
        self.wfile.write(body)
        return None

    def route(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        for method, pattern, call in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and self.command in method.split():
                return call(self, **{name: unquote(text) for name, text in found.groupdict().items()})
        raise Refused(404, f"This Hub has no {self.command} {url.path}")

    # --- who may do what

    def repo(self, repo: str, write: bool = False) -> Repo:
        found, owner = self.hub.repos.get(repo), repo.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(owner)
        return found

    def may_write(self, owner: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user != owner:
            raise Refused(403, f"You don't have the rights to write to the namespace {owner}")

    # --- the routes

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user or ""
        self.may_write(owner)
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        with self.hub.lock:
            if name in self.hub.repos:
                return self.answer({"url": url, "error": "You already created this model repo"}, 409)
            self.hub.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer({"url": url, "name": name})

    def create_branch(self, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        with self.hub.lock:
            if branch in found.branches:
                raise Refused(409, "Reference already exists")
            self.hub.at(found, start)
            found.branches[branch] = list(found.branches.get(start) or [start])
        self.answer({})

    def refs(self, repo: str) -> None:
        found = self.repo(repo)
        listed = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oids[-1]}
            for name, oids in found.branches.items()
        ]
        self.answer({"branches": listed, "converts": [], "tags": []})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        commit = self.hub.at(found, revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        facts = {"id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "gated": found.gated}
        self.answer({**facts, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str) -> None:
        commit = self.hub.at(self.repo(repo), revision)
        self.answer([_entry(path, content) for path, content in sorted(commit.files.items())])

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.hub.at(self.repo(repo), revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode()).get("paths", [])
        self.answer([_entry(path, commit.files[path]) for path in asked if path in commit.files])

    def preupload(self, repo: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        there = self.hub.at(self.repo(repo, write=not create_pr), revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            oid = blob_id(path, there[path]) if path in there else None
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = wanted["oid"] in self.hub.objects
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
            objects.append(dict(wanted) if known else {**wanted, "actions": {"upload": upload}})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not the one that was announced")
        self.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        found = self.repo(repo, write=not create_pr)
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            files = dict(self.hub.at(found, revision).files)
            title = ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refused(400, f"{value['path']}: its content was never uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                else:
                    raise Refused(400, f"This Hub knows no {key}")
            branch = f"refs/pr/{len(found.branches)}" if create_pr else revision
            made = found.commit(branch, title, files)
        url = f"{self.hub.url}/{repo}"
        request = f"{url}/discussions/{branch.rpartition('/')[2]}" if create_pr else None
        self.answer({"commitUrl": f"{url}/commit/{made.oid}", "commitOid": made.oid, "pullRequestUrl": request})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        if found.gated and self.user != repo.partition("/")[0]:
            raise Refused(403, f"Access to model {repo} is restricted", "GatedRepo")
        commit = self.hub.at(found, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            return self.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        etag = f'"{blob_id(path, content)}"'
        headers |= {"ETag": etag}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(content, 200, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
        return self.answer(content[first : last + 1], 206, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": blob_id(path, content), "size": len(content), "pointerSize": 134}
    return entry


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/refs", _Handler.refs),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REV}", _Handler.paths_info),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that every client in this process, and every process started from it, talks to; `user` is logged in."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as hub_of_transformers

    server, home = Hub(), tmp_path / "hf_home"
    # For processes that the test starts: the client reads these at import.
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN": "hf_user",  # also here: this one is read at each request
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    # For the client of this process, which read them long ago.
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        # With hf_xet installed the client uploads large files by xet's own protocol alone; without, by LFS over HTTP.
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    # `huggingface_hub.create_repo` and its like are methods of an object made at import, those of transformers of one
    # made when first used (from the same one in its first 5.x).
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(hub_of_transformers, "_hf_api", None, raising=False)
    for module in (file_download, _http):  # between attempts they wait 1 to 8 seconds
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    # A bar that cannot write, as in tests of full disks, keeps tqdm's lock for good, and later threads wait for it.
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.close_session()  # connections to another test's Hub
    yield server
    server.stop()
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()
