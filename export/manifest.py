"""What mmq.json must be before anything reads it: the kinds of its keys, names of its own folder, hashes that are some.

A published artifact's manifest is anybody's file. What no reader asks for may be anything. Knows no artifact's content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ..recipes.plain import CONTROL, check_names

MAPS, MAYBE = (dict,), (dict, NoneType)
NEEDED: Mapping[str, tuple[type, ...]] = {  # a key within another by a dot
    **dict.fromkeys(("recipe", "base", "files", "versions"), MAPS),
    **dict.fromkeys(("name", "method", "format", "base.hub", "recipe.name"), (str,)),
    **dict.fromkeys(("base.model", "base.revision"), (str, NoneType)),
    **dict.fromkeys(("base.weight_bytes", "group_size"), (int,)),
    **dict.fromkeys(("quantized", "layers", "recipe.keep"), (list,)),
}
MORE: Mapping[str, tuple[type, ...]] = {  # where they are there
    **dict.fromkeys(("calibration", "head", "converted_from"), MAYBE),
    **dict.fromkeys(("backend", "key"), MAPS),
    **dict.fromkeys(("notes", "paces"), (list,)),
    **dict.fromkeys(("head.name", "backend.backend", "backend.version"), (str,)),
    "recipe.version": (int,),
}
ITEMS = {"quantized": str, "notes": str, "recipe.keep": str, "layers": dict, "paces": dict}  # of lists
HASH = re.compile("[0-9a-f]{64}")
MISSING = object()


def check_manifest(manifest: Any, file: Path) -> None:
    """OSError, which names `file`, for a manifest that mmq did not write."""
    if wrong := next(_wrong(manifest), None):
        raise OSError(f"{file}: damaged ({wrong}); quantize again")
    try:
        check_names(manifest["files"], where=str(file))
    except ValueError as e:
        raise OSError(str(e)) from None
    for name, entry in manifest["files"].items():
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
        if not known or not HASH.fullmatch(entry["sha256"]):
            raise OSError(f"{file}: damaged ({name} has no size and sha256); quantize again")


def _wrong(manifest: Any) -> Iterator[str]:
    for key, kinds in {**NEEDED, **MORE}.items():
        value = _at(manifest, key)
        right = type(value) in kinds or (value is MISSING and key in MORE)
        if not right or (key in ITEMS and value is not MISSING and any(type(one) is not ITEMS[key] for one in value)):
            yield f"{key} is missing or of another kind"
    if CONTROL.search(manifest["name"]):
        yield "name is missing or of another kind"
    for layer in manifest["layers"]:
        if any(type(layer.get(key, {})) is not dict for key in ("errors", "fallbacks")):
            yield "layers is missing or of another kind"


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part, MISSING) if isinstance(tree, dict) else MISSING
    return tree
