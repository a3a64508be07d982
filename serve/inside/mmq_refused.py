"""How the guard says no: an HTTP status and why, as OpenAI's servers write it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

LINGER_SECONDS = 10.0  # for what is left of a body that was refused


class Refused(Exception):
    """A request that is not let in: an HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


async def refuse(scope: Any, receive: Any, send: Any, no: Refused, *, unread: bool) -> None:
    """Answer with the refusal, in the form of OpenAI's.

    What is `unread` of the body is read on for a while and thrown away: many clients look for an answer only when they
    have sent everything, and lose it where the connection is closed before.
    """
    if scope["type"] == "websocket":
        await receive()
        return await send({"type": "websocket.close", "code": 1008, "reason": str(no)[:120]})
    kind = {401: "authentication_error", 503: "service_unavailable"}.get(no.status, "invalid_request_error")
    error = {"message": str(no), "type": kind, "param": None, "code": no.status}
    body = json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += {
        401: [(b"www-authenticate", b"Bearer")],
        408: [(b"connection", b"close")],
        503: [(b"retry-after", b"10"), (b"connection", b"close")],
    }.get(no.status, [])
    await send({"type": "http.response.start", "status": no.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    until = time.monotonic() + LINGER_SECONDS
    while unread and time.monotonic() < until:
        waiting = asyncio.ensure_future(receive())
        await asyncio.wait([waiting], timeout=until - time.monotonic())
        unread = waiting.done() and bool(waiting.result().get("more_body"))
        waiting.cancel()
    await send({"type": "http.response.body", "body": b"", "more_body": False})
