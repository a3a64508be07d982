"""`python -m mmq_lmdeploy serve api_server ...`: LMDeploy's own command, mmq's guard before its server.

LMDeploy has no way to add a middleware and takes API keys on the command line alone; and beside OpenAI's face its
server has routes that load weights, free the cache or end it, open to everybody. Only ROUTES are let through.
"""

from __future__ import annotations

import sys
from typing import Any

ROUTES = ("/v1/", "/health", "/metrics")
REFUSED = b'{"error": {"message": "no such route on this server", "type": "NotFoundError", "code": 404}}'


def opened(app: Any) -> Any:
    """The application with no other routes than ROUTES."""

    async def only(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].startswith(ROUTES):
            return await app(scope, receive, send)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(REFUSED)).encode())]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": REFUSED})

    return only


def main() -> None:
    """LMDeploy's command, its server run behind the guard."""
    import uvicorn
    from mmq_guard import Guard

    run = uvicorn.run
    uvicorn.run = lambda app, **options: run(Guard(opened(app)), **options)  # what LMDeploy calls when the model is up
    from lmdeploy.cli import run as command  # pyright: ignore[reportMissingImports]

    sys.argv[0] = "lmdeploy"
    command()


if __name__ == "__main__":
    main()
