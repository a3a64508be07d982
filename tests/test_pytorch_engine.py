"""--engine pytorch: real `transformers serve` of pebble in every format, through the openai client."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from mmq.bench.generate import answers
from mmq.bench.served import check_served
from mmq.bench.speed import Load
from mmq.bench.stages import stages
from mmq.bench.verdict import limits_of
from mmq.export.artifact import open_artifact
from mmq.export.subject import Linear, read_subject
from mmq.export.view import view
from mmq.quantize.inputs import encode
from mmq.quantize.skeleton import build
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.samples import Sample, as_openai
from mmq.serve.engines import plan
from mmq.serve.machine import GIB, Gpu, Machine, this_machine
from mmq.serve.pytorch_face import asked, plain_part
from mmq.serve.pytorch_replies import failure
from mmq.serve.pytorch_sampling import Sampling, cut, sampling
from mmq.serve.rules.rule import Setting, judge
from mmq.serve.rules.verdicts import PLACES
from mmq.serve.running import Server, free_port, running

needs_server = pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="transformers[serving] is absent")
KINDS = {
    "fp16": None,
    "awq": ("awq", None),
    "gptq": ("gptq", None),
    "ct": ("awq", "compressed-tensors"),
    "bnb": ("bnb", None),
}
DEFAULT = ("fp16", "awq")  # a server each: the others are `-m slow`, their weights test_restored.py's
LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
DESK = replace(LAPTOP, gpus=(Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 24000 << 20, 8.9),))


@pytest.fixture(scope="module")
def served_as(
    request: pytest.FixtureRequest,
    artifact: Callable[..., Path],
    pebble: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Server]]:
    """Pebble in one of KINDS under `transformers serve`: its folder and its server."""
    kind = KINDS[request.param]
    folder = artifact(*kind) if kind else pebble
    launch = plan("pytorch", folder, machine=this_machine(), port=free_port())
    with running(launch, timeout=120, log_path=tmp_path_factory.mktemp("pytorch") / "log") as server:
        yield folder, server


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def said(server: Server, sample: Sample, **options: object) -> str:
    reply = client_of(server).chat.completions.create(
        model=server.name,
        messages=as_openai(sample.question),  # pyright: ignore
        **{"max_tokens": 40, "temperature": 0} | options,  # pyright: ignore
    )
    return reply.choices[0].message.content or ""


def with_pictures() -> list[Sample]:
    one = [s for s in samples("test", 60) if len(s.images) == 1 and not s.videos][:4]
    several = [s for s in samples("test", 120) if len(s.images) > 1][:2]
    return one + several


@needs_server
@pytest.mark.parametrize(
    "served_as", [k if k in DEFAULT else pytest.param(k, marks=pytest.mark.slow) for k in KINDS], indirect=True
)
def test_answers_are_those_of_mmqs_own_reading(served_as: tuple[Path, Server]) -> None:
    folder, server = served_as
    questions = with_pictures()
    skeleton = build(folder, source=view(folder))
    with torch.no_grad():
        prompts = [encode(skeleton, s, prompt_only=True) for s in questions]
        own = [skeleton.words.decode(ids) for ids in answers(skeleton, prompts, max_new_tokens=40)]
    assert [said(server, s) for s in questions] == own
    assert len(set(own)) > 3


@needs_server
def test_check_asks_the_served_artifact(artifact: Callable[..., Path], pebble: Path) -> None:
    """The logprobs that the server gives of reference answers, against both walks."""
    opened = open_artifact(artifact("gptq"))
    questions = [s for s in samples("test", 60) if s.answer and not s.videos][:6]
    result = check_served(opened, pebble, samples=questions, limits=limits_of(opened), engine="pytorch")
    assert not result.failures
    assert result.measures["served_to_int4"] < 1e-3
    assert result.measures["served_to_int4"] < result.measures["served_to_fp16"]


only_awq = pytest.mark.parametrize("served_as", ["awq"], indirect=True)


@needs_server
@only_awq
def test_the_face(served_as: tuple[Path, Server]) -> None:
    """One name, streaming, completions, log-probabilities, text alone, Chinese."""
    _, server = served_as
    client = client_of(server)
    models = client.models.list().data
    assert [m.id for m in models] == [server.name] == ["pebble-awq"]
    sample = with_pictures()[0]
    messages = as_openai(sample.question)
    ask = client.chat.completions.create
    chunks = list(ask(model=server.name, messages=messages, max_tokens=20, temperature=0, stream=True))  # pyright: ignore
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    whole = ask(model=server.name, messages=messages, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2)  # pyright: ignore
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert {c.model for c in chunks} == {whole.model} == {server.name}
    assert whole.usage is not None
    found = whole.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == whole.usage.completion_tokens
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob >= t.logprob for t in found.content)
    assert all(t.logprob == t.top_logprobs[0].logprob for t in found.content)  # greedy: the likeliest was taken
    assert all(t.logprob <= 0 for t in found.content)
    text = client.completions.create(model=server.name, prompt="The picture shows", max_tokens=4, temperature=0)
    assert text.choices[0].finish_reason == "length"
    chinese = next(s for s in samples("test", 160) if s.images and "\u4e00" <= s.answer[0] <= "\u9fff")
    assert any("\u4e00" <= c <= "\u9fff" for c in said(server, chinese))


@needs_server
@only_awq
def test_an_answer_is_as_long_as_a_measurement_wants_it(served_as: tuple[Path, Server]) -> None:
    _, server = served_as
    with client_of(server) as client:
        ask: Any = partial(client.chat.completions.create, model=server.name, max_tokens=40, temperature=0)
        messages = [{"role": "user", "content": "What is this?"}]
        assert ask(messages=messages).usage.completion_tokens < 40
        endless = {"extra_body": {"ignore_eos": True}}
        assert ask(messages=messages, **endless).usage.completion_tokens == 40
        *_, last = ask(messages=messages, stream=True, stream_options={"include_usage": True}, **endless)
        assert last.usage.completion_tokens == 40


@needs_server
@only_awq
def test_stages_where_only_the_client_has_a_clock(served_as: tuple[Path, Server]) -> None:
    _, server = served_as
    load = Load(input_tokens=24, output_tokens=24, picture=(224, 224), pictures=2)
    found = stages(server.url, model=server.name, load=load, rounds=2)
    assert list(found.figures) == ["picture", "prefill", "decode"]
    assert "one figure" in found.untold
    assert found.settings["clock"] == "the client's"
    assert found.settings["output_tokens"] == 24
    assert found.figures["decode"].value > found.figures["prefill"].value > 0


@needs_server
@only_awq
def test_a_temperature_samples(served_as: tuple[Path, Server]) -> None:
    """transformers serve alone would stay greedy, as pebble's generation config has it."""
    _, server = served_as
    ask = client_of(server).completions.create
    told = {
        ask(model=server.name, prompt="A", max_tokens=12, temperature=1.5, seed=seed).choices[0].text
        for seed in (1, 2, 3)
    }
    assert len(told) > 1
    again = [ask(model=server.name, prompt="A", max_tokens=12, temperature=1.5, seed=7).choices[0].text for _ in "ab"]
    assert again[0] == again[1]


@needs_server
@only_awq
def test_videos(served_as: tuple[Path, Server], tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    import numpy

    path = tmp_path / "a.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 4, (112, 112))
    for step in range(8):
        frame = numpy.full((112, 112, 3), 255, numpy.uint8)
        cv2.circle(frame, (24 + 8 * step, 56), 16, (0, 0, 255), -1)  # BGR
        writer.write(frame)
    writer.release()
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What is in the video?"}]
    client = client_of(served_as[1])

    def asked_with(**extra: object) -> tuple[str, int]:
        reply = client.chat.completions.create(
            model=served_as[1].name,
            messages=[{"role": "user", "content": parts}],  # pyright: ignore
            max_tokens=30,
            temperature=0,
            extra_body=extra,
        )
        assert reply.usage is not None
        return reply.choices[0].message.content or "", reply.usage.prompt_tokens

    text, length = asked_with()
    assert "red" in text
    less = asked_with(media_io_kwargs={"video": {"fps": 2}})[1]  # as vLLM takes it: half of the four a second
    assert less < length


def picture(data: bytes, text: str = "") -> list[dict[str, object]]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


def png() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(held, "PNG")
    return held.getvalue()


HELLO: Any = [{"role": "user", "content": "hello"}]


@needs_server
@only_awq
@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"model": "another"}, 404, "does not exist"),
        ({"n": 2, "temperature": 0}, 400, "which gives one answer"),
        ({"n": 0}, 400, "n is 0; it must be a whole number from 1 to 128"),
        ({"top_logprobs": 2}, 400, "top_logprobs goes with logprobs"),
        ({"stream": "no"}, 400, "stream is 'no'; it must be true or false"),
        ({"generation_config": "{}"}, 400, "has no generation_config in chats"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, 400, "which the server alone says"),
        ({"messages": []}, 400, "must have messages, at least one"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "must be a text or a list of parts"),
        ({"response_format": {"type": "json_object"}}, 400, "has no response_format"),
        ({"max_tokens": 10**6}, 400, "context is 4096 tokens"),
        ({"messages": [{"role": "user", "content": "hello " * 5000}]}, 400, "context is 4096 tokens"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"messages": picture(b"no picture")}, 400, "picture"),
        ({"messages": [{"content": "hello"}]}, 400, "role"),
        ({"messages": picture(png(), "<|image_pad|>")}, 400, "processor cannot read this request|the number of images"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias names token 999999; the model has 2048"),
        ({"logit_bias": {"the": 1}}, 400, "logit_bias has 'the': 1"),
        ({"top_p": 1.5}, 400, "top_p is 1.5; it must be a number from 0 to 1"),
        ({"temperature": 3}, 400, "temperature is 3; it must be a number from 0 to 2"),
        ({"frequency_penalty": -3}, 400, "frequency_penalty is -3"),
        ({"stop": [""]}, 400, "none of them empty"),
        ({"seed": 2**70}, 400, "seed is"),
        ({"no_such_field": 1}, 400, "has no no_such_field"),
    ],
)
def test_bad_requests_are_told_in_plain_words(
    served_as: tuple[Path, Server], body: dict[str, object], status: int, why: str
) -> None:
    _, server = served_as
    sent = {"model": server.name, "messages": HELLO, "max_tokens": 4} | body
    with pytest.raises(openai.APIStatusError, match=why) as caught:
        client_of(server).post("/chat/completions", body=sent, cast_to=object)
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]
    assert said(server, with_pictures()[0])  # it lives


@needs_server
@only_awq
def test_an_answer_ends_before_a_stop(served_as: tuple[Path, Server]) -> None:
    """Whole, in pieces and of completions, and the stop itself is not told; as vLLM has it."""
    server = served_as[1]
    with client_of(server) as client:
        ask: Any = partial(client.chat.completions.create, model=server.name, messages=HELLO, temperature=0)
        plain = ask(max_tokens=40)
        said = plain.choices[0].message.content
        assert plain.choices[0].finish_reason == "stop"
        assert ask(max_tokens=plain.usage.completion_tokens).choices[0].finish_reason == "stop"  # its end token fits
        assert ask(max_tokens=3).choices[0].finish_reason == "length"
        stop = said[len(said) // 2 :][:3]
        cut_off = ask(max_tokens=40, stop=[stop, "no such text"])
        assert cut_off.choices[0].message.content == said[: said.index(stop)]
        assert cut_off.choices[0].finish_reason == "stop"
        assert cut_off.usage.completion_tokens < plain.usage.completion_tokens
        chunks = list(ask(max_tokens=40, stop=stop, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == said[: said.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        complete: Any = partial(client.completions.create, model=server.name, prompt="The picture", temperature=0)
        text = complete(max_tokens=40).choices[0].text
        assert complete(max_tokens=40, stop=text[5:9]).choices[0].text == text[: text.index(text[5:9])]


@needs_server
@only_awq
def test_a_stream_is_an_openai_stream(served_as: tuple[Path, Server]) -> None:
    """The role first, log-probabilities with their tokens, one reason at the end, usage for who asked, [DONE]."""
    server = served_as[1]
    body = {"model": server.name, "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True}
    with client_of(server) as client:
        ask: Any = client.chat.completions.create
        whole = ask(**body | {"stream": False}, logprobs=True, top_logprobs=2)
        chunks = list(ask(**body, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        told = [entry for c in chunks[:-1] if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
        assert told == whole.choices[0].logprobs.content
        assert all(c.usage is None for c in ask(**body))
        raw = client.post("/chat/completions", body=body, cast_to=str)
        assert raw.endswith("data: [DONE]\n\n")


@needs_server
@only_awq
def test_several_prompts_and_several_answers(served_as: tuple[Path, Server]) -> None:
    server = served_as[1]
    with client_of(server) as client:
        ask: Any = partial(client.completions.create, model=server.name, max_tokens=4, temperature=0, logprobs=1)
        alone = [ask(prompt=prompt) for prompt in ("The picture", "A red")]
        both = ask(prompt=["The picture", "A red"])
        assert [c.text for c in both.choices] == [a.choices[0].text for a in alone]
        assert [c.index for c in both.choices] == [0, 1]
        assert both.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)
        first = both.choices[0].logprobs
        assert "".join(first.tokens) == both.choices[0].text
        assert first.text_offset == [sum(map(len, first.tokens[:at])) for at in range(4)]
        streamed: dict[int, str] = {0: "", 1: ""}
        for chunk in ask(prompt=["The picture", "A red"], stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert list(streamed.values()) == [c.text for c in both.choices]
        assert ask(prompt=[5, 6, 7]).usage.prompt_tokens == 3
        drawn: Any = partial(ask, prompt="A", temperature=1.5, n=3, max_tokens=8)
        three = drawn(seed=5)
        assert len({c.text for c in three.choices}) > 1
        assert [c.text for c in three.choices] == [c.text for c in drawn(seed=5).choices]
        assert three.usage.completion_tokens <= 24
        for wrong in ("", [], [[]], [10**6]):
            with pytest.raises(openai.BadRequestError, match="prompt"):
                ask(prompt=wrong)


@needs_server
@only_awq
def test_a_seed_holds_among_other_requests(served_as: tuple[Path, Server]) -> None:
    """The generator is the process's: a seed set when a request comes in would be used up by whoever samples before."""
    server = served_as[1]
    with client_of(server) as client, ThreadPoolExecutor(8) as pool:

        def draw(seed: int | None) -> str:
            ask: Any = client.completions.create
            more = {} if seed is None else {"seed": seed}
            return ask(model=server.name, prompt="A", max_tokens=12, temperature=1.5, **more).choices[0].text

        alone = draw(7)
        assert set(pool.map(draw, [7, None, 7, None, 7, 7])) > {alone}
        assert {*pool.map(draw, [7] * 4)} == {alone}
        assert len({draw(None) for _ in range(3)}) > 1


@needs_server
@only_awq
@pytest.mark.parametrize(("penalty", "each"), [("frequency_penalty", True), ("presence_penalty", False)])
def test_a_penalty_is_openais(served_as: tuple[Path, Server], penalty: str, each: bool) -> None:
    """Taken from the logits of what the answer has already, for each time or once; transformers serve makes a
    repetition penalty of the first, which divides the prompt's too."""
    server = served_as[1]
    with client_of(server) as client:
        ask: Any = partial(client.completions.create, model=server.name, prompt="The picture", temperature=0)
        plain, told = (ask(max_tokens=12, logprobs=20, **{penalty: p}).choices[0].logprobs for p in (0, 2))
        assert plain.tokens != told.tokens
        for at, likely in enumerate(told.top_logprobs):
            seen = Counter(told.tokens[:at])
            left = {text: p - 2 * (seen[text] if each else min(seen[text], 1)) for text, p in likely.items()}
            assert told.tokens[at] == max(left, key=left.__getitem__)


@needs_server
@only_awq
def test_a_client_does_not_set_how_large_pictures_are_made(served_as: tuple[Path, Server]) -> None:
    """What the template does not know of `chat_template_kwargs` is left out, as under vLLM."""
    server = served_as[1]
    with client_of(server) as client:
        ask: Any = partial(client.chat.completions.create, model=server.name, max_tokens=1, temperature=0)
        messages = as_openai(with_pictures()[0].question)
        words = {"min_pixels": 10**6, "max_pixels": 10**7, "images_kwargs": {"min_pixels": 10**6}, "new": False}
        sized = ask(messages=messages, extra_body={"chat_template_kwargs": words})
        assert sized.usage == ask(messages=messages).usage


@needs_server
@only_awq
def test_what_nobody_waits_for_is_not_drawn(served_as: tuple[Path, Server]) -> None:
    """A client that leaves a whole answer, and one that leaves a queue, do not keep the others waiting."""
    server = served_as[1]
    endless: Any = {"model": server.name, "max_tokens": 4000, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with client_of(server) as client, ThreadPoolExecutor(3) as pool:

        def leave(_: int) -> None:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(messages=HELLO, **endless, timeout=1)  # pyright: ignore

        list(pool.map(leave, range(3)))
        begun = time.monotonic()
        assert client.completions.create(model=server.name, prompt="A", max_tokens=1).usage
        assert time.monotonic() - begun < 15  # one alone takes many times that


@needs_server
@only_awq
def test_a_bias_moves_the_answer(served_as: tuple[Path, Server]) -> None:
    """A whole number is a bias too, and an empty list of stops or biases is none."""
    _, server = served_as
    sample = with_pictures()[0]
    plain = said(server, sample)
    assert said(server, sample, logit_bias={}, stop=[]) == plain
    moved = said(server, sample, logit_bias={"40": 100}, max_tokens=5)
    assert len(set(moved)) == 1
    assert len(moved) == 5
    assert moved[0] != plain[0]


@needs_server
@only_awq
@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/openapi.json"])
def test_no_other_route_is_open(served_as: tuple[Path, Server], path: str) -> None:
    """transformers serve would load any folder of the disk, or forget the model, for whoever asks."""
    with pytest.raises(openai.NotFoundError):
        client_of(served_as[1]).post(f"{served_as[1].url}{path}", body={"model": "/"}, cast_to=object)


def test_what_is_asked_in_other_words() -> None:
    body = {"messages": HELLO, "max_completion_tokens": 5, "n": 1, "user": "x", "best_of": 1}
    chat = partial(asked, names=("it", "colour"), chat=True)
    plain = chat(body)
    assert (plain.model, plain.messages, plain.how) == ("it", HELLO, Sampling(max_tokens=5))
    assert chat(body | {"max_tokens": 9}).how.max_tokens == 5
    assert chat(body | {"model": "colour"}).model == "colour"
    assert chat(body | {"stream": True, "stream_options": {"include_usage": True}}).usage
    assert chat(body | {"logprobs": True}).logprobs == 0
    assert chat(body | {"logprobs": True, "top_logprobs": 3, "stream": True}).logprobs == 3
    prompt = chat(body | {"prompt_logprobs": 0, "add_generation_prompt": False})
    assert (prompt.prompt_logprobs, prompt.opened) == (True, False)
    for wrong in ({"prompt_logprobs": 5}, {"prompt_logprobs": 0, "stream": True}, {"add_generation_prompt": False}):
        with pytest.raises(ValueError, match="prompt_logprobs: 0"):
            chat(body | wrong)
    for wrong in ({"logprobs": True, "top_logprobs": 50}, {"top_logprobs": 2}):
        with pytest.raises(ValueError, match="logprobs"):
            chat(body | wrong)
    sampled = {"media_io_kwargs": {"video": {"fps": 1.0, "max_frames": 8, "num_frames": 8}}}
    assert chat(body | sampled).frames == {"fps": 1.0}
    for wrong in (0, "1", math.inf, True):
        with pytest.raises(ValueError, match="fps of videos is"):
            chat(body | {"media_io_kwargs": {"video": {"fps": wrong}}})
    with pytest.raises(LookupError, match="this server has it, colour"):
        chat(body | {"model": "shape"})
    with pytest.raises(ValueError, match="no suffix in completions"):
        asked({"prompt": "x", "suffix": "y"}, names=["it"], chat=False)


def test_prompts_to_be_completed() -> None:
    def prompts(given: object) -> object:
        return asked({"prompt": given}, names=["it"], chat=False).prompts

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([5, 6]) == [[5, 6]]
    assert prompts([[5, 6], "a"]) == [[5, 6], "a"]
    for wrong in (None, "", [], [""], [[]], 5, [5, "a"], [-1], [True]):
        with pytest.raises(ValueError, match="prompt is"):
            prompts(wrong)
    completed = asked({"prompt": "a", "logprobs": 2}, names=["it"], chat=False)
    assert (completed.chat, completed.logprobs, completed.how.max_tokens) == (False, 2, 16)


def test_how_answers_are_drawn() -> None:
    chat = partial(sampling, chat=True)
    assert chat({"logit_bias": {"5": 1}, "stop": "END"}) == Sampling(bias={5: 1.0}, stop=("END",))
    assert chat({"logit_bias": {}, "stop": []}) == Sampling()
    assert chat({"temperature": 1e-300}).temperature == 0
    for wrong in ([5], {"-1": 1}, {"1": 101}, {"1": True}, {"the": 1}):
        with pytest.raises(ValueError, match="logit_bias"):
            chat({"logit_bias": wrong})
    for key, value in (("temperature", math.nan), ("max_tokens", 4.5), ("seed", True), ("stop", 5), ("top_p", -0.1)):
        with pytest.raises(ValueError, match=key):
            chat({key: value})


def test_a_stop_is_held_back_until_it_is_none() -> None:
    stops = ("END", "\n\n")
    assert cut("the E", stops) == ("the ", "E", False)
    assert cut("the EN", stops) == ("the ", "EN", False)
    assert cut("the ENvy", stops) == ("the ENvy", "", False)
    assert cut("a\n", stops) == ("a", "\n", False)
    assert cut("a\n\nb END", stops) == ("a", "", True)
    assert cut("all", ()) == ("all", "", False)


def test_media_in_other_words() -> None:
    for url in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", 7):
        with pytest.raises(ValueError, match="must have a url"):
            plain_part({"type": "image_url", "image_url": {"url": url}})
    one = {"type": "image_url", "image_url": {"url": "data:x"}}
    for part in (one, {"type": "image", "image": "data:x"}, {"type": "input_image", "image_url": "data:x"}):
        assert plain_part(part) == one
    assert plain_part({"type": "video", "video": "data:x"}) == {"type": "video_url", "video_url": {"url": "data:x"}}
    with pytest.raises(ValueError, match="not 'audio_url'"):
        plain_part({"type": "audio_url", "audio_url": {"url": "data:x"}})
    assert failure("x", 404)["error"]["type"] == "NotFoundError"


def test_where_it_runs(artifact: Callable[..., Path], pebble: Path) -> None:
    """The device, and what is said of the memory: an int4 artifact takes what its 16-bit original takes."""
    with pytest.raises(
        ValueError, match=r"awq restored to 16 bit.*this machine has 1\.0 GiB free.*--engine vllm keeps"
    ):
        plan("pytorch", artifact("awq"), machine=replace(LAPTOP, available=GIB))
    assert "--device cpu" in dict(plan("pytorch", artifact("awq"), machine=LAPTOP).reasons)
    with pytest.raises(ValueError, match=r"left, room for \d+ tokens of context"):
        plan("pytorch", artifact("awq"), machine=replace(LAPTOP, available=GIB + (12 << 20)))
    with pytest.raises(ValueError, match="the engine pytorch has no --pp"):
        plan("pytorch", pebble, machine=LAPTOP, pp=2)
    with pytest.raises(ValueError, match="--continuous-batching draws"):
        plan("pytorch", pebble, machine=LAPTOP, extra=("--continuous-batching",))
    plan("pytorch", pebble, machine=LAPTOP, extra=("--no-continuous-batching",))  # off is how it is
    with pytest.raises(OSError, match="MMQ_PYTORCH names /nowhere"):
        plan("pytorch", pebble, machine=LAPTOP, environ={"MMQ_PYTORCH": "/nowhere"})


def test_experts_that_it_would_make_up_are_refused_before_the_start(artifact: Callable[..., Path]) -> None:
    sound = read_subject(artifact("awq"))
    name = "model.language_model.layers.0.mlp.experts.0.up_proj"
    config = {**sound.config, "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    mixture = replace(sound, config=config, linears={**sound.linears, name: Linear(name, 256, 256, True, 128)})
    place = next(p for p in PLACES if p.name == "pytorch:cpu")
    assert judge(sound, place, Setting(device="cpu")).answer == "yes"
    found = judge(mixture, place, Setting(device="cpu")).findings
    assert [f.rule for f in found if f.fatal] == ["experts"]


def test_a_gpu_is_taken_where_pytorch_can_use_it(artifact: Callable[..., Path], tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    python.parent.mkdir()
    python.symlink_to("/bin/sh")
    for name, version in (("transformers", "5.19.0"), ("fastapi", "1"), ("uvicorn", "1"), ("mmq_toolkit", "0")):
        (site / f"{name}-{version}.dist-info").mkdir()
    (site / "torch-2.13.0.dist-info").mkdir()

    def device() -> str:
        argv = plan("pytorch", artifact("awq"), machine=DESK, engine_bin=tmp_path).argv
        assert argv[0] == str(python)
        return argv[argv.index("--device") + 1]

    assert device() == "cuda:0"
    full = replace(DESK, gpus=(replace(DESK.gpus[0], free=GIB // 2),))
    with pytest.raises(ValueError, match=r"this machine's cards have 0\.5 GiB free"):
        plan("pytorch", artifact("awq"), machine=full, engine_bin=tmp_path)
    tight = replace(full, gpus=(replace(full.gpus[0], free=GIB + (8 << 20)),))
    kept = plan("pytorch", artifact("awq"), machine=tight, engine_bin=tmp_path)
    assert "--keep-packed" in kept.argv  # 11 MiB restored, 6 MiB packed
    two = plan("pytorch", artifact("awq"), machine=replace(full, gpus=full.gpus * 3), engine_bin=tmp_path).argv
    assert two[two.index("--device") + 1] == "auto"  # layers over the cards
    (site / "torch-2.13.0.dist-info").rename(site / "torch-2.13.0+cpu.dist-info")
    assert device() == "cpu"
    (site / "uvicorn-1.dist-info").rmdir()
    with pytest.raises(OSError, match=r"has no uvicorn in the environment.*pip install 'mmq-toolkit\[pytorch\]'"):
        device()
