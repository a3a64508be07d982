"""A web page to chat with a server's model, pictures and videos too: `mmq app`.

The page (serve/page) is three files without a framework or anything from elsewhere. What it asks goes through this
process, which has the server's key, so the browser needs neither the key nor leave to ask another address. Loopback
alone, and for its own page alone: other pages that are open in the browser can make it ask nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .client import TIMEOUT, root
from .running import check_port, free_port

FOLDER = Path(__file__).resolve().parent / "page"
HOST = "127.0.0.1"
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
}
FORWARDED = {"GET": ("/v1/models",), "POST": ("/v1/chat/completions",)}
MOST = 256 << 20  # bytes of a question with its media; the server behind has its own, smaller limit
POLICY = (  # what the page may load and ask: its own address, and media that it holds
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is not answered: an HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One request of the page: a file of it, or something for the server behind."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def __init__(self, *arguments: Any, upstream: str, api_key: str | None) -> None:
        self.upstream, self.api_key = upstream, api_key
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written; the page shows what went wrong."""

    def _answer(self, method: str) -> None:
        self.close_connection = True  # every answer ends with its connection, so that streams need no other mark
        try:
            self._own()
            path = urlsplit(self.path).path
            if method == "GET" and path in PAGE:
                name, kind = PAGE[path]
                self._send(200, kind, (FOLDER / name).read_bytes())
            elif path in FORWARDED[method]:
                self._forward(method, path)
            else:
                raise Refused(404, f"there is nothing at {path}")
        except Refused as no:
            self._send(no.status, "application/json", json.dumps({"error": {"message": str(no)}}).encode())
        except (ConnectionError, TimeoutError):
            pass  # the browser left

    def _own(self) -> None:
        """Refused unless the page itself asks, under a name of this machine."""
        port = self.connection.getsockname()[1]
        own = [f"{name}:{port}" for name in (HOST, "localhost")]
        if self.headers.get("Host") not in own:  # a name that was made to mean this machine
            raise Refused(403, f"this page is at http://{own[0]}")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in own]:
            raise Refused(403, "another page asks; this is for its own alone")

    def _forward(self, method: str, path: str) -> None:
        """Hand the request to the server and its answer back, piece by piece as it comes."""
        body = None
        if method == "POST":
            if self.headers.get_content_type() != "application/json":  # what another page could send unasked
                raise Refused(415, "the question must be JSON")
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > MOST:
                raise Refused(413, f"a question may have {MOST >> 20} MiB with its pictures")
            body = self.rfile.read(int(length))
        there = urlsplit(self.upstream)
        kind = http.client.HTTPSConnection if there.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(there.netloc, timeout=TIMEOUT)) as connection:
            headers = {"Content-Type": "application/json"}
            if self.api_key:
                headers["Authorization"] = f"Bearer {self.api_key}"
            try:
                connection.request(method, there.path + path, body, headers)
                reply = connection.getresponse()
            except (OSError, http.client.HTTPException) as e:
                raise Refused(502, f"no server answers at {self.upstream}: {e}") from None
            self._head(reply.status, reply.headers.get("Content-Type", "application/json"))
            with contextlib.suppress(http.client.HTTPException):  # the server left: the page sees its stream end
                while piece := reply.read1(65536):
                    self.wfile.write(piece)
                    self.wfile.flush()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._head(status, kind, ("Content-Length", str(len(body))))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Connection", "close"),
            *more,
        ):
            self.send_header(name, value)
        self.end_headers()


class PageServer(ThreadingHTTPServer):
    """Ends though an answer is under way."""

    daemon_threads = True
    block_on_close = False


@contextmanager
def page(url: str, *, port: int | None = None, api_key: str | None = None) -> Iterator[str]:
    """The address of a page that chats with the server at `url`, for the length of a `with`.

    On loopback, at a free port where none is given. ValueError for a port that cannot be listened on.
    """
    if port is not None:
        check_port(HOST, port)
    handler = partial(Handler, upstream=root(url), api_key=api_key)
    with PageServer((HOST, port or free_port(HOST)), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
