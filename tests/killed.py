"""Run as a program: quantizes the embedded model again and again in children that are killed, and says what came of it.

    python killed.py FOLDER SEED        prints {"seconds": {method: of a run nobody killed}, "digests": {method: ...},
                                                "kills": [[method, files there], ...], "made": [[method, digest], ...]}

Children are forked from a process that has imported everything, so that starting again costs little.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from mmq.export.artifact import MANIFEST, open_artifact
from mmq.export.make import make
from mmq.quantize.skeleton import build
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.recipe import recipe_for

KILLS = 20
METHODS = ("awq", "gptq")
SAMPLES = 4


def child(work: Callable[[], object]) -> int:
    """The pid of a fork that does `work` and exits: 0, or 1 with the error on stderr."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
    os._exit(code)


def ended(pid: int, *, within: float) -> bool:
    """Whether the child came to its end, well, in so many seconds; killed otherwise."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
                raise SystemExit("a run that was taken up failed")
            return status == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def dies_at_file(number: int, quantize: Callable[[], object]) -> None:
    """Kill this process when it is about to put its so-manieth file under its name."""
    replace, count = os.replace, [0]

    def replace_or_die(*paths: Path) -> None:
        count[0] += 1
        if count[0] >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    quantize()


def main(place: Path, seed: int) -> None:
    """See above."""
    torch.set_num_threads(1)
    base, samples = fetch("pebble"), drawn(SAMPLES)
    build(base.path)  # imports what it needs, once for all children
    chance = random.Random(seed)
    facts: dict = {"seconds": {}, "digests": {}, "kills": [], "made": []}

    def quantize(method: str, out: Path) -> None:
        recipe = dataclasses.replace(recipe_for("pebble"), method=method, samples=SAMPLES)
        make(recipe, base, out, samples=samples, calibration="drawn")

    def digest(out: Path) -> str:
        return open_artifact(out, verify=True).digest

    for method in METHODS:
        out, start = place / method, time.monotonic()
        assert ended(child(lambda m=method, o=out: quantize(m, o)), within=300)
        facts["seconds"][method] = time.monotonic() - start
        facts["digests"][method] = digest(out)
    while len(facts["kills"]) < KILLS:
        number = len(facts["made"])
        method, out = METHODS[number % len(METHODS)], place / str(number)
        while not (out / MANIFEST).is_file():
            pid = child(lambda m=method, o=out: quantize(m, o))
            if not ended(pid, within=chance.uniform(0, 0.7 * facts["seconds"][method])):
                facts["kills"].append([method, len(list(out.glob("*.safetensors")))])
        facts["made"].append([method, digest(out)])
    out, facts["at files"] = place / "file by file", 0
    while not (out / MANIFEST).is_file():
        number = 2 + facts["at files"] % 3  # between a layer's note and the layer, before the next note, after it
        pid = child(lambda n=number: dies_at_file(n, lambda: quantize("awq", out)))
        facts["at files"] += not ended(pid, within=300)
    facts["made"].append(["awq", digest(out)])
    sys.stdout.write(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
