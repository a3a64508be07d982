"""--engine pytorch: real `transformers serve` of pebble in every format, through the openai client."""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

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
from mmq.serve.pytorch_face import asked, failure, plain_part
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


def picture(data: bytes) -> list[dict[str, object]]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


HELLO = [{"role": "user", "content": "hello"}]


@needs_server
@only_awq
@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"model": "another"}, 404, "does not exist"),
        ({"n": 2}, 400, "has no n;"),
        ({"response_format": {"type": "json_object"}}, 400, "has no response_format"),
        ({"max_tokens": 10**6}, 400, "context is 4096 tokens"),
        ({"messages": [{"role": "user", "content": "hello " * 5000}]}, 400, "context is 4096 tokens"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"messages": picture(b"no picture")}, 400, "picture"),
        ({"messages": [{"content": "hello"}]}, 400, "role"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias names token 999999; the model has 2048"),
        ({"logit_bias": {"the": 1}}, 400, "logit_bias has 'the': 1"),
        ({"top_p": 1.5}, 400, "top_p is 1.5; it must be a number from 0 to 1"),
        ({"frequency_penalty": -2}, 400, "frequency_penalty is -2"),
        ({"stop": [""]}, 400, "none of them empty"),
        ({"seed": 2**70}, 400, "seed is"),
        ({"no_such_field": 1}, 422, "no_such_field"),
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
    body = {
        "messages": HELLO,
        "max_completion_tokens": 5,
        "stream_options": {"include_usage": True},
        "n": 1,
        "user": "x",
    }
    assert asked(body, name="it").body == {"messages": HELLO, "max_tokens": 5, "model": "it"}
    assert asked(body | {"logprobs": True}, name="it").logprobs == 0
    prompt = asked(body | {"prompt_logprobs": 0, "add_generation_prompt": False}, name="it")
    assert (prompt.prompt_logprobs, prompt.opened) == (True, False)
    for wrong in ({"prompt_logprobs": 5}, {"prompt_logprobs": 0, "stream": True}, {"add_generation_prompt": False}):
        with pytest.raises(ValueError, match="prompt_logprobs: 0"):
            asked(body | wrong, name="it")
    for wrong in ({"stream": True}, {"top_logprobs": 50}, {"messages": None, "prompt": "x"}):
        with pytest.raises(ValueError, match="logprobs"):
            asked(body | {"logprobs": True} | wrong, name="it")
    sampled = {"media_io_kwargs": {"video": {"fps": 1.0, "max_frames": 8, "num_frames": 8}}}
    assert asked(body | sampled, name="it").body["chat_template_kwargs"] == {"fps": 1.0}
    with pytest.raises(ValueError, match="neither messages"):
        asked({}, name="it")
    assert asked(body | {"logit_bias": {"5": 1}}, name="it").body["logit_bias"] == {"5": 1.0}
    assert "logit_bias" not in asked(body | {"logit_bias": {}}, name="it").body
    for wrong in (
        {"logit_bias": [5]},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": True}},
    ):
        with pytest.raises(ValueError, match="logit_bias"):
            asked(body | wrong, name="it")
    with pytest.raises(ValueError, match="logit_bias of chat completions alone"):
        asked({"prompt": "x", "logit_bias": {"5": 1}}, name="it")
    for key, value in (("temperature", math.nan), ("max_tokens", 4.5), ("seed", True), ("stop", 5), ("top_p", -0.1)):
        with pytest.raises(ValueError, match=key):
            asked({"prompt": "x", key: value}, name="it")
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
    with pytest.raises(ValueError, match="the engine pytorch has no --lora"):
        plan("pytorch", pebble, machine=LAPTOP, lora=("a=b",))
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
