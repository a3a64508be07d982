"""What vLLM's kernels take: each GPU's share of every packed linear, of a mixture's experts, of the encoder's heads.

Read in the sources of 0.32.0, and seen on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...export.subject import Subject
from ...recipes.sizes import count_of
from .rule import Finding, Setting, first_of, fused_groups, is_expert, per_rank

CPU_TILE = 32


def shapes(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Whether a kernel takes each rank's share of each packed linear."""
    if subject.method not in ("awq", "gptq", "compressed-tensors"):
        return
    straddling, words, tiles = [], [], []
    for linear in subject.linears.values():
        if not linear.packed:
            continue
        inputs, outputs = per_rank(subject, linear, setting.tp)
        if linear.group and linear.inputs != inputs and inputs % linear.group:
            straddling.append(f"{linear.name} ({linear.inputs} / {setting.tp} = {inputs:g} inputs)")
        if outputs % 8 and (subject.method != "compressed-tensors" or linear.asymmetric):
            words.append(f"{linear.name} ({outputs:g} outputs)")
        if setting.device == "cpu" and inputs % CPU_TILE:
            tiles.append(f"{linear.name} ({inputs:g} inputs)")
    if setting.device == "cpu":
        fused = {x.name for g in fused_groups(subject) for x in g}
        sets = [*fused_groups(subject), *((x,) for n, x in subject.linears.items() if n not in fused)]
        for group in sets:
            total = sum(per_rank(subject, x, setting.tp)[1] for x in group)
            if group[0].packed and total % CPU_TILE:
                tiles.append(f"{group[0].name} ({total:g} outputs with what it is fused with)")
    size = max((x.group for x in subject.packed), default=0)
    if straddling:
        why = f"{first_of(straddling)} per GPU: groups of {size} would straddle GPUs"
        yield Finding("tensor parallel", True, why, "a smaller --tp, or quantize in smaller groups")
    if words:
        yield Finding("tile", True, f"{first_of(words)} per GPU: not whole int32 words", "a smaller --tp")
    if tiles:
        why = f"{first_of(tiles)}: the CPU kernel takes multiples of {CPU_TILE}"
        yield Finding("tile", True, why, "keep these linears in 16 bit (`mmq quantize --keep`), or serve on a GPU")


def experts(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """A mixture's packed experts on a CPU: int4 has a kernel for AMX (and one of zentorch's, for symmetric weights),
    bitsandbytes runs through Triton alone."""
    if setting.device != "cpu" or not any(is_expert(x.name) for x in subject.packed):
        return
    if subject.method == "bitsandbytes":
        yield Finding("experts", True, "NF4 experts have no kernel on a CPU", "serve on a GPU")
    else:
        why = "int4 experts have a kernel on CPUs with AMX alone"
        lacks = setting.amx is False and "zentorch" not in setting.packages
        yield Finding("experts", lacks, why, "serve on a GPU, or on a CPU with AMX (`grep amx_tile /proc/cpuinfo`)")


def vision_divides(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """The picture encoder's heads are dealt out as well, unless it is kept whole on every GPU."""
    heads = vision_heads(subject)
    if heads % setting.tp:
        why = f"{heads} heads of the picture encoder cannot be dealt to {setting.tp} GPUs"
        yield Finding("heads", False, why, "add --mm-encoder-tp-mode data, which keeps the encoder whole")


def vision_heads(subject: Subject) -> int:
    """Attention heads of the picture encoder, 0 where the config does not tell."""
    vision = subject.config.get("vision_config")
    found = (vision.get("num_heads") or vision.get("num_attention_heads")) if isinstance(vision, Mapping) else None
    return count_of(found)
