"""Files written behind the work's back: one thread saves, others hash, in order, while the next layer is computed.

A file appears under its name only when it is whole. Knows no method and no format.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..recipes.folder import headers
from .artifact import hash_file

PENDING = 2  # files whose tensors may wait in memory
PIECE = 2**24  # bytes copied at a time


class Writer:
    """Use as a context manager; leaving it waits for what was asked, or drops it when an error is on its way."""

    def __init__(self) -> None:
        self._saver, self._hashers = ThreadPoolExecutor(1), ThreadPoolExecutor(4)
        self._saving: list[Future[None]] = []
        self._hashes: dict[str, Future[str]] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._saver.shutdown(cancel_futures=kind is not None)
        self._hashers.shutdown(cancel_futures=kind is not None)

    def save(self, path: Path, tensors: Mapping[str, Tensor], beside: Mapping[Path, str]) -> None:
        """Write `tensors` to `path`, after the small text files `beside`. Waits when too much is pending; an error of
        an earlier file is raised here."""
        self._saving = [f for f in self._saving if not f.done() or f.result()]
        while len(self._saving) >= PENDING:
            self._saving.pop(0).result()
        computed = torch.cuda.Event() if any(t.is_cuda for t in tensors.values()) else None
        if computed is not None:
            computed.record()
        self._saving.append(self._saver.submit(self._save, path, dict(tensors), beside, computed))

    def _save(
        self, path: Path, tensors: dict[str, Tensor], beside: Mapping[Path, str], computed: torch.cuda.Event | None
    ) -> None:
        for file, text in beside.items():
            _replace(file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        whole = to_host(tensors, computed)
        tensors.clear()
        _replace(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
        self.hash(path)

    def copy(self, path: Path, tensors: Sequence[tuple[Path, str]]) -> None:
        """Write to `path` the named tensors of other safetensors files, byte for byte, beside everything else."""
        self._hashes[path.name] = self._hashers.submit(_copy_and_hash, path, tensors)

    def hash(self, path: Path) -> None:
        """Hash a file that is already there."""
        self._hashes[path.name] = self._hashers.submit(hash_file, path)

    def hashes(self) -> dict[str, str]:
        """Wait for everything; hex sha256 by file name."""
        while self._saving:
            self._saving.pop(0).result()
        return {name: future.result() for name, future in self._hashes.items()}


def to_host(tensors: Mapping[str, Tensor], computed: torch.cuda.Event | None) -> dict[str, Tensor]:
    """The tensors on the host. From a GPU through pinned memory and on a stream of its own, once `computed` has
    happened, so that the next layer's work does not wait for the copies."""
    if computed is None:
        return {n: t.detach().contiguous() for n, t in tensors.items()}
    stream = torch.cuda.Stream()
    found = {}
    with torch.cuda.stream(stream):
        stream.wait_event(computed)
        for name, tensor in tensors.items():
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            found[name].copy_(tensor.detach(), non_blocking=True)
    stream.synchronize()
    return found


def _copy_and_hash(path: Path, tensors: Sequence[tuple[Path, str]]) -> str:
    _replace(path, lambda temporary: copy_tensors(temporary, tensors))
    return hash_file(path)


def copy_tensors(path: Path, tensors: Sequence[tuple[Path, str]]) -> None:
    """Write a safetensors file with the tensors named (file, name), their bytes copied from where they lie. Takes
    constant memory, whatever their size. The layout is the format's: eight bytes of length, JSON, data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[tuple[Path, int, int]] = []
    place = 0
    known: dict[Path, tuple[dict[str, Any], int]] = {}
    for file, name in tensors:
        if file not in known:
            with file.open("rb") as f:
                known[file] = headers(file), 8 + struct.unpack("<Q", f.read(8))[0]
        header, data = known[file]
        begin, end = header[name]["data_offsets"]
        entries[name] = {**header[name], "data_offsets": [place, place + end - begin]}
        pieces.append((file, data + begin, end - begin))
        place += end - begin
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for file, begin, size in pieces:
            with file.open("rb") as f:
                f.seek(begin)
                while size:
                    piece = f.read(min(size, PIECE))
                    if not piece:
                        raise OSError(f"{file} became shorter while it was read")
                    out.write(piece)
                    size -= len(piece)


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
    except SafetensorError as e:  # "Error while serializing: I/O error: No space left on device (os error 28)"
        raise OSError(f"{path} cannot be written: {str(e).rpartition(': ')[2]}; what is finished is kept") from None
    temporary.chmod(0o644)  # safetensors writes 0600, which an engine under another user could not read
    os.replace(temporary, path)
