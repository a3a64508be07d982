"""The twin test, in the real engine: packed artifacts against 16-bit checkpoints that hold their dequantized weights.

Whatever vLLM makes of our bytes, it must say what it says of the same weights unpacked. A wrong nibble order must not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmq.export.packing import AWQ_ORDER, pack_last, unpack_last
from mmq.export.view import view
from mmq.recipes.pebble.tasks import samples

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

KINDS = (("awq", None), ("awq", "compressed-tensors"), ("gptq", None), ("gptq", "compressed-tensors"), ("bnb", None))
HEADED = KINDS[:3]  # with the output head packed too: each format has a loader of its own for it
LIMIT = 0.05  # nats, the largest difference of any answer token's logprob
PROMPT = "<|im_start|>user\n{place}{text}<|im_end|>\n<|im_start|>assistant\n"


def twin(artifact: Path, place: Path) -> Path:
    """The artifact's dequantized weights as a plain float16 checkpoint below `place`: one for all artifacts that hold
    the same weights to the bit, as two formats of one method do."""
    source = view(artifact)
    tensors = {n: source.get(n).to(torch.float16).contiguous() for n in sorted(source.metas)}
    config = json.loads((artifact / "config.json").read_text())
    del config["quantization_config"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    out = place / digest.hexdigest()
    if not out.is_dir():
        shutil.copytree(artifact, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json"))
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))
    return out


def shuffled(artifact: Path, out: Path) -> Path:
    """The AWQ artifact as somebody would write it who did not know the order of its nibbles."""
    shutil.copytree(artifact, out)
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, words in tensors.items():
            if name.endswith("qweight"):
                tensors[name] = pack_last(unpack_last(words, words.shape[1] * 8, AWQ_ORDER))
        save_file(tensors, shard, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def said(artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of every artifact and of its twin, from one process."""
    folder = tmp_path_factory.mktemp("twins")
    places, prompts = {}, []
    for i, sample in enumerate(samples("test", 6, tasks=["describe", "word", "text"])):
        asked = "".join(p["text"] for p in sample.messages[-2]["content"] if p["type"] == "text")
        place = "<|vision_start|><|image_pad|><|vision_end|>" if sample.images else ""
        prompt = {"prompt": PROMPT.format(place=place, text=asked), "answer": f"{sample.answer}<|im_end|>"}
        if sample.images:
            prompt["image"] = str(folder / f"{i}.png")
            sample.images[0].save(prompt["image"])
        prompts.append(prompt)
    for method, format in KINDS:
        packed = artifact(method, format)
        name = f"{method} {format}"
        places[name] = str(packed)
        places[f"twin of {name}"] = str(twin(packed, folder))
    for method, format in HEADED:
        packed = artifact(method, format, head="int4")
        name = f"{method} {format} head"
        places[name] = str(packed)
        places[f"twin of {name}"] = str(twin(packed, folder))
    places["shuffled"] = str(shuffled(artifact("awq"), folder / "shuffled"))
    request, reply = folder / "request.json", folder / "reply.json"
    request.write_text(json.dumps({"folders": sorted(set(places.values())), "prompts": prompts}), encoding="utf-8")
    script = Path(__file__).parent / "twins.py"
    run = subprocess.run([sys.executable, script, request, reply], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(reply.read_text())
    return {name: found[path] for name, path in places.items()}


def apart(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest difference between any two logprobs."""
    assert "error" not in one, one
    assert "error" not in two, two
    pairs = zip(one["outputs"], two["outputs"], strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x["logprobs"], y["logprobs"], strict=True))


@pytest.mark.parametrize(("method", "format"), KINDS)
def test_packed_and_unpacked_say_the_same(said: dict[str, Any], method: str, format: str | None) -> None:
    name = f"{method} {format}"
    assert apart(said[name], said[f"twin of {name}"]) <= LIMIT


@pytest.mark.parametrize(("method", "format"), HEADED)
def test_a_packed_head_says_what_its_unpacked_twin_says(said: dict[str, Any], method: str, format: str | None) -> None:
    """And it is the packed one that speaks: one linear more than without it, and not quite the same words."""
    name = f"{method} {format}"
    assert apart(said[f"{name} head"], said[f"twin of {name} head"]) <= LIMIT
    assert said[f"{name} head"]["packed"] == said[name]["packed"] + 1
    assert apart(said[f"{name} head"], said[name]) > 0


@pytest.mark.parametrize(("method", "format"), KINDS[:4])
def test_the_engine_holds_packed_weights(said: dict[str, Any], method: str, format: str | None) -> None:
    """Not 16 bit in disguise: the twin test alone could not tell."""
    assert said[f"{method} {format}"]["packed"] > 0
    assert said[f"twin of {method} {format}"]["packed"] == 0


def test_a_wrong_nibble_order_fails(said: dict[str, Any]) -> None:
    assert apart(said["shuffled"], said["twin of awq None"]) > 10 * LIMIT
