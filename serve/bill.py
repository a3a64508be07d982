"""What serving takes of each card, line by line: weights, the passes vLLM profiles with, graphs, libraries.

Counts for one ask and one context; `planner` looks for what fits. Knows no flags.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..export.subject import Subject, read_subject
from . import overhead
from .lora import lora_bytes
from .machine import Gpu
from .pictures import Vision, read_vision
from .shape import Layers, Shape, cached, is_mixture, read_shape
from .shares import decoder_bytes, fullest
from .weights import Weights, read_weights

PICTURES = 8  # in one request, where nobody asked
LEAST = {
    "images": 0,
    **dict.fromkeys(("context", "concurrency", "sequences", "tp", "pp", "dp", "pixels", "batched"), 1),
}


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a checkpoint, read once."""

    config: Mapping[str, Any]
    shape: Shape
    weights: Weights
    vision: Vision | None
    subject: Subject


@dataclass(frozen=True)
class Ask:
    """What is asked for; None where the plan may choose. `images` None: up to `PICTURES`, and videos as in vLLM."""

    context: int | None = None
    concurrency: int | None = None  # sequences that are to be there at once, each as long as the context, over all `dp`
    sequences: int | None = None  # --max-num-seqs where there is no concurrency: more than fit only wait
    images: int | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1  # replicas
    kv_dtype: str = "auto"  # auto or fp8
    pixels: int | None = None  # of the largest picture, for families that have the setting
    share: float | None = None  # of the card, else as much as is safe
    batched: int | None = None  # --max-num-batched-tokens, else vLLM's own
    eager: bool = False  # no CUDA graphs
    compiled: bool = True  # by torch.compile, where not eager
    graphs: str = "FULL_AND_PIECEWISE"  # vLLM's cudagraph_mode
    video: bool | None = None  # None: not where `images` is given
    lora_rank: int = 0  # that room is laid out for, 0 without adapters
    lora_slots: int = 0  # adapters on the card at once

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.kv_dtype not in ("auto", "fp8"):
            raise ValueError(f"the cache's dtype is {self.kv_dtype!r}; auto and fp8 are known")

    @property
    def cards(self) -> int:
        """Cards in all."""
        return self.tp * self.pp * self.dp

    @property
    def abreast(self) -> int | None:
        """Of the sequences that are to be there at once, those of one replica."""
        return None if self.concurrency is None else math.ceil(self.concurrency / self.dp)

    @property
    def pictures(self) -> int:
        """Pictures in one request, at most."""
        return PICTURES if self.images is None else self.images

    @property
    def videos(self) -> bool:
        """Whether videos are served too."""
        return self.images is None if self.video is None else self.video


@dataclass(frozen=True)
class Part:
    """One line of the bill, bytes on each card. Passes that do not run at the same time share their memory: only the
    largest is `counted`."""

    name: str
    size: int
    why: str
    counted: bool = True


def read_model(folder: Path) -> Model:
    """Read config and headers of the checkpoint in `folder`. OSError or ValueError as they are broken."""
    subject = read_subject(folder)
    config = subject.config
    return Model(config, read_shape(folder), read_weights(subject), read_vision(folder, config), subject)


def parts_of(model: Model, card: Gpu, ask: Ask, context: int) -> tuple[Part, ...]:
    """The bill for the fullest card, without the cache. Weights are dealt out over `tp` cards, layers over `pp` stages,
    of which the first has the embeddings and the last the head; each has the vision tower. Each of `dp` replicas has
    all of it, but for a mixture's experts."""
    sequences, batched = sequences_of(card, ask), batched_of(card, ask)
    found = []
    tower = model.vision.heads % ask.tp == 0 if model.vision else False
    ends = ("embeddings", "head")
    larger = max(ends, key=lambda name: model.weights.parts[name])
    dealt = {"tp": ask.tp, "pp": ask.pp, "dp": ask.dp}
    for name, size in model.weights.parts.items():
        if name == "decoder" and size:
            each = decoder_bytes(model.config, size, experts=model.weights.experts, **dealt)
            found.append(Part(f"weights: {name}", each, "the files' headers"))
        elif size:
            whole = name == "projector" or (name == "vision tower" and not tower)
            elsewhere = ask.pp > 1 and name in ends and name != larger
            why = "another stage's of the pipeline" if elsewhere else "the files' headers"
            found.append(Part(f"weights: {name}", math.ceil(size / (1 if whole else ask.tp)), why, not elsewhere))
    beside = math.ceil(model.weights.rounding / (ask.tp * ask.pp)) + overhead.rotary_bytes(model.config)
    beside += model.vision.table if model.vision else 0
    if model.weights.packed:
        beside += int(overhead.TURNED * sum(p.size for p in found if p.name == "weights: decoder"))
    found.append(Part("weights: beside them", beside, "PyTorch's blocks of 2 MiB, tables of positions, Marlin's order"))
    if ask.lora_slots:
        size = lora_bytes(model.subject, rank=ask.lora_rank, slots=ask.lora_slots, tp=ask.tp)
        why = f"{ask.lora_slots} x rank {ask.lora_rank}, beside every linear of the decoder"
        found.append(Part("LoRA", math.ceil(size * fullest(model.config, ask.pp)), why))
    found += passes(model, ask, context, batched=batched, sequences=sequences)
    if not ask.eager:
        graphs = overhead.graph_count(sequences, batched, mode=ask.graphs) * (
            2 if ask.lora_slots else 1
        )  # with adapters and without
        size = overhead.GRAPHS + graphs * overhead.GRAPH
        found.append(Part("CUDA graphs", size, f"{graphs} graphs; fitted to vLLM 0.26's logs"))
    found.append(Part("libraries", overhead.LIBRARIES, "cuBLAS and attention workspaces; from vLLM 0.26's logs"))
    if ask.tp * ask.pp > 1 or (ask.dp > 1 and is_mixture(model.config)):  # replicas of a dense model never talk
        found.append(Part("NCCL", overhead.NCCL, "buffers between cards: assumed"))
    found.append(Part("margin", int(overhead.MARGIN * card.memory), f"{overhead.MARGIN:.1%} of the card: assumed"))
    return tuple(found)


def passes(model: Model, ask: Ask, context: int, *, batched: int, sequences: int) -> list[Part]:
    """What vLLM profiles with: the vision tower first, then the decoder and sampling beside the pictures' features."""
    found: dict[str, tuple[int, str]] = {}
    kept = features = 0
    hidden, _, vocabulary = overhead.widths(model.config)
    if model.vision is not None:
        options: dict[str, Any] = {"images": ask.pictures, "video": ask.videos, "context": context}
        features = overhead.profiled_tokens(model.vision, batched=batched, sequences=sequences, **options)
        size = overhead.tower_bytes(model.vision, features, tp=ask.tp, native=ask.compiled and not ask.eager)
        why = f"{int(features * model.vision.per_token)} patches, the largest input that vLLM profiles with"
        found["vision tower at work"] = (size, why)
        kept = features * model.vision.outputs * hidden * overhead.ITEM
    elif model.shape.vision:
        found["vision tower at work"] = (overhead.UNKNOWN_TOWER, "a family whose pictures are not known here: assumed")
    size = kept + overhead.decoder_bytes(model.config, batched, tp=ask.tp)
    beside = f", beside the features of {features} tokens of pictures" if features else ""
    found["decoder at work"] = (size, f"one layer over {batched} tokens, vLLM's largest step{beside}")
    size = kept + overhead.sampler_bytes(model.config, sequences)
    why = f"{sequences} sequences x {vocabulary} words x {overhead.SAMPLED} bytes{beside}"
    found["sampling"] = (size, why)
    largest = max(found, key=lambda name: found[name][0])
    return [Part(name, size, why, counted=name == largest) for name, (size, why) in found.items()]


def room(parts: tuple[Part, ...], card: Gpu, share: float) -> int:
    """Bytes that are left for the cache on each card; negative where the parts alone are too much."""
    return int(share * card.memory) - sum(p.size for p in parts if p.counted)


def cached_of(model: Model, ask: Ask) -> tuple[Layers, ...]:
    """The layers with a cache on each card; those of a pipeline are dealt out, the fullest stage counts."""
    whole = cached(model.config, itemsize=1 if ask.kv_dtype == "fp8" else 2, tp=ask.tp)
    share = fullest(model.config, ask.pp)
    return tuple(replace(kind, count=math.ceil(kind.count * share)) for kind in whole)


def flying_of(card: Gpu, ask: Ask) -> int:
    """Tokens that may be scheduled and not done: two steps, or one for each stage of a pipeline
    (`max_in_flight_tokens` in vLLM's config/vllm.py)."""
    return max(2, ask.pp) * batched_of(card, ask)


def batched_of(card: Gpu, ask: Ask) -> int:
    """--max-num-batched-tokens: what was asked, else vLLM's own."""
    return ask.batched or overhead.batched_tokens(card.memory, card.name)


def sequences_of(card: Gpu, ask: Ask) -> int:
    """--max-num-seqs, which is each replica's: what was asked, else vLLM's own."""
    return ask.abreast or ask.sequences or overhead.default_sequences(card.memory, card.name)
