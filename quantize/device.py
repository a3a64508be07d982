"""torch loaded for this work, and the device that it is done on. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def load_torch() -> None:
    """Import torch so that its CPU threads sleep while they wait for each other, and its GPU memory does not splinter.

    Spinning, which is OpenMP's default, stalls on a machine that does anything else: quantizing pebble on two busy
    cores took 147 s so, and 7.5 s this way. GPU memory in fixed segments took 9.1 GiB for 5.6 GiB of tensors. The
    variables are read when torch is loaded, and no engine inherits them.
    """
    wanted = {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    own = {k: v for k, v in wanted.items() if k not in os.environ}
    os.environ.update(own)
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()
    for name in own:
        del os.environ[name]


def pick_device(name: str) -> str:
    """'auto' is the first GPU where there is one. ValueError when a GPU is asked for and absent."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"--device {name}: it must be auto, cpu, cuda or cuda:N")
    return name


@contextmanager
def tensor_cores(use: bool = True) -> Iterator[None]:
    """Float32 products on a GPU's tensor cores (TF32: ten bits of mantissa, and sums in float32), or not on them."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = use
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
