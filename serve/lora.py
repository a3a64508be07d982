"""LoRA adapters beside a model: held against its linears and what an engine can do with them, put into vLLM's flags.

vLLM leaves out in silence what an adapter has for modules that the model has not; here it is an error. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..export.names import SAME, TRANSFORMERS, VLLM, Names
from ..export.subject import HEADS, Subject
from .adapter import Adapter, factors, read_adapter, split_name
from .flags import Flag, switched
from .rules.rule import first_of, per_rank
from .rules.vllm_classes import ENCODER_LORA, NO_HEAD_LORA, NO_LORA
from .weights import EMBEDDINGS, part_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` takes (config/lora.py, MaxLoRARanks)
SLOTS = 8  # adapters on the card at once; each takes the largest rank's memory, used or not
ENCODER_FLAG = "--enable-tower-connector-lora"


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
    if seen and not switched(extra, ENCODER_FLAG):
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
