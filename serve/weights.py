"""Where a checkpoint's bytes are: decoder, embeddings, head, vision tower, projector; by the headers' names and shapes.

Counts what an engine keeps: float32 and float64 tensors in 16 bit, the rest as stored. Knows no engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..export.names import SAME, VLLM, shards
from ..export.subject import FLOATS, HEADS, Subject
from ..recipes.sizes import count_of

PARTS = ("decoder", "embeddings", "head", "vision tower", "projector", "other")
ITEM = {
    **dict.fromkeys(("F64", "F32", "BF16", "F16", "I16", "U16"), 2),  # engines cast wider floats to 16 bit
    **dict.fromkeys(("I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
PROJECTOR = re.compile(
    r"(^|\.)(merger|deepstack_merger_list|multi_modal_projector|mm_projector|multimodal_projector|resampler|mlp1|"
    r"connector|aligner|projector|vision_projector|vision_language_adapter|patch_merger)(\.|$)"
)
VISION = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vision|vpm|image_encoder|image_tower|vit)(\.|$)"
)
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in)\.weight$")
LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
NEXT = re.compile(r"(^|\.)mtp\.")
EXPERT = re.compile(r"\.experts\.")  # of a mixture; shared experts have another name
MIB = 1 << 20
STEP = 2 * MIB  # PyTorch takes memory of the GPU in such steps where a tensor has 10 MiB or more, and
WHOLE = 20 * MIB  # keeps the block whole where it has this many, as vLLM asks it to while it loads (max_split_size_mb)
SPLIT = 10 * MIB
INT4_BITS = 4 + (16 + 4) / 128  # a weight in groups of 128 with a 16-bit scale and a 4-bit zero point


@dataclass(frozen=True)
class Weights:
    """Bytes by part, all parts present. `loose` is the number of weights in the decoder's 16-bit matrices, which int4
    would take; `packed` says that something is packed already; `experts` are the bytes of a mixture's routed experts,
    which are among the decoder's. `rounding` is what the tensors take beside their bytes where an engine has them."""

    parts: Mapping[str, int]
    loose: int
    packed: bool
    experts: int = 0
    rounding: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def as_int4(self) -> Weights:
        """The same with the decoder's 16-bit matrices packed to int4 in groups of 128."""
        less = int(self.loose * (16 - INT4_BITS) / 8)
        whole = self.parts["decoder"]
        experts = int(self.experts * (1 - less / whole)) if whole else 0  # nearly all of a mixture is experts
        return Weights({**self.parts, "decoder": whole - less}, 0, True, experts, self.rounding)


def part_of(name: str) -> str:
    """The part that a tensor of this name belongs to."""
    if PROJECTOR.search(name) and not (LAYER.search(name) and not VISION.search(name)):
        return "projector"
    if VISION.search(name):
        return "vision tower"
    if EMBEDDINGS.search(name):
        return "embeddings"
    if HEADS.search(name.rpartition(".")[0]) and not LAYER.search(name):
        return "head"
    return "decoder" if LAYER.search(name) else "other"


def read_weights(subject: Subject) -> Weights:
    """Count the subject's tensors, without those that vLLM leaves in the file: layers that guess further tokens (MTP),
    a head that is the embeddings' a second time. ValueError for a dtype whose size is not known."""
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    names, text = VLLM.get(subject.architecture, SAME), subject.text
    tied = text.get("tie_word_embeddings") and subject.config.get("tie_word_embeddings", True)
    layers = count_of(text.get("num_hidden_layers")) if text.get("num_nextn_predict_layers") else 0
    loose = experts = 0
    joined: dict[str, int] = {}
    for name, tensor in subject.tensors.items():
        if tensor.dtype not in ITEM:
            raise ValueError(f"{subject.folder}: {name} is {tensor.dtype}, whose size is not known: {', '.join(ITEM)}")
        part, size = part_of(name), math.prod(tensor.shape)
        number = LAYER.search(name) if layers and part == "decoder" else None
        if names(name) is None or NEXT.search(name) or (number and int(number[3]) >= layers):
            continue
        module, _, leaf = name.rpartition(".")
        if part == "head" and tied and tensor.dtype in FLOATS:
            continue
        held = size * (4 if leaf == "absmax" else ITEM[tensor.dtype])  # bitsandbytes' scales, unpacked to float32
        parts[part] += held
        together = f"{shards(module)[0]}.{leaf}"  # what engines make one tensor: q, k and v, gate and up
        joined[together] = joined.get(together, 0) + held
        if part == "decoder" and EXPERT.search(name):
            experts += held
        if part == "decoder" and len(tensor.shape) >= 2 and tensor.dtype in ("F64", "F32", "BF16", "F16"):
            loose += 0 if name.endswith(("scales", "weight_scale")) else size
    return Weights(parts, loose, bool(subject.packed), experts, sum(map(rounding, joined.values())))


def rounding(size: int) -> int:
    """Bytes that PyTorch's allocator gives to a tensor of `size` bytes beyond its own (c10's CUDACachingAllocator)."""
    rest = -size % STEP
    if size >= WHOLE or (size >= SPLIT and rest <= MIB):  # what is left of a smaller block serves another tensor
        return rest
    return 0
