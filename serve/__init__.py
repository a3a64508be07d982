"""Who runs it: engines as command lines, launching, and talking to a server over HTTP.

`mmq.serve.launch`, `Client`, `InferRequest` and `RequestConfig` are api.py's, imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Client, InferRequest, RequestConfig, launch

__all__ = ["Client", "InferRequest", "RequestConfig", "launch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
