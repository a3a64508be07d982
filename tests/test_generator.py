"""The load generator: its words, its rows, and what it makes of real streams: vLLM's, and one that opens too early."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmq.bench.generator import Ask, generator, one_run, span_of, written_rows
from mmq.bench.speed import Load, command, read_run, warm_up
from mmq.serve.running import Server

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SMALL = Load(requests=4, concurrency=2, input_tokens=16, output_tokens=8, picture=(56, 84), runs=2, warmups=1)
LATE = 0.2  # seconds that the slow server needs before its first token


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """One generator for all tests: it imports vLLM."""
    with generator(tmp_path_factory.mktemp("generator") / "generator.log") as ask:
        yield ask


def test_the_generators_words(tmp_path: Path) -> None:
    load = Load(concurrency=8, warmups=2)

    def value(words: list[str], flag: str) -> str:
        return words[words.index(flag) + 1]

    def words(load: Load, run: int, **options: Any) -> list[str]:
        return command("http://x", "m", tmp_path, load, run=run, result=tmp_path / "r.json", **options)

    first, later = warm_up(load, 0), warm_up(load, 1)
    assert first
    assert later
    assert (first.requests, later.requests) == (8, 2)  # at first as many at once as the level has
    assert warm_up(dataclasses.replace(load, warmups=0), 1) is None
    asked = [
        (one, run) for level in (1, 8, 32) for run in range(5) for one in (load.at(level), warm_up(load.at(level), run))
    ]
    seeds = {value(words(one, run), "--seed") for one, run in asked if one}
    assert len(seeds) == 30  # nothing is asked twice
    own = words(load, 0, rows=tmp_path / "dataset.jsonl", remote_code=True)
    assert value(own, "--dataset-name") == "custom_image"
    assert value(own, "--custom-output-len") == "128"
    assert "--trust-remote-code" in own
    assert "--random-input-len" not in own


def test_a_dataset_becomes_the_generators_rows(tmp_path: Path) -> None:
    Image.new("RGB", (30, 40), "red").save(tmp_path / "a.png")
    lines = [
        {"messages": [{"role": "system", "content": "kurz"}, {"role": "user", "content": "<image>什么颜色？"}]},
        {"query": "Hello", "response": "Hi"},
    ]
    lines[0]["images"] = ["a.png"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    file = written_rows(Load(dataset=str(data)), tmp_path)
    assert file is not None
    rows = [json.loads(line)["content"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [part["type"] for part in rows[0]] == ["text", "image_url", "text"]
    assert rows[0][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert rows[0][2]["text"] == "什么颜色？"
    assert rows[1] == [{"type": "text", "text": "Hello"}]
    assert written_rows(Load(), tmp_path) is None
    data.write_text('{"query": "<video>what?", "videos": ["https://example.org/x.mp4"]}\n')
    with pytest.raises(ValueError, match="text and pictures; video_url cannot be sent"):
        written_rows(Load(dataset=str(data)), tmp_path)


@needs_vllm
def test_a_server_is_measured(served: Server, ask: Ask, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """A run that fails with the generator's own reason, then one that does not, then one of rows of one's own."""
    options: dict[str, Any] = {"model": served.name, "load": SMALL, "number": 0}
    file = tmp_path / "awq-1.json"
    with pytest.raises(RuntimeError, match=r"`vllm bench serve` failed: .*\bnowhere\b"):
        one_run(ask, served.url, tokenizer=tmp_path / "nowhere", result=file, **options)
    begun = time.perf_counter()
    run = one_run(ask, served.url, tokenizer=artifact("awq"), result=file, **options)
    first, last = span_of(file)
    assert begun < first < last < time.perf_counter()
    assert run.output_lens == (SMALL.output_tokens,) * SMALL.requests
    # each prompt has its words, the picture's 56 * 84 / 28**2 tokens and the template's
    assert all(SMALL.input_tokens + 6 < n < SMALL.input_tokens + 60 for n in run.input_lens)
    assert len(run.ttft) == len(run.tpot) == len(run.latency) == SMALL.requests
    for whole, first, further, count in zip(run.latency, run.ttft, run.tpot, run.output_lens, strict=True):
        assert whole == pytest.approx(first + further * (count - 1))
    assert sum(run.itl) == pytest.approx(sum(run.latency) - sum(run.ttft), rel=0.01)
    assert max(run.latency) <= run.seconds
    assert read_run(json.loads(file.read_text())) == run
    # as many gaps as tokens after the first, but where several came in one piece, as a loaded machine's do
    gaps = json.loads(file.read_text())["itls"]
    assert all(0 < len(found) < SMALL.output_tokens for found in gaps)
    for found, whole, first in zip(gaps, run.latency, run.ttft, strict=True):
        assert sum(found) == pytest.approx(whole - first, rel=0.02)
    Image.new("RGB", (56, 84), "red").save(tmp_path / "a.png")
    rows = [{"query": "<image>图中有什么？", "images": [str(tmp_path / "a.png")]}, {"query": "Which colour? " * 30}]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options["load"] = dataclasses.replace(SMALL, dataset=str(own))
    options["rows"] = written_rows(options["load"], tmp_path)
    run = one_run(ask, served.url, tokenizer=artifact("awq"), result=file, **options)
    assert run.output_lens == (SMALL.output_tokens,) * SMALL.requests
    assert len(set(run.input_lens)) == 2  # both rows, asked twice each


def early(asked: list[Any]) -> type[BaseHTTPRequestHandler]:
    """A server that streams as `transformers serve` does: its role at once, then its tokens, the usage with the last
    message. What it is asked goes to `asked`."""

    class Early(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"])
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self._say({"role": "assistant"})
            time.sleep(LATE)
            for _ in range(body["max_completion_tokens"]):
                self._say({"content": "w "})
                time.sleep(0.01)
            count = body["max_completion_tokens"]
            self._say({}, finish_reason="length", usage={"prompt_tokens": 321, "completion_tokens": count})

        def _say(self, delta: dict[str, str], *, usage: dict[str, int] | None = None, **more: str) -> None:
            data = {"choices": [{"index": 0, "delta": delta, **more}], **({"usage": usage} if usage else {})}
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Early


@needs_vllm
def test_a_role_is_no_token(ask: Ask, pebble: Path, tmp_path: Path) -> None:
    """The first token is the first word; tokens are as the server counts them; no warm-up has a run's own question."""
    asked: list[Any] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), early(asked)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        run = one_run(ask, url, model="m", tokenizer=pebble, load=SMALL, number=0, result=tmp_path / "r.json")
        server.shutdown()
    assert min(run.ttft) > LATE
    assert max(run.itl) < LATE / 2
    assert max(run.tpot) < LATE / 2
    assert len(run.itl) == SMALL.requests * (SMALL.output_tokens - 1)
    assert set(run.input_lens) == {321}
    assert run.output_lens == (SMALL.output_tokens,) * SMALL.requests
    assert len(asked) == SMALL.requests + SMALL.concurrency
    assert len({json.dumps(messages) for messages in asked}) == len(asked)
    assert not (tmp_path / "warm-up.json").exists()
