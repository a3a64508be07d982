"""One model over several cards and machines: what can be dealt out, and vLLM's flags for each machine.

By vLLM's own launchers: processes on one machine, `--nnodes` where a replica spans machines, `--data-parallel-address`
where each has whole replicas, Ray where asked for. Checks come before anything starts. Knows no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..export.subject import Subject
from .flags import Flag, given, number
from .machine import Machine
from .rules.vllm_classes import NO_PIPELINE, WHOLE_ENCODER
from .shape import is_mixture
from .shares import undealt

PORT = 29501  # of the first machine, where the others find it; vLLM's own for `--master-port`
RAY_PORT = 6379
OPEN = "open between them and to nobody else: vLLM trusts what comes there (and at ports that it chooses itself)"
SIZES = (  # field, flag, its short spelling, why
    ("tp", "--tensor-parallel-size", "-tp", "each layer over so many cards"),
    ("pp", "--pipeline-parallel-size", "-pp", "the layers in so many stages"),
    ("dp", "--data-parallel-size", "-dp", "so many replicas behind one address"),
)


@dataclass(frozen=True)
class Spread:
    """`dp` replicas of `tp` x `pp` cards each, over `nodes` machines, of which this is number `rank`, counted from 0.

    `head`: the address of number 0. `ray`: the machines are a Ray cluster, which deals out the cards itself.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    nodes: int = 1
    rank: int = 0
    head: str | None = None
    port: int = PORT
    ray: bool = False

    def __post_init__(self) -> None:
        for name, option in (("tp", "--tp"), ("pp", "--pp"), ("dp", "--dp"), ("nodes", "--nodes")):
            if getattr(self, name) < 1:
                raise ValueError(f"{option} is {getattr(self, name)}; it must be a number >= 1")
        if self.nodes == 1 and (self.rank or self.head):
            raise ValueError("--node-rank and --master-addr are for several machines; give --nodes N too")
        if self.nodes == 1:
            return
        if not self.head:
            raise ValueError(f"--nodes {self.nodes} wants --master-addr, the first machine's address for the others")
        if not 0 <= self.rank < self.nodes:
            raise ValueError(f"--node-rank is {self.rank}; of {self.nodes} machines it must be 0 to {self.nodes - 1}")
        if self.ray and self.rank:
            line = f"`ray start --address={self.head}:{RAY_PORT} --block`"
            raise ValueError(f"under Ray the engine is started on machine 0 alone; here: {line}")
        if self.ray:
            return
        if self.cards % self.nodes:
            raise ValueError(
                f"{self.cards} cards (--tp {self.tp} x --pp {self.pp} x --dp {self.dp}) cannot be dealt evenly to "
                f"{self.nodes} machines; change one of the four"
            )
        if self.dp % self.nodes and self.nodes % self.dp:
            raise ValueError(
                f"{self.dp} replicas cannot be dealt evenly to {self.nodes} machines; a multiple of --nodes as --dp, "
                "or a divisor of it"
            )

    @property
    def spans(self) -> bool:
        """Whether each replica takes more than one machine."""
        return self.nodes > self.dp and not self.ray

    @property
    def cards(self) -> int:
        """Cards in all."""
        return self.tp * self.pp * self.dp

    @property
    def here(self) -> int:
        """Cards of this machine; with Ray, of all machines together."""
        return self.cards if self.ray else self.cards // self.nodes

    @property
    def headless(self) -> bool:
        """Whether this machine computes only: the first one answers requests."""
        return self.rank > 0 and not self.ray


def spread_of(
    extra: Sequence[str] = (),
    *,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    ray: bool = False,
) -> Spread:
    """What was asked for, the engine's own flags in `extra` first. ValueError where it contradicts itself."""
    asked = {"tp": tp, "pp": pp, "dp": dp}
    sizes = {}
    for name, flag, short, _ in SIZES:
        theirs, ours = number(extra, flag, short), asked[name]
        sizes[name] = int(theirs) if theirs is not None else 1 if ours is None else ours
    ray = ray or given(extra, "--distributed-executor-backend") == "ray"
    if own := _own_layout(extra, sizes["dp"]):
        return Spread(**sizes, **own, ray=ray)
    if nodes is not None and nodes > 1 and node_rank is None and not ray:
        raise ValueError(
            f"--nodes {nodes} wants --node-rank: 0 on the first machine, which answers, 1 on the next, ..."
        )
    machines = 1 if nodes is None else nodes
    return Spread(**sizes, nodes=machines, rank=node_rank or 0, head=master_addr, ray=ray)


def _own_layout(extra: Sequence[str], dp: int) -> dict[str, Any]:
    """Machines, rank and address where the engine's flags in `extra` say them all by themselves; {} where not."""
    whole, local = number(extra, "--nnodes", "-n"), number(extra, "--data-parallel-size-local", "-dpl")
    each = int(local or 1)  # a first machine without replicas of its own counts as one with one
    nodes = int(whole) if whole is not None else 1 if local is None else dp // each
    if nodes < 2:
        return {}
    first = number(extra, "--data-parallel-start-rank", "-dpr") or 0
    rank = int(number(extra, "--node-rank", "-r") or first // each)
    head = given(extra, "--master-addr") or given(extra, "--data-parallel-address", "-dpa")
    return {"nodes": nodes, "rank": rank, "head": head or "127.0.0.1"}


def check_spread(spread: Spread, subject: Subject, machine: Machine, device: str) -> None:
    """ValueError where the model cannot be dealt out so, or the machine has too few cards or cores."""
    if why := undealt(subject.config, tp=spread.tp, pp=spread.pp):
        raise ValueError(f"{why}; use a smaller {'--pp' if 'stages' in why else '--tp'}")
    if spread.pp > 1 and subject.architecture in NO_PIPELINE:
        raise ValueError(f"vLLM's {subject.architecture} cannot be cut into stages; use --tp instead of --pp")
    if spread.spans and spread.dp > 1 and not is_mixture(subject.config):
        raise ValueError(
            f"{spread.dp} replicas over {spread.nodes} machines: a dense model's replicas span machines in vLLM "
            f"through Ray alone; --ray, or --dp {spread.nodes} with fewer cards each, or a server for each replica"
        )
    if device == "cpu":
        if spread.pp > 1:
            raise ValueError("vLLM's CPU backend has no pipeline; use --tp or --dp, or GPUs")
        if spread.ray:
            raise ValueError("vLLM's CPU backend does not run under Ray; leave --ray out, or use GPUs")
        if spread.here > machine.cores:
            raise ValueError(f"{spread.here} processes want a core each; this machine has {machine.cores}")
    elif spread.here > len(machine.gpus) and not spread.ray:  # a Ray cluster is as large as it is
        raise ValueError(
            f"--tp {spread.tp} x --pp {spread.pp} x --dp {spread.dp}"
            + (f" on {spread.nodes} machines" if spread.nodes > 1 else "")
            + f" wants {spread.here} GPUs here, and there are {len(machine.gpus)}; ask for less, or give more --nodes"
        )


def size_flags(tp: int, pp: int, dp: int) -> list[Flag]:
    """The flags of the three sizes, as far as they are not 1."""
    asked = {"tp": tp, "pp": pp, "dp": dp}
    return [Flag(flag, str(asked[name]), why, (short,)) for name, flag, short, why in SIZES if asked[name] > 1]


def node_flags(spread: Spread) -> list[Flag]:
    """The flags of this machine among several, and Ray's; none where one machine is enough."""
    flags: list[Flag] = []
    if spread.ray:
        flags.append(Flag("--distributed-executor-backend", "ray", "the Ray cluster's cards, wherever they are"))
        if spread.dp > 1:
            flags.append(Flag("--data-parallel-backend", "ray", "Ray starts the replicas"))
    elif spread.spans:
        flags.append(Flag("--nnodes", str(spread.nodes), "machines that share the model", ("-n",)))
        flags.append(Flag("--node-rank", str(spread.rank), "which of them this is", ("-r",)))
        flags.append(Flag("--master-addr", str(spread.head), "where the others find the first"))
        flags.append(Flag("--master-port", str(spread.port), f"and its port, {OPEN}"))
    elif spread.nodes > 1:
        each = spread.dp // spread.nodes
        flags.append(Flag("--data-parallel-size-local", str(each), "replicas on this machine", ("-dpl",)))
        if spread.rank:
            first = str(spread.rank * each)
            flags.append(Flag("--data-parallel-start-rank", first, "the first of them, counted over all", ("-dpr",)))
        flags.append(Flag("--data-parallel-address", str(spread.head), "where the others find the first", ("-dpa",)))
        flags.append(Flag("--data-parallel-rpc-port", str(spread.port), f"and its port, {OPEN}", ("-dpp",)))
    if spread.headless:
        flags.append(Flag("--headless", None, "this machine computes; the first one answers requests"))
    return flags


def encoder_flags(spread: Spread, subject: Subject, heads: int) -> list[Flag]:
    """What keeps a picture encoder whole on each card, where its `heads` cannot be dealt out. ValueError where vLLM's
    class has no such way."""
    if heads % spread.tp == 0:
        return []
    if subject.architecture in WHOLE_ENCODER:
        why = f"{heads} heads of the picture encoder cannot be dealt to {spread.tp} cards: each keeps it whole"
        return [Flag("--mm-encoder-tp-mode", "data", why)]
    raise ValueError(
        f"{heads} heads of the picture encoder cannot be dealt to {spread.tp} GPUs, and vLLM's {subject.architecture} "
        f"cannot keep it whole on each; use a --tp that divides {heads}"
    )


def variables_of(spread: Spread, machine: Machine, device: str) -> dict[str, tuple[str, str]]:
    """Environment variables (name -> value, reason): each process's cores on a CPU, the first machine's own address."""
    found: dict[str, tuple[str, str]] = {}
    if spread.nodes > 1 and spread.rank == 0:
        found["VLLM_HOST_IP"] = (str(spread.head), "the address that the other machines reach this one at")
    if device == "cpu" and spread.cards > 1:
        cores = machine.core_ids or tuple(range(machine.cores))
        spare = 1 if len(cores) > spread.here else 0
        each = (len(cores) - spare) // spread.here
        dealt = (cores[spare + i * each : spare + (i + 1) * each] for i in range(spread.here))
        bound = "|".join(",".join(map(str, ids)) for ids in dealt)
        found["VLLM_CPU_OMP_THREADS_BIND"] = (bound, "each process's own cores; vLLM would want a NUMA node for each")
    return found


def ray_lines(spread: Spread) -> list[tuple[str, str]]:
    """(where, command): what makes the machines a Ray cluster, before the engine starts on the first."""
    if not spread.ray or spread.nodes == 1:
        return []
    return [
        ("machine 0, first", f"ray start --head --node-ip-address={spread.head} --port={RAY_PORT}"),
        *((f"machine {n}", f"ray start --address={spread.head}:{RAY_PORT} --block") for n in range(1, spread.nodes)),
    ]
