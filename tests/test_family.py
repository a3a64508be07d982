"""Families: each model class of a row, from names to a whole artifact; the streamed walk equals the model itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import vlm

from mmq.export.artifact import open_artifact
from mmq.export.make import make
from mmq.export.view import packed_linears, view
from mmq.quantize import awq
from mmq.quantize.classes import check_class
from mmq.quantize.family import LLAMA
from mmq.quantize.grid import Grid
from mmq.quantize.inputs import encode
from mmq.quantize.lockstep import Lockstep
from mmq.quantize.method import Problem, output_squares, restored
from mmq.quantize.plan import linears
from mmq.quantize.skeleton import build, load_layer, load_outside, release_layer
from mmq.quantize.source import open_source
from mmq.quantize.steps import STEPS, solve
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Recipe
from mmq.recipes.samples import Sample

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm(request.param, tmp_path_factory.mktemp(request.param))


def test_streamed_is_the_model_itself(checkpoint: Path) -> None:
    """Last hidden states, layer by layer from the files, against transformers with the whole model in memory."""
    from transformers import AutoModelForImageTextToText

    skeleton = build(checkpoint)
    inputs = [encode(skeleton, s) for s in drawn(6)]
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [whole.base_model(**i, use_cache=False).last_hidden_state for i in inputs]
        load_outside(skeleton)
        base = skeleton.module.base_model
        calls = [lambda i=i: base(**i, use_cache=False).last_hidden_state for i in inputs]
        with Lockstep(skeleton.layers, calls) as steps:
            for stop in steps:
                load_layer(skeleton, stop.index)
                stop.advance()
                release_layer(skeleton, stop.index)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(steps.results, expected, strict=True))
    assert all(p.device.type == "meta" for layer in skeleton.layers for p in layer.parameters())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantized_whole(checkpoint: Path, tmp_path: Path, method: str) -> None:
    recipe = Recipe(name="tiny", model=str(checkpoint), method=method, samples=8)
    opened = make(recipe, fetch(str(checkpoint)), tmp_path / "out", samples=drawn(8), calibration="drawn")
    assert open_artifact(opened.path, verify=True).digest == opened.digest
    packed = packed_linears(open_source(opened.path).metas, opened.format)
    assert packed == set(opened.manifest["quantized"])
    assert len(packed) == 3 * 7
    before, after = open_source(checkpoint), view(opened.path)
    assert set(before.metas) == set(after.metas)
    assert all(before.metas[n].shape == after.metas[n].shape for n in before.metas)


def test_keep_leaves_a_group_in_16_bit(checkpoint: Path) -> None:
    skeleton = build(checkpoint)
    plan = linears(skeleton, ["mlp.down_proj", "model.language_model.layers.0.self_attn"])
    counts = [sum(len(g.linears) for g in plan[i]) for i in sorted(plan)]
    assert counts == [2, 6, 6]
    with pytest.raises(ValueError, match="engines fuse them: keep all"):
        linears(skeleton, ["self_attn.q_proj"])
    with pytest.raises(ValueError, match="nothing in the model is named 'mpl'"):
        linears(skeleton, ["mpl"])
    with pytest.raises(ValueError, match=r"nothing in the model is named 'mlp\.down'"):
        linears(skeleton, ["mlp.down"])  # whole words only, so that layers.1 is not layers.10
    for part in ("model.lang", "lm"):  # the embeddings and the head begin so, but no word of theirs is this
        with pytest.raises(ValueError, match=f"nothing in the model is named '{part}'"):
            linears(skeleton, [part])
    assert linears(skeleton, ["lm_head", "model.language_model.embed_tokens."]) == linears(skeleton)
    with pytest.raises(ValueError, match="keep leaves no linear to quantize"):
        linears(skeleton, ["self_attn", "mlp"])


def test_a_model_without_a_linear_to_quantize_says_why(checkpoint: Path) -> None:
    skeleton = build(checkpoint)
    bare = dataclasses.replace(skeleton, family=dataclasses.replace(skeleton.family, groups=((), (), ())))
    with pytest.raises(ValueError, match=r"have no linear that could be quantized$"):
        linears(bare)
    with pytest.raises(ValueError, match=r"could be quantized \(mlp\.up_proj: too narrow for int4"):
        linears(dataclasses.replace(bare, notes=("mlp.up_proj: too narrow for int4, left in 16 bit",)))


def test_a_sample_that_cannot_be_read_is_told_by_its_words(checkpoint: Path) -> None:
    skeleton = build(checkpoint)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]}
    with pytest.raises(ValueError, match=r"refuses a sample \('.*这是什么？.*'\): .*aspect ratio"):
        encode(skeleton, Sample([question], (Image.new("RGB", (3000, 1)),)))
    skeleton.processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="a sample has no tokens: its messages are empty"):
        encode(skeleton, Sample([{"role": "user", "content": ""}]))


def test_a_linear_kept_in_16_bit_absorbs_no_scale() -> None:
    """v_proj kept and o_proj quantized: o's input stays as it was, so what o stands for must be near the original."""
    weights = {f"{n}.weight": torch.randn(128, 128) for g in LLAMA[:2] for n in g.linears}
    x = torch.randn(512, 128) * torch.logspace(-1.5, 1.5, 128)
    gram = x.T @ x / len(x)
    problem = Problem(weights, LLAMA[1:2], {LLAMA[1]: gram})
    assert not awq.scale(problem, Grid()).columns
    alone = solve(problem, Grid(), STEPS["awq", "default"])
    assert not alone.changed
    loss = output_squares(
        restored(alone.quantized["self_attn.o_proj"]) - weights["self_attn.o_proj.weight"], gram
    ).sum()
    assert loss < 0.05 * output_squares(weights["self_attn.o_proj.weight"], gram).sum()


def test_an_unknown_family_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"'kosmos' is not known: transformers [\d.]+ has no class for it"):
        check_class({"model_type": "kosmos"})


def test_a_group_size_that_does_not_divide(tmp_path: Path) -> None:
    """192 inputs of down_proj: 64 divides them, 128 does not; nothing is written."""
    checkpoint = vlm("qwen2_vl", tmp_path / "odd", intermediate=192)
    out = tmp_path / "out"
    recipe = Recipe(name="odd", model=str(checkpoint), samples=2)
    with pytest.raises(ValueError, match=r"group size 128 does not divide the 192 inputs of .*down_proj; .* 64, 32"):
        make(recipe, fetch(str(checkpoint)), out, samples=drawn(2), calibration="drawn")
    assert not out.exists()


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantized_base_is_refused(part: str | None, tmp_path: Path) -> None:
    checkpoint = vlm("qwen2_vl", tmp_path / "base")
    config = json.loads((checkpoint / "config.json").read_text())
    (config[part] if part else config)["quantization_config"] = {"quant_method": "awq"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    recipe = Recipe(name="base", model=str(checkpoint), samples=2)
    with pytest.raises(ValueError, match="quantized already"):
        make(recipe, fetch(str(checkpoint)), tmp_path / "out", samples=drawn(2), calibration="drawn")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_base_in_8_bits_that_does_not_say_so_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = vlm("qwen2_vl", tmp_path / "base")
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    name = min(n for n in tensors if n.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    recipe = Recipe(name="base", model=str(checkpoint), samples=2)
    with pytest.raises(ValueError, match=r"down_proj.weight is stored in fewer than 16 bits"):
        make(recipe, fetch(str(checkpoint)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    assert not (tmp_path / "out").exists()
