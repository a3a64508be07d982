"""NF4 through bitsandbytes itself (Dettmers et al., QLoRA, 2023): blocks of 64, double quantization, no calibration."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, cast

import torch

from .grid import Grid
from .method import Nf4, Problem, Solution

BLOCKSIZE = 64
MISSING: Any = object()


@functools.cache
def functional() -> Any:
    """bitsandbytes.functional. ValueError when it is not installed.

    On a CPU with AVX-512 BF16 its import takes a kernel from the Hugging Face Hub and runs it, where the package
    `kernels` is there to do that, and warns where it is not: code that nobody asked for, of no revision that is named.
    """
    log, modules = logging.getLogger("bitsandbytes.backends.cpu.ops"), cast(dict[str, Any], sys.modules)
    kept, level = modules.get("kernels", MISSING), log.level
    log.setLevel(logging.ERROR)
    modules["kernels"] = None  # so it cannot be imported
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ValueError("bitsandbytes is not installed; pip install 'mmq-toolkit[bnb]'") from None
    finally:
        log.setLevel(level)
        del modules["kernels"]
        if kept is not MISSING:
            modules["kernels"] = kept
    return functional


def bnb(problem: Problem, grid: Grid) -> Solution:
    """Every linear of the layer as NF4. ValueError when bitsandbytes is not installed."""
    names = [n for group in problem.groups for n in group.linears]
    made = {n: nf4(problem.weights[f"{n}.weight"], grid.scale_dtype) for n in names}
    errors = {}
    for name, x in made.items():
        w = problem.weights[f"{name}.weight"].float()
        errors[name] = float((x.weight - w).square().sum() / w.square().sum().clamp_min(1e-30))
    return Solution(made, errors=errors)


def nf4(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Nf4:
    """[out, in] as NF4 with bitsandbytes' own tensor names; dequantized through bitsandbytes too.

    `dtype` is what the packed state says the weight is to become.
    """
    library = functional()
    packed, state = library.quantize_4bit(
        weight.to(dtype), blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    restored = library.dequantize_4bit(packed, state).float()
    tensors = {"": packed.cpu(), **{k: v.cpu() for k, v in state.as_dict(packed=True).items()}}
    return Nf4(tensors, restored)
