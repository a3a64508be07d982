"""How the walk spends GPU memory, and what it will need: known before it starts.

Knows shapes, not tensors. The formulas follow steps.py and gram.py; docs/benchmarks.md holds them against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MICRO_BATCH = 4096  # tokens in one forward pass: enough to fill a GPU, few enough to fit beside a layer
SMALLEST = 512


@dataclass(frozen=True)
class Memory:
    """What the walk may choose: about how many tokens a forward pass takes, and whether the hidden states between
    layers wait on the host."""

    micro_batch: int = MICRO_BATCH
    park: bool = False

    def __str__(self) -> str:
        where = ", activations on the host" if self.park else ""
        return f"{self.micro_batch} tokens a forward pass{where}"

    def smaller(self) -> Memory | None:
        """The next thing to try when memory ran out; None when all has been tried."""
        if self.micro_batch > SMALLEST:
            return replace(self, micro_batch=self.micro_batch // 2)
        return None if self.park else replace(self, park=True)
