"""vLLM's rules, as read in the sources of 0.32.0: AWQ, GPTQ, compressed-tensors, bitsandbytes; on CUDA and on a CPU.

Where rules differ between versions, the version is in the rule. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...export.names import NOT_IN_VLLM, VLLM
from ...export.subject import Subject
from .releases import lacking_for_bnb, new_enough
from .rule import (
    REMOTE_TYPES,
    Finding,
    Place,
    Setting,
    disagreement,
    files_there,
    first_of,
    fused_alike,
    heads_divide,
    release,
    remote_code,
    whole,
)
from .vllm_lists import (
    awq_believed,
    bnb_believed,
    compressed_believed,
    compressed_head,
    entries_of,
    gptq_believed,
)
from .vllm_shapes import experts, shapes, vision_divides

SEEN = "0.32.0"
MARLIN_GROUPS = (-1, 32, 64, 128)
ORDER_GONE = (0, 29)  # 0.28 still loads columns in activation order across groups, 0.30 does not
_GROUPS = "quantize again with --group-size 32, 64 or 128"
NO_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
OWN_CONFIG = frozenset({"deepseek_vl_v2", "kimi_vl", "ovis"})  # model types whose config vLLM reads by itself
WORDS_ALONE = frozenset({"Phi4MultimodalForCausalLM"})  # served as text models, by a stand-in on transformers' own
METHODS = ("", "awq", "gptq", "compressed-tensors", "bitsandbytes")
# classes that import transformers' PixtralRotaryEmbedding, themselves or through a neighbour; it left transformers in
# 5.17, and vLLM looks for both names since 0.32
PIXTRAL = frozenset(
    {
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "PixtralForConditionalGeneration",
    }
)
PIXTRAL_GONE, PIXTRAL_MENDED = (5, 17), (0, 32)
# a text model of GLM-4 with positions in three parts: neighbours are turned together, and the kernel turned halves
NEIGHBOURS = frozenset({"Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration"})
NEIGHBOURS_MENDED = (0, 27)  # vllm-project/vllm#49290


def known(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """The model class and the method."""
    if subject.architecture in NOT_IN_VLLM:
        why = f"vLLM has no {subject.architecture}, and its stand-in for unknown classes cannot use its processor"
        yield Finding("architecture", True, why, "`transformers serve`, or another family")
    elif subject.architecture in WORDS_ALONE:
        why = f"vLLM serves {subject.architecture} as a text model and refuses pictures and sound"
        yield Finding("architecture", False, why, "ask it in words, or use transformers itself")
    elif subject.architecture not in VLLM:
        why = f"mmq has no name table for {subject.architecture or 'a config without architectures'} under vLLM"
        yield Finding("architecture", False, why, "start it once and ask; names are judged as they stand on disk")
    if subject.method not in METHODS:
        why = f"mmq knows vLLM's rules for {', '.join(METHODS[1:])}, not for {subject.method}"
        yield Finding("format", False, why, "start it once and ask")


def dtype(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Families that overflow in float16."""
    if subject.config.get("model_type") in NO_FLOAT16 and subject.dtype == "float16":
        why = f"config.json says float16, in which vLLM does not run {subject.config['model_type']}"
        yield Finding("dtype", True, why, "set dtype to bfloat16 in config.json, or serve with `-- --dtype bfloat16`")


def beside(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """A transformers too new for this vLLM's class."""
    here = setting.packages.get("transformers")
    old = setting.version and release(setting.version) < PIXTRAL_MENDED
    if subject.architecture in PIXTRAL and old and here and release(here) >= PIXTRAL_GONE:
        why = f"vLLM {setting.version} looks for PixtralRotaryEmbedding, which transformers {here} no longer has"
        yield Finding("version", True, why, "`pip install 'transformers<5.17'` in the engine's environment")


def rotary(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """GLM-4.1V's positions, by the kernel that runs where the model is not compiled."""
    old = setting.version and release(setting.version) < NEIGHBOURS_MENDED
    if subject.architecture in NEIGHBOURS and old and setting.device == "cuda":
        why = f"vLLM {setting.version} turns {subject.architecture}'s positions wrongly under --enforce-eager"
        yield Finding("positions", False, why, "leave --enforce-eager out, or take vLLM 0.27 or newer")


def own_code(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """A class whose config only the checkpoint's own Python can read, and no such Python."""
    kind = str(subject.config.get("model_type"))
    if kind in REMOTE_TYPES - OWN_CONFIG and "AutoConfig" not in (subject.config.get("auto_map") or {}):
        why = f"nobody can read a config of model type {kind}: config.json has no auto_map to the checkpoint's own code"
        yield Finding("remote code", True, why, "copy the .py files and auto_map from the base checkpoint")


def awq(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """AutoAWQConfig: 4 bits, GEMM order, zero points; a skip list of substrings of vLLM's names."""
    if subject.method != "awq":
        return
    said = subject.quantization
    bits = said.get("bits", said.get("w_bit"))
    if bits != 4:
        yield Finding("bits", True, f"AWQ of {bits} bits; vLLM loads 4", "quantize to 4 bits")
    if not gemm_shaped(subject):
        why = f"its tensors are in AWQ layout {said.get('version', 'other than gemm')}; vLLM reads gemm"
        yield Finding("layout", True, why, "quantize again with version gemm")
    if said.get("zero_point", True) is False:
        why = "zero_point is false: vLLM then reads weights without the offset of 8, and answers garbage"
        yield Finding("zero point", True, why, "`mmq convert FOLDER --format gptq`, or --repair where zeros are stored")
    sure = subject.architecture in VLLM
    yield from disagreement("vLLM", awq_believed(subject), subject, "modules_to_not_convert", sure=sure)
    said_so = bool(said.get("lm_head")) and not any("lm_head".startswith(e) for e in entries_of(subject))
    yield from _head(subject, said_so, "lm_head and modules_to_not_convert")


def gemm_shaped(subject: Subject) -> bool:
    """Whether AWQ's tensors are in the GEMM layout: eight outputs to a word, so that scales are eight times as wide."""
    pairs = ((subject.tensors.get(f"{x.name}.{s}") for s in ("qweight", "scales")) for x in subject.packed)
    return all(scales is not None and q is not None and scales.shape[1] == 8 * q.shape[1] for q, scales in pairs)


def gptq(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """AutoGPTQConfig: symmetric 4 or 8 bits, groups of Marlin's sizes, no activation order across groups."""
    if subject.method != "gptq":
        return
    said = subject.quantization
    group = said.get("group_size")
    if (said.get("bits"), said.get("sym")) not in ((4, True), (8, True)):
        why = f"GPTQ of {said.get('bits')} bits, sym {said.get('sym')}; vLLM loads symmetric 4 or 8"
        yield Finding("symmetric", True, why, "quantize again symmetric, or asymmetric in AWQ")
    if said.get("desc_act") and group != -1 and release(setting.version or SEEN) >= ORDER_GONE:
        why = "desc_act: columns in activation order across groups, which vLLM no longer loads"
        yield Finding("activation order", True, why, "quantize again with static groups (desc_act false)")
    if group not in MARLIN_GROUPS:
        yield Finding("group size", True, f"GPTQ in groups of {group}; vLLM loads 32, 64, 128 or -1", _GROUPS)
    if "checkpoint_format" in said and said["checkpoint_format"] not in ("gptq", "gptq_v2", ""):
        why = f"checkpoint_format {said['checkpoint_format']}: vLLM reads gptq and gptq_v2"
        yield Finding("layout", True, why, "quantize again in format gptq")
    for rule, over in (said.get("dynamic") or {}).items():
        changed = {k: v for k, v in (over or {}).items() if said.get(k) != v}
        if changed and not rule.startswith("-:"):
            why = f"dynamic rule {rule} gives some linears {changed}"
            yield Finding("dynamic", False, why, "mmq does not judge mixed grids; start it once and ask")
    sure = subject.architecture in VLLM
    yield from disagreement(
        "vLLM", gptq_believed(subject), subject, "dynamic and modules_in_block_to_quantize", sure=sure
    )
    yield from _head(subject, bool(said.get("lm_head")), "lm_head")


def compressed(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """CompressedTensorsConfig: pack-quantized int4 weights; `ignore` is exact or `re:`, on vLLM's names."""
    if subject.method != "compressed-tensors":
        return
    for name, group in (subject.quantization.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        kind = group.get("format") or subject.quantization.get("format")
        if kind != "pack-quantized" or weights.get("type") != "int" or group.get("input_activations"):
            why = f"{name} is {kind}; mmq judges int weights in pack-quantized"
            yield Finding("format", False, why, "start it once and ask")
        if weights.get("actorder") in ("group", "dynamic") and release(setting.version or SEEN) >= ORDER_GONE:
            why = f"{name}: actorder {weights['actorder']}, which vLLM no longer loads"
            yield Finding("activation order", True, why, "quantize again with actorder static or none")
        size = weights.get("group_size")
        if size is not None and size not in MARLIN_GROUPS and setting.device == "cuda":
            yield Finding("group size", True, f"groups of {size}; vLLM's kernels take 32, 64 or 128", _GROUPS)
    sure = subject.architecture in VLLM
    yield from disagreement("vLLM", compressed_believed(subject), subject, "targets and ignore", sure=sure)
    yield from _head(subject, compressed_head(subject), "targets and ignore")


def bitsandbytes(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Pre-quantized NF4: in tree before 0.28, since then a plugin; no tensor parallelism."""
    if subject.method != "bitsandbytes":
        return
    if subject.quantization.get("load_in_8bit"):
        yield Finding("format", True, "bitsandbytes int8, stored; vLLM loads stored NF4 alone", "quantize to nf4")
    if setting.tp > 1:
        why = "stored bitsandbytes weights cannot be split over GPUs"
        yield Finding("tensor parallel", True, why, "--tp 1 (pipeline parallel works), or another format")
    if missing := lacking_for_bnb(setting.version or SEEN, setting.packages):
        why = f"vLLM {setting.version or SEEN} needs {' and '.join(missing)} for bitsandbytes"
        yield Finding("plugin", False, why, f"`pip install {' '.join(missing)}` in the engine's environment")
    believed = bnb_believed(subject)
    taken = [x.name for x in subject.linears.values() if not x.packed and believed(x.name)]
    if taken:
        why = f"{first_of(taken)} in 16 bit and not in llm_int8_skip_modules: vLLM makes them 4 bit while it loads"
        yield Finding("skip list", False, why, "`mmq convert FOLDER --repair` lists them")


def _head(subject: Subject, believed: bool, where: str) -> Iterator[Finding]:
    """The output head: packed where the config says so, and then a weight of its own."""
    if subject.head is None:
        return
    name, packed = subject.head.name, subject.head.packed
    if packed != believed:
        is_, taken = ("packed", "16 bit") if packed else ("in 16 bit", "packed")
        why = f"{name} is {is_}, and by {where} vLLM takes it for {taken}"
        yield Finding("head", True, why, "`mmq convert FOLDER --repair`")
    if packed and (subject.config.get("tie_word_embeddings") or subject.text.get("tie_word_embeddings")):
        why = f"{name} is packed, and tie_word_embeddings makes it the embeddings' weight"
        yield Finding("head", True, why, "set tie_word_embeddings to false in config.json")


RULES = (
    known,
    new_enough,
    beside,
    rotary,
    whole,
    files_there,
    remote_code,
    own_code,
    dtype,
    fused_alike,
    awq,
    gptq,
    compressed,
    bitsandbytes,
    heads_divide,
    vision_divides,
    shapes,
    experts,
)
PLACES = (Place("vllm", "cuda", SEEN, RULES), Place("vllm", "cpu", SEEN, RULES, device="cpu"))
