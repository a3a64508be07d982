"""A stated card on another one: the engine gets of the card that is here what it would have on the stated one.

What vLLM chooses by a card's size it is told as it would choose there; its share of the card is scaled. What it then
holds NVML sees (`nvml`). Knows vLLM's flags for memory, and starts nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass

from ..serve.cards import chosen_card
from ..serve.flags import Launch
from ..serve.machine import GIB, Gpu, Machine
from ..serve.overhead import CUDA_CONTEXT, batched_tokens, default_sequences
from ..serve.planner import GPU_SHARE

SHARE = "--gpu-memory-utilization"
SAME = 0.06  # a card whose memory is within so much of the budget is the stated card: makers' sizes are round numbers
USUAL = 24 * GIB  # where nobody states a card


@dataclass(frozen=True)
class Budget:
    """The card that is stated, and how its memory is held to here.

    `size` in bytes; `card` is it as a planner takes it; `factor` scales the engine's share of the card that is here,
    None where an engine here cannot be held to the budget, and `why` tells why.
    """

    size: int
    card: Gpu
    factor: float | None
    why: str = ""

    @property
    def enforced(self) -> bool:
        """Whether an engine here has just this budget."""
        return self.factor is not None


def budget_of(machine: Machine, engine: str, *, vram: int | None = None, card: str | None = None) -> Budget:
    """The budget of `vram` bytes or of a `card` by name (24 GiB without either), and whether it can be held to here.

    ValueError for both at once, and for a card that is not in the table.
    """
    here = machine.gpus[0] if machine.gpus else None
    stated, _ = chosen_card(machine, vram=USUAL if vram is None and card is None else vram, card=card)
    size = stated.memory
    if here is None:
        return Budget(size, stated, None, "no GPU is here")
    if engine != "vllm":
        return Budget(size, stated, None, f"{engine} has no setting for a share of the whole card")
    if abs(here.memory / size - 1) <= SAME:
        return Budget(size, here, 1.0)
    if here.memory < size:
        return Budget(size, stated, None, f"{here.name} has {here.memory / GIB:.1f} GiB")
    if here.free < GPU_SHARE * size + CUDA_CONTEXT:
        return Budget(size, stated, None, f"of {here.name} {here.free / GIB:.1f} GiB are free")
    return Budget(size, stated, size / usable(here))


def planned_for(machine: Machine, budget: Budget) -> Machine:
    """The machine that a launch is planned for: with the stated card in place of its own, where that is held to."""
    return dataclasses.replace(machine, gpus=(budget.card,)) if budget.enforced else machine


def settled(size: int) -> tuple[str, ...]:
    """What vLLM chooses by the card's size, as flags: as it would choose on a card of `size` bytes."""
    return (
        *("--max-num-batched-tokens", str(batched_tokens(size))),
        *("--max-num-seqs", str(default_sequences(size))),
    )


def scaled(launch: Launch, factor: float) -> Launch:
    """The launch with its share of the card times `factor`: as much memory of a larger card."""
    at = launch.argv.index(SHARE) + 1
    share = f"{float(launch.argv[at]) * factor:.6f}"
    return dataclasses.replace(launch, argv=(*launch.argv[:at], share, *launch.argv[at + 1 :]))


def usable(card: Gpu) -> int:
    """Bytes of the first card as CUDA tells them, of which vLLM takes its share: less than nvidia-smi's, which counts
    what the driver keeps. Opens no context there, which would be memory that an engine sees."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return card.memory
    device, size = ctypes.c_int(), ctypes.c_size_t()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return card.memory if failed else size.value
