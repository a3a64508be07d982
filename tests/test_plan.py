"""The planner: bytes counted and estimated, against sums by hand for three shapes; what it says where nothing fits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Run, one_line

from mmq.export.defaults import DEFAULTS
from mmq.export.subject import read_subject
from mmq.serve import overhead
from mmq.serve.bill import Ask, Model, parts_of, read_model
from mmq.serve.cards import CARDS, card_named
from mmq.serve.machine import GIB, this_machine
from mmq.serve.pictures import read_vision
from mmq.serve.plan_flags import asked_in
from mmq.serve.plan_table import decode_bound, facts, rows
from mmq.serve.planner import Plan, planned
from mmq.serve.running import Server
from mmq.serve.shape import Layers, cached, kv_token_bytes, sequence_bytes, token_bytes, tokens_in
from mmq.serve.shares import stages
from mmq.serve.weights import part_of, read_weights, rounding

CARD = card_named("4090").gpu
QWEN2 = {  # the decoder of Qwen2.5-VL-7B and of MiniCPM-V 2.6
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
QWEN = QWEN2 | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
MINICPM = QWEN2 | {
    "architectures": ["MiniCPMV"],
    "model_type": "minicpmv",
    "vocab_size": 151666,
    "max_position_embeddings": 32768,
    "query_num": 64,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


def decoder(at: str, *, head: str, vocabulary: int) -> dict[str, list[int]]:
    found = {f"{at}embed_tokens.weight": [vocabulary, 3584], f"{at}norm.weight": [3584], head: [vocabulary, 3584]}
    for n in range(28):
        layer = f"{at}layers.{n}."
        for name, width in (("q", 3584), ("k", 512), ("v", 512)):
            found[f"{layer}self_attn.{name}_proj.weight"] = [width, 3584]
            found[f"{layer}self_attn.{name}_proj.bias"] = [width]
        found[f"{layer}self_attn.o_proj.weight"] = [3584, 3584]
        found |= {f"{layer}mlp.{name}_proj.weight": [18944, 3584] for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = [3584, 18944]
        found |= {f"{layer}{name}_layernorm.weight": [3584] for name in ("input", "post_attention")}
    return found


def qwen_tensors() -> dict[str, list[int]]:
    found = decoder("model.", head="lm_head.weight", vocabulary=152064)
    found["visual.patch_embed.proj.weight"] = [1280, 3, 2, 14, 14]
    for n in range(32):
        block = f"visual.blocks.{n}."
        found |= {f"{block}norm{i}.weight": [1280] for i in (1, 2)}
        for name, out, into in (
            ("attn.qkv", 3840, 1280),
            ("attn.proj", 1280, 1280),
            ("mlp.gate_proj", 3420, 1280),
            ("mlp.up_proj", 3420, 1280),
            ("mlp.down_proj", 1280, 3420),
        ):
            found |= {f"{block}{name}.weight": [out, into], f"{block}{name}.bias": [out]}
    found["visual.merger.ln_q.weight"] = [1280]
    for name, out in (("0", 5120), ("2", 3584)):
        found |= {f"visual.merger.mlp.{name}.weight": [out, 5120], f"visual.merger.mlp.{name}.bias": [out]}
    return found


def minicpm_tensors() -> dict[str, list[int]]:
    found = decoder("llm.model.", head="llm.lm_head.weight", vocabulary=151666)
    found |= {"vpm.embeddings.patch_embedding.weight": [1152, 3, 14, 14], "vpm.post_layernorm.weight": [1152]}
    found |= {f"vpm.encoder.layers.{n}.mlp.fc1.weight": [4304, 1152] for n in range(27)}
    found |= {"resampler.kv_proj.weight": [3584, 1152], "resampler.query": [64, 3584]}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(config, tensors)`: a checkpoint of headers alone; the weights are a hole in a sparse file."""

    def make(config: Mapping[str, Any], tensors: Mapping[str, list[int]], **files: Any) -> Path:
        place = tmp_path / "checkpoint"
        place.mkdir(exist_ok=True)
        header, end = {}, 0
        for name, shape in tensors.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (place / "model.safetensors").open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
        for name, content in {"config": config, **files}.items():
            (place / f"{name}.json").write_text(json.dumps(content))
        return place

    return make


@pytest.fixture
def qwen(folder: Callable[..., Path]) -> Model:
    """Qwen2.5-VL-7B as it is published, by its shapes."""
    return read_model(folder(QWEN, qwen_tensors(), preprocessor_config={"max_pixels": 12845056}))


@pytest.fixture
def minicpm(folder: Callable[..., Path]) -> Model:
    """MiniCPM-V 2.6's decoder and the larger part of its tower."""
    return read_model(folder(MINICPM, minicpm_tensors()))


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.size for part in plan.parts}


def flags(plan: Plan) -> dict[str, str | None]:
    assert all(flag.why for flag in plan.flags)
    return {flag.name: flag.value for flag in plan.flags}


# three shapes, by hand


def test_qwen_2_5_vl_7b(qwen: Model) -> None:
    # q and o, k and v with their biases, three of the MLP, two norms
    layer = 2 * 3584 * 3584 + 3584 + 2 * (512 * 3584 + 512) + 3 * 3584 * 18944 + 2 * 3584
    assert qwen.weights.parts["decoder"] == 2 * 28 * layer == 13_051_236_352
    assert qwen.weights.parts["embeddings"] == qwen.weights.parts["head"] == 2 * 152064 * 3584
    assert qwen.weights.parts["projector"] == 2 * (1280 + 5120 * 5120 + 5120 + 3584 * 5120 + 3584)
    assert qwen.weights.total == 16_584_333_312  # total_size in the published checkpoint's index
    plan = planned(qwen, CARD, Ask(images=2))
    assert plan.kv_token == 28 * 2 * 4 * 128 * 2
    # 12,845,056 pixels are 65,536 patches of 14 x 14, four to a token
    assert plan.image_tokens == 16384
    bill = sizes(plan)
    # a patch: 3 x 2 x 14 x 14 pixels, what came, residual and norm, then the larger of 8 widths and 4 x 3420 (3 and
    # the activation's own, in plain torch where the decoder is compiled); two bytes each
    assert bill["vision tower at work"] == 65536 * 2 * (1176 + 3 * 1280 + 4 * 3420) + overhead.BESIDE
    features = 16384 * 3584 * 2  # kept while the others run
    assert bill["decoder at work"] == 2048 * 2 * (3 * 3584 + 3 * 18944) + features
    assert bill["sampling"] == 256 * 152064 * 24 + features
    assert bill["CUDA graphs"] == 2**28 + 86 * 2**21  # 51 in pieces up to 512 tokens, 35 whole up to 256
    counted = sum(part.size for part in plan.parts if part.counted)
    assert [part.name for part in plan.parts if not part.counted] == ["decoder at work", "sampling"]
    assert plan.cache == int(0.9 * 24 * GIB) - counted
    assert plan.tokens == plan.cache // 57344 // 16 * 16
    assert plan.context == plan.max_context == plan.tokens // 256 * 256
    assert (plan.max_batch, plan.images) == (1, (plan.context - 256) // 16384)
    assert not plan.problem
    assert flags(plan) == {
        "--max-model-len": str(plan.context),
        "--gpu-memory-utilization": "0.90",
        "--limit-mm-per-prompt": '{"image":2,"video":0}',
    }


def test_minicpm_v_2_6(minicpm: Model) -> None:
    parts = minicpm.weights.parts
    assert parts["embeddings"] == parts["head"] == 2 * 151666 * 3584
    assert parts["vision tower"] == 2 * (1152 * 3 * 14 * 14 + 1152 + 27 * 4304 * 1152)
    assert parts["projector"] == 2 * (3584 * 1152 + 64 * 3584)
    plan = planned(minicpm, CARD, Ask(context=4096, concurrency=4, images=3))
    assert plan.kv_token == 57344
    assert plan.image_tokens == 640  # nine slices and the whole, 64 each
    bill = sizes(plan)
    # 2048 batched tokens hold three such pictures: 3 x 10 slices of 32 x 32 patches, each made as wide as the decoder
    assert bill["vision tower at work"] == 3 * 10240 * 2 * (1152 + 7 * 3584) + overhead.BESIDE
    assert bill["sampling"] == 4 * 151666 * 24 + 3 * 640 * 3584 * 2
    assert bill["CUDA graphs"] == 2**28 + (4 + 3) * 2**21  # 1, 2, 4, 8 in pieces; 1, 2, 4 whole
    assert plan.images == (4096 - 256) // 640
    assert plan.max_batch == plan.tokens // 4096 >= 4
    assert plan.max_context == min(32768, plan.tokens // 4 // 256 * 256)
    assert not plan.problem
    assert flags(plan)["--max-num-seqs"] == "4"
    assert flags(plan)["--limit-mm-per-prompt"] == '{"image":3}'  # no video is counted for this family


def test_pebble(pebble: Path) -> None:
    model = read_model(pebble)
    assert model.weights.parts["embeddings"] == 2 * 2048 * 256
    assert model.weights.parts["head"] == 0  # tied
    plan = planned(model, CARD, Ask())
    assert plan.kv_token == 5 * 2 * 2 * 64 * 2
    assert plan.image_tokens == 50176 // 28**2
    # a video of 14 frames in 7 steps of 64 tokens; 2048 batched tokens hold 4 of them
    assert sizes(plan)["sampling"] == 256 * 2048 * 24 + 4 * 7 * 64 * 256 * 2
    assert plan.context == plan.max_context == 4096
    assert flags(plan)["--limit-mm-per-prompt"] == '{"image":8}'
    assert "the model's whole context fits" in {flag.why for flag in plan.flags}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(bool(this_machine().gpus), reason="the cache's size is set in bytes on a CPU alone")
def test_the_engines_own_count_of_tokens(served: Server, pebble: Path) -> None:
    """vLLM's log on a CPU: the cache given in GiB, and how many tokens it says that it holds."""
    log = served.log_path.read_text(encoding="utf-8", errors="replace")
    said = next(line for line in log.splitlines() if "KV cache size:" in line and "tokens" in line)
    tokens = int(said.split("KV cache size:")[1].split("tokens")[0].replace(",", ""))
    space = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * GIB
    assert tokens == pytest.approx(tokens_in(space, read_model(pebble).shape.kv_token), rel=0.001)


ASK_VLLM_PAGES = """
import json, sys
from types import SimpleNamespace as N
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
asked = json.loads(sys.argv[1])
for full, sliding, window, batched, context, state, block in asked:
    same = {"block_size": block, "dtype": torch.bfloat16}
    spec = {f"f{n}": FullAttentionSpec(num_kv_heads=full[1], head_size=full[2], **same) for n in range(full[0])}
    for n in range(sliding[0]):
        heads, width = sliding[1:]
        spec[f"s{n}"] = SlidingWindowSpec(num_kv_heads=heads, head_size=width, sliding_window=window, **same)
    for n in range(state[0]):
        page, shapes = spec["f0"].page_size_bytes, ((state[1],),)
        more = {"page_size_padded": page, "mamba_cache_mode": "align", "dtypes": (torch.int8,)}
        spec[f"m{n}"] = MambaSpec(block_size=block, shapes=shapes, **more)
    config = N(
        scheduler_config=N(disable_hybrid_kv_cache_manager=False),
        max_in_flight_tokens=2 * batched,
        model_config=N(max_model_len=context),
        parallel_config=N(decode_context_parallel_size=1),
        cache_config=N(get_resolved_kv_cache_layout=lambda: N(is_block_outermost=False), mamba_cache_mode="align"),
        speculative_config=None,
    )
    groups = kv_cache_utils.get_kv_cache_groups(config, spec)
    print(kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups))
"""
NO_STATE = ((0, 0), 16)
# layers, key-value heads and their width, of those that see all and of those that see a window of it; the window, the
# batch, the context; layers with a state and its bytes; the tokens of a page
UNEVEN = [
    ((10, 16, 128), (52, 16, 128), 1024, 2048, 131072, *NO_STATE),  # Gemma 3 27B
    ((5, 4, 256), (29, 4, 256), 1024, 8192, 8192, *NO_STATE),  # 4B
    ((13, 4, 256), (13, 4, 256), 4096, 2048, 8192, *NO_STATE),  # Gemma 2 2B
    ((7, 1, 512), (28, 2, 256), 512, 2048, 32768, *NO_STATE),  # widths that differ, as in Gemma 4
    ((5, 8, 512), (23, 8, 256), 512, 2048, 5000, *NO_STATE),
    ((8, 4, 256), (0, 0, 0), 0, 2048, 32768, (24, 2146304), 528),  # a gated delta net in three of four layers
]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_engines_own_bytes_of_a_sequence() -> None:
    asking = [sys.executable, "-c", ASK_VLLM_PAGES, json.dumps(UNEVEN)]
    done = subprocess.run(asking, capture_output=True, text=True, check=True, timeout=300)
    said = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    found = []
    for full, sliding, window, batched, context, state, _ in UNEVEN:
        kinds = [Layers(full[0], 4 * full[1] * full[2]), Layers(sliding[0], 4 * sliding[1] * sliding[2], window)]
        kinds.append(Layers(state[0], 0, state=state[1]))
        found.append(sequence_bytes([kind for kind in kinds if kind.count], context, flying=2 * batched))
    assert found == said


def test_layers_with_a_cache() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    assert cached({"text_config": gemma}) == (Layers(29, 4096, 1024), Layers(5, 4096))
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    fourth = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 512, "hidden_size": 2048}
    fourth |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "attention_k_eq_v": True}
    wide = (Layers(2, 4096, 512), Layers(2, 2 * 2 * 512 * 2))
    published = fourth | {"global_head_dim": 512, "num_global_key_value_heads": 2}
    own = {"head_dim": 512, "num_key_value_heads": 2}
    assert cached(published) == cached(fourth | {"per_layer_config": {"01": own, "03": own}}) == wide
    assert token_bytes(cached(published, tp=4)) == 2 * 1024 + 2 * 2048
    assert cached(published | {"num_kv_shared_layers": 2}) == (Layers(1, 4096, 512), Layers(1, 4096))
    assert cached({"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}) == (Layers(3, 1152),)
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    delta = {"num_hidden_layers": 4, "layer_types": kinds, "num_attention_heads": 16, "num_key_value_heads": 4}
    delta |= {"head_dim": 256, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128}
    delta |= {"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32"}
    assert cached(delta) == (Layers(1, 4096), Layers(3, 0, state=32 * 128 * 128 * 4 + 3 * 8192 * 2))
    assert cached(delta, tp=2)[1].state == cached(delta)[1].state / 2


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_what_configs_leave_out_is_as_transformers_has_it(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    config, row = CONFIG_MAPPING[kind](), dict(DEFAULTS[kind])
    every = row.pop("sliding_window_pattern", None)
    assert {key: getattr(config, key) for key in row} == row
    left = {"num_key_value_heads": config.num_attention_heads, "head_dim": None}
    width = config.hidden_size // config.num_attention_heads
    assert all(getattr(config, key, None) in (value, width) for key, value in left.items() if key not in row)
    if every:
        full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == [n for n in range(config.num_hidden_layers) if (n + 1) % every == 0]


def test_configs_as_they_are_published(folder: Callable[..., Path]) -> None:
    """Gemma 3 27B's tells neither context nor vocabulary, LLaVA-1.5's of its decoder little else."""
    tower = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
    tower |= {"num_hidden_layers": 27, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = {"model_type": "gemma3_text", "hidden_size": 5376, "head_dim": 128, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 16, "num_hidden_layers": 62, "intermediate_size": 21504, "sliding_window": 1024}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256}
    config |= {"text_config": text, "vision_config": tower}
    tensors = {"language_model.model.layers.0.mlp.gate_proj.weight": [5376, 1024 * 1536]}  # 15.8 GiB, as int4 is
    model = read_model(folder(config, tensors))
    plan = planned(model, CARD, Ask(concurrency=1, images=1))
    assert not plan.problem
    assert plan.max_context > 16384  # with all layers in full it is a fifth
    assert plan.tokens >= plan.context
    assert plan.kv_token < token_bytes(cached(config)) / 2
    far = planned(model, card_named("h100").gpu, Ask(context=131072, images=1))
    assert far.max_batch == far.tokens // 131072 >= 2
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    llava = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    llava["vision_config"] = tower | {"image_size": 336}
    assert read_model(folder(llava, {"language_model.lm_head.weight": [32064, 4096]})).shape.kv_token == 524288


def test_what_vllm_leaves_in_the_file(folder: Callable[..., Path]) -> None:
    tensors = {"model.layers.0.mlp.gate_proj.weight": [64, 64], "lm_head.weight": [100, 64]}
    more = {"mtp.layers.0.mlp.gate_proj.weight": [64, 64], "model.layers.28.mlp.gate_proj.weight": [64, 64]}

    def parts(**changes: Any) -> Mapping[str, int]:
        return read_weights(read_subject(folder(QWEN2 | changes, tensors | more))).parts

    assert (parts()["head"], parts()["decoder"]) == (12800, 2 * 8192)
    found = parts(tie_word_embeddings=True, num_nextn_predict_layers=1)
    assert (found["head"], found["decoder"]) == (0, 8192)


def test_nf4s_scales_are_unpacked(artifact: Callable[..., Path]) -> None:
    """vLLM makes float32 of the bytes that the scales are stored in: a sixteenth of a byte a weight."""
    subject = read_subject(artifact("bnb"))
    bare = {name.removesuffix(".absmax") for name in subject.tensors if name.endswith(".weight.absmax")}
    packed = sum(math.prod(subject.tensors[name].shape) for name in bare)
    plain = sum(2 * math.prod(t.shape) for t in subject.tensors.values() if t.dtype in ("BF16", "F16"))
    assert packed > 1 << 20
    assert read_weights(subject).total == pytest.approx(plain + packed * 9 / 8, rel=0.005)


ASK_VLLM = """
import json, sys
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
info = MULTIMODAL_REGISTRY.get_processing_info(ModelConfig(model=sys.argv[1], max_model_len=int(sys.argv[2])))
counts = {"image": 1, "video": 1}
print(json.dumps([dict(info.get_mm_max_tokens_per_item(seq_len=int(n), mm_counts=counts)) for n in sys.argv[2:]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_engines_own_largest_picture_and_video(pebble: Path, tmp_path: Path) -> None:
    """vLLM asked, without weights, for pebble with the pixels of a published Qwen2.5-VL."""
    place = tmp_path / "large"
    shutil.copytree(pebble, place)
    for name, key, value in (
        ("config", "text_config", {"max_position_embeddings": 128000}),
        ("processor_config", "image_processor", {"size": {"longest_edge": 12845056, "shortest_edge": 3136}}),
    ):
        content = json.loads((place / f"{name}.json").read_text())
        content[key] |= value
        (place / f"{name}.json").write_text(json.dumps(content))
    vision = read_model(place).vision
    assert vision is not None
    lengths = (128000, 65536, 32768, 4096)
    command = [sys.executable, "-c", ASK_VLLM, str(place), *map(str, lengths)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said == [{"image": vision.tokens, "video": vision.video_tokens(n)} for n in lengths]
    assert said[0] == {"image": 16384, "video": 114688}


# what an ask changes


def test_a_long_video_takes_from_the_cache(qwen: Model) -> None:
    """Seven steps in time of 16,384 tokens are what vLLM would profile with where the context allows."""
    large = card_named("h100").gpu
    at = {n: {p.name: p.size for p in parts_of(qwen, large, Ask(), n)} for n in (16384, 65536, 128000)}
    tower = [bill["vision tower at work"] for bill in at.values()]
    assert [(size - overhead.BESIDE) // (tower[0] - overhead.BESIDE) for size in tower] == [1, 4, 7]
    assert sizes(planned(qwen, large, Ask(images=1)))["vision tower at work"] == tower[0]


def test_without_graphs_there_is_more_cache(qwen: Model) -> None:
    plain, eager = (Ask(images=0, sequences=256, eager=eager) for eager in (False, True))
    long = planned(qwen, CARD, eager).max_context
    assert planned(qwen, CARD, plain).max_context < long
    assert "--enforce-eager" in flags(planned(qwen, CARD, eager))
    found = planned(qwen, CARD, replace(plain, context=long))
    assert found.problem
    assert any(line.startswith("no CUDA graphs (--enforce-eager): ") for line in found.changes)
    assert not planned(qwen, CARD, replace(eager, context=long)).problem


def test_fp8_and_two_cards(qwen: Model) -> None:
    one = planned(qwen, CARD, Ask(context=2048, images=0))
    half = planned(qwen, CARD, Ask(context=2048, images=0, kv_dtype="fp8"))
    assert half.kv_token * 2 == one.kv_token
    assert half.tokens == pytest.approx(2 * one.tokens, abs=32)
    assert flags(half)["--kv-cache-dtype"] == "fp8"
    two = planned(qwen, CARD, Ask(context=2048, images=0, tp=2))
    assert two.kv_token * 2 == one.kv_token
    assert sizes(two)["weights: decoder"] * 2 == sizes(one)["weights: decoder"]
    assert sizes(two)["weights: projector"] == sizes(one)["weights: projector"]
    assert sizes(two)["NCCL"] == overhead.NCCL
    assert flags(two)["--tensor-parallel-size"] == "2"
    assert kv_token_bytes(QWEN, tp=8) == 28 * 2 * 1 * 128 * 2  # four heads over eight cards: copied
    with pytest.raises(ValueError, match="28 attention heads cannot be dealt to 3 GPUs"):
        planned(qwen, CARD, Ask(tp=3))


def test_stages_and_replicas(qwen: Model) -> None:
    """Of a pipeline the fullest stage is planned for; replicas of a dense model hold everything again."""
    assert stages(28, 2) == (14, 14)
    assert stages(28, 3) == (9, 10, 9)  # what is over goes to the middle, as in vLLM's get_pp_indices
    assert stages(7, 4) == (2, 2, 2, 1)
    one = planned(qwen, CARD, Ask(context=2048, images=0))
    piped = planned(qwen, CARD, Ask(context=2048, images=0, pp=3))
    assert sizes(piped)["weights: decoder"] == math.ceil(sizes(one)["weights: decoder"] * 10 / 28)
    assert piped.kv_token == one.kv_token * 10 // 28
    assert [p.counted for p in piped.parts if p.name in ("weights: embeddings", "weights: head")] == [True, False]
    assert flags(piped)["--pipeline-parallel-size"] == "3"
    twice = planned(qwen, CARD, Ask(context=2048, images=0, concurrency=9, dp=2))
    assert sizes(twice)["weights: decoder"] == sizes(one)["weights: decoder"]
    assert "NCCL" not in sizes(twice)
    assert (flags(twice)["--data-parallel-size"], flags(twice)["--max-num-seqs"]) == ("2", "5")
    assert (facts(twice)["card"]["count"], facts(twice)["replicas"]) == (2, 2)
    with pytest.raises(ValueError, match="28 layers cannot be dealt to 29 stages of a pipeline; use a smaller --pp"):
        planned(qwen, CARD, Ask(pp=29))


def test_a_mixtures_experts_are_dealt_over_the_replicas_too(folder: Callable[..., Path]) -> None:
    config = QWEN2 | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 1000}
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    tensors = {"model.embed_tokens.weight": [1000, 3584], "model.layers.0.self_attn.q_proj.weight": [3584, 3584]}
    tensors |= {f"model.layers.0.mlp.experts.{n}.up_proj.weight": [64, 3584] for n in range(4)}
    model = read_model(folder(config, tensors))
    assert model.weights.experts == 4 * 64 * 3584 * 2
    decoder = [sizes(planned(model, CARD, Ask(tp=2, dp=n)))["weights: decoder"] for n in (1, 2)]
    assert decoder[0] - decoder[1] == model.weights.experts // 4


def test_more_asked_never_fits_better(qwen: Model) -> None:
    for images in (1, None):
        found = [planned(qwen, CARD, Ask(concurrency=n, images=images)).max_context for n in (1, 2, 4, 8)]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]


def test_where_nothing_fits_the_smallest_change_is_told(qwen: Model) -> None:
    small = card_named("4080").gpu
    plan = planned(qwen, small, Ask(images=1))
    assert "15.57 GiB of weights leave room for 0 tokens" in plan.problem
    assert any(line.startswith("int4 weights") for line in plan.changes)
    assert any(line.startswith("two cards (--tp 2)") for line in plan.changes)
    assert not any(line.startswith("an FP8 cache (--kv-cache-dtype fp8):") for line in plan.changes)
    many = planned(qwen, CARD, Ask(context=32768, images=3))
    assert "3 pictures of 16384 tokens" in many.problem
    assert many.changes[0].startswith("fewer pictures (--images 1)")
    assert any(line.startswith(f"smaller pictures (--pixels {1280 * 28 * 28})") for line in many.changes)
    # what is told is what happens
    smaller = planned(qwen, CARD, Ask(context=32768, images=3, pixels=1280 * 28 * 28))
    assert (smaller.problem, smaller.image_tokens) == ("", 1280)
    assert flags(smaller)["--mm-processor-kwargs"] == '{"max_pixels":1003520}'
    none = planned(qwen, replace(CARD, memory=2 * GIB, free=2 * GIB), Ask())
    assert none.changes == ("a smaller model or a larger card; none of the smaller changes is enough",)


def test_an_int4_estimate_is_what_an_artifact_weighs(pebble: Path, artifact: Callable[..., Path]) -> None:
    assert read_model(pebble).weights.as_int4.total == pytest.approx(
        read_model(artifact("awq")).weights.total, rel=0.01
    )


def test_a_busy_card_and_an_unknown_family(pebble: Path) -> None:
    model = read_model(pebble)
    busy = planned(model, replace(CARD, free=20 * GIB), Ask())
    assert busy.share == 0.80  # (20 - 0.625) / 24
    assert busy.flags[1].why == "4.0 GiB of the card is in use by others"
    strange = replace(model, vision=None)
    part = next(p for p in planned(strange, CARD, Ask()).parts if p.name == "vision tower at work")
    assert part.size == GIB
    assert "not known here: assumed" in part.why
    margin = next(p for p in planned(model, CARD, Ask()).parts if p.name == "margin")
    assert margin.why == "0.5% of the card: assumed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0; it must be at least 1"),
        ({"images": -1}, "images is -1; it must be at least 0"),
        ({"kv_dtype": "int4"}, "auto and fp8 are known"),
        ({"context": 5000}, "made for 4096 tokens of context, 5000"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str, pebble: Path) -> None:
    with pytest.raises(ValueError, match=message):
        planned(read_model(pebble), CARD, Ask(**options))


def test_the_longest_video_of_other_families(folder: Callable[..., Path], minicpm: Model) -> None:
    assert minicpm.vision is not None
    assert minicpm.vision.video_tokens(32768) == 0  # a config without a version is 2.5's
    new = read_vision(folder(MINICPM | {"version": 2.6}, {}), MINICPM | {"version": 2.6})
    assert new is not None
    assert [new.video_tokens(n) for n in (32768, 1280, 512)] == [16 * 64, 10 * 64, 64]
    config = QWEN | {"model_type": "qwen3_vl", "vision_config": QWEN["vision_config"] | {"patch_size": 16}}
    place = folder(config, {}, video_preprocessor_config={"size": {"longest_edge": 25165824}})
    third = read_vision(place, config)
    assert third is not None
    assert third.video_tokens(1000) == third.video_tokens(10**6) == 25165824 // 2 // 32**2
    tower = MINICPM["vision_config"] | {"image_size": 448}
    tiled = read_vision(place, {"model_type": "internvl_chat", "max_dynamic_patch": 12, "vision_config": tower})
    assert tiled is not None
    assert tiled.tokens == 13 * 256
    assert tiled.video_tokens(8192) == (8192 - 13 * 256) // 256 * 256


def test_an_engines_flags_are_asked_of_the_plan() -> None:
    extra = ["--max-num-seqs=16", "-tp", "2", "--kv-cache-dtype", "fp8_e4m3", "--enforce-eager"]
    extra += ["--limit-mm-per-prompt", '{"image":2,"video":0}', "--mm-processor-kwargs", '{"max_pixels":501760}']
    found = asked_in(extra, context=4096)
    assert found == Ask(
        context=4096, sequences=16, tp=2, kv_dtype="fp8", eager=True, images=2, video=False, pixels=501760
    )
    assert asked_in(["--limit-mm-per-prompt", "image=2"], context=None) == Ask()
    other = "--no-enforce-eager --max-model-len 32K --max-num-batched-tokens=8k -cc.cudagraph_mode=piecewise"
    other += (
        " --limit-mm-per-prompt.image.count 4 --limit_mm_per_prompt.video=0 --mm-processor-kwargs.max_pixels 501760"
    )
    found = asked_in(other.split(), context=4096)  # vLLM's other spellings of the same
    assert found == Ask(context=32768, batched=8000, graphs="PIECEWISE", images=4, video=False, pixels=501760)
    assert asked_in(["--max-model-len", "-1", "-O0"], context=4096) == Ask(context=4096, eager=True)
    assert asked_in(["-O", "1"], context=None).graphs == asked_in(["-O1"], context=None).graphs == "PIECEWISE"


def test_parts_by_name() -> None:
    names = {
        "model.language_model.layers.3.mlp.up_proj.qweight": "decoder",
        "model.visual.merger.mlp.0.weight": "projector",
        "model.visual.blocks.0.attn.qkv.weight": "vision tower",
        "vision_tower.vision_model.embeddings.position_embedding.weight": "vision tower",
        "mlp1.1.weight": "projector",
        "model.connector.modality_projection.proj.weight": "projector",
        "language_model.lm_head.weight": "head",
        "language_model.output.weight": "head",
        "language_model.model.tok_embeddings.weight": "embeddings",
        "model.norm.weight": "other",
    }
    assert {name: part_of(name) for name in names} == names


def test_cards() -> None:
    a100, h100 = (overhead.default_sequences(CARDS[name].memory, CARDS[name].name) for name in ("a100", "h100"))
    assert (a100, h100) == (256, 1024)  # vLLM asks an A100's name too
    assert overhead.batched_tokens(80 * GIB, "NVIDIA A100-SXM4-80GB") == 2048
    assert card_named("NVIDIA RTX 4090") is CARDS["4090"]
    assert card_named("l4").memory == int(22.5 * GIB)
    with pytest.raises(ValueError, match="no card '9090' in the table; known are 3060, 3090"):
        card_named("9090")


def test_the_table_and_the_facts(qwen: Model) -> None:
    plan = planned(qwen, CARD, Ask(images=1))
    told = facts(plan, bandwidth=CARDS["4090"].bandwidth)
    assert json.loads(json.dumps(told)) == told
    assert told["status"] == overhead.ESTIMATE
    bound = 1008e9 / (13_051_236_352 + 2 * 152064 * 3584)
    assert decode_bound(plan, CARDS["4090"].bandwidth) == pytest.approx(bound)
    text = ["  ".join(row) for row in rows(plan, bandwidth=1008e9)]
    assert any(line.startswith("one sequence  < 71 tok/s") for line in text)
    assert any(line.startswith("--limit-mm-per-prompt") for line in text)


def test_the_command(mmq: Run, pebble: Path) -> None:
    code, out, err = mmq("plan", str(pebble), "--card", "4090", "--context", "2048", "--concurrency", "4")
    assert code == 0, err
    assert "the rest is an estimate" in err
    assert "--max-num-seqs" in out
    code, out, err = mmq("plan", str(pebble), "--vram", "0.5GiB", "--json")
    assert code == 1
    assert json.loads(out)["fits"] is False
    assert "mmq: would fit with a smaller model" in err
    for words, message in (
        (("--card", "4090", "--vram", "24GiB"), "--vram or --card, not both"),
        (("--vram", "24GiB", "--tp", "3"), "cannot be dealt to 3 GPUs; [1, 2, 4] can be used"),
        (("--card", "9090"), "no card '9090'"),
    ):
        code, _, err = mmq("plan", str(pebble), *words)
        assert code == 2
        assert message in one_line(err)
    code, _, err = mmq("plan", "./nowhere", "--card", "4090")
    assert (code, "no recipe, folder or hub id" in err) == (2, True)


def test_a_recipe_is_planned_for_by_its_name(mmq: Run, pebble: Path) -> None:
    """As `serve` would take it: the embedded model needs no download."""
    code, named, err = mmq("plan", "pebble", "--card", "4090", "--json")
    assert code == 0, err
    _, there, _ = mmq("plan", str(pebble), "--card", "4090", "--json")
    one, two = (json.loads(out) for out in (named, there))
    assert one["cache_tokens"] == two["cache_tokens"] > 0


def test_what_tensors_take_beside_their_bytes(qwen: Model) -> None:
    """By hand, from c10's CUDACachingAllocator and the shapes of Qwen2.5-VL-7B as vLLM joins them: 259.05, 129.5, 31.5
    and 24.5 MiB a layer, each in whole blocks of 2 MiB; and four rows of 128 for each of 128,000 positions."""
    mib = 1 << 20
    assert [rounding(int(x * mib)) / mib for x in (9.4, 10.5, 16.7, 17.5, 24.5, 31.5, 32)] == [
        0,
        0,
        0,
        0.5,
        1.5,
        0.5,
        0,
    ]
    layers = sum(rounding(3584 * n * 2) for n in (4608, 3584, 37888, 18944)) * 28
    assert layers / mib == pytest.approx(28 * (0.5 + 1.5 + 1 + 0.5), abs=0.1)
    assert layers <= qwen.weights.rounding < layers + 8 * mib
    rope = {"rope_parameters": {"mrope_section": [16, 24, 24]}}
    assert overhead.rotary_bytes(QWEN | rope) == 4 * 128000 * 128 * 2
    assert overhead.rotary_bytes(QWEN) == 128000 * 128 * 2
