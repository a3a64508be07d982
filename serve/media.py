"""Pictures, videos and sounds that a user names, as the parts of a conversation that servers take.

Knows no server and no model; files are read and checked, web and data addresses are passed on. The forms in which a
conversation may be written are `inside/mmq_parts.py`'s, for servers take them too.
"""

from __future__ import annotations

import base64
import binascii
import io
import mimetypes
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..recipes.plain import read_bytes
from ..recipes.reading import PICTURE, opened
from .client import Message
from .inside import mmq_parts
from .inside.mmq_parts import BARE, KINDS, TAG, USUAL_TYPE, Medium, compose

__all__ = ["KINDS", "TAG", "Medium", "compose", "conversation", "image_url", "media_of", "part", "user_message"]

LARGEST = 1 << 30  # bytes of a video's or a sound's file
SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


def part(kind: str, address: str | Path, *, folder: Path = Path()) -> dict[str, Any]:
    """The part of a message for one medium: web and data addresses as they are, a file (relative to `folder`) and bare
    base64 as a data URL. ValueError names a file that is missing or no picture. Quotes that a terminal puts around a
    file dropped on it are taken off.
    """
    address = str(address).strip()
    if len(address) > 1 and address[0] == address[-1] and address[0] in "'\"":
        address = address[1:-1]
    if kind == "image" and BARE.fullmatch(address):
        try:
            address = _sent(base64.b64decode(address), named="in base64")
        except binascii.Error as e:
            raise ValueError(f"the picture {address[:20]}... is neither a file nor base64: {e}") from None
    elif not re.match(r"(https?://|data:)", address) and not BARE.fullmatch(address):
        path = Path(unquote(urlsplit(address).path)) if address.startswith("file://") else Path(address).expanduser()
        address = image_url(folder / path) if kind == "image" else _data_url(kind, folder / path)
    return mmq_parts.url_part(kind, address)


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


def conversation(
    messages: Sequence[Message], media: Sequence[Medium] = (), *, folder: Path = Path()
) -> list[dict[str, Any]]:
    """The messages as servers take them, as `mmq_parts.conversation`, files that parts name (relative to `folder`)
    read."""
    return mmq_parts.conversation(messages, media, part=partial(part, folder=folder))


def image_url(picture: str | Path) -> str:
    """A picture for a message: http(s) and data URLs as they are, a file as a data URL, in its own bytes where the
    servers read its format and as PNG otherwise. ValueError names a file that is missing or no picture.
    """
    if isinstance(picture, str) and re.match(r"(https?://|data:)", picture):
        return picture
    path = Path(picture).expanduser()
    try:
        data = read_bytes(path, most=PICTURE)
    except FileNotFoundError:
        raise ValueError(f"no picture {path}") from None
    except (OSError, ValueError) as e:  # the second of a name with a NUL
        raise ValueError(f"the picture {path} cannot be read: {e}") from None
    return _sent(data, named=path)


def _sent(data: bytes, *, named: object) -> str:
    """The data URL of a picture's bytes. ValueError where they are none."""
    from PIL import UnidentifiedImageError

    try:
        with opened(data) as image:
            image.load()
            kind = SENT_AS_THEY_ARE.get(image.format or "")
            if kind is None:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
                data, kind = buffer.getvalue(), "image/png"
    except UnidentifiedImageError:
        raise ValueError(f"{named} is no picture that can be read; PNG, JPEG, WEBP, GIF, BMP and TIFF can") from None
    except Exception as e:  # PIL's readers raise whatever a broken file makes them
        raise ValueError(f"the picture {named} cannot be read: {e}") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def user_message(prompt: str, images: Sequence[str | Path] = ()) -> dict[str, Any]:
    """A user's message: the pictures, then the text."""
    if not images:
        return {"role": "user", "content": prompt}
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image_url(i)}} for i in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def _data_url(kind: str, path: Path) -> str:
    try:
        data = read_bytes(path, most=LARGEST)
    except FileNotFoundError:
        raise ValueError(f"no {kind} {path}") from None
    except OSError as e:
        raise ValueError(f"the {kind} {path} cannot be read: {e.strerror or e}") from None
    if not data:
        raise ValueError(f"the {kind} {path} is empty")
    if _is_text(data[:4096]):  # a dataset from elsewhere might name a key or a password here
        raise ValueError(f"{path} is text and no {kind}")
    guessed = mimetypes.guess_type(path.name)[0] or ""
    kept = guessed if guessed.startswith(f"{kind}/") else USUAL_TYPE[kind]
    return f"data:{kept};base64,{base64.b64encode(data).decode('ascii')}"


def _is_text(head: bytes) -> bool:
    """Whether a file that begins so is text: no video or sound is without zeros and control characters."""
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) > len(head) - 4 and not re.search(r"[\x00-\x08\x0e-\x1f]", text)
