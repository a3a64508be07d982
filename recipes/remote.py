"""What a hub tells of a model: its commit and files, and what it says when something is wrong; and which of the files
are needed. Knows no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from .plain import shown

INDEX = "model.safetensors.index.json"
# Configs, tokenizers, processors, chat templates; .py files are kept as data, nothing here runs them.
SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LEFT_BEHIND = (".safetensors", *PICKLES, ".gguf", ".onnx", ".msgpack", ".h5", ".md", ".part")
TEMPLATES = "additional_chat_templates"  # a folder of chat templates by name, beside the one that is the model's
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")  # how their names begin, in any letters


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit: its path in the repository, its bytes, and its sha256 (hex) where the hub tells it."""

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Remote:
    """A model at one commit (40 hex digits) of a hub."""

    commit: str
    files: tuple[RemoteFile, ...]


class Unreachable(OSError):
    """The hub cannot be reached: a copy in the cache may still do."""


def small(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """What is needed beside the weights: configs, tokenizer, processors, templates, Python files, the licence."""

    def wanted(path: PurePosixPath) -> bool:
        if path.parts[:-1] == (TEMPLATES,):
            return path.suffix == ".jinja"
        top = len(path.parts) == 1
        return top and (path.suffix in SMALL or is_legal(path.name)) and not _training(path.name)

    return [f for f in files if wanted(PurePosixPath(f.path))]


def is_legal(name: str) -> bool:
    """Whether a file is terms, which go with whatever is made of the model."""
    return name.upper().startswith(LEGAL)


def goes_along(name: str) -> bool:
    """Whether a file at a checkpoint's top goes with what is made of it: not weights, the card, or what is hidden, of
    the hub, of git, or of the user (a .env with a token)."""
    return not name.startswith(".") and (not name.endswith(LEFT_BEHIND) or is_legal(name))


def weights(model: str, files: Iterable[RemoteFile], *, index: Mapping[str, Any] | None = None) -> list[RemoteFile]:
    """The safetensors files: those that `index` (the parsed INDEX) names, else every one at the top.

    ValueError where there are none (pickles, GGUF, another framework): what was found, and what to do.
    """
    listed = {f.path: f for f in files}
    if index is not None:
        names = sorted(set(index["weight_map"].values()))
        if missing := [n for n in names if n not in listed]:
            raise ValueError(f"{model}: {INDEX} names {missing[0]}, which is not on the hub; the repository is broken")
        return [listed[n] for n in names]
    found = [f for f in listed.values() if f.path.endswith(".safetensors") and "/" not in f.path]
    found = [f for f in found if not f.path.startswith(("consolidated", "adapter_"))]
    if "model.safetensors" in listed:
        found = [listed["model.safetensors"]]
    if not found:
        raise ValueError(f"{model} {_no_safetensors(list(listed))}")
    return found


def no_model(paths: Iterable[str]) -> str:
    """What a folder of these files is where it is known to be something else than a checkpoint; "" else."""
    top = [p for p in paths if "/" not in p]
    if "adapter_model.safetensors" in top or "adapter_config.json" in top:
        return (
            "holds a LoRA adapter, not a model: serve its base with --lora NAME=FOLDER, or merge it into its base and "
            "give that folder"
        )
    if gguf := next((p for p in paths if p.endswith(".gguf")), None):
        return f"holds GGUF files ({gguf}), which are quantized already; name the model that they were made from"
    return ""


def _no_safetensors(paths: list[str]) -> str:
    top = [p for p in paths if "/" not in p]
    if other := no_model(paths):
        return other
    if pickles := [p for p in top if p.endswith(PICKLES) and not _training(p)]:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        return (
            f"has its weights as pickles alone ({pickles[0]}{more}), and unpickling runs code; "
            "use a repository with .safetensors, or convert it with save_pretrained and give that folder"
        )
    return "holds no .safetensors file at its top; name the repository that holds the model's weights"


def _training(name: str) -> bool:
    return name.startswith(("training_args", "trainer_state", "optimizer", "scheduler", "rng_state"))


def clean(text: str, secret: str | None = None) -> str:
    """A hub's own words in one short line, without addresses (which may be signed), the token `secret`, and anything
    that looks like one."""
    text = text.replace(secret, "(token)") if secret else text
    text = re.sub(r"https?://\S+|\S*\?\S+=\S*", "(address)", " ".join(text.split()))
    return re.sub(r"\b(hf_|ms-)[\w-]{8,}", "(token)", shown(text))[:300]
