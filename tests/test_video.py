"""Videos that would fill a server's memory, or end it: what the guard lets in, by files of every kind made here."""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarding import FILM, film
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmq.serve.inside.mmq_frames import ENDLESS, TAKEN, Frames, asked, taken

cv2 = pytest.importorskip("cv2")
INSIDE = Path(__file__).resolve().parent.parent / "serve" / "inside"
KINDS = {"mp4": "mp4v", "mov": "mp4v", "mkv": "mp4v", "avi": "MJPG", "flv": "FLV1", "ts": "mpg2", "wmv": "WMV2"}
MINUTE = 60


@pytest.fixture(scope="module")
def video() -> Iterator[Any]:
    """The module as an engine imports it: its folder on the path."""
    sys.path.insert(0, str(INSIDE))
    try:
        yield importlib.import_module("mmq_video")
    finally:
        sys.path.remove(str(INSIDE))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """`filmed("avi")`: 8 frames of 320x240, 10 a second, as OpenCV writes them."""
    import numpy as np

    def write(kind: str) -> bytes:
        path = tmp_path_factory.mktemp("film") / f"x.{kind}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*KINDS[kind]), 10, (320, 240))
        for at in range(8):
            writer.write(np.full((240, 320, 3), at * 30, np.uint8))
        writer.release()
        return path.read_bytes()

    return write


def cost(video: Any, data: bytes, **frames: float) -> int:
    """Pixels of the allowance that a video takes; ValueError with the words of a refusal."""
    allowance = video.Allowance(1 << 26, Frames(**frames))
    before = allowance.pixels
    try:
        video.check_video(data, allowance)
    except video.Refused as no:
        raise ValueError(f"{no.status} {no}") from None
    return before - allowance.pixels


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_let_in(video: Any, filmed: Callable[..., bytes], kind: str) -> None:
    data = filmed(kind)
    assert cost(video, data) == max(0, 320 * 240 * (8 + 8) - 16 * len(data))
    assert video.PROBE.ask(data)[:2] == (320, 240)


def test_frames_that_would_fill_the_memory(video: Any) -> None:
    large = film(5000, 5000, 32)
    assert len(large) < 700_000
    with pytest.raises(ValueError, match=r"413 .*1073741824 pixels together; a video of 32 frames of 5000x5000 "):
        cost(video, large)
    assert cost(video, large, spread=8, rate=0) > 1 << 28  # an engine that takes fewer
    with pytest.raises(ValueError, match="ask for fewer"):
        cost(video, large, spread=ENDLESS, rate=0)
    allowance = video.Allowance(1 << 26)
    one = film(2000, 2000, 32)  # not too large by itself
    for _ in range(5):
        video.check_video(one, allowance)
    with pytest.raises(video.Refused, match="1073741824 pixels together"):
        video.check_video(one, allowance)


def test_what_a_head_says_is_not_believed(video: Any, filmed: Callable[..., bytes]) -> None:
    data = bytearray(filmed("mp4"))
    at = data.index(b"tkhd") + 80
    assert struct.unpack(">II", data[at : at + 8]) == (320 << 16, 240 << 16)
    data[at : at + 8] = struct.pack(">II", 8 << 16, 8 << 16)
    at = data.index(b"mp4v", data.index(b"stsd")) + 28
    assert struct.unpack(">HH", data[at : at + 4]) == (320, 240)
    data[at : at + 4] = struct.pack(">HH", 8, 8)
    assert video.PROBE.ask(bytes(data))[:2] == (320, 240)


def test_more_frames_than_anybody_films(video: Any, filmed: Callable[..., bytes]) -> None:
    data = bytearray(filmed("mkv"))
    at = data.index(b"\x44\x89\x88") + 3  # the duration, a double
    data[at : at + 8] = struct.pack(">d", 1e13)
    with pytest.raises(ValueError, match="400 a video says that it has 100000000000 frames; 16777216 at most"):
        cost(video, bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile x.mp4\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
        b"hello" * 10,
        b"GG" * 90,
    ],
)
def test_what_is_no_video_never_comes_to_ffmpeg(video: Any, data: bytes) -> None:
    """Lists of other files and hosts above all."""
    with pytest.raises(ValueError, match="400 a medium is no video that is taken here, of MP4 and MOV, "):
        cost(video, data)


def test_a_file_that_ends_opencv_ends_nothing_else(video: Any, filmed: Callable[..., bytes]) -> None:
    assert cost(video, FILM) >= 0
    first = video.PROBE.process
    first.kill()  # as a segmentation fault would: OpenCV's own depend on its version
    first.wait()
    assert cost(video, FILM) >= 0  # it was gone before it was asked
    os.kill(video.PROBE.process.pid, signal.SIGSTOP)  # stopped: it answers nothing, and ends when its time is over
    begun, usual = time.monotonic(), video.PATIENCE
    try:
        video.PATIENCE = 0.5
        with pytest.raises(ValueError, match="400 a medium is no video that can be read"):
            cost(video, FILM)
    finally:
        video.PATIENCE = usual
    assert time.monotonic() - begun < 10
    data = filmed("avi")
    at = data.index(b"00dc", data.index(b"00dc", data.index(b"movi")) + 4) + 64  # in the second picture's tables
    with contextlib.suppress(ValueError):  # OpenCV 5.0.0.93 dies of it; another may read it
        cost(video, data[:at] + bytes.fromhex("84049a43fef68712") + data[at:])
    assert cost(video, FILM) >= 0


HEADS = st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4])))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["mp4", "avi", "mkv", "gif"]), HEADS, st.integers(0, 4000))
def test_broken_heads(video: Any, broken: dict[str, bytes], kind: str, edits: list[Any], cut: int) -> None:
    data = bytearray(broken[kind])
    for at, put in edits:
        data[at : at + len(put)] = put
    begun = time.monotonic()
    try:
        assert cost(video, bytes(data[: len(data) - cut])) >= 0
    except ValueError as no:
        assert str(no)[:4] in ("400 ", "413 ")  # noqa: PT017  the only way that it may end
    assert time.monotonic() - begun < video.PATIENCE + 5


@pytest.fixture(scope="module")
def broken(filmed: Callable[..., bytes]) -> dict[str, bytes]:
    return {**{kind: filmed(kind) for kind in ("mp4", "avi", "mkv")}, "gif": FILM}


@pytest.mark.parametrize(
    ("width", "height", "fps", "seconds", "megabits"),
    [
        (1920, 1080, 30, 4 * MINUTE, 0.1),  # a recorded screen, hardly moving
        (1920, 1080, 60, 20 * MINUTE, 2.1),
        (1920, 1080, 30, 60 * MINUTE, 17),
        (3840, 2160, 30, 50, 0.1),
        (3840, 2160, 60, 6 * MINUTE, 50),
        (3840, 2160, 30, 6 * MINUTE, 8.3),
        (1280, 720, 30, 180 * MINUTE, 0.1),
        (7680, 4320, 30, 2 * MINUTE, 80),
    ],
)
def test_what_people_film_passes(
    video: Any, width: int, height: int, fps: float, seconds: float, megabits: float
) -> None:
    stream = video.Stream(width, height, fps * seconds, fps)
    frames = taken(TAKEN["vllm"], stream.total, fps)
    assert video.cost(stream, frames, int(megabits * 1e6 / 8 * seconds)) < 1 << 30


@pytest.mark.parametrize(
    ("engine", "said", "total", "fps", "count"),
    [
        ("vllm", None, 8, 30, 8),
        ("vllm", None, 300, 30, 32),
        ("vllm", None, 3000, 30, 200),
        ("vllm", None, 300_000, 30, 768),
        ("vllm", None, 300, 0, 300),  # nobody knows how long it is
        ("vllm", None, 1, 30, 1),
        ("vllm", {"fps": 1}, 3000, 30, 100),
        ("vllm", {"fps": 1, "num_frames": 16, "max_frames": 16}, 3000, 30, 16),
        ("vllm", {"num_frames": -1}, 30_000, 30, 30_000),
        ("vllm", {"num_frames": 500}, 3000, 30, 500),
        ("vllm", {"fps": "many", "num_frames": True, "max_frames": None}, 3000, 30, 200),
        ("vllm", {"fps": float("nan")}, 3000, 30, 200),
        ("vllm", "words", 3000, 30, 200),
        ("lmdeploy", None, 300_000, 30, 32),
        ("lmdeploy", {"num_frames": -1}, 3000, 30, 3000),
        ("pytorch", None, 3000, 30, 3000),
        ("pytorch", {"fps": 2}, 3000, 30, 200),
        ("pytorch", {"fps": 2, "num_frames": 1, "max_frames": 1}, 3000, 30, 200),  # transformers takes the first alone
        ("pytorch", {"num_frames": 16}, 3000, 30, 16),
    ],
)
def test_frames_that_engines_take(engine: str, said: Any, total: int, fps: float, count: int) -> None:
    assert taken(asked(TAKEN[engine], said), total, fps) == count


@given(st.sampled_from(sorted(TAKEN)), st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists))
def test_whatever_a_request_says(engine: str, value: Any) -> None:
    for name in ("fps", "num_frames", "max_frames"):
        found = asked(TAKEN[engine], {name: value})
        assert 0 <= taken(found, 100, 25) <= 100
        assert taken(found, ENDLESS, 0) >= 0


def test_a_request_may_ask_for_all_frames(video: Any) -> None:
    guard = importlib.import_module("mmq_guard")
    data = base64.b64encode(film(2000, 2000, 300, rate=20)).decode()
    content = [{"type": "video_url", "video_url": {"url": f"data:video/gif;base64,{data}"}}]
    body = {"messages": [{"role": "user", "content": content}]}
    judged = guard.Guard(None)._media_of
    encoded = [guard.json.dumps(body | more).encode() for more in ({}, {"media_io_kwargs": {"video": {"fps": 20}}})]
    judged(encoded[0], {}, video.Allowance(1 << 26))
    with pytest.raises(video.Refused, match="300 frames of 2000x2000"):
        judged(encoded[1], {}, video.Allowance(1 << 26))


def test_a_video_is_never_looked_at_where_requests_come_in(video: Any) -> None:
    """Small bodies are judged on the spot, but those with videos, however JSON writes the word."""
    guard = importlib.import_module("mmq_guard")
    text = '{"video": "x"}'
    for body in (text.encode(), text.replace("i", "\\u0069").encode(), text.encode("utf-16"), text.encode("utf-32")):
        assert guard.json.loads(body) == {"video": "x"}
        assert guard.VIDEO.search(body)
    assert not guard.VIDEO.search('{"messages": [{"role": "user", "content": "图中有什么？"}]}'.encode())
