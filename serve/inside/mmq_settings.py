"""What a guard is told: `serve/safety.py` writes the settings that are read here. And what it counts by them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmq_frames import TAKEN, Frames
from mmq_refused import Refused

MIB = 1 << 20
PIXELS = 1 << 30  # of all pictures and videos of a request: 3 GiB once decoded; a few kilobytes can be a sixth of it


@dataclass(frozen=True)
class Settings:
    """What is let in.

    `max_body`: bytes of a request, and of all the media that it names; `max_media`: pictures, videos and sounds of it.
    `domains`: hosts that media may come from (".x.org" for all below x.org), None for any public one; `networks`:
    private ones that they may come from as well; `folder`: where file:// may point.
    `hosts`: the names by which the server may be asked, None for any. `frames`: those that the engine takes of a video.
    """

    max_body: int = 64 * MIB
    max_media: int = 64
    domains: tuple[str, ...] | None = None
    networks: tuple[str, ...] = ()
    folder: str | None = None
    hosts: tuple[str, ...] | None = None
    frames: Frames = TAKEN["vllm"]


def settings_of(environ: Mapping[str, str]) -> Settings:
    """The settings that the variable MMQ_GUARD holds as JSON. ValueError for a name that there is none of."""
    found: dict[str, Any] = json.loads(environ.get("MMQ_GUARD") or "{}")
    unknown = set(found) - set(Settings.__dataclass_fields__)
    if unknown:
        raise ValueError(f"MMQ_GUARD has unknown settings: {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    if "frames" in values:
        values["frames"] = Frames(**values["frames"])
    return Settings(**values)


class Allowance:
    """What the media of one request may have together: bytes of those that it names, pixels of all of its pictures and
    of the `frames` of its videos."""

    def __init__(self, most: int, frames: Frames = TAKEN["vllm"]) -> None:
        self.most, self.left, self.pixels, self.frames = most, most, PIXELS, frames

    def take(self, size: int) -> None:
        """Refused when they are used up."""
        self.left -= size
        if self.left < 0:
            raise Refused(413, f"the media that a request names may have {mebibytes(self.most)} together")

    def show(self, pixels: int, remedy: str) -> None:
        """Refused, with the remedy, when the pictures and videos have too many."""
        self.pixels -= pixels
        if self.pixels < 0:
            raise Refused(413, f"the pictures and videos of a request may have {PIXELS} pixels together; {remedy}")


def mebibytes(count: int) -> str:
    """As people read it: "64 MiB"."""
    return f"{count / MIB:g} MiB"
