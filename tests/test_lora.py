"""LoRA: what is refused before a start, the flags and the memory; and in the real vLLM and PyTorch engines, adapters
over 16 bit, AWQ and NF4 that say what the merged weights say, to all who ask at once."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ATTENTION, MLP, merge, write_adapter
from safetensors.torch import save_file
from test_cli import Run

from mmq.bench.served import answer_logprobs
from mmq.bench.walked import walk_both
from mmq.export.subject import read_subject
from mmq.export.view import view
from mmq.quantize.skeleton import build
from mmq.recipes.pebble.tasks import samples
from mmq.serve.adapter import read_adapter
from mmq.serve.api import Client, InferRequest, RequestConfig
from mmq.serve.bill import Ask, parts_of, read_model
from mmq.serve.cards import card_named
from mmq.serve.client import ask, connect
from mmq.serve.engines import plan
from mmq.serve.lora import lora_bytes, lora_flags, rank_of, read_adapters
from mmq.serve.machine import this_machine
from mmq.serve.media import user_message
from mmq.serve.running import free_port, running

LIMIT = 0.05  # nats, the mean difference of the answer tokens' logprobs; random changes make a small model touchy


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def colour(pebble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4, attention alone."""
    return write_adapter(tmp_path_factory.mktemp("lora") / "colour", pebble, ATTENTION, rank=4, seed=1)


@pytest.fixture(scope="module")
def shape(pebble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 12, all linears of the decoder."""
    place = tmp_path_factory.mktemp("lora") / "shape, and more"
    return write_adapter(place, pebble, [*ATTENTION, *MLP], rank=12, alpha=24, seed=4)


# read and checked


def test_flags_follow_from_the_adapters(pebble: Path, colour: Path, shape: Path) -> None:
    subject = read_subject(pebble)
    found = read_adapters([f"colour={colour}", f"shape={shape}"], subject, taken="model")
    assert [(a.name, a.rank, len(a.modules)) for a in found] == [("colour", 4, 20), ("shape", 12, 35)]
    words = {flag.name: flag.words[1:] for flag in lora_flags(found, device="cuda")}
    assert words == {
        "--enable-lora": [],
        "--lora-modules": [
            f"colour={colour}",
            json.dumps({"name": "shape", "path": str(shape)}, separators=(",", ":")),
        ],
        "--max-lora-rank": ["16"],
        "--max-loras": ["2"],
    }
    many = {flag.name: flag.words[1:] for flag in lora_flags(found * 5, device="cuda")}
    assert (many["--max-loras"], many["--max-cpu-loras"]) == (["8"], ["10"])
    slow = {flag.name: flag.words[1:] for flag in lora_flags(found * 5, device="cpu")}
    assert slow["--max-loras"] == ["11"]  # the last is what a CPU's requests without an adapter are computed by
    assert "--max-cpu-loras" not in slow
    assert lora_flags((), device="cuda") == []
    assert rank_of(()) == 0


def test_older_names_are_the_same_modules(pebble: Path, tmp_path: Path) -> None:
    """PEFT over transformers 4 wrote `model.layers`; vLLM renames both."""
    older = write_adapter(tmp_path / "older", pebble, MLP, rank=8, prefix="base_model.model.model.")
    assert read_adapters([f"older={older}"], read_subject(pebble))[0].rank == 8


def test_memory_is_laid_out_for_every_linear(pebble: Path) -> None:
    subject = read_subject(pebble)
    # five layers: q and o, k and v, gate, up and down; A and B of each are rank x (inputs + outputs), two bytes
    sums = 2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768)
    assert lora_bytes(subject, rank=16, slots=3) == 5 * 3 * 16 * 2 * sums
    # over two cards: what is dealt out by outputs keeps A whole, what is dealt out by inputs keeps B whole
    half = (256 + 128) + (128 + 256) + 2 * (256 + 64) + 2 * (256 + 384) + (384 + 256)
    assert lora_bytes(subject, rank=16, slots=3, tp=2) == 5 * 3 * 16 * 2 * half
    model, card = read_model(pebble), card_named("4090").gpu
    bill = {p.name: p.size for p in parts_of(model, card, Ask(lora_rank=16, lora_slots=3), 4096)}
    assert bill["LoRA"] == lora_bytes(subject, rank=16, slots=3)
    assert bill["CUDA graphs"] > {p.name: p.size for p in parts_of(model, card, Ask(), 4096)}["CUDA graphs"]


def header_only(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8} | config))
    if tensors:
        save_file({n: torch.zeros(s) for n, s in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": (8, 256), f"{Q}.lora_B.weight": (256, 8)}


def pair(module: str, inputs: int, outputs: int, rank: int = 8) -> dict[str, tuple[int, int]]:
    at = f"base_model.model.{module}"
    return {f"{at}.lora_A.weight": (rank, inputs), f"{at}.lora_B.weight": (outputs, rank)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, GOOD, "is IA3; the engines take LoRA"),
        ({"use_dora": True}, GOOD, "has DoRA, which the engines do not compute; merge it"),
        ({"bias": "all"}, GOOD, "has bias 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, GOOD, r"whole modules \(embed_tokens\)"),
        ({"init_lora_weights": "pissa"}, GOOD, r"a beginning \(pissa\) that changed the base's weights"),
        ({}, GOOD | {f"{Q}.lora_magnitude_vector": (256, 1)}, "lora_magnitude_vector is no part of a LoRA"),
        ({}, pair("model.layers.0.self_attn.q_proj", 256, 256, rank=600), "has rank 600; vLLM takes up to 512"),
        ({}, pair("model.layers.9.self_attn.q_proj", 256, 256), "no such linear: it was trained for another model"),
        ({}, pair("model.layers.0.self_attn.q_proj", 512, 256), "512 -> 256 there and 256 -> 256 here"),
        ({}, pair("lm_head", 256, 2048), "changes lm_head, which vLLM's Qwen2VLForConditionalGeneration cannot"),
        ({}, pair("model.visual.blocks.0.attn.qkv", 128, 384), "which vLLM leaves as it is; `-- --enable-tower"),
    ],
)
def test_what_vllm_would_not_compute_is_told(
    config: dict[str, Any], tensors: dict[str, tuple[int, int]], message: str, pebble: Path, tmp_path: Path
) -> None:
    place = header_only(tmp_path / "odd", config, tensors)
    with pytest.raises(ValueError, match=f"adapter odd.*{message}"):
        read_adapters([f"odd={place}"], read_subject(pebble))


def test_pickles_and_empty_folders_are_refused(tmp_path: Path, pebble: Path) -> None:
    with pytest.raises(OSError, match=r"has no adapter_config\.json"):
        read_adapter("a", tmp_path)
    place = header_only(tmp_path / "pickled", {}, {})
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        read_adapter("a", place)
    (place / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        read_adapter("a", place)
    half = header_only(tmp_path / "half", {}, {f"{Q}.lora_A.weight": (8, 256)})
    with pytest.raises(OSError, match="q_proj of rank 0, or without its other half"):
        read_adapter("a", half)


def test_names_are_told_apart(pebble: Path, colour: Path) -> None:
    subject = read_subject(pebble)
    for wanted in (["colour"], [f"={colour}"], ["colour="]):
        with pytest.raises(ValueError, match="give it as NAME=FOLDER"):
            read_adapters(wanted, subject)
    for wanted in ([f"a={colour}", f"a={colour}"], [f"model={colour}"]):
        with pytest.raises(ValueError, match="is the name of another model here"):
            read_adapters(wanted, subject, taken="model")


# in the engine


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        pytest.param("vllm", "awq", marks=needs("vllm")),
        pytest.param("vllm", "16 bit", marks=[needs("vllm"), pytest.mark.slow]),
        pytest.param("pytorch", "awq", marks=needs("fastapi")),
        pytest.param("pytorch", "bnb", marks=[needs("bitsandbytes"), pytest.mark.slow]),
    ],
)
def test_an_adapter_says_what_the_merged_weights_say(
    engine: str,
    kind: str,
    mmq: Run,
    artifact: Callable[..., Path],
    pebble: Path,
    colour: Path,
    shape: Path,
    tmp_path: Path,
) -> None:
    base = pebble if kind == "16 bit" else artifact(kind)
    asked = list(samples("test", 6, tasks=["describe", "word", "text"]))
    assert {bool(s.images) for s in asked} == {True, False}
    adapters = {"colour": colour, "shape": shape}
    walked = {
        name: walk_both(build(base, source=view(base)), build(merge(base, adapter, tmp_path / name)), asked)
        for name, adapter in adapters.items()
    }
    launch = plan(
        engine,
        base,
        machine=this_machine(),
        port=free_port(),
        max_model_len=1024,
        lora=[f"{name}={folder}" for name, folder in adapters.items()],
        extra=("--dtype", "float16" if engine == "vllm" else "float32"),  # eight times less noise than bfloat16; none
    )
    said: dict[str, list[list[float]]] = {}
    with running(launch, timeout=300, log_path=tmp_path / "log") as server, connect(server.url, retries=0) as client:
        assert [m.id for m in client.models.list()] == [server.name, "colour", "shape"]
        for name in (server.name, "colour", "shape"):
            tokens = walked[name if name in walked else "colour"].tokens
            said[name] = [
                answer_logprobs(client, name, s, count=t.kl.numel(), behind=t.behind)
                for s, t in zip(asked, tokens, strict=True)
            ]
        words = "What do you see?"
        talk = [user_message(words)]
        answers = {name: ask(client, talk, model=name, max_tokens=16).text for name in (server.name, *adapters)}
        assert len(set(answers.values())) == 3
        with ThreadPoolExecutor(12) as pool:  # all at once, none hears another's
            order = [*answers] * 8
            at_once = pool.map(lambda name: ask(client, talk, model=name, max_tokens=16).text, order)
            assert list(at_once) == [answers[name] for name in order]
        with pytest.raises(ValueError, match=r"\(404\): .*size. does not exist"):
            ask(client, talk, model="size")
        asked_for = Client(server.url, model="colour")
        assert asked_for.infer([InferRequest(words)], RequestConfig(max_tokens=16)).texts == [answers["colour"]]
        code, out, err = mmq("infer", server.url, words, "--model", "shape", "--max-tokens", "16")
        assert (code, out.strip()) == (0, answers["shape"].strip()), err
    own = [(-t.nll_before).tolist() for t in walked["colour"].tokens]
    assert apart(said[server.name], own) <= LIMIT / 20
    for name, walk in walked.items():
        near = apart(said[name], [(-t.nll_after).tolist() for t in walk.tokens])
        much = 4 if kind == "bnb" else 1  # its kernel computes in bfloat16, which such changes make much of
        assert near <= much * LIMIT
        assert near <= much * apart(said[name], said[server.name]) / 20


def apart(one: list[list[float]], two: list[list[float]]) -> float:
    """The mean difference of the logprobs."""
    return statistics.fmean(abs(a - b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
