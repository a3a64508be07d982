"""The drawn world: what a picture holds (a frozen spec), specs from a seeded generator, and specs to pixels.

Knows PIL and its built-in font, no question and no model. Sizes are pixels at `scale` 1; pebble's canvases are
multiples of 28, so that its processor need not resize them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from .words import BACKGROUNDS, BARS, COLOURS, FIELDS, MOVES, PRINTED, SHAPES, TITLES

Canvas = tuple[int, int]  # width, height
# Two sets, so that a batch of training pictures shares one canvas and none is mostly blank.
SMALL: tuple[Canvas, ...] = ((112, 112), (140, 112), (112, 140), (140, 140), (168, 112))
LARGE: tuple[Canvas, ...] = ((168, 168), (196, 168), (168, 196), (224, 168), (168, 224), (196, 196), (224, 224))


@dataclass(frozen=True)
class Shape:
    """One shape in one of nine cells (reading order). `jitter` moves it, in percent of the cell."""

    kind: str
    colour: str
    size: str
    cell: int
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """Shapes on a background, in reading order, at most one a cell."""

    shapes: tuple[Shape, ...]
    background: str
    canvas: Canvas = (112, 112)


@dataclass(frozen=True)
class Card:
    """One or two printed words or numbers, below each other: (text, colour)."""

    lines: tuple[tuple[str, str], ...]
    background: str
    canvas: Canvas = (112, 112)
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Chart:
    """Bars A, B, ...: (value 1 to 9, colour). The value is printed above its bar; no two are equal."""

    bars: tuple[tuple[int, str], ...]
    background: str
    canvas: Canvas = (168, 168)
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Document:
    """A title and printed lines `key: value`."""

    title: str
    fields: tuple[tuple[str, str], ...]
    background: str
    canvas: Canvas = (168, 168)
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Clip:
    """Four frames of one shape that moves, or does not. `jitter` is its start, in percent of the free way."""

    kind: str
    colour: str
    size: str
    move: str
    background: str
    canvas: Canvas = (112, 112)
    jitter: tuple[int, int] = (0, 0)


Spec = Scene | Card | Chart | Document | Clip


def content(spec: Spec) -> str:
    """What a picture says, without where exactly or how large it is drawn: the key that splits are made by."""
    if isinstance(spec, Scene):
        plain = tuple(replace(shape, jitter=(0, 0)) for shape in spec.shapes)
        return repr(replace(spec, shapes=plain, canvas=(0, 0)))
    return repr(replace(spec, canvas=(0, 0), jitter=(0, 0)))


def _jitter(rng: Random) -> tuple[int, int]:
    return rng.randint(-100, 100), rng.randint(-100, 100)


def scene(rng: Random, canvas: Canvas, *, most: int = 6) -> Scene:
    """One to `most` shapes; half of the scenes use few kinds and colours, so that there is something to count."""
    count = rng.randint(1, most)
    kinds, colours = list(SHAPES), list(COLOURS)
    if rng.random() < 0.5:
        kinds, colours = rng.sample(kinds, 2), rng.sample(colours, 2)
    sizes = ("large", "small")
    shapes = tuple(
        Shape(rng.choice(kinds), rng.choice(colours), rng.choice(sizes), cell, _jitter(rng))
        for cell in sorted(rng.sample(range(9), count))
    )
    return Scene(shapes, rng.choice(list(BACKGROUNDS)), canvas)


def card(rng: Random, canvas: Canvas) -> Card:
    """One or two lines, each a word of the closed list or a number of one to four digits."""
    lines = []
    for _ in range(rng.randint(1, 2)):
        text = rng.choice(PRINTED) if rng.random() < 0.55 else _number(rng, 4)
        lines.append((text, rng.choice(list(COLOURS))))
    return Card(tuple(lines), rng.choice(list(BACKGROUNDS)), canvas, _jitter(rng))


def chart(rng: Random, canvas: Canvas) -> Chart:
    """Three to five bars of different heights."""
    values = rng.sample(range(1, 10), rng.randint(3, len(BARS)))
    bars = tuple((value, rng.choice(list(COLOURS))) for value in values)
    return Chart(bars, rng.choice(("white", "cream")), canvas, _jitter(rng))


def document(rng: Random, canvas: Canvas) -> Document:
    """Two to four fields under a title."""
    fields = []
    for key in rng.sample(list(FIELDS), rng.randint(2, 4)):
        values = FIELDS[key]
        fields.append((key, rng.choice(values) if values else _number(rng, 3)))
    return Document(rng.choice(list(TITLES)), tuple(fields), rng.choice(("white", "cream")), canvas, _jitter(rng))


def clip(rng: Random, canvas: Canvas) -> Clip:
    """One shape and its way."""
    kind, colour, move = rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(MOVES))
    background = rng.choice(list(BACKGROUNDS))
    return Clip(kind, colour, rng.choice(("large", "small")), move, background, canvas, _jitter(rng))


def _number(rng: Random, digits: int) -> str:
    length = rng.randint(1, digits)
    return str(rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1))


def picture(spec: Spec, *, scale: float = 1.0) -> Image.Image:
    """Draw one spec as an RGB picture of its canvas times `scale`; of a clip, the first frame."""
    width, height = round(spec.canvas[0] * scale), round(spec.canvas[1] * scale)
    image = Image.new("RGB", (width, height), BACKGROUNDS[spec.background][1])
    pen = ImageDraw.Draw(image)
    if isinstance(spec, Clip):
        _clip(pen, spec, width, height, 0)
    else:
        _DRAW[type(spec)](pen, spec, width, height)
    return image


def frames(spec: Clip, *, scale: float = 1.0) -> tuple[Image.Image, ...]:
    """The four frames of a clip, first to last."""
    width, height = round(spec.canvas[0] * scale), round(spec.canvas[1] * scale)
    drawn = []
    for step in range(4):
        image = Image.new("RGB", (width, height), BACKGROUNDS[spec.background][1])
        _clip(ImageDraw.Draw(image), spec, width, height, step)
        drawn.append(image)
    return tuple(drawn)


def _scene(pen: ImageDraw.ImageDraw, spec: Scene, width: int, height: int) -> None:
    for shape in spec.shapes:
        row, column = divmod(shape.cell, 3)
        radius = min(width, height) / 6 * (0.86 if shape.size == "large" else 0.5)
        room = 0.1  # of the cell: a shape stays where its place says it is
        x = width / 3 * (column + 0.5 + room * shape.jitter[0] / 100)
        y = height / 3 * (row + 0.5 + room * shape.jitter[1] / 100)
        _shape(pen, shape.kind, COLOURS[shape.colour][1], x, y, radius)


def _clip(pen: ImageDraw.ImageDraw, spec: Clip, width: int, height: int, step: int) -> None:
    dx, dy, *_ = MOVES[spec.move]
    radius = min(width, height) / 6 * (0.86 if spec.size == "large" else 0.5)
    way = 0.17 * min(width, height)  # pixels from one frame to the next
    x = width / 2 + dx * way * (step - 1.5) + (1 - abs(dx)) * spec.jitter[0] / 100 * (width / 2 - radius - 2)
    y = height / 2 + dy * way * (step - 1.5) + (1 - abs(dy)) * spec.jitter[1] / 100 * (height / 2 - radius - 2)
    _shape(pen, spec.kind, COLOURS[spec.colour][1], x, y, radius)


def _shape(pen: ImageDraw.ImageDraw, kind: str, fill: tuple[int, int, int], x: float, y: float, r: float) -> None:
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif kind == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.38)))
    elif kind == "square":
        pen.rectangle((x - r * 0.84, y - r * 0.84, x + r * 0.84, y + r * 0.84), fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=fill)
    elif kind == "diamond":
        pen.polygon([(x, y - r), (x + r * 0.75, y), (x, y + r), (x - r * 0.75, y)], fill=fill)
    elif kind == "cross":
        arm = r * 0.34
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:  # star
        turn = [(r if i % 2 == 0 else r * 0.42, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        pen.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for d, a in turn], fill=fill)


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(text: str, size: float, room: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The built-in font at `size` pixels, or as much smaller as `text` needs to be at most `room` pixels wide."""
    font = _font(round(size))
    wide = font.getlength(text)
    return font if wide <= room else _font(max(6, int(size * room / wide)))


def _card(pen: ImageDraw.ImageDraw, spec: Card, width: int, height: int) -> None:
    for line, (text, colour) in enumerate(spec.lines):
        font = _fit(text, 0.24 * min(width, height), 0.9 * width)
        x = width / 2 + spec.jitter[0] / 100 * max(0.0, width * 0.46 - font.getlength(text) / 2)
        y = height * (line + 0.5) / len(spec.lines) + spec.jitter[1] / 100 * height * 0.08
        pen.text((x, y), text, fill=COLOURS[colour][1], font=font, anchor="mm")


def _chart(pen: ImageDraw.ImageDraw, spec: Chart, width: int, height: int) -> None:
    text = _font(round(0.1 * min(width, height)))
    foot = height * (0.86 + spec.jitter[1] / 100 * 0.02)
    unit = height * 0.68 / 9
    slot = width * 0.9 / len(spec.bars)
    left = width * 0.05 + spec.jitter[0] / 100 * width * 0.02
    pen.line((left, foot, left + width * 0.9, foot), fill=(60, 60, 60), width=max(1, height // 112))
    for i, (value, colour) in enumerate(spec.bars):
        x = left + slot * (i + 0.5)
        pen.rectangle((x - slot * 0.3, foot - value * unit, x + slot * 0.3, foot - 1), fill=COLOURS[colour][1])
        pen.text((x, foot - value * unit - 3), str(value), fill=(20, 20, 20), font=text, anchor="ms")
        pen.text((x, foot + 2), BARS[i], fill=(20, 20, 20), font=text, anchor="mt")


def _document(pen: ImageDraw.ImageDraw, spec: Document, width: int, height: int) -> None:
    gap = height * 0.19
    x, y = width * (0.06 + spec.jitter[0] / 100 * 0.03), height * (0.03 + spec.jitter[1] / 100 * 0.02)
    size = 0.125 * min(width, height)
    pen.text((x, y), spec.title.upper(), fill=(20, 20, 20), font=_font(round(size)))
    pen.line((x, y + gap * 0.9, width - x, y + gap * 0.9), fill=(90, 90, 90), width=max(1, height // 112))
    for i, (key, value) in enumerate(spec.fields):
        line = f"{key}: {value}"
        pen.text((x, y + gap * (i + 1.1)), line, fill=(20, 20, 20), font=_fit(line, size, width - 1.5 * x))


_DRAW: dict[type, Callable] = {Scene: _scene, Card: _card, Chart: _chart, Document: _document}
