"""Requests that name media, places that they may not name, and a small web that tells who asked it."""

from __future__ import annotations

import http.server
import io
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

FORBIDDEN = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://2130706433:{port}/",  # 127.0.0.1 in one number
    "http://0x7f.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://\uff11\uff12\uff17.0.0.1:{port}/",  # full-width digits
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://192.0.0.192/opc/v2/instance/",
    "http://[fec0::1]/",
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://172.16.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://user@127.0.0.1:{port}/",
    "http://example.org@127.0.0.1:{port}/",
    "http://example.org\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\t/",
    "http:///etc/passwd",
    "http://",
    "http://[::1",
    "http://a:99999/",
    "ftp://127.0.0.1/",
    "gopher://127.0.0.1/",
    "/etc/passwd",
    "//127.0.0.1/",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file://localhost/etc/passwd",
    "",
]


def png(width: int, height: int) -> bytes:
    """A red PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    whole = png(1, 1)
    head = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


PICTURE = png(56, 56)


def film(width: int, height: int, frames: int, *, rate: float = 2) -> bytes:
    """A black GIF of so many frames, `rate` of them a second; each costs little to make, and is decoded by itself."""
    buffer = io.BytesIO()
    Image.new("P", (width, height)).save(buffer, "GIF", duration=1000 / rate)
    whole = buffer.getvalue()
    at = whole.index(b"\x21\xf9")  # what is before each frame
    return whole[:at] + whole[at:-1] * frames + whole[-1:]


FILM = film(56, 56, 8)


def asking(*urls: str, kind: str = "image_url") -> dict[str, Any]:
    parts = [{"type": kind, kind: {"url": url}} for url in urls]
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "图中有什么？"}]}]}


@contextmanager
def web(
    answer: Callable[[http.server.BaseHTTPRequestHandler], None],
    *,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """An http(s) server on loopback: its port, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()


def picture(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/webp")
    handler.end_headers()
    handler.wfile.write(PICTURE)


def moving(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "video/gif")
    handler.end_headers()
    handler.wfile.write(FILM)
