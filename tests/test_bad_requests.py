"""One `mmq serve` of pebble under the real vLLM, and whatever is wrong to ask it: each is a 4xx, and it lives on.

Then it is killed in the middle of an answer, started again by itself, and ended by SIGTERM in the middle of another.
"""

from __future__ import annotations

import base64
import http.client
import http.server
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from guarding import FILM, FORBIDDEN, PICTURE, asking, bomb, film, picture, png, web

from mmq.serve.footprint import group_members
from mmq.serve.running import free_port, healthy

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
KEY = "k3y-that-nobody-may-see"
MMQ = (sys.executable, "-m", "mmq")
ELSEWHERE = "127.0.0.2"  # the one private address that the server may fetch from


@dataclass(frozen=True)
class Running:
    """`mmq serve` in the background: its process, its output, its address."""

    process: subprocess.Popen[bytes]
    output: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self, times: int) -> list[int]:
        """The pids of the engine, once it was healthy so many times."""
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert self.process.poll() is None, self.output.read_text()
            if self.output.read_text().count("ready after") == times and healthy(self.url):
                return engine_of(self.process.pid)
            time.sleep(0.2)
        raise AssertionError(self.output.read_text())

    def send(self, body: Any, *, path: str = "/v1/chat/completions", key: str = KEY, **headers: str) -> tuple[int, str]:
        """(status, text); a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(
            "POST", path, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"} | named
        )
        try:
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)


def engine_of(mmq: int) -> list[int]:
    """The pids of the engine that an `mmq serve` started, its leader first."""
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(mmq)], capture_output=True, text=True, check=True
    )
    leader = next(int(line.split()[0]) for line in children.stdout.splitlines() if "mmq-watch" not in line)
    return [leader, *(pid for pid in group_members(leader) if pid != leader)]


def peak(pids: list[int]) -> int:
    """The most bytes that processes had in memory together, each at its own time."""
    found = (re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in pids)
    return sum(int(match[1]) << 10 for match in found if match)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "key").write_text(KEY)
    (folder / "media").mkdir()
    (folder / "media" / "red.png").write_bytes(PICTURE)
    port = free_port()
    argv = [*MMQ, "serve", "pebble", "--port", str(port), "--api-key-file", str(folder / "key"), "--restart", "1"]
    argv += ["--media-network", f"{ELSEWHERE}/32", "--media-folder", str(folder / "media"), "--max-media", "100"]
    output = folder / "output"
    env = {name: value for name, value in os.environ.items() if name not in ("MMQ_API_KEY", "VLLM_API_KEY")}
    with output.open("wb") as out, subprocess.Popen(argv, stdout=out, stderr=out, cwd=folder, env=env) as process:
        running = Running(process, output, port)
        try:
            running.ready(1)
            yield running
        finally:
            process.terminate()
            process.wait(60)


def fine(server: Running) -> None:
    """It answers a good request."""
    red = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    status, text = server.send(asking(red) | {"model": "pebble", "max_tokens": 4})
    assert status == 200, text


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def saying(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "pebble", "max_tokens": 4, "messages": [{"role": "user", "content": text}]} | more


def parts(*content: Any) -> dict[str, Any]:
    return saying(messages=[{"role": "user", "content": list(content)}])


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


WRONG: dict[str, tuple[Any, int]] = {
    "broken base64": (asking("data:image/png;base64,@@@@"), 400),
    "a video's broken base64": (asking("data:video/mp4;base64,@@@@", kind="video_url"), 400),
    "no picture": (asking(data_url(b"hello")), 400),
    "no video": (asking(data_url(b"hello" * 10, "video/mp4"), kind="video_url"), 400),
    "a list of other videos": (
        asking(data_url(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/\n", "video/mp4"), kind="video_url"),
        400,
    ),
    "a video of 800 million pixels": (asking(data_url(film(5000, 5000, 32), "video/gif"), kind="video_url"), 413),
    "half a picture": (asking(data_url(PICTURE[:90])), 400),
    "a picture of 400 million pixels": (asking(data_url(bomb(20_000, 20_000))), 400),
    "a picture too narrow": (asking(data_url(png(1, 1000))), 400),
    "10,000 pictures": (asking(*[data_url(png(1, 1))] * 10_000), 400),
    "more pictures than the engine takes": (asking(*[data_url(PICTURE)] * 9), 400),
    "sound, which this model has not": (asking(data_url(b"RIFF", "audio/wav"), kind="audio_url"), 400),
    "unknown model": (saying(model="another"), 404),
    "a prompt past the context": (saying("one two " * 20_000), 400),
    "an answer past the context": (saying(max_tokens=10**6), 400),
    "no tokens": (saying(max_tokens=-1), 400),
    "broken JSON": (b'{"model": "pebble", ', 400),
    "JSON nested deep": (b'{"messages": ' + b"[" * 200_000, 400),
    "no JSON": (b"\xff\x00\xfe", 400),
    "JSON that is no object": (b"[]", 400),
    "nothing": (b"{}", 400),
    "messages that are none": (saying(messages="hello"), 400),
    "no messages": (saying(messages=[]), 400),
    "a part of no kind": (parts({"type": "hologram", "hologram": 1}), 400),
    "half a character": (saying("\ud800"), 400),
    "temperature in words": (saying(temperature="hot"), 400),
    "temperature below 0": (saying(temperature=-1), 400),
    "100,000 answers": (saying(n=100_000), 400),
    "a million logprobs": (saying(logprobs=True, top_logprobs=10**6), 400),
    "a token that is none": (saying(logit_bias={"999999999": 1}), 400),
    "a schema that is nothing but itself": (saying(structured_outputs={"json": {"$ref": "#"}}), 400),
    "a part of a schema that is": (
        saying(response_format=by_schema({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}})),
        400,
    ),
    "a broken pattern": (saying(structured_outputs={"regex": "["}), 400),
    "a chat template of one's own": (saying(chat_template="{{ 1 / 0 }}"), 400),
    "pixels without bounds": (saying(mm_processor_kwargs={"max_pixels": 10**12}), 400),
}


def test_the_next_command_works_as_typed(server: Running, tmp_path: Path) -> None:
    """Also to a server that wants a key."""
    (tmp_path / "FILE").write_bytes(PICTURE)
    line = re.findall(r"^next: mmq (.*?)   \(", server.output.read_text(), re.MULTILINE)[0]
    words = [*MMQ, *shlex.split(line), "--max-tokens", "2"]
    asked = subprocess.run(words, cwd=tmp_path, env={**os.environ, "MMQ_API_KEY": ""}, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_refused(server: Running, what: str) -> None:
    body, expected = WRONG[what]
    if isinstance(body, dict) and body.get("model") == "m":
        body = body | {"model": "pebble"}
    status, text = server.send(body)
    assert status == expected, text
    assert json.loads(text)["error"]["message"]


def test_it_lives_on(server: Running) -> None:
    fine(server)


def test_a_video_is_answered(server: Running) -> None:
    asked = asking(data_url(FILM, "video/gif"), kind="video_url") | {"model": "pebble", "max_tokens": 4}
    status, text = server.send(asked)
    assert status == 200, text


def test_a_schema_with_itself_in_it_is_met(server: Running) -> None:
    """A list: sound, for each turn of it has a bracket."""
    schema = {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]}
    asked = saying("hello", response_format=by_schema(schema | {"additionalProperties": False}), max_tokens=40)
    status, text = server.send(asked)
    assert status == 200, text
    assert re.match(r'\{\s*"a"', json.loads(text)["choices"][0]["message"]["content"])


def test_a_gigabyte_is_neither_read_into_memory_nor_waited_for(server: Running) -> None:
    pids = engine_of(server.process.pid)
    before = peak(pids)
    chunk = b"x" * (1 << 20)
    sent = 0

    def gigabyte() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1024):
            sent += len(chunk)
            yield chunk

    status, text = server.send(gigabyte())  # in chunks, no length told
    assert (status, sent) == (413, 1 << 30)
    assert "64 MiB" in text
    # 64 MiB, and what copies of the pieces there are on the way
    assert peak(pids) - before < 200 << 20
    begun = time.monotonic()
    wire = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    wire.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Authorization", f"Bearer {KEY}"), ("Content-Length", str(1 << 30))):
        wire.putheader(name, value)
    wire.endheaders()
    assert wire.getresponse().status == 413  # by its length, before a byte of it
    wire.close()
    assert time.monotonic() - begun < 30
    fine(server)


def test_only_the_key_opens(server: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize", "/v1/models", "/metrics"):
        for key in ("", "wrong", KEY + "x", KEY[:-1]):
            status, text = server.send(saying(), path=path, key=key)
            assert status == 401, (path, text)
    assert healthy(server.url)
    with pytest.raises(openai.AuthenticationError, match="API key is needed"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert server.client().models.list().data[0].id == "pebble"


def test_the_key_is_seen_nowhere(server: Running) -> None:
    shown = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert "mmq_guard.Guard" in shown
    logs = [path.read_text() for path in server.output.parent.glob("*.log")]
    assert logs
    for text in (shown, server.output.read_text(), *logs):
        assert KEY not in text


def test_media_come_only_from_where_they_may(server: Running) -> None:
    def moved(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"http://127.0.0.1:{port}/secret.png")
        handler.end_headers()

    with (
        web(picture) as (port, asked),
        web(moved, host=ELSEWHERE) as (away, hops),
        web(picture, host=ELSEWHERE) as (good, seen),
    ):
        for url in FORBIDDEN:
            status, text = server.send(asking(url.format(port=port)) | {"model": "pebble"})
            assert status == 400, (url, text)
        status, text = server.send(asking(f"http://{ELSEWHERE}:{away}/") | {"model": "pebble"})
        assert (status, hops) == (400, ["/"])
        assert "redirects are not followed" in text
        assert asked == []
        status, text = server.send(asking(f"http://{ELSEWHERE}:{good}/red.png") | {"model": "pebble", "max_tokens": 4})
        assert (status, seen) == (200, ["/red.png"])
    media = server.output.parent / "media"
    status, text = server.send(asking((media / "red.png").as_uri()) | {"model": "pebble", "max_tokens": 4})
    assert status == 200
    for path in (server.output.parent / "key", Path("/etc/passwd")):
        status, text = server.send(asking(path.as_uri()) | {"model": "pebble"})
        assert (status, "media folder" in text) == (400, True)
        assert KEY not in text
    fine(server)


def streamed(server: Running, seen: threading.Event, *, tokens: int) -> tuple[int, str]:
    """(tokens, why it ended) of one long answer; `seen` is set when it is under way. A piece has several tokens where
    the client is slow."""
    told, reason = 0, "broken off"
    try:
        chunks = server.client().chat.completions.create(
            model="pebble",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            max_tokens=tokens,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for count, chunk in enumerate(chunks):
            if count == 5:
                seen.set()
            told = chunk.usage.completion_tokens if chunk.usage else told
            reason = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), reason)
    except openai.OpenAIError:
        pass
    return told, reason


@pytest.mark.slow  # the engine starts twice
def test_killed_in_the_middle_of_an_answer_it_comes_back(server: Running) -> None:
    """One client with an answer, another with a dataset: each is told in one line, and neither loses what it has."""
    leader = engine_of(server.process.pid)[0]
    folder = server.output.parent
    rows, out = folder / "rows.jsonl", folder / "out.jsonl"
    questions = [{"messages": [{"role": "user", "content": f"hello {number}"}]} for number in range(60)]
    rows.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    infer = [*MMQ, "infer", server.url, "--extra", '{"ignore_eos": true}', "--max-tokens"]
    many = [*infer, "16", "--dataset", str(rows), "--result-path", str(out), "--concurrency", "2"]
    told: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": os.environ | {"MMQ_API_KEY": KEY},
    }
    with (
        subprocess.Popen[bytes](many, **told) as dataset,
        subprocess.Popen[bytes]([*infer, "4000", "hello"], **told) as one,
    ):
        assert one.stdout is not None
        begun = one.stdout.read(20)
        while not out.exists() or out.read_text().count("\n") < 5:
            assert dataset.poll() is None, dataset.communicate()
            time.sleep(0.05)
        os.kill(leader, signal.SIGKILL)
        rest, said = one.communicate(timeout=60)
        _, said_of_many = dataset.communicate(timeout=60)
    assert one.returncode == 3, said
    assert len(begun + rest) >= 20  # what came is shown
    assert said.decode().strip().count("\n") == 0, said
    assert re.search(r"mmq: the server at .* broke off its answer", said.decode())
    assert dataset.returncode == 3, said_of_many
    found = re.search(r"is gone; (\d+) of 60 answers are in .*; the same command goes on", said_of_many.decode())
    assert found is not None, said_of_many
    kept = out.read_text().splitlines()
    assert len(kept) == int(found[1]) >= 5
    pids = server.ready(2)
    assert leader not in pids
    told_by_mmq = server.output.read_text()
    assert "the engine died: it was killed (SIGKILL)" in told_by_mmq
    assert "start 1 of 1 in 1 s" in told_by_mmq
    subprocess.run(many, check=True, capture_output=True, env=told["env"], timeout=300)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["index"] for answer in answers] == list(range(60))
    assert {line for line in kept if "error" not in json.loads(line)} <= set(out.read_text().splitlines())
    fine(server)


def test_sigterm_lets_answers_end_takes_no_new_ones_and_leaves_nothing(server: Running) -> None:
    pids = engine_of(server.process.pid)
    seen, done = threading.Event(), []
    asking = threading.Thread(target=lambda: done.append(streamed(server, seen, tokens=400)))
    asking.start()
    assert seen.wait(60)
    server.process.send_signal(signal.SIGTERM)
    statuses = set()
    while 503 not in statuses:  # while the answer is under way, or at the latest while the engine takes itself apart
        statuses.add(server.send(saying())[0])
        time.sleep(0.1)
    asking.join(60)
    assert done == [(400, "length")]
    assert statuses <= {200, 503}  # 200 where the signal was still on its way
    assert server.process.wait(60) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "requests under way have 30 s" in server.output.read_text()
