"""Other packages' quantizers as a table: what each makes, and what of that is asked for.

`environments.py` makes each an environment of its own, `peer.py` runs it there. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A package: the script that drives it, and the format of each (method, symmetric) it makes. The first row is its
    default method; a method's first row its default grid."""

    script: str
    makes: Mapping[tuple[str, bool], str]


BACKENDS = {
    "autoawq": Backend("autoawq.py", {("awq", False): "awq"}),
    "auto-gptq": Backend("auto_gptq.py", {("gptq", True): "gptq"}),
    "gptqmodel": Backend("gptqmodel.py", {("gptq", True): "gptq", ("awq", False): "awq"}),
    "llmcompressor": Backend(
        "llmcompressor.py",
        {
            ("awq", False): "compressed-tensors",
            ("awq", True): "compressed-tensors",
            ("gptq", True): "compressed-tensors",
            ("gptq", False): "compressed-tensors",
        },
    ),
    "auto-round": Backend("auto_round.py", {("autoround", True): "gptq", ("autoround", False): "awq"}),
}


@dataclass(frozen=True)
class Asked:
    """What a backend is asked for, settled: its name, the method, the grid and the format that comes of them."""

    backend: str
    method: str
    symmetric: bool
    format: str


def settle(
    name: str, *, method: str | None, symmetric: bool | None, format: str | None, keep: Sequence[str] = ()
) -> Asked:
    """Fill in what the user left open. ValueError for what this backend cannot do, and what it can."""
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; known are {', '.join(BACKENDS)}")
    makes = BACKENDS[name].makes
    fitting = [
        (m, s, f)
        for (m, s), f in makes.items()
        if method in (None, m) and symmetric in (None, s) and format in (None, f)
    ]
    if not fitting:
        able = ", ".join(f"{'symmetric' if s else 'asymmetric'} {m} in {f}" for (m, s), f in makes.items())
        raise ValueError(f"backend {name} cannot do that; it makes {able}")
    if keep:
        raise ValueError(f"backend {name} quantizes every linear of the decoder; leave --keep out")
    return Asked(name, *fitting[0])
