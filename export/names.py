"""What engines call the modules of a checkpoint: data, an ordered list of renamings for each model class.

Skip lists are compared with these names, so a list is right or wrong only through them. Knows no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# linears that engines make one
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
# what the first's name becomes; DeepSeek's ends in _with_mqa in SGLang
INTO = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "w1": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj"}


def shards(linear: str) -> tuple[str, ...]:
    """The linears that engines fuse with `linear`, itself among them; itself alone where nothing is fused."""
    head, _, leaf = linear.rpartition(".")
    return next((tuple(f"{head}.{n}" for n in group) for group in FUSED if leaf in group), (linear,))


def fused_name(module: str) -> str:
    """The name that a linear has once an engine has fused it; its own where it is not."""
    head, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return f"{head}.{INTO[group[0]]}"
    return module


def expert_module(module: str) -> str:
    """The experts of a mixture are one module: the name up to `.experts`; any other name as it is."""
    return re.sub(r"\.experts\.\d+\..*", ".experts", module)


@dataclass(frozen=True)
class Names:
    """Renamings by prefix, of which the first that fits is taken; None drops the name. Replacements of a substring
    come before them. `plain`: how the names of modules begin, as the engine spells them, that the class always
    makes as ordinary linears, whatever the skip list says."""

    prefixes: tuple[tuple[str, str | None], ...] = ()
    substrings: tuple[tuple[str, str], ...] = ()
    plain: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def __call__(self, name: str) -> str | None:
        """The engine's name for the checkpoint's `name`."""
        for old, new in self.substrings:
            name = name.replace(old, new, 1)
        for old, new in self.prefixes:
            if name.startswith(old):
                return None if new is None else new + name.removeprefix(old)
        return name

    def linear(self, name: str) -> str:
        """As for a name, of a module: engines rename its weight. A dropped one keeps its name."""
        spelled = (self(f"{name}.weight") or f"{name}.weight").removesuffix(".weight")
        for old, new in self.modules:
            spelled = spelled.replace(old, new, 1)
        return spelled

    def is_plain(self, name: str) -> bool:
        """Whether the engine makes the checkpoint's linear `name` without looking at any skip list."""
        return self.linear(name).startswith(self.plain)

    def entries(self, entries: Iterable[str]) -> list[str]:
        """A skip list as the engine holds it."""
        return [new for entry in entries if (new := self(entry)) is not None]


SAME = Names()
_HEAD = ("lm_head.", "language_model.lm_head.")
_TEXT = ("model.language_model.", "language_model.model.")
_VISUAL = ("model.visual.", "visual.")
_TOWER = ("model.vision_tower.", "vision_tower.")
_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")

# Model classes without pictures: their names are the checkpoint's own everywhere
TEXT_ONLY = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)

# vLLM 0.32, `hf_to_vllm_mapper` of each model class
QWEN2_VL = Names((_TEXT, _VISUAL, _HEAD, ("model.", "language_model.model.")))
QWEN3_VL = Names((_VISUAL, _HEAD, _TEXT))
_LLAVA = (_TEXT, _TOWER, _PROJECTOR, ("model.image_newline", "image_newline"), _HEAD)
LLAVA = Names(_LLAVA)
LLAVA_PLAIN = Names(_LLAVA, plain=("multi_modal_projector.",))
MISTRAL3 = Names(
    (_TEXT, _TOWER, _PROJECTOR, _HEAD, ("model.", "language_model.model.")),
    plain=("multi_modal_projector.patch_merger.",),
)
MINICPM_V = Names(plain=("resampler.attn.",))
MINICPM_V46 = Names(
    (
        ("model.vision_tower.vit_merger.", "vit_merger."),
        ("model.vision_tower.", "vpm."),
        ("model.vpm.", "vpm."),
        ("model.vit_merger.", "vit_merger."),
        ("model.merger.", "merger."),
        _TEXT,
        _HEAD,
        ("mtp.", None),
    ),
    plain=("vit_merger.linear_", "merger."),
)
PHI3_V = Names(
    (
        ("model.vision_embed_tokens.wte", "embed_tokens"),
        ("model.vision_embed_tokens.", "vision_embed_tokens."),
        _HEAD,
        ("model.", "language_model.model."),
    ),
    plain=("vision_embed_tokens.img_projection.",),
)
GEMMA4 = Names(
    (
        ("model.vision_tower", "vision_tower"),
        ("model.embed_vision", "embed_vision"),
        ("model.audio_tower.", "audio_tower."),
        ("model.embed_audio.", "embed_audio."),
        _TEXT,
        _HEAD,
        ("model", "language_model.model"),
    )
)
GLM4V = Names((_HEAD, _TEXT, _VISUAL), modules=((".attn.qkv", ".attn.qkv_proj"),))
VLLM: Mapping[str, Names] = {
    "Qwen2VLForConditionalGeneration": QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN2_VL,
    "Qwen3VLForConditionalGeneration": QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": QWEN3_VL,
    "InternVLChatModel": Names(plain=("mlp1.",)),
    "InternVLForConditionalGeneration": Names(_LLAVA, plain=("vision_tower.", "multi_modal_projector.")),
    "LlavaForConditionalGeneration": LLAVA,
    "LlavaNextForConditionalGeneration": LLAVA,
    "LlavaOnevisionForConditionalGeneration": LLAVA_PLAIN,
    "Gemma3ForConditionalGeneration": LLAVA,
    "Gemma4ForConditionalGeneration": GEMMA4,
    "Mistral3ForConditionalGeneration": MISTRAL3,
    "Glm4vForConditionalGeneration": GLM4V,
    "Glm4vMoeForConditionalGeneration": GLM4V,
    "Idefics3ForConditionalGeneration": SAME,
    "SmolVLMForConditionalGeneration": SAME,
    "MiniCPMV": MINICPM_V,
    "MiniCPMO": Names((("tts", None),), plain=("resampler.attn.", "audio_projection_layer.", "apm.")),
    "MiniCPMV4_6ForConditionalGeneration": MINICPM_V46,
    "Phi3VForCausalLM": PHI3_V,
    "DeepseekVLV2ForCausalLM": Names((("language.", "language_model."),), plain=("projector.",)),
    "Ovis": SAME,
    **dict.fromkeys(TEXT_ONLY, SAME),
}

# Classes that vLLM 0.32 has not: its stand-in on transformers' own model stops at their processors
NOT_IN_VLLM = frozenset(
    {"DeepseekVLForConditionalGeneration", "DeepseekVLHybridForConditionalGeneration", "Ovis2ForConditionalGeneration"}
)

# SGLang 0.5.23: its modules. Lists of AWQ and GPTQ are compared with these names as they stand; lists of
# compressed-tensors are renamed first, by SGLANG_LISTS.
_QKV = (("attn.qkv", "attn.qkv_proj"),)
QWEN_SGLANG = Names((("model.language_model.", "model."), _VISUAL), _QKV)
LLAVA_SGLANG = Names((_TEXT, _TOWER, _PROJECTOR), plain=("multi_modal_projector.",))
SGLANG: Mapping[str, Names] = {
    "Qwen2VLForConditionalGeneration": QWEN_SGLANG,
    "Qwen2_5_VLForConditionalGeneration": QWEN_SGLANG,
    "Qwen3VLForConditionalGeneration": Names(plain=("model.visual.", "visual.")),
    "Qwen3VLMoeForConditionalGeneration": Names(plain=("model.visual.", "visual.")),
    "InternVLChatModel": Names((("language_model.model.", "model."),), plain=("vision_model.", "mlp1.")),
    "LlavaForConditionalGeneration": LLAVA_SGLANG,
    "Gemma3ForConditionalGeneration": LLAVA_SGLANG,
    "Glm4vForConditionalGeneration": QWEN_SGLANG,
    "MiniCPMV": MINICPM_V,
    **dict.fromkeys(TEXT_ONLY, SAME),
}
_QWEN_LIST = Names((_TEXT, _VISUAL, _HEAD, ("model.", "language_model.model.")), _QKV)
SGLANG_LISTS: Mapping[str, Names] = {
    "Qwen2VLForConditionalGeneration": _QWEN_LIST,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_LIST,
    "Qwen3VLForConditionalGeneration": _QWEN_LIST,
    "Qwen3VLMoeForConditionalGeneration": _QWEN_LIST,
}

# transformers 5.19: its modules, as checkpoints of older versions are renamed at load
_QWEN_5 = Names(
    (
        ("model.language_model.", "model.language_model."),
        ("model.visual.", "model.visual."),
        ("visual.", "model.visual."),
        ("model.", "model.language_model."),
    )
)
_LLAVA_5_0 = Names(
    (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
)
# the encoders' models stand where their wrappers did
_LLAVA_5 = Names(_LLAVA_5_0.prefixes, substrings=(("vision_tower.vision_model.", "vision_tower."),))
TRANSFORMERS_BEFORE: Mapping[str, Names] = dict.fromkeys(  # 5.0 and some later
    (
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
    ),
    _LLAVA_5_0,
)
TRANSFORMERS: Mapping[str, Names] = {
    "Qwen2VLForConditionalGeneration": _QWEN_5,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_5,
    "Qwen3VLForConditionalGeneration": SAME,
    "Qwen3VLMoeForConditionalGeneration": SAME,
    "LlavaForConditionalGeneration": _LLAVA_5,
    "LlavaNextForConditionalGeneration": _LLAVA_5,
    "LlavaOnevisionForConditionalGeneration": _LLAVA_5,
    "InternVLForConditionalGeneration": _LLAVA_5,
    "Gemma3ForConditionalGeneration": _LLAVA_5,
    "Mistral3ForConditionalGeneration": _LLAVA_5,
    "Glm4vForConditionalGeneration": SAME,
    "Idefics3ForConditionalGeneration": SAME,
    "SmolVLMForConditionalGeneration": SAME,
    "MiniCPMV4_6ForConditionalGeneration": SAME,
    **dict.fromkeys((t for t in TEXT_ONLY if not t.startswith("InternLM")), SAME),
}
