"""Mixtures of experts: each class from its released names to a whole artifact, every expert calibrated and told of."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moe import CHOSEN, EXPERTS, FUSED, HIDDEN, INNER, SPARSE, moe

from mmq.export import make as making
from mmq.export.artifact import Artifact, open_artifact
from mmq.export.make import make
from mmq.export.view import packed_linears, view
from mmq.quantize import detect, routing
from mmq.quantize.experts import Experts, expert_groups, unfused
from mmq.quantize.gather import collect_grams
from mmq.quantize.inputs import encode
from mmq.quantize.lockstep import Call, Lockstep, Stop
from mmq.quantize.memory import Memory
from mmq.quantize.plan import linears
from mmq.quantize.skeleton import Skeleton, build, load_layer, load_outside, release_layer
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn, text
from mmq.recipes.hub import fetch
from mmq.recipes.progress import Step, Tell, silent
from mmq.recipes.recipe import Recipe
from mmq.recipes.samples import Sample
from mmq.serve.engines import plan
from mmq.serve.machine import Machine
from mmq.serve.rules.verdicts import chosen, verdicts

SEEING = ("qwen3_vl_moe", "glm4v_moe")
LEAVES = {"mixtral": ("w1", "w2", "w3")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp(kind) for kind in SPARSE}


@pytest.fixture(scope="module", params=SPARSE)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[str, Path]:
    return request.param, moe(request.param, checkpoints[request.param])


def samples(kind: str, count: int) -> list[Sample]:
    return drawn(count) if kind in SEEING else text(count)


def quantize(kind: str, base: Path, out: Path, *, tell: Tell = silent, count: int = 6, **changes: Any) -> Artifact:
    recipe = dataclasses.replace(Recipe(name="tiny", model=str(base), samples=count), **changes)
    return make(recipe, fetch(str(base)), out, samples=samples(kind, count), calibration="drawn", tell=tell)


def whole_model(folder: Path, kind: str) -> Any:
    """transformers' own model in float32, experts fused and in one piece."""
    import transformers as t

    auto = t.AutoModelForImageTextToText if kind in SEEING else t.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(skeleton: Skeleton, inputs: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """Last hidden states, layer by layer."""
    load_outside(skeleton)
    base = skeleton.module.base_model
    calls = [lambda i=i: base(**i, use_cache=False).last_hidden_state for i in inputs]
    with torch.no_grad(), Lockstep(skeleton.layers, calls) as steps:
        for stop in steps:
            load_layer(skeleton, stop.index)
            stop.advance()
            release_layer(skeleton, stop.index)
    return steps.results


def test_taken_apart_is_the_model_itself(checkpoint: tuple[str, Path]) -> None:
    """Expert by expert from the files, whether they hold them fused or not, against transformers' fused experts."""
    kind, base = checkpoint
    skeleton = build(base)
    assert [any(isinstance(m, Experts) for m in layer.modules()) for layer in skeleton.layers] == [
        index in SPARSE[kind] for index in range(3)
    ]
    inputs = [encode(skeleton, s) for s in samples(kind, 4)]
    whole = whole_model(base, kind)
    with torch.no_grad():
        expected = [whole.base_model(**i, use_cache=False).last_hidden_state for i in inputs]
    for mine, theirs in zip(streamed(skeleton, inputs), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def plain(artifact: Path, out: Path, kind: str) -> Path:
    """The artifact's dequantized weights as a 16-bit checkpoint that transformers reads."""
    shutil.copytree(artifact, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json"))
    source = view(artifact)
    tensors = {n: source.get(n).to(source.metas[n].dtype or torch.bfloat16).contiguous() for n in source.metas}
    if kind == "qwen3_vl_moe":  # the one class that transformers reads in no other form
        tensors = joined(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one -> fused, [experts, out, in]."""
    left = {n: t for n, t in tensors.items() if ".experts." not in n}
    for path in sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}):
        one = [
            {k: tensors[f"{path}.experts.{e}.{k}_proj.weight"] for k in ("gate", "up", "down")} for e in range(EXPERTS)
        ]
        left[f"{path}.{FUSED[0]}"] = torch.stack([torch.cat([m["gate"], m["up"]]) for m in one])
        left[f"{path}.{FUSED[1]}"] = torch.stack([m["down"] for m in one])
    return left


def routed(folder: Path, kind: str, given: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """What transformers' own routers of a checkpoint choose: per sparse layer, tokens of text and of pictures by
    expert."""
    model = whole_model(folder, kind)
    pictures = getattr(model.config, "image_token_id", -1)
    counts = torch.zeros(3, 2, EXPERTS, dtype=torch.int64)
    mask = torch.zeros(0)

    def hook(index: int) -> Any:
        def count(module: Any, args: Any, out: Any) -> None:
            for media in (0, 1):
                counts[index, media] += torch.bincount(out[2][mask == media].flatten(), minlength=EXPERTS)

        return count

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(hook(int(name.split(".layers.")[1].split(".")[0])))
    with torch.no_grad():
        for inputs in given:
            mask = (inputs["input_ids"].flatten() == pictures).long()
            model.base_model(**inputs, use_cache=False)
    return [counts[index].tolist() for index in SPARSE[kind]]


def test_every_expert_is_quantized_and_told_of(
    checkpoint: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts packed under the names of the class's checkpoints, routers in 16 bit and named to the engines; the
    counts are those of the artifact's own routers, in transformers."""
    kind, base = checkpoint
    monkeypatch.setattr(routing, "FLOOR", 0.5)  # so that the few samples are enough for some experts, not for all
    made = quantize(kind, base, tmp_path / "out")
    assert open_artifact(made.path, verify=True).digest == made.digest
    metas = open_source(made.path).metas
    packed = packed_linears(metas, made.format)
    assert packed == set(made.manifest["quantized"])
    inside = {n for n in packed if ".experts." in n}
    assert len(inside) == len(SPARSE[kind]) * EXPERTS * 3
    assert {n.rpartition(".")[2] for n in inside} == set(LEAVES.get(kind, ("gate_proj", "up_proj", "down_proj")))
    routers = [n for n in metas if n.endswith((".gate.weight", ".shared_expert_gate.weight"))]
    listed = json.loads((made.path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert len(routers) == len(SPARSE[kind]) * (1 + (kind == "qwen2_moe"))
    assert {n.removesuffix(".weight") for n in routers} <= set(listed)
    assert not any(name in linear for name in listed for linear in packed)  # vLLM and SGLang look for substrings
    told = [layer["experts"][0] for layer in made.manifest["layers"] if "experts" in layer]
    tokens = made.manifest["calibration"]["text"] + made.manifest["calibration"]["media"]
    assert all(sum(t["text"]) + sum(t["media"]) == CHOSEN * tokens for t in told)
    assert all(bool(sum(t["media"])) == (kind in SEEING) for t in told)
    skeleton = build(base)
    given = [encode(skeleton, s) for s in samples(kind, 6)]
    expected = routed(plain(made.path, tmp_path / "plain", kind), kind, given)
    for mine, theirs in zip(told, expected, strict=True):
        apart = torch.tensor([mine["text"], mine["media"]]) - torch.tensor(theirs)
        assert int(apart.abs().sum()) <= 4  # two tokens at most whose experts tie
        assert mine["all_tokens"] == [e for e in range(EXPERTS) if mine["text"][e] + mine["media"][e] < mine["floor"]]
    assert all(not layer["fallbacks"] for layer in made.manifest["layers"])
    gpu, cpu = verdicts(made.path, chosen("vllm"))
    assert (gpu.answer, cpu.answer) == ("yes", "condition"), (gpu, cpu)
    assert [f.rule for f in cpu.findings] == ["experts"]  # seen in vLLM 0.32: "No WNA16 MoE backend supports ..."
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    laptop = Machine("cpu", 4, 32 << 30, 32 << 30, amx=True)
    served = partial(plan, "vllm", made.path, environ={"MMQ_VLLM": str(program)}, trust_remote_code=True)
    assert served(machine=laptop).argv
    with pytest.raises(ValueError, match="int4 experts have a kernel on CPUs with AMX alone"):
        served(machine=dataclasses.replace(laptop, amx=False))


def test_the_artifact_walks_like_any_other(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    """`check` walks the artifact beside the original: what it computes is what transformers makes of the same weights,
    though an artifact of fused experts holds them one by one."""
    kind, base = checkpoint
    made = quantize(kind, base, tmp_path / "out", method="rtn", count=2)
    skeleton = build(base, source=view(made.path))
    inputs = [encode(skeleton, s) for s in samples(kind, 2)]
    whole = whole_model(plain(made.path, tmp_path / "plain", kind), kind)
    with torch.no_grad():
        expected = [whole.base_model(**i, use_cache=False).last_hidden_state for i in inputs]
    for mine, theirs in zip(streamed(skeleton, inputs), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_fused_and_unfused_give_the_same_bytes(tmp_path: Path) -> None:
    """[experts, in, out], [experts, out, in] and one by one: three ways to store the same model."""
    turned = moe("qwen3_vl_moe", tmp_path / "turned", num_hidden_layers=2)
    straight, single = (shutil.copytree(turned, tmp_path / name) for name in ("straight", "single"))
    tensors = load_file(turned / "model.safetensors")
    fused = {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if n.endswith(FUSED)}
    save_file({**tensors, **fused}, straight / "model.safetensors", metadata={"format": "pt"})
    for name, stack in fused.items():
        del tensors[name]
        path, _, kind = name.rpartition(".")
        for number, matrix in enumerate(stack):
            if kind == "down_proj":
                tensors[f"{path}.{number}.down_proj.weight"] = matrix.contiguous()
            else:
                for leaf, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                    tensors[f"{path}.{number}.{leaf}.weight"] = half.contiguous()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    made = [quantize("qwen3_vl_moe", base, base / "out") for base in (turned, straight, single)]
    files = [{n: f["sha256"] for n, f in a.manifest["files"].items() if n.endswith(".safetensors")} for a in made]
    assert files[0] == files[1] == files[2]


def test_of_a_fused_tensor_one_expert_is_read(checkpoints: dict[str, Path]) -> None:
    """No tensor is read whole of which one expert is wanted."""
    base = checkpoints["qwen3_vl_moe"]
    if not (base / "config.json").exists():
        moe("qwen3_vl_moe", base)
    source = open_source(base)

    def refuse(name: str) -> torch.Tensor:
        assert not name.endswith(FUSED), f"{name} was read whole"
        return source.get(name)

    skeleton = build(base, source=dataclasses.replace(source, get=refuse))
    load_layer(skeleton, 0)
    stored = source.get(f"model.language_model.layers.0.mlp.{FUSED[0]}")  # [experts, hidden, 2 inner]
    up = skeleton.layers[0].get_parameter("mlp.experts.5.up_proj.weight")
    assert torch.equal(up, stored[5, :, INNER:].T.float())


@pytest.mark.parametrize(("method", "quality"), [("gptq", "default"), ("awq", "best"), ("bnb", "default")])
def test_methods(checkpoints: dict[str, Path], tmp_path: Path, method: str, quality: str) -> None:
    base = checkpoints["qwen3_vl_moe"]
    if not (base / "config.json").exists():
        moe("qwen3_vl_moe", base)
    made = quantize("qwen3_vl_moe", base, tmp_path / "out", method=method, quality=quality)
    packed = packed_linears(open_source(made.path).metas, made.format)
    assert len(packed) == 3 * (4 + 3 * EXPERTS)
    told = [layer.get("experts") for layer in made.manifest["layers"]]
    assert all(told) or method == "bnb"
    errors = [e for layer in made.manifest["layers"] for n, e in layer["errors"].items() if "experts" in n]
    assert len(errors) == 3 * 3 * EXPERTS
    assert max(errors) < 0.02
    before, after = build(base), view(made.path)
    expert = f"{before.layer_prefix(1)}mlp.experts.3.down_proj.weight"
    assert after.metas[expert].shape == (HIDDEN, INNER)
    off = (after.get(expert) - before.source.get(expert).float()).norm() / before.source.get(expert).float().norm()
    assert off < 0.2
    needed = {"vllm": {"bitsandbytes": "0.50", "vllm-bnb-plugin": "0.0.3"}}
    (gpu,) = verdicts(made.path, chosen("vllm:cuda"), packages=needed)
    assert gpu.answer == "yes", gpu.findings


def test_one_scale_for_all_that_read_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of very different energy: the norm absorbs a scale of all experts, shared ones and gates beside them.
    The layer puts out what it did, and what is quantized is nearer to it than without."""
    base = moe("qwen2_moe", tmp_path / "base", num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"] *= torch.logspace(-1, 1, HIDDEN)
    tensors["model.layers.0.mlp.gate.weight"] /= 4  # the router's choice is then not made by one channel
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    skeleton = build(base)
    group = next(g for g in skeleton.family.groups[0] if "mlp.experts.0.up_proj" in g.linears)
    shared = {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up")}
    assert group.absorber == "post_attention_layernorm"
    assert set(group.beside) == {"mlp.gate", "mlp.shared_expert_gate", *shared}

    def off(out: str) -> float:
        (layer,) = quantize("qwen2_moe", base, tmp_path / out).manifest["layers"]
        found = [e for n, e in layer["errors"].items() if ".experts." in n and not n.endswith("down_proj")]
        return sum(found) / len(found)

    scaled = off("scaled")
    norm, router = (f"model.layers.0.{n}.weight" for n in ("post_attention_layernorm", "mlp.gate"))
    stored = open_source(tmp_path / "scaled")
    moved = tensors[norm].float() / stored.get(norm).float()  # what the norm gave away is in the router's columns
    assert float(moved.max() / moved.min()) > 4
    assert torch.allclose(stored.get(router).float(), tensors[router].float() * moved, rtol=1e-2, atol=1e-4)
    monkeypatch.setattr(detect, "mixture_groups", lambda layer, run, absorbs: expert_groups(layer))
    assert scaled < 0.8 * off("unscaled")


def test_a_router_that_reads_a_copy_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the norm, though not the same memory: a scale that the norm absorbs would turn its choice, and that its
    weights add up to one must not hide it."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    def forward(block: Any, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, 1)
        _, weights, chosen = block.gate(x.clone())
        return block.experts(x, chosen, weights).view_as(hidden)

    base = moe("qwen3_moe", tmp_path / "base", norm_topk_prob=True)

    def absorbers() -> set[str | None]:
        groups = build(base).family.groups[1]
        return {g.absorber for g in groups if "mlp.experts.0.up_proj" in g.linears}

    assert absorbers() == {"post_attention_layernorm"}
    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "forward", forward)
    assert absorbers() == {None}


def test_experts_kept_in_16_bit(tmp_path: Path) -> None:
    """Of a layer all or none, as engines hold them in one tensor; and only where the format can say so."""
    base = moe("qwen3_vl_moe", tmp_path / "base", num_hidden_layers=2)
    skeleton = build(base)
    inside = "model.language_model.layers.1.mlp.experts"
    with pytest.raises(ValueError, match=r"keep splits the experts of layer 0; .*all or none"):
        linears(skeleton, ["mlp.experts.3"])
    with pytest.raises(ValueError, match="format gptq cannot say that the experts of layer 1 stay in 16 bit"):
        quantize("qwen3_vl_moe", base, tmp_path / "gptq", method="gptq", keep=(inside,))
    for format in ("awq", "compressed-tensors"):
        made = quantize(
            "qwen3_vl_moe", base, tmp_path / format, format=format, method="rtn", symmetric=False, keep=(inside,)
        )
        metas = open_source(made.path).metas
        assert metas[f"{inside}.7.down_proj.weight"].shape == (HIDDEN, INNER)
        assert not any(n.startswith(inside) for n in packed_linears(metas, made.format))
        (gpu,) = verdicts(made.path, chosen("vllm:cuda"))
        assert gpu.answer == "yes", gpu.findings


def test_experts_that_saw_few_or_nothing(tmp_path: Path) -> None:
    """One expert is never chosen, another seldom: both are listed, and calibrated on all tokens of the layer."""
    base = moe("deepseek_v3", tmp_path / "base", n_group=1)
    tensors = load_file(base / "model.safetensors")
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias[2] = -100.0
            bias[5] = -0.35
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = quantize("deepseek_v3", base, tmp_path / "out", count=8)
    for layer in made.manifest["layers"]:
        if layer["index"] in SPARSE["deepseek_v3"]:
            (told,) = layer["experts"]
            assert told["unseen"] == [2]
            assert set(told["all_tokens"]) >= {2, 5}
            assert told["floor"] == 4 * HIDDEN
            assert told["text"][2] == 0
            assert not layer["fallbacks"]
            seen = [e for n, e in layer["errors"].items() if ".experts.2." not in n and ".experts." in n]
            unseen = [e for n, e in layer["errors"].items() if ".experts.2." in n]
            assert len(unseen) == 3
            assert max(unseen) < 2 * max(seen)


def test_tokens_that_are_not_finite(tmp_path: Path) -> None:
    """A word whose embedding is no number, said in one sample: it is left out, and every token is counted once."""
    base = moe("qwen3_moe", tmp_path / "base", num_hidden_layers=2)
    odd = Sample([{"role": "user", "content": "What is ꙮ?"}, {"role": "assistant", "content": "A letter."}])
    said = [encode(build(base), s)["input_ids"].flatten().tolist() for s in (*samples("qwen3_moe", 6), odd)]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][sorted(set(said[-1]).difference(*said[:-1]))] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    given, recipe = [*samples("qwen3_moe", 6), odd], Recipe(name="tiny", model=str(base), samples=7)
    made = make(recipe, fetch(str(base)), tmp_path / "out", samples=given, calibration="text")
    layer = made.manifest["layers"][1]
    assert 0 < layer["left_out"] <= len(said[-1])
    assert sum(layer["experts"][0]["text"]) == CHOSEN * sum(len(ids) for ids in said)


def test_all_tokens_of_a_layer() -> None:
    """The matrices of experts that are given everything, and of those that are not, against the sums themselves."""
    torch.manual_seed(0)
    experts = unfused_experts(6, 32, 16)
    layer = torch.nn.ModuleDict({"experts": experts})
    tokens = [torch.randn(40, 32), torch.randn(24, 32)]
    chosen = [torch.randint(0, 4, (len(x), 1)) for x in tokens]  # nobody goes to 4 and 5
    calls: Any = [
        Call(i, (x, c, torch.ones(c.shape)), {}, None) for i, (x, c) in enumerate(zip(tokens, chosen, strict=True))
    ]  # type: ignore[arg-type]
    stop = Stop(0, layer, calls, experts, lambda *a: None)
    groups = expert_groups(layer)
    few = tuple(g for g in groups if ".5." in g.linears[0] or ".1." in g.linears[0])
    with routing.counting(layer, [torch.arange(len(x)) < 10 for x in tokens]) as (before, seen):
        grams, _ = collect_grams(stop, groups, everything=few, before=before)
        (told,) = seen()
    every = torch.cat(tokens)
    to = torch.cat(chosen)[:, 0]
    assert told.tokens == tuple(int((to == e).sum()) for e in range(6))
    assert sum(told.media) == 20
    assert told.unseen == (4, 5)
    assert set(told.few) >= {4, 5}
    for group in groups:
        _, number = routing.owner(group)
        x = every if group in few else every[to == number]
        if group.linears[0].endswith("down_proj"):
            x = experts[number].inner(x)
        if len(x):
            assert torch.allclose(grams[group], x.T @ x / len(x), atol=1e-5)
        else:
            assert group not in grams
    gates = [grams[g] for g in few if g.linears[0].endswith("gate_proj")]
    assert gates[0] is gates[1]  # one matrix for however many experts
    own, all_of_them = tokens[0].T @ tokens[0] / 40, every.T @ every / 64
    both = (tokens[0].T @ tokens[0] + 8 * all_of_them) / 48  # 8 is a sixteenth of the floor
    assert torch.allclose(routing.blended(own, all_of_them, 40, 128), both, atol=1e-6)
    assert routing.blended(None, all_of_them, 0, 128) is all_of_them


def unfused_experts(count: int, hidden: int, inner: int) -> Any:
    from mmq.quantize.experts import Expert

    made = Experts([Expert(hidden, inner, torch.nn.functional.silu, torch.float32) for _ in range(count)])
    made.to_empty(device="cpu").requires_grad_(False)
    for p in made.parameters():
        p.normal_(0, 0.2)
    return made


def test_portions_change_no_byte(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two experts' matrices, or for all of them."""
    base = moe("qwen3_moe", tmp_path / "base", num_hidden_layers=2)
    at_once = quantize("qwen3_moe", base, tmp_path / "once")
    layer = build(base).layers[1]
    groups = expert_groups(layer)
    limit = 2 * sum(routing.gram_bytes(width, 4, shared=width == HIDDEN) for width in (HIDDEN, INNER))
    assert [len(p) for p in routing.portions(layer, groups, limit)] == [4] * (EXPERTS // 2)
    monkeypatch.setattr(making, "Memory", lambda: Memory(held=limit))
    assert quantize("qwen3_moe", base, tmp_path / "portions").digest == at_once.digest


def test_taken_up_again(tmp_path: Path) -> None:
    """Interrupted after a layer with a mixture, a run gives the digest of one that was not, and the same counts."""
    base = moe("qwen3_vl_moe", tmp_path / "base")
    whole = quantize("qwen3_vl_moe", base, tmp_path / "whole")

    def stop(step: Step) -> None:
        if step.name == "layer" and step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize("qwen3_vl_moe", base, tmp_path / "again", tell=stop)
    again = quantize("qwen3_vl_moe", base, tmp_path / "again")
    assert again.digest == whole.digest
    assert again.manifest["layers"] == whole.manifest["layers"]


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(tmp_path: Path) -> None:
    """Under torchrun each process counts its own samples' tokens; all give the same experts all tokens of the layer."""
    base = moe("qwen3_moe", tmp_path / "base", num_hidden_layers=2)
    asked = ["quantize", str(base), "--calibration", "text", "--samples", "6", "--device", "cpu"]
    outs = [tmp_path / "one", tmp_path / "two"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmq"]
    for out, program in zip(outs, (["-m", "mmq"], two), strict=True):
        command = [sys.executable, *program, *asked, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = (open_artifact(out, verify=True).manifest["layers"][1] for out in outs)
    mine, theirs = one["experts"][0], other["experts"][0]
    assert sum(mine["text"]) == sum(theirs["text"])
    assert sum(abs(a - b) for a, b in zip(mine["text"], theirs["text"], strict=True)) <= 8  # the layers before differ
    assert mine["all_tokens"] == theirs["all_tokens"]
    assert other["errors"] == pytest.approx(one["errors"], rel=0.2)


def test_other_forms_are_refused_by_name() -> None:
    """gpt-oss keeps its experts transposed, interleaved and with biases."""
    import transformers as t
    from accelerate import init_empty_weights

    config = t.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2, vocab_size=64
    )
    with init_empty_weights():
        model = t.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(GptOssExperts\).*not (supported|take apart)"):
        unfused(model, open_source_of_nothing())


def open_source_of_nothing() -> Any:
    from mmq.quantize.source import Source

    return Source(Path("nowhere"), {}, lambda name: torch.empty(0))
