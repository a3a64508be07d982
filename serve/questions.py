"""A dataset as questions: each line of a JSONL file as the messages that are sent, its known answer beside them.

Media are what `media.conversation` takes, web addresses and videos too; nothing is decoded but pictures, to see that
they can be. For calibration, where pixels are wanted, there is recipes/reading.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..recipes.reading import DESCRIBE, files_of, from_query, rows
from ..recipes.samples import source_of
from .client import Message
from .media import KINDS
from .request import InferRequest

FORMS = '{"messages": [...]} or {"query": ..., "response": ..., "history": [...]}, with "images", "videos", "audios"'


@dataclass(frozen=True)
class Question:
    """One row of a dataset: what is sent, and what is known of it. `mark` is the sha256 (hex) of the messages, the same
    for the same text and the same files; `where` "file.jsonl:3", `about` the row's "task" and "id", `reference` its
    answer."""

    messages: Sequence[Message]
    mark: str
    where: str
    reference: str | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A row of a dataset as it was read: the JSON of a file's line, or a picture of a folder (number 0)."""

    file: Path
    number: int
    data: Any

    @property
    def where(self) -> str:
        """As "file.jsonl:3"."""
        return f"{self.file.name}:{self.number}" if self.number else self.file.name


def read_lines(sources: Sequence[str | Path]) -> Iterator[Line]:
    """The rows of the datasets, one after the other, as they were read. ValueError for what is no JSON."""
    for source in sources:
        path, count = source_of(source)
        yield from islice(_lines(path), count)


def _lines(source: Path) -> Iterator[Line]:
    files, pictures = files_of(source)
    for file in files:
        for number, data in rows(file, lambda data: data):
            yield Line(file, number, data)
    for picture in pictures:
        yield Line(picture, 0, {"query": DESCRIBE, "images": [picture.name]})


def question_of(line: Line, *, system: str | None = None) -> Question:
    """A row as what is sent, its files read; `system` is its system message where it has none. ValueError names the
    file, the line and what is wrong."""
    try:
        messages, reference, about = _row(line.data, line.file.parent, system)
    except ValueError as e:
        raise ValueError(f"{line.file}, line {line.number}: {e}" if line.number else str(e)) from None
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Question(messages, mark, line.where, reference, about)


def _row(data: Any, folder: Path, system: str | None) -> tuple[Sequence[Message], str | None, dict[str, Any]]:
    if not isinstance(data, dict) or not ("messages" in data or "query" in data):
        raise ValueError(f"no messages; a line is {FORMS}")
    media = {f"{kind}s": _listed(data, f"{kind}s") for kind in KINDS}
    if "messages" in data:
        messages = data["messages"]
    else:
        messages = from_query(data, "".join(f"<{kind}>" * len(media[f"{kind}s"]) for kind in KINDS))
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is empty or no list of messages")
    reference = None
    if messages[-1].get("role") == "assistant":
        reference, messages = messages[-1].get("content"), messages[:-1]
        if not isinstance(reference, str):
            parts = reference or []
            if not isinstance(parts, list) or not all(isinstance(_text(part), str) for part in parts):
                raise ValueError("the last answer must be text, or a list of parts of text")
            reference = "".join(map(_text, parts))
    if not messages:
        raise ValueError("there is an answer without a question")
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    about = {key: data[key] for key in ("task", "id") if isinstance(data.get(key), str | int)}
    return InferRequest(messages, **media).as_openai(folder=folder), reference, about


def _text(part: Any) -> Any:
    return part.get("text", "") if isinstance(part, dict) else None


def _listed(data: dict[str, Any], key: str) -> list[str]:
    """The addresses under `key`: one, or a list of them, each itself or as {"path": ...} or {"url": ...}."""
    given = data.get(key) or []
    found = []
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, dict):
            item = item.get("url") or item.get("path")
        if not isinstance(item, str) or not item:
            raise ValueError(f"{key} must be a list of paths, web or data addresses")
        found.append(item)
    return found
