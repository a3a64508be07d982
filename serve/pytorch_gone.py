"""Whether the client of a request to the PyTorch engine still waits: transformers serve would draw a whole answer to
its end for nobody. Knows neither torch nor a model.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

GONE: ContextVar[threading.Event] = ContextVar("gone")  # of the request under way: set when its client is gone


def heeding(app: Any) -> Any:
    """The ASGI app with `GONE` of each request, whose body has come whole: it is set when the client leaves."""

    async def heeded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        gone, left = threading.Event(), asyncio.Event()
        GONE.set(gone)
        bodies = [await receive()]

        async def until_left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            left.set()

        async def given() -> Any:
            if bodies:
                return bodies.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        watch = asyncio.ensure_future(until_left())
        try:
            return await app(scope, given, send)
        finally:
            watch.cancel()

    return heeded
