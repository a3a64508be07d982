"""Folders, files and rows that wish somebody ill, made by small functions."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def model(out: Path) -> Path:
    """The embedded model's folder once more, its weights by a link."""
    from mmq.recipes.pebble import model_folder

    out.mkdir(parents=True)
    for path in model_folder().iterdir():
        if path.suffix == ".safetensors":
            (out / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, out / path.name)
    return out


def artifact(made: Path, out: Path, **changes: Any) -> Path:
    """A copy of an artifact, keys of its manifest changed."""
    shutil.copytree(made, out)
    manifest = json.loads((out / "mmq.json").read_text(encoding="utf-8"))
    (out / "mmq.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return out


def write(folder: Path, name: str, data: str | bytes) -> None:
    """A file in place of whatever stands there."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def config(folder: Path, **changes: Any) -> None:
    """config.json with other values; `a__b` means b within a."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        *outer, last = name.split("__")
        inside = said
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = value
    write(folder, "config.json", json.dumps(said))


def index(folder: Path, *names: Any) -> None:
    """An index that places a tensor in each of these files."""
    write(folder, INDEX, json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))


def tensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file: the length, the header (bytes as they are, else as JSON), the data."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(shape: Any = (2,), places: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(places)}


def deep(levels: int = 100_000) -> bytes:
    """JSON that is nothing but brackets."""
    return b"[" * levels + b"]" * levels


class Touch:
    """Unpickled, it makes a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def pickled(path: Path) -> bytes:
    """What torch.save makes of an object that makes the folder `path` when it is loaded."""
    import torch

    buffer = io.BytesIO()
    torch.save({"model": Touch(path)}, buffer)
    return buffer.getvalue()


def python_that_makes(path: Path) -> str:
    """A module that makes the folder `path` when it is imported."""
    return f"import os\nos.mkdir({str(path)!r})\nclass Evil: pass\n"
