"""SGLang's rules on an NVIDIA GPU, as read in the sources of 0.5.23. Imports no SGLang."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ...export.names import SAME, SGLANG, SGLANG_LISTS, expert_module, fused_name
from ...export.subject import Subject
from .releases import new_enough
from .rule import (
    ROUTERS,
    Finding,
    Place,
    Setting,
    disagreement,
    files_there,
    first_of,
    fused_alike,
    heads_divide,
    matches,
    per_rank,
    remote_code,
    whole,
)
from .vllm import MARLIN_GROUPS

SEEN = "0.5.23"
TILES = ((64, 128), (128, 64))  # (outputs, inputs) that Marlin's kernels take
BNB = "0.46.1"


def known(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if subject.architecture not in SGLANG:
        why = f"mmq has no name table for {subject.architecture or 'a config without architectures'} under SGLang"
        yield Finding("architecture", False, why, "start it once and ask; names are judged as they stand on disk")


def awq(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """AWQMarlinConfig where Marlin takes it, else AWQConfig: 4 bits; the skip list is of substrings of SGLang's own
    names, of fused linears the fused name, and an empty list skips nothing."""
    if subject.method != "awq":
        return
    said = subject.quantization
    if said.get("bits", said.get("w_bit")) != 4:
        yield Finding("bits", True, "AWQ of other than 4 bits", "quantize to 4 bits")
    names = SGLANG.get(subject.architecture, SAME)
    entries = said.get("modules_to_not_convert") or []

    def believed(name: str) -> bool:
        module = fused_name(expert_module(names.linear(name)))
        return not any(entry in module for entry in entries)

    yield from _lists(subject, believed, "modules_to_not_convert")
    yield from _tiles(subject, setting, marlin_only=False)


def gptq(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """GPTQMarlinConfig alone: the plain GPTQ kernels are gone. Nothing is seen from the tensors: what `dynamic` does
    not take out is believed to be packed, the picture encoder as well."""
    if subject.method != "gptq":
        return
    said = subject.quantization
    group = said.get("group_size")
    if (said.get("bits"), said.get("sym")) not in ((4, True), (8, True)) or group not in MARLIN_GROUPS:
        why = (
            f"GPTQ of {said.get('bits')} bits, sym {said.get('sym')}, groups of {group}; SGLang loads symmetric 4 or 8"
        )
        yield Finding("symmetric", True, why + " in groups of 32, 64, 128", "quantize again symmetric")
    names = SGLANG.get(subject.architecture, SAME)
    out = [p[2:] for p in (said.get("dynamic") or {}) if p.startswith("-:")]

    def believed(name: str) -> bool:
        return not any(re.match(p, fused_name(names.linear(name))) for p in out)

    remedy = "`mmq convert FOLDER --format compressed-tensors`: its list of what is left out is read by SGLang"
    yield from _lists(subject, believed, "dynamic", remedy=remedy)
    yield from _tiles(subject, setting, marlin_only=True)


def compressed(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """CompressedTensorsConfig, WNA16: `ignore` is exact or `re:`, renamed first."""
    if subject.method != "compressed-tensors":
        return
    for name, group in (subject.quantization.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        kind = group.get("format") or subject.quantization.get("format")
        if kind != "pack-quantized" or weights.get("type") != "int":
            yield Finding("format", False, f"{name} is {kind}; mmq judges int4 in pack-quantized", "start it and ask")
        size = weights.get("group_size")
        if size is not None and size not in MARLIN_GROUPS:
            yield Finding("group size", True, f"groups of {size}", "quantize with --group-size 32, 64 or 128")
    names, lists = SGLANG.get(subject.architecture, SAME), SGLANG_LISTS.get(subject.architecture, SAME)
    ignore = [e if e.startswith("re:") else lists(e) or e for e in subject.quantization.get("ignore") or ()]

    def believed(name: str) -> bool:
        spelled = {names.linear(name), fused_name(names.linear(name))}
        return not any(matches(e, n) for e in ignore for n in spelled)

    yield from _lists(subject, believed, "ignore")
    yield from _tiles(subject, setting, marlin_only=True)


def bitsandbytes(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if subject.method != "bitsandbytes":
        return
    yield Finding("plugin", False, f"SGLang needs bitsandbytes >= {BNB}", f"`pip install 'bitsandbytes>={BNB}'`")
    if setting.tp > 1:
        why = "stored bitsandbytes weights cannot be split over GPUs"
        yield Finding("tensor parallel", True, why, "--tp 1, or another format")


def _lists(
    subject: Subject, believed: Callable[[str], bool], where: str, *, remedy: str | None = None
) -> Iterator[Finding]:
    names = SGLANG.get(subject.architecture, SAME)

    def really(name: str) -> bool:
        return not ROUTERS.search(name) and not names.is_plain(name) and believed(name)

    for found in disagreement("SGLang", really, subject, where, sure=subject.architecture in SGLANG):
        yield found if remedy is None else Finding(found.rule, found.fatal, found.why, remedy)


def _tiles(subject: Subject, setting: Setting, *, marlin_only: bool) -> Iterator[Finding]:
    """Marlin takes whole tiles and pads none. AWQ falls back to a kernel that wants whole groups and words."""
    wrong, slow = [], []
    for linear in subject.linears.values():
        if not linear.packed:
            continue
        inputs, outputs = per_rank(subject, linear, setting.tp)
        tiled = any(outputs % n == 0 and inputs % k == 0 for n, k in TILES)
        whole_groups = not linear.group or inputs % linear.group == 0
        if not whole_groups or outputs % 8 or (marlin_only and not tiled):
            wrong.append(f"{linear.name} ({outputs:g} outputs, {inputs:g} inputs per GPU)")
        elif not tiled:
            slow.append(linear.name)
    if wrong:
        why = f"{first_of(wrong)}: not whole groups, or not tiles of 64 x 128"
        yield Finding("tile", True, why, "a smaller --tp, or keep these linears in 16 bit (`mmq quantize --keep`)")
    if slow:
        why = f"{first_of(slow)}: no multiple of 64 x 128, so the slow AWQ kernel runs, in float16"
        yield Finding("tile", False, why, "add --dtype float16")


RULES = (
    known,
    new_enough,
    whole,
    files_there,
    remote_code,
    fused_alike,
    awq,
    gptq,
    compressed,
    bitsandbytes,
    heads_divide,
)
PLACES = (Place("sglang", "cuda", SEEN, RULES),)
