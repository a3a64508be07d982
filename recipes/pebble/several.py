"""Questions that need two or three pictures told apart. As in `questions`."""

from __future__ import annotations

from random import Random

from .draw import Scene
from .phrases import a, noun, shapes_told
from .questions import Asked, alone
from .words import COLOURS, NUMBERS, NUMBERS_ZH, ORDINALS


def several(scenes: tuple[Scene, ...], rng: Random, zh: bool) -> Asked:
    """Questions that need two or three pictures told apart."""
    way, i = rng.choice(("has", "has", "many", "most", "colour", "what")), rng.randrange(len(scenes))
    scene, (nth, nth_zh) = scenes[i], ORDINALS[i]
    if way == "has":
        one = rng.choice(scene.shapes)
        if sum(any((s.kind, s.colour) == (one.kind, one.colour) for s in each.shapes) for each in scenes) > 1:
            return None
        thing = noun(one.kind, one.colour, zh=zh)
        if zh:
            return rng.choice(("哪张图里有{0}？", "{0}在哪张图里？")).format(thing), f"{nth_zh}张图里有{thing}。"
        question = rng.choice(("Which picture has {0}?", "In which picture is there {0}?")).format(a(thing))
        return question, f"The {nth} picture has {a(thing)}."
    if way == "many":
        question = f"{nth_zh}张图里有几个形状？" if zh else f"How many shapes are in the {nth} picture?"
        number = len(scene.shapes)
        if zh:
            return question, f"{nth_zh}张图里有{NUMBERS_ZH[number]}个形状。"
        are = "is one shape" if number == 1 else f"are {NUMBERS[number]} shapes"
        return question, f"There {are} in the {nth} picture."
    if way == "most":
        numbers = [len(each.shapes) for each in scenes]
        if numbers.count(max(numbers)) > 1:
            return None
        nth, nth_zh = ORDINALS[numbers.index(max(numbers))]
        if zh:
            return rng.choice(("哪张图里的形状最多？", "哪张图的形状最多？")), f"{nth_zh}张图里的形状最多。"
        return rng.choice(("Which picture has the most shapes?", "Where are the most shapes?")), (
            f"The {nth} picture has the most shapes."
        )
    if way == "colour":
        unique = alone(scene)
        if not unique:
            return None
        one = rng.choice(unique)
        kind = noun(one.kind, zh=zh)
        if zh:
            return f"{nth_zh}张图里的{kind}是什么颜色？", f"{nth_zh}张图里的{kind}是{COLOURS[one.colour][0]}的。"
        return f"What colour is the {kind} in the {nth} picture?", f"The {kind} in the {nth} picture is {one.colour}."
    told = shapes_told(scene.shapes, zh=zh, placed=False)
    if zh:
        return rng.choice(("{0}张图里有什么？", "请描述{0}张图。")).format(nth_zh), f"{nth_zh}张图里有{told}。"
    question = rng.choice(("What is in the {0} picture?", "Describe the {0} picture.")).format(nth)
    return question, f"The {nth} picture shows {told}."
