"""A source of named tensors: a checkpoint's safetensors files, read one tensor at a time.

Knows nothing of models. `export` offers the same face over packed files, so that what reads weights need not care
whether they were ever int4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
class Derived:
    """A tensor that no file holds as it is: `make` makes it of the stored tensors `parts`."""

    made: Meta
    parts: tuple[str, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """Named tensors: `metas` from headers alone; `get(name)` reads one onto the CPU; `files` says where each lies.

    `derived` are further names that `get` and `meta` take, of tensors that are made of stored ones."""

    folder: Path
    metas: Mapping[str, Meta]
    get: Callable[[str], Tensor]
    files: Mapping[str, Path] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    slices: Callable[[str, Any], Tensor] | None = None

    def part(self, name: str, index: Any) -> Tensor:
        """`get(name)[index]`, read from the file alone where there is one."""
        return self.get(name)[index] if self.slices is None else self.slices(name, index)

    def meta(self, name: str) -> Meta:
        """Shape, dtype and size of a stored or derived tensor."""
        return self.derived[name].made if name in self.derived else self.metas[name]

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors behind a name: itself, or what it is made of."""
        return self.derived[name].parts if name in self.derived else (name,)


def with_derived(source: Source, derived: Mapping[str, Derived]) -> Source:
    """The source with these tensors beside its own."""
    every = {**source.derived, **derived}
    return replace(source, get=lambda name: every[name].make() if name in every else source.get(name), derived=every)


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

    def read(name: str, how: Callable[[Any], Tensor]) -> Tensor:
        path = where[name]
        try:
            if path not in handles:
                handles[path] = safe_open(path, framework="pt")
            return how(handles[path])
        except SafetensorError as e:
            raise OSError(f"{path}: {e}") from None

    def get(name: str) -> Tensor:
        return read(name, lambda handle: handle.get_tensor(name))

    def part(name: str, index: Any) -> Tensor:
        return read(name, lambda handle: handle.get_slice(name)[index])

    return Source(folder, metas, get, where, slices=part)
