"""Every family from a folder to whole artifacts: names, layers, groups, streaming, and what a fold leaves as it was."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from mmq.bench.check import check
from mmq.export.artifact import open_artifact
from mmq.export.make import make
from mmq.export.view import packed_linears, view
from mmq.quantize.detect import heads_of
from mmq.quantize.inputs import conversation, encode
from mmq.quantize.lockstep import Lockstep
from mmq.quantize.skeleton import Skeleton, build, load_layer, load_outside, release_layer
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Limits, Recipe
from mmq.serve.rules.verdicts import chosen, verdicts


@pytest.fixture(scope="module", params=[k for k in (*zoo.KINDS, *zoo.OTHERS) if k != "internvl_llama"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    if request.param in zoo.NEEDS:
        pytest.importorskip(zoo.NEEDS[request.param])
    return request.param, zoo.write(request.param, tmp_path_factory.mktemp(request.param))


def states(skeleton: Skeleton, count: int) -> list[torch.Tensor]:
    """Last hidden states of the first drawn samples, the model streamed layer by layer."""
    base = skeleton.module.base_model
    with torch.no_grad():
        inputs = [encode(skeleton, s) for s in drawn(count)]
        load_outside(skeleton)
        calls = [lambda i=i: base(**i, use_cache=False).last_hidden_state for i in inputs]
        with Lockstep(skeleton.layers, calls) as steps:
            for stop in steps:
                load_layer(skeleton, stop.index)
                stop.advance()
                release_layer(skeleton, stop.index)
    return steps.results


def test_streamed_is_the_model_itself(family: tuple[str, Path], tmp_path: Path) -> None:
    """Layer by layer from the files, against transformers with the whole model in memory."""
    from transformers import AutoConfig

    from mmq.quantize.classes import model_class

    kind, folder = family
    skeleton = build(folder)
    mine = states(skeleton, 3)
    if kind in zoo.OTHERS:  # checkpoints that transformers does not load: the same weights in the class it has
        folder = zoo.write(zoo.OTHERS[kind][1], tmp_path)
    whole = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = [encode(skeleton, s) for s in drawn(3)]
        theirs = [whole.base_model(**i, use_cache=False).last_hidden_state for i in inputs]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("method", ["awq", "gptq", "bnb"])
def test_quantized_whole(family: tuple[str, Path], tmp_path: Path, method: str) -> None:
    kind, folder = family
    recipe = Recipe(name="tiny", model=str(folder), method=method, samples=3)
    made = make(
        recipe, fetch(str(folder)), tmp_path / "out", samples=[] if method == "bnb" else drawn(3), calibration="drawn"
    )
    assert open_artifact(made.path, verify=True).digest == made.digest
    packed = packed_linears(open_source(made.path).metas, made.format)
    assert packed == set(made.manifest["quantized"])
    assert len(packed) == zoo.packed(kind)
    before, after = open_source(folder), view(made.path)
    assert {n: m.shape for n, m in before.metas.items()} == {n: m.shape for n, m in after.metas.items()}
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    for entry in config.get("modules_to_not_convert", []):
        assert not any(entry in name for name in packed)
    if method == "bnb":
        assert not [note for note in made.manifest["notes"] if "samples" in note]
    if method == "awq":  # lookups of whatever name are no linears to an engine
        (told,) = verdicts(made.path, chosen("vllm:cuda"))
        assert not [f for f in told.findings if f.rule == "skip list"]
    base, quantized = states(build(folder), 2), states(build(made.path, source=after), 2)
    error = sum(float((a - b).square().sum() / a.square().sum()) for a, b in zip(base, quantized, strict=True)) / 2
    assert 0 < error < 0.2, error


def test_folding_alone_changes_nothing(family: tuple[str, Path]) -> None:
    """Each group's scale moved by hand: the layer puts out what it did."""
    _, folder = family
    skeleton = build(folder)
    base = skeleton.module.base_model
    torch.manual_seed(0)
    with torch.no_grad():
        load_outside(skeleton)
        inputs = encode(skeleton, drawn(1)[0])
        with Lockstep(skeleton.layers, [lambda: base(**inputs, use_cache=False)]) as steps:
            for stop in steps:
                load_layer(skeleton, stop.index)
                before = stop.run(stop.calls[0])
                for group in skeleton.family.groups[stop.index]:
                    fold(stop.layer, dataclasses.asdict(group), heads_of(skeleton.module.config, stop.index)[1])
                after = stop.run(stop.calls[0])
                before, after = (x[0] if isinstance(x, tuple) else x for x in (before, after))
                assert torch.allclose(before, after, atol=2e-4 * float(before.abs().max()))
                stop.advance()


def fold(layer: torch.nn.Module, group: dict, head_dim: int) -> None:
    if group["absorber"] is None:
        return
    absorber = layer.get_submodule(group["absorber"])
    weight = absorber.get_parameter("weight")
    s = torch.rand(group["last"] or weight.shape[0]) * 1.5 + 0.5
    if weight.ndim == 1:
        weight.copy_((weight + group["offset"]) / s - group["offset"])
    else:
        weight[-len(s) :].div_(s[:, None])
    if getattr(absorber, "bias", None) is not None:
        absorber.get_parameter("bias")[-len(s) :].div_(s)
    first = layer.get_submodule(group["linears"][0]).get_parameter("weight")
    if len(s) < first.shape[1]:
        s = s.view(-1, head_dim).repeat_interleave(first.shape[1] // len(s), 0).flatten()
    for name in (*group["linears"], *group["beside"]):
        layer.get_submodule(name).get_parameter("weight").mul_(s)


def test_the_docs_list_what_is_tested() -> None:
    """Every kind has its line, with a figure where vLLM runs it and without where it does not; every row is named."""
    from mmq.quantize.family import ROWS

    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.MULTILINE))
    assert set(lines) == {*zoo.QWEN, *zoo.KINDS, *zoo.OTHERS} - {"internvl_llama"}
    assert {k for k, figure in lines.items() if re.fullmatch(r"0\.\d+ \(\d\.\d+\)", figure)} == set(zoo.SERVED)
    elsewhere = {"minicpmv", "minicpmo"}  # docs/minicpmv.md
    types = {t for row in ROWS for t in row.model_types if not row.key} - elsewhere
    assert types <= set(re.findall(r"`(\w+)`", text))


def test_tensors_that_the_class_has_no_place_for(tmp_path: Path) -> None:
    """In a decoder layer it would be another model; beside the layers they are copied, and left alone by engines."""
    folder = zoo.write("llama", tmp_path / "llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "mtp.head.weight": torch.zeros(128, 128)}, path, metadata={"format": "pt"})
    assert "mtp." in build(folder).family.skip
    save_file({**tensors, "model.layers.1.mlp.lora_A.weight": torch.zeros(8, 128)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.lora_A\.weight is in decoder layer 1, where LlamaFor"
    ):
        build(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = zoo.write("llava", tmp_path / "llava")
    template = folder / "chat_template.jinja"
    words = template.read_text()
    template.unlink()
    with pytest.raises(ValueError, match="no chat template"):
        build(folder)
    template.write_text(words)
    for name, told in (
        ("tokenizer.json", r"no tokenizer \(tokenizer\.json is missing\)"),
        ("processor_config.json", r"no processor for pictures \(preprocessor_config\.json is missing\)"),
    ):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=told):
            build(folder)
        if name == "tokenizer.json":
            (tmp_path / name).rename(folder / name)


def test_a_text_model_without_a_template_is_put_lines(tmp_path: Path) -> None:
    folder = zoo.write("llama", tmp_path)
    (folder / "chat_template.jinja").unlink()
    skeleton = build(folder)
    assert any("no chat template" in note for note in skeleton.notes)
    sample = drawn(1)[0]
    assert skeleton.words.decode(encode(skeleton, sample)["input_ids"][0]).startswith("User: ")


def test_a_template_that_knows_no_system_message() -> None:
    """It is put in front of the first question, as text or as a part."""
    processor = zoo.tokenizer()
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (zoo.turns(""))
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    said = conversation(processor, messages, opened=False, parts=False)
    assert "user\nBe brief.\n\nHello" in said
    with pytest.raises(ValueError, match="refuses a sample: no system"):
        conversation(processor, messages[:1], opened=False, parts=False)


@pytest.mark.parametrize("kind", ["gemma3", "minicpmv4_6", "phi3_v"])
def test_checked_and_answered(tmp_path: Path, kind: str) -> None:
    """Both models walked in lockstep, and both generate, layer by layer, through caches of every sort."""
    base = zoo.write(kind, tmp_path / "base")
    recipe = Recipe(name="tiny", model=str(base), samples=2)
    made = make(recipe, fetch(str(base)), tmp_path / "out", samples=drawn(2), calibration="drawn")
    found = check(made, base, samples=drawn(2), limits=Limits(), max_new_tokens=3)
    assert found.measures["coverage"] == 1.0
    assert 0 < found.measures["mean_kl"] < 0.1
    assert all(s["length"] for s in found.samples)  # tokens: words of random weights may be none


@pytest.mark.parametrize("layout", ["llava_llama", "multi_modality"])
def test_the_text_model_within_another_layout(tmp_path: Path, layout: str) -> None:
    """LLaVA's and DeepSeek-VL's own checkpoints around the Llama: it says what it says alone, the rest is left."""
    alone = zoo.write("llama", tmp_path / "alone")
    folder = zoo.write("llama", tmp_path / layout)
    eye = {"model.mm_projector.0.weight": torch.randn(128, 128).bfloat16()}
    if layout == "multi_modality":
        zoo.rename(folder / "model.safetensors", ((r"^", "language_model."),))
        eye = {"aligner.layers.0.weight": torch.randn(128, 128).bfloat16()}
        config = json.loads((folder / "config.json").read_text())
        zoo.settle(folder, only=True, model_type=layout, language_config=config)
    else:
        zoo.settle(folder, model_type=layout, mm_vision_tower="openai/clip-vit-large-patch14-336")
    path = folder / "model.safetensors"
    save_file(load_file(path) | eye, path, metadata={"format": "pt"})
    skeleton = build(folder)
    assert any("no class for its vision" in note for note in skeleton.notes)
    assert any(entry in f"{next(iter(eye))}." for entry in skeleton.family.skip if entry != "lm_head")
    assert all(torch.equal(a, b) for a, b in zip(states(skeleton, 2), states(build(alone), 2), strict=True))
