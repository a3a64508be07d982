"""Serving and asking from Python, against the real vLLM; the README's own lines are run."""

from __future__ import annotations

import asyncio
import importlib.util
import textwrap
from pathlib import Path

import pytest

from mmq.recipes.pebble.tasks import samples
from mmq.recipes.progress import Step
from mmq.serve.api import InferRequest, RequestConfig, infer, infer_async, launch, stream
from mmq.serve.client import Answer
from mmq.serve.launch import Server, free_port

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
        (InferRequest([user("a"), user("b")], ["http://a/1.png"]), "1 images or videos more than there are"),
        (InferRequest([user("a")], ["none.png"]), "no picture none.png"),
        (InferRequest([user("a")], videos=["none.mp4"]), "no video none.mp4"),
        (InferRequest([{"role": "user", "content": []}], ["http://a/1.png"]), "a user message of plain text"),
    ],
)
def test_what_cannot_be_sent_is_told_before_a_request(request_: InferRequest, message: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=message):
        infer(nobody, [request_])


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no server answers"):
        infer(f"http://127.0.0.1:{free_port()}", [InferRequest([user("hello")])], model="m")


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
    done = infer(served.url, requests, config, tell=steps.append)
    kinds = [type(a) for a in done.answers]
    assert kinds == [Answer, ValueError, Answer] * 4
    good = [a for a in done.answers if isinstance(a, Answer)]
    assert all("black" in a.text for a in good)
    assert all(a.logprobs and len(a.logprobs) == a.tokens for a in good)
    assert done.figures["num_samples"] == 8
    assert done.figures["failed"] == 4
    assert done.figures["num_generated_tokens"] == sum(a.tokens for a in good)
    assert (steps[-1].done, steps[-1].total) == (12, 12)


@needs_vllm
def test_async_seeds_and_streams(served: Server) -> None:
    request = InferRequest([{"role": "system", "content": "You are helpful."}, user("Draw me a picture with three")])

    def config(seed: int) -> RequestConfig:
        return RequestConfig(max_tokens=12, temperature=1.5, seed=seed)

    async def texts(seed: int) -> str:
        done = await infer_async(served.url, [request], config(seed))
        with pytest.raises(ValueError, match="await infer_async"):
            infer(served.url, [request])
        assert isinstance(done.answers[0], Answer)
        return done.answers[0].text

    first, again, *others = [asyncio.run(texts(seed)) for seed in (1, 1, 2, 3, 4)]
    assert first == again
    assert {first} != {*others}
    assert "".join(stream(served.url, request, config(1))) == first


@needs_vllm
def test_the_lines_of_the_readme(
    served: Server, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = README.read_text(encoding="utf-8")
    lines = text[text.index("    from mmq.serve.api import") :].splitlines()
    block = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("    "))]
    code = textwrap.dedent("\n".join(block)).replace("out-awq", served.url).replace("x.jpg", str(pictures[0]))
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "'num_samples': 100" in said
    assert said.count("形状") >= 2  # the answer of the batch, and the streamed one


def test_an_address_is_launched_already() -> None:
    with launch("http://127.0.0.1:8000/v1") as url:
        assert url == "http://127.0.0.1:8000"
