"""The forms in which people write pictures, videos and sounds into a conversation, and the parts that servers take.

Standard library only, for it runs in a server too: there a request in another form than OpenAI's is rewritten, as
clients of other servers send it. Opens no file and fetches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

KINDS = ("image", "video", "audio")
TAG = re.compile(rf"\(<({'|'.join(KINDS)})>\./</\1>\)|<({'|'.join(KINDS)})>")  # the first is in MiniCPM-V's own prompts
ROLES = ("system", "developer", "user", "assistant", "tool")
BARE = re.compile(r"[A-Za-z0-9+/\s]{256,}={0,2}\s*")  # base64 alone; no file's name is so long, and without a dot
USUAL_TYPE = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}  # where nothing tells; bytes decide
PASSED_ON = ("detail", "uuid", "cache_control")  # what a server's part may say beside its address

Medium = tuple[str, dict[str, Any]]  # "image", "video" or "audio", and its part of a message
Part = Callable[[str, str], dict[str, Any]]  # (kind, address) -> the part of a message


def url_part(kind: str, address: str) -> dict[str, Any]:
    """OpenAI's part for a medium at an address, or of its bare base64."""
    if BARE.fullmatch(address):
        address = f"data:{USUAL_TYPE[kind]};base64,{''.join(address.split())}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def conversation(
    messages: Sequence[Mapping[str, Any]], media: Sequence[Medium] = (), *, part: Part = url_part
) -> list[dict[str, Any]]:
    """The messages as servers take them; `part` makes a part of an address.

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
        elif isinstance(content, (list, tuple)):
            taking = left if media and at in users else None
            content = [piece for given in content for piece in _pieces(given, taking, part)]
            if taking and len(users) == 1:
                content, left = [item for _, item in taking] + content, []
        elif content is not None or message["role"] in ("system", "user"):  # an assistant's tool calls have none
            raise ValueError(f"the {message['role']}'s content is {short(content)}; it must be text or a list of parts")
        sent.append({**message, "content": content})
    if left:
        kinds = ", ".join(sorted({kind for kind, _ in left}))
        raise ValueError(
            f"{len(left)} more ({kinds}) than there are tags for them; write <image> where a picture stands"
        )
    return sent


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


def rewritten(request: Any) -> bool:
    """Put a request for a chat into OpenAI's form, in place, where it has the parts of another or media beside its
    messages; whether it had. ValueError where that cannot be done."""
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        return False
    if not all(isinstance(m, dict) and str(m.get("role")) in ROLES for m in request["messages"]):
        return False  # no chat, or one that the engine will refuse in its own words
    beside = {kind: request[f"{kind}s"] for kind in KINDS if request.get(f"{kind}s")}
    contents = [m.get("content") for m in request["messages"]]
    if not beside and not any(_foreign(part) for content in contents if isinstance(content, list) for part in content):
        return False
    media: list[Medium] = []
    for kind, given in beside.items():
        for item in given if isinstance(given, list) else [given]:
            if isinstance(item, dict):
                item = item.get("url")
            if not isinstance(item, str) or not item:
                raise ValueError(f"{kind}s must be a list of web or data addresses")
            media.append((kind, url_part(kind, item)))
        del request[f"{kind}s"]
    request["messages"] = conversation(request["messages"], media)
    return True


def _foreign(part: Any) -> bool:
    """Whether a part is in another form than OpenAI's, and one that is known here."""
    if not isinstance(part, dict):
        return False
    kind = str(part.get("type")).removesuffix("_url")
    return kind in KINDS and (isinstance(part.get(kind), str) or isinstance(part.get(f"{kind}_url"), str))


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise ValueError(f"a message is {short(message)}; its role must be system, user, assistant or tool")
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


def _pieces(given: Any, left: list[Medium] | None, part: Part) -> Iterator[dict[str, Any]]:
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
                f"{', '.join(unknown)} of a part of type {said} is not for a server; sizes and frames are set where it "
                "is started (vLLM: --mm-processor-kwargs '{\"max_pixels\": 501760}')"
            )
        yield {**(part(kind, address) if address else _next(kind, left or [])), **more}
    else:
        raise ValueError(
            f"a part is {short(given)}; its type must be text, image, image_url, video, video_url or audio"
        )


def _address(kind: str, rest: dict[str, Any]) -> tuple[str, list[str]]:
    """Where the medium of a part is ("" for an empty place), and the keys that say something else."""
    for key in (f"{kind}_url", kind, "url", "path"):
        if rest.get(key):
            found = rest.pop(key)
            if isinstance(found, dict):
                found = found.get("url") or found.get("path")
            if not str(found or "").strip() or isinstance(found, (int, float, dict, list)):
                raise ValueError(f"{key} is {short(found)}; it must be a path, a web or a data address")
            return str(found), list(rest)
    return "", [key for key in rest if rest[key] is not None]


def short(value: Any) -> str:
    """A value for a message, no longer than a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:45] + "..." + text[-12:]
