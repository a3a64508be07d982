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
from .client import Message
from .media import KINDS
from .request import InferRequest

FORMS = '{"messages": [...]} or {"query": ..., "response": ..., "history": [...]}, with "images", "videos", "audios"'


@dataclass(frozen=True)
class Question:
    """One row of a dataset: what is sent, and what is known of it. `where` is "file.jsonl:3", `about` the row's "task"
    and "id", `reference` its answer."""

    messages: Sequence[Message]
    where: str
    reference: str | None
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 (hex) of what is sent: the same for the same text and the same files."""
        text = json.dumps(self.messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def source_of(text: str | Path) -> tuple[Path, int | None]:
    """A dataset's path and how many of its rows are meant: all, or the first 100 of "file.jsonl#100".

    ValueError where that is no number above 0.
    """
    path = Path(text).expanduser()
    head, mark, count = str(path).rpartition("#")
    if path.exists() or not mark:
        return path, None
    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"{text}: after # comes how many rows are taken, as in {head}#100")
    return Path(head), int(count)


def questions(sources: Sequence[str | Path], *, system: str | None = None) -> Iterator[Question]:
    """The rows of the datasets, one after the other; `system` is the system message of those that have none.

    ValueError names the file, the line and what is wrong.
    """
    for source in sources:
        path, count = source_of(source)
        yield from islice(_questions(path, system), count)


def _questions(source: Path, system: str | None) -> Iterator[Question]:
    files, pictures = files_of(source)
    for file in files:
        for number, (messages, reference, about) in rows(file, lambda data, file=file: _row(data, file.parent, system)):
            yield Question(messages, f"{file.name}:{number}", reference, about)
    for picture in pictures:
        said = [{"role": "system", "content": system}] if system else []
        messages = InferRequest([*said, {"role": "user", "content": DESCRIBE}], [picture]).as_openai()
        yield Question(messages, str(picture.relative_to(source)), None, {})


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
            reference = "".join(part.get("text", "") for part in reference or () if isinstance(part, dict))
    if not messages:
        raise ValueError("there is an answer without a question")
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    about = {key: data[key] for key in ("task", "id") if isinstance(data.get(key), str | int)}
    return InferRequest(messages, **media).as_openai(folder=folder), reference, about


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
