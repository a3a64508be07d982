"""bitsandbytes as mmq imports it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = importlib.util.find_spec("bitsandbytes") is None
KERNELS = """
from pathlib import Path

def get_kernel(name, **more):
    Path({asked!r}).write_text(name)
    raise OSError("no hub here")
"""
TAKES_UP = """
import sys, types
sys.modules["kernels"] = before = types.ModuleType("kernels")
from mmq.quantize.bnb import functional
assert functional().quantize_4bit
assert sys.modules["kernels"] is before
"""


@pytest.mark.skipif(MISSING, reason="bitsandbytes is not installed")
def test_no_kernel_comes_from_a_hub(tmp_path: Path) -> None:
    """Where the package that would fetch and run one is installed."""
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(KERNELS.format(asked=str(asked)))

    def run(code: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stderr

    ours = "import sys; from mmq.quantize.bnb import functional; functional(); assert 'kernels' not in sys.modules"
    assert run(ours) == ""
    assert not asked.exists()
    assert run(TAKES_UP) == ""
    run("import bitsandbytes")
    if not asked.exists():
        pytest.skip("bitsandbytes asks for a kernel on CPUs with AVX-512 BF16 alone")
    assert asked.read_text().startswith("kernels-community/")
