"""One GET, by the standard library and without the environment's proxies: servers here are most often on loopback."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, *, timeout: float = 10.0, key: str | None = None) -> tuple[int, str]:
    """(status, text) of an http(s) address, asked with the API key where there is one. OSError when nobody answers
    within `timeout` seconds."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            return reply.status, reply.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode("utf-8", "replace")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        raise OSError(f"no server answers at {url}: {getattr(e, 'reason', None) or e}") from None
