"""The verdict in sentences: where int4 helps, at which batch size it stops, what it costs, what was too noisy to say.

Reads a finished report and measures nothing. A difference counts where the whole interval lies on one side; an interval
that holds 1 is called no difference where it is narrow, and noise where it is wide; noise is also one whose ends are
twofold apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .intervals import WIDE, unsure
from .report import Figure, Level, Ratio, Report

FASTER, SLOWER, SAME, NOISY, UNKNOWN = "faster", "slower", "the same", "noisy", "unknown"
NO_INTERVAL = "too few runs, or not taken in turns, so nothing tells this from noise"
INT4_LEAVES = ("image_preprocessing", "vision_tower", "picture", "other")  # stages without the decoder's weights


@dataclass(frozen=True)
class Step:
    """One concurrency of a sweep: output tok/s by the first label's, and what that says."""

    concurrency: int
    ratio: Ratio
    word: str


def word_of(ratio: Ratio) -> str:
    """What a ratio of rates says, with its interval."""
    if ratio.low is None or ratio.high is None:
        return UNKNOWN
    if unsure(ratio):
        return NOISY
    return FASTER if ratio.low > 1 else SLOWER if ratio.high < 1 else SAME


def steps(first: Sequence[Level], other: Sequence[Level], *, measure: str = "output_rate") -> list[Step]:
    """The concurrencies that both were asked at, the lowest first; without an interval where no runs were paired."""
    base = {level.concurrency: level.numbers for level in first}
    found = []
    for level in sorted(other, key=lambda one: one.concurrency):
        numbers = base.get(level.concurrency, {})
        if measure in numbers and measure in level.numbers and numbers[measure].value:
            plain = Ratio(level.numbers[measure].value / numbers[measure].value, None, None)
            ratio = level.ratios.get(measure, plain)
            found.append(Step(level.concurrency, ratio, word_of(ratio)))
    return found


def stops(found: Sequence[Step]) -> int | None:
    """The lowest concurrency from which on, up to the highest asked, nothing is faster any more, after one that is;
    None where none is faster at all, or the highest still is, or noise hides where the change lies."""
    fast = [at for at, step in enumerate(found) if step.word == FASTER]
    if not fast or fast[-1] == len(found) - 1:
        return None
    after = found[fast[-1] + 1]
    return after.concurrency if after.word in (SLOWER, SAME) else None


def speed_sentence(label: str, first: str, found: Sequence[Step]) -> str:
    """Where the sweep says that `label` helps, and where it stops."""
    known = [step for step in found if step.word in (FASTER, SLOWER, SAME)]
    noisy, few = ([step for step in found if step.word == word] for word in (NOISY, UNKNOWN))
    if not known:
        values = ", ".join(_at(step) for step in found)
        why = "the machine was too noisy to say" if noisy else NO_INTERVAL
        return f"{label} against {first}, output tok/s: {values}; {why}."
    noise = f" At {_list(noisy)} at once the machine was too noisy to say." if noisy else ""
    noise += f" At {_list(few)} at once there were too few runs to say." if few else ""
    fast = [step for step in known if step.word == FASTER]
    if not fast:
        which = "slower than" if any(step.word == SLOWER for step in known) else "no faster than"
        return f"{label} is {which} {first} at every load that can be told: {', '.join(map(_at, known))}.{noise}"
    last, where = fast[-1], stops(found)
    if mixed := [step for step in known[: known.index(last)] if step.word != FASTER]:
        told = ", ".join(map(_at, known))
        return f"{label} is faster than {first} at {_list(fast)} at once and is not at {_list(mixed)}: {told}.{noise}"
    helps = f"{label} is faster than {first} up to {last.concurrency} at once ({_at(last)})"
    if last is found[-1]:
        return f"{helps}, the most that was asked; where it stops helping was not reached.{noise}"
    if where is None:
        return f"{helps}; where it stops, the noise hides.{noise}"
    step = next(one for one in found if one.concurrency == where)
    return f"{helps} and stops helping at {where} ({_at(step)}).{noise}"


def load_sentence(label: str, first: str, ratios: Mapping[str, Ratio]) -> str | None:
    """What the one load of the table says, from its interleaved pairs; None where no pairs were run."""
    ratio = ratios.get("output_rate")
    if ratio is None:
        return None
    says = {
        FASTER: f"{label} gives more output tok/s than {first} under the load of the table",
        SLOWER: f"{label} gives fewer output tok/s than {first} under the load of the table",
        SAME: f"{label} and {first} give the same output tok/s under the load of the table",
        NOISY: f"{label} against {first} under the load of the table: the machine was too noisy to say",
        UNKNOWN: f"{label} against {first} under the load of the table: {NO_INTERVAL}",
    }[word_of(ratio)]
    pairs = f", {ratio.pairs} pairs" if ratio.pairs > 1 else ""
    return f"{says} ({_span(ratio)}{pairs})."


def memory_sentence(label: str, first: str, numbers: Mapping[str, Mapping[str, Figure]]) -> str | None:
    """What the smaller weights leave room for; None where it was not looked at."""
    pairs = {m: (numbers[first].get(m), numbers[label].get(m)) for m in ("weights", "max_batch", "max_length")}
    said = []
    for measure, words in (("weights", "takes {:.2f}x the memory of {}"), ("max_batch", "has {:.2f}x its max batch")):
        was, now = pairs[measure]
        if was and now and was.value:
            computed = next((f" ({f.how})" for f in (now, was) if f.how != "measured"), "")
            said.append(words.format(now.value / was.value, first) + computed)
    return f"{label} {' and '.join(said)}." if said else None


def stage_sentence(label: str, found: Mapping[str, Figure]) -> str | None:
    """Where the time of one request goes, and how much of it int4 weights cannot make faster; None without stages."""
    whole = sum(figure.value for figure in found.values())
    if not whole:
        return None
    ordered = sorted(found.items(), key=lambda item: -item[1].value)
    split = ", ".join(f"{name.replace('_', ' ')} {figure.value / whole:.0%}" for name, figure in ordered)
    left = sum(found[name].value for name in INT4_LEAVES if name in found)
    rest = f"; {left / whole:.0%} of it int4 leaves as it is" if any(name in found for name in INT4_LEAVES) else ""
    return f"One request alone spends its time with {label} in {split}{rest}."


def quality_sentence(label: str, found: Mapping[str, Any]) -> str | None:
    """What the check says; None where none was looked for."""
    if "unchecked" in found:
        return f"How good {label} is this report cannot say: {found['unchecked']}."
    measures = found.get("measures")
    if not isinstance(measures, Mapping):
        return None
    failures = found.get("failures")
    verdict = (
        f"failed its check: {'; '.join(map(str, failures))}"
        if isinstance(failures, Sequence) and failures
        else "passed its check"
    )
    return f"{label} {verdict} (mean KL {measures['mean_kl']:.3g}, top-1 agreement {measures['top1']:.4g})."


def task_sentence(label: str, first: str, quality: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The scores of the tasks that both did; two standard errors of the difference, as if they were apart, are noise:
    the same questions were asked of both, so the truth is narrower."""
    was, now = (quality.get(name, {}).get("tasks", {}) for name in (first, label))
    said = []
    for task in sorted(was.keys() & now.keys()):
        metric = next(iter(now[task]))
        a, b = was[task][metric], now[task][metric]
        errors = [scores.get("stderr") for scores in (was[task], now[task])]
        told = f"{task} {b:.4g} against {a:.4g}"
        if None not in errors:
            within = abs(b - a) <= 2 * math.hypot(*errors)
            told += ", within the noise of the task" if within else ", more than the noise of the task"
        said.append(told)
    return f"{label} against {first} on tasks: {'; '.join(said)}." if said else None


def verdicts(report: Report) -> list[str]:
    """All that can be said of each label against the first, for `Report.verdicts`."""
    first, *others = report.numbers
    said: list[str | None] = []
    for label in others:
        found = steps(report.sweep.get(first, ()), report.sweep.get(label, ()))
        one = load_sentence(label, first, report.ratios.get(label, {}))
        said.append(speed_sentence(label, first, found) if len(found) > 1 else one)
        said.append(memory_sentence(label, first, report.numbers))
        said.append(stage_sentence(label, report.stages.get(label, {})))
        said.append(quality_sentence(label, report.quality.get(label, {})))
        said.append(task_sentence(label, first, report.quality))
    return [sentence for sentence in said if sentence]


def _at(step: Step) -> str:
    return f"{_span(step.ratio)} at {step.concurrency}"


def _span(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None or ratio.high > WIDE * ratio.low:
        return f"{ratio.value:.2f}x"
    return f"{ratio.value:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}"


def _list(found: Sequence[Step]) -> str:
    return ", ".join(str(step.concurrency) for step in found)
