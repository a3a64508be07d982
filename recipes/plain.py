"""Files that anybody may have made, read within bounds: JSON of a stated size and depth, names that stay in their
folder, folders without pipes, devices and links that lead out of them. Knows no model and no format.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MIB = 1 << 20
LARGEST = 64 * MIB  # bytes of a JSON file: the index of the largest mixtures has about 10 MiB
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def read_json(path: Path, *, most: int = LARGEST, unique: bool = False) -> Any:
    """The JSON in a plain file of at most `most` bytes; with `unique` no object may name a key twice. OSError where it
    is no such file (FileNotFoundError where there is none), ValueError where it is not JSON."""
    return parse_json(read_bytes(path, most=most), where=str(path), unique=unique)


def read_bytes(path: Path, *, most: int = LARGEST) -> bytes:
    """A plain file's bytes. OSError for a folder, a pipe, a device (which might never end) and more than `most`."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no plain file; put the file itself there")
    if found.st_size > most:
        raise OSError(f"{path} has {found.st_size} bytes, where at most {most} are read; it is no such file")
    with path.open("rb") as file:
        return file.read(most)


def parse_json(data: bytes, *, where: str, unique: bool = False) -> Any:
    """UTF-8 JSON. ValueError, whatever is wrong: no JSON, no UTF-8, nested too deep, a number too long, and with
    `unique` a key that stands twice."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once if unique else None)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where} is not valid JSON (line {e.lineno}: {e.msg})") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{where} is not valid JSON (not UTF-8 at byte {e.start + 1})") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON (nested too deep)") from None
    except ValueError as e:  # a number of more digits than Python reads, a key twice
        raise ValueError(f"{where} is not valid JSON ({str(e).split(';')[0]})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def object_of(data: Any, *, where: str) -> dict[str, Any]:
    """`data`, where it is a JSON object. ValueError where it is anything else."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, and is {type(data).__name__}")
    return data


def is_plain_name(name: object) -> bool:
    """Whether `name` can only mean an entry of the folder that it is looked up in, on any system: no separator of
    either kind, no `.` or `..`, no control or direction character."""
    if not isinstance(name, str) or not name or name in (".", "..") or len(name.encode("utf-8", "replace")) > 255:
        return False
    return not (set("/\\:") & set(name) or CONTROL.search(name) or name != name.strip())


def check_names(names: Iterable[object], *, where: str) -> None:
    """ValueError for a name that might lead out of its folder, and for two that are one file on some systems."""
    seen: dict[str, str] = {}
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"{where} names the file {shown(repr(name))}; only files of the same folder can be named")
        name = str(name)
        if (before := seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            raise ValueError(f"{where} names {shown(before)} and {shown(name)}, which many systems take for one file")


def check_entries(folder: Path) -> None:
    """OSError for what no model's folder has: a pipe, socket or device, itself or by a link; and a link to a file
    outside that is not weights, whose content would be taken for the model's and be passed on with it.

    Links into the blobs of a hub's cache lead out of a snapshot and belong to it. Links to nowhere are left to whoever
    wants the file.
    """
    try:
        home = folder.resolve()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise OSError(f"no folder {folder}") from None
    except RuntimeError:  # Python 3.11 says so of links in a circle
        raise OSError(f"{folder}: symbolic links in a circle") from None
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for entry in entries:
        path = folder / entry.name
        try:
            mode = entry.stat().st_mode
        except OSError:  # leads nowhere, or in a circle
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(f"{shown(path)} is a pipe, a socket or a device; no model has such a file, take it away")
        if entry.is_symlink() and not entry.name.endswith(".safetensors"):
            target = path.resolve()
            if not any(target.is_relative_to(one) for one in homes):
                raise OSError(
                    f"{shown(path)} is a link to {shown(target)}, outside the folder; "
                    "if that is meant, put a copy of the file in its place"
                )


def shown(text: object) -> str:
    """Text for a terminal: control characters, which could move its cursor, repaint lines or turn the direction of
    reading, by their numbers; line ends and tabs as they are."""
    return CONTROL.sub(lambda m: m[0] if m[0] in "\n\t" else _number(m[0]), str(text))


def _number(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
