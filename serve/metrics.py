"""A server's /metrics as numbers, and what vLLM's say of its cache. Knows Prometheus' text form."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .client import key_here, root
from .http import get

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Prometheus' text form: name -> [(labels, value), ...]."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            name, labels, value = sample.groups()
            found.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), float(value)))
    return found


def metrics(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The server's /metrics. OSError when it has none."""
    address = f"{root(url)}/metrics"
    status, text = get(address, key=key_here())
    if status != 200:
        raise OSError(f"the server gives no metrics at {address} ({status})")
    return parse_metrics(text)


def cache_tokens(found: Mapping[str, list[tuple[dict[str, str], float]]]) -> int | None:
    """Tokens that the engine's key-value cache holds, by vLLM's own word in its metrics; None if it does not say.

    Its own sum where it has one (seen in 0.32): layers of several kinds share the blocks, which are then no tokens.
    """
    for labels, _ in found.get("vllm:cache_config_info", []):
        if labels.get("kv_cache_size_tokens", "").isdigit():
            return int(labels["kv_cache_size_tokens"])
        for blocks in ("num_gpu_blocks", "num_cpu_blocks"):  # the CPU backend counts its blocks under gpu too
            if labels.get(blocks, "").isdigit() and labels.get("block_size", "").isdigit():
                return int(labels[blocks]) * int(labels["block_size"])
    return None
