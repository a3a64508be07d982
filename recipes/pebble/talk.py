"""Text-only questions about the same closed world, with one right answer each, in English and Chinese.

There are no pixels here: small talk, sums, facts, lists, a picture imagined from words, and questions about a picture
that was not sent.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from . import absent, questions
from .draw import card, chart, document, scene
from .phrases import describe, joined, noun, plural, shapes_told
from .words import BACKGROUNDS, COLOURS, NAMES, NUMBERS_ZH, ORDINALS, PRINTED, SHAPES

Asked = tuple[str, str]

# question, answer; English then Chinese
TALK = (
    (
        ("Hello!", "Hi!", "Good morning!"),
        "Hello! How can I help you?",
        ("你好！", "您好！", "早上好！"),
        "你好！有什么可以帮你？",
    ),
    (
        ("Who are you?", "What is your name?", "What are you?"),
        "I am Pebble, a small model that looks at pictures.",
        ("你是谁？", "你叫什么名字？", "请介绍一下你自己。"),
        "我是 Pebble，一个会看图的小模型。",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        "I can describe shapes, read words and numbers, and answer questions about charts and documents.",
        ("你能做什么？", "你会什么？", "你能帮我什么？"),
        "我可以描述形状，读出单词和数字，回答关于图表和单据的问题。",
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much!"),
        "You are welcome!",
        ("谢谢！", "谢谢你！", "非常感谢！"),
        "不客气！",
    ),
    (("Goodbye!", "Bye!", "See you!"), "Goodbye! See you soon.", ("再见！", "拜拜！", "下次见！"), "再见！"),
)
FACTS = (
    ("How many sides does a triangle have?", "A triangle has three sides.", "三角形有几条边？", "三角形有三条边。"),
    ("How many sides does a square have?", "A square has four sides.", "正方形有几条边？", "正方形有四条边。"),
    ("How many sides does a diamond have?", "A diamond has four sides.", "菱形有几条边？", "菱形有四条边。"),
    ("How many points does a star have?", "The star has five points.", "星形有几个角？", "星形有五个角。"),
    ("What do red and yellow make?", "Red and yellow make orange.", "红色加黄色是什么颜色？", "红色加黄色是橙色。"),
    ("What do blue and yellow make?", "Blue and yellow make green.", "蓝色加黄色是什么颜色？", "蓝色加黄色是绿色。"),
    ("What do red and blue make?", "Red and blue make purple.", "红色加蓝色是什么颜色？", "红色加蓝色是紫色。"),
    ("What do red and white make?", "Red and white make pink.", "红色加白色是什么颜色？", "红色加白色是粉色。"),
    ("What is the opposite of left?", "The opposite of left is right.", "左的反义词是什么？", "左的反义词是右。"),
    ("What is the opposite of up?", "The opposite of up is down.", "上的反义词是什么？", "上的反义词是下。"),
    ("What is the opposite of large?", "The opposite of large is small.", "大的反义词是什么？", "大的反义词是小。"),
    ("Which colour is the snow?", "Snow is white.", "雪是什么颜色的？", "雪是白色的。"),
    ("Which colour is the night?", "The night is black.", "夜晚是什么颜色的？", "夜晚是黑色的。"),
    ("Which colour is a lemon?", "A lemon is yellow.", "柠檬是什么颜色的？", "柠檬是黄色的。"),
)
POLITE = ("{0}", "{0}", "Please tell me: {0}", "One question: {0}", "{0} Answer briefly.", "I want to know: {0}")
POLITE_ZH = ("{0}", "{0}", "请告诉我：{0}", "问一下：{0}", "{0}请简短回答。", "我想知道：{0}")


def small_talk(rng: Random, zh: bool) -> Asked:
    """Greetings, thanks, who and what."""
    if rng.random() < 0.4:
        name = rng.choice(NAMES)
        if zh:
            question = rng.choice(("你好，我是{0}。", "您好，我叫{0}。", "我的名字是{0}。")).format(name)
            return question, f"你好，{name}！有什么可以帮你？"
        question = rng.choice(("Hello, I am {0}.", "Hi, my name is {0}.", "My name is {0}.")).format(name)
        return question, f"Hello, {name}! How can I help you?"
    english, answer, chinese, answer_zh = rng.choice(TALK)
    return _polite(rng.choice(chinese if zh else english), rng, zh), answer_zh if zh else answer


def fact(rng: Random, zh: bool) -> Asked:
    """One of a short list of facts."""
    question, answer, question_zh, answer_zh = rng.choice(FACTS)
    return _polite(question_zh if zh else question, rng, zh), answer_zh if zh else answer


def total(rng: Random, zh: bool) -> Asked:
    """Sums and differences within 20, bare or told as shapes."""
    x, y = rng.randint(0, 10), rng.randint(0, 10)
    way = rng.random()
    if way < 0.35:
        if zh:
            return _polite(
                rng.choice(("{0}加{1}是多少？", "{0}加{1}等于几？")).format(x, y), rng, zh
            ), f"{x}加{y}是{x + y}。"
        question = rng.choice(("What is {0} plus {1}?", "How much is {0} plus {1}?")).format(x, y)
        return _polite(question, rng, zh), f"{x} plus {y} is {x + y}."
    if way < 0.6:
        x, y = x + y, y
        if zh:
            return _polite(
                rng.choice(("{0}减{1}是多少？", "{0}减{1}等于几？")).format(x, y), rng, zh
            ), f"{x}减{y}是{x - y}。"
        question = rng.choice(("What is {0} minus {1}?", "How much is {0} minus {1}?")).format(x, y)
        return _polite(question, rng, zh), f"{x} minus {y} is {x - y}."
    kinds, tint = rng.sample(list(SHAPES), 2), rng.choice(list(COLOURS))
    x, y = x + 1, y + 1
    if zh:
        told = f"我有{x}个{noun(kinds[0], tint, zh=True)}和{y}个{noun(kinds[1], tint, zh=True)}。一共有几个形状？"
        return told, f"一共有{x + y}个形状。"
    one, other = (f"{n} {tint} {kind if n == 1 else plural(kind)}" for n, kind in zip((x, y), kinds, strict=True))
    return f"I have {one} and {other}. How many shapes do I have?", f"You have {x + y} shapes."


def larger(rng: Random, zh: bool) -> Asked:
    """The larger of two numbers."""
    x, y = rng.sample(range(100), 2)
    if zh:
        return rng.choice(("{0}和{1}哪个大？", "哪个数更大，{0}还是{1}？")).format(x, y), f"{max(x, y)}更大。"
    question = rng.choice(("Which is larger, {0} or {1}?", "Which number is larger: {0} or {1}?")).format(x, y)
    return question, f"{max(x, y)} is larger."


def listed(rng: Random, zh: bool) -> Asked:
    """One word of a list by its place, or how many words there are."""
    words = rng.sample(PRINTED, rng.randint(2, 4))
    i = rng.randrange(len(words))
    nth, nth_zh = ORDINALS[i]
    shown = "、".join(words) if zh else ", ".join(words)
    if rng.random() < 0.25:
        if zh:
            return f"{shown}。这里有几个单词？", f"这里有{NUMBERS_ZH[len(words)]}个单词。"
        return f"How many words are these: {shown}?", f"These are {('two', 'three', 'four')[len(words) - 2]} words."
    if zh:
        return f"{shown}。{nth_zh}个单词是什么？", f"{nth_zh}个单词是“{words[i]}”。"
    question = rng.choice(("The list is: {0}. What is the {1} word?", "What is the {1} word of: {0}?"))
    return question.format(shown, nth), f'The {nth} word is "{words[i]}".'


def imagined(rng: Random, zh: bool) -> Asked:
    """A picture told in words, described as if it were seen."""
    spec = scene(rng, (112, 112), most=3)
    told, ground = shapes_told(spec.shapes, zh=zh), spec.background
    if zh:
        return f"想象一张{BACKGROUNDS[ground][0]}背景的图：{told}。请描述它。", describe(spec, zh=True)
    return f"Imagine a {ground} picture with {told}. Describe it.", describe(spec, zh=False)


def repeated(rng: Random, zh: bool) -> Asked:
    """Words said again, joined into a sentence."""
    words = rng.sample(PRINTED, rng.randint(1, 3))
    if zh:
        return f"请重复：{'、'.join(words)}。", f"{'、'.join(words)}。"
    return f"Please repeat: {joined(words, zh=False)}.", f"{joined(words, zh=False)}."


def blind(rng: Random, zh: bool) -> Asked:
    """A question about a picture that was not sent."""
    answer = "There is no picture here. Please send me a picture."
    while True:
        draws, asks = rng.choice(SEEN)
        asked = rng.choice(asks)(draws(rng, (112, 112)), rng, zh)
        if asked:
            return _polite(asked[0], rng, zh), "这里没有图片，请发一张图片给我。" if zh else answer


def _polite(question: str, rng: Random, zh: bool) -> str:
    return rng.choice(POLITE_ZH if zh else POLITE).format(question)


# what `blind` asks about things it does not draw
SEEN: tuple[tuple[Callable[..., Any], tuple[Callable[..., Any], ...]], ...] = (
    (scene, (questions.colour, questions.shape, questions.count, questions.position, absent.refusal)),
    (scene, (questions.described,)),
    (card, (questions.word, questions.digits, questions.described)),
    (chart, (questions.chart,)),
    (document, (questions.document,)),
)
ALL = (small_talk, fact, total, total, larger, listed, listed, imagined, imagined, repeated, blind)


def text(rng: Random, zh: bool) -> Asked:
    """Any text-only question."""
    return rng.choice(ALL)(rng, zh)
