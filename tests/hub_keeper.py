"""A loopback hub that keeps what the real client libraries send, for the Hugging Face Hub and ModelScope: repositories,
blobs, commits, tags, all to be downloaded again (hub_server.py); and that fails where it is told to.

A blob is only taken whole and with its hash; a commit only with blobs that are there, on its parent. It never shows
half a commit, so a half publish that a test finds is the client's.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_server import Handler, HubServer, Repo

TOKEN = "hf_thisIsTheTokenThatNobodyMaySee"
SIGNED = "X-Amz-Signature=signedAddressThatNobodyMaySee"
BORN = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}

Fail = Callable[[int, str, str], "int | str | None"]


def never(number: int, method: str, path: str) -> None:
    """No failure."""


class HubKeeper(HubServer):
    """`fail(number, method, path)` is asked for each request and says how it ends: None well; a status instead of its
    work; "before" or "after" its work with a cut connection; "slow" in small pieces. `part` is the size above which the
    Hugging Face Hub wants a blob in parts."""

    def __init__(self, repos: dict[str, Repo] | None = None) -> None:
        super().__init__(repos if repos is not None else {}, KeepingHandler)
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.fail: Fail = never
        self.part = 1 << 40
        self.room = 1 << 40  # bytes of blobs that it takes
        self.lock = threading.Lock()
        self.number = 0
        self.received = 0  # bytes of blobs that arrived whole
        self.licenses: dict[str, str] = {}

    def create(self, name: str, *, public: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository as it is born, with one commit."""
        commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        self.repos[name] = Repo(
            {commit: dict(files or BORN)},
            {"main": commit, "master": commit},
            token=None if public else TOKEN,
            public=public,
        )
        return self.repos[name]

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.branches[ref]]

    def commit(self, repo: Repo, files: dict[str, bytes]) -> str:
        text = json.dumps([list(repo.commits), sorted((n, hashlib.sha256(d).hexdigest()) for n, d in files.items())])
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        repo.commits[commit] = files
        repo.branches["main"] = repo.branches["master"] = commit
        return commit


class KeepingHandler(Handler):
    """Adds what writes to a hub; the verbs that read are Handler's, but for the failures."""

    hub: HubKeeper  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        with self.hub.lock:
            number, self.hub.number = self.hub.number, self.hub.number + 1
        ends = self.hub.fail(number, self.command, self.path)
        if ends == "before":
            self._cut()
            return
        body = self._body(slow=ends == "slow")
        if body is None:
            return
        if isinstance(ends, int):
            said = f"no, not with {self.headers.get('Authorization')}, see {self.hub.url}{self.path}"
            self._json(
                ends, {"error": said, "Code": ends, "Message": said, "Success": False}, {"X-Error-Message": said}
            )
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            self._end(ends, body)

    def _end(self, ends: int | str | None, body: bytes) -> None:
        if ends == "after":
            keep, self.wfile = self.wfile, _Nowhere()  # type: ignore[assignment]
            self._work(body)
            self.wfile = keep
            self._cut()
            return
        self._work(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _body(self, *, slow: bool) -> bytes | None:
        left, pieces = int(self.headers.get("Content-Length") or 0), []
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self._chunked()
        while left:
            try:
                piece = self.rfile.read(min(left, 1 << 16))
            except OSError:
                piece = b""
            if not piece:
                self._cut()
                return None
            left -= len(piece)
            pieces.append(piece)
            if slow:
                self.hub.stalled.set()
                self.hub.resume.wait(timeout=0.05)
        return b"".join(pieces)

    def _chunked(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _work(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {self.path}")
        for pattern, method, work in ROUTES:
            if self.command == method and (found := re.fullmatch(pattern, path)):
                if path.startswith(("/blob/", "/whole/")):  # the address is signed, and is all the key there is
                    allowed = SIGNED in self.path
                else:
                    allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if not allowed:
                    self._json(401, {"error": "no such token"}, {"X-Error-Message": "Invalid credentials"})
                    return
                work(self, body, *found.groups())
                return
        if self.command in ("POST", "PUT"):
            self._json(404, {"error": "no such page"})
        else:
            Handler._answer(self)

    # Both

    def _blob(self, body: bytes, oid: str, part: str | None) -> None:
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            self._json(200, {}, {"ETag": f'"{oid[:8]}-{part}"'})
        else:
            self._keep(oid, body)

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._json(400, {"error": "these bytes have another hash"})
        elif sum(map(len, self.hub.blobs.values())) + len(data) > self.hub.room:
            self._json(507, {"error": "no room left", "Message": "no room left"})
        else:
            self.hub.blobs[oid] = data
            self.hub.received += len(data)
            self._json(200, {})

    def _place(self, oid: str) -> str:
        return f"{self.hub.url}/blob/{oid}?{SIGNED}"

    def _repo(self, name: str) -> Repo | None:
        if name not in self.hub.repos:
            headers = {"X-Error-Code": "RepoNotFound"}
            self._json(404, {"Code": 10010205001, "Message": "record not found", "Success": False}, headers)
        return self.hub.repos.get(name)

    # The Hugging Face Hub

    def _hf_create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.create(name, public=asked.get("visibility") == "public")
        self._json(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _hf_yaml(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        data = yaml.safe_load(content.split("---\n")[1])
        wrong = [] if isinstance(data.get("license"), str) else [{"message": '"license" must be a string'}]
        self._json(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _hf_preupload(self, body: bytes, name: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        there = repo.commits[repo.branches["main"]]
        found = []
        for file in json.loads(body)["files"]:
            lfs = _stored_apart(file["path"], file["size"])
            data = there.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if lfs else _git(data)
            found.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    **({"oid": oid} if oid else {}),
                }
            )
        self._json(200, {"files": found})

    def _hf_batch(self, body: bytes, name: str) -> None:
        asked = json.loads(body)
        assert asked["operation"] == "upload"
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if size > self.hub.room:
                answer["error"] = {"code": 507, "message": "You have no storage left"}
            elif oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": self._place(oid)}
                if size > self.hub.part:
                    count = -(-size // self.hub.part)
                    parts = {f"{n:05d}": f"{self.hub.url}/blob/{oid}/{n}?{SIGNED}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/whole/{oid}?{SIGNED}",
                        "header": {"chunk_size": str(self.hub.part), **parts},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
            objects.append(answer)
        self._json(200, {"objects": objects, "transfer": "multipart"})

    def _hf_whole(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid, {})
        self._keep(oid, b"".join(parts[n["partNumber"]] for n in json.loads(body)["parts"]))

    def _hf_verify(self, body: bytes, oid: str) -> None:
        self._json(200 if oid in self.hub.blobs else 404, {})

    def _hf_commit(self, body: bytes, name: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        head, files = repo.branches["main"], dict(repo.commits[repo.branches["main"]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") != head:
                self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._json(400, {"error": f"LFS pointer {value['oid']} points to no file"})
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(repo, files)
        self._json(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _hf_tag(self, body: bytes, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        tag = json.loads(body)["tag"]
        if tag in repo.branches:
            self._json(409, {"error": "Tag reference exists already."})
            return
        repo.branches[tag] = repo.branches.get(revision, revision)
        self._json(201, {})

    # ModelScope

    def _ms_create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['Path']}/{asked['Name']}"
        if name in self.hub.repos:
            self._json(400, {"Code": 10010101001, "Message": "the name is taken", "Success": False})
            return
        self.hub.create(name, public=asked["Visibility"] == 5)
        self.hub.licenses[name] = asked["License"]
        self._good({"Path": asked["Path"], "Name": asked["Name"]})

    def _ms_info(self, body: bytes, name: str) -> None:
        if (repo := self._repo(name)) is not None:
            self._good({"Name": name, "Visibility": 5 if repo.public else 1, "ProtectedMode": 1 if repo.gated else 2})

    def _ms_batch(self, body: bytes, name: str) -> None:
        missing = [o["oid"] for o in json.loads(body)["objects"] if o["oid"] not in self.hub.blobs]
        self._good({"objects": [{"oid": m, "actions": {"upload": {"href": self._place(m)}}} for m in missing]})

    def _ms_commit(self, body: bytes, name: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        files = dict(repo.commits[repo.branches["master"]])
        for action in json.loads(body)["actions"]:
            if action["action"] == "delete":
                del files[action["path"]]
            elif action["type"] == "lfs":
                if action["sha256"] not in self.hub.blobs:
                    self._json(400, {"Code": 400, "Message": "no such blob", "Success": False})
                    return
                files[action["path"]] = self.hub.blobs[action["sha256"]]
            else:
                files[action["path"]] = base64.b64decode(action["content"])
        self.hub.commit(repo, files)
        self._good({"Message": "done"})

    def _ms_tag(self, body: bytes, name: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        asked = json.loads(body)
        if asked["TagName"] in repo.branches:
            self._json(400, {"Code": 400, "Message": "tag exists already", "Success": False})
            return
        repo.branches[asked["TagName"]] = repo.branches[asked["Ref"]]
        self._good({})

    def _good(self, data: object) -> None:
        self._json(200, {"Code": 200, "Data": data, "Message": "success", "RequestId": "", "Success": True})


class _Nowhere:
    """Takes an answer that nobody will get."""

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def _stored_apart(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin")) or size > 10 << 20


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


_NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (r"/blob/([0-9a-f]{64})(?:/(\d+))?", "PUT", KeepingHandler._blob),
    (r"/whole/([0-9a-f]{64})", "POST", KeepingHandler._hf_whole),
    (r"/verify/([0-9a-f]{64})", "POST", KeepingHandler._hf_verify),
    (r"/api/repos/create", "POST", KeepingHandler._hf_create),
    (r"/api/validate-yaml", "POST", KeepingHandler._hf_yaml),
    (rf"/api/models/{_NAME}/preupload/main", "POST", KeepingHandler._hf_preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "POST", KeepingHandler._hf_batch),
    (rf"/api/models/{_NAME}/commit/main", "POST", KeepingHandler._hf_commit),
    (rf"/api/models/{_NAME}/tag/(.+)", "POST", KeepingHandler._hf_tag),
    (r"/api/v1/models", "POST", KeepingHandler._ms_create),
    (rf"/api/v1/models/{_NAME}", "GET", KeepingHandler._ms_info),
    (rf"/api/v1/repos/models/{_NAME}/info/lfs/objects/batch", "POST", KeepingHandler._ms_batch),
    (rf"/api/v1/repos/models/{_NAME}/commit/master", "POST", KeepingHandler._ms_commit),
    (rf"/api/v1/models/{_NAME}/repo/tag", "POST", KeepingHandler._ms_tag),
]
