"""Answers: a prompt or a conversation streamed, or a dataset in and a JSONL of answers out, resumed where it stopped.

Talks HTTP only; who serves and how is `plan` and `running`'s business.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..recipes.reading import read
from ..recipes.samples import Sample, as_openai, digest
from .client import Message, answer_of, connect, connect_async, plain_errors, root, served_name, stream, user_message
from .engines import plan
from .launch import START_TIMEOUT, free_port, running
from .machine import this_machine

Record = dict[str, Any]


@contextmanager
def serving(
    target: str,
    *,
    engine: str = "vllm",
    timeout: float = START_TIMEOUT,
    log_path: Path | None = None,
    tell: Tell = silent,
    **options: Any,
) -> Iterator[str]:
    """The root URL of a server for `target`: the address itself, or a folder served for the length of a `with`.

    Options as `vllm.vllm`. A free port of loopback is taken.
    """
    if "://" in target:
        yield root(target)
        return
    launch = plan(engine, Path(target).expanduser(), machine=this_machine(), port=free_port(), **options)
    with running(launch, timeout=timeout, log_path=log_path, tell=tell) as server:
        yield server.url


def infer(
    url: str,
    prompt: str,
    images: Sequence[str | Path] = (),
    *,
    history: Sequence[Message] = (),
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Stream one answer from the server at `url`, piece by piece. Errors as in `client.plain_errors`."""
    message = user_message(prompt, images)  # before the connection: a bad picture is found first
    with connect(url, api_key=api_key) as client:
        name = model or served_name(client, url=url)
        yield from stream(client, [*history, message], model=name, max_tokens=max_tokens, temperature=temperature)


@contextmanager
def answering(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
) -> Iterator[Callable[[Sequence[Message]], Iterator[str]]]:
    """A function that streams the server's answer to a conversation, over one connection for the length of a `with`."""
    with connect(url, api_key=api_key) as client:
        name = model or served_name(client, url=url)
        yield lambda messages: stream(client, messages, model=name, max_tokens=max_tokens, temperature=temperature)


def infer_dataset(
    url: str,
    source: Path,
    out: Path,
    *,
    count: int | None = None,
    model: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    logprobs: bool = False,
    concurrency: int = 8,
    overwrite: bool = False,
    tell: Tell = silent,
) -> dict[str, float]:
    """Ask every sample of `source` (the first `count`) and write `out`, a JSONL in the order of the input.

    A line is {"index", "sample" (its digest), "model", "answer", "prompt_tokens", "tokens", "finish", "seconds"}, with
    "task" and "reference" where the sample has them; or "error" instead of an answer where the server refused the one
    request, and "logprobs" of the answer's tokens, as the server gives them, where they are asked for. What `out` has
    already is not asked again; refused requests are, and answers without the logprobs wanted. Returns the figures.
    ValueError for a broken input or an `out` of another input, OSError when the server is gone; written lines stay.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
    marks = check_dataset(source, count=count)
    with connect(url, api_key=api_key) as client:
        name = model or served_name(client, url=url)
    done = {} if overwrite else _finished(out, marks, name, logprobs=logprobs)
    _write(out, done.values())
    fresh: list[Record] = []
    begun = time.perf_counter()

    with out.open("a", encoding="utf-8") as file:

        def keep(record: Record) -> None:
            file.write(_line(record))
            file.flush()
            fresh.append(record)
            rate = sum(r.get("tokens", 0) for r in fresh) / max(time.perf_counter() - begun, 1e-9)
            tell(Step("infer", len(done) + len(fresh), len(marks), f"{rate:.0f} tok/s"))

        todo = ((i, marks[i], sample) for i, sample in _numbered(source, count) if i not in done)
        options = {"model": name, "max_tokens": max_tokens, "temperature": temperature, "logprobs": logprobs}
        tell(Step("infer", len(done), len(marks)))
        _run(_ask_all(url, api_key, todo, keep, min(concurrency, len(marks)), options))
    runtime = time.perf_counter() - begun
    _write(out, sorted([*done.values(), *fresh], key=lambda record: record["index"]))
    return summary(fresh, runtime) | {"resumed": len(done)}


def check_dataset(source: Path, *, count: int | None = None) -> list[str]:
    """Read all of the input, pictures too, before anything is started or asked: the samples' digests, in order.

    ValueError names the line that is broken.
    """
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    marks = [digest([sample.question]) for _, sample in _numbered(source, count)]
    if not marks:
        raise ValueError(f"{source} holds no samples")
    return marks


def summary(records: Sequence[Record], runtime: float) -> dict[str, float]:
    """The figures of a run: tokens, samples, seconds and rates. Refused requests count as failed, not as samples."""
    answered = [r for r in records if "error" not in r]
    tokens = sum(r["tokens"] for r in answered)
    return {
        "num_prompt_tokens": sum(r["prompt_tokens"] for r in answered),
        "num_generated_tokens": tokens,
        "num_samples": len(answered),
        "runtime": round(runtime, 3),
        "samples/s": round(len(answered) / runtime, 3) if answered else 0.0,
        "tokens/s": round(tokens / runtime, 3) if answered else 0.0,
        "failed": len(records) - len(answered),
    }


def refused(out: Path) -> list[str]:
    """The samples of `out` that the server refused, a line each: the number in the input, from 1, and why."""
    records = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    return [f"sample {r['index'] + 1}: {r['error']}" for r in records if "error" in r]


def _numbered(source: Path, count: int | None) -> Iterator[tuple[int, Sample]]:
    for index, sample in enumerate(read(source)):
        if count is not None and index >= count:
            return
        yield index, sample


def _run(work: Any) -> None:
    with first_error():
        asyncio.run(work)


@contextmanager
def first_error() -> Iterator[None]:
    """The first error of a task group instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:  # the first worker to fail ends the others; its error is the story
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def _ask_all(
    url: str,
    api_key: str | None,
    todo: Iterator[tuple[int, str, Sample]],
    keep: Callable[[Record], None],
    concurrency: int,
    options: dict[str, Any],
) -> None:
    """`concurrency` workers take samples from one iterator, so only that many pictures are in memory."""
    async with connect_async(url, api_key=api_key) as client:

        async def worker() -> None:
            for index, mark, sample in todo:
                keep(await _one(client, index, mark, sample, options))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())


async def _one(client: Any, index: int, mark: str, sample: Sample, options: dict[str, Any]) -> Record:
    record: Record = {"index": index, "sample": mark, "model": options["model"]}
    if sample.task is not None:
        record["task"] = sample.task
    if sample.answer is not None:
        record["reference"] = sample.answer
    begun = time.perf_counter()
    try:
        with plain_errors(str(client.base_url)):
            reply = await client.chat.completions.create(messages=as_openai(sample.question), **options)
    except ValueError as e:  # this one request; a server that is gone is OSError and ends the run
        return record | {"error": str(e)}
    answer = answer_of(reply, time.perf_counter() - begun)
    if options["logprobs"]:
        record["logprobs"] = {"content": answer.logprobs}
    return record | {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "finish": answer.finish,
        "seconds": round(answer.seconds, 4),
    }


def _finished(out: Path, marks: Sequence[str], model: str, *, logprobs: bool) -> dict[int, Record]:
    """Answered records of an earlier run, by index. ValueError where they belong to other samples or another model."""
    found: dict[int, Record] = {}
    if not out.is_file():
        return found
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            index, mark = record["index"], record["sample"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # the line that an interrupted run was writing
            raise ValueError(f"{out}, line {number}: not a line of answers; give another file or --overwrite") from None
        if not 0 <= index < len(marks) or marks[index] != mark:
            raise ValueError(f"{out} holds answers to other samples (line {number}); give another file or --overwrite")
        if record.get("model") != model:
            raise ValueError(f"{out} holds answers of {record.get('model')}, not {model}; another file or --overwrite")
        if "error" not in record and ("logprobs" in record or not logprobs):
            found[index] = record
    return found


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(out: Path, records: Any) -> None:
    """Replace `out` in one step, so that an interruption leaves the old or the new file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text("".join(_line(r) for r in records), encoding="utf-8")
    os.replace(part, out)
