"""Sample: one conversation with its pictures; its digest, and its form for an OpenAI-compatible server.

Knows no model, no chat template and no tensor: a sample is text and pixels. PIL is imported on use. The readers of
JSONL files and folders are in reading.py; `load` is their door.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sample:
    """Chat messages and their media.

    A message is {"role": str, "content": str | list of parts}. A part is {"type": "text", "text": str}, or a place
    {"type": "image"} or {"type": "video"}; places stand in the order of `images` and `videos` (frames, as the
    model's processor takes them). The last message is the assistant's answer where it is known. `task` names a kind
    of question, for scores task by task. ValueError where places and media differ in number.
    """

    messages: list[dict[str, Any]]
    images: tuple[Image, ...] = ()
    videos: tuple[Any, ...] = ()
    task: str | None = None

    def __post_init__(self) -> None:
        for kind, media in (("image", self.images), ("video", self.videos)):
            places = _places(self.messages, kind)
            if places != len(media):
                raise ValueError(f"the messages have {places} places for {kind}s, but {len(media)} came with them")

    @property
    def answer(self) -> str | None:
        """The text of the assistant's last message, or None where the conversation ends with a question."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part["text"] for part in content if part["type"] == "text")

    @property
    def question(self) -> Sample:
        """The same sample without its final answer (itself where there is none)."""
        if self.answer is None:
            return self
        left = self.messages[:-1]
        return replace(
            self,
            messages=left,
            images=self.images[: _places(left, "image")],
            videos=self.videos[: _places(left, "video")],
        )


def _places(messages: list[dict[str, Any]], kind: str) -> int:
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return sum(part["type"] == kind for part in parts)


def blind(sample: Sample) -> Sample:
    """The same conversation with its pictures and videos taken out."""
    messages = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [part for part in content if part["type"] == "text"]
        messages.append({**message, "content": content})
    return replace(sample, messages=messages, images=(), videos=())


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


def load(source: str | Path, *, count: int | None = None) -> list[Sample]:
    """The first `count` samples (None: all) of a JSONL file, a folder with *.jsonl, or a folder of pictures; of
    "file.jsonl#100" the first 100 at most.

    A line is {"messages": [...]} with OpenAI parts, the same beside "images": [...] with <image> tags or image parts
    where the pictures stand, or {"query": ..., "response": ..., "images": [...]}. Paths are relative to the file.
    A folder of pictures gives one "Describe this picture." each. ValueError names file, line and what is wrong.
    """
    from .reading import read

    if count is not None and count < 1:
        raise ValueError(f"{count} samples asked of {source}; ask for 1 or more")
    path, most = source_of(source)
    found = list(islice(islice(read(path), most), count))
    if not found:
        raise ValueError(f"{source} holds no samples")
    return found


def digest(samples: Iterable[Sample]) -> str:
    """sha256 (hex) over the messages and the pixels, in order: the same data gives the same digest on any machine."""
    sha = hashlib.sha256()

    def put(data: bytes) -> None:
        # The length goes first, so that no two sequences of pieces run together into the same bytes.
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)

    for sample in samples:
        put(json.dumps(sample.messages, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode())
        for media in (*sample.images, *sample.videos):
            for piece in _pixels(media):
                put(piece)
    return sha.hexdigest()


def _pixels(media: Any) -> Iterable[bytes]:
    if isinstance(media, list | tuple):  # a video as a list of frames
        yield f"frames {len(media)}".encode()
        for frame in media:
            yield from _pixels(frame)
    elif hasattr(media, "mode"):  # a PIL image
        yield f"{media.mode} {media.size}".encode()
        yield media.tobytes()
    elif hasattr(media, "dtype"):  # an array of frames
        yield f"{media.dtype} {tuple(media.shape)}".encode()
        yield media.tobytes()
    else:
        raise ValueError(f"a {type(media).__name__} is no picture and no video; give PIL images or arrays of frames")


def as_openai(sample: Sample) -> list[dict[str, Any]]:
    """The messages for the openai client, each picture a base64 PNG data URL in its place. ValueError on videos."""
    if sample.videos:
        raise ValueError("a video cannot be sent as pixels; send its frames as images")
    images = iter(sample.images)

    def part(item: dict[str, Any]) -> dict[str, Any]:
        if item["type"] == "image":
            return {"type": "image_url", "image_url": {"url": _data_url(next(images))}}
        return {"type": "text", "text": item["text"]}

    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [part(item) for item in m["content"]]}
        for m in sample.messages
    ]


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
