"""The field's own tasks (MMMU, ChartQA, ...): lm-eval asks a running server, and its scores come back for a report.

lm-eval is EleutherAI's lm-evaluation-harness. It is run as a program, in an environment of its own, since it brings
seventy packages that an engine has no use for: the user's (MMQ_LM_EVAL_PYTHON), this one where it is installed (the
extra `eval`), else one that uv makes on first use from pinned requirements. Tasks are its own, by name, or anybody's,
by the path of a YAML file. They are asked by `/v1/chat/completions`, so only tasks of free answers can be: those that
score choices by log-probability, lm-eval itself refuses. Knows a server by its URL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..recipes.progress import Step, Tell, silent
from ..serve.client import key_here, root
from .environments import State, environment, state
from .follow import clean, follow, listener

NAME = "lm-eval"
PICTURES = 8  # of one question at most; lm-eval's own number is 1, and drops the rest without a word


def harness(*, tell: Tell = silent) -> Path:
    """The Python that has lm-eval. OSError, in one line, where an environment for it cannot be made."""
    if not os.environ.get("MMQ_LM_EVAL_PYTHON") and importlib.util.find_spec("lm_eval"):
        return Path(sys.executable)
    return environment(NAME, tell=tell)


def harness_state() -> State:
    """What there is of lm-eval, for `mmq doctor`. Makes nothing."""
    if not os.environ.get("MMQ_LM_EVAL_PYTHON") and importlib.util.find_spec("lm_eval"):
        return State(NAME, True, f"beside this Python, {NAME} {version(NAME)}")
    return state(NAME, makes="mmq bench NAMES --tasks TASK")


def check_tasks(names: Sequence[str], *, tell: Tell = silent) -> Path:
    """The harness's Python, after it was asked for each task: before a server starts. ValueError for one that is not
    there, with how to see which are."""
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"no task file {name}")
    python = harness(tell=tell)
    known = [name for name in names if name not in files]
    if known:
        tell(Step("tasks", 0, 1, "lm-eval looks for them"))
        with tempfile.TemporaryDirectory() as place:
            log = Path(place) / "log"
            argv = [str(python), "-m", "lm_eval", "validate", "--tasks", ",".join(known)]
            code, last = follow(argv, env=clean(), log=log, on_line=lambda line: None)
        if code:
            missing = re.search(r"Tasks not found: (.*)", last)
            if missing is None:
                raise RuntimeError(f"lm-eval failed: {last}")
            raise ValueError(f"lm-eval has no task {missing[1]}; `{python} -m lm_eval ls tasks` lists them")
    return python


def run_tasks(
    url: str,
    *,
    model: str,
    names: Sequence[str],
    out: Path,
    python: Path | None = None,
    concurrency: int = 8,
    limit: int | None = None,
    label: str = "server",
    tell: Tell = silent,
) -> dict[str, dict[str, float]]:
    """Let lm-eval put the tasks to the server, greedily as they are written: task -> its metrics, for
    `Report.quality[label]["tasks"]`, as `read_scores` gives them.

    Its settings, log, every question and answer, and its own results stay in `out`/tasks-LABEL. `limit` takes the first
    so many questions of each task. RuntimeError with its last words where it fails.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} questions of each task were asked for; it must be at least 1")
    python = python or harness(tell=tell)
    place = out.resolve() / f"tasks-{label}"
    place.mkdir(parents=True, exist_ok=True)
    asked = {
        "model": "local-chat-completions",
        "model_args": {
            "model": model,
            "base_url": f"{root(url)}/v1/chat/completions",
            "num_concurrent": concurrency,
            "max_images": PICTURES,
        },
        "tasks": [str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name for name in names],
        "apply_chat_template": True,  # the questions as messages; the template is the server's
        "log_samples": True,
        "output_path": str(place),
        **({} if limit is None else {"limit": limit}),
    }
    settings, log = place / "lm-eval.yaml", place / "lm-eval.log"
    settings.write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), encoding="utf-8")
    before = set(place.rglob("results_*.json"))
    env = {**clean(), "OPENAI_API_KEY": key_here(), "no_proxy": "127.0.0.1,localhost"}
    argv = [str(python), "-m", "lm_eval", "run", "--config", str(settings)]
    code, last = follow(argv, env=env, log=log, on_line=listener(f"tasks {label}", tell))
    made = sorted(set(place.rglob("results_*.json")) - before)
    if code or not made:
        raise RuntimeError(f"lm-eval failed: {_reason(log, last)} (log: {log})")
    return read_scores(json.loads(made[-1].read_text(encoding="utf-8")))


def read_scores(raw: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """lm-eval's results: task -> {metric: value, ..., "stderr": the first metric's}.

    Groups stand for their tasks, which are left out. A metric's filter is told after it unless it is "none". ValueError
    where there is no score.
    """
    within = {name for members in raw.get("group_subtasks", {}).values() for name in members}
    found = {}
    for task, results in raw["results"].items():
        if task in within:
            continue
        scores: dict[str, float] = {}
        for key, value in results.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scores[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
            error = results.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, int | float) and len(scores) == 1:
                scores["stderr"] = float(error)
        if not scores:
            raise ValueError(f"lm-eval gave no score for {task}")
        found[task] = scores
    return found


def _reason(log: Path, last: str) -> str:
    """What the server said of the request that it refused, where that ended the run, else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    refused = re.findall(r"(?:failed with error message|Response text): (.*)\. Retrying", text)
    return " ".join((refused[-1] if refused else last).split())[:400]
