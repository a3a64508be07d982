"""The field's load generator (`vllm bench serve`) as a process that stays, and the runs that it makes.

Knows its process and its files; what is asked is `speed`'s business. Any OpenAI-compatible server will do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..serve.client import key_here
from ..serve.log import useful_lines
from ..serve.programs import find_program, python_of
from ..serve.questions import question_of as asked_by
from ..serve.questions import read_lines
from .speed import Load, Run, command, read_run, warm_up

SCRIPT = Path(__file__).resolve().parent / "peers" / "load.py"
Ask = Callable[[list[str]], None]  # one run of `vllm bench serve` with these words


@contextlib.contextmanager
def generator(log: Path) -> Iterator[Ask]:
    """The generator's process for the length of a `with`; yields what makes it run. Its own words go to `log`.

    It is waited for at the first run: until then it imports vLLM beside the servers that start. OSError when vLLM,
    whose part it is, is not installed; RuntimeError when it fails, with its reason.
    """
    argv = [str(python_of(find_program("vllm"))), str(SCRIPT)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "no_proxy": "127.0.0.1,localhost"}
    env["OPENAI_API_KEY"] = key_here()  # where the generator looks for it
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as words:
        # in a session of its own: Ctrl-C is for us, who end it
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        )
        importing = [True]

        def ask(typed: list[str]) -> None:
            if importing:
                _reply(process, log)
                importing.clear()
            _run(process, log, typed)

        try:
            yield ask
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()


def _run(process: subprocess.Popen[bytes], log: Path, words: list[str]) -> None:
    assert process.stdin is not None
    begun = log.stat().st_size
    with contextlib.suppress(BrokenPipeError):  # it is gone: what it said last is the reply
        process.stdin.write(json.dumps(words).encode() + b"\n")
        process.stdin.flush()
    _reply(process, log, begun)


def _reply(process: subprocess.Popen[bytes], log: Path, begun: int = 0) -> None:
    """Wait for its line. RuntimeError with what it said since byte `begun` of its log where that is no success."""
    assert process.stdout is not None
    line = process.stdout.readline()
    told = json.loads(line) if line.endswith(b"\n") else {}
    if "ready" in told or "done" in told:
        return
    with log.open("rb") as file:
        file.seek(begun)
        said = " ".join(useful_lines(file.read().decode("utf-8", "replace")))
    raise RuntimeError(f"the load generator `vllm bench serve` failed: {said or told.get('error') or 'it ended'}")


def one_run(
    ask: Ask,
    url: str,
    *,
    model: str,
    tokenizer: Path,
    load: Load,
    number: int,
    result: Path,
    rows: Path | None = None,
    remote_code: bool = False,
) -> Run:
    """Put `load` on the server once, as its run `number`, behind its warm-ups; the generator's raw JSON is then the
    file `result`.

    `tokenizer` is a folder with the model's tokenizer, so that prompts have their length in its tokens. RuntimeError
    when the generator fails, or any request failed.
    """
    options: dict[str, Any] = {"run": number, "rows": rows, "remote_code": remote_code}
    if warm := warm_up(load, number):
        unused = result.with_name("warm-up.json")
        _made(ask, command(url, model, tokenizer, warm, result=unused.resolve(), **options), unused)
        unused.unlink()
    return _made(ask, command(url, model, tokenizer, load, result=result.resolve(), **options), result)


def _made(ask: Ask, words: list[str], result: Path) -> Run:
    result.unlink(missing_ok=True)
    ask(words)
    if not result.is_file():
        raise RuntimeError(f"the load generator `vllm bench serve` ended without its result {result}")
    return read_run(json.loads(result.read_text(encoding="utf-8")))


def span_of(result: Path) -> tuple[float, float]:
    """When the run of this result began and ended, without its warm-ups, by time.perf_counter, which on Linux is one
    clock for all processes."""
    raw = json.loads(result.read_text(encoding="utf-8"))
    begun = min(raw["start_times"])
    return begun, begun + raw["duration"]


def pictures_in(load: Load) -> int:
    """The most pictures that a request of the load has. ValueError for a dataset that cannot be read."""
    if not load.dataset:
        return load.pictures
    return max((len(line.data.get("images") or ()) for line in read_lines([load.dataset])), default=0)


def written_rows(load: Load, out: Path) -> Path | None:
    """The load's dataset in the generator's form, as a file in `out`; None for a load of random words.

    The generator sends one user's turn a request: a row's messages are joined into one, pictures where they stand.
    ValueError names the row that is broken or has other media than pictures.
    """
    if not load.dataset:
        return None
    file = out / "dataset.jsonl"
    with file.open("w", encoding="utf-8") as f:
        for line in read_lines([load.dataset]):
            question = asked_by(line)
            parts = []
            for message in question.messages:
                content = message["content"]
                parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
            if strange := {part["type"] for part in parts} - {"text", "image_url"}:
                kinds = ", ".join(sorted(strange))
                raise ValueError(f"{question.where}: a load has text and pictures; {kinds} cannot be sent by it")
            f.write(json.dumps({"content": parts}, ensure_ascii=False) + "\n")
    if not file.stat().st_size:
        raise ValueError(f"{load.dataset} holds no samples")
    return file
