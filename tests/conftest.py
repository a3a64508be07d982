"""What several test files share: artifacts of the embedded model, each made once."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from mmq.serve.running import Server

torch.set_num_threads(1)  # the matrices are small, and threads that spin for each other stall on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub that is not the test's own

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun behind a shell's &: what the tests start would be deaf
    signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLES = 48
Run = Callable[..., tuple[int, str, str]]  # the command line, called: exit code, stdout, stderr
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # of several at once (`make test`), None for one process
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what the tests start does not spin beside the other's threads
# files that take long, which are begun first, behind those that ask the shared server: one last would keep all waiting
LONG = ("test_check", "test_twin", "test_resume", "test_ranks", "test_experts", "test_engine_rules", "test_lora")


@functools.cache
def group_of(file: Path) -> str:
    """Which tests stay together with those of a file, at one of several workers: all that ask the shared server do, so
    that there is one, and else those of the file."""
    functions = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef))
    return "served" if any(arg.arg == "served" for node in functions for arg in node.args.args) else file.stem


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole groups to each worker, in the order of `pytest_collection_modifyitems`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long groups first, where several workers share the tests."""
    if WORKER:
        rank = {name: at for at, name in enumerate(("served", *LONG))}
        items.sort(key=lambda item: rank.get(group_of(item.path), len(rank)))


@pytest.fixture
def mmq(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`mmq("quantize", ...)` in a folder of its own: (exit code, stdout, stderr)."""
    from mmq.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMQ_DEBUG", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmq", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def pebble() -> Path:
    """The embedded model's folder."""
    from mmq.recipes.pebble import model_folder

    return model_folder()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact(method, format=None, **recipe)`: pebble quantized so, made on first use and shared; never change it."""
    base = tmp_path_factory.getbasetemp()
    place = base.parent if WORKER else base  # the workers' own folders are in one

    def make_once(method: str, format: str | None = None, **changes: object) -> Path:
        key = repr((method, format, *sorted(changes.items())))
        out = place / f"artifact-{hashlib.sha256(key.encode()).hexdigest()[:12]}" / f"out-{method}"
        out.parent.mkdir(exist_ok=True)
        with FileLock(out.parent / "lock"):
            if not (out / "mmq.json").is_file():
                from mmq.export.make import make
                from mmq.recipes.calibration import CALIBRATIONS
                from mmq.recipes.hub import fetch
                from mmq.recipes.recipe import recipe_for

                changes |= {"method": method, "format": format, "samples": SAMPLES}
                recipe = dataclasses.replace(recipe_for("pebble"), **changes)
                samples = [] if method == "bnb" else CALIBRATIONS[recipe.calibration](SAMPLES)
                make(recipe, fetch("pebble"), out, samples=samples, calibration=recipe.calibration)
        return out

    return make_once


@pytest.fixture(scope="session")
def served(artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """AWQ pebble under the real vLLM, one server for all tests; they have media on this machine."""
    from mmq.serve.engines import plan
    from mmq.serve.machine import this_machine
    from mmq.serve.running import free_port, running
    from mmq.serve.safety import Safety

    log = tmp_path_factory.mktemp("served") / "vllm.log"
    safety = Safety(media_networks=("127.0.0.0/8",))
    launch = plan("vllm", artifact("awq"), machine=this_machine(), port=free_port(), safety=safety)
    with running(launch, timeout=300, log_path=log) as server:
        yield server
