"""What a server lets in, as an ASGI middleware: the key, the size of a request, its media. Knows no engine.

It stands outside everything else of the server: a request is judged before the engine sees it, and refused with a 4xx
that says what was wrong. Media that are named by URL are fetched here and handed on as data URLs, so that the engine
itself fetches nothing and opens no file.

Standard library alone (and Pillow and OpenCV where they are there), for Python 3.10 and later. Settings come in the
variable MMQ_GUARD, the key in MMQ_API_KEY; MMQ_DOOR names a folder where a file `closed` means that the server is about
to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmq_fetch import FETCH_SECONDS, Target
from mmq_frames import asked
from mmq_media import MIME, as_data_url, check_sent, media_in, read_local
from mmq_parts import rewritten
from mmq_refused import Refused, refuse
from mmq_schema import endless
from mmq_settings import Allowance, Settings, mebibytes, settings_of

OPEN = ("/health", "/ping")  # answered without the key: they say that the server lives, and nothing else
AT_ONCE = 16  # bodies of the greatest size that may be arriving, or wait to be judged, together
SMALL = 64 * 1024  # bytes of a body that is looked at on the spot; a larger one in a thread, as one that has videos
VIDEO = re.compile(rb"video|\\u|\0")  # in a body: the word, or what JSON can write it with otherwise
PATIENCE = 30.0  # seconds that a body may take, and one more for each
SLOWEST = 8 * 1024  # bytes of it

Named = tuple[Any, Any, str, str]  # holder, key, kind, url: a medium that a request names and does not send


class Guard:
    """The middleware. `app` is the server behind it; settings and key are the environment's where none are given."""

    def __init__(self, app: Any, settings: Settings | None = None, key: str | None = None) -> None:
        self.app = app
        self.settings = settings or settings_of(os.environ)
        key = key or os.environ.get("MMQ_API_KEY")
        self.key = _digest(key) if key else None
        self.door = os.environ.get("MMQ_DOOR")  # the folder by which `serve/process.py` and this know of each other
        self.under_way = 0
        self.arriving = 0  # bytes of bodies that are not whole yet, or not judged
        self.readers = ThreadPoolExecutor(2, "mmq-guard")
        self.fetchers = ThreadPoolExecutor(32, "mmq-fetch")  # slow hosts wait here, and nobody without a URL for them

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        with self._counted(scope["path"]):
            return await self._admitted(scope, receive, send)

    async def _admitted(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        unread = scope["type"] == "http" and _has_body(headers)
        try:
            self._enter(scope, headers)
            if not unread:
                return await self.app(scope, receive, send)
            sizes: list[int] = []
            try:
                body = await self._body(headers, receive, sizes)
                if body is None:  # the client is gone
                    return None
                unread = False
                body = await self._judged(body, headers)
            finally:
                self.arriving -= sum(sizes)
        except Refused as no:
            return await refuse(scope, receive, send, no, unread=unread)
        kept = [(k, v) for k, v in scope["headers"] if k.lower() not in (b"content-length", b"transfer-encoding")]
        scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        return await self.app(scope, _given(body, receive), send)

    @contextlib.contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        """Within, a file with this process's number lies in the door's folder, for there are requests under way.

        It is there before the door is looked at: whoever closes it sees the file, or the request sees it closed.
        """
        if self.door is None or path in OPEN:
            yield
            return
        mark = os.path.join(self.door, "busy", str(os.getpid()))
        self.under_way += 1
        try:
            if self.under_way == 1:
                with contextlib.suppress(OSError):
                    os.makedirs(os.path.dirname(mark), exist_ok=True)  # temporary files are swept away, after days
                    open(mark, "wb").close()
            yield
        finally:
            self.under_way -= 1
            if self.under_way == 0:
                with contextlib.suppress(OSError):
                    os.unlink(mark)

    def _enter(self, scope: Any, headers: Mapping[str, str]) -> None:
        """Refused where the server is about to end, and where the name that was asked for, or the key, is not right."""
        if self.door and os.path.exists(os.path.join(self.door, "closed")):
            raise Refused(503, "this server is ending; it takes no new requests")
        hosts = self.settings.hosts
        if hosts is not None:
            # any page in a browser here could else talk to the server: by a name of its own that means this machine, or
            # simply so, for many engines let every page read their answers (CORS), and web sockets ask nobody
            remedy = f"ask for {hosts[0]}, or give the server a key"
            if _host_name(headers.get("host", "")) not in hosts:
                said = "this server has no key and answers to the names of its own machine alone"
                raise Refused(403, f"{said}: {remedy}")
            if "origin" in headers and _host_name(headers["origin"].partition("://")[2]) not in hosts:
                raise Refused(403, f"this server has no key and answers no pages from elsewhere: {remedy}")
        if self.key is None or scope.get("method") == "OPTIONS" or scope["path"] in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self.key):
            raise Refused(401, "a valid API key is needed, in the header `Authorization: Bearer KEY`")

    async def _body(self, headers: Mapping[str, str], receive: Any, sizes: list[int]) -> bytes | None:
        """The whole body, counted in `sizes` and in `arriving` as it comes; None when the client left."""
        most = self.settings.max_body
        too_long = Refused(413, f"a request may have {mebibytes(most)}; send smaller pictures, or fewer at once")
        with contextlib.suppress(ValueError):
            if int(headers.get("content-length", "0")) > most:
                raise too_long
        chunks: list[bytes] = []
        size, begun = 0, time.monotonic()
        while True:
            left = begun + PATIENCE + size / SLOWEST - time.monotonic()
            try:
                message = await _within(max(left, 0.001), receive())
            except asyncio.TimeoutError:  # noqa: UP041  another class before Python 3.11
                raise Refused(408, "the request came too slowly") from None
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
            sizes.append(len(chunk))
            self.arriving += len(chunk)
            if size > most:
                raise too_long
            if self.arriving > AT_ONCE * most:
                raise Refused(429, "too much is being sent to this server at once; try again in a moment")
            if not message.get("more_body"):
                return b"".join(chunks)

    async def _judged(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body as it is handed on: its own bytes, or in OpenAI's form, with the media in it that it only named."""
        loop, allowance = asyncio.get_running_loop(), Allowance(self.settings.max_body, self.settings.frames)
        if len(body) <= SMALL and not VIDEO.search(body):
            tree, named, changed = self._media_of(body, headers, allowance)
        else:
            tree, named, changed = await loop.run_in_executor(self.readers, self._media_of, body, headers, allowance)
        if not named and not changed:
            return body
        jobs = [asyncio.ensure_future(self._data_url(url, kind, allowance)) for _, _, kind, url in named]
        try:
            urls = await asyncio.gather(*jobs)
        except BaseException:  # one that cannot be had, or the client's leaving, ends the others
            for job in jobs:
                job.cancel()
            raise
        for (holder, key, _, _), url in zip(named, urls, strict=True):
            holder[key] = url
        return await loop.run_in_executor(self.readers, lambda: json.dumps(tree).encode("ascii"))

    def _media_of(self, body: bytes, headers: Mapping[str, str], allowance: Allowance) -> tuple[Any, list[Named], bool]:
        """The request's JSON, the media that it names, and whether it had another form than OpenAI's. Refused for media
        that cannot be, and for broken JSON.

        What is no JSON by its content type and its bytes, as a file's upload is, is the engine's matter.
        """
        try:
            tree = json.loads(body)
        except RecursionError:
            raise Refused(400, "the request's JSON is nested too deep") from None
        except ValueError as e:  # its text or its encoding
            if headers.get("content-type", "json").partition(";")[0].strip().lower().endswith("json"):
                raise Refused(400, f"the request is not valid JSON: {e}") from None
            return None, [], False
        try:
            changed = rewritten(tree)
        except (ValueError, RecursionError) as e:
            raise Refused(400, str(e)) from None
        if where := endless(tree):
            raise Refused(400, f"the schema at {where[:200]} refers to nothing but itself: no answer could meet it")
        if isinstance(tree, dict) and isinstance(said := tree.get("media_io_kwargs"), dict):
            allowance.frames = asked(allowance.frames, said.get("video"))
        named: list[Named] = []
        for count, (holder, key, kind, raw) in enumerate(media_in(tree)):
            if count == self.settings.max_media:
                raise Refused(400, f"a request may have {count} pictures, videos and sounds together")
            value = holder[key]
            if raw or value[:5].lower() == "data:":
                check_sent(value, kind, allowance, raw=raw)
            elif value[:8].lower().startswith(("http://", "https://", "file://")):
                named.append((holder, key, kind, value))
            else:
                raise Refused(400, f"a medium is no data:, http(s): or file: URL: {value[:60]!r}")
        return tree, named, changed

    async def _data_url(self, url: str, kind: str, allowance: Allowance) -> str:
        """A medium that is named as a data URL. Refused when it may not be had, or cannot."""
        loop = asyncio.get_running_loop()
        if url[:5].lower() == "file:":
            data = await loop.run_in_executor(self.readers, read_local, url, self.settings.folder, allowance)
            return await loop.run_in_executor(self.readers, as_data_url, data, MIME[kind], allowance)
        target = Target(url, self.settings)
        job = loop.run_in_executor(self.fetchers, target.fetch, allowance, kind)
        try:
            done, _ = await asyncio.wait([job], timeout=FETCH_SECONDS)
            if not done:
                raise Refused(400, f"{target.host} did not send the medium within {FETCH_SECONDS:.0f} s")
            return job.result()
        finally:
            if not job.done():
                job.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody waits for it now
                target.give_up()


async def _within(seconds: float, coming: Any) -> Any:
    """What comes, or asyncio.TimeoutError. Python 3.10 has a task of its own for it, which costs more than all else."""
    if not hasattr(asyncio, "timeout"):
        return await asyncio.wait_for(coming, seconds)
    async with asyncio.timeout(seconds):
        return await coming


def _has_body(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip() not in ("", "0")


def _host_name(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.rstrip(".").lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _given(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body, and then what the server says, as that the client left."""
    whole = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return whole.pop() if whole else await receive()

    return next_message
