"""Whether a video's frames would fill the memory: asked of OpenCV, which decodes them in vLLM and in LMDeploy.

A container's own fields are not believed: a file may say 16x16 in them and hold frames of 8192x8192, which FFmpeg
finds in the stream, and the engine decodes. So the library that the engine asks is asked the same, in a process that
may end over it (mmq_probe.py); what is refused here never comes to the engine. Without OpenCV only the kind of file is
judged.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from mmq_frames import ENDLESS, taken
from mmq_refused import Refused
from mmq_settings import Allowance

PER_BYTE = 16  # pixels for each byte of a video, beside the allowance: as many as 2 frames a second of 4K at 8.3 Mbit/s
REFERENCES = 16  # frames that a decoder may keep for itself: as many as H.264 and HEVC may refer to
PATIENCE = 20.0  # seconds to open a video in, the start of the process that does among them
LONGEST = 1 << 24  # frames that a head may claim: engines go through them one by one, though none come any more
# how files begin. FFmpeg knows hundreds of kinds, among them texts that name other files and hosts (HLS, DASH, concat)
BEGINNINGS = {
    "MP4 and MOV": rb".{4}(?:ftyp|moov|mdat|wide|free|skip|pnot)",
    "WebM and Matroska": rb"\x1aE\xdf\xa3",
    "AVI": rb"RIFF.{4}AVI ",
    "GIF": rb"GIF8",
    "MPEG": rb"\x00\x00\x01\xba|G.{187}G.{187}G|.{4}G.{191}G.{191}G",  # packets of 188 or 192 bytes
    "FLV": rb"FLV\x01",
    "Ogg": rb"OggS",
    "WMV": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
}
_KNOWN = re.compile(rb"|".join(BEGINNINGS.values()), re.DOTALL)


class Stream(NamedTuple):
    """What a decoder believes of a video; frames and frames a second may be 0 and less where it does not know."""

    width: float
    height: float
    total: float
    fps: float


def check_video(data: bytes, allowance: Allowance) -> None:
    """Refused for what is no video, or has so many pixels in the frames that the engine takes that they would fill the
    memory. `allowance.frames` says how many it takes."""
    kinds = ", ".join(BEGINNINGS)
    if not _KNOWN.match(data):
        raise Refused(400, f"a medium is no video that is taken here, of {kinds}")
    stream = PROBE.ask(data)
    if stream is None:
        return
    if stream.width < 1 or stream.height < 1:
        raise Refused(400, f"a medium is no video that can be read, of {kinds}")
    if stream.total > LONGEST:
        raise Refused(400, f"a video says that it has {stream.total:.0f} frames; {LONGEST} at most")
    frames = taken(allowance.frames, max(stream.total, 1), stream.fps)
    what = f"a video of {frames} frames of {stream.width:.0f}x{stream.height:.0f} (those that would be looked at)"
    every = allowance.frames.spread == ENDLESS  # which a request can change, where the engine takes all by itself
    remedy = "ask for fewer (media_io_kwargs: fps)" if every else "send fewer seconds, or a smaller size"
    allowance.show(cost(stream, frames, len(data)), f"{what} has more; {remedy}")


def cost(stream: Stream, frames: int, size: int) -> int:
    """Pixels of the allowance that a file of `size` bytes takes, of which `frames` frames are looked at."""
    held = frames + min(max(stream.total, 1), REFERENCES)
    return max(0, int(stream.width * stream.height * held) - PER_BYTE * size)


class Probe:
    """A process of mmq_probe.py, from the first video on: started again when it ended over one, or took too long."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, data: bytes) -> Stream | None:
        """The video as OpenCV sees it, all 0 where it is none to it; None where there is no OpenCV to ask."""
        line = b""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _started()
            late = threading.Timer(PATIENCE, self.process.kill)
            late.start()
            try:
                line = _answer(self.process, data)
            finally:
                late.cancel()
                if not line.endswith(b"\n"):  # it ended, or will with this
                    self.process.kill()
                    self.process.communicate()
                    self.process = None
        found = json.loads(line) if line.endswith(b"\n") else [0, 0, 0, 0]
        return None if found is None else Stream(*found)


def _started() -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(Path(__file__).with_name("mmq_probe.py"))]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL  # FFmpeg has much to say on files that are broken
    try:
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=nowhere)
    except OSError as e:
        raise Refused(503, f"no process can be started to look at videos: {e.strerror}") from None


def _answer(process: subprocess.Popen[bytes], data: bytes) -> bytes:
    """The line that a probe answers, not a whole one where it ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(struct.pack("<Q", len(data)) + data)
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return b""


PROBE = Probe()
