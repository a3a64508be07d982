"""Pictures, videos and sounds in a conversation, in whichever form people write them, as the parts that servers take.

Knows no server and no model; files are read and checked, web and data addresses are passed on.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .client import Message, image_url

KINDS = ("image", "video", "audio")
TAG = re.compile(rf"\(<({'|'.join(KINDS)})>\./</\1>\)|<({'|'.join(KINDS)})>")  # the first is in MiniCPM-V's own prompts
PASSED_ON = ("detail", "uuid", "cache_control")  # what a server's part may say beside its address
USUAL_TYPE = {"video": "video/mp4", "audio": "audio/wav"}  # of a file whose name does not tell
Medium = tuple[str, dict[str, Any]]  # "image", "video" or "audio", and its part of a message


def part(kind: str, address: str | Path, *, folder: Path = Path()) -> dict[str, Any]:
    """The part of a message for one medium: web and data addresses as they are, a file (relative to `folder`) as a data
    URL. ValueError names a file that is missing or no picture. Quotes that a terminal puts around a file dropped on it
    are taken off.
    """
    address = str(address).strip()
    if len(address) > 1 and address[0] == address[-1] and address[0] in "'\"":
        address = address[1:-1]
    if not re.match(r"(https?://|data:)", address):
        path = Path(unquote(urlsplit(address).path)) if address.startswith("file://") else Path(address).expanduser()
        address = image_url(folder / path) if kind == "image" else _data_url(kind, folder / path)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def media_of(
    images: Sequence[str | Path] = (),
    videos: Sequence[str | Path] = (),
    audios: Sequence[str | Path] = (),
    *,
    folder: Path = Path(),
) -> list[Medium]:
    """Those of three lists, for `compose` and `conversation`."""
    named = zip(KINDS, (images, videos, audios), strict=True)
    return [(kind, part(kind, address, folder=folder)) for kind, addresses in named for address in addresses]


def compose(text: str, media: Sequence[Medium], *, alone: bool) -> tuple[str | list[dict[str, Any]], list[Medium]]:
    """A message's content, its tags replaced by the next media of their kind, and the media left over; where the
    message is `alone` with them those stand before the text. ValueError for a tag without a medium.
    """
    if not media:
        return text, []
    left = list(media)
    parts = list(_tagged(text, left))
    if alone:
        parts, left = [item for _, item in left] + parts, []
    if all(item["type"] == "text" for item in parts):
        return text, left
    return parts, left


def conversation(
    messages: Sequence[Message], media: Sequence[Medium] = (), *, folder: Path = Path()
) -> list[dict[str, Any]]:
    """The messages as servers take them.

    Parts may be OpenAI's ({"type": "image_url", "image_url": {"url": ...} or the address itself}, video_url, audio_url)
    or {"type": "image", "image": ...}, video, audio. With `media` the tags and the empty parts ({"type": "image"}) of
    the user's messages take the next of their kind; one user message without any has them before its text. Without
    `media` a tag is text. ValueError where places and media differ in number, or a part is none of these.
    """
    left = list(media)
    users = [at for at, message in enumerate(messages) if _role(message) == "user"]
    sent: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str):
            if media and at in users:
                content, left = compose(content, left, alone=len(users) == 1)
        elif isinstance(content, list | tuple):
            taking = left if media and at in users else None
            content = [piece for given in content for piece in _piece(given, taking, folder)]
            if taking and len(users) == 1:
                content, left = [item for _, item in taking] + content, []
        elif content is not None or message["role"] in ("system", "user"):  # an assistant's tool calls have none
            raise ValueError(
                f"the {message['role']}'s content is {_short(content)}; it must be text or a list of parts"
            )
        sent.append({**message, "content": content})
    if left:
        kinds = ", ".join(sorted({kind for kind, _ in left}))
        raise ValueError(
            f"{len(left)} more ({kinds}) than there are tags for them; write <image> where a picture stands"
        )
    return sent


def _role(message: Message) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ValueError(f"a message is {_short(message)}; its role must be system, user, assistant or tool")
    return role


def _tagged(text: str, left: list[Medium]) -> Iterator[dict[str, Any]]:
    """The parts of a text with tags, which take from `left`."""
    at = 0
    for tag in TAG.finditer(text):
        if text[at : tag.start()].strip():
            yield {"type": "text", "text": text[at : tag.start()]}
        yield _next(tag[1] or tag[2], left)
        at = tag.end()
    if text[at:].strip():
        yield {"type": "text", "text": text[at:]}


def _next(kind: str, left: list[Medium]) -> dict[str, Any]:
    for at, (of, item) in enumerate(left):
        if of == kind:
            del left[at]
            return item
    raise ValueError(f"there are more <{kind}> tags than {kind}s")


def _piece(given: Any, left: list[Medium] | None, folder: Path) -> Iterator[dict[str, Any]]:
    """The parts that one part becomes; `left` are the media that tags and empty places take, None where none came."""
    if isinstance(given, str):
        given = {"type": "text", "text": given}
    said = given.get("type") if isinstance(given, dict) else None
    kind = str(said).removeprefix("input_").removesuffix("_url")
    if said == "text" and isinstance(given.get("text"), str):
        yield from (_tagged(given["text"], left) if left is not None and TAG.search(given["text"]) else [dict(given)])
    elif said == "input_audio":
        yield dict(given)  # OpenAI's own form, bytes and format
    elif kind in KINDS:
        more = {key: value for key, value in given.items() if key in PASSED_ON}
        address, unknown = _address(kind, {k: v for k, v in given.items() if k not in (*PASSED_ON, "type")})
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} of a part of type {said} is not for a server; sizes and frames are set for a "
                'whole request, as in --extra \'{"mm_processor_kwargs": {"max_pixels": 501760}}\''
            )
        yield (part(kind, address, folder=folder) if address else _next(kind, left or [])) | more
    else:
        raise ValueError(
            f"a part is {_short(given)}; its type must be text, image, image_url, video, video_url or audio"
        )


def _address(kind: str, rest: dict[str, Any]) -> tuple[str, list[str]]:
    """Where the medium of a part is ("" for an empty place), and the keys that say something else."""
    for key in (f"{kind}_url", kind, "url", "path"):
        if rest.get(key):
            found = rest.pop(key)
            if isinstance(found, dict):
                found = found.get("url") or found.get("path")
            if not isinstance(found, str | Path) or not str(found).strip():
                raise ValueError(f"{key} is {_short(found)}; it must be a path, a web or a data address")
            return str(found), list(rest)
    return "", [key for key in rest if rest[key] is not None]


def _data_url(kind: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no {kind} {path}") from None
    except OSError as e:
        raise ValueError(f"the {kind} {path} cannot be read: {e.strerror}") from None
    guessed = mimetypes.guess_type(path.name)[0] or ""
    kept = guessed if guessed.startswith(f"{kind}/") else USUAL_TYPE[kind]
    return f"data:{kept};base64,{base64.b64encode(data).decode('ascii')}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:45] + "..." + text[-12:]
