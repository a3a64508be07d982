"""The file of a dataset's answers: a JSONL that is taken up where it stopped, and the figures of a run.

Knows no server; a record is what `dataset` wrote.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def check_out(out: Path) -> None:
    """Make the folder of `out`. OSError where no file of answers can be written there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_file():  # a device would be replaced by a file
            raise OSError(errno.EEXIST, "it is there, and no plain file")
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise OSError(f"answers cannot be written to {out}: {e.strerror}; name another file (--result-path)") from None


def finished(out: Path, marks: Sequence[str], *, model: str | None = None, logprobs: bool = False) -> dict[int, Record]:
    """Answered records of an earlier run, by index. ValueError where they belong to other samples or another model,
    where one is given."""
    found: dict[int, Record] = {}
    if not out.is_file():
        return found
    text = out.read_text(encoding="utf-8", errors="replace")
    lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines: answers may have other line ends
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            index, mark = int(record["index"]), record["sample"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # the line that an interrupted run was writing
            raise ValueError(f"{out}, line {number}: not a line of answers; give another file or --overwrite") from None
        if not 0 <= index < len(marks) or marks[index] != mark:
            raise ValueError(f"{out} holds answers to other samples (line {number}); give another file or --overwrite")
        if model is not None and record.get("model") != model:
            raise ValueError(f"{out} holds answers of {record.get('model')}, not {model}; another file or --overwrite")
        if "error" not in record and ("logprobs" in record or not logprobs):
            found[index] = record
    return found


def line_of(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(out: Path, records: Iterable[Record]) -> None:
    """Replace `out` in one step, so that an interruption leaves the old or the new file; a link stays one."""
    out = out.resolve()
    part = out.with_name(out.name + ".part")
    part.write_text("".join(line_of(r) for r in records), encoding="utf-8")
    os.replace(part, out)


def failed(out: Path) -> list[str]:
    """The samples of `out` that got no answer, a line each: where it stands in the input, and why."""
    with out.open(encoding="utf-8") as lines:
        return [f"{r.get('source') or r['index'] + 1}: {r['error']}" for r in map(json.loads, lines) if "error" in r]


def summary(records: Iterable[Record], runtime: float) -> dict[str, float]:
    """The figures of a run: tokens, samples, seconds and rates. Requests without an answer are failed, not samples."""
    records = list(records)
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
