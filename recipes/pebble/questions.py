"""Questions about a picture and their one right answer, in English and Chinese, several phrasings each.

Every function takes a spec, a generator and the language and returns (question, answer), or None where this picture
gives no such question (two circles: no "the circle"). Knows no pixel and no split.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from .draw import Card, Chart, Clip, Document, Scene, Shape, Spec
from .phrases import a, describe, joined, moves, noun, plural, there_are
from .words import BARS, COLOURS, FIELDS_ZH, NUMBERS, NUMBERS_ZH, PLACES, SHAPES, TITLES

Asked = tuple[str, str] | None


def pick(rng: Random, zh: bool, english: tuple[str, ...], chinese: tuple[str, ...]) -> str:
    """One of the phrasings in the wanted language."""
    return rng.choice(chinese if zh else english)


def alone(scene: Scene) -> list[Shape]:
    """The shapes whose kind no other shape of the scene has."""
    kinds = Counter(shape.kind for shape in scene.shapes)
    return [shape for shape in scene.shapes if kinds[shape.kind] == 1]


def _pairs(scene: Scene) -> list[Shape]:
    """The shapes whose kind and colour together are theirs alone."""
    pairs = Counter((shape.kind, shape.colour) for shape in scene.shapes)
    return [shape for shape in scene.shapes if pairs[shape.kind, shape.colour] == 1]


def colour(scene: Scene, rng: Random, zh: bool) -> Asked:
    """The colour of the only circle, or of the shape at a place."""
    if rng.random() < 0.5 and alone(scene):
        shape = rng.choice(alone(scene))
        thing = noun(shape.kind, zh=zh)
        english = ("What colour is the {0}?", "Which colour does the {0} have?", "Tell me the colour of the {0}.")
        chinese = ("{0}是什么颜色？", "{0}的颜色是什么？", "请问{0}是什么颜色的？")
    else:
        shape = rng.choice(scene.shapes)
        place, place_zh = PLACES[shape.cell]
        thing = f"{place_zh}的形状" if zh else f"shape {place}"
        english = ("What colour is the {0}?", "Which colour does the {0} have?")
        chinese = ("{0}是什么颜色？", "{0}的颜色是什么？")
    question = rng.choice(chinese if zh else english).format(thing)
    return question, f"{thing}是{COLOURS[shape.colour][0]}的。" if zh else f"The {thing} is {shape.colour}."


def shape(scene: Scene, rng: Random, zh: bool) -> Asked:
    """The kind of the only red shape, or of the shape at a place."""
    colours = Counter(one.colour for one in scene.shapes)
    unique = [one for one in scene.shapes if colours[one.colour] == 1]
    if rng.random() < 0.5 and unique:
        one = rng.choice(unique)
        thing = f"{COLOURS[one.colour][0]}的形状" if zh else f"{one.colour} shape"
        english = ("What is the {0}?", "Which shape is {1}?", "What kind of shape is the {0}?")
        chinese = ("{0}是什么？", "什么形状是{1}的？", "请问{0}是什么形状？")
        question = rng.choice(chinese if zh else english).format(thing, COLOURS[one.colour][0] if zh else one.colour)
    else:
        one = rng.choice(scene.shapes)
        place, place_zh = PLACES[one.cell]
        thing = f"{place_zh}的形状" if zh else f"shape {place}"
        english = ("What is the {0}?", "What kind of shape is the {0}?")
        chinese = ("{0}是什么？", "请问{0}是什么？")
        question = rng.choice(chinese if zh else english).format(thing)
    return question, f"{thing}是{SHAPES[one.kind]}。" if zh else f"The {thing} is {a(one.kind)}."


def count(scene: Scene, rng: Random, zh: bool) -> Asked:
    """How many shapes, circles, red shapes or red circles there are."""
    one, way = rng.choice(scene.shapes), rng.choice(("all", "kind", "kind", "colour", "colour", "both"))
    kind = one.kind if way in ("kind", "both") else None
    tint = one.colour if way in ("colour", "both") else None
    if rng.random() < 0.1 and way != "all":  # now and then something that is not there
        kind, tint = kind and rng.choice(list(SHAPES)), tint and rng.choice(list(COLOURS))
    number = sum(kind in (None, s.kind) and tint in (None, s.colour) for s in scene.shapes)
    if zh:
        thing = (COLOURS[tint][0] if tint else "") + (SHAPES[kind] if kind else "形状")
    else:
        thing = " ".join(part for part in (tint, plural(kind or "shape")) if part)
    english = ("How many {0} are there?", "How many {0} do you see?", "Count the {0}.")
    chinese = ("图中有几个{0}？", "有多少个{0}？", "数一数{0}有几个。")
    return rng.choice(chinese if zh else english).format(thing), there_are(number, kind, tint, zh=zh)


def position(scene: Scene, rng: Random, zh: bool) -> Asked:
    """Where a shape is, or how two shapes stand to each other."""
    pairs = _pairs(scene)
    if not pairs:
        return None
    if len(pairs) > 1 and rng.random() < 0.35:
        return _relation(rng.sample(pairs, 2), rng, zh)
    if len(pairs) > 1 and rng.random() < 0.4:
        return _places(rng.sample(pairs, rng.randint(2, min(4, len(pairs)))), rng, zh)
    one = rng.choice(pairs)
    thing = noun(one.kind, one.colour, zh=zh)
    english = ("Where is the {0}?", "In which part of the picture is the {0}?", "Where do you see the {0}?")
    chinese = ("{0}在哪里？", "{0}在图的什么位置？", "请问{0}在哪儿？")
    place, place_zh = PLACES[one.cell]
    answer = f"{thing}在{place_zh}。" if zh else f"The {thing} is {place}."
    return rng.choice(chinese if zh else english).format(thing), answer


def _places(some: list[Shape], rng: Random, zh: bool) -> Asked:
    """Where each of several shapes is, in the order they were asked for."""
    things = [noun(s.kind, s.colour, zh=zh) for s in some]
    if zh:
        asked = rng.choice(("{0}分别在哪里？", "请说出{0}的位置。")).format("、".join(things))
        told = joined([f"{t}在{PLACES[s.cell][1]}" for t, s in zip(things, some, strict=True)], zh=True)
        return asked, f"{told}。"
    asked = rng.choice(("Where are {0}?", "Tell me where {0} are.")).format(
        joined([f"the {t}" for t in things], zh=False)
    )
    told = joined([f"the {t} is {PLACES[s.cell][0]}" for t, s in zip(things, some, strict=True)], zh=False)
    return asked, f"T{told[1:]}."


def _relation(two: list[Shape], rng: Random, zh: bool) -> Asked:
    (row, column), (row2, column2) = divmod(two[0].cell, 3), divmod(two[1].cell, 3)
    one, other = (noun(s.kind, s.colour, zh=zh) for s in two)
    across = ("to the left of", "to the right of", "的左边", "的右边")
    along = ("above", "below", "的上面", "的下面")
    if column != column2 and (row == row2 or rng.random() < 0.5):
        words, first = across, column < column2
    else:
        words, first = along, row < row2
    yes = first == (rng.random() < 0.5)
    asked = words[(0 if first == yes else 1) + (2 if zh else 0)]
    (place, place_zh), (place2, place2_zh) = PLACES[two[0].cell], PLACES[two[1].cell]
    if zh:
        told = f"{one}在{place_zh}，{other}在{place2_zh}，所以{'是的' if yes else '不是'}。"
        return f"{one}在{other}{asked}吗？", told
    told = f"The {one} is {place} and the {other} is {place2}, so {'yes' if yes else 'no'}."
    return f"Is the {one} {asked} the {other}?", told


def word(card: Card, rng: Random, zh: bool) -> Asked:
    """The word that is printed, or its colour."""
    return _printed(card, rng, zh, digits=False)


def digits(card: Card, rng: Random, zh: bool) -> Asked:
    """The number that is printed, or its colour."""
    return _printed(card, rng, zh, digits=True)


def _printed(card: Card, rng: Random, zh: bool, *, digits: bool) -> Asked:
    fitting = [i for i, (text, _) in enumerate(card.lines) if text.isdigit() == digits]
    if not fitting:
        return None
    line = rng.choice(fitting)
    text, tint = card.lines[line]
    thing = ("数字" if digits else "单词") if zh else ("number" if digits else "word")
    if len(fitting) == 2:
        thing = ("上面的", "下面的")[line] + thing if zh else f"{thing} {('at the top', 'at the bottom')[line]}"
    if rng.random() < 0.2:
        question = f"{thing}是什么颜色？" if zh else f"What colour is the {thing}?"
        return question, f"{thing}是{COLOURS[tint][0]}的。" if zh else f"The {thing} is {tint}."
    english = ("What is the {0}?", "Read the {0}.", "Which {1} is printed{2}?", "What {1} do you see{2}?")
    chinese = ("{0}是什么？", "请读出{0}。", "图中{0}是什么？", "{0}是多少？" if digits else "{0}写的是什么？")
    kind, _, where = thing.partition(" ")
    question = rng.choice(chinese if zh else english).format(thing, kind, f" {where}" if where else "")
    shown = text if digits else f"“{text}”" if zh else f'"{text}"'
    return question, f"{thing}是{shown}。" if zh else f"The {thing} is {shown}."


def chart(spec: Chart, rng: Random, zh: bool) -> Asked:
    """A bar's value or colour, the highest and lowest bar, how many there are."""
    way, i = rng.choice(("value", "value", "value", "most", "least", "colour", "count")), rng.randrange(len(spec.bars))
    value, tint = spec.bars[i]
    if way == "value":
        english = ("What is the value of {0}?", "How high is bar {0}?", "Which value does bar {0} have?")
        question = pick(rng, zh, english, ("{0}的值是多少？", "柱子{0}有多高？", "{0}是多少？")).format(BARS[i])
        return question, f"{BARS[i]}的值是{value}。" if zh else f"The value of {BARS[i]} is {value}."
    if way == "colour":
        question = f"柱子{BARS[i]}是什么颜色？" if zh else f"What colour is bar {BARS[i]}?"
        return question, f"柱子{BARS[i]}是{COLOURS[tint][0]}的。" if zh else f"Bar {BARS[i]} is {tint}."
    if way == "count":
        question = pick(rng, zh, ("How many bars are there?", "How many bars does the chart have?"), ("有几个柱子？",))
        number = len(spec.bars)
        return question, f"图中有{NUMBERS_ZH[number]}个柱子。" if zh else f"There are {NUMBERS[number]} bars."
    values = [bar[0] for bar in spec.bars]
    best = BARS[values.index(max(values) if way == "most" else min(values))]
    if way == "most":
        question = pick(
            rng, zh, ("Which bar is the highest?", "What is the highest bar?"), ("哪个柱子最高？", "最高的柱子是哪个？")
        )
        return question, f"最高的柱子是{best}。" if zh else f"The highest bar is {best}."
    question = pick(
        rng, zh, ("Which bar is the lowest?", "What is the lowest bar?"), ("哪个柱子最低？", "最低的柱子是哪个？")
    )
    return question, f"最低的柱子是{best}。" if zh else f"The lowest bar is {best}."


def document(spec: Document, rng: Random, zh: bool) -> Asked:
    """The value of a printed field, or what kind of document it is."""
    if rng.random() < 0.12:
        question = pick(
            rng, zh, ("What kind of document is this?", "What is this document?"), ("这是什么单据？", "这是一张什么？")
        )
        return question, f"这是一张{TITLES[spec.title]}。" if zh else f"It is {a(spec.title.lower())}."
    key, value = rng.choice(spec.fields)
    english = ("What is the {0}?", "Which {0} is printed?", "Read the {0}.", "What does it say for {1}?")
    chinese = (
        "{0}是什么？",
        "{0}是多少？" if value.isdigit() else "{0}写的是什么？",
        "请读出{0}。",
        "{1}后面写着什么？",
    )
    thing = FIELDS_ZH[key] if zh else key.lower()
    return rng.choice(chinese if zh else english).format(thing, key), (
        f"{thing}是{value}。" if zh else f"The {thing} is {value}."
    )


def described(spec: Spec, rng: Random, zh: bool) -> Asked:
    """Everything in the picture."""
    english = ("Describe the picture.", "What do you see in the picture?", "What is in this picture?", "Describe this.")
    chinese = ("请描述这张图片。", "图中有什么？", "这张图片里有什么？", "描述一下这张图。")
    return rng.choice(chinese if zh else english), describe(spec, zh=zh)


def motion(clip: Clip, rng: Random, zh: bool) -> Asked:
    """Which way the shape moves; sometimes its colour or kind."""
    way = rng.random()
    if way < 0.15:
        question = f"视频里的{SHAPES[clip.kind]}是什么颜色？" if zh else f"What colour is the {clip.kind} in the video?"
        answer = f"{SHAPES[clip.kind]}是{COLOURS[clip.colour][0]}的。" if zh else f"The {clip.kind} is {clip.colour}."
        return question, answer
    if way < 0.3:
        question = "视频里是什么形状？" if zh else "Which shape is in the video?"
        thing = noun(clip.kind, clip.colour, zh=zh)
        return question, f"视频里有一个{thing}。" if zh else f"There is {a(thing)} in the video."
    kind = SHAPES[clip.kind] if zh else clip.kind
    english = (
        "Which way does the {0} move?",
        "Where does the {0} move?",
        "What happens in the video?",
        "Describe the video.",
    )
    chinese = ("{0}向哪个方向移动？", "{0}往哪里移动？", "视频里发生了什么？", "请描述这个视频。")
    return rng.choice(chinese if zh else english).format(kind), moves(clip, zh=zh)
