"""The list of what stays in 16 bit, spelled so that every engine reads it alike: from headers alone, for any folder.

Each engine compares the list with its own names, by its own rule (see config.py and names.py); so each linear that is
not packed is there in every spelling, and each part of the model that holds nothing packed as a prefix with its dot.
Knows no tensor's values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .names import (
    SAME,
    SGLANG,
    SGLANG_LISTS,
    TRANSFORMERS,
    TRANSFORMERS_BEFORE,
    VLLM,
    Names,
    expert_module,
    fused_name,
    shards,
)
from .subject import Subject

TABLES = (VLLM, SGLANG, SGLANG_LISTS, TRANSFORMERS, TRANSFORMERS_BEFORE)


def skip_lists(subject: Subject) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prefixes that end in a dot, full names of linears): together what is in 16 bit, in all spellings.

    A prefix that would also be found within the name of a packed linear, as any engine spells it, is left out; the
    full names then say it all.
    """
    spellings = _spellings(subject.architecture)
    packed = {s.linear(x.name) for x in subject.packed for s in spellings}
    left = [x.name for x in subject.linears.values() if not x.packed]
    parts = dict.fromkeys(p for name in left if (p := _part(name, [x.name for x in subject.packed])))
    prefixes = dict.fromkeys(new for part in parts for s in spellings if (new := s(part)))
    prefixes = [p for p in prefixes if not any(p in name for name in packed)]
    if subject.head is None or not subject.head.packed:
        prefixes.append("lm_head")
    names = dict.fromkeys(every_name(subject.architecture, left))
    heads: list[str] = []
    if subject.head is None or not subject.head.packed:
        # transformers has lm_head, a Linear, where the embeddings are its weight too
        stored = [] if subject.head is None else [subject.head.name]
        heads = [*stored, *every_name(subject.architecture, stored), "lm_head"]
    return tuple(prefixes), tuple(dict.fromkeys([*heads, *names]))


def every_name(architecture: str, left: Iterable[str]) -> Iterator[str]:
    """What engines call the linears `left` in 16 bit in a model of this class, fused ones by the fused name as well."""
    left = list(left)
    for name in (*left, *fused_names(left)):
        for names in _spellings(architecture):
            yield names.linear(name)


def _spellings(architecture: str) -> list[Names]:
    return [SAME, *(table[architecture] for table in TABLES if architecture in table)]


def _part(name: str, packed: Iterable[str]) -> str | None:
    """The shortest part of the model, as `visual.`, that holds `name` and nothing packed; None where there is none."""
    words = name.split(".")
    for end in range(1, len(words)):
        part = ".".join(words[:end]) + "."
        if not any(p.startswith(part) for p in packed):
            return part
    return None


def fused_names(left: Iterable[str]) -> Iterator[str]:
    """The fused names of what is wholly left in 16 bit: SGLang looks for these alone, and vLLM for a mixture's experts
    (of which all are left or none)."""
    here = set(left)
    for name in left:
        if expert_module(name) != name:
            yield expert_module(name)
        if len(shards(name)) > 1 and all(n in here for n in shards(name)):
            yield fused_name(name)
