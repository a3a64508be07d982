"""Training batches: many conversations about pictures of one canvas, as tensors; batch `index` is always the same.

Made in worker processes, so it imports torch only to hand arrays over. Knows the tokens, not the network.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from . import draw
from .checkpoint import MERGE, PATCH
from .draw import Canvas, Clip
from .network import positions
from .tasks import TASKS, Conversation, conversation

# kind -> (share of a batch on small canvases, on large ones, tasks by weight)
SHARES: dict[str, tuple[float, float, dict[str, float]]] = {
    "scene": (0.5, 0.5, {"colour": 1.2, "shape": 0.8, "count": 2, "position": 3, "describe": 0.6, "refusal": 1.2}),
    "card": (0.1, 0.08, {"word": 1.5, "digits": 1.5, "describe": 0.8, "refusal": 0.7}),
    "several": (0.24, 0.0, {"several": 1}),
    "clip": (0.06, 0.0, {"motion": 1}),
    "chart": (0.0, 0.12, {"chart": 3, "describe": 0.8, "refusal": 0.6}),
    "document": (0.0, 0.2, {"document": 3, "describe": 1, "refusal": 0.6}),
    "text": (0.1, 0.1, {"text": 1}),
}
LENGTHS = (192, 224)  # tokens a row, on small and on large canvases
SYSTEM = (
    "You are a helpful assistant.",
    "You are Pebble.",
    "Answer the question about the picture.",
    "你是一个有用的助手。",
    "请回答关于图片的问题。",
)
NAMES = tuple(TASKS)


@lru_cache(maxsize=1)
def _words(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def render(spoken: Conversation, cells: int, *, system: str | None = None, last: bool = False) -> list[tuple[str, str]]:
    """The chat template's text of each turn as (prompt, answer), placeholders already one a visual token (`cells`).

    `last`: the picture stands after the first question instead of before it.
    """
    shown = ""
    for spec in spoken.specs:
        pad, times = ("<|video_pad|>", 2) if isinstance(spec, Clip) else ("<|image_pad|>", 1)
        shown += "<|vision_start|>" + pad * cells * times + "<|vision_end|>"
    out = []
    for i, turn in enumerate(spoken.turns):
        text = turn.question if i else turn.question + shown if last else shown + turn.question
        before = f"<|im_start|>system\n{system}<|im_end|>\n" if system and not i else ""
        out.append((f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", f"{turn.answer}<|im_end|>"))
    return out


def pixels(spoken: Conversation, *, scale: int = 1) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Frames [H, W, 3] and which two of them make each picture; drawn `scale` times as large and shrunk again."""
    frames, pairs = [], []
    for spec in spoken.specs:
        drawn = draw.frames(spec, scale=scale) if isinstance(spec, Clip) else (draw.picture(spec, scale=scale),)
        if scale != 1:
            drawn = tuple(image.resize(spec.canvas, Image.Resampling.BICUBIC) for image in drawn)
        start = len(frames)
        frames += [np.asarray(image) for image in drawn]
        pairs += [(start, start + 1), (start + 2, start + 3)] if isinstance(spec, Clip) else [(start, start)]
    return frames, pairs


def stacked(frames: list[np.ndarray], pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Frames and pairs as the tensors `network.logits` takes."""
    import torch

    return {"frames": torch.from_numpy(np.stack(frames)), "pairs": torch.tensor(pairs).reshape(-1, 2)}


def batch(index: int, *, seed: int, rows: int, tokenizer: Path | str, split: str = "train") -> dict[str, Any]:
    """Batch number `index` of a seed: even ones on a small canvas, odd ones on a large one. See `network.logits`.

    Beside its tensors: labels, the token after each `at`; answer, which answer each label is of; task, an answer's task
    as an index into NAMES.
    """
    import torch

    rng, large = Random(f"{split} batch {seed} {index}"), index % 2
    canvas: Canvas = rng.choice(draw.LARGE if large else draw.SMALL)
    kinds = rng.choices(list(SHARES), [share[1] if large else share[0] for share in SHARES.values()], k=rows)
    cells = canvas[0] * canvas[1] // (PATCH * MERGE) ** 2
    spoken, texts = [], []
    for kind in kinds:
        weights = SHARES[kind][2]
        wanted = rng.choices(list(weights), list(weights.values()), k=rng.choice((1, 4, 6, 8)))
        chinese = rng.random() < 0.5
        zh = [chinese if rng.random() < 0.9 else not chinese for _ in wanted]
        said = conversation(rng, kind, canvas, split, wanted, zh=zh)
        system = rng.choice(SYSTEM) if rng.random() < 0.15 else None
        spoken.append(said)
        texts.append(render(said, cells, system=system, last=rng.random() < 0.15))
    words = _words(str(tokenizer))
    flat = words.encode_batch([part for turns in texts for turn in turns for part in turn], add_special_tokens=False)
    encoded = iter(flat)
    newline = words.encode("\n", add_special_tokens=False).ids
    pads = tuple(words.token_to_id(t) for t in ("<|image_pad|>", "<|video_pad|>"))
    length = LENGTHS[large]
    ids = np.full((rows, length), words.token_to_id("<|endoftext|>"), np.int64)
    places = np.zeros((3, rows, length), np.int64)
    at, labels, answer, task, seen = [], [], [], [], []
    frames, pairs = [], []
    for row, (said, turns) in enumerate(zip(spoken, texts, strict=True)):
        line: list[int] = []
        for i in range(len(turns)):
            asked, answered = next(encoded).ids, next(encoded).ids
            if len(line) + len(asked) + len(answered) + len(newline) > length:
                for _ in range(2 * (len(turns) - i - 1)):  # no room: the rest of this conversation is dropped
                    next(encoded)
                break
            start = row * length + len(line) + len(asked)
            at += range(start - 1, start - 1 + len(answered))
            labels += answered
            answer += [len(task)] * len(answered)
            task.append(NAMES.index(said.turns[i].task))
            line += asked + answered + newline
        if not line:  # the first turn alone was too long: the row stays empty
            continue
        ids[row, : len(line)] = line
        grid = (canvas[1] // (PATCH * MERGE), canvas[0] // (PATCH * MERGE))
        grids = [(2 if isinstance(spec, Clip) else 1, *grid) for spec in said.specs]
        places[:, row, : len(line)] = positions(ids[row, : len(line)], grids, pads)
        seen.append(row * length + np.flatnonzero(np.isin(ids[row, : len(line)], pads)))
        shown, paired = pixels(said, scale=2 if rng.random() < 0.15 else 1)  # real pictures are mostly shrunk
        pairs += [(len(frames) + one, len(frames) + two) for one, two in paired]
        frames += shown
    arrays = {
        "ids": ids,
        "places": places,
        "seen": np.concatenate(seen),
        **{"at": np.array(at), "labels": np.array(labels), "answer": np.array(answer), "task": np.array(task)},
    }
    return {**stacked(frames, pairs), **{name: torch.from_numpy(array) for name, array in arrays.items()}}
