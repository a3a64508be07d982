"""Jobs from recipe to hub: each step a process of mmq's own, so that its memory and a crash stay its own.

quantize, check (the gate), what engines and a bench say besides, publish. A failed job does not stop the others; what
is there already, of the same key, is kept. Knows no tensor and no terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..export.alone import alone
from ..export.artifact import Artifact, open_artifact
from ..export.key import key_before
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import check_pinned
from ..serve.process import announced, wait, watch
from ..serve.running import terminate_is_exit
from .done import FAULT, INPUT, INTERRUPTED, Done, StepDone, state_of
from .jobs import Job, addresses
from .steps import (
    Settings,
    bench_line,
    bench_report,
    check_line,
    check_report,
    kept_artifact,
    kept_check,
    publish_line,
    quantize_line,
)

SAYS = "mmq: "  # how a line of mmq's own begins, where something went wrong
PATIENCE = 20.0  # seconds between SIGINT to a step and the end of what is left of it
# The first line read is the step's process and its group. Then reads until we, who hold the other end of its standard
# input, are gone, however that came about, and ends the step as we would have: nobody else may write to its folder
# meanwhile.
_WATCH = """
read -r step
read -r nothing
[ -n "$step" ] || exit
kill -INT "$step"
left=100
while kill -0 "$step" && [ "$left" -gt 0 ]; do sleep 0.2; left=$((left - 1)); done
kill -KILL "-$step"
"""


def run(
    jobs: Sequence[Job],
    settings: Settings,
    *,
    on_done: Callable[[Sequence[Done]], None] = lambda results: None,
    tell: Tell = silent,
) -> list[Done]:
    """Do the jobs in turn; `on_done` is given the results of all of them, as they are, whenever one has ended.

    Ctrl-C and SIGTERM end the step under way, which leaves what can be taken up; `on_done` is told before they go on
    from here. ValueError where another run works in the folder.
    """
    results = [Done(job.name, job.source, job.method) for job in jobs]
    with alone(settings.out, "mmq run"), terminate_is_exit():
        for index, job in enumerate(jobs):
            tell(Step("jobs", index, len(jobs), job.name))
            try:
                results[index] = run_job(job, settings, tell=tell)
            except (KeyboardInterrupt, SystemExit):
                results[index] = replace(results[index], state=state_of(INTERRUPTED), code=INTERRUPTED)
                on_done(results)
                raise
            on_done(results)
        tell(Step("jobs", len(jobs), len(jobs), ""))
    return results


def run_job(job: Job, settings: Settings, *, tell: Tell = silent) -> Done:
    """One job, from its key to where it is published; whatever goes wrong with it is in the result."""
    begun = Done(job.name, job.source, job.method, log=str(settings.log(job)))
    try:
        return _done(begun, job, settings, tell)
    except (ValueError, OSError) as e:
        return _ended(begun, INPUT, (" ".join(str(e).split()),))
    except Exception as e:  # a fault of ours in one job is none of the others'
        return _ended(begun, FAULT, (f"a fault in mmq: {type(e).__name__}: {' '.join(str(e).split())}",))


def _done(found: Done, job: Job, settings: Settings, tell: Tell) -> Done:
    """The same, and what went wrong in this process as the exception that it is."""
    if job.recipe is None:
        raise ValueError(job.problem)
    settings.log(job).parent.mkdir(parents=True, exist_ok=True)
    check_pinned(job.recipe, local=Path(job.recipe.model).is_dir())  # before the commit of now is filled in
    key, commit = key_before(job.recipe, hub=settings.hub)
    found = replace(found, key=key["digest"])
    artifact = kept_artifact(settings.folder(job), key, job.recipe)
    found, go_on = _step(found, "quantize", quantize_line(job, settings, commit), settings, job, tell, kept=artifact)
    if not go_on:
        return found
    try:
        artifact = artifact or open_artifact(settings.folder(job))
    except OSError as e:
        return _ended(found, FAULT, (str(e),))
    found = replace(found, artifact=str(artifact.path), digest=artifact.digest, bytes=_bytes(artifact))
    for engine in (None, *settings.engines):
        kept = kept_check(artifact, settings, engine)
        name = f"check {engine}" if engine else "check"
        found, go_on = _step(found, name, check_line(job, settings, engine), settings, job, tell, kept=kept)
        report = check_report(artifact, engine)
        if not engine:
            found = replace(found, measures=report.get("measures", {}), limits=report.get("limits", {}))
        if not go_on:
            return found
        if kept and not kept["passed"]:
            return _ended(found, 1, tuple(f"past the limit: {line}" for line in kept["failures"]))
    if settings.bench:
        kept = bench_report(artifact, settings)
        found, go_on = _step(found, "bench", bench_line(job, settings), settings, job, tell, kept=kept)
        report = bench_report(artifact, settings)
        found = replace(found, bench=str(report) if report else None)
        if not go_on:
            return found
    return published(found, job, settings, tell=tell)


def published(found: Done, job: Job, settings: Settings, *, tell: Tell = silent) -> Done:
    """The last step, for a job whose steps before it all went well: publish, where that is asked for."""
    if settings.publish:
        found, go_on = _step(found, "publish", publish_line(job, settings, found.bench), settings, job, tell)
        if not go_on:
            return found
        if "--dry-run" not in settings.publish_flags:
            found = replace(found, published=tuple(addresses(settings.publish, job)))
    return _ended(found, 0)


def _step(
    found: Done, name: str, line: Sequence[str], settings: Settings, job: Job, tell: Tell, *, kept: object = None
) -> tuple[Done, bool]:
    """The job with one step more, and whether it goes on. What is `kept` is not done again."""
    if kept:
        return replace(found, steps=(*found.steps, StepDone(name, 0, kept=True))), True
    tell(Step(name, 0, 1, job.name))
    start = time.monotonic()
    code, why = call(line, settings.log(job))
    tell(Step(name, 1, 1, job.name))
    found = replace(found, steps=(*found.steps, StepDone(name, code, round(time.monotonic() - start, 1))))
    return (found, True) if code == 0 else (_ended(found, code, why), False)


def _ended(found: Done, code: int, why: tuple[str, ...] = ()) -> Done:
    return replace(found, code=code, state=state_of(code), why=why)


def _bytes(artifact: Artifact) -> dict[str, int]:
    files = artifact.manifest["files"]
    size = sum(entry["size"] for name, entry in files.items() if name.endswith(".safetensors"))
    return {"base": artifact.manifest["base"]["weight_bytes"], "artifact": size}


def call(line: Sequence[str], log: Path) -> tuple[int, tuple[str, ...]]:
    """Run `mmq` with the words of `line` to its end, its output into `log`: (exit code, what it said was wrong).

    A signal that ended it is `FAULT`'s code: nothing that was measured. KeyboardInterrupt and SystemExit end it first,
    as Ctrl-C would.
    """
    argv = [sys.executable, "-m", "mmq", *line]
    env = {**os.environ, "COLUMNS": os.environ.get("COLUMNS", "120")}
    with log.open("ab") as file:
        file.write(f"\n$ mmq {' '.join(line)}\n".encode())
        file.flush()
        begin = file.tell()
        with watch(_WATCH) as watching:
            process = subprocess.Popen(  # interrupted here, the watch ends what was begun
                announced(argv),
                env=env,
                stdin=watching.stdin,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = wait(process)
            except (KeyboardInterrupt, SystemExit):
                _interrupt(process)
                raise
            finally:
                watching.kill()
    said = log.read_bytes()[begin:].decode("utf-8", "replace").splitlines()
    why = tuple(text.removeprefix(SAYS) for text in said if text.startswith(SAYS))
    if code < 0:
        told = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return FAULT, (f"mmq {line[0]} was ended by {signal.Signals(-code).name}{told}",)
    return code, why or ((said[-1].strip() if said else f"mmq {line[0]} said nothing"),) if code else ()


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C for a step, which keeps what is finished and ends its engines; then the end of what is left of it. A
    second Ctrl-C meanwhile cuts it short."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
