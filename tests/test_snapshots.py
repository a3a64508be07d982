"""Every engine's command line for every kind of artifact, on a CPU and on a 24 GiB card, as data/launches.md has it.

`make accept` writes the file anew; its difference is then for a reader to judge.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import ATTENTION, write_adapter

from mmq.bench.hollow import write
from mmq.serve.engines import ENGINES, plan
from mmq.serve.flags import Launch
from mmq.serve.machine import GIB, Gpu, Machine

SNAPSHOT = Path(__file__).parent / "data" / "launches.md"
KINDS = {
    "fp16": None,
    "awq": ("awq", None),
    "gptq": ("gptq", None),
    "compressed-tensors": ("awq", "compressed-tensors"),
    "bnb": ("bnb", None),
}
LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
MACHINES = {
    "a CPU": LAPTOP,
    "a 24 GiB card": replace(LAPTOP, gpus=(Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 24000 << 20, 8.9),)),
}
PACKAGES = (
    *("vllm-0.32.0", "torch-2.13.0", "transformers-5.19.0", "compressed_tensors-0.17.0", "accelerate-1.15.0"),
    *("bitsandbytes-0.50.2", "vllm_bnb_plugin-0.0.3", "fastapi-1.0", "uvicorn-1.0", "mmq_toolkit-0.1.0"),
)
HEAD = """\
# The command lines of `mmq serve`

Pebble in each format and with LoRA adapters, Qwen2.5-VL-7B (its shape, hollow) in two formats, under each engine; flags
and variables with the reason that `--print` gives, refusals in their words.
Written by `make accept`, compared by tests/test_snapshots.py.
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables that name each engine's program in an environment on disk; the programs only fail."""
    site = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    for package in PACKAGES:
        (site / f"{package}.dist-info").mkdir(parents=True)
    found = {}
    for variable, name in (("MMQ_VLLM", "vllm"), ("MMQ_LMDEPLOY", "lmdeploy"), ("MMQ_PYTORCH", "python")):
        path = tmp_path / "env" / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
        found[variable] = str(path)
    return found


def shown(launch: Launch) -> str:
    """One flag or variable a line, as typed, with its reason; the program and the folder by their last names."""
    program, *words = launch.argv
    first = next(at for at, word in enumerate(words) if word.startswith("--"))
    folder = words[first - 1]
    head = shlex.join([Path(program).name, *words[: first - 1], "ARTIFACT"])
    lines = [f"    {head}", *(f"    {flag}    # {why}" for flag, why in launch.reasons)]
    text = "\n".join(lines).replace(folder, "ARTIFACT")
    return re.sub(r"PYTHONPATH=\S+/serve/inside", "PYTHONPATH=.../serve/inside", text)


def test_command_lines(
    artifact: Callable[..., Path], pebble: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folders = {kind: artifact(*how) if how else pebble for kind, how in KINDS.items()}
    loras = [f"{n}={write_adapter(tmp_path / n, pebble, ATTENTION, rank=r)}" for n, r in (("colour", 4), ("shape", 12))]
    large = {f"7B {kind}": write("qwen2.5-vl-7b", tmp_path / kind, packed=kind == "awq") for kind in ("fp16", "awq")}
    sections = [HEAD]
    for engine in ENGINES:
        for place, machine in MACHINES.items():
            kinds = folders | {"awq with two adapters": folders["awq"]} | (large if machine.gpus else {})
            for kind, folder in kinds.items():
                name = folder.name if folder in large.values() else "pebble" if kind == "fp16" else None
                try:
                    options = {"machine": machine, "environ": environment, "served_model_name": name}
                    options |= {"lora": loras} if "adapters" in kind else {}
                    text = shown(plan(engine, folder, **options))
                except (ValueError, OSError) as e:
                    text = f"    refused: {str(e).replace(str(folder), 'ARTIFACT')}"
                sections.append(f"\n## {engine}, {kind}, {place}\n\n{text}\n")
    found = "".join(sections).replace(str(tmp_path), "ADAPTERS")
    if os.environ.get("MMQ_ACCEPT"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert found == SNAPSHOT.read_text(encoding="utf-8"), "command lines changed; look at them, then `make accept`"


def test_every_flag_in_the_snapshot_has_a_reason() -> None:
    lines = [line for line in SNAPSHOT.read_text(encoding="utf-8").splitlines() if line.startswith("    -")]
    assert len(lines) > 100
    assert all(line.partition("    # ")[2] for line in lines)
