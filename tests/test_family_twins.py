"""Families in the real engine: what vLLM says of an artifact is what mmq reads in it, and not what the base says.

Random weights, so a wrong nibble, fold, name or place of a picture shows at once. Four families by default, all that
vLLM's CPU build runs with `-m slow`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo
from readings import apart, prompts, read

from mmq.export.make import make
from mmq.export.view import view
from mmq.quantize.skeleton import build
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

LIMIT = 0.05  # nats, the largest difference of any answer token's logprob
COARSE = 0.1  # the same where the engine's arithmetic is bfloat16
SOME = ("internvl", "gemma3", "llava_next")
REST = tuple(k for k in zoo.SERVED if k not in SOME)


# heads of their own and the embeddings', under a prefix, under another name
HEADED = ("internvl", "llava", "gemma3", "phi3", "mistral", "internvl_chat_internlm2")


def coarse(kind: str) -> bool:
    return kind.startswith("gemma") or kind == "minicpmv4_6"


def said(kinds: tuple[str, ...], folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """For each kind what vLLM says of its artifact, and what mmq reads in artifact and base."""
    found, asked = {}, {}
    for kind in kinds:
        if kind in zoo.NEEDS and importlib.util.find_spec(zoo.NEEDS[kind]) is None:
            continue
        base = zoo.write(kind, folder / f"{kind}-base")
        recipe = Recipe(name="tiny", model=str(base), samples=3, **changes)
        made = make(recipe, fetch(str(base)), folder / kind, samples=drawn(3), calibration="drawn")
        mine = build(made.path, source=view(made.path))
        requests = prompts(mine, folder / f"{kind}-pictures")
        found[kind] = {"artifact": read(mine, requests), "base": read(build(base), requests), "requests": requests}
        options: dict[str, Any] = {"trust_remote_code": True} if kind in zoo.OTHERS else {}
        if coarse(kind):
            options["dtype"] = "bfloat16"  # vLLM refuses float16
        sent = [{**r, "prompt": r["prompt"].replace("<IMG_CONTEXT>", "<image>")} for r in requests]
        chat = kind.startswith("internvl_chat")  # whose placeholder is another in vLLM
        asked[str(made.path)] = {"prompts": sent if chat else requests, "options": options}
    request, reply = folder / "request.json", folder / "reply.json"
    request.write_text(json.dumps(asked), encoding="utf-8")
    script = Path(__file__).parent / "family_twins.py"
    run = subprocess.run([sys.executable, script, request, reply], capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr[-2000:]
    answers = json.loads(reply.read_text(encoding="utf-8"))
    return {kind: {**found[kind], "vllm": answers[str(folder / kind)]} for kind in found}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return said(SOME, tmp_path_factory.mktemp("some"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return said(REST, tmp_path_factory.mktemp("rest"))


def check(kind: str, found: dict[str, dict[str, Any]], tell: pytest.FixtureRequest) -> None:
    if kind not in found:
        pytest.skip(f"{zoo.NEEDS[kind]} is not installed")
    got = found[kind]
    assert "error" not in got["vllm"], got["vllm"]
    assert got["vllm"]["packed"] > 0, "16 bit in disguise"
    engine = [x["logprobs"] for x in got["vllm"]["outputs"]]
    near, far = apart(engine, got["artifact"]), apart(got["base"], got["artifact"])
    tell.node.user_properties += [("vllm_artifact", near), ("base_artifact", far)]
    assert near <= (COARSE if coarse(kind) else LIMIT)
    assert far > 2 * near, "what quantizing changes must show beside what the engine rounds"


@pytest.mark.parametrize("kind", SOME)
def test_some_families(some: dict[str, dict[str, Any]], kind: str, request: pytest.FixtureRequest) -> None:
    check(kind, some, request)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REST)
def test_the_other_families(rest: dict[str, dict[str, Any]], kind: str, request: pytest.FixtureRequest) -> None:
    check(kind, rest, request)


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    packing: dict[str, Any] = {"head": "int4", "format": "compressed-tensors", "symmetric": True}
    return said(HEADED, tmp_path_factory.mktemp("headed"), **packing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADED)
def test_packed_heads(headed: dict[str, dict[str, Any]], kind: str, request: pytest.FixtureRequest) -> None:
    """Their vocabulary is no multiple of 64, which compressed-tensors alone can hold."""
    check(kind, headed, request)
