"""Samples of the closed world by task and split: pictures, questions and right answers as chat messages.

Splits are disjoint by construction: what a picture says (or a text, where there is no picture) is hashed, the hash
says its split, and whatever falls into another split is thrown away. Knows no tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

from ..samples import Sample
from . import absent, draw, questions, several, talk
from .draw import Canvas, Clip, Spec

# of 20 buckets: the test split has the first, calibration the second, training the rest
SPLITS = {"test": range(1), "calibration": range(1, 2), "train": range(2, 20)}

MAKERS: dict[str, Callable[[Random, Canvas], Spec]] = {
    "scene": draw.scene,
    "card": draw.card,
    "chart": draw.chart,
    "document": draw.document,
    "clip": draw.clip,
}
CANVASES: dict[str, tuple[Canvas, ...]] = {
    "scene": draw.SMALL + draw.LARGE,
    "card": draw.SMALL + draw.LARGE,
    "clip": draw.SMALL,
    "several": draw.SMALL,
    "chart": draw.LARGE,
    "document": draw.LARGE,
    "text": draw.SMALL + draw.LARGE,
}
# task -> (what it may be asked about, how)
TASKS: dict[str, tuple[tuple[str, ...], Callable[..., tuple[str, str] | None]]] = {
    "colour": (("scene",), questions.colour),
    "shape": (("scene",), questions.shape),
    "count": (("scene",), questions.count),
    "position": (("scene",), questions.position),
    "word": (("card",), questions.word),
    "digits": (("card",), questions.digits),
    "chart": (("chart",), questions.chart),
    "document": (("document",), questions.document),
    "describe": (("scene", "card", "chart", "document"), questions.described),
    "several": (("several",), several.several),
    "refusal": (("scene", "card", "chart", "document"), absent.refusal),
    "text": (("text",), talk.text),
    "motion": (("clip",), questions.motion),
}


@dataclass(frozen=True)
class Turn:
    """One question and its one right answer."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Questions about the same pictures (none for text). A Clip is a video of four frames, the rest are images."""

    kind: str
    specs: tuple[Spec, ...]
    turns: tuple[Turn, ...]


def belongs(key: str, split: str) -> bool:
    """Whether the thing that `key` spells out is of this split."""
    bucket = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "little") % 20
    return bucket in SPLITS[split]


def _specs(kind: str, rng: Random, canvas: Canvas, split: str) -> tuple[Spec, ...]:
    if kind == "text":
        return ()
    many, found = kind == "several", []
    for _ in range(rng.randint(2, 3) if many else 1):
        while True:
            spec = draw.scene(rng, canvas, most=3) if many else MAKERS[kind](rng, canvas)
            if belongs(draw.content(spec), split):
                found.append(spec)
                break
    return tuple(found)


def _ask(task: str, specs: tuple[Spec, ...], rng: Random, zh: bool, split: str) -> tuple[str, str] | None:
    ask = TASKS[task][1]
    if task == "text":
        asked = ask(rng, zh)
        return asked if asked and belongs(asked[0], split) else None
    return ask(specs if task == "several" else specs[0], rng, zh)


def conversation(
    rng: Random, kind: str, canvas: Canvas, split: str, wanted: Sequence[str], *, zh: Sequence[bool]
) -> Conversation:
    """A picture of this kind and one turn for each task in `wanted`, in the languages of `zh` (same length).

    Pictures that give no such question are drawn anew; `wanted` must be askable about `kind`.
    """
    while True:
        specs, turns = _specs(kind, rng, canvas, split), []
        for task, chinese in zip(wanted, zh, strict=True):
            for _ in range(60 if task == "text" else 3):
                asked = _ask(task, specs, rng, chinese, split)
                if asked and asked[0] not in [turn.question for turn in turns]:
                    turns.append(Turn(task, *asked))
                    break
        if turns and turns[-1].task == wanted[-1]:
            return Conversation(kind, specs, tuple(turns))


def sample(spoken: Conversation, *, size: int | None = None) -> Sample:
    """Draw a conversation. `size` is the longer side of each picture in pixels; None keeps pebble's own canvas."""
    images, videos = [], []
    for spec in spoken.specs:
        scale = size / max(spec.canvas) if size else 1.0
        if isinstance(spec, Clip):
            videos.append(draw.frames(spec, scale=scale))
        else:
            images.append(draw.picture(spec, scale=scale))
    places = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages: list[dict[str, Any]] = []
    for turn in spoken.turns:
        text = {"type": "text", "text": turn.question}
        messages.append({"role": "user", "content": [*places, text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        places = []
    return Sample(messages, tuple(images), tuple(videos), spoken.turns[-1].task)


def samples(
    split: str,
    count: int,
    *,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    turns: int = 1,
    size: int | None = None,
) -> Iterator[Sample]:
    """`count` samples of a split, tasks and languages in turn; the same arguments give the same bytes.

    With `turns` > 1 up to that many questions are asked about a picture; a sample's task is its last question's.
    ValueError on an unknown split or task.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    chosen = list(tasks or TASKS)
    for task in chosen:
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    for i in range(count):
        rng = Random(f"{split} {seed} {i}")
        task, zh = chosen[i % len(chosen)], i // len(chosen) % 2 == 1
        kind = rng.choice(TASKS[task][0])
        before = [other for other in TASKS if kind in TASKS[other][0]]
        wanted = [rng.choice(before) for _ in range(rng.randint(1, turns) - 1)] + [task]
        spoken = conversation(rng, kind, rng.choice(CANVASES[kind]), split, wanted, zh=[zh] * len(wanted))
        yield sample(spoken, size=size)


def exact(sample: Sample, text: str) -> bool:
    """Whether `text` is the sample's answer, white space aside."""
    return sample.answer is not None and " ".join(text.split()) == " ".join(sample.answer.split())
