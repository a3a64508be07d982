"""Jobs spread over a Ray cluster's GPUs: one GPU a job, or one machine a job where there are none.

Each machine needs the same Python environment and sees the same folders. Only this machine publishes, so tokens stay
here. What happens when a machine goes is Ray's: the job is done again elsewhere, and takes up what is finished.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.alone import alone
from ..recipes.progress import Step, Tell, silent
from ..serve.running import terminate_is_exit
from .done import FAULT, INTERRUPTED, Done, state_of
from .jobs import Job
from .run import PATIENCE, published, run_job
from .steps import Settings

LOCAL = "local"  # a Ray that is started on this machine for the run
LOST = 2  # machines that may go under a job before it counts as failed


def run_on_ray(
    jobs: Sequence[Job],
    settings: Settings,
    *,
    address: str = LOCAL,
    on_done: Callable[[Sequence[Done]], None] = lambda results: None,
    tell: Tell = silent,
) -> list[Done]:
    """As `run`, on the Ray cluster at `address` ("local", "auto" or HOST:PORT), as many jobs at once as it has GPUs.

    OSError where Ray is not installed or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise OSError("--ray needs Ray: `pip install ray` beside mmq, here and on the cluster's machines")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    ray = importlib.import_module("ray")
    logging.getLogger("ray").setLevel(logging.ERROR)
    start: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
    with alone(settings.out, "mmq run"), terminate_is_exit():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **start)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise OSError(f"no Ray cluster answers at {address}: {str(e).splitlines()[0]}") from None
        try:
            return _spread(ray, jobs, settings, on_done, tell)
        finally:
            ray.shutdown()


def _spread(
    ray: Any, jobs: Sequence[Job], settings: Settings, on_done: Callable[[Sequence[Done]], None], tell: Tell
) -> list[Done]:
    results = [Done(job.name, job.source, job.method) for job in jobs]
    work = ray.remote(max_retries=LOST, **_share(ray))(_work)
    away = replace(settings, out=settings.out.resolve(), publish=(), publish_flags=())
    due = {work.remote(job, away, str(Path.cwd())): index for index, job in enumerate(jobs)}
    try:
        while due:
            ready, _ = ray.wait(list(due), num_returns=1, timeout=1.0)
            for ref in ready:
                index = due.pop(ref)
                results[index] = _result(ray, ref, results[index], jobs[index], settings, tell)
                on_done(results)
                tell(Step("jobs", len(jobs) - len(due), len(jobs), jobs[index].name))
    except (KeyboardInterrupt, SystemExit):
        for ref in due:
            ray.cancel(ref)
        if due:
            ray.wait(list(due), num_returns=len(due), timeout=PATIENCE)
        for index in due.values():
            results[index] = replace(results[index], state=state_of(INTERRUPTED), code=INTERRUPTED)
        on_done(results)
        raise
    return results


def _share(ray: Any) -> dict[str, float]:
    """What of the cluster a job takes: a GPU; or where there is none, all CPUs of a machine."""
    if ray.cluster_resources().get("GPU"):
        return {"num_gpus": 1, "num_cpus": 1}
    return {"num_cpus": max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])}


def _work(job: Job, settings: Settings, folder: str) -> Done:
    """One job on one of the cluster's machines, in the folder where the run was started."""
    os.chdir(folder)
    return run_job(job, settings)


def _result(ray: Any, ref: Any, begun: Done, job: Job, settings: Settings, tell: Tell) -> Done:
    try:
        found: Done = ray.get(ref)
    except ray.exceptions.RayError as e:
        last = [line for line in str(e).splitlines() if line.strip()][-1]
        return replace(begun, code=FAULT, state=state_of(FAULT), why=(f"on the cluster: {last.strip()}",))
    return found if found.code else published(found, job, settings, tell=tell)
