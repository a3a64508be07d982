"""Hollow checkpoints against real ones, and how a plan is held against what an engine says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import minicpmv_cases as cases
import pytest
import torch
from accelerate import init_empty_weights
from environments import environment

from mmq.bench import hollow
from mmq.bench.plan_against import TOKENS, WEIGHTS, Held, hold, row
from mmq.export.subject import read_subject
from mmq.quantize.minicpmv.model import build_model
from mmq.serve.bill import Ask, read_model
from mmq.serve.cards import card_named
from mmq.serve.engines import plan
from mmq.serve.machine import GIB, Gpu, Machine
from mmq.serve.plan_flags import asked_in
from mmq.serve.planner import planned
from mmq.serve.rules.verdicts import chosen, verdicts

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--limit-mm-per-prompt",
    "--compilation-config",
)
MINICPMV = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 151666,
    "query_num": 64,
    "vision_config": {
        "model_type": "siglip",
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
TOTALS = {"qwen2.5-vl-7b": 16584333312, "qwen2-vl-2b": 4417971200}  # `total_size` in the index of the released models
HERE = Machine("a processor", 16, 128 * GIB, 100 * GIB, False, (Gpu("H100", 80 * GIB, 79 * GIB, 9.0),))


@pytest.mark.parametrize("shape", list(hollow.SHAPES))
def test_a_hollow_checkpoint_is_as_large_as_the_released_one(shape: str, tmp_path: Path) -> None:
    folder = hollow.write(shape, tmp_path / shape)
    weights = read_model(folder).weights
    if shape in TOTALS:
        assert weights.total == TOTALS[shape]
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 1 << 20
    assert not weights.parts["other"] or weights.parts["other"] < 1 << 20
    packed = hollow.write(shape, tmp_path / "packed", packed=True)
    assert read_model(packed).weights.total == pytest.approx(weights.as_int4.total, rel=0.002)
    (verdict,) = verdicts(packed, chosen("vllm:cuda"))
    assert verdict.answer == "yes", verdict.findings
    assert planned(read_model(packed), card_named("4090").gpu, Ask(context=4096)).problem == ""


RECORDS = [ROOT / "docs" / "bench" / name for name in ("h100-plan.jsonl", "h200-plan.jsonl")]
SEEN = [json.loads(line) for path in RECORDS for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def hollows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that a GPU was given."""
    folder = tmp_path_factory.mktemp("hollow")
    for name in {each["folder"] for each in SEEN}:
        write = hollow_minicpmv if name.startswith("minicpm") else partial(hollow.write, name.removesuffix("-awq"))
        write(folder / name, packed=name.endswith("-awq"))
    return folder


def named(seen: dict[str, Any]) -> str:
    """A start, for a test's name."""
    mode = "eager" if seen["eager"] else "graphs"
    return f"{seen['folder']}-{seen['budget'] // GIB}-{mode}{'-h200' if 'share' in seen else ''}"


@pytest.mark.parametrize("seen", SEEN, ids=named)
def test_a_plan_comes_near_what_a_gpu_told(seen: dict[str, Any], hollows: Path) -> None:
    """vLLM 0.26.0 on an H100 and an H200, given the share that makes the budget; the flags are those of then."""
    words = seen["argv"]
    flags = [w for n in FLAGS if n in words for w in (n, words[words.index(n) + 1])]
    ask = asked_in([*flags, *(["--enforce-eager"] if seen["eager"] else [])], context=None)
    ask = replace(ask, share=seen.get("share"))
    told = planned(read_model(hollows / seen["folder"]), Gpu("H100", seen["budget"], seen["budget"], 9.0), ask)
    weights = sum(p.size for p in told.parts if p.name.startswith("weights"))
    assert weights == pytest.approx(seen["engine_weights"], rel=WEIGHTS)
    assert told.tokens == pytest.approx(seen["engine_tokens"], rel=TOKENS)
    off = told.tokens / seen["engine_tokens"] - 1
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    row = f"{told.tokens:,} | {seen['engine_tokens']:,} ({off:+.1%})"
    assert row in page or row.replace(" | ", " against ").replace(" (", " tokens (") in page


def hollow_minicpmv(folder: Path, *, packed: bool) -> None:
    """MiniCPM-V 2.6's names and shapes over a hole."""
    cases.checkpoint("2.6", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | MINICPMV
    del config["head_dim"]
    path.write_text(json.dumps(config))
    with init_empty_weights():
        model = build_model(config, image_token_id=259, dtype=torch.bfloat16)
    hollow.fill(folder, {n: ("BF16", tuple(p.shape)) for n, p in model.named_parameters()}, packed=packed)


@pytest.mark.parametrize(("packed", "seen"), [(False, 15.59), (True, 6.67)])
def test_weights_as_a_gpu_told_them(packed: bool, seen: float, tmp_path: Path) -> None:
    """vLLM 0.26.0's "Model loading took", GiB, on an H100, for random weights of this shape."""
    model = read_model(hollow.write("qwen2.5-vl-7b", tmp_path / "7b", packed=packed))
    told = planned(model, card_named("4090").gpu, Ask(context=4096))
    weights = sum(p.size for p in told.parts if p.name.startswith("weights"))
    assert weights / GIB == pytest.approx(seen, rel=WEIGHTS)


def test_hollow_awq_has_the_tensors_of_a_real_artifact(pebble: Path, artifact: Callable[..., Path]) -> None:
    real, made = tensors(artifact("awq")), hollow.as_awq(tensors(pebble))
    assert made.keys() == real.keys()
    assert {n: shape for n, (_, shape) in made.items()} == {n: shape for n, (_, shape) in real.items()}
    assert {n: hollow.BYTES[kind] for n, (kind, _) in made.items()} == {
        n: hollow.BYTES[k] for n, (k, _) in real.items()
    }


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = read_subject(folder).tensors
    return {name: (t.dtype, t.shape) for name, t in found.items()}


def test_what_does_not_fit_is_not_started(tmp_path: Path) -> None:
    folder = hollow.write("qwen2.5-vl-7b", tmp_path / "7b")
    held = hold(folder, 8 * GIB, machine=HERE)
    assert "15.57 GiB of weights" in held.problem
    assert (held.failure, held.argv, held.startup_s) == ("", (), None)
    assert "does not fit" in row(held)
    with pytest.raises(ValueError, match="a budget cannot be larger"):
        hold(folder, 81 * GIB, machine=HERE)


def test_an_engine_that_does_not_start_is_a_failure(
    pebble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's own flags reach it, its share of the card in proportion to the budget."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 'ValueError: No available memory for the cache blocks.' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("MMQ_VLLM", str(program))
    held = hold(pebble, 8 * GIB, extra=("--enforce-eager",), machine=HERE)
    assert held.failure == f"the plan says it fits, and the engine did not start: {held.error}"
    assert "No available memory" in held.error
    assert "CUDA graphs" not in held.parts
    given = dict(zip(held.argv, held.argv[1:], strict=False))
    assert float(given["--gpu-memory-utilization"]) == pytest.approx(0.9 * 8 / 80, abs=1e-6)
    assert (given["--max-num-batched-tokens"], given["--max-num-seqs"]) == ("2048", "256")
    assert given["--max-model-len"] == "4096"


def test_errors_are_relative_to_the_engine() -> None:
    held = Held("x", 8 * GIB, weights=102 * GIB, tokens=890, parts={}, engine_weights=100 * GIB, engine_tokens=1000)
    assert held.off == (pytest.approx(0.02), pytest.approx(-0.11))
    assert held.failure == "tokens -11.0%"
    assert replace(held, tokens=900).failure == ""
    assert replace(held, engine_weights=None).failure == "the engine does not tell its weights, tokens -11.0%"


@pytest.mark.parametrize(
    ("version", "missing"), [("0.26.0", "pictures and CUDA graphs"), ("0.28.1", "CUDA graphs"), ("0.29.0", "")]
)
def test_the_runner_that_measures_all_of_its_memory(pebble: Path, tmp_path: Path, version: str, missing: str) -> None:
    """What the plan counts is what the engine counts; the user's own environment wins."""
    program = environment(tmp_path, "vllm", f"vllm-{version}")
    launch = plan("vllm", pebble, machine=HERE, engine_bin=program, environ={})
    assert launch.env.get("VLLM_USE_V2_MODEL_RUNNER") == ("0" if missing else None)
    assert bool(missing) == any(f"sets no memory aside for {missing}" in why for _, why in launch.reasons if missing)
    theirs = plan("vllm", pebble, machine=HERE, engine_bin=program, environ={"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert "VLLM_USE_V2_MODEL_RUNNER" not in theirs.env
