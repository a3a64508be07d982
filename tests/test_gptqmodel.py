"""GPTQ's zero points by gptqmodel's own reading, in an environment of its own: vLLM ignores them when symmetric."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PINS = Path(__file__).parent.parent / "requirements" / "gptqmodel.txt"
SCRIPT = """
import json, sys
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from mmq.export.packing import pack_gptq
from mmq.quantize.grid import Grid, dequantize, quantize

torch.manual_seed(0)
x = quantize(torch.randn(256, 384), Grid(128, True, torch.float16))
module = TorchLinear(bits=4, group_size=128, sym=True, desc_act=False, in_features=384, out_features=256, bias=False,
                     register_buffers=True)
for name, tensor in pack_gptq(x).items():
    getattr(module, name).data.copy_(tensor)
convert_gptq_v1_to_v2_format_module(module, 4, torch.int32)
module.post_init()
apart = lambda: float((module.dequantize_weight().T.float() - dequantize(x)).abs().max())
right = apart()
module.qzeros.data += 0x11111111  # every zero point one too high, as a version 2 writer would leave them
print("found", json.dumps([right, apart(), float(dequantize(x).abs().max())]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees this environment's packages and, over them, gptqmodel with what it needs besides."""
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    place = tmp_path_factory.mktemp("gptqmodel") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (own / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    interpreter = place / "bin" / "python"
    command = [uv, "pip", "install", "--quiet", "--python", str(interpreter), "--no-deps", "--no-build-isolation"]
    try:
        done = subprocess.run(
            [*command, "-r", str(PINS)],
            env={**os.environ, "BUILD_CUDA_EXT": "0", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        pytest.skip(f"gptqmodel cannot be installed here: {e}")
    if done.returncode:
        pytest.skip(f"gptqmodel cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return interpreter


def test_gptqmodel_reads_our_zero_points(python: Path) -> None:
    run = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("found "))
    right, wrong, largest = json.loads(line.removeprefix("found "))
    assert right <= largest * 2**-10  # it multiplies in float16: nothing but that rounding
    assert wrong > 0.1
