"""A dataset in and a JSONL of answers out, resumed where it stopped.

Talks HTTP only; how a line is read is `questions`' business, how the file of answers looks `results`'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import source_of
from .client import Answer, Message, connect, served_name
from .crowd import Asked, crowd, in_order, waited
from .questions import Line, Question, question_of, read_lines
from .request import DEFAULT, RequestConfig
from .results import Record, check_out, finished, line_of, summary, write

Keep = Callable[[int, Answer | Exception], None]


def check_dataset(
    sources: Sequence[str | Path], out: Path, *, system: str | None = None, overwrite: bool = False
) -> list[Question]:
    """Read all of the input, files that it names too, and look at `out`, before anything is started or asked: the
    questions in order, without their messages. ValueError names the first line that is broken and says where others
    are, or why `out` can hold no answers to them; OSError where it cannot be written.
    """
    found: list[Question] = []
    broken: list[tuple[str, str]] = []
    for line in read_lines(sources):
        try:
            found.append(replace(question_of(line, system=system), messages=()))
        except ValueError as e:
            broken.append((line.where, str(e)))
    if broken:
        places = ", ".join(where for where, _ in broken[1:6]) + (", ..." if len(broken) > 6 else "")
        raise ValueError(broken[0][1] + (f" (and {len(broken) - 1} more: {places})" if broken[1:] else ""))
    if not found:
        raise ValueError(f"{', '.join(map(str, sources))} holds no samples")
    for source in sources:
        asked, there = source_of(source)[0].resolve(), out.resolve()
        if there == asked or (asked.is_dir() and there.parent == asked):  # its *.jsonl are asked, the next time too
            raise ValueError(f"{out} is of the dataset itself; give the answers another --result-path")
    check_out(out)
    if not overwrite:
        finished(out, [question.mark for question in found])
    return found


def infer_dataset(
    url: str,
    sources: Sequence[str | Path],
    out: Path,
    config: RequestConfig = DEFAULT,
    *,
    system: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    concurrency: int = 32,
    overwrite: bool = False,
    show: Callable[[int, str], None] | None = None,
    tell: Tell = silent,
) -> dict[str, float]:
    """Ask every sample of `sources` ("file.jsonl#100": the first hundred) and write `out`, a JSONL in their order.

    A line is {"index", "source" (file:line), "sample" (its digest), "model", "answer", "prompt_tokens", "tokens",
    "finish", "seconds"}, with "task", "id" and "reference" where the sample has them; or "error" instead of an answer
    where the one request failed, and "logprobs" of the answer's tokens, as the server gives them, where they are asked
    for. What `out` has already is not asked again; failed requests are, and answers without the logprobs wanted.
    With `config.stream` the answers go to `show(index, piece)` as they come, in the order of the input. Returns the
    figures. ValueError for a broken input or an `out` of another input, OSError for one that cannot be written or when
    no server answers, RuntimeError when it is gone later; written lines stay.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
    asked = check_dataset(sources, out, system=system, overwrite=overwrite)
    with connect(url, api_key=api_key) as client:
        name = served_name(client, model, url=url)
    with recorded(asked, out, name, config, overwrite=overwrite, tell=tell) as (keep, done, figures):
        left = [index for index in range(len(asked)) if index not in done]
        piece, end = in_order(left, show if show and config.stream else lambda number, text: None)

        def todo() -> Iterable[Asked]:
            for index, line in enumerate(read_lines(sources)):
                if index not in done:
                    yield index, partial(_messages, line, system)

        options: dict[str, Any] = {"model": name, "concurrency": min(concurrency, len(asked)), **config.options()}
        told = 0

        def come(index: int, found: Answer | Exception) -> None:
            nonlocal told
            keep(index, found)
            end(index)
            told += 1

        try:
            waited(crowd(url, todo(), come, api_key=api_key, on_piece=piece if config.stream else None, **options))
        except BrokenPipeError:  # of `show`, whose reader has left
            raise
        except ConnectionError:
            kept = f"{len(done) + told} of {len(asked)} answers are in {out}; the same command goes on from there"
            raise RuntimeError(f"the server at {url} was there and is gone; {kept}") from None
    return figures


@contextmanager
def recorded(
    asked: Sequence[Question], out: Path, model: str, config: RequestConfig, *, overwrite: bool, tell: Tell
) -> Iterator[tuple[Keep, dict[int, Record], dict[str, float]]]:
    """(what takes an answer by its index, the records of an earlier run, the figures once the `with` is left) of a run.

    Each answer is a line of `out` as soon as it comes; at the end the lines are put in the order of the input.
    """
    logprobs = bool(config.options().get("logprobs"))
    done = {} if overwrite else finished(out, [question.mark for question in asked], model=model, logprobs=logprobs)
    write(out, done.values())
    fresh: list[Record] = []
    figures: dict[str, float] = {}
    tokens = 0
    begun = time.perf_counter()
    tell(Step("infer", len(done), len(asked)))
    with out.open("a", encoding="utf-8") as file:

        def keep(index: int, found: Answer | Exception) -> None:
            nonlocal tokens
            record = _record(index, model, asked[index], found, logprobs=logprobs)
            file.write(line_of(record))
            file.flush()
            fresh.append(record)
            tokens += record.get("tokens", 0)
            rate = tokens / max(time.perf_counter() - begun, 1e-9)
            tell(Step("infer", len(done) + len(fresh), len(asked), f"{rate:.0f} tok/s"))

        yield keep, done, figures
    figures |= summary(fresh, time.perf_counter() - begun) | {"resumed": len(done)}
    write(out, sorted([*done.values(), *fresh], key=lambda record: record["index"]))


def _messages(line: Line, system: str | None) -> Sequence[Message]:
    return question_of(line, system=system).messages


def _record(index: int, model: str, question: Question, found: Answer | Exception, *, logprobs: bool) -> Record:
    record: Record = {"index": index, "source": question.where, "sample": question.mark, "model": model}
    record |= question.about
    if question.reference is not None:
        record["reference"] = question.reference
    if isinstance(found, Exception):
        return record | {"error": str(found)}
    return record | ({"logprobs": {"content": []}} if logprobs else {}) | found.facts()
