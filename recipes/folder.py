"""Whether a folder holds a whole checkpoint: config, safetensors, and an index that agrees with them.

Reads headers only, so it costs milliseconds. Knows no architecture and no hub.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from .plain import check_entries, check_names, object_of, parse_json, read_json
from .remote import INDEX, RemoteFile, no_model, weights
from .sizes import check_sizes

POINTER = b"version https://git-lfs"
BESIDE = (
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "tokenizer_config.json", "generation_config.json", "chat_template.json"),
    *("quantize_config.json", "quant_config.json", "quantization_config.json"),
)
LONGEST = 32 << 20  # bytes of a header; 200,000 tensors take about 22 MB


def check(folder: Path) -> None:
    """OSError where a file is missing, cut off or a Git LFS pointer; ValueError where there are no safetensors."""
    check_entries(folder)
    read_config(folder)
    check_beside(folder)
    shards = {}
    for name in shard_names(folder):
        shards[name] = headers(folder / name).keys()
    index = index_of(folder)
    if index is not None:
        for tensor, name in index["weight_map"].items():
            if tensor not in shards[name]:
                raise OSError(f"{folder}: {INDEX} places {tensor} in {name}, which does not hold it")


def check_beside(folder: Path) -> None:
    """OSError where a settings file beside config.json is no JSON object, or names sizes that no picture has."""
    for name in BESIDE:
        if (folder / name).is_file():
            try:
                check_sizes(object_of(_json(folder / name), where=str(folder / name)), where=str(folder / name))
            except ValueError as e:
                raise OSError(str(e)) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. OSError where there is none, where it is no JSON object, and for sizes that no model
    has, which would keep whoever builds it busy for ever."""
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and (other := no_model([p.name for p in folder.iterdir()])):
            raise OSError(f"{folder} {other}")
        raise OSError(f"{folder} has no config.json; give the folder that holds the model, or a hub id")
    config = _json(path)
    try:
        check_sizes(object_of(config, where=str(path)), where=str(path))
    except ValueError as e:
        raise OSError(str(e)) from None
    return config


def index_of(folder: Path) -> dict[str, Any] | None:
    """The parsed index, or None where there is none. OSError where it is no index, ValueError where it names a file
    elsewhere."""
    path = folder / INDEX
    if not path.is_file():
        return None
    index = _json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise OSError(f"{path} is no index: it has no weight_map; get the file again")
    for name in index["weight_map"].values():
        if not isinstance(name, str):
            raise OSError(f"{path} is no index: its weight_map names a file that is no text; get the file again")
    check_names({part for name in index["weight_map"].values() for part in name.split("/")}, where=str(path))
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
        return read_json(path)
    except ValueError as e:
        raise OSError(f"{e}; get the file again") from None


def headers(path: Path) -> dict[str, Any]:
    """The JSON header of one safetensors file: by tensor its dtype, shape and place, and perhaps `__metadata__`.

    8 bytes of length, the JSON, then exactly the bytes that the JSON counts: OSError when the file is missing, cut
    short, longer, a Git LFS pointer or nothing of the kind, and for all that the safetensors library refuses: places
    that overlap or leave holes, shapes that are no sizes or not those of the bytes.
    """
    from safetensors import SafetensorError, safe_open

    _no_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise OSError(f"{path} is no whole safetensors file ({size} bytes); get the file again")
        if length > LONGEST:
            raise OSError(
                f"{path} has a header of {length} bytes, where at most {LONGEST} are read; get the file again"
            )
        try:
            header = parse_json(file.read(length), where=str(path))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise OSError(f"{path} has no safetensors header; get the file again") from None
    if end != size:
        raise OSError(f"{path} has {_short(size)} bytes where its header counts {_short(end)}; get the file again")
    try:
        with safe_open(path, framework="np"):
            return header
    except SafetensorError as e:
        raise OSError(
            f"{path} is no sound safetensors file ({str(e).rpartition(': ')[2]}); get the file again"
        ) from None


def _short(number: object) -> str:
    text = str(number) if not isinstance(number, int) or abs(number) < 1 << 70 else "more than any disk's"
    return text if len(text) <= 30 else f"{text[:27]}..."


def _no_pointer(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no plain file; put the file itself there")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise OSError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
