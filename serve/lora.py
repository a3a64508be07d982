"""LoRA adapters beside a model: read by config and headers, held against the model's linears, put into vLLM's flags.

vLLM leaves out in silence what an adapter has for modules that the model has not; here it is an error. PEFT's layout,
safetensors only. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.names import SAME, VLLM
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
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
ENCODER_FLAG = "--enable-tower-connector-lora"
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # beginnings that leave the base's weights alone
# what vLLM does not compute (lora/peft_helper.py refuses the first six): key of adapter_config.json, what it is
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
    and each one's (inputs, outputs), 0 where the headers do not tell."""

    name: str
    folder: Path
    rank: int
    modules: Mapping[str, tuple[int, int]]


def read_adapters(
    wanted: Iterable[str], subject: Subject, *, taken: str = "", extra: Sequence[str] = ()
) -> tuple[Adapter, ...]:
    """The adapters of `NAME=FOLDER` each, checked against the model; `taken`: the model's own name in requests.

    ValueError for what vLLM could not compute or would leave out, OSError for a folder that holds no adapter.
    """
    found: list[Adapter] = []
    for item in wanted:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--lora {item}: give it as NAME=FOLDER; requests name the adapter as their model")
        if name == taken or name in [a.name for a in found]:
            raise ValueError(f"--lora {item}: {name} is the name of another model here; give each its own")
        adapter = read_adapter(name, Path(folder).expanduser())
        check_adapter(adapter, subject, encoder=given(extra, ENCODER_FLAG) is not None)
        found.append(adapter)
    return tuple(found)


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
    if max(ranks) > RANKS[-1]:
        raise ValueError(f"adapter {name} has rank {max(ranks)}; vLLM takes up to {RANKS[-1]}")
    return Adapter(name, folder, max(ranks), modules)


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    """ValueError for what is no plain LoRA."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"adapter {name} is {config['peft_type']}; vLLM takes LoRA")
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
            f"adapter {name} has {' and '.join(odd)}, which vLLM does not compute; merge it into the model"
        )


def _modules(name: str, header: Mapping[str, Any]) -> tuple[set[int], dict[str, tuple[int, int]]]:
    """All ranks, and each module's inputs and outputs: A is [rank, inputs], B [outputs, rank]."""
    sides: dict[str, dict[str, list[int]]] = {}
    for tensor, entry in header.items():
        if tensor == "__metadata__" or tensor.endswith(".base_layer.weight"):  # PEFT's copy of resized embeddings
            continue
        part = next((p for p in PARTS if tensor.endswith(p)), None)
        if part is None:
            raise ValueError(
                f"adapter {name}: {tensor} is no part of a LoRA that vLLM computes; merge it into the model"
            )
        module = tensor.removesuffix(part).removeprefix(PREFIX)
        sides.setdefault(module, {})[part.removesuffix(".weight")[-1]] = list(entry["shape"])
    flat = [m for m, s in sides.items() if any(len(shape) < 2 for shape in s.values())]
    if flat:
        raise OSError(f"adapter {name}: {TENSORS} holds {first_of(flat)}, which is no matrix; get the file again")
    broken = [m for m, s in sides.items() if set(s) != {"A", "B"} or s["A"][0] != s["B"][-1]]
    if broken or not sides:
        what = f"{first_of(broken)} without its other half" if broken else "no module at all"
        raise OSError(f"adapter {name}: {TENSORS} holds {what}; get the file again")
    return {s["A"][0] for s in sides.values()}, {m: (s["A"][-1], s["B"][0]) for m, s in sides.items()}


def check_adapter(adapter: Adapter, subject: Subject, *, encoder: bool = False) -> None:
    """ValueError where the model has not what the adapter changes, in these shapes, or vLLM would not change it.

    `encoder`: whether vLLM is told to take adapters of the picture encoder.
    """
    if subject.architecture in NO_LORA:
        raise ValueError(f"vLLM's {subject.architecture} takes no LoRA; merge adapter {adapter.name} into the model")
    spelled = VLLM.get(subject.architecture, SAME).linear
    here = {spelled(n): (x.inputs, x.outputs) for n, x in subject.linears.items()}
    ends = {m for m in adapter.modules if EMBEDDINGS.search(f"{m}.weight") or HEADS.search(m)}
    inner = {spelled(m): size for m, size in adapter.modules.items() if m not in ends}
    lost = [m for m in inner if m not in here and ".experts" not in m]  # a mixture's are spelled in several ways
    if lost:
        why = f"adapter {adapter.name} changes {first_of(lost)}, and the model has no such linear"
        raise ValueError(f"{why}: it was trained for another model")
    wrong = [m for m, size in inner.items() if all(here.get(m, (0, 0))) and size != here[m]]
    if wrong:
        had, has = inner[wrong[0]], here[wrong[0]]
        why = f"adapter {adapter.name}: {first_of(wrong)} is {had[0]} -> {had[1]} there and {has[0]} -> {has[1]} here"
        raise ValueError(f"{why}: it was trained for another model")
    if ends and subject.architecture in NO_HEAD_LORA:
        why = f"adapter {adapter.name} changes {first_of(sorted(ends))}"
        raise ValueError(f"{why}, which vLLM's {subject.architecture} cannot; merge it into the model")
    seen = [m for m in adapter.modules if part_of(f"{m}.weight") in ("vision tower", "projector")]
    if seen and not encoder:
        can = subject.architecture in ENCODER_LORA
        way = f"`-- {ENCODER_FLAG}` makes it (experimental in vLLM)" if can else "merge it into the model"
        why = f"adapter {adapter.name} changes the picture encoder ({first_of(seen)}), which vLLM leaves as it is"
        raise ValueError(f"{why}; {way}")


def rank_of(adapters: Sequence[Adapter]) -> int:
    """What all adapters' memory is laid out for, 0 without adapters."""
    return next(r for r in RANKS if r >= max(a.rank for a in adapters)) if adapters else 0


def slots_of(adapters: Sequence[Adapter]) -> int:
    """How many adapters are on the card at once."""
    return min(len(adapters), SLOTS)


def lora_bytes(subject: Subject, *, rank: int, slots: int, tp: int = 1) -> int:
    """Bytes that vLLM lays out on each card, whatever the adapters change: A and B of every linear of the decoder, and
    of the head where it can take one, 16 bit, for `slots` adapters of this rank."""
    sizes = [per_rank(subject, x, tp) for n, x in subject.linears.items() if part_of(f"{n}.weight") == "decoder"]
    if subject.head is not None and subject.architecture not in NO_HEAD_LORA:
        sizes.append((subject.head.inputs, subject.head.outputs))
    return int(slots * rank * 2 * sum(inputs + outputs for inputs, outputs in sizes))


def lora_flags(adapters: Sequence[Adapter]) -> list[Flag]:
    """vLLM's flags for these adapters."""
    if not adapters:
        return []
    words = tuple(_word(a) for a in adapters)
    rank, slots = rank_of(adapters), slots_of(adapters)
    flags = [
        Flag("--enable-lora", None, "adapters beside the model"),
        Flag("--lora-modules", words, "a request names one as its model; the model's own name means none"),
        Flag("--max-lora-rank", str(rank), f"the largest rank is {max(a.rank for a in adapters)}"),
        Flag("--max-loras", str(slots), "so many on the card, and in one batch, at once"),
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
