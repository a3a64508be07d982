"""Reads samples from JSONL files and folders, and says which line of which file is wrong.

Knows the three forms that people keep such data in, and nothing of models. Data is local: web addresses are refused.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from .plain import read_bytes
from .samples import ROLES, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

Row = TypeVar("Row")
LINE = 128 << 20  # bytes of a line, which may hold pictures in base64
PICTURE = 256 << 20  # bytes of a picture's file
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
DESCRIBE = "Describe this picture."  # what is asked of the pictures of a folder
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMS = '{"messages": [...]}, {"messages": [...], "images": [...]} or {"query": ..., "response": ..., "images": [...]}'


def read(source: Path) -> Iterator[Sample]:
    """The samples of a JSONL file or a folder, one by one. ValueError names the file, the line and what is wrong."""
    files, pictures = files_of(source)
    for file in files:
        yield from _lines(file)
    for picture in pictures:
        content = [{"type": "image"}, {"type": "text", "text": DESCRIBE}]
        yield Sample([{"role": "user", "content": content}], (_open(str(picture), Path()),))


def rows(file: Path, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
    """What `parse` makes of each line's JSON, with the line's number, from 1; empty lines are left out. ValueError,
    `parse`'s too, names the file and the line."""
    with file.open("rb") as lines:  # bytes: only \n ends a line, and a line that is no UTF-8 has a number too
        for number, line in enumerate(iter(lambda: lines.readline(LINE + 1), b""), 1):
            if not line.strip():
                continue
            try:
                parsed = parse(_json(line))
            except json.JSONDecodeError as e:
                raise ValueError(f"{file}, line {number}: broken JSON: {e.msg} at column {e.colno}") from None
            except UnicodeDecodeError as e:
                raise ValueError(f"{file}, line {number}: not UTF-8 at byte {e.start + 1}") from None
            except RecursionError:
                raise ValueError(f"{file}, line {number}: broken JSON: nested too deep") from None
            except ValueError as e:
                raise ValueError(f"{file}, line {number}: {e}") from None
            yield number, parsed


def _json(line: bytes) -> Any:
    if len(line) > LINE:
        raise ValueError(f"longer than {LINE} bytes; put pictures into files and name those")
    data = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number, parse_int=_number)
    if b"\\ud" in line.lower():  # half a pair is no character, and no server could be sent it
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    return data


def _number(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"broken JSON: a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> None:
    raise ValueError(f"broken JSON: {name} is no number of JSON's")


def _lines(file: Path) -> Iterator[Sample]:
    for _, sample in rows(file, lambda data: _sample(data, file.parent)):
        yield sample


def files_of(source: Path) -> tuple[list[Path], list[Path]]:
    """The JSONL files that `source` means, and where it has none the pictures. ValueError where there is neither."""
    if source.is_file():
        if source.suffix.lower() not in (".jsonl", ".ndjson"):
            raise ValueError(f"{source} is no .jsonl file; give one JSON object a line, or a folder of pictures")
        return [source], []
    if not source.is_dir():
        raise ValueError(f"no file or folder {source}")
    files = sorted(source.glob("*.jsonl"))
    pictures = [] if files else sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not files and not pictures:
        raise ValueError(f"{source} holds no *.jsonl and no pictures ({', '.join(PICTURES)})")
    return files, pictures


def _sample(data: Any, folder: Path) -> Sample:
    if not isinstance(data, dict) or not ("messages" in data or "query" in data):
        raise ValueError(f"no messages; a line is {FORMS}")
    for key in ("videos", "audios"):
        if data.get(key):
            raise ValueError(f"{key} cannot be read here; give pictures")
    images = data.get("images") or []
    if not isinstance(images, list):
        raise ValueError(f"images is {_short(images)}; it must be a list of paths")
    sources = [_address(image) for image in images]
    messages = data["messages"] if "messages" in data else from_query(data, "<image>" * len(sources))
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is empty or no list")
    inline = "images" not in data and any(_has_inline(m) for m in messages)
    used: list[str] = []  # one address for each place, in order; "" takes the next of `images`
    parsed = [_message(m, used, tags=not inline) for m in messages]
    if (places := used.count("")) != len(sources):
        raise ValueError(f"{places} <image> tags or image parts, but {len(sources)} in images; they must be as many")
    given = iter(sources)
    pictures = []
    for number, address in enumerate(used, 1):
        try:
            pictures.append(_open(address or next(given), folder))
        except ValueError as e:
            raise ValueError(f"picture {number}: {e}") from None
    task = data.get("task")
    return Sample(parsed, tuple(pictures), task=task if isinstance(task, str) else None)


def from_query(data: dict[str, Any], tags: str) -> list[dict[str, Any]]:
    """The query, response and history form as messages. Without any tag in them `tags` stand before the first query."""
    history = data.get("history") or []
    turns = [*(history if isinstance(history, list) else [history]), [data["query"], data.get("response")]]
    if not all(isinstance(t, list) and len(t) == 2 and isinstance(t[0], str) for t in turns):
        raise ValueError("query must be text, and history a list of [query, response]")
    if tags and not any(tag in t[0] for tag in set(re.findall("<[a-z]+>", tags)) for t in turns):
        turns[0] = [tags + turns[0][0], turns[0][1]]
    messages = [{"role": "system", "content": data["system"]}] if data.get("system") else []
    for query, response in turns:
        messages.append({"role": "user", "content": query})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
    return messages


def _has_inline(message: Any) -> bool:
    """True where a part of the message brings its own picture, so that "<image>" in its text is only text."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else []
    return any(isinstance(p, dict) and p.get("type") != "text" and (p.keys() - {"type"}) for p in parts)


def _message(message: Any, used: list[str], *, tags: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"a message is {_short(message)}; it must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"unknown role {_short(role)}; it must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        if not (tags and "<image>" in content):
            return {"role": role, "content": content}
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"the {role}'s content is {_short(content)}; it must be text or a list of parts")
    return {"role": role, "content": [done for part in content for done in _parts(part, used, tags=tags)]}


def _parts(part: Any, used: list[str], *, tags: bool) -> Iterator[dict[str, Any]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        for piece in re.split("(<image>)", part["text"]) if tags else [part["text"]]:
            if tags and piece == "<image>":
                used.append("")
                yield {"type": "image"}
            elif piece:
                yield {"type": "text", "text": piece}
    elif kind in ("image", "image_url"):
        used.append(_address(part) if part.keys() - {"type"} else "")
        yield {"type": "image"}
    else:
        raise ValueError(f"a part is {_short(part)}; its type must be text, image or image_url")


def _address(item: Any) -> str:
    """Where a picture is: a path, file:// or data: address, itself or under one of the keys people use."""
    if isinstance(item, dict):
        item = next((item[k] for k in ("image_url", "image", "url", "path") if item.get(k)), None)
        if isinstance(item, dict):
            item = item.get("url")
    if not isinstance(item, str) or not item:
        raise ValueError(f"a picture is {_short(item)}; it must be a path, a file:// or a data:image address")
    return item


def opened(data: bytes) -> Image:
    """A picture, not decoded yet. PIL knows some forty formats, a few of which other programs are run for: only
    `FORMATS` are tried. Errors as PIL's."""
    from PIL import Image

    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _open(address: str, folder: Path) -> Image:
    """One picture, upright and RGB. ValueError where it cannot be read; `folder` is where relative paths begin."""
    from PIL import ImageOps

    if address.startswith(("http://", "https://")):
        raise ValueError(f"{_short(address)} is on the web; samples are local, so download it and give its path")
    try:
        with opened(_file(address, folder)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as e:
        raise ValueError(f"no file {e.filename}") from None
    except Exception as e:  # PIL's readers raise whatever a broken file makes them
        # Of a file that is no picture PIL tells only the name of a buffer object.
        why = "not a picture PIL knows" if "cannot identify" in str(e) else " ".join(str(e).split())
        raise ValueError(f"{_short(address)} cannot be read: {why}") from None


def _file(address: str, folder: Path) -> bytes:
    if address.startswith("data:"):
        head, _, body = address.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"{_short(address)} is no base64 data address")
        return base64.b64decode(body, validate=True)
    if address.startswith("file://"):
        return read_bytes(Path(unquote(urlsplit(address).path)), most=PICTURE)
    return read_bytes(folder / address, most=PICTURE)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else text[:45] + "..." + text[-12:]
