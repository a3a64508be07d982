"""Answers side by side for a page: the picture inlined and small, equal answers once, what differs marked.

Knows the report's folder, from which pictures come, and no model.
"""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE = 320  # pixels of a picture's longer side on the page


def answer(one: Mapping[str, Any], folder: Path, labels: Sequence[str]) -> dict[str, Any]:
    """A question with its picture and what was answered, labels that said the same together, for the template."""
    said: Mapping[str, str] = one.get("answers", {})
    own = said.get(labels[0]) if labels else None
    alike: dict[str, list[str]] = {}
    for label, text in {**({"reference": one["reference"]} if one.get("reference") else {}), **said}.items():
        alike.setdefault(str(text), []).append(label)
    shown, problem = inlined(folder, str(one.get("picture", "")))
    return {
        "picture": shown and shown[0],
        "width": shown and shown[1],
        "height": shown and shown[2],
        "alt": problem or str(one.get("task") or one.get("question", "")),
        "question": one.get("question", ""),
        "answers": [{"labels": " · ".join(who), "pieces": compared(text, own or text)} for text, who in alike.items()],
    }


def compared(text: str, other: str) -> list[tuple[bool, str]]:
    """The text in pieces (differs, words): what `other` has not at this place, by words or Chinese characters."""
    mine, theirs = (re.findall(r"\s+|[\u3400-\u9fff]|\w+|[^\w\s]", t) for t in (text, other))
    pieces = []
    for kind, a, b, _, _ in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        if b > a:
            pieces.append((kind != "equal", "".join(mine[a:b])))
    return pieces or [(bool(other), "(no answer)")]


def inlined(folder: Path, name: str) -> tuple[tuple[str, int, int] | None, str]:
    """((data URL, width, height), "") of a picture in `folder`, made small; or (None, why there is none).

    Only what lies just there is looked at: a report may come from anybody, and a page must not take in other files.
    """
    place = folder.resolve() / name
    try:
        if not name or place.resolve().parent != folder.resolve():
            return None, f"the report names no picture of its own folder: {name or 'none'}"
        with Image.open(place) as opened:
            opened.draft("RGB", (PICTURE, PICTURE))
            small = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        return None, f"{name} is not here, or no picture ({type(e).__name__})"
    small.thumbnail((PICTURE, PICTURE))
    kinds = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        held = io.BytesIO()
        small.save(held, kind, **options)
        kinds.append((len(held.getvalue()), kind, held.getvalue()))
    _, kind, data = min(kinds)
    return (f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *small.size), ""
