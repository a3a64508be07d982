"""vLLM as a command line: from an artifact's folder and a machine to a `Launch`.

Starts nothing and imports no vLLM. The flags are those of vLLM 0.26 to 0.33, on CUDA and on a CPU.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from ..export.subject import Subject, read_subject
from .adapter import Adapter
from .bill import PICTURES, read_model
from .flags import Flag, Launch, given, host_reason, launch_of, number, whole
from .lora import lora_bytes, lora_flags, rank_of, read_adapters, slots_of
from .machine import GIB, Machine, sized
from .parallel import Spread, check_spread, encoder_flags, node_flags, size_flags, spread_of, variables_of
from .plan_flags import asked_in
from .planner import MIN_CONTEXT, planned
from .programs import find_program, packages_beside
from .rules.releases import lacking_for_bnb, vllm_on_cpu, vllm_version
from .rules.rule import release
from .rules.vllm_shapes import vision_heads
from .shape import Shape, context_length, kv_token_bytes, read_shape, tokens_in

RUNNER_COUNTS = (0, 29)  # the release since which vLLM's newer model runner sets memory aside for all that it will take
LOWERED = ("--cpu-offload-gb", "--quantization", "-q", "--hf-overrides")  # engine flags that make a model smaller
CPU_CONTEXT = 8192  # tokens; a CPU prefills slowly, and eight such sequences bound the cache
CPU_SEQUENCES = 8
FEW_CORES = 4
CPU_RUNTIME = 2 * GIB  # what vLLM's two processes take beside weights and cache (2.3 GiB seen with a tiny model)


def vllm(
    target: Path,
    *,
    machine: Machine,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    served_model_name: str | None = None,
    trust_remote_code: bool = False,
    engine_bin: str | Path | None = None,
    lora: Sequence[str] = (),
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    **spread_options: Any,
) -> Launch:
    """The command that serves the checkpoint folder `target` under vLLM on this machine.

    `lora`: adapters as NAME=FOLDER; `spread_options` as `spread_of`'s (tp, pp, dp, nodes, ...). Flags in `extra` win
    over ours. ValueError when the model does not fit or cannot be dealt out so; OSError when vLLM or a package that
    this needs is not installed, or the folder is no checkpoint.
    """
    spread = spread_of(extra, **spread_options)
    shape = read_shape(target)
    program = find_program("vllm", environ, named=engine_bin)
    packages = packages_beside(program)
    _check_plugin(shape, packages)
    device = "cuda" if machine.gpus and not vllm_on_cpu(packages) else "cpu"
    subject = read_subject(target)
    check_spread(spread, subject, machine, device)
    if spread.ray and packages and "ray" not in packages:
        raise OSError("--ray needs Ray beside vLLM: `pip install ray` in the engine's environment, on every machine")
    host = given(extra, "--host") or host
    port = whole(extra, "--port", other=port)
    name = given(extra, "--served-model-name") or served_model_name or target.resolve().name
    if max_model_len is not None and max_model_len < 1:
        raise ValueError(f"max model length is {max_model_len}; it must be a number of tokens >= 1")

    adapters = read_adapters(lora, subject, taken=name, extra=extra)
    flags = [
        Flag("--host", host, host_reason(host)),
        Flag("--port", str(port), "where clients connect"),
    ]
    if spread.headless:
        flags = []  # nobody connects here
        host = str(spread.head)
    flags.append(Flag("--served-model-name", name, "the model's name in requests, not a path of this disk"))
    variables: dict[str, tuple[str, str]] = {}
    if device == "cuda":
        flags += _cuda_flags(target, machine, max_model_len, extra, spread, adapters)
        variables = {**_runner(shape, packages), **machine.order}
    else:
        beside = lora_bytes(subject, rank=rank_of(adapters), slots=slots_of(adapters, device=device))
        held = replace(shape, weights=shape.weights + beside)
        more, variables = _cpu_flags(held, machine, max_model_len, extra, spread, subject)
        flags += more
        if shape.vision:
            limit = json.dumps({"image": PICTURES}, separators=(",", ":"))
            flags.append(Flag("--limit-mm-per-prompt", limit, f"up to {PICTURES} pictures in one request"))
    heads = vision_heads(subject)
    flags += [*encoder_flags(spread, subject, heads), *node_flags(spread), *lora_flags(adapters, device=device)]
    variables |= variables_of(spread, machine, device)
    if trust_remote_code:
        flags.append(Flag("--trust-remote-code", None, "you asked for it: the checkpoint's own Python files will run"))
    variables["HF_HUB_OFFLINE"] = ("1", "every file is in the folder; no hub is asked")
    variables["VLLM_NO_USAGE_STATS"] = ("1", "nothing is reported to anyone")

    head = (str(program), "serve", str(target.resolve()))
    launch = launch_of(head, flags, extra, variables, environ, host=host, port=port, name=name, device=device)
    return replace(launch, serves=not spread.headless)


def _check_plugin(shape: Shape, packages: Mapping[str, str]) -> None:
    version = vllm_version(packages)
    if shape.quantized == "bitsandbytes" and version and (missing := lacking_for_bnb(version, packages)):
        raise OSError(
            f"a bitsandbytes checkpoint under vLLM {version} needs {' and '.join(missing)}: "
            f"`pip install {' '.join(missing)}` in the engine's environment"
        )


def _runner(shape: Shape, packages: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """vLLM's older model runner for models with pictures, where the newer one measures its memory without them.

    Read in v1/worker/gpu/model_runner.py of 0.26 to 0.30 and 0.32: `profile_run` looks at pictures since 0.27,
    `profile_cudagraph_memory` tells more than 0 since 0.29. The older one (gpu_model_runner.py) does both.
    """
    version = packages.get("vllm")
    if version is None or not shape.vision or release(version) >= RUNNER_COUNTS:
        return {}
    missing = "pictures and CUDA graphs" if release(version) < (0, 27) else "CUDA graphs"
    why = f"the newer runner of vLLM {version} sets no memory aside for {missing}"
    return {"VLLM_USE_V2_MODEL_RUNNER": ("0", why)}


def _context(shape: Shape, wanted: int | None, room: int) -> tuple[int, str]:
    """(tokens, reason) for --max-model-len: what was asked, else what fits into `room` bytes of cache."""
    if wanted is not None:
        return wanted, "you asked for it"
    top = min(shape.context, CPU_CONTEXT)
    fits = tokens_in(room, shape.kv_token) if shape.kv_token else top
    if fits >= top:
        return (
            top,
            "the model's whole context fits" if top == shape.context else "enough for several pictures and turns",
        )
    if fits < MIN_CONTEXT:
        raise ValueError(
            f"this machine's memory: {shape.weights / GIB:.2f} GiB of weights leave room for {fits} tokens of "
            "context; quantize the model to 4 bits, free memory, or use a larger machine"
        )
    fits = fits // 256 * 256
    return fits, f"of {shape.context} tokens this many fit beside the weights"


def _cuda_flags(
    target: Path,
    machine: Machine,
    wanted: int | None,
    extra: Sequence[str],
    spread: Spread,
    adapters: Sequence[Adapter],
) -> tuple[Flag, ...]:
    """The plan's flags for the fullest of the cards that are used here. What a user asks for by number is never refused
    here: the plan is an estimate, and the engine knows better."""
    model, card = read_model(target), min(machine.gpus[: spread.here], key=lambda gpu: (gpu.free, gpu.memory))
    if wanted is not None and not card.memory:
        return (Flag("--max-model-len", str(wanted), f"you asked for it; nobody knows whether {card.name} has room"),)
    sized(card)
    ask = asked_in(extra, context=wanted)
    ask = replace(ask, tp=spread.tp, pp=spread.pp, dp=spread.dp)
    ask = replace(ask, lora_rank=rank_of(adapters), lora_slots=slots_of(adapters))
    if ask.context is not None:
        ask = replace(ask, context=min(ask.context, context_length(model.config)))
    found = planned(model, card, ask)
    if found.problem and ask.context is None:
        if (lower := next((name for name in LOWERED if given(extra, name)), None)) is None:
            raise ValueError(
                f"{card.name}: {found.problem}; what would fit: {'; or '.join(found.changes)} "
                f"(`mmq plan {quote(str(target))}` shows where the memory goes; --max-model-len N starts it anyway)"
            )
        asked = Flag("--max-model-len", "auto", f"the plan does not count what {lower} saves; vLLM takes what fits")
        return (asked, *(flag for flag in found.flags if flag.name != asked.name))
    if wanted is None:
        return found.flags
    doubt = f"; by the plan's estimate it does not fit: {found.problem}" if found.problem else ""
    asked = Flag("--max-model-len", str(wanted), f"you asked for it{doubt}")
    return (asked, *(flag for flag in found.flags if flag.name != asked.name))


def _cpu_flags(
    shape: Shape, machine: Machine, wanted: int | None, extra: Sequence[str], spread: Spread, subject: Subject
) -> tuple[list[Flag], dict[str, tuple[str, str]]]:
    """For each of the processes here: its share of the weights, of a token's cache, of the memory and of the cores."""
    if spread.cards > 1:
        kv_token = kv_token_bytes(subject.config, tp=spread.tp)
        shape = replace(shape, weights=math.ceil(shape.weights / spread.tp), kv_token=kv_token)
        machine = replace(machine, available=machine.available // spread.here)
    room = machine.available - shape.weights - CPU_RUNTIME
    tokens, reason = _context(shape, wanted, room)
    sequences = int(number(extra, "--max-num-seqs") or CPU_SEQUENCES)
    tokens = max(int(number(extra, "--max-model-len") or tokens), 0) or tokens  # -1: the engine's own choice
    # one more sequence than fits is no harm: vLLM queues; one sequence must fit
    need = max(shape.kv_token * tokens, min(shape.kv_token * tokens * sequences, room // 2))
    space = max(1, math.ceil(need / GIB))
    flags = [
        Flag("--max-model-len", str(tokens), reason),
        Flag("--max-num-seqs", str(sequences), f"{machine.cores} cores share the work; more sequences only wait"),
        Flag("--enforce-eager", None, "no compilation: it takes minutes and a C++ compiler, and gains little on a CPU"),
        *size_flags(spread.tp, spread.pp, spread.dp),
    ]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": (str(space), f"GiB of cache, for {sequences} sequences of {tokens} tokens"),
        "TORCHDYNAMO_DISABLE": ("1", "the few functions compiled even in eager mode run as they are"),
    }
    if (
        machine.cores <= FEW_CORES and spread.cards == 1
    ):  # with more, the worker's own process is where vLLM binds threads to cores
        why = f"core and worker in one process: 0.4 GiB less, and {machine.cores} cores have no use for two"
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = ("0", why)
    if machine.cores > 1 and spread.cards == 1:
        # on two quiet cores runs of one load then agree within 20%; under other work they differ all the same
        why = "a core for requests and clients; compute threads that wait for each other stall without it"
        variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = ("1", why)
    if shape.quantized:
        variables["VLLM_CPU_INT4_W4A8"] = ("0", "else vLLM rounds activations to 8 bits too, where the CPU has AMX")
    return flags, variables
