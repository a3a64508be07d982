"""What a card of another bandwidth could decode at, by its data sheet: a projection, not a measurement.

Each step of decoding reads the decoder's weights and the output head once for all sequences, and each sequence's own
keys and values; no card does that faster than its memory gives bytes (the memory roof of the roofline model, Williams,
Waterman and Patterson, CACM 2009). The vision tower, the projector and all rows but one of the embeddings are not read.
Counts no arithmetic: with large batches that sets the pace, and the projection is too fast. Knows files and a table of
cards, no engine.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..export.subject import read_subject, text_config
from ..serve.cards import CARDS, Card
from ..serve.machine import Machine
from ..serve.shape import kv_token_bytes
from ..serve.weights import Weights, read_weights
from .report import Figure

OTHERS = {"ti", "super", "laptop", "d"}  # after a card's number: another card
READ = ("decoder", "head", "other")  # parts of the weights that every step reads


def step_bytes(folder: Path, *, context: int, batch: int = 1) -> int:
    """Bytes that one step of decoding reads for `batch` sequences of `context` tokens each. Errors as `read_subject`'s.

    Of a mixture's routed experts those that `batch` tokens choose, if each chooses alike and apart from the others.
    """
    if context < 0 or batch < 1:
        raise ValueError(f"a step is of 1 or more sequences and no negative context, not {batch} of {context} tokens")
    subject = read_subject(folder)
    weights = read_weights(subject)
    cache = kv_token_bytes(subject.config) * context * batch
    return _weights_read(weights, text_config(subject.config), batch) + cache


def _weights_read(weights: Weights, config: Mapping[str, Any], batch: int) -> int:
    parts = weights.parts
    size = sum(parts[name] for name in READ)
    if not parts["head"]:
        size += parts["embeddings"]  # tied: they are the head too
    if weights.experts:
        many = next(int(config[k]) for k in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(k))
        chosen = int(config.get("num_experts_per_tok") or 1)
        size -= round(weights.experts * (1 - chosen / many) ** batch)
    return size


def projected(
    folder: Path, card: Card, *, context: int, batch: int = 1, reached: float | None = None
) -> dict[str, Figure]:
    """`decode_limit`, tok/s that `card` cannot exceed while it decodes `batch` sequences of `context` tokens, and with
    `reached`, the share of the limit that was measured on this machine's own card, `decode_projected` at that share."""
    if reached is not None and reached <= 0:
        raise ValueError(f"the share of the bandwidth that was reached is {reached}; it must be above 0")
    limit = batch * card.bandwidth / step_bytes(folder, context=context, batch=batch)
    found = {"decode_limit": Figure(limit, "tok/s", "projected")}
    if reached is not None:
        found["decode_projected"] = Figure(limit * reached, "tok/s", "projected")
    return found


def reached(folder: Path, card: Card, *, tpot: float, context: int, batch: int = 1) -> float:
    """The share of `card`'s bandwidth at which it decoded: `tpot` is the measured milliseconds of a step."""
    return step_bytes(folder, context=context, batch=batch) / card.bandwidth / (tpot / 1000)


def card_here(machine: Machine) -> Card | None:
    """The row of the table for this machine's first GPU, by the name that the driver gives; None where it has none."""
    if not machine.gpus:
        return None
    gpu = machine.gpus[0]
    words = _words(gpu.name)
    pairs = {a + b for a, b in itertools.pairwise(words)}  # RTX 4060 Ti is the table's 4060ti
    found = [c for key, c in CARDS.items() if re.split(r"\W", key)[0] in {*words, *pairs} and _alike(words, c)]
    near = [c for c in found if abs(c.memory - gpu.memory) < 0.1 * c.memory]
    return near[0] if len(near) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _alike(words: Sequence[str], card: Card) -> bool:
    """Whether no word of a driver's name makes it another card, of another bandwidth: H100 PCIe is no H100 SXM."""
    told = set(_words(card.name))
    return OTHERS & set(words) <= told and not ("pcie" in words and "sxm" in told)


def carries_over(card: Card, machine: Machine, *, budgeted: bool) -> list[str]:
    """Which of a report's figures hold on `card` too, measured on `machine`; sentences. `budgeted` says that the engine
    was held to the card's memory here, so that batch and length were found inside it and not computed."""
    here = card_here(machine)
    if here is not None and here.name == card.name:
        return [f"Every figure was taken on the card itself, {card.name}."]
    where = machine.gpus[0].name if machine.gpus else machine.cpu
    how = f"the engine was held to its memory on {where}" if budgeted else "computed for its memory, held to nothing"
    return [
        f"What carries over to {card.name}: memory of the model, max batch and max length ({how}).",
        f"What does not: every speed, latency, stage and watt. They are those of {where}.",
        f"Its decode speed is projected: {card.bandwidth / 1e9:g} GB/s by the data sheet, over the bytes that a step "
        "reads. Arithmetic, launches and the engine's own work come on top, so the limit is never reached.",
    ]
