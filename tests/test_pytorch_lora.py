"""LoRA in the PyTorch engine, without a server: what the model puts out under each adapter, beside merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from adapters import ATTENTION, MLP, changes, merge, write_adapter
from safetensors.torch import save_file
from torch import Tensor, nn

from mmq.export.restored import load_model
from mmq.export.subject import Linear, read_subject
from mmq.export.view import view
from mmq.quantize.inputs import encode
from mmq.quantize.skeleton import build
from mmq.recipes.pebble.tasks import samples
from mmq.serve.adapter import Adapter, factors, read_adapter
from mmq.serve.engines import plan
from mmq.serve.lora import held_bytes, read_adapters
from mmq.serve.machine import GIB, Machine
from mmq.serve.pytorch_lora import attach

LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
KINDS: Mapping[str, tuple[str, ...]] = {
    "16 bit": (),
    "awq": ("awq",),
    "awq kept packed": ("awq",),
    "gptq": ("gptq",),
    "compressed-tensors": ("awq", "compressed-tensors"),
    "bnb": ("bnb",),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(40, 72)[None]
    return model(input_ids=ids).logits[0].float()


def far(one: Tensor, two: Tensor) -> float:
    return float((one.log_softmax(-1) - two.log_softmax(-1)).abs().mean())


SLOW = ("gptq", "compressed-tensors")  # restored by the same code as AWQ


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS])
def test_a_model_under_each_adapter_is_the_merged_model(
    kind: str, artifact: Callable[..., Path], pebble: Path, tmp_path: Path
) -> None:
    """One model, in whatever form its weights are, asked under both adapters and none by turns."""
    base = artifact(*KINDS[kind]) if KINDS[kind] else pebble
    folders = {
        "colour": write_adapter(tmp_path / "colour", pebble, ATTENTION, rank=4, seed=1),
        "shape": write_adapter(tmp_path / "shape", pebble, [*ATTENTION, *MLP], rank=12, alpha=24, seed=4),
    }
    model = load_model(base, dtype=torch.float32, packed="packed" in kind)
    alone = logits(model)
    adapters = read_adapters([f"{n}={f}" for n, f in folders.items()], read_subject(base), engine="pytorch")
    before = {id(p): p.nbytes for p in model.parameters()}
    choice = attach(model, adapters, architecture="Qwen2VLForConditionalGeneration")
    assert {id(p): p.nbytes for p in model.parameters()} == before  # the base is as it was, once
    whole = {
        name: logits(load_model(merge(base, folder, tmp_path / f"whole-{name}"), dtype=torch.float32))
        for name, folder in folders.items()
    }
    for name in ("colour", "", "shape", "colour", ""):
        choice.name = name
        told = logits(model)
        if not name:
            assert torch.equal(told, alone)
            continue
        apart = far(whole[name], alone)
        assert apart > 0.1
        # NF4's kernel computes in bfloat16, which changes of this size make much of; all else here is float32
        assert far(told, whole[name]) < (apart / 10 if kind == "bnb" else 1e-4)


def test_nf4_is_as_near_under_an_adapter_as_without(
    artifact: Callable[..., Path], pebble: Path, tmp_path: Path
) -> None:
    """What NF4's kernel rounds is the whole difference to the merged weight: the adapter's part has none."""
    base = artifact("bnb")
    folder = write_adapter(tmp_path / "shape", pebble, [*ATTENTION, *MLP], rank=12, alpha=24)
    model, weights = load_model(base, dtype=torch.float32), view(base)
    choice = attach(model, [read_adapter("it", folder)], architecture="Qwen2VLForConditionalGeneration")
    inner = dict(model.named_modules())
    for name, change in changes(folder).items():
        linear: Any = inner[name.replace("model.layers", "model.language_model.layers")]
        x, bias = torch.randn(32, linear.in_features), 0 if linear.bias is None else linear.bias.float()
        error = {}
        for choice.name, added in (("", 0), ("it", change)):
            whole = x @ (weights.get(f"{name}.weight").float() + added).T + bias
            with torch.no_grad():
                error[choice.name] = float((linear(x) - whole).abs().mean() / whole.abs().mean())
        assert error["it"] < 1.1 * error[""]


def pair(module: str, inputs: int, outputs: int, rank: int = 4) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(len(module))
    at = f"base_model.model.{module}"
    b = torch.randn(outputs, rank, generator=random) / 8
    return {f"{at}.lora_A.weight": torch.randn(rank, inputs, generator=random) / 8, f"{at}.lora_B.weight": b}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Adapter:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return read_adapter("it", folder)


SPELLED = {  # the family, how PEFT spelled a linear of its decoder over transformers 4 and 5, and what else it may name
    "llava": (
        "LlavaForConditionalGeneration",
        ("language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"),
        "model.multi_modal_projector.linear_2",
    ),
    "llama": ("LlamaForCausalLM", ("model.layers.1.mlp.up_proj",), "lm_head"),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_modules_are_found_by_their_names_in_any_transformers(kind: str, tmp_path: Path) -> None:
    architecture, spellings, other = SPELLED[kind]
    folder = zoo.write(kind, tmp_path / "base")
    subject = read_subject(folder)
    for at, spelling in enumerate(spellings):
        model = load_model(folder, dtype=torch.float32)
        alone = logits(model)
        inner = dict(model.named_modules())
        second: Any = inner[other]
        tensors = pair(spelling, 128, 256) | pair(other, second.in_features, second.out_features)
        adapter = write(tmp_path / f"adapter{at}", tensors, use_rslora=True)
        assert read_adapters([f"it={adapter.folder}"], subject, engine="pytorch") == (adapter,)
        choice = attach(model, [adapter], architecture=architecture)
        choice.name = "it"
        told = logits(model)
        choice.name = ""
        for name, path in ((spelling, spellings[-1]), (other, other)):
            a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            inner[path].weight.data += 8 / 4**0.5 * b @ a  # pyright: ignore
        assert far(told, alone) > 1e-3
        assert far(told, logits(model)) < 1e-5


def test_lookups_take_adapters(tmp_path: Path) -> None:
    folder = zoo.write("llama", tmp_path / "base")
    model = load_model(folder, dtype=torch.float32)
    lookup: Any = model.get_input_embeddings()
    a, b = torch.randn(4, lookup.num_embeddings), torch.randn(lookup.embedding_dim, 4)
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = write(tmp_path / "adapter", {f"{at}A": a, f"{at}B": b})
    attach(model, [adapter], architecture="LlamaForCausalLM").name = "it"
    told = logits(model)
    plain = load_model(folder, dtype=torch.float32)
    plain.get_input_embeddings().weight.data += 2 * (b @ a).T
    assert far(told, logits(plain)) < 1e-5


def test_the_picture_encoder_takes_adapters(pebble: Path, tmp_path: Path) -> None:
    sample = next(s for s in samples("test", 20) if len(s.images) == 1)
    model: Any = load_model(pebble, dtype=torch.float32)
    inputs = encode(build(pebble), sample, prompt_only=True)
    inner = dict(model.named_modules())
    tensors = pair("model.visual.blocks.0.attn.qkv", 128, 384) | pair("model.visual.merger.mlp.2", 512, 256)
    choice = attach(model, [write(tmp_path / "it", tensors)], architecture="Qwen2VLForConditionalGeneration")
    told = []
    with torch.no_grad():
        for choice.name in ("", "it"):
            told.append(model(**inputs).logits[0].float())
        choice.name = ""
        for name in ("blocks.0.attn.qkv", "merger.mlp.2"):
            a, b = (tensors[f"base_model.model.model.visual.{name}.lora_{side}.weight"] for side in "AB")
            inner[f"model.visual.{name}"].weight.data += 2 * b @ a  # pyright: ignore
        merged = model(**inputs).logits[0].float()
    assert far(told[1], told[0]) > 1e-3
    assert far(told[1], merged) < 1e-5


def test_factors_are_pefts(tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    tensors = {key: value for name in names for key, value in pair(name, 8, 8).items()}
    plain = {"lora_alpha": 16, "alpha_pattern": {"layers.0.self_attn.q_proj": 32, r"layers.\d+.mlp.up_proj": 2}}
    found = factors(write(tmp_path / "plain", tensors, **plain))
    assert [found[name] for name in names] == [8, 4, 0.5]
    steady = factors(write(tmp_path / "rslora", tensors, **plain, use_rslora=True))
    assert [steady[name] for name in names] == [16, 8, 1]
    patterns = ({"(": 1}, 5, {"(a+)+": 1}, {r"\d+" * 4: 1})  # the last two for what they would take of time
    for at, wrong in enumerate(({"lora_alpha": "much"}, *({"alpha_pattern": p} for p in patterns))):
        with pytest.raises(ValueError, match=r"adapter it: .*it must be an? (object of modules' names|number)"):
            factors(write(tmp_path / f"wrong{at}", tensors, **wrong))
    with pytest.raises(OSError, match="other half"):
        write(tmp_path / "none", pair(names[0], 8, 8, rank=0))


def test_what_the_engine_would_not_compute_is_told(pebble: Path, tmp_path: Path) -> None:
    """Before the start where names and shapes tell; else before the first request."""
    subject = read_subject(pebble)

    def refused(module: str, inputs: int, outputs: int, why: str, subject: Any = subject) -> None:
        folder = tmp_path / module
        write(folder, pair(module, inputs, outputs))
        with pytest.raises(ValueError, match=why):
            read_adapters([f"it={folder}"], subject, engine="pytorch")

    refused("model.layers.9.self_attn.q_proj", 256, 256, "no such linear: it was trained for another model")
    refused("model.layers.0.self_attn.k_proj", 512, 128, "512 -> 128 there and 256 -> 128 here")
    expert = "model.language_model.layers.0.mlp.experts.0.up_proj"
    mixture = replace(subject, linears={**subject.linears, expert: Linear(expert, 256, 256, False)})
    refused("model.layers.0.mlp.experts.0.up_proj", 256, 256, "routed experts .*--engine vllm computes it", mixture)

    class Seen(nn.Module):
        """torch's attention reads the weight of `out_proj` and never calls it."""

        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

    adapter = write(tmp_path / "attention", pair("attn.out_proj", 8, 8))
    with pytest.raises(ValueError, match=r"changes attn\.out_proj, which is no such linear"):
        attach(Seen(), [adapter], architecture="")


def test_the_plan_counts_them(pebble: Path, tmp_path: Path) -> None:
    colour = write_adapter(tmp_path / "colour", pebble, ATTENTION, rank=4)
    launch = plan("pytorch", pebble, machine=LAPTOP, lora=[f"colour={colour}", f"other={colour}"])
    at = [i for i, word in enumerate(launch.argv) if word == "--lora"]
    assert [launch.argv[i + 1] for i in at] == [f"colour={colour}", f"other={colour}"]
    with pytest.raises(ValueError, match="colour is the name of another model here"):
        plan("pytorch", pebble, machine=LAPTOP, lora=[f"colour={colour}"], served_model_name="colour")
    adapter = read_adapter("colour", colour)
    # five layers: q and o 256 -> 256, k and v 256 -> 128
    assert held_bytes([adapter]) == 2 * 4 * 5 * 2 * (512 + 384)
    room = GIB + (pebble / "model.safetensors").stat().st_size
    tight = partial(plan, "pytorch", pebble, machine=replace(LAPTOP, available=room), max_model_len=64)
    assert tight().port
    with pytest.raises(ValueError, match="this machine has"):
        tight(lora=[f"colour={colour}"])
