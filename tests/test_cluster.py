"""Datasets through Ray Data's LLM batches: what Ray is told and what becomes of its rows; and, where Ray is, a Ray of
this machine with the real vLLM in its actors.

    MMQ_TEST_RAY=/path/to/env/bin/python pytest -m slow tests/test_cluster.py     # an environment with mmq[ray]
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mmq.recipes.pebble.tasks import samples
from mmq.serve.cluster import after, before, check_installed, content_format, engine_settings, infer_on_ray
from mmq.serve.flags import Launch
from mmq.serve.request import RequestConfig

HAS_RAY = importlib.util.find_spec("ray") is not None
PYTHON = os.environ.get("MMQ_TEST_RAY") or (sys.executable if HAS_RAY else "")
needs_ray = pytest.mark.skipif(not PYTHON, reason="Ray is not installed, and MMQ_TEST_RAY names no Python that has it")


def test_an_engine_is_told_what_a_server_is_told() -> None:
    words = "--host 127.0.0.1 --port 8000 --served-model-name a --max-model-len 4096 --enforce-eager"
    words += ' --limit-mm-per-prompt {"image":8} --middleware mmq_guard.Guard --kv-cache-dtype=fp8'
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "MMQ_GUARD": "{}", "PYTHONPATH": "inside"}
    launch = Launch(("vllm", "serve", "model", *words.split()), env, (), "http://a", "a", "127.0.0.1", 8000, "cpu")
    typed = [
        "-tp",
        "2",
        "--no-enable-prefix-caching",
        "--compilation-config.mode",
        "0",
        "-q=awq",
        "--lora-modules",
        "a=b",
        "c=d",
    ]
    assert engine_settings(replace(launch, argv=("vllm", "serve", "model", "--max-num-seqs", "8", *typed)))[0] == {
        "max_num_seqs": 8,
        "tensor_parallel_size": 2,
        "enable_prefix_caching": False,
        "compilation_config": {"mode": 0},
        "quantization": "awq",
        "lora_modules": ["a=b", "c=d"],
    }
    with pytest.raises(ValueError, match="-x after -- is not known to --ray"):
        engine_settings(replace(launch, argv=("vllm", "serve", "model", "-x", "1")))
    assert engine_settings(launch) == (
        {"max_model_len": 4096, "enforce_eager": True, "limit_mm_per_prompt": {"image": 8}, "kv_cache_dtype": "fp8"},
        {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def test_rows_go_and_come_back(tmp_path: Path) -> None:
    data = {"query": "<image>what?", "images": ["http://a/1.png"]}
    config = RequestConfig(
        max_tokens=3, seed=1, stop=["#"], top_logprobs=1, fps=1, extra={"top_k": 2, "mm_processor_kwargs": {"a": 1}}
    )
    row = {"index": 7, "file": str(tmp_path / "in.jsonl"), "number": 2, "data": json.dumps(data)}
    sent = before(row, config=config, system="brief")
    assert [m["role"] for m in sent.pop("messages")] == ["system", "user"]
    assert sent == {
        "index": 7,
        "sampling_params": {"max_tokens": 3, "temperature": 0.0, "seed": 1, "stop": ["#"], "logprobs": 1, "top_k": 2},
        "mm_processor_kwargs": {"a": 1},
    }
    place = {5: {"logprob": -0.5, "decoded_token": "a"}, 6: {"logprob": -2, "decoded_token": "b"}, 9: None}
    figures = {"num_input_tokens": 9, "num_generated_tokens": 1, "time_taken_llm": 0.25}
    come = after({"index": 7, "generated_text": "a", "generated_tokens": [5], "logprobs": [place], **figures}, most=3)
    found = json.loads(come["found"])
    assert (come["index"], found["finish"], found["tokens"], found["prompt_tokens"]) == (7, "stop", 1, 9)
    assert found["logprobs"] == [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: no messages"):
        before({**row, "data": "{}"}, config=config, system=None)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            "{% for message in messages %}{% for c in message['content'] %}{% endfor %}{% endfor %}",
            "openai",
        ),
        ("{%- for m in messages %}{%- for item in m.content -%}{% endfor %}{% endfor %}", "openai"),
        ("{% set content = message.content %}{% for part in content %}{% endfor %}", "openai"),
        ("{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}", "string"),
    ],
)
def test_a_template_tells_how_it_wants_its_parts(template: str, wanted: str, tmp_path: Path, pebble: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert content_format(tmp_path) == wanted
    assert content_format(pebble) == "openai"


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"--ray needs .*\[ray\]"):
        check_installed()
    with pytest.raises(ValueError, match="--stream does not go with --ray"):
        infer_on_ray("pebble", ["in.jsonl"], tmp_path / "out.jsonl", RequestConfig(stream=True))
    with pytest.raises(ValueError, match="replicas is 0"):
        infer_on_ray("pebble", ["in.jsonl"], tmp_path / "out.jsonl", replicas=0)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dataset_on_a_ray_of_this_machine(artifact: Callable[..., Path], tmp_path: Path) -> None:
    asked = [s for s in samples("test", 20) if len(s.images) == 1][:4]
    rows = []
    for number, sample in enumerate(asked):
        sample.images[0].save(tmp_path / f"{number}.png")
        rows.append({"messages": sample.messages, "images": [f"{number}.png"]})
    rows += [{"query": "word " * 20000}, {"query": "你好"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = [PYTHON, "-m", "mmq", "infer", str(artifact("awq")), "--dataset", "in.jsonl", "--ray", "local", "--json"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    done = run([*command, "--max-tokens", "24", "--logprobs"])
    assert done.returncode == 1, done.stderr[-2000:]  # one row is too long
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["num_samples"], facts["failed"]) == (5, 1)
    found = [json.loads(line) for line in (tmp_path / "in-answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["index"] for r in found] == list(range(6))
    assert "maximum context length" in found[4]["error"]
    good = [r for r in found if "error" not in r]
    assert all(len(r["logprobs"]["content"]) == r["tokens"] for r in good)
    assert sum(r["answer"].strip() == r.get("reference", "").strip() for r in good) >= 3
