"""transformers' rules, as read in the sources of 5.19.0: which packages a format needs, how its lists are matched.

Imports no transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...export.names import SAME, TRANSFORMERS
from ...export.subject import Subject
from ...quantize.family import row_of
from .releases import new_enough
from .rule import (
    REMOTE_TYPES,
    Finding,
    Place,
    Setting,
    disagreement,
    files_there,
    first_of,
    is_expert,
    matches,
    whole,
)

SEEN = "5.19.0"
FUSED_ONLY = ("Qwen3VLMoeForConditionalGeneration",)  # seen: its experts one by one are not found, and made up
NEEDS = {
    "awq": ("gptqmodel", "accelerate"),
    "gptq": ("gptqmodel", "optimum"),
    "compressed-tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
}


def remote(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Model code of a checkpoint's own, written for transformers 4, seldom loads in 5."""
    if str(subject.config.get("model_type")) in REMOTE_TYPES:
        why = f"transformers has no {subject.config['model_type']}; the checkpoint's own code is for transformers 4"
        yield Finding("remote code", True, why, "serve it with vLLM, which has the class itself")


def packages(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """What must be installed beside it. gptqmodel and vLLM exclude each other."""
    missing = [p for p in NEEDS.get(subject.method, ()) if p not in setting.packages]
    if subject.method not in ("", *NEEDS):
        yield Finding("format", False, f"mmq knows no rules for {subject.method}", "load it once and see")
    if missing:
        why = f"transformers loads {subject.method} only with {' and '.join(missing)}"
        aside = ", in an environment without vLLM" if "gptqmodel" in missing else ""
        yield Finding("plugin", False, why, f"`pip install {' '.join(missing)}`{aside}")
    if subject.method == "gptq":
        why = "GPTQ goes through optimum, which packs every linear it finds in the decoder's layers"
        yield Finding("format", False, why, "load it once and see")


def lists(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """`re.match` from the start of a module's name, or its end; compressed-tensors exact or `re:`."""
    key = {"awq": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore"}
    if subject.method not in key:
        return
    where = key[subject.method]
    entries = [str(e) for e in subject.quantization.get(where) or ()]
    names = TRANSFORMERS.get(subject.architecture, SAME)

    def believed(name: str) -> bool:
        module = names.linear(name)
        if subject.method == "compressed-tensors":
            return not any(matches(e, module) for e in entries)
        return not any(re.match(e, module) or module.endswith(e) for e in entries)

    sure = subject.architecture in TRANSFORMERS
    yield from disagreement("transformers", believed, subject, where, sure=sure)


def head(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """AWQ and bitsandbytes leave the head out, whatever the list says; compressed-tensors go by their targets."""
    if subject.head is not None and subject.head.packed and subject.method in ("awq", "bitsandbytes"):
        why = f"{subject.head.name} is packed, and transformers leaves every head in 16 bit"
        yield Finding("head", True, why, "quantize without --head int4, or in compressed-tensors")


def compressed_head(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Of compressed-tensors: a head is a Linear like others, also where the embeddings are its weight."""
    groups = subject.quantization.get("config_groups")
    targets = [t for g in (groups.values() if isinstance(groups, Mapping) else ()) for t in g.get("targets") or ()]
    stays = subject.head is None or not subject.head.packed
    if subject.method == "compressed-tensors" and stays and "Linear" in targets:
        entries = [str(e) for e in subject.quantization.get("ignore") or ()]
        if not any(matches(e, "lm_head") for e in entries):
            why = "transformers reads ignore so that lm_head would be packed, and it is in 16 bit"
            yield Finding(
                "skip list", True, why, "`mmq convert FOLDER --repair` writes a list that every engine reads alike"
            )


def several_gpus(subject: Subject, setting: Setting) -> Iterator[Finding]:
    if setting.tp > 1 and subject.method:
        why = "how quantized linears are split over GPUs is not among mmq's rules"
        yield Finding("tensor parallel", False, why, "device_map places whole layers on several GPUs")


def stored_in_4_bit(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Of `mmq serve --engine pytorch`, which restores the other int4 formats itself: bitsandbytes' own rules."""
    if subject.method != "bitsandbytes":
        return
    missing = [p for p in NEEDS["bitsandbytes"] if p not in setting.packages]
    if missing:
        why = f"transformers loads bitsandbytes only with {' and '.join(missing)}"
        yield Finding("plugin", bool(setting.packages), why, f"`pip install {' '.join(missing)}` beside it")
    yield from lists(subject, setting)
    yield from head(subject, setting)


def restorable(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """What `mmq serve --engine pytorch` restores: int4, in columns as they stand."""
    quantization = subject.quantization
    if subject.method in ("awq", "gptq") and int(quantization.get("bits") or quantization.get("w_bit") or 4) != 4:
        yield Finding("bits", True, f"{quantization.get('bits')} bits, and mmq reads 4", "quantize again")
    if subject.method == "gptq" and quantization.get("desc_act") and quantization.get("static_groups") is not True:
        why = "desc_act: columns may be in activation order across groups, which mmq does not read"
        yield Finding("order", False, why, "start it and see; quantize again with static groups if it is refused")
    if subject.method == "compressed-tensors" and not subject.packed:
        yield Finding("format", True, "compressed-tensors of another kind than packed int4", "serve it with vLLM")
    alone = [x.name for x in subject.packed if is_expert(x.name)]
    if subject.architecture in FUSED_ONLY and alone:
        why = f"{first_of(alone)} stand by themselves, and transformers reads this class's experts fused alone"
        yield Finding("experts", True, why, "serve it with vLLM")
    if subject.method not in ("", *NEEDS):
        yield Finding("format", False, f"mmq knows no rules for {subject.method}", "load it once and see")


def own_classes(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Of `mmq serve --engine pytorch`: where transformers has no class, mmq's own or the checkpoint's."""
    if str(subject.config.get("model_type")) not in REMOTE_TYPES:
        return
    row = row_of(subject.config)
    if row is None:
        why = f"transformers has no {subject.config['model_type']}, and mmq none: the checkpoint's own Python would run"
        yield Finding("remote code", False, why, "read it, then serve with --trust-remote-code")
    elif row.note:
        yield Finding("pictures", False, f"words alone: {row.note}", "serve it with vLLM for its pictures")


OURS = (own_classes, new_enough, whole, files_there, restorable, stored_in_4_bit)
PLACES = (
    Place(
        "transformers",
        "any",
        SEEN,
        (remote, new_enough, whole, files_there, packages, lists, head, compressed_head, several_gpus),
        device="cpu",
    ),
    Place("pytorch", "cuda", SEEN, OURS),
    Place("pytorch", "cpu", SEEN, OURS, device="cpu"),
)
