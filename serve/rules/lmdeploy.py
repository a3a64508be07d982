"""LMDeploy's rules, as read in the sources of 0.18.0: its two engines, TurboMind and PyTorch. Imports no LMDeploy."""

from __future__ import annotations

from collections.abc import Iterator

from ...export.names import TEXT_ONLY
from ...export.subject import Subject
from .releases import new_enough
from .rule import (
    ROUTERS,
    Finding,
    Place,
    Setting,
    files_there,
    first_of,
    fused_alike,
    fused_groups,
    heads_divide,
    is_expert,
    remote_code,
    whole,
)

SEEN = "0.18.0"
TURBOMIND = frozenset(
    {
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternVLChatModel",
        "InternVLForConditionalGeneration",
        "InternS1ForConditionalGeneration",
        "LlamaForCausalLM",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GptOssForCausalLM",
        "MixtralForCausalLM",
    }
)
GROUPS = {"awq": (128,), "gptq": (128,), "compressed-tensors": (32, 128)}
QWEN2_VL = ("Qwen2VL", "Qwen2_5_VL")
QWEN_VISION_HEADS = (64, 80)  # the head sizes that TurboMind's own Qwen2-VL encoder is made for

# PyTorch engine: classes that hand quantization_config to the decoder, and those whose decoder looks for it in a
# nested config that it is never copied to
HANDED = frozenset(TEXT_ONLY) - {"Qwen2MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"} | {
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "InternS1ForConditionalGeneration",
    "MiniCPMV",
    "Phi3VForCausalLM",
}
NESTED = {
    "LlavaForConditionalGeneration": "text_config",
    "LlavaNextForConditionalGeneration": "text_config",
    "Gemma3ForConditionalGeneration": "text_config",
    "InternVLChatModel": "llm_config",
}


def turbomind_class(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if subject.architecture not in TURBOMIND:
        why = f"TurboMind has no {subject.architecture}"
        yield Finding("architecture", True, why, "serve with --backend pytorch, or another engine")


def turbomind_format(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Which formats it takes; what is packed it sees from the tensors, and no skip list is read."""
    said, method = subject.quantization, subject.method
    if not method:
        return
    if method not in GROUPS:
        yield Finding("format", True, f"TurboMind loads {', '.join(GROUPS)}, not {method}", "quantize to AWQ")
        return
    group = said.get("group_size") or 128
    if method == "awq" and said.get("version") != "gemm":
        why = f"AWQ version {said.get('version')}; TurboMind wants gemm, spelled so"
        yield Finding("layout", True, why, "`mmq convert FOLDER --repair`, or quantize again in gemm")
    if method == "gptq" and (said.get("desc_act") or not said.get("sym", True)):
        yield Finding("symmetric", True, "GPTQ that is asymmetric or in activation order", "quantize again")
    if method == "compressed-tensors":
        first = (said.get("config_groups") or {}).get("group_0") or {}
        weights = first.get("weights") or {}
        group = weights.get("group_size")
        if first.get("format") != "pack-quantized":
            why = "config_groups.group_0 does not say format pack-quantized, where TurboMind looks for it"
            yield Finding("format", True, why, "`mmq convert FOLDER --repair`")
        if (weights.get("num_bits"), weights.get("type")) != (4, "int"):
            yield Finding("bits", True, "other than int4", "quantize to 4 bits")
    if group not in GROUPS[method]:
        sizes = " or ".join(map(str, GROUPS[method]))
        yield Finding("group size", True, f"{method} in groups of {group}; TurboMind takes {sizes}", "quantize again")


def older_names(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Both engines look Qwen2-VL's tensors up by the names they were published under; transformers has new ones."""
    if not subject.architecture.startswith(QWEN2_VL):
        return
    newer = sorted(name for name in subject.tensors if name.startswith(("model.language_model.", "model.visual.")))
    if newer:
        why = f"{newer[0]}: LMDeploy knows {subject.architecture} by its published names, model.* and visual.*"
        yield Finding("names", True, why, "save it with transformers' save_pretrained, or serve with vLLM")


def turbomind_fused(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """q, k and v in different formats are unpacked together; nothing else is."""
    for found in fused_alike(subject, setting):
        attention = subject.method != "gptq" and all(
            len(g) == 3 for g in fused_groups(subject) if len({x.packed for x in g}) > 1
        )
        yield Finding(found.rule, not attention, found.why, found.remedy)


def turbomind_vision(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if not subject.architecture.startswith(QWEN2_VL):
        return
    vision = subject.config.get("vision_config") or {}
    width, heads = vision.get("embed_dim") or vision.get("hidden_size"), vision.get("num_heads")
    if subject.architecture.startswith("Qwen2_5"):
        width = vision.get("hidden_size")
    if width and heads and width // heads not in QWEN_VISION_HEADS:
        why = f"heads of {width // heads} in the picture encoder; TurboMind's is made for 64 and 80"
        yield Finding("tile", True, why, "serve with --backend pytorch")


def split(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """The output projection's groups are dealt out; the feed-forward's are padded."""
    wrong = [
        x.name
        for x in subject.linears.values()
        if x.packed and x.group and x.name.endswith(("o_proj", "wo")) and x.inputs % (x.group * setting.tp)
    ]
    if wrong:
        why = f"{first_of(wrong)}: its groups cannot be dealt to {setting.tp} GPUs"
        yield Finding("tensor parallel", True, why, "a smaller --tp")


def pytorch_class(subject: Subject, setting: Setting) -> Iterator[Finding]:
    nested = NESTED.get(subject.architecture)
    if nested and subject.method and not (subject.config.get(nested) or {}).get("quantization_config"):
        why = f"its decoder looks for quantization_config in {nested}, where it is not, and expects 16 bit"
        yield Finding("architecture", True, why, "serve with vLLM or SGLang")
    elif subject.architecture not in HANDED and not nested:
        why = f"mmq has not read LMDeploy's class for {subject.architecture or 'a config without architectures'}"
        yield Finding("architecture", False, why, "start it once and ask")


def pytorch_format(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """AWQ in float16, of dense linears. compressed-tensors has a kernel for experts alone."""
    method, said = subject.method, subject.quantization
    to_awq = "`mmq convert FOLDER --format awq`"
    if not method:
        return
    if method == "compressed-tensors":
        dense = [x.name for x in subject.packed if not is_expert(x.name)]
        if dense:
            why = f"compressed-tensors are loaded for a mixture's experts alone, not for {first_of(dense)}"
            yield Finding("format", True, why, to_awq)
    elif method != "awq":
        yield Finding("format", True, f"the PyTorch engine loads AWQ, not {method}", to_awq)
    elif experts := [x.name for x in subject.packed if is_expert(x.name)]:
        yield Finding("format", True, f"AWQ experts ({first_of(experts)})", "serve with TurboMind or vLLM")
    elif said.get("bits", 4) != 4:
        yield Finding("bits", True, "AWQ of other than 4 bits", "quantize to 4 bits")


def pytorch_head(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if subject.head is not None and subject.head.packed:
        why = f"{subject.head.name} is packed, and the PyTorch engine makes every head in 16 bit"
        yield Finding("head", True, why, "quantize without --head int4")


def pytorch_list(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Few classes tell a linear its name, so the list is mostly not read: every linear of the decoder is believed to be
    packed, and none of the picture encoder."""
    if subject.method != "awq":
        return
    layers = tuple({x.name.rsplit(".layers.", 1)[0] + ".layers." for x in subject.packed if ".layers." in x.name})
    left = [x.name for x in subject.linears.values() if not x.packed and not ROUTERS.search(x.name)]
    kept = [name for name in left if layers and name.startswith(layers)]
    if kept:
        why = f"{first_of(kept)} in 16 bit within the decoder: the engine takes all of it for packed"
        yield Finding("skip list", True, why, "serve with TurboMind or vLLM, or quantize without --keep")


SHARED = (new_enough, whole, files_there, remote_code, older_names, heads_divide, split)
PLACES = (
    Place(
        "lmdeploy", "turbomind", SEEN, (turbomind_class, turbomind_format, turbomind_fused, turbomind_vision, *SHARED)
    ),
    Place(
        "lmdeploy", "pytorch", SEEN, (pytorch_class, pytorch_format, pytorch_list, pytorch_head, fused_alike, *SHARED)
    ),
)
