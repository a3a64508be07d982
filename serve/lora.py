"""LoRA adapters beside a model: read by config and headers, held against the model's linears and what an engine can do
with them, put into vLLM's flags.

vLLM leaves out in silence what an adapter has for modules that the model has not; here it is an error. PEFT's layout,
safetensors only. Knows no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.names import SAME, TRANSFORMERS, VLLM, Names
from ..export.subject import HEADS, Subject
from ..recipes.folder import headers
from ..recipes.plain import check_entries, object_of, read_json
from .flags import Flag, given
from .rules.rule import first_of, per_rank
from .rules.vllm_classes import ENCODER_LORA, NO_HEAD_LORA, NO_LORA
from .weights import EMBEDDINGS, part_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` takes (config/lora.py, MaxLoRARanks)
SLOTS = 8  # adapters on the card at once; each takes the largest rank's memory, used or not
PREFIX = "base_model.model."  # PEFT's wrapper around every name
EMBEDDED = (".lora_embedding_A", ".lora_embedding_B")
PARTS = (".lora_A.weight", ".lora_B.weight", *EMBEDDED)
ENCODER_FLAG = "--enable-tower-connector-lora"
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


def read_adapters(
    wanted: Iterable[str], subject: Subject, *, engine: str = "vllm", taken: str = "", extra: Sequence[str] = ()
) -> tuple[Adapter, ...]:
    """The adapters of `NAME=FOLDER` each, checked against the model; `taken`: the model's own name in requests.

    ValueError for what the engine could not compute or would leave out, OSError for a folder that holds no adapter.
    """
    found: list[Adapter] = []
    for item in wanted:
        name, folder = split_name(item)
        if name == taken or name in [a.name for a in found]:
            raise ValueError(f"--lora {item}: {name} is the name of another model here; give each its own")
        adapter = read_adapter(name, folder)
        CHECKS[engine](adapter, subject, extra)
        found.append(adapter)
    return tuple(found)


def split_name(item: str) -> tuple[str, Path]:
    """Name and folder of NAME=FOLDER. ValueError where it is not that."""
    name, _, folder = item.partition("=")
    if not (name and folder):
        raise ValueError(f"--lora {item}: give it as NAME=FOLDER; requests name the adapter as their model")
    return name, Path(folder).expanduser()


def read_adapter(name: str, folder: Path) -> Adapter:
    """The adapter in `folder`, by its config and headers. Errors as `read_adapters`'."""
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


def _check_names(adapter: Adapter, subject: Subject, names: Names) -> list[str]:
    """ValueError where the model has not the linears that the adapter changes, in these shapes; the embeddings and the
    head among them, which are not held against anything here. `names`: how the engine spells both sides."""
    here = {names.linear(n): (x.inputs, x.outputs) for n, x in subject.linears.items()}
    ends = sorted(m for m in adapter.modules if EMBEDDINGS.search(f"{m}.weight") or HEADS.search(m))
    inner = {names.linear(m): size for m, size in adapter.modules.items() if m not in ends}
    lost = [m for m in inner if m not in here and ".experts" not in m]  # a mixture's are spelled in several ways
    if lost:
        why = f"adapter {adapter.name} changes {first_of(lost)}, and the model has no such linear"
        raise ValueError(f"{why}: it was trained for another model")
    wrong = [m for m, size in inner.items() if all(here.get(m, (0, 0))) and size != here[m]]
    if wrong:
        had, has = inner[wrong[0]], here[wrong[0]]
        why = f"adapter {adapter.name}: {first_of(wrong)} is {had[0]} -> {had[1]} there and {has[0]} -> {has[1]} here"
        raise ValueError(f"{why}: it was trained for another model")
    return ends


def _check_vllm(adapter: Adapter, subject: Subject, extra: Sequence[str]) -> None:
    """ValueError for what vLLM would not compute; adapters of the picture encoder it takes where `extra` says so."""
    if adapter.rank > RANKS[-1]:
        raise ValueError(f"adapter {adapter.name} has rank {adapter.rank}; vLLM takes up to {RANKS[-1]}")
    if subject.architecture in NO_LORA:
        raise ValueError(f"vLLM's {subject.architecture} takes no LoRA; merge adapter {adapter.name} into the model")
    ends = _check_names(adapter, subject, VLLM.get(subject.architecture, SAME))
    if ends and subject.architecture in NO_HEAD_LORA:
        why = f"adapter {adapter.name} changes {first_of(ends)}"
        raise ValueError(f"{why}, which vLLM's {subject.architecture} cannot; merge it into the model")
    seen = [m for m in adapter.modules if part_of(f"{m}.weight") in ("vision tower", "projector")]
    if seen and given(extra, ENCODER_FLAG) is None:
        can = subject.architecture in ENCODER_LORA
        way = f"`-- {ENCODER_FLAG}` makes it (experimental in vLLM)" if can else "merge it into the model"
        why = f"adapter {adapter.name} changes the picture encoder ({first_of(seen)}), which vLLM leaves as it is"
        raise ValueError(f"{why}; {way}")


def _check_pytorch(adapter: Adapter, subject: Subject, extra: Sequence[str]) -> None:
    """ValueError for what the PyTorch engine would not compute: it changes linears, and routed experts are none."""
    if experts := [m for m in adapter.modules if ".experts" in m]:
        why = f"adapter {adapter.name} changes routed experts ({first_of(experts)}), which transformers keeps as one"
        raise ValueError(f"{why} tensor; --engine vllm computes it, or merge it into the model")
    _check_names(adapter, subject, TRANSFORMERS.get(subject.architecture, SAME))
    factors(adapter)


# engine -> its check of an adapter against a model, and the engine's own flags
CHECKS: Mapping[str, Callable[[Adapter, Subject, Sequence[str]], None]] = {
    "vllm": _check_vllm,
    "pytorch": _check_pytorch,
}


def held_bytes(adapters: Iterable[Adapter]) -> int:
    """Bytes of the adapters in 16 bit, beside a model that is kept as it is."""
    return sum(2 * a.ranks[m] * (inputs + outputs) for a in adapters for m, (inputs, outputs) in a.modules.items())


def rank_of(adapters: Sequence[Adapter]) -> int:
    """What all adapters' memory is laid out for, 0 without adapters."""
    return next(r for r in RANKS if r >= max(a.rank for a in adapters)) if adapters else 0


def slots_of(adapters: Sequence[Adapter], *, device: str = "cuda") -> int:
    """How many adapters are on the card at once; on a CPU all, and a slot more that stays empty.

    In a batch with others' adapters vLLM 0.32 on a CPU computes requests without one by slot -1, which is the last
    (lora/ops/torch_ops/lora_ops.py): they would get the last adapter's answers.
    """
    return min(len(adapters), SLOTS) if device == "cuda" else len(adapters) + bool(adapters)


def lora_bytes(subject: Subject, *, rank: int, slots: int, tp: int = 1) -> int:
    """Bytes that vLLM lays out on each card, whatever the adapters change: A and B of every linear of the decoder, and
    of the head where it can take one, 16 bit, for `slots` adapters of this rank."""
    sizes = [per_rank(subject, x, tp) for n, x in subject.linears.items() if part_of(f"{n}.weight") == "decoder"]
    if subject.head is not None and subject.architecture not in NO_HEAD_LORA:
        sizes.append((subject.head.inputs, subject.head.outputs))
    return int(slots * rank * 2 * sum(inputs + outputs for inputs, outputs in sizes))


def lora_flags(adapters: Sequence[Adapter], *, device: str) -> list[Flag]:
    """vLLM's flags for these adapters, on cuda or a cpu."""
    if not adapters:
        return []
    words = tuple(_word(a) for a in adapters)
    rank, slots = rank_of(adapters), slots_of(adapters, device=device)
    at_once = "so many on the card, and in one batch, at once"
    empty = "one stays empty, as it is what vLLM on a CPU gives to requests without an adapter that share a batch"
    flags = [
        Flag("--enable-lora", None, "adapters beside the model"),
        Flag("--lora-modules", words, "a request names one as its model; the model's own name means none"),
        Flag("--max-lora-rank", str(rank), f"the largest rank is {max(a.rank for a in adapters)}"),
        Flag("--max-loras", str(slots), at_once if device == "cuda" else empty),
    ]
    if len(adapters) > slots:
        flags.append(Flag("--max-cpu-loras", str(len(adapters)), "the others wait in the machine's memory"))
    return flags


def _word(adapter: Adapter) -> str:
    """NAME=FOLDER, or JSON where a comma would be taken for it."""
    folder = str(adapter.folder.resolve())
    if "," not in adapter.name + folder:
        return f"{adapter.name}={folder}"
    return json.dumps({"name": adapter.name, "path": folder}, separators=(",", ":"))
