"""Each rule of `mmq check --engines` beside the engine itself: what the rules refuse, the engine must refuse or answer
wrongly, and what they let pass it must load and answer as it answers the artifact as it was made.

One start of vLLM for the rules that break most; the rest of them, and families by the dozen, under `-m slow`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_cli import Run, one_line
from tiny import vlm
from torch import Tensor
from transformers import AutoConfig

from mmq.export.convert import convert
from mmq.export.make import make
from mmq.export.packing import unpack_awq
from mmq.export.subject import read_subject
from mmq.export.view import view
from mmq.quantize.classes import model_class
from mmq.quantize.grid import dequantize
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.recipe import Recipe
from mmq.serve.engines import plan
from mmq.serve.machine import GIB, Gpu, Machine, this_machine
from mmq.serve.rules.rule import Setting, Verdict, judge
from mmq.serve.rules.verdicts import PLACES, chosen, refused, verdicts

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
AWQ, GPTQ, CT = ("awq", None), ("gptq", None), ("awq", "compressed-tensors")
BNB = {"bitsandbytes": "0.50.2", "vllm-bnb-plugin": "0.0.3", "vllm": "0.32.0"}
PROMPT = "<|im_start|>user\n{place}{text}<|im_end|>\n<|im_start|>assistant\n"
FAR = 0.05  # nats: what packed weights and their unpacked twin never differ by (test_twin.py)

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Break:
    """How an artifact is spoiled, and the rule that must say so; None where it stays sound. `quick` ones run always."""

    made: tuple[str, str | None]
    rule: str | None
    config: Callable[[Config], object] | None = None
    tensors: Callable[[Tensors], Tensors] | None = None
    without: tuple[str, ...] = ()
    quick: bool = False


def sets(**values: Any) -> Callable[[Config], object]:
    return lambda q: q.update(values)


def adds(key: str, entry: str) -> Callable[[Config], object]:
    return lambda q: q[key].append(entry)


def old_names(q: Config) -> None:
    """As packages write them that run beside transformers 4: the names on disk, exactly."""
    q["ignore"] = ["lm_head", *(e for e in q["ignore"] if e.startswith("visual.") and not e.endswith("."))]


def ordered(q: Config) -> None:
    q["config_groups"]["group_0"]["weights"]["actorder"] = "group"


def one_of_three(tensors: Tensors) -> Tensors:
    """k_proj of a layer unpacked, q_proj and v_proj not."""
    for name in [n for n in tensors if n.endswith("layers.1.self_attn.k_proj.qweight")]:
        head = name.removesuffix(".qweight")
        x = unpack_awq({s: tensors.pop(f"{head}.{s}") for s in ("qweight", "qzeros", "scales")})
        tensors[f"{head}.weight"] = dequantize(x).to(torch.bfloat16)
    return tensors


def gemv(tensors: Tensors) -> Tensors:
    """As AutoAWQ's other layout has them: outputs first."""
    return {n: t.T.contiguous() if n.rpartition(".")[2] in ("qweight", "qzeros") else t for n, t in tensors.items()}


K_ONLY = "layers.1.self_attn.k_proj"
BREAKS: Mapping[str, Break] = {
    "awq": Break(AWQ, None, quick=True),
    "awq, no list": Break(AWQ, None, sets(modules_to_not_convert=[])),
    "awq, visual": Break(AWQ, None, sets(modules_to_not_convert=["visual"])),
    "awq, model.visual without its dot": Break(
        AWQ, "skip list", sets(modules_to_not_convert=["model.visual"]), quick=True
    ),
    "awq, the head alone": Break(AWQ, "skip list", sets(modules_to_not_convert=["lm_head"])),
    "awq, a packed layer listed": Break(AWQ, "skip list", adds("modules_to_not_convert", "layers.1."), quick=True),
    "awq, one of three": Break(AWQ, "fused", tensors=one_of_three),
    "awq, one of three, listed": Break(AWQ, "fused", adds("modules_to_not_convert", K_ONLY), one_of_three, quick=True),
    "awq, zero_point false": Break(AWQ, "zero point", sets(zero_point=False), quick=True),
    "awq, 8 bits": Break(AWQ, "bits", sets(bits=8)),
    "awq, gemv in name": Break(AWQ, None, sets(version="gemv")),
    "awq, gemv": Break(AWQ, "layout", sets(version="gemv"), gemv),
    "awq, no tokenizer": Break(AWQ, "files", without=("tokenizer*", "vocab*", "merges*")),
    "awq, no processor": Break(AWQ, "files", without=("*processor*",), quick=True),
    "gptq": Break(GPTQ, None),
    "gptq, asymmetric": Break(GPTQ, "symmetric", sets(sym=False), quick=True),
    "gptq, activation order": Break(GPTQ, "activation order", sets(desc_act=True), quick=True),
    "gptq, groups of 16": Break(GPTQ, "group size", sets(group_size=16)),
    "gptq, dynamic without visual": Break(GPTQ, None, sets(dynamic={"-:.*visual.*": {}})),
    "gptq, dynamic without mlp": Break(GPTQ, "skip list", sets(dynamic={"-:.*mlp.*": {}}), quick=True),
    "gptq, down_proj alone": Break(GPTQ, "skip list", sets(modules_in_block_to_quantize=[["mlp.down_proj"]])),
    "ct": Break(CT, None, quick=True),
    "ct, visual by expression": Break(CT, None, sets(ignore=["re:.*visual.*", "lm_head"])),
    "ct, names on disk": Break(CT, None, old_names),
    "ct, visual by transformers' name": Break(CT, "skip list", sets(ignore=["re:model.visual.*"]), quick=True),
    "ct, nothing ignored": Break(CT, "skip list", sets(ignore=["lm_head"])),
    "ct, a packed linear ignored": Break(CT, "skip list", adds("ignore", "re:.*layers.1.mlp.down_proj")),
    "ct, activation order": Break(CT, "activation order", ordered),
}


def spoiled(source: Path, out: Path, change: Break) -> Path:
    """A copy of `source`, spoiled so. No manifest: it would tell."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("mmq.json", *change.without))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if change.config:
        change.config(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if change.tensors:
        (out / "model.safetensors.index.json").unlink()
        every: Tensors = {}
        for shard in out.glob("*.safetensors"):
            every |= load_file(shard)
            shard.unlink()
        save_file(change.tensors(every), out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def broken(artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`broken(name)`: the folder of a row of BREAKS, made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("broken")

    def make(name: str) -> Path:
        if name not in made:
            made[name] = spoiled(artifact(*BREAKS[name].made), folder / str(len(made)), BREAKS[name])
        return made[name]

    return make


def verdict(folder: Path, place: str = "vllm:cpu", **setting: Any) -> Verdict:
    (found,) = chosen(place)
    return judge(read_subject(folder), found, Setting(device=found.device, **setting))


def fatal(found: Verdict) -> set[str]:
    return {f.rule for f in found.findings if f.fatal}


# what the rules say


@pytest.mark.parametrize("name", BREAKS)
def test_the_rule_that_is_broken_is_named(broken: Callable[[str], Path], name: str) -> None:
    found = verdict(broken(name))
    expected = {BREAKS[name].rule} - {None}
    assert expected <= fatal(found)
    assert bool(fatal(found)) == bool(expected)
    assert all(f.why and f.remedy for f in found.findings)


def test_an_artifact_by_every_engine(artifact: Callable[..., Path]) -> None:
    def answers(*made: Any) -> dict[str, str]:
        return {v.place.name: v.answer for v in verdicts(artifact(*made), PLACES)}

    # pebble's picture encoder has heads of 32, which TurboMind's own encoder is not made for
    assert answers("awq") == {
        "vllm:cuda": "yes",
        "vllm:cpu": "yes",
        "sglang:cuda": "yes",
        "lmdeploy:turbomind": "no",
        "lmdeploy:pytorch": "yes",
        "transformers:any": "condition",
        "pytorch:cuda": "yes",
        "pytorch:cpu": "yes",
    }
    assert answers("gptq")["sglang:cuda"] == "no"  # it would take the picture encoder for packed
    assert answers("gptq")["lmdeploy:pytorch"] == "no"
    assert answers("awq", "compressed-tensors")["sglang:cuda"] == "yes"
    assert answers("awq", "compressed-tensors")["lmdeploy:pytorch"] == "no"
    assert answers("bnb")["lmdeploy:turbomind"] == "no"
    assert answers("bnb")["vllm:cuda"] == "condition"


def test_the_same_list_in_three_engines(broken: Callable[[str], Path]) -> None:
    """`visual` is found by vLLM and SGLang, and not by transformers, which looks from the start of `model.visual`;
    `model.visual` is found by transformers alone."""
    for name, expected in (
        ("awq, visual", {"vllm:cpu": False, "sglang:cuda": False, "transformers:any": True}),
        ("awq, model.visual without its dot", {"vllm:cpu": True, "sglang:cuda": True, "transformers:any": False}),
    ):
        assert {place: "skip list" in fatal(verdict(broken(name), place)) for place in expected} == expected


def test_a_list_that_is_no_expression(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """transformers reads each entry as one; vLLM looks for it as it stands."""
    change = Break(AWQ, None, adds("modules_to_not_convert", "?visual"))
    folder = spoiled(artifact("awq"), tmp_path / "question", change)
    (found,) = [f for f in verdict(folder, "transformers").findings if f.rule == "lists"]
    assert found.fatal
    assert "'?visual' in its lists is read as an expression, and is none" in found.why
    assert verdict(folder).answer != "no"


def test_lmdeploy_knows_the_published_names_alone(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """`KeyError: 'model.embed_tokens.weight'`, said its TurboMind of transformers' own names, which vLLM takes too."""
    out = spoiled(artifact("awq"), tmp_path / "named anew", Break(AWQ, None, lambda q: None))
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    newer = {n: n.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1) for n in places}
    for file in set(places.values()):
        tensors = {newer[n]: t for n, t in load_file(out / file).items()}
        (out / file).unlink()  # a link to the fixture's own
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = json.dumps({"weight_map": {newer[n]: f for n, f in places.items()}})
    (out / "model.safetensors.index.json").unlink()
    (out / "model.safetensors.index.json").write_text(index)
    for place, fits in (("lmdeploy:turbomind", False), ("lmdeploy:pytorch", False), ("vllm:cuda", True)):
        assert ("names" in fatal(verdict(out, place))) is not fits
        assert (verdict(out, place).answer != "no") is fits


def nested(config: Config) -> None:
    config["architectures"] = ["LlavaForConditionalGeneration"]


def wide_heads(config: Config) -> None:
    config["vision_config"] |= {"embed_dim": 1280, "num_heads": 16}


@pytest.mark.parametrize(
    ("place", "made", "whole", "inner", "rule"),
    [
        ("lmdeploy:turbomind", AWQ, wide_heads, sets(), None),
        ("lmdeploy:turbomind", AWQ, wide_heads, sets(version="gemv"), "layout"),
        ("lmdeploy:turbomind", AWQ, wide_heads, sets(group_size=64), "group size"),
        ("lmdeploy:turbomind", GPTQ, wide_heads, sets(desc_act=True), "symmetric"),
        ("lmdeploy:turbomind", CT, wide_heads, lambda q: q["config_groups"]["group_0"].pop("format"), "format"),
        ("lmdeploy:turbomind", AWQ, nested, sets(), "architecture"),
        ("lmdeploy:pytorch", AWQ, nested, sets(), "architecture"),
        ("lmdeploy:pytorch", GPTQ, wide_heads, sets(), "format"),
        ("lmdeploy:pytorch", AWQ, wide_heads, sets(modules_to_not_convert=[]), None),
        ("sglang:cuda", AWQ, wide_heads, sets(modules_to_not_convert=[]), "skip list"),
        ("sglang:cuda", GPTQ, wide_heads, sets(dynamic={r"-:visual\.": {}}), None),
        ("sglang:cuda", GPTQ, wide_heads, sets(dynamic={r"-:visual\.": {}}, desc_act=True), None),
        ("sglang:cuda", GPTQ, wide_heads, sets(dynamic={r"-:visual\.": {}}, sym=False), "symmetric"),
    ],
)
def test_engines_that_do_not_run_here(
    artifact: Callable[..., Path],
    tmp_path: Path,
    place: str,
    made: tuple[str, str | None],
    whole: Callable[[Config], None],
    inner: Callable[[Config], object],
    rule: str | None,
) -> None:
    """As their sources say."""
    out = spoiled(artifact(*made), tmp_path / "out", Break(made, rule, inner))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    whole(config)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fatal(verdict(out, place)) == {rule} - {None}


def test_gpus_share_heads_and_groups(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """pebble: 4 heads, 2 of keys and values, 256 wide, 512 within."""
    folder = artifact("awq")
    assert not fatal(verdict(folder, "vllm:cuda", tp=2))
    assert fatal(verdict(folder, "vllm:cuda", tp=3)) >= {"heads"}
    assert "tensor parallel" in fatal(verdict(folder, "vllm:cuda", tp=4))  # 256 inputs of o_proj: half a group
    assert fatal(verdict(artifact("bnb"), "vllm:cuda", tp=2, packages=BNB)) == {"tensor parallel"}


def test_bitsandbytes_under_versions_of_vllm(artifact: Callable[..., Path]) -> None:
    folder = artifact("bnb")
    assert not verdict(folder, version="0.32.0", packages=BNB).findings
    (found,) = verdict(folder, version="0.32.0", packages={"bitsandbytes": "0.50.2"}).findings
    assert found.remedy.startswith("`pip install vllm-bnb-plugin`")
    assert not verdict(folder, version="0.26.0", packages={"bitsandbytes": "0.50.2"}).findings


def test_activation_order_under_versions_of_vllm(broken: Callable[[str], Path]) -> None:
    folder = broken("gptq, activation order")
    assert "activation order" not in fatal(verdict(folder, version="0.28.0"))
    assert "activation order" in fatal(verdict(folder, version="0.30.0"))


def test_model_types_that_the_engines_transformers_does_not_know(artifact: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(artifact("awq"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) | {"model_type": "qwen3_vl"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for place in ("vllm:cuda", "transformers:any", "sglang:cuda"):
        assert "version" in fatal(verdict(tmp_path / "out", place, packages={"transformers": "4.56.2"}))
        assert "version" not in fatal(verdict(tmp_path / "out", place, packages={"transformers": "4.57.0"}))
        assert "version" not in fatal(verdict(tmp_path / "out", place))


def test_a_packed_head_must_be_declared(artifact: Callable[..., Path], tmp_path: Path) -> None:
    for made, key in ((("awq", None), "lm_head"), (("awq", "compressed-tensors"), "config_groups")):
        folder = artifact(*made, head="int4")
        assert not fatal(verdict(folder))
        assert "head" in fatal(verdict(folder, "lmdeploy:pytorch"))

        def undeclare(q: Config, key: str = key) -> None:
            if key == "lm_head":
                del q[key]
            else:
                q[key]["group_0"]["targets"] = ["Linear"]

        out = spoiled(folder, tmp_path / key, Break(made, None, undeclare))
        assert fatal(verdict(out)) == {"head"}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "gemma3", "dtype": "float16"}, "dtype"),
        ({"model_type": "gemma3", "dtype": "bfloat16"}, None),
        ({"model_type": "internvl_chat"}, "remote code"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.C"}}, "files"),
        ({"architectures": ["Ovis2ForConditionalGeneration"]}, "architecture"),
        ({"architectures": ["Another"]}, None),
        ({"quantization_config": None}, "declared"),
    ],
)
def test_a_config_alone_can_mean_no(
    artifact: Callable[..., Path], tmp_path: Path, changes: Config, rule: str | None
) -> None:
    """Seen in vLLM by the families of the slow test."""
    shutil.copytree(artifact("awq"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    assert fatal(verdict(tmp_path / "out")) == {rule} - {None}


def test_code_that_a_tokenizer_names_must_be_there(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """Code on a hub is the engine's to fetch."""
    out = tmp_path / "out"
    shutil.copytree(artifact("awq"), out)
    words = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    for named, expected in (("words.Words", {"files"}), ("owner/model--words.Words", set())):
        told = words | {"auto_map": {"AutoTokenizer": [named, None]}}
        (out / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
        assert fatal(verdict(out)) == expected


def test_it_takes_no_torch_and_less_than_a_second(tmp_path: Path, pebble: Path) -> None:
    """On the headers of a 7B: 28 layers of 7 packed linears, 32 blocks of an encoder, as a released AWQ has them."""
    folder = headers_of_7b(tmp_path / "seven", pebble)
    code = (
        "import sys, time, pathlib; t = time.perf_counter()\n"
        "from mmq.serve.rules.verdicts import PLACES, verdicts\n"
        "found = verdicts(pathlib.Path(sys.argv[1]), PLACES)\n"
        "print(time.perf_counter() - t, 'torch' in sys.modules, [v.answer for v in found])"
    )
    done = [subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True) for _ in range(3)]
    assert not done[0].returncode, done[0].stderr
    seconds, torch_there, answers = done[0].stdout.split(" ", 2)
    logging.getLogger(__name__).info("7B: %s s, %s", seconds, answers.strip())
    assert torch_there == "False"
    assert "'no'" not in answers
    assert min(float(d.stdout.split()[0]) for d in done) < 1


def headers_of_7b(out: Path, pebble: Path) -> Path:
    """A folder with Qwen2.5-VL-7B's names and shapes in AWQ, its tensors holes in sparse files."""
    shutil.copytree(pebble, out, ignore=shutil.ignore_patterns("*.safetensors"))
    hidden, within, kv = 3584, 18944, 512
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [152064, hidden])}
    tensors["lm_head.weight"] = ("BF16", [152064, hidden])
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, within)}
    shapes |= {"mlp.up_proj": (hidden, within), "mlp.down_proj": (within, hidden)}
    for layer in range(28):
        for name, (inputs, outputs) in shapes.items():
            linear = f"model.layers.{layer}.{name}"
            tensors[f"{linear}.qweight"] = ("I32", [inputs, outputs // 8])
            tensors[f"{linear}.qzeros"] = ("I32", [inputs // 128, outputs // 8])
            tensors[f"{linear}.scales"] = ("F16", [inputs // 128, outputs])
    for block in range(32):
        for name, shape in {"attn.qkv": (3840, 1280), "attn.proj": (1280, 1280), "mlp.up_proj": (3420, 1280)}.items():
            tensors[f"visual.blocks.{block}.{name}.weight"] = ("BF16", list(shape))
    entries, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = (4 if dtype == "I32" else 2) * shape[0] * shape[1]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(entries).encode()
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + place)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["text_config"] |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    config["vision_config"] = {"hidden_size": 1280, "num_heads": 16}
    lists = ["visual.", "model.visual.", "lm_head"]
    lists += [n.removesuffix(".weight") for n in tensors if n.startswith("visual.")]
    config["quantization_config"] = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128}
    config["quantization_config"] |= {"zero_point": True, "modules_to_not_convert": lists}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


# the command, and serve


def test_the_command(mmq: Run, artifact: Callable[..., Path], broken: Callable[[str], Path]) -> None:
    code, out, err = mmq("check", str(artifact("awq")), "--engines", "vllm,lmdeploy")
    assert code == 0, err
    assert "TurboMind's is made for 64 and 80" in " ".join(out.split())
    code, out, err = mmq("check", str(broken("awq, zero_point false")), "--engines", "vllm:cpu,sglang", "--json")
    assert code == 1
    assert err.strip() == "mmq: would not load it: vllm"
    first, second = json.loads(out)
    assert (first["answer"], second["answer"]) == ("no", "yes")
    assert [f["rule"] for f in first["findings"]] == ["zero point"]
    code, _, err = mmq("check", str(artifact("awq")), "--engines", "tgi")
    assert code == 2
    assert "known are all, vllm, sglang, lmdeploy, transformers" in one_line(err)
    _, _, err = mmq("check", str(artifact("awq")), "--engines", "all", "--tp", "0")
    assert "--tp is 0" in one_line(err)


def test_serve_asks_the_rules_first(broken: Callable[[str], Path], tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    folder = broken("awq, a packed layer listed")
    options: Any = {
        "machine": Machine("cpu", 4, 32 * GIB, 32 * GIB, False, (Gpu("card", 24 * GIB, 24 * GIB, 8.9),)),
        "environ": {"MMQ_VLLM": str(program)},
    }
    with pytest.raises(ValueError, match=r"would be in 16 bit, and it is packed; `mmq convert FOLDER --repair`"):
        plan("vllm", folder, **options)
    assert plan("vllm", folder, ignore_rules=True, **options).argv
    sound = broken("awq")
    assert plan("vllm", sound, **options).argv
    with pytest.raises(ValueError, match="cannot be dealt to 3 GPUs"):
        plan("vllm", sound, extra=("-tp", "3"), **options)


# vLLM itself


def asked(folder: Path) -> list[dict[str, str]]:
    """Prompts with answers: pictures and text."""
    prompts = []
    for i, sample in enumerate(samples("test", 3, tasks=["describe", "word", "text"])):
        words = "".join(p["text"] for p in sample.messages[-2]["content"] if p["type"] == "text")
        place = "<|vision_start|><|image_pad|><|vision_end|>" if sample.images else ""
        prompt = {"prompt": PROMPT.format(place=place, text=words), "answer": f"{sample.answer}<|im_end|>"}
        if sample.images:
            prompt["image"] = str(folder / f"{i}.png")
            sample.images[0].save(prompt["image"])
        prompts.append(prompt)
    return prompts


def vllm_says(folders: Mapping[str, Path], scratch: Path, **more: Any) -> dict[str, Any]:
    """What one process of vLLM makes of each folder; `more` is for twins.py."""
    request, reply = scratch / "request.json", scratch / "reply.json"
    places = {name: str(folder) for name, folder in folders.items()}
    told = {"folders": list(places.values()), "prompts": asked(scratch)} | more
    request.write_text(json.dumps(told), encoding="utf-8")
    script = Path(__file__).parent / "twins.py"
    start = time.monotonic()
    run = subprocess.run([sys.executable, script, request, reply], capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr[-2000:]
    logging.getLogger(__name__).info("%d folders, %.0f s", len(folders), time.monotonic() - start)
    found = json.loads(reply.read_text(encoding="utf-8"))
    return {name: found[place] for name, place in places.items()}


def apart(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest difference between any two logprobs."""
    pairs = zip(one["outputs"], two["outputs"], strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x["logprobs"], y["logprobs"], strict=True))


def hold(names: list[str], said: Mapping[str, Any]) -> None:
    """Every row of BREAKS beside what vLLM did: refused, or far from the sound one's answers, exactly where the rules
    say no."""
    wrong = []
    for name in names:
        sound = said[name.partition(",")[0]]
        assert "error" not in sound, sound
        works = "error" not in said[name] and apart(said[name], sound) <= FAR
        how = said[name].get("error") or f"{apart(said[name], sound):.3f} apart"
        logging.getLogger(__name__).info("%s: %s", name, how[:160])
        if works != (BREAKS[name].rule is None):
            wrong.append(f"{name}: {how}")
    assert not wrong


@needs_vllm
def test_vllm_does_as_the_rules_say(broken: Callable[[str], Path], tmp_path: Path) -> None:
    names = [name for name, row in BREAKS.items() if row.quick]
    names += [sound for sound in ("awq", "gptq", "ct") if sound not in names]
    converted = convert(broken("awq"), tmp_path / "converted", format="compressed-tensors").path
    said = vllm_says({"converted": converted} | {name: broken(name) for name in names}, tmp_path)
    hold(names, said)
    assert "error" not in said["converted"], said["converted"]
    assert apart(said["converted"], said["awq"]) <= FAR
    assert said["converted"]["packed"] == said["awq"]["packed"] > 0


@needs_vllm
@pytest.mark.slow
def test_vllm_does_as_every_rule_says(broken: Callable[[str], Path], tmp_path: Path) -> None:
    hold(list(BREAKS), vllm_says({name: broken(name) for name in BREAKS}, tmp_path))


def stray(source: Path, out: Path) -> Path:
    """LLaVA-NeXT as transformers 5 names it, and no list: vLLM makes one up of `model`, which is in every name."""

    def under_model(tensors: Tensors) -> Tensors:
        return {f"model.{n}" if n == "image_newline" else n: t for n, t in tensors.items()}

    return spoiled(source, out, Break(AWQ, "skip list", sets(modules_to_not_convert=[]), under_model))


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_vllm_does_as_the_rules_say_of_every_family(tmp_path: Path) -> None:
    """Two formats of each, as mmq makes them and with a list that names the head alone."""
    from mmq.export.make import make
    from mmq.recipes.calibration import drawn
    from mmq.recipes.hub import fetch
    from mmq.recipes.recipe import Recipe

    folders: dict[str, Path] = {}
    for kind in zoo.KINDS:
        if kind == "smolvlm" and importlib.util.find_spec("num2words") is None:
            continue  # its processor wants it
        base = zoo.write(kind, tmp_path / kind)
        for format in ("awq", "compressed-tensors"):
            made = tmp_path / f"{kind}-{format}"
            recipe = Recipe("tiny", str(base), method="rtn", format=format, symmetric=False)
            make(recipe, fetch(str(base)), made, samples=drawn(1), calibration="drawn")
            bare = Break(AWQ, None, sets(**{"ignore" if format != "awq" else "modules_to_not_convert": ["lm_head"]}))
            folders[f"{kind} {format}"] = made
            folders[f"{kind} {format}, bare"] = spoiled(made, tmp_path / f"{kind}-{format}-bare", bare)
    folders["llava_next, a tensor under model"] = stray(folders["llava_next awq"], tmp_path / "stray")
    words = [{"prompt": "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", "answer": "a red ball"}]
    said = vllm_says(folders, tmp_path, prompts=words, options={"dtype": "bfloat16"})
    wrong = {}
    for name, folder in folders.items():
        found = verdict(folder)
        refused_ = "error" in said[name]
        told = found.answer == "no" or (refused_ and any(f.rule == "skip list" for f in found.findings))
        logging.getLogger(__name__).info("%s: %s, vLLM: %s", name, found.answer, said[name].get("error", "loads")[:90])
        if told != refused_:
            wrong[name] = said[name].get("error", "loads")[:300]
    assert not wrong
    assert len(folders) > 80


# transformers itself


def random_weights(folder: Path) -> set[str]:
    """The weights that transformers found none for and made up, by the module's name, loading `folder` on this CPU."""
    from transformers import AutoModelForImageTextToText

    load: Any = AutoModelForImageTextToText.from_pretrained
    _, info = load(folder, dtype=torch.float16, output_loading_info=True)
    return {name.rpartition(".")[0] for name in info["missing_keys"]}


def test_transformers_does_as_the_rules_say(broken: Callable[[str], Path], artifact: Callable[..., Path]) -> None:
    """It refuses nothing: what it finds no tensors for it makes up, and the rules must say so."""
    packages = {"compressed-tensors": "0.17.0"}
    seen = {}
    for name in ("ct", "ct, visual by expression", "ct, names on disk", "ct, a packed linear ignored"):
        expected = seen[name] = "skip list" in fatal(verdict(broken(name), "transformers:any", packages=packages))
        assert bool(random_weights(broken(name))) == expected, name
    assert list(seen.values()) == [False, False, True, True]
    nf4 = verdict(artifact("bnb"), "transformers:any", packages={"bitsandbytes": "0.50.2", "accelerate": "1.15.0"})
    assert not nf4.findings
    assert not random_weights(artifact("bnb"))
    assert not verdict(artifact("awq", "compressed-tensors"), "transformers:any", packages=packages).findings


def test_transformers_reads_what_mmq_reads(artifact: Callable[..., Path]) -> None:
    """compressed-tensors as mmq writes them, decompressed by their own package."""
    from transformers import AutoModelForImageTextToText

    folder = artifact("awq", "compressed-tensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    mine = view(folder)
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))  # decompresses them all
    theirs: Any = model.get_submodule("model.language_model.layers.1.mlp.down_proj").weight
    assert torch.equal(theirs, mine.get(f"{name}.weight").bfloat16())


# several processes


@needs_vllm
@pytest.mark.slow
def test_groups_that_straddle_two_ranks_go_wrong(tmp_path: Path) -> None:
    """384 inputs in groups of 128 over two ranks. vLLM's CPU kernel loads AWQ and GPTQ so without a word and answers
    otherwise than from one; compressed-tensors are refused. The 16-bit model answers alike from one and from two."""
    from mmq.export.make import make
    from mmq.recipes.calibration import drawn
    from mmq.recipes.hub import fetch
    from mmq.recipes.recipe import Recipe

    base = vlm("qwen2_vl", tmp_path / "base", intermediate=384)
    folders = {"16 bit": base}
    for format in ("awq", "gptq", "compressed-tensors"):
        recipe = Recipe("tiny", str(base), method="rtn", format=format, symmetric=format == "gptq")
        folders[format] = tmp_path / format
        make(recipe, fetch(str(base)), folders[format], samples=drawn(1), calibration="drawn")
        assert not fatal(verdict(folders[format]))
        assert fatal(verdict(folders[format], tp=2)) == {"tensor parallel"}
    alike = {name: tokens(folder, 1) == tokens(folder, 2) for name, folder in folders.items()}
    assert alike == {"16 bit": True, "awq": False, "gptq": False, "compressed-tensors": False}


def tokens(folder: Path, ranks: int) -> list[int] | None:
    """vLLM's greedy answer from this many ranks; None where it refuses."""
    code = (
        "import sys, twins\nfrom vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(sys.argv[1], max_model_len=512, enforce_eager=True, tensor_parallel_size=int(sys.argv[2]))\n"
        "    out = llm.generate(['hello'], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)\n"
        "    print('TOKENS', list(out[0].outputs[0].token_ids))\n"
    )
    script = folder.parent / "ask.py"
    script.write_text(code)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    if ranks == 1:
        del env["VLLM_CPU_OMP_THREADS_BIND"]
    command = [sys.executable, str(script), str(folder), str(ranks)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    told = [line for line in run.stdout.splitlines() if line.startswith("TOKENS ")]
    return json.loads(told[0].removeprefix("TOKENS ")) if told else None


def test_a_class_that_vllm_serves_as_a_text_model(tmp_path: Path) -> None:
    """vLLM 0.32 loads it and answers words; a picture is "not available for text-only models"."""
    told = verdict(zoo.write("phi4_multimodal", tmp_path / "phi4"))
    assert told.answer == "condition"
    assert "refuses pictures" in told.findings[0].why


@pytest.mark.parametrize(
    ("kind", "version", "beside", "found"),
    [
        ("llava", "0.26.0", "5.17.0", ["version"]),
        ("mistral3", "0.31.0", "5.17.1", ["version"]),
        ("llava", "0.26.0", "5.15.1", []),
        ("llava", "0.32.0", "5.19.0", []),
        ("llava", "", "5.19.0", []),
        ("glm4v", "0.26.0", "5.17.0", ["positions"]),
        ("glm4v", "0.27.0", "5.17.0", []),
    ],
)
def test_older_vllm_beside_newer_transformers(
    kind: str, version: str, beside: str, found: list[str], tmp_path: Path
) -> None:
    """What an H100 with vLLM 0.26.0 and transformers 5.17.0 showed; the later versions by their sources."""
    base = zoo.write(kind, tmp_path / kind)
    told = verdict(base, "vllm:cuda", version=version, packages={"transformers": beside})
    assert [f.rule for f in told.findings] == found


PLAIN = ("llava_next", "gemma3", "qwen2")  # encoders without their wrappers; a head that the embeddings are


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in PLAIN else pytest.mark.slow)
        for kind in (*zoo.QWEN, *zoo.KINDS)
        if kind not in zoo.NEEDS and kind != "phi4_multimodal"  # whose sound has linears that its files have not
    ],
)
def test_plain_transformers_reads_compressed_tensors(kind: str, tmp_path: Path) -> None:
    """Nothing is made up for what it finds no tensors for, and the rules know."""
    base = zoo.write(kind, tmp_path / "base")
    recipe = Recipe(name="tiny", model=str(base), method="rtn", format="compressed-tensors", samples=1)
    made = make(recipe, fetch(str(base)), tmp_path / "out", samples=drawn(1), calibration="drawn").path
    loads = model_class(AutoConfig.from_pretrained(made)).from_pretrained
    _, info = loads(made, output_loading_info=True)
    assert not any(info.values()), info
    beside = {"compressed-tensors": "0.17.0"}
    assert verdict(made, "transformers:any", packages=beside).answer == "yes"
    config = json.loads((made / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    ignored.remove("lm_head")
    (made / "config.json").write_text(json.dumps(config))
    assert verdict(made, "transformers:any", packages=beside).answer == "no"


@needs_vllm
def test_python_that_the_engine_would_run_is_asked_for_before_its_start(tmp_path: Path) -> None:
    base = zoo.write("internlm2", tmp_path)
    with pytest.raises(ValueError, match=r"internlm2 brings its own Python.*say --trust-remote-code"):
        plan("vllm", base, machine=this_machine())
    for allowed in ({"trust_remote_code": True}, {"extra": ("--trust-remote-code",)}, {"ignore_rules": True}):
        plan("vllm", base, machine=this_machine(), **allowed)


def test_every_engine_named_is_refused_only_where_all_its_places_are(artifact: Callable[..., Path]) -> None:
    found = verdicts(artifact("awq"), chosen("lmdeploy,vllm"))
    assert refused(found) == []  # TurboMind would not, LMDeploy's PyTorch engine would
    assert refused([v for v in found if v.place.name == "lmdeploy:turbomind"]) == ["lmdeploy"]
