"""The PyTorch engine as a command line: `transformers serve` of one folder, by pytorch_engine.py.

Starts nothing. It loads every int4 format by restoring it to 16 bit, so what must fit is the 16-bit model; where that
does not fit a card, weights stay packed, which is slower. The flags are those of transformers 5.19.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.subject import Subject, read_subject
from ..quantize.family import row_of
from .flags import Flag, Launch, given, host_reason, launch_of, number, switched
from .lora import held_bytes, read_adapters
from .machine import GIB, Machine
from .planner import MIN_CONTEXT
from .programs import find_program, packages_beside, python_of
from .shape import Shape, is_mixture, read_shape, tokens_in, weight_bytes
from .weights import ITEM

NEEDS = ("transformers", "fastapi", "uvicorn", "mmq-toolkit")
RESTORED = ("awq", "gptq", "compressed-tensors")
RUNTIME = GIB  # what Python and torch take beside the weights (0.6 GiB seen with a tiny model on a CPU)
CACHE = 0.7  # of what is left, for one sequence's keys and values
FASTER = "--engine vllm computes with them packed"
# what requests find here, for --print and `mmq doctor`
LACKS = "no structured outputs, one request at a time"


def pytorch(
    target: Path,
    *,
    machine: Machine,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    served_model_name: str | None = None,
    trust_remote_code: bool = False,
    lora: Sequence[str] = (),
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    engine_bin: str | Path | None = None,
    **others: Any,
) -> Launch:
    """The command that serves the checkpoint folder `target` by `transformers serve` on this machine.

    `lora`: adapters as NAME=FOLDER. Flags in `extra` win over ours. ValueError when the restored model does not fit, or
    an adapter is for another; OSError when the environment lacks a package, or the folder is no checkpoint.
    """
    if asked := [name for name, value in others.items() if value]:
        raise ValueError(f"the engine pytorch has no --{asked[0].replace('_', '-')}; --engine vllm has")
    if switched(extra, "--continuous-batching"):
        raise ValueError("--continuous-batching draws every answer as the first was asked for; leave it out")
    subject = read_subject(target)
    program = python_of(find_program("pytorch", environ, named=engine_bin))
    packages = packages_beside(program)
    if missing := missing_beside(program, packages):
        line = f"`{program} -m pip install 'mmq-toolkit[pytorch]'`"
        raise OSError(f"the engine pytorch has no {', '.join(missing)} in the environment of {program}: {line}")
    host = given(extra, "--host") or host
    port = int(number(extra, "--port") or port)
    name = given(extra, "--served-model-name") or served_model_name or target.resolve().name
    if max_model_len is not None and max_model_len < 1:
        raise ValueError(f"max model length is {max_model_len}; it must be a number of tokens >= 1")
    adapters = read_adapters(lora, subject, engine="pytorch", taken=name)
    packed = switched(extra, "--keep-packed")
    seat = _seat(subject, machine, packages, packed=packed, beside=held_bytes(adapters))
    length, length_why = _context(read_shape(target), max_model_len, seat.room)
    flags = [
        Flag("--host", host, host_reason(host)),
        Flag("--port", str(port), "where clients connect"),
        Flag("--served-model-name", name, "the model's name in requests, not a path of this disk"),
        Flag("--max-model-len", str(length), length_why),
        Flag("--device", seat.device, seat.why),
    ]
    if seat.packed:
        why = f"weights stay int4 and are restored at each use, which is slow: in 16 bit they do not fit; {FASTER}"
        flags.append(Flag("--keep-packed", None, why))
    for adapter in adapters:
        why = f"rank {adapter.rank}, beside the model: a request names it as its model"
        flags.append(Flag("--lora", f"{adapter.name}={adapter.folder.resolve()}", why))
    if trust_remote_code:
        flags.append(Flag("--trust-remote-code", None, "you asked for it: the checkpoint's own Python files will run"))
    variables = {"HF_HUB_OFFLINE": ("1", "every file is in the folder; no hub is asked")}
    head = (str(program), "-m", f"{__package__}.pytorch_engine", str(target.resolve()))
    device = "cpu" if given(extra, "--device") == "cpu" or seat.device == "cpu" else "cuda"
    return launch_of(head, flags, extra, variables, environ, host=host, port=port, name=name, device=device)


def missing_beside(python: Path, packages: Mapping[str, str]) -> list[str]:
    """What the engine needs and is not there; empty where it is not known what is there."""
    if python.absolute() == Path(sys.executable).absolute():  # this very one, which may have packages from anywhere
        return [name for name in NEEDS[:-1] if importlib.util.find_spec(name) is None]
    return [name for name in NEEDS if packages and name not in packages]


def restored_bytes(subject: Subject) -> int:
    """Bytes of the weights as the engine keeps them: AWQ, GPTQ and compressed-tensors in 16 bit, the rest as stored."""
    stored = weight_bytes(subject.folder)
    packed = {linear.name: linear for linear in subject.packed}
    if subject.method not in RESTORED:
        return stored
    theirs = sum(
        math.prod(t.shape) * ITEM.get(t.dtype, 2)
        for name, t in subject.tensors.items()
        if name.rpartition(".")[0] in packed
    )
    return stored - theirs + sum(2 * linear.inputs * linear.outputs for linear in packed.values())


def _context(shape: Shape, wanted: int | None, room: int) -> tuple[int, str]:
    """(tokens, why): the longest sequence, of those that leave a part of `room` bytes to a step's own tensors."""
    if wanted is not None:
        return (wanted, "you asked for it") if wanted <= shape.context else (shape.context, "the model's whole context")
    fits = tokens_in(int(CACHE * room), shape.kv_token)
    if fits >= shape.context:
        return shape.context, "the model's whole context fits"
    if fits < MIN_CONTEXT:
        raise ValueError(
            f"beside the weights {room / GIB:.2f} GiB are left, room for {fits} tokens of context; free memory, use a "
            "larger machine, or --engine vllm, which keeps int4 weights packed"
        )
    return fits, f"of {shape.context} tokens this many fit beside the weights"


@dataclass(frozen=True)
class Seat:
    """Where the model goes and why, the bytes left there beside its weights, and whether these stay packed."""

    device: str
    why: str
    room: int
    packed: bool = False


def _seat(subject: Subject, machine: Machine, packages: Mapping[str, str], *, packed: bool, beside: int) -> Seat:
    """The first that holds the model: a card, all cards, a card with packed weights; or the CPU. `packed`: it is asked
    for; `beside`: bytes of what is kept besides. ValueError where it fits nowhere."""
    gpu = bool(machine.gpus) and not packages.get("torch", "").endswith("+cpu")
    small = subject.method in RESTORED and row_of(subject.config) is None and not is_mixture(subject.config)
    if packed and not small:
        raise ValueError("--keep-packed is for dense AWQ, GPTQ and compressed-tensors of transformers' own classes")
    size = beside + (weight_bytes(subject.folder) if packed else restored_bytes(subject))
    how = f"{subject.method} restored to 16 bit as it is loaded" if subject.method in RESTORED else "weights as stored"
    how = f"{subject.method} as stored" if packed else how
    if row_of(subject.config) is not None:
        how += ", by mmq's own class" if gpu else ", by mmq's own class in float32"
        size *= 1 if gpu else 2
    need = size + RUNTIME
    said = f"{how}: about {need / GIB:.1f} GiB with PyTorch's own"
    if not gpu:
        if need <= machine.available:
            return Seat("cpu", f"no GPU that this PyTorch can use; {said}; {LACKS}", machine.available - need)
        room, where = machine.available, "this machine has"
    else:
        first, every = machine.gpus[0], sum(gpu.free for gpu in machine.gpus)
        if need <= first.free:
            return Seat("cuda:0", f"{said}, of {first.free / GIB:.1f} GiB free; {LACKS}", first.free - need)
        if need <= every:
            why = f"{said}: more than one card has, so layers are spread over {len(machine.gpus)}; {LACKS}"
            return Seat("auto", why, every - need)
        left = first.free - weight_bytes(subject.folder) - beside - RUNTIME
        if small and left > 0:
            return Seat("cuda:0", f"{said}, and {first.free / GIB:.1f} are free; {LACKS}", left, packed=True)
        room, where = every, "this machine's cards have"
    raise ValueError(
        f"{said}; {where} {room / GIB:.1f} GiB free. --engine vllm keeps int4 weights packed; or quantize with "
        "--method bnb, which stays in 4 bit here too"
    )
