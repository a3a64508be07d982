"""Which linears vLLM takes for packed, by each method's own list: as read in the sources of 0.32.0.

Each function gives a predicate on the checkpoint's names. Knows nothing of what is really packed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...export.names import SAME, VLLM, Names, expert_module, fused_name
from ...export.subject import FLOATS, Subject
from .rule import ROUTERS, is_expert, matches


def awq_believed(subject: Subject) -> Callable[[str], bool]:
    """Whether vLLM takes the linear of this name for packed."""
    names, entries = _names(subject), entries_of(subject)

    def believed(name: str) -> bool:
        module = _module(names, name)
        return not _plain(names, name) and not any(e in module for e in entries)

    return believed


def entries_of(subject: Subject) -> list[str]:
    """AWQ's skip list as vLLM holds it."""
    return _names(subject).entries(subject.quantization.get("modules_to_not_convert") or _derived(subject))


def _derived(subject: Subject) -> list[str]:
    """What vLLM makes of an empty list: the owner of every floating tensor, unless it owns another kind too. A tensor
    straight under `model` puts `model` on the list, and with it every module."""
    owners = {name.rpartition(".")[0] or name for name in subject.tensors}
    packed = {n.rpartition(".")[0] or n for n, t in subject.tensors.items() if t.dtype not in FLOATS}
    return sorted(owners - packed)


def gptq_believed(subject: Subject) -> Callable[[str], bool]:
    """By `modules_in_block_to_quantize` (substrings), else by the tensors; then less what `dynamic` takes out. Only
    `dynamic` is asked of a mixture's experts."""
    names = _names(subject)
    listed = list(_flat(subject.quantization.get("modules_in_block_to_quantize") or ()))
    owners = {n.rpartition(".")[0] for n, t in subject.tensors.items() if t.dtype not in FLOATS}
    chosen = names.entries(listed or owners)
    out = [p[2:] for p in (subject.quantization.get("dynamic") or {}) if p.startswith("-:")]

    def believed(name: str) -> bool:
        module = _module(names, name)
        if _plain(names, name) or any(re.match(p, fused_name(module)) for p in out):
            return False
        return is_expert(name) or any(entry in module for entry in chosen)

    return believed


def compressed_believed(subject: Subject) -> Callable[[str], bool]:
    """Not ignored, and a target: by class (`Linear`), by name or by `re:`."""
    names = _names(subject)

    def held(entries: Iterable[str]) -> list[str]:
        return [new for e in entries if (new := names(e) if "." in e and not e.startswith("re:") else e) is not None]

    ignore = held(subject.quantization.get("ignore") or ())
    groups = (subject.quantization.get("config_groups") or {}).values()
    targets = held(t for g in groups for t in g.get("targets") or ())

    def believed(name: str) -> bool:
        spelled = {_module(names, name), fused_name(_module(names, name))}
        if _plain(names, name) or any(matches(e, n) for e in ignore for n in spelled):
            return False
        return any(t.lower() in "linear" or any(matches(t, n) for n in spelled) for t in targets)

    return believed


def compressed_head(subject: Subject) -> bool:
    """Whether a target takes the output head: by name alone, since its class is no Linear."""
    if subject.head is None:
        return False
    name = _names(subject).linear(subject.head.name)
    groups = (subject.quantization.get("config_groups") or {}).values()
    targets = [t for g in groups for t in g.get("targets") or ()]
    ignored = any(matches(e, name) for e in subject.quantization.get("ignore") or ())
    return not ignored and any(matches(t, name) for t in targets)


def bnb_believed(subject: Subject) -> Callable[[str], bool]:
    """By `llm_int8_skip_modules`: a part of a module's path, or the path down to it."""
    names = _names(subject)
    skip = {str(name) for name in subject.quantization.get("llm_int8_skip_modules") or ()}

    def believed(name: str) -> bool:
        parts = _module(names, name).split(".")
        paths = {".".join(parts[: i + 1]) for i in range(len(parts))}
        return not _plain(names, name) and not skip & (paths | set(parts))

    return believed


def _names(subject: Subject) -> Names:
    return VLLM.get(subject.architecture, SAME)


def _plain(names: Names, name: str) -> bool:
    """Whether vLLM makes this linear without a quant_config."""
    return bool(ROUTERS.search(name)) or names.is_plain(name)


def _module(names: Names, name: str) -> str:
    """vLLM's module of a linear: the experts of a mixture are one module."""
    return expert_module(names.linear(name))


def _flat(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        yield from _flat(item) if isinstance(item, list) else (item,)
