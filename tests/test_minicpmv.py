"""MiniCPM-V without its remote code, against what the original code made of the same weights and pictures.

tests/data/minicpmv holds the original's outputs; minicpmv_original.py made them, minicpmv_cases.py has the inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minicpmv_cases as cases
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmq.bench.check import check
from mmq.export.artifact import open_artifact
from mmq.export.make import make
from mmq.export.view import packed_linears, view
from mmq.export.words import mend_words
from mmq.quantize import skeleton as skeletons
from mmq.quantize.inputs import answer_mask, media_mask, micro_batches
from mmq.quantize.minicpmv.model import MiniCPMV, build, build_model
from mmq.quantize.minicpmv.processor import Processor, build_processor
from mmq.quantize.minicpmv.slices import Slicing, best_grid, patches, slices
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import Limits, Recipe
from mmq.recipes.samples import Sample

DATA = Path(__file__).parent / "data" / "minicpmv"
LIMIT = 1e-3  # of a logit, float32

Opened = tuple[MiniCPMV, Processor]


@pytest.fixture(scope="module", params=cases.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def opened(version: str, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("minicpmv")
    cases.checkpoint(version, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, processor = build(folder, config, dtype=torch.float32)
    model.load_state_dict(weights(model), strict=False)
    return model.eval().requires_grad_(False), processor


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: torch.from_numpy(cases.weight(n, tuple(p.shape))) for n, p in model.named_parameters()}


def original(version: str, case: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What it made of the inputs; its logits at the last positions; and all of them, on two axes."""
    told = json.loads((DATA / f"{version}.json").read_text(encoding="utf-8"))["cases"][case]
    kept = load_file(DATA / f"{version}.safetensors")
    return told, kept[case], kept[f"{case}.all"]


def compare(version: str, case: str, model: MiniCPMV, prompt: str, inputs: dict[str, Tensor]) -> None:
    told, last, echo = original(version, case)
    assert prompt == told["prompt"]
    assert inputs["input_ids"][0].tolist() == told["input_ids"]
    grids = inputs.get("tgt_sizes", torch.empty(0, 2)).tolist()
    assert grids == told["tgt_sizes"]
    cut = inputs["pixel_values"].split([rows * columns for rows, columns in grids]) if grids else ()
    assert [hashlib.sha256(p.contiguous().numpy().tobytes()).hexdigest() for p in cut] == told["pixels"]
    logits = model(**inputs).logits[0]
    assert (logits[-cases.SEEN :] - last).abs().max() < LIMIT
    axes = torch.from_numpy(cases.numbers("echo", (logits.shape[1], 2))).float()
    assert (logits @ axes - echo).abs().max() < LIMIT * logits.shape[1] ** 0.5


@pytest.mark.parametrize("case", cases.CASES)
def test_as_the_original(version: str, opened: Opened, case: str) -> None:
    model, processor = opened
    prompt = processor.apply_chat_template(cases.messages(case), add_generation_prompt=True)
    inputs = processor([prompt], images=[cases.picture(name) for name in cases.CASES[case]])
    compare(version, case, model, prompt, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_a_video_as_the_original(version: str, opened: Opened, packed: bool) -> None:
    """Frame by frame, one slice each; and with frames packed together, which only 4.5 does."""
    model, processor = opened
    size, count, groups = cases.VIDEO
    frames = [cases.picture(size, number=i) for i in range(count)]
    parts = [{"type": "video"}, {"type": "text", "text": cases.QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    if packed and version != "4.5":
        with pytest.raises(ValueError, match="only MiniCPM-V 4\\.5"):
            processor([prompt], videos=[frames], temporal_ids=[groups])
        return
    inputs = processor([prompt], videos=[frames], temporal_ids=[groups] if packed else None)
    if version == "4.5":
        told = original(version, "packed" if packed else "video")[0]
        places = "\n".join(["(<image>./</image>)"] * count)
        assert prompt.replace("(<video>./</video>)", places) == told["prompt"]
        compare(version, "packed" if packed else "video", model, told["prompt"], inputs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(version)`: a whole checkpoint, with Python files that raise when anybody runs them."""
    made: dict[str, Path] = {}

    def once(version: str) -> Path:
        if version not in made:
            folder = tmp_path_factory.mktemp("tiny") / version
            cases.checkpoint(version, folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model, _ = build(folder, config, dtype=torch.bfloat16)
            stored = {n: w.bfloat16() for n, w in weights(model).items()}
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
            ends = {"eos_token_id": config["eos_token_id"], "transformers_version": "4.40.0"}
            (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
            parts = ("configuration_minicpm", "modeling_minicpmv", "processing_minicpmv", "tokenization_minicpmv_fast")
            for part in (*parts, "image_processing_minicpmv"):
                (folder / f"{part}.py").write_text('raise SystemExit("remote code was run")\n', encoding="utf-8")
            made[version] = folder
        return made[version]

    return once


def quantized(checkpoint: Path, out: Path, method: str = "awq") -> Path:
    recipe = Recipe(name="tiny", model=str(checkpoint), method=method, samples=8)
    return make(recipe, fetch(str(checkpoint)), out, samples=drawn(8), calibration="drawn").path


@pytest.mark.parametrize(("release", "method"), [("2.5", "gptq"), ("2.6", "awq"), ("4.0", "awq"), ("4.5", "awq")])
def test_quantized_whole_and_no_remote_code_runs(
    tiny: Callable[[str], Path], tmp_path: Path, release: str, method: str
) -> None:
    base = tiny(release)
    artifact = quantized(base, tmp_path / "out", method)
    opened = open_artifact(artifact, verify=True)
    text = {f"{m}_proj" for m in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")}
    text |= {f"mlp.{m}_proj" for m in ("gate", "up", "down")}
    packed = packed_linears(open_source(artifact).metas, opened.format)
    assert packed == {f"llm.model.layers.{i}.{n}" for i in range(2) for n in text} == set(opened.manifest["quantized"])
    assert set(open_source(base).metas) == set(view(artifact).metas)
    for path in base.iterdir():
        mended = release == "2.5" and path.name == "tokenizer_config.json"
        if not mended and (path.suffix == ".py" or "token" in path.name or "preprocessor" in path.name):
            assert (artifact / path.name).read_bytes() == path.read_bytes()
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == json.loads((base / "config.json").read_text(encoding="utf-8"))["auto_map"]
    if method == "awq":  # by substring of a name, as vLLM and SGLang read it: everything beside the layers, no layer
        left = config["quantization_config"]["modules_to_not_convert"]
        beside = {n.removesuffix(".weight") for n in open_source(base).metas if ".layers." not in n or "vpm" in n}
        linears = {n for n in beside if n.startswith(("vpm.encoder", "resampler.kv", "resampler.attn", "llm.lm_head"))}
        assert all(any(entry in name for entry in left) for name in linears)
        assert not [name for name in packed if any(entry in name for entry in left)]


def test_checked_against_its_base(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Both walked, pictures shown and hidden, and both answer: by the artifact's own files, its code not run."""
    base = tiny("2.5")
    artifact = open_artifact(quantized(base, tmp_path / "out"))
    found = check(artifact, base, samples=drawn(12)[8:], limits=Limits(), max_new_tokens=4).measures
    assert (found["coverage"], found["unintended"], found["finite"]) == (1, 0, 1)
    assert found["mean_kl"] < 0.05
    assert found["image_effect_fp16"] > 10 * found["mean_kl"]  # the pictures are seen


@pytest.mark.parametrize("release", ["2.5", "2.6"])
def test_where_pictures_stand_and_where_the_model_speaks(tiny: Callable[[str], Path], release: str) -> None:
    """2.5's template opens a turn behind the answer, and its generation config lacks the token that ends one."""
    skeleton = skeletons.build(tiny(release))
    sample = Sample(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "图里有什么？"}]},
         {"role": "assistant", "content": "猫"}],
        (cases.picture("two"),),
    )  # fmt: skip
    inputs = next(micro_batches(skeleton, [sample], tokens=4096))
    ids = inputs["input_ids"]
    queries = 24 if release == "2.5" else 16
    assert int(media_mask(skeleton, ids).sum()) == 3 * queries
    spoken = ids[0, 1:][answer_mask(skeleton, sample, ids[0:1])[:-1]]
    end = "<|eot_id|>" if release == "2.5" else "<|im_end|>"
    assert skeleton.processor.tokenizer.decode(spoken) == f"猫{end}"


def test_several_samples_in_one_pass_are_each_as_alone(opened: Opened) -> None:
    model, processor = opened
    prompt = processor.apply_chat_template(cases.messages("wide"), add_generation_prompt=True)
    made = [processor([prompt], images=[cases.picture("wide", number=i)]) for i in range(4)]  # 20 slices: two batches
    together = model.hidden(**{k: torch.cat([m[k] for m in made]) for k in made[0]}).last_hidden_state
    alone = torch.cat([model.hidden(**m).last_hidden_state for m in made])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_generate_goes_on_from_the_picture(opened: Opened) -> None:
    model, processor = opened
    prompt = processor.apply_chat_template(cases.messages("small"), add_generation_prompt=True)
    inputs = processor([prompt], images=[cases.picture("small")])
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(out.shape[1] - ids.shape[1]):
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, model(**longer).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_eyes_and_words_of_minicpm_o(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """MiniCPM-o 2.6 is V 2.6 with ears and a voice: they are carried along as they are."""
    base, plain = tmp_path / "o", tiny("2.6")
    base.mkdir()
    for path in plain.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((plain / "config.json").read_text(encoding="utf-8")), "model_type": "minicpmo"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    extra = {n: torch.randn(128, 128).bfloat16() for n in ("apm.layers.0.fc1.weight", "tts.head_text.weight")}
    stored = {**load_file(plain / "model.safetensors"), **extra}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    source = view(quantized(base, tmp_path / "out"))
    assert all(torch.equal(source.get(n), value) for n, value in extra.items())


PUBLISHED = {  # config.json's sizes, and of the published index: its names' sha256, and how many numbers there are
    "2.5": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "query_num": 96},
        "6cdfadbe3d741de329830a63f11389fb61d1f8394f79091e408b349f3a132930", 34148369344 // 4,
    ),
    "4.5": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
         "num_key_value_heads": 8, "vocab_size": 151748, "query_num": 64, "head_dim": 128, "version": 4.5},
        "8ccff7b8ee0b0ef6e04b87da21e447b95f995989d2b307fbaa7a6eb77735bfc8", 17391790560 // 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", PUBLISHED)
def test_names_and_sizes_of_the_published_checkpoints(release: str) -> None:
    sizes, names, numbers = PUBLISHED[release]
    with init_empty_weights(include_buffers=False):
        model = build_model({**sizes, "model_type": "minicpmv", "drop_vision_last_layer": False}, image_token_id=0)
    found = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(found.values()) == numbers
    assert hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() == names


def test_slices_cover_the_picture() -> None:
    rule = Slicing()
    assert best_grid((448, 448), rule) is None
    assert best_grid((1344, 1344), rule) == (3, 3)
    assert best_grid((2688, 300), rule, most=1) is None
    overview, *cut = slices(cases.picture("nine"), rule)
    assert (overview.size, len(cut)) == ((448, 448), 9)
    seen, grid = patches(cut[0], rule)
    assert (tuple(seen.shape), grid) == ((1024, 3, 14, 14), (32, 32))


def changed(folder: Path, to: Path, file: str, **values: Any) -> tuple[Path, dict[str, Any]]:
    """A copy of the small files with some values of one of them changed; and its config."""
    to.mkdir()
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8")) | (values if path.name == file else {})
        (to / path.name).write_text(json.dumps(content), encoding="utf-8")
    return to, json.loads((to / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"version": 3.0}, r"MiniCPM-V 3\.0 is not known; known are 2\.5, 2\.6, 4\.0, 4\.5"),
        ("config.json", {"version": None, "hidden_size": 2304}, r"MiniCPM-V 2\.0 is not known"),
        ("config.json", {"model_type": "minicpmo", "version": 4.5}, r"MiniCPM-o 4\.5 is not known; known are 2\.6"),
        ("config.json", {"scale_emb": 12}, "scale_emb is 12"),
        ("config.json", {"query_num": 64}, "image_feature_size is 16, but config.json has query_num 64"),
        ("preprocessor_config.json", {"slice_mode": False}, "slice_mode is false"),
    ],
)
def test_what_cannot_be_taken_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    folder, config = changed(tiny("2.6"), tmp_path / "changed", file, **values)
    with pytest.raises(ValueError, match=message):
        build(folder, config, dtype=torch.float32)


def test_a_missing_file_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, config = changed(tiny("2.6"), tmp_path / "changed", "")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer\.json: missing"):
        build_processor(folder, config)


def test_another_tokenizer_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    words = [t for t in cases.tokenizer()["added_tokens"] if t["content"] != "<slice>"]
    folder, config = changed(tiny("2.6"), tmp_path / "changed", "tokenizer.json", added_tokens=words)
    with pytest.raises(ValueError, match=r"its tokenizer\.json lacks <slice>"):
        build_processor(folder, config)


def test_places_and_pictures_must_agree(opened: Opened) -> None:
    model, processor = opened
    prompt = processor.apply_chat_template(cases.messages("pair"))
    with pytest.raises(ValueError, match="the prompt has 2 places for images and 0 for videos, but 1 and 0 came"):
        processor([prompt], images=[cases.picture("small")])
    with pytest.raises(ValueError, match="2 prompts at once"):
        processor([prompt, prompt])
    said = processor(["<unk>" + cases.messages("small")[0]["content"][1]["text"]])
    with pytest.raises(ValueError, match=r"1 places for (24|16) image vectors"):
        model(**said, pixel_values=torch.zeros(1, 3, 14, 14), tgt_sizes=torch.tensor([[1, 1]]))


def test_two_fives_tokenizer_is_mended_where_it_is_carried(tmp_path: Path) -> None:
    """transformers 5 builds the checkpoint's own class anew and loses the pre-tokenizer; the plain class does not."""
    cases.checkpoint("2.5", tmp_path / "2.5")
    cases.checkpoint("2.6", tmp_path / "2.6")
    (note,) = mend_words(tmp_path / "2.5")
    assert "PreTrainedTokenizerFast" in note
    said = json.loads((tmp_path / "2.5" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in said
    assert said["chat_template"] == cases.HEADERS
    assert mend_words(tmp_path / "2.5") == mend_words(tmp_path / "2.6") == []
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "2.5")
    assert words.decode(words.encode("red and blue", add_special_tokens=False)) == "red and blue"
