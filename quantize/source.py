"""A source of named tensors: a checkpoint's safetensors files, read one tensor at a time.

Knows nothing of models. `export` offers the same face over packed files, so that what reads weights need not care
whether they were ever int4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..recipes.folder import headers, shard_names

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Meta:
    """A tensor's shape and dtype, as the file's header has them. `dtype` is None for integers and fp8."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    nbytes: int


@dataclass(frozen=True)
class Source:
    """Named tensors: `metas` from headers alone; `get(name)` reads one onto the CPU; `files` says where each lies."""

    folder: Path
    metas: Mapping[str, Meta]
    get: Callable[[str], Tensor]
    files: Mapping[str, Path] = field(default_factory=dict)


def open_source(folder: Path) -> Source:
    """Open the checkpoint in `folder`: headers now, tensors on demand. Errors as in `headers` and `shard_names`."""
    where: dict[str, Path] = {}
    metas: dict[str, Meta] = {}
    for shard in shard_names(folder):
        path = folder / shard
        for name, item in headers(path).items():
            if name != "__metadata__":
                begin, end = item["data_offsets"]
                where[name] = path
                metas[name] = Meta(tuple(item["shape"]), DTYPES.get(item["dtype"]), end - begin)
    handles: dict[Path, Any] = {}

    def get(name: str) -> Tensor:
        path = where[name]
        try:
            if path not in handles:
                handles[path] = safe_open(path, framework="pt")
            return handles[path].get_tensor(name)
        except SafetensorError as e:
            raise OSError(f"{path}: {e}") from None

    return Source(folder, metas, get, where)
