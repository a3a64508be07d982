"""--engine pytorch of families beside Qwen-VL: one that transformers has no class for, and a text model."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import torch
import zoo
from adapters import merge, write_adapter
from PIL import Image
from test_minicpmv import quantized, tiny  # noqa: F401

from mmq.bench.generate import answers
from mmq.export.make import make
from mmq.export.view import view
from mmq.quantize.inputs import encode
from mmq.quantize.skeleton import build
from mmq.recipes.calibration import text
from mmq.recipes.hub import fetch
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.recipe import Recipe
from mmq.recipes.samples import as_openai
from mmq.serve.engines import plan
from mmq.serve.machine import this_machine
from mmq.serve.running import free_port, running

pytestmark = pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="transformers[serving] is absent")


def test_minicpmv_by_mmqs_own_class(tiny: Callable[[str], Path], tmp_path: Path) -> None:  # noqa: F811
    """An AWQ artifact with Python files that raise when run: the same words as the walk, streamed too, and under an
    adapter those of its merged weights."""
    folder = quantized(tiny("2.6"), tmp_path / "art")
    questions = [s for s in samples("test", 60) if s.images and not s.videos][:2]
    skeleton = build(folder, source=view(folder))
    with torch.no_grad():
        prompts = [encode(skeleton, s, prompt_only=True) for s in questions]
        own = [skeleton.words.decode(ids) for ids in answers(skeleton, prompts, max_new_tokens=8)]
    prefix = "base_model.model.llm.model."  # as PEFT has it over the family's own class
    adapter = write_adapter(
        tmp_path / "adapter", folder, ["q_proj", "down_proj"], rank=4, prefix=prefix, stored="llm.model."
    )
    merged = build(merge(folder, adapter, tmp_path / "merged"))
    with torch.no_grad():
        changed = [merged.words.decode(ids) for ids in answers(merged, prompts, max_new_tokens=8)]
    launch = plan("pytorch", folder, machine=this_machine(), port=free_port(), lora=[f"it={adapter}"])
    with (
        running(launch, timeout=120, log_path=tmp_path / "log") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"model": server.name, "max_tokens": 8, "temperature": 0}
        sent = [as_openai(s.question) for s in questions]
        replies = [client.chat.completions.create(messages=m, **options) for m in sent]  # pyright: ignore
        assert [r.choices[0].message.content for r in replies] == own
        under = [client.chat.completions.create(messages=m, **options | {"model": "it"}) for m in sent]  # pyright: ignore
        assert [r.choices[0].message.content for r in under] == changed != own
        chunks = client.chat.completions.create(messages=sent[0], stream=True, **options)  # pyright: ignore
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert len(streamed) > 3
        assert own[0].startswith(streamed)  # random weights end within a character, which a stream holds back
        told = client.chat.completions.create(messages=sent[0], logprobs=True, **options)  # pyright: ignore
        assert len(told.choices[0].logprobs.content) == told.usage.completion_tokens
        drawn = io.BytesIO()
        Image.new("RGB", (56, 56)).save(drawn, "GIF")  # which the guard lets by
        url = f"data:video/gif;base64,{base64.b64encode(drawn.getvalue()).decode()}"
        video = [{"type": "video_url", "video_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError, match="send its frames as images"):
            client.chat.completions.create(messages=[{"role": "user", "content": video}], **options)  # pyright: ignore


def test_a_text_model(tmp_path: Path) -> None:
    base = zoo.write("llama", tmp_path / "base")
    sampled = {"num_beams": 3, "temperature": 0.7, "do_sample": True, "repetition_penalty": 1.05}  # as some have it
    config = json.loads((base / "generation_config.json").read_text("utf-8"))
    (base / "generation_config.json").write_text(json.dumps(config | sampled), "utf-8")
    recipe = Recipe(name="tiny", model=str(base), quality="fast", samples=4)
    folder = make(recipe, fetch(str(base)), tmp_path / "art", samples=text(4), calibration="text").path
    launch = plan("pytorch", folder, machine=this_machine(), port=free_port())
    with (
        running(launch, timeout=120, log_path=tmp_path / "log") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"model": server.name, "max_tokens": 4, "temperature": 0}
        hello = [{"role": "user", "content": "hello"}]
        reply = client.chat.completions.create(messages=hello, **options)  # pyright: ignore
        assert reply.usage is not None
        assert reply.usage.completion_tokens >= 1
        assert client.completions.create(prompt="hello", **options).usage.prompt_tokens >= 1  # pyright: ignore
        seen = next(as_openai(s.question) for s in samples("test", 20) if s.images)
        with pytest.raises(openai.BadRequestError, match="takes words alone, and the request has a part of type image"):
            client.chat.completions.create(messages=seen, **options)  # pyright: ignore
