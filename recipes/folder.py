"""Whether a folder holds a whole checkpoint: config, safetensors, and an index that agrees with them.

Reads headers only, so it costs milliseconds. Knows no architecture and no hub.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from .remote import INDEX, RemoteFile, weights

POINTER = b"version https://git-lfs"


def check(folder: Path) -> None:
    """OSError where a file is missing, cut off or a Git LFS pointer; ValueError where there are no safetensors."""
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} has no config.json; give the folder that holds the model, or a hub id")
    _json(folder / "config.json")
    shards = {}
    for name in shard_names(folder):
        shards[name] = headers(folder / name).keys()
    index = index_of(folder)
    if index is not None:
        for tensor, name in index["weight_map"].items():
            if tensor not in shards[name]:
                raise OSError(f"{folder}: {INDEX} places {tensor} in {name}, which does not hold it")


def index_of(folder: Path) -> dict[str, Any] | None:
    """The parsed index, or None where there is none. OSError where it is no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    index = _json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise OSError(f"{path} is no index: it has no weight_map; get the file again")
    return index


def shard_names(folder: Path) -> list[str]:
    """The names of the safetensors files that make the model. OSError where one is missing, ValueError for none."""
    index = index_of(folder)
    if index is None:
        here = [RemoteFile(p.name, p.stat().st_size) for p in sorted(folder.iterdir()) if p.is_file()]
        return [f.path for f in weights(str(folder), here)]
    names = sorted(set(index["weight_map"].values()))
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OSError(f"{folder} lacks {missing[0]}{more}, which {INDEX} names; get the missing files")
    return names


def _json(path: Path) -> Any:
    _no_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise OSError(f"{path} is not valid JSON ({e}); get the file again") from None


def headers(path: Path) -> dict[str, Any]:
    """The JSON header of one safetensors file: by tensor its dtype, shape and place, and perhaps `__metadata__`.

    8 bytes of length, the JSON, then exactly the bytes that the JSON counts: OSError when the file is missing, cut
    short, longer, a Git LFS pointer or nothing of the kind.
    """
    _no_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise OSError(f"{path} is no whole safetensors file ({size} bytes); get the file again")
        try:
            header = json.loads(file.read(length))
            ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            end = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OSError(f"{path} has no safetensors header; get the file again") from None
    if end != size:
        raise OSError(f"{path} has {size} bytes where its header counts {end}; get the file again")
    return header


def _no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise OSError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
