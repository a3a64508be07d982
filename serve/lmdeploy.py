"""LMDeploy as a command line: from an artifact's folder and a machine to a `Launch`.

Starts nothing and imports no LMDeploy, which lives in an environment of its own. The flags are those of 0.18, on CUDA.
Its memory is lmdeploy_memory.py's arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.subject import Subject
from .bill import Model, read_model
from .flags import Flag, Launch, given, host_reason, launch_of, number, whole
from .lmdeploy_memory import BATCH, cache_of
from .machine import GIB, Gpu, Machine, sized
from .planner import MIN_CONTEXT
from .programs import find_program, packages_beside, python_of
from .rules import lmdeploy as rules
from .rules.rule import judge
from .rules.verdicts import setting_of
from .safety import NOBODY
from .shape import context_length

FORMATS = ("awq", "gptq", "compressed-tensors")
LIBRARIES = ("cublas", "cuda_runtime", "nccl")  # that TurboMind is linked to, as nvidia's packages hold them


def lmdeploy(
    target: Path,
    *,
    machine: Machine,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    served_model_name: str | None = None,
    trust_remote_code: bool = False,
    tp: int | None = None,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    engine_bin: str | Path | None = None,
    **others: Any,
) -> Launch:
    """The command that serves the checkpoint folder `target` under LMDeploy on this machine.

    Flags in `extra` win over ours. ValueError where there is no GPU, the model does not fit or neither of LMDeploy's
    engines takes it; OSError when it is not installed, or the folder is no checkpoint.
    """
    if asked := [name for name, value in others.items() if value]:
        raise ValueError(f"the engine lmdeploy has no --{asked[0].replace('_', '-')} in mmq; --engine vllm has")
    if not machine.gpus:
        raise ValueError("LMDeploy needs an NVIDIA GPU, and none is here; --engine vllm and pytorch serve on a CPU")
    model = read_model(target)
    program = find_program("lmdeploy", environ, named=engine_bin)
    host = given(extra, "--server-name") or host
    port = whole(extra, "--server-port", other=port)
    name = given(extra, "--model-name") or served_model_name or target.resolve().name
    cards = int(number(extra, "--tp") or tp or 1)
    if cards > len(machine.gpus) or cards < 1 or cards & (cards - 1):
        raise ValueError(f"--tp {cards}: LMDeploy wants 1, 2, 4, 8 ... cards, and {len(machine.gpus)} are here")
    backend, why = _backend(model.subject, cards, packages_beside(program), extra)
    flags = [
        Flag("--server-name", host, host_reason(host)),
        Flag("--server-port", str(port), "where clients connect"),
        Flag("--model-name", name, "the model's name in requests, not a path of this disk"),
        Flag("--backend", backend, why),
    ]
    if model.subject.method in FORMATS:
        flags.append(Flag("--model-format", model.subject.method, "as config.json says"))
    card = sized(min(machine.gpus[:cards], key=lambda gpu: gpu.free))
    flags += _memory(model, card, max_model_len, backend, cards, extra)
    if cards > 1:
        flags.append(Flag("--tp", str(cards), "you asked for it: GPUs that share each layer"))
    flags += [
        Flag("--allowed-media-domains", NOBODY, "the guard fetches media from where they may come; the engine none"),
        Flag("--disable-fastapi-docs", None, "no page that lists routes"),
    ]
    if trust_remote_code:
        flags.append(Flag("--trust-remote-code", None, "you asked for it: the checkpoint's own Python files will run"))
    variables = {"HF_HUB_OFFLINE": ("1", "every file is in the folder; no hub is asked"), **machine.order}
    if backend == "turbomind" and (libraries := _libraries(program, environ)):
        variables["LD_LIBRARY_PATH"] = (libraries, "the CUDA libraries that TurboMind is linked to")
    head = (str(python_of(program)), "-m", "mmq_lmdeploy", "serve", "api_server", str(target.resolve()))
    launch = launch_of(head, flags, extra, variables, environ, host=host, port=port, name=name, device="cuda")
    return replace(launch, backend=backend)


def _backend(subject: Subject, tp: int, packages: Mapping[str, str], extra: Sequence[str]) -> tuple[str, str]:
    """(turbomind or pytorch, why). TurboMind, LMDeploy's faster engine, where it takes the model."""
    if asked := given(extra, "--backend"):
        return asked, "you asked for it"
    said = {}
    for place in rules.PLACES:
        fatal = [f for f in judge(subject, place, setting_of(place, tp, packages)).findings if f.fatal]
        if not fatal and place.where == "turbomind":
            return "turbomind", f"LMDeploy's faster engine takes {subject.architecture}" + _in(subject)
        if not fatal:
            return place.where, f"{said['turbomind']}; LMDeploy's PyTorch engine takes it"
        said[place.where] = fatal[0].why
    return "pytorch", "; ".join(said.values())  # refused by `plan`, unless it is told to start it all the same


def _in(subject: Subject) -> str:
    return f" in {subject.method}" if subject.method else " in 16 bit"


def _memory(
    model: Model, card: Gpu, wanted: int | None, backend: str, tp: int, extra: Sequence[str]
) -> tuple[Flag, Flag, Flag]:
    """--session-len, --max-batch-size and --cache-max-entry-count. What a user asks for by number is not refused."""
    wanted = int(number(extra, "--session-len") or wanted or 0) or None
    if wanted is not None and wanted < 1:
        raise ValueError(f"max model length is {wanted}; it must be a number of tokens >= 1")
    policy = given(extra, "--quant-policy")
    top = context_length(model.config)
    found = cache_of(model, card, backend=backend, tp=tp, policy=policy)
    if found.tokens < min(top, MIN_CONTEXT) and wanted is None:
        remedies = ["int4 weights (`mmq quantize`)"] * (not model.weights.packed)
        remedies += ["a cache of half the size (--quant-policy 8 after --)"] * (policy is None)
        raise ValueError(
            f"{card.name}: {found.weights / GIB:.2f} GiB of weights leave room for {found.tokens} tokens of context "
            f"in {card.free / GIB:.1f} GiB, with {found.work / GIB:.2f} GiB for pictures and the decoder at work; what "
            f"may help: {', '.join([*remedies, f'--tp {2 * tp}', 'a larger card'])}"
        )
    length = wanted or min(top, found.tokens)
    why = "the model's whole context fits" if length == top else f"of {top} tokens so many fit beside the weights"
    batch = max(1, min(BATCH, found.tokens // MIN_CONTEXT))
    base = (found.free - found.reserved) / GIB
    aside = f" and {found.reserved / GIB:.1f} GiB for logits" if found.reserved else ""
    return (
        Flag("--session-len", str(length), "you asked for it" if wanted else why),
        Flag("--max-batch-size", str(batch), f"sequences at once, of {MIN_CONTEXT} tokens and more; {BATCH} at most"),
        Flag(
            "--cache-max-entry-count",
            f"{found.share:g}",
            f"of about {base:.1f} GiB that weights{aside} leave free: {found.tokens} tokens; the rest is for the work",
        ),
    )


def _libraries(program: Path, environ: Mapping[str, str]) -> str:
    """LD_LIBRARY_PATH with the environment's own CUDA libraries first; "" where it has none."""
    root = program.absolute().parent.parent
    sites = [*root.glob("lib/python3*/site-packages/nvidia"), root / "nvidia"]
    found = [str(site / name / "lib") for site in sites for name in LIBRARIES if (site / name / "lib").is_dir()]
    before = environ.get("LD_LIBRARY_PATH")
    return os.pathsep.join([*found, *([before] if before else [])]) if found else ""
