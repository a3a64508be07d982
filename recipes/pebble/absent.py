"""Questions about what is not in the picture, and whether something is: the answer says so. As in `questions`."""

from __future__ import annotations

from random import Random

from .draw import Card, Chart, Document, Scene, Spec
from .phrases import a, noun
from .questions import Asked, pick
from .words import BARS, COLOURS, FIELDS, FIELDS_ZH, SHAPES


def refusal(spec: Spec, rng: Random, zh: bool) -> Asked:
    """What is not in the picture is said not to be there; half of the questions are answered yes or no."""
    if isinstance(spec, Scene):
        return _absent_shape(spec, rng, zh)
    if isinstance(spec, Card):
        has = {text.isdigit() for text, _ in spec.lines}
        if len(has) == 2:
            return None
        missing = ("数字" if False in has else "单词") if zh else ("number" if False in has else "word")
        if zh:
            return rng.choice(("图中的{0}是什么？", "请读出{0}。", "{0}是什么颜色？")).format(
                missing
            ), f"图中没有{missing}。"
        english = ("What is the {0}?", "Read the {0}.", "Which {0} is printed?", "What colour is the {0}?")
        return rng.choice(english).format(missing), f"There is no {missing} in the picture."
    if isinstance(spec, Chart):
        if len(spec.bars) == len(BARS):
            return None
        bar = rng.choice(BARS[len(spec.bars) :])
        question = pick(
            rng,
            zh,
            ("What is the value of {0}?", "What colour is bar {0}?"),
            ("{0}的值是多少？", "柱子{0}是什么颜色？"),
        )
        return question.format(bar), f"图中没有柱子{bar}。" if zh else f"There is no bar {bar} in the picture."
    if isinstance(spec, Document):
        missing = rng.choice([key for key in FIELDS if key not in dict(spec.fields)])
        thing = FIELDS_ZH[missing] if zh else missing.lower()
        english, chinese = (
            ("What is the {0}?", "Which {0} is printed?", "Read the {0}."),
            ("{0}是什么？", "请读出{0}。"),
        )
        answer = f"图中没有{thing}。" if zh else f"There is no {thing} in the picture."
        return rng.choice(chinese if zh else english).format(thing), answer
    return None


def _absent_shape(scene: Scene, rng: Random, zh: bool) -> Asked:
    there = {(s.kind, s.colour) for s in scene.shapes}
    way = rng.random()
    if way < 0.12:
        question = pick(
            rng, zh, ("What word is printed?", "Which word do you see?"), ("图中写着什么单词？", "请读出单词。")
        )
        return question, "图中没有单词。" if zh else "There is no word in the picture."
    if way < 0.4:  # a kind that is not there
        kinds = [kind for kind in SHAPES if kind not in {k for k, _ in there}]
        thing = noun(rng.choice(kinds), zh=zh)
        question = pick(rng, zh, ("What colour is the {0}?", "Where is the {0}?"), ("{0}是什么颜色？", "{0}在哪里？"))
        return question.format(thing), f"图中没有{thing}。" if zh else f"There is no {thing} in the picture."
    if way < 0.6 or rng.random() < 0.5:  # a pair that is not there, near to one that is
        kind, tint = rng.choice(sorted(there))
        if rng.random() < 0.5:
            kind = rng.choice([k for k in SHAPES if (k, tint) not in there])
        else:
            tint = rng.choice([c for c in COLOURS if (kind, c) not in there])
    else:
        kind, tint = rng.choice(sorted(there))
    thing = noun(kind, tint, zh=zh)
    no = f"图中没有{thing}。" if zh else f"There is no {thing} in the picture."
    if way < 0.6:
        return f"{thing}在哪里？" if zh else f"Where is the {thing}?", no
    question = pick(rng, zh, ("Is there {0} in the picture?", "Do you see {0}?"), ("图中有{0}吗？", "有没有{0}？"))
    question = question.format(thing if zh else a(thing))
    if (kind, tint) in there:
        return question, f"有，图中有{thing}。" if zh else f"Yes, there is {a(thing)} in the picture."
    return question, f"没有，{no}" if zh else f"No, t{no[1:]}"
