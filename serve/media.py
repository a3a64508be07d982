"""Pictures and videos in a message: `<image>` and `<video>` in a text, and the OpenAI parts that come in their place.

Knows no server and no model; files are read and checked, addresses are passed on.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import image_url

TAG = re.compile(r"\(<(image|video)>\./</\1>\)|<(image|video)>")  # the first is as MiniCPM-V's own prompts have it
Medium = tuple[str, dict[str, Any]]  # "image" or "video", and its part of a message


def compose(text: str, media: Sequence[Medium], *, alone: bool) -> tuple[str | list[dict[str, Any]], list[Medium]]:
    """A message's content, its tags replaced by the next media of their kind, and the media left over; where the
    message is `alone` with them those stand before the text. ValueError for a tag without a medium.
    """
    if not media:
        return text, []
    left = list(media)
    parts: list[dict[str, Any]] = []
    at = 0

    def say(piece: str) -> None:
        if piece.strip():
            parts.append({"type": "text", "text": piece})

    for tag in TAG.finditer(text):
        kind = tag[1] or tag[2]
        first = next((i for i, (of, _) in enumerate(left) if of == kind), None)
        if first is None:
            raise ValueError(f"there are more <{kind}> tags than {kind}s")
        say(text[at : tag.start()])
        parts.append(left.pop(first)[1])
        at = tag.end()
    say(text[at:])
    if alone:
        parts, left = [item for _, item in left] + parts, []
    if all(item["type"] == "text" for item in parts):
        return text, left
    return parts, left


def part(kind: str, address: str) -> dict[str, Any]:
    """The part of a message for a picture or video: URLs as they are, a file as a data URL. ValueError names a file
    that is missing or no picture. Quotes that a terminal puts around a file dropped on it are taken off.
    """
    address = address.strip()
    if len(address) > 1 and address[0] == address[-1] and address[0] in "'\"":
        address = address[1:-1]
    url = image_url(address) if kind == "image" else _video_url(address)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _video_url(address: str) -> str:
    if re.match(r"(https?://|data:)", address):
        return address
    path = Path(address).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no video {path}") from None
    except OSError as e:
        raise ValueError(f"the video {path} cannot be read: {e.strerror}") from None
    return f"data:{mimetypes.guess_type(path.name)[0] or 'video/mp4'};base64,{base64.b64encode(data).decode('ascii')}"
