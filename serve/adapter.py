"""One LoRA adapter: a folder as PEFT writes it, read by its config and its tensors' headers. Safetensors only.

What is more than a low-rank term beside a weight is refused. Knows no engine, no model, no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.folder import headers
from ..recipes.plain import check_entries, object_of, read_json
from .rules.rule import first_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."  # PEFT's wrapper around every name
EMBEDDED = (".lora_embedding_A", ".lora_embedding_B")
PARTS = (".lora_A.weight", ".lora_B.weight", *EMBEDDED)
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # beginnings that leave the base's weights alone
# what is more than B A beside a weight (the first six as vLLM's lora/peft_helper.py has them): key of
# adapter_config.json, what it is
UNKNOWN: Mapping[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of its own",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow's routing",
    "trainable_token_indices": "trained tokens",
}


@dataclass(frozen=True)
class Adapter:
    """One adapter. `rank` is the largest of its modules', `modules` their names as PEFT has them, without its prefix,
    and each one's (inputs, outputs), 0 where the headers do not tell, and `ranks` each one's rank."""

    name: str
    folder: Path
    rank: int
    modules: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]


def split_name(item: str) -> tuple[str, Path]:
    """Name and folder of NAME=FOLDER. ValueError where it is not that."""
    name, _, folder = item.partition("=")
    if not (name and folder):
        raise ValueError(f"--lora {item}: give it as NAME=FOLDER; requests name the adapter as their model")
    return name, Path(folder).expanduser()


def read_adapter(name: str, folder: Path) -> Adapter:
    """The adapter in `folder`. ValueError for what is no plain LoRA, OSError for a folder that holds no adapter."""
    if not (folder / CONFIG).is_file():
        raise OSError(f"adapter {name}: {folder} has no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    try:
        config = object_of(read_json(folder / CONFIG), where=str(folder / CONFIG))
    except ValueError as e:
        raise OSError(f"adapter {name}: {e}") from None
    check_entries(folder)
    _check_kind(name, config)
    if not (folder / TENSORS).is_file():
        pickled = next((p for p in PICKLES if (folder / p).is_file()), None)
        if pickled:
            mend = "load it with PEFT and save it again, which writes safetensors"
            raise ValueError(f"adapter {name}: {pickled} is a pickle, which can run code; {mend}")
        raise OSError(f"adapter {name}: {folder} has no {TENSORS}")
    ranks, modules = _modules(name, headers(folder / TENSORS))
    return Adapter(name, folder, max(ranks.values()), modules, ranks)


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    """ValueError for what is no plain LoRA."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"adapter {name} is {config['peft_type']}; the engines take LoRA")
    odd = [what for key, what in UNKNOWN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        odd.append(f"bias {config['bias']!r}")
    if saved := config.get("modules_to_save"):
        odd.append(f"whole modules ({', '.join(map(str, saved if isinstance(saved, list) else [saved]))})")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        odd.append(f"a beginning ({start}) that changed the base's weights")
    if odd:
        raise ValueError(
            f"adapter {name} has {' and '.join(odd)}, which the engines do not compute; merge it into the model"
        )


def factors(adapter: Adapter) -> dict[str, float]:
    """What B A of each module is multiplied by: alpha / rank, as PEFT finds alpha, or of rank-stabilized LoRA
    alpha / sqrt(rank) (arXiv 2312.03732). ValueError where the config gives no alpha that can be found."""
    config = object_of(read_json(adapter.folder / CONFIG), where=str(adapter.folder / CONFIG))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_is_name(key) for key in patterns):
        why = f"adapter {adapter.name}: alpha_pattern in {CONFIG} is {patterns!r:.100}"
        raise ValueError(f"{why}; it must be an object of modules' names and numbers")
    found = {}
    for module, rank in adapter.ranks.items():
        own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config.get("lora_alpha", 8) if own is None else patterns[own]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"adapter {adapter.name}: lora_alpha of {module} is {alpha!r:.60}; it must be a number")
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _is_name(key: str) -> bool:
    """Whether a pattern is a module's name with a few numbers left open: no name takes long to be held against it."""
    return re.fullmatch(r"\^?(?:[\w.-]|\\[.d]\+?)+\$?", key) is not None and key.count("+") <= 3


def _modules(name: str, header: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Each module's rank, and its inputs and outputs: A is [rank, inputs], B [outputs, rank]."""
    sides: dict[str, dict[str, list[int]]] = {}
    for tensor, entry in header.items():
        if tensor == "__metadata__" or tensor.endswith(".base_layer.weight"):  # PEFT's copy of resized embeddings
            continue
        part = next((p for p in PARTS if tensor.endswith(p)), None)
        if part is None:
            raise ValueError(
                f"adapter {name}: {tensor} is no part of a LoRA that the engines compute; merge it into the model"
            )
        module = tensor.removesuffix(part).removeprefix(PREFIX)
        sides.setdefault(module, {})[part.removesuffix(".weight")[-1]] = list(entry["shape"])
    flat = [m for m, s in sides.items() if any(len(shape) < 2 for shape in s.values())]
    if flat:
        raise OSError(f"adapter {name}: {TENSORS} holds {first_of(flat)}, which is no matrix; get the file again")
    broken = [m for m, s in sides.items() if set(s) != {"A", "B"} or s["A"][0] != s["B"][-1] or not s["A"][0]]
    if broken or not sides:
        what = f"{first_of(broken)} of rank 0, or without its other half" if broken else "no module at all"
        raise OSError(f"adapter {name}: {TENSORS} holds {what}; get the file again")
    return {m: s["A"][0] for m, s in sides.items()}, {m: (s["A"][-1], s["B"][0]) for m, s in sides.items()}
