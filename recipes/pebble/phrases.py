"""How the closed world is put into words: names, counts, lists and whole descriptions, in English and Chinese.

A description is a function of the picture alone (canonical order, one wording), so that it can be scored by equality.
"""

from __future__ import annotations

from .draw import Card, Chart, Clip, Document, Scene, Shape, Spec
from .words import (
    BACKGROUNDS,
    BARS,
    COLOURS,
    FIELDS_ZH,
    MOVES,
    NUMBERS,
    NUMBERS_ZH,
    PLACES,
    SHAPES,
    SIZES,
    TITLES,
)


def plural(kind: str) -> str:
    """'crosses' for 'cross', 'circles' for 'circle'."""
    return kind + ("es" if kind.endswith("s") else "s")


def a(noun: str) -> str:
    """The noun with its article: 'an orange star'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def joined(parts: list[str], *, zh: bool) -> str:
    """'x, y and z', or 'x，y，z' in Chinese."""
    if zh:
        return "，".join(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun(kind: str, colour: str | None = None, size: str | None = None, *, zh: bool) -> str:
    """'large red circle', or '大的红色圆形'."""
    if zh:
        return (SIZES[size] + "的" if size else "") + (COLOURS[colour][0] if colour else "") + SHAPES[kind]
    return " ".join(part for part in (size, colour, kind) if part)


def there_are(count: int, kind: str | None, colour: str | None, *, zh: bool) -> str:
    """'There are three red circles.' Without a kind: shapes. Zero is 'There are no red circles.'"""
    if zh:
        what = (COLOURS[colour][0] if colour else "") + (SHAPES[kind] if kind else "形状")
        return f"图中没有{what}。" if count == 0 else f"图中有{NUMBERS_ZH[count]}个{what}。"
    one = " ".join(part for part in (colour, kind or "shape") if part)
    if count == 1:
        return f"There is one {one}."
    many = " ".join(part for part in (colour, plural(kind or "shape")) if part)
    return f"There are {'no' if count == 0 else NUMBERS[count]} {many}."


def shapes_told(shapes: tuple[Shape, ...], *, zh: bool, placed: bool = True) -> str:
    """Shapes in reading order: 'a large red circle in the top left and a small blue ring in the centre'."""
    if zh:
        told = []
        for s in shapes:
            where = PLACES[s.cell][1] + "有" if placed else ""
            told.append(f"{where}一个{noun(s.kind, s.colour, s.size if placed else None, zh=True)}")
        return joined(told, zh=True)
    told = []
    for s in shapes:
        thing = a(noun(s.kind, s.colour, s.size if placed else None, zh=False))
        told.append(f"{thing} {PLACES[s.cell][0]}" if placed else thing)
    return joined(told, zh=False)


def describe(spec: Spec, *, zh: bool) -> str:
    """One or two sentences that say everything in the picture."""
    ground, ground_zh = spec.background, BACKGROUNDS[spec.background][0]
    if isinstance(spec, Scene):
        told, count = shapes_told(spec.shapes, zh=zh), len(spec.shapes)
        if zh:
            return f"图中有{NUMBERS_ZH[count]}个形状，背景是{ground_zh}的。{told}。"
        what = "one shape" if count == 1 else f"{NUMBERS[count]} shapes"
        return f"The picture shows {what} on a {ground} background. There is {told}."
    if isinstance(spec, Card):
        if zh:
            told = joined([f"{COLOURS[c][0]}的{_label(t, zh=True)}“{t}”" for t, c in spec.lines], zh=True)
            return f"图中印着{told}，背景是{ground_zh}的。"
        told = joined([f'the {_label(t, zh=False)} "{t}" in {c}' for t, c in spec.lines], zh=False)
        return f"The picture shows {told} on a {ground} background."
    if isinstance(spec, Chart):
        count = len(spec.bars)
        if zh:
            told = joined([f"{BARS[i]}的值是{v}" for i, (v, _) in enumerate(spec.bars)], zh=True)
            return f"这是一张柱状图，有{NUMBERS_ZH[count]}个柱子。{told}。"
        told = joined([f"the value of {BARS[i]} is {v}" for i, (v, _) in enumerate(spec.bars)], zh=False)
        return f"This is a bar chart with {NUMBERS[count]} bars. T{told[1:]}."
    if isinstance(spec, Document):
        if zh:
            told = joined([f"{FIELDS_ZH[k]}是{v}" for k, v in spec.fields], zh=True)
            return f"这是一张{TITLES[spec.title]}。{told}。"
        told = joined([f"the {k.lower()} is {v}" for k, v in spec.fields], zh=False)
        return f"This is {a(spec.title.lower())}. T{told[1:]}."
    return moves(spec, zh=zh)


def moves(spec: Clip, *, zh: bool) -> str:
    """'The red circle moves up.'"""
    thing = noun(spec.kind, spec.colour, zh=zh)
    return f"{thing}{MOVES[spec.move][3]}。" if zh else f"The {thing} {MOVES[spec.move][2]}."


def _label(text: str, *, zh: bool) -> str:
    if zh:
        return "数字" if text.isdigit() else "单词"
    return "number" if text.isdigit() else "word"
