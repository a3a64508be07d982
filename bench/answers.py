"""Answers side by side: held-out samples with pictures, put to each variant's running server, greedily.

Knows a server by its URL. The pictures go into the report's folder, where its page shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample, as_openai
from ..recipes.sets import held_out_samples
from ..serve.client import ask, connect
from .find import Subject

LONGEST = 128  # tokens of one answer; enough to see a difference, and no loop keeps a server
DRAWN = 3  # samples drawn for each that is wanted: of those without a picture, or with several, none is shown


def held_out(subjects: Sequence[Subject], count: int) -> list[Sample]:
    """`count` drawn samples of the test split, in the size that the models compared take: no calibration had them."""
    bases = [s.artifact.manifest["base"]["hub"] for s in subjects if s.artifact is not None]
    return pictured(held_out_samples(None, count * DRAWN, embedded="embedded" in bases), count)


def pictured(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first `count` of the samples that have one picture, a question and a reference answer, as many kinds of task
    as there are first."""
    fitting = [s for s in samples if len(s.images) == 1 and not s.videos and s.answer]
    seen: set[str | None] = set()
    first = [s for s in fitting if s.task not in seen and not seen.add(s.task)]
    rest = [s for s in fitting if not any(s is one for one in first)]
    return [*first, *rest][:count]


def answers_of(
    url: str, *, model: str, samples: Sequence[Sample], label: str = "server", tell: Tell = silent
) -> list[str]:
    """The server's greedy answer to each sample's question. Errors as `client.ask`'s."""
    said = []
    with connect(url) as client:
        for number, sample in enumerate(samples):
            tell(Step(f"answers {label}", number, len(samples)))
            messages = as_openai(sample.question)
            said.append(ask(client, messages, model=model, max_tokens=LONGEST, temperature=0.0, seed=0).text)
        tell(Step(f"answers {label}", len(samples), len(samples)))
    return said


def side_by_side(samples: Sequence[Sample], said: Mapping[str, Sequence[str]], folder: Path) -> list[dict[str, Any]]:
    """`Report.answers` of what each label said; writes the pictures into `folder` as answer-N.png."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, sample in enumerate(samples):
        picture = f"answer-{number + 1}.png"
        sample.images[0].save(folder / picture)
        found.append(
            {
                "picture": picture,
                "task": sample.task,
                "question": question_of(sample),
                "reference": sample.answer,
                "answers": {label: texts[number] for label, texts in said.items()},
            }
        )
    return found


def question_of(sample: Sample) -> str:
    """What is asked last, without the pictures."""
    content = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text").strip()
