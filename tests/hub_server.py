"""A loopback hub that speaks the download APIs of the Hugging Face Hub and of ModelScope, and can be made to fail.

Stdlib alone, one thread a request, port chosen by the system, 127.0.0.1 only. What was asked is kept in `asked`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """One model: its files at each commit, its branches, and what is wrong with it."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False  # files are forbidden, the listing is not
    token: str | None = None  # without it, the repository is not there
    wrong: set[str] = field(default_factory=set)  # paths of which other bytes of the same size are sent
    claims: dict[str, int] = field(default_factory=dict)  # path: the size that the listing tells
    public: bool = True


@dataclass(frozen=True)
class Asked:
    """One request for a file, as the server saw it."""

    method: str
    path: str
    range: str | None


class HubServer:
    """`with HubServer(repos) as hub`: hub.url is the endpoint for both libraries."""

    def __init__(self, repos: dict[str, Repo], handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        self.repos = repos
        self.asked: list[Asked] = []
        self.calls: list[str] = []  # every request line
        self.tokens: set[str] = set()
        self.cut: dict[str, int] = {}  # path: the next GET of it breaks off after so many bytes
        self.stall: dict[str, int] = {}  # path: the next GET of it stops after so many bytes and waits for `resume`
        self.slow: set[str] = set()  # paths that come at 4 MiB a second
        self.stalled, self.resume = threading.Event(), threading.Event()
        speaks: Any = type("Handler", (handler or Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), speaks)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def got(self, method: str = "GET") -> list[str]:
        """The paths of the files asked for, in order of name."""
        return sorted(a.path for a in self.asked if a.method == method)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """No more answers: the port refuses connections from here on."""
        self.resume.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=5)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out on their own; the second would wait for the first's receipt

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        self.hub.calls.append(f"{self.command} {self.path}")
        if token := self.headers.get("Authorization", "").removeprefix("Bearer "):
            self.hub.tokens.add(token)
        path = unquote(url.path)
        if m := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/(repo/files|repo|revisions)", path):
            self._modelscope(m[1], m[2], query)
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._hf_api(m[1], m[2] or "revision", m[3] or "main")
        elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._hf_file(m[1], m[2], m[3])
        else:
            self._json(404, {"error": "no such page"})

    # The Hugging Face Hub

    def _hf_repo(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get(name)
        sent = self.headers.get("Authorization")
        if sent == "Bearer stale":
            self._json(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.token and sent != f"Bearer {repo.token}"):
            self._json(
                401 if sent is None else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        elif (commit := repo.branches.get(revision, revision)) not in repo.commits:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, commit
        return None

    def _hf_api(self, name: str, what: str, revision: str) -> None:
        found = self._hf_repo(name, revision)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        if what == "tree":
            entries = []
            for path, data in files.items():
                lfs = {"oid": _sha(data), "size": len(data), "pointerSize": 135} if _is_lfs(path) else None
                entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
                entries.append(entry | ({"lfs": lfs} if lfs else {}))
            self._json(200, entries)
            return
        siblings = []
        for path, data in files.items():
            size = repo.claims.get(path, len(data))
            sibling: dict[str, Any] = {"rfilename": path, "size": size, "blobId": _blob_id(data)}
            if _is_lfs(path):
                sibling["lfs"] = {"sha256": _sha(data), "size": size, "pointerSize": 135}
            siblings.append(sibling)
        self._json(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": not repo.public,
                "gated": repo.gated,
                "siblings": siblings,
            },
        )

    def _hf_file(self, name: str, revision: str, path: str) -> None:
        self.hub.asked.append(Asked(self.command, path, self.headers.get("Range")))
        found = self._hf_repo(name, revision)
        if found is None:
            return
        repo, commit = found
        data = repo.commits[commit].get(path)
        if repo.gated:
            self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
        elif data is None:
            self._json(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            etag = _sha(data) if _is_lfs(path) else _blob_id(data)
            self._file(repo, path, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    # ModelScope

    def _modelscope(self, name: str, what: str, query: dict[str, str]) -> None:
        if what == "repo":
            self.hub.asked.append(Asked(self.command, query["FilePath"], self.headers.get("Range")))
        repo = self.hub.repos.get(name)
        sent = self.headers.get("Authorization")
        if sent == "Bearer stale":
            self._json(401, {"Code": 10010100001, "Message": "token expired", "Success": False})
            return
        if repo is None or (repo.token and sent != f"Bearer {repo.token}"):
            self._json(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
            return
        if what == "revisions":
            branches = [{"Revision": name} for name in repo.branches]
            self._json(200, _envelope({"RevisionMap": {"Branches": branches, "Tags": []}}))
            return
        revision = query.get("Revision", "master")
        commit = repo.branches.get(revision, revision)
        if what == "repo/files":  # an unknown revision is a success without files
            files = _listing(repo, commit) if commit in repo.commits else None
            self._json(200, _envelope({"Files": files, "IsVisual": 0}))
        elif repo.gated:
            self._json(403, {"Code": 10010103403, "Message": "forbidden", "Success": False})
        elif (data := repo.commits.get(commit, {}).get(query["FilePath"])) is None:
            self._json(404, {"Code": 10990101007, "Message": "file not found", "Success": False})
        else:
            self._file(repo, query["FilePath"], data, {})

    # Both

    def _json(self, status: int, data: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, repo: Repo, path: str, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        if m := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(m[1])
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in repo.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        cut, stall = self.hub.cut.pop(path, None), self.hub.stall.pop(path, None)
        try:
            end = cut if cut is not None else stall if stall is not None else len(data)
            for at in range(start, end, 1 << 20):
                self.wfile.write(data[at : min(at + (1 << 20), end)])
                self.wfile.flush()
                if path in self.hub.slow:
                    self.hub.stalled.set()
                    self.hub.resume.wait(timeout=0.25)
            if stall is not None:
                self.hub.stalled.set()
                self.hub.resume.wait(timeout=60)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed
        if cut is not None or stall is not None:
            self.close_connection = True


def safetensors(tensors: dict[str, int]) -> bytes:
    """A safetensors file of uint8 tensors with so many elements each, every file with bytes of its own."""
    header, end = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    seed = hashlib.sha256(head).digest()
    return struct.pack("<Q", len(head)) + head + (seed * (end // len(seed) + 1))[:end]


def _listing(repo: Repo, commit: str) -> list[dict[str, Any]]:
    """ModelScope's listing: every file has the last commit that touched it, and no entry names the branch's own."""
    order = list(repo.commits)
    files = []
    for path, data in repo.commits[commit].items():
        last = commit
        for earlier in reversed(order[: order.index(commit)]):
            if repo.commits[earlier].get(path) != data:
                break
            last = earlier
        size = repo.claims.get(path, len(data))
        entry = {"Path": path, "Name": path, "Type": "blob", "Size": size, "Sha256": _sha(data)}
        files.append(entry | {"Revision": last, "CommittedDate": 1_700_000_000 + order.index(last)})
    return [*files, {"Path": "folder", "Name": "folder", "Type": "tree", "Size": 0, "Revision": commit}]


def _envelope(data: object) -> dict[str, object]:
    return {"Code": 200, "Data": data, "Message": "success", "RequestId": "", "Success": True}


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
