"""The bundled calibration sets: drawn documents, charts, scenes and text, disjoint from every test set.

Knows no model: `size` says how large the pictures are drawn, and the model's own processor does the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from .pebble.tasks import samples
from .samples import Sample

# three of four samples have a picture, documents and charts most of all: there the reading is finest
_ROUND = (
    *("document", "chart", "text", "describe", "position", "word", "text", "count"),
    *("document", "several", "text", "describe", "colour", "digits", "refusal", "text"),
    *("chart", "document", "describe", "shape"),
)


def drawn(count: int, *, seed: int = 0, size: int | None = None) -> list[Sample]:
    """`count` answered samples, English and Chinese by turns, three of four with pictures, one to three questions each.

    `size` is the longer side of each picture in pixels (448 suits most released models); None: pebble's own canvases.
    """
    return list(samples("calibration", count, seed=seed, tasks=_ROUND, turns=3, size=size))


def text(count: int, *, seed: int = 0, size: int | None = None) -> list[Sample]:
    """`count` answered samples without pictures, for comparison: what calibration without images costs."""
    return list(samples("calibration", count, seed=seed, tasks=("text",), turns=3))


CALIBRATIONS: dict[str, Callable[..., list[Sample]]] = {"drawn": drawn, "text": text}
