"""Serving and asking from Python, against the real vLLM; the README's own lines are run."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mmq.recipes.pebble.tasks import samples
from mmq.recipes.progress import Step
from mmq.serve.api import Answer, Client, InferRequest, RequestConfig, launch
from mmq.serve.client import connect, root
from mmq.serve.running import Server, free_port

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two pictures of pebble's test split, the first a black square on white."""
    paths = []
    for number, sample in enumerate([s for s in samples("test", 20) if len(s.images) == 1][:2]):
        paths.append(tmp_path / f"{number}.png")
        sample.images[0].save(paths[-1])
    return paths


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def shape(request: InferRequest) -> list:
    return [
        m["content"] if isinstance(m["content"], str) else [p.get("text") or p[p["type"]]["url"] for p in m["content"]]
        for m in request.as_openai()
    ]


def test_tags_take_the_media_in_order() -> None:
    said = {"role": "assistant", "content": "a cat <image>"}
    one, two, clip = "http://a/1.png", "http://a/2.png", "http://a/1.mp4"
    assert shape(InferRequest([user("one <image>"), said, user("<video><image>two")], [one, two], [clip])) == [
        ["one ", one],
        "a cat <image>",
        [clip, two, "two"],
    ]
    assert shape(InferRequest([user("what?")], [one], [clip])) == [[one, clip, "what?"]]
    assert shape(InferRequest([user("<image> is a tag")])) == ["<image> is a tag"]
    assert shape(InferRequest([user("<image>?"), said, user("and now?")], [one])) == [
        [one, "?"],
        said["content"],
        "and now?",
    ]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (InferRequest([user("<image><image>")], ["http://a/1.png"]), "more <image> tags than images"),
        (InferRequest([user("a"), user("b")], ["http://a/1.png"]), r"1 more \(image\) than there are tags"),
        (InferRequest([user("<audio>")], ["http://a/1.png"]), "more <audio> tags than audios"),
        (InferRequest([user("a")], ["none.png"]), "no picture none.png"),
        (InferRequest([user("a")], videos=["none.mp4"]), "no video none.mp4"),
        (InferRequest([user("a")], videos=[Path(__file__)]), "is text and no video"),
        (InferRequest([{"role": "user", "content": [{"type": "image"}]}]), "more <image> tags than images"),
        (InferRequest([{"role": "user", "content": [{"type": "picture"}]}]), "its type must be text, image"),
        (InferRequest([{"role": "user", "content": [{"type": "image", "image": 3}]}]), "image is 3; it must be a path"),
        (InferRequest([{"role": "user", "content": [{"type": "video", "video": "a", "fps": 1}]}]), "fps of a part"),
        (InferRequest([{"role": "user", "content": None}]), "the user's content is null"),
        (InferRequest([{"role": "reader", "content": "a"}]), "its role must be system, user"),
    ],
)
def test_what_cannot_be_sent_is_told_before_a_request(request_: InferRequest, message: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=message):
        Client(nobody).infer([request_])


def test_an_empty_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"the video .*a\.mp4 is empty"):
        InferRequest([user("a")], videos=[tmp_path / "a.mp4"]).as_openai()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no server answers"):
        Client(f"http://127.0.0.1:{free_port()}").infer([InferRequest("hello")])


@needs_vllm
def test_base64_alone(served: Server, pictures: list[Path]) -> None:
    """As ms-swift's clients send it: by ours, and to the server by anybody's."""
    bare = base64.encodebytes(pictures[0].read_bytes()).decode()
    asked = [user("<image>Which colour does the square have?")]
    assert shape(InferRequest(asked, [bare]))[0][0] == f"data:image/png;base64,{''.join(bare.split())}"
    assert Client(served.url).infer([InferRequest(asked, [bare])]).texts == ["The square is black."]
    with connect(served.url) as client:
        more = {"images": [bare]}
        reply = client.chat.completions.create(model=served.name, messages=asked, temperature=0, extra_body=more)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == "The square is black."
    for wrong, why in (("QUJD" * 100, "in base64 is no picture that can be read"), ("a" * 1001, "neither a file nor")):
        with pytest.raises(ValueError, match=why):
            InferRequest(asked, [wrong]).as_openai()


@contextlib.contextmanager
def answering(status: int, kind: str, body: bytes) -> Iterator[str]:
    """A server that says one thing to all."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "text/html", b"<html>"),
        (200, "application/json", b"<html>"),
        (200, "application/json", b'{"models": []}'),
        (200, "application/json", b'{"data": [3]}'),
        (404, "text/html", b"nothing here"),
    ],
)
def test_a_server_of_something_else(status: int, kind: str, body: bytes) -> None:
    expected = pytest.raises(OSError, match="answers, but not as an OpenAI-compatible server")
    with answering(status, kind, body) as url, expected:
        _ = Client(url).models


def test_a_server_that_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMQ_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with answering(401, "application/json", b'{"error": {"message": "no"}}') as url:
        with pytest.raises(OSError, match="wants an API key; set MMQ_API_KEY, or give --api-key-file"):
            _ = Client(url).models
        with pytest.raises(OSError, match="wants another API key;"):
            _ = Client(url, api_key="old").models
    monkeypatch.setenv("MMQ_API_KEY", "密钥")
    with pytest.raises(ValueError, match="the API key in MMQ_API_KEY must be one word of ASCII"):
        _ = Client(url).models
    monkeypatch.delenv("MMQ_API_KEY")
    said = b'{"error": {"message": "ask for 127.0.0.1"}}'
    with answering(403, "application/json", said) as url, pytest.raises(ValueError, match=r"\(403\): ask for 127"):
        _ = Client(url).models


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/models", "/v1/chat/completions", "/v1/completions"])
def test_an_address_may_be_pasted_from_anywhere(end: str) -> None:
    assert root(f"http://[::1]:8000{end}") == "http://[::1]:8000"
    assert root(f"https://a.example/proxy{end}") == "https://a.example/proxy"


@needs_vllm
def test_requests_and_their_figures(served: Server, pictures: list[Path]) -> None:
    turns = [user("<image>图中有什么？"), {"role": "assistant", "content": "一个正方形。"}]
    requests = [
        InferRequest([user("<image>Which colour does the square have?")], pictures[:1]),
        InferRequest([user("word " * 20000)]),
        InferRequest([*turns, user("Which colour does the square have?")], pictures[:1]),
    ] * 4
    steps: list[Step] = []
    config = RequestConfig(max_tokens=16, logprobs=True)
    client = Client(served.url)
    assert client.models == [served.name]
    done = client.infer(requests, config, tell=steps.append)
    kinds = [type(a) for a in done.answers]
    assert kinds == [Answer, ValueError, Answer] * 4
    good = [a for a in done.answers if isinstance(a, Answer)]
    assert all("black" in a.text for a in good)
    assert all(a.logprobs and len(a.logprobs) == a.tokens for a in good)
    assert done.figures["num_samples"] == 8
    assert done.figures["failed"] == 4
    assert done.figures["num_generated_tokens"] == sum(a.tokens for a in good)
    assert (steps[-1].done, steps[-1].total) == (12, 12)
    with pytest.raises(ValueError, match="refused the request"):
        _ = done.texts
    said: dict[int, str] = {0: "", 1: "", 2: ""}

    def hear(number: int, piece: str) -> None:
        said[number] += piece

    again = client.infer(requests[:3], RequestConfig(max_tokens=16, logprobs=True, stream=True), on_piece=hear)
    assert [said[0], said[2]] == [good[0].text, good[1].text]
    assert (again.figures["num_prompt_tokens"], again.figures["failed"]) == (done.figures["num_prompt_tokens"] // 4, 1)
    one = again.answers[0]
    assert isinstance(one, Answer)
    assert (one.finish, len(one.logprobs or [])) == (good[0].finish, one.tokens)
    with pytest.raises(ValueError, match="go together"):
        client.infer(requests[:1], RequestConfig(stream=True))
    with pytest.raises(ValueError, match="has no model 'other'"):
        Client(served.url, model="other").infer(requests[:1])


@needs_vllm
def test_async_seeds_and_streams(served: Server) -> None:
    request = InferRequest([{"role": "system", "content": "You are helpful."}, user("Draw me a picture with three")])

    def config(seed: int) -> RequestConfig:
        return RequestConfig(max_tokens=12, temperature=1.5, seed=seed)

    async def texts(seed: int) -> str:
        client = Client(served.url)
        done = await client.infer_async([request], config(seed))
        with pytest.raises(ValueError, match=r"await \.\.\.infer_async"):
            client.infer([request])
        assert isinstance(done.answers[0], Answer)
        return done.answers[0].text

    first, again, *others = [asyncio.run(texts(seed)) for seed in (1, 1, 2, 3, 4)]
    assert first == again
    assert {first} != {*others}
    assert "".join(Client(served.url).stream(request, config(1))) == first


@needs_vllm
def test_the_lines_of_the_readme(
    served: Server, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = README.read_text(encoding="utf-8")
    lines = text[text.index("    from mmq.serve import") :].splitlines()
    block = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("    "))]
    code = textwrap.dedent("\n".join(block)).replace("out-awq", served.url).replace("x.jpg", str(pictures[0]))
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "'num_samples': 100" in said
    assert said.count("形状") >= 2  # the answer of the batch, and the streamed one


def test_an_address_is_launched_already() -> None:
    with launch("http://127.0.0.1:8000/v1") as client:
        assert client == Client("http://127.0.0.1:8000")
    assert "secret" not in repr(Client("http://127.0.0.1:8000", api_key="secret"))


def test_parts_in_every_form_that_people_write(pictures: list[Path], tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0frames")
    data = "data:video/mp4;base64," + base64.b64encode(b"\0frames").decode()
    parts = [
        "see",
        {"type": "image", "image": "http://a/1.png"},
        {"type": "image_url", "image_url": "http://a/2.png"},
        {"type": "image_url", "image_url": {"url": "http://a/3.png", "detail": "low"}},
        {"type": "input_image", "image_url": "http://a/4.png"},
        {"type": "video", "video": str(clip)},
        {"type": "video", "video": data},
        {"type": "video_url", "video_url": {"url": clip.as_uri()}},
        {"type": "audio", "audio": "http://a/1.wav"},
        {"type": "image"},
        {"type": "text", "text": "and <image>."},
    ]
    request = InferRequest([{"role": "user", "content": parts}], ["http://a/5.png", "http://a/6.png"])
    addresses = [f"http://a/{n}.png" for n in "123456"]
    clips = [data] * 3
    assert shape(request) == [
        ["see", *addresses[:4], *clips, "http://a/1.wav", addresses[4], "and ", addresses[5], "."]
    ]
    tag = {"type": "text", "text": "<image> is a tag"}  # where no media come beside the messages it is text
    assert shape(InferRequest([{"role": "user", "content": [tag]}])) == [["<image> is a tag"]]
    assert shape(InferRequest("what?", pictures[:1]))[0][0].startswith("data:image/png;base64,")
