"""The media of a request: where its JSON holds them, whether they can be read, which file a file:// URL means.

Knows the shapes that OpenAI's chat and responses, Anthropic's messages and transformers' chat templates give them, and
takes a medium for one wherever it stands. Fetches nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmq_parts import USUAL_TYPE
from mmq_refused import Refused
from mmq_settings import Allowance
from mmq_video import check_video

# a part's keys that name a medium, and of what kind it is
KINDS = {
    **dict.fromkeys(("image_url", "image", "images", "image_pil"), "image"),
    **dict.fromkeys(("video_url", "video", "videos"), "video"),
    **dict.fromkeys(("audio_url", "audio", "audios", "input_audio", "audio_embeds"), "audio"),
    **dict.fromkeys(("file_url", "file_data", "image_embeds"), "application"),  # tensors are no picture
}
WITHIN = ("url", "path")  # of a medium: where it is
BASE64 = ("data", "base64")  # of a medium: its bytes
RAW = ("image_embeds", "audio_embeds", "input_audio", "file_data")  # strings of these are base64 without `data:`
# of a request: what describes its answer, never its media ("image" may be a property's name in a tool's schema)
DESCRIPTIONS = (
    *("tools", "functions", "tool_choice", "response_format", "structured_outputs", "guided_json", "json_schema"),
    *("metadata", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "logit_bias"),
)
MIME = {**USUAL_TYPE, "application": "application/octet-stream"}
FRAMES = "video/jpeg"  # of a data URL: not a file but pictures in base64, with commas between them
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # of pictures
_PART = re.compile(r"(?:input_)?(image|video|audio)")


def media_in(tree: Any) -> Iterator[tuple[Any, Any, str, bool]]:
    """(holder, key, kind, raw) for each medium of a request: `holder[key]` is its string; raw: base64, and no URL."""
    todo: list[tuple[Any, str | None]] = [(tree, None)]
    while todo:
        node, kind = todo.pop()  # kind: of the medium that this is or lists, None elsewhere
        if isinstance(node, list):
            for at, item in enumerate(node):
                if isinstance(item, str) and kind:
                    yield node, at, kind, False
                elif isinstance(item, (dict, list)):
                    todo.append((item, kind))
        elif isinstance(node, dict):
            part = _PART.match(str(node.get("type", "")))
            kind = part[1] if part else kind
            for key, value in node.items():
                if node is tree and key in DESCRIPTIONS:
                    continue
                here = KINDS.get(key) or (kind if key in ("source", *WITHIN, *BASE64) else None)
                if isinstance(value, str):
                    if here and key != "source":
                        yield node, key, here, key in RAW or key in BASE64
                elif isinstance(value, (dict, list)):
                    todo.append((value, here))


def check_sent(value: str, kind: str, allowance: Allowance, *, raw: bool = False) -> None:
    """Refused unless a data URL, or bare base64 where `raw`, can be decoded, to what its kind says that it is."""
    pieces = [value]
    if not raw or value[:5].lower() == "data:":
        head, comma, data = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Refused(400, f"a data URL has no `;base64,`: {value[:40]!r}")
        pieces = [data]
        if head.lower().startswith(f"data:{FRAMES}"):
            pieces, kind = data.split(","), "image"
    for piece in pieces:
        if not piece:
            raise Refused(400, "a medium is empty")
        try:
            data = base64.b64decode(piece, validate=True)
        except (binascii.Error, ValueError) as e:
            raise Refused(400, f"a medium's base64 is broken: {e}") from None
        _check(data, kind, allowance)


def _check(data: bytes, kind: str, allowance: Allowance) -> None:
    if kind == "image":
        check_picture(data, allowance)
    elif kind == "video":
        check_video(data, allowance)


def check_picture(data: bytes, allowance: Allowance) -> None:
    """Refused for what is no picture, or has so many pixels that it would fill the memory; only its head is read.

    Pillow is in every engine's environment; without it the engine is left to say so. It knows some forty formats, a
    few of which it runs other programs for when an engine loads the picture (PostScript): only FORMATS are let in.
    """
    try:
        from PIL import Image
    except ImportError:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:
        raise Refused(400, f"a picture has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except Exception:  # a format's reader may raise anything over broken bytes
        raise Refused(400, f"a medium is no picture that can be read, of {', '.join(FORMATS)}") from None
    allowance.show(pixels, "send smaller ones")


def read_local(url: str, folder: str | None, allowance: Allowance) -> bytes:
    """The bytes of the file that a file:// URL names. Refused outside of `folder`, links followed, and without one."""
    if folder is None:
        raise Refused(400, "file:// is not taken here; the server's --media-folder names the folder for it")
    parts = urlsplit(url)
    named = unquote(parts.path)
    path = Path(os.path.realpath(named)) if "\0" not in named else None
    if path is None or parts.netloc not in ("", "localhost") or Path(os.path.realpath(folder)) not in path.parents:
        raise Refused(400, "a file:// URL points out of the server's media folder")
    try:
        if not path.is_file():  # a pipe would keep whoever reads it
            raise FileNotFoundError
        allowance.take(path.stat().st_size)
        return path.read_bytes()
    except OSError:
        raise Refused(400, f"no file {path.name!r} that can be read in the server's media folder") from None


def as_data_url(data: bytes, mime: str, allowance: Allowance) -> str:
    """Bytes as a data URL. Refused when there are none, or they are not what they should be."""
    if not data:
        raise Refused(400, "a medium is empty")
    _check(data, mime.partition("/")[0], allowance)
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
