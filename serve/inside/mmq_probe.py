"""`python mmq_probe.py`: what OpenCV believes of videos that come on stdin, for mmq_video.py. Knows nothing else.

A process of its own, for OpenCV 5.0 ends with a segmentation fault over some broken files, and FFmpeg may take long
over others: a server that opens them itself ends with it. Each video is its length in 8 bytes and its bytes; the answer
is a line: [width, height, frames, frames a second] in JSON, null where there is no OpenCV to ask.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
from typing import Any

MEMORY = 8 << 30  # bytes of addresses; a decoder's frames of 179 million pixels have room in it


def main() -> None:
    """Answer until stdin ends, as it does with the server."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while len(head := sys.stdin.buffer.read(8)) == 8:
        data = sys.stdin.buffer.read(*struct.unpack("<Q", head))
        sys.stdout.write(f"{json.dumps(_opened(data))}\n")
        sys.stdout.flush()


def _opened(data: bytes) -> list[float] | None:
    """Zeros where it is no video."""
    try:
        import cv2
        from cv2 import videoio_registry

        kind = next(kind for kind in videoio_registry.getStreamBufferedBackends() if videoio_registry.hasBackend(kind))
    except (ImportError, AttributeError, StopIteration):  # none, one older than 4.11, or one without FFmpeg
        return None
    read: Any = cv2.VideoCapture  # whose types know of files alone
    capture = read(io.BytesIO(data), kind, [])
    if not capture.isOpened():
        return [0, 0, 0, 0]
    wanted = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)
    found = [capture.get(name) for name in wanted]
    return [value if math.isfinite(value) else 0 for value in found]


if __name__ == "__main__":
    main()
