"""The engines: a table of functions from an artifact's folder and a machine to a `Launch`, one file an engine.

Starts nothing and imports no engine: an engine is a program found on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from ..export.artifact import MANIFEST, UNFINISHED, open_artifact
from ..export.subject import read_subject
from ..recipes.folder import read_config
from ..recipes.template import check_templates
from .flags import Launch, number, shell_line
from .lmdeploy import lmdeploy
from .parallel import ray_lines, spread_of
from .programs import packages_beside
from .pytorch import pytorch, restored_bytes
from .rules.rule import REMOTE_TYPES, judge
from .rules.verdicts import PLACES, setting_of
from .rules.vllm import OWN_CONFIG
from .safety import USUAL, Safety, guarded
from .shape import read_shape
from .vllm import vllm

ENGINES: dict[str, Callable[..., Launch]] = {"vllm": vllm, "lmdeploy": lmdeploy, "pytorch": pytorch}


def plan(
    engine: str,
    target: Path,
    *,
    served_model_name: str | None = None,
    ignore_rules: bool = False,
    safety: Safety = USUAL,
    **options: Any,
) -> Launch:
    """The launch of `target` under the engine of this name, guarded; options as the engine's function.

    `target` is an artifact, which must be whole, or any checkpoint folder; the artifact's name is the model's.
    ValueError for an unknown engine, and for a quantized checkpoint that the engine's rules refuse unless
    `ignore_rules`; OSError for a folder that cannot be served.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known engines are {', '.join(ENGINES)}")
    if not target.is_dir():
        raise OSError(f"no folder {target}; `mmq quantize` makes an artifact, and a checkpoint's folder serves as well")
    if (target / MANIFEST).is_file() or (target / UNFINISHED).is_file():
        served_model_name = served_model_name or open_artifact(target).manifest.get("name")
    check_templates(target)
    launch = ENGINES[engine](target, served_model_name=served_model_name, **options)
    if not ignore_rules:
        _refuse(engine, target, launch, options["machine"].amx)
        _allowed(engine, target, launch)
    if not launch.serves:
        return launch  # nobody can ask it anything
    told = {key: options[key] for key in ("extra", "environ") if key in options}
    return guarded(engine, launch, safety, **told)


def lines(engine: str, target: Path, *, nodes: int | None = None, **options: Any) -> list[tuple[str, str]]:
    """(which machine, command): what to type on each of `nodes` machines, in this order. Options and errors as
    `plan`'s."""
    if nodes is None or nodes == 1:
        return [("this machine", shell_line(plan(engine, target, nodes=nodes, **options)))]
    options |= {"nodes": nodes}
    if options.get("ray"):
        spread = spread_of(options.get("extra", ()), ray=True, nodes=nodes, master_addr=options.get("master_addr"))
        return [*ray_lines(spread), ("machine 0, then", shell_line(plan(engine, target, **options)))]
    each = [plan(engine, target, **{**options, "node_rank": rank}) for rank in range(nodes)]
    return [(f"machine {rank}", shell_line(launch)) for rank, launch in enumerate(each)]


def weights_kept(engine: str, target: Path) -> int | None:
    """Bytes of weights that the engine keeps in memory, where they are not those of the files."""
    return restored_bytes(read_subject(target)) if engine == "pytorch" else None


def _allowed(engine: str, target: Path, launch: Launch) -> None:
    """ValueError where the engine reads the config by the checkpoint's own Python and may not: it would start, die, and
    name another remedy."""
    kind = str(read_config(target).get("model_type"))
    if engine != "pytorch" and kind in REMOTE_TYPES - OWN_CONFIG and "--trust-remote-code" not in launch.argv:
        why = f"model type {kind} brings its own Python for its config"
        raise ValueError(f"{engine} would not serve {target} as it is: {why}; read it, then say --trust-remote-code")


def _refuse(engine: str, target: Path, launch: Launch, amx: bool) -> None:
    """ValueError with the reason and the remedy where the engine would load `target` not at all, or wrongly."""
    if read_shape(target).quantized is None:
        return
    subject = read_subject(target)
    packages = packages_beside(Path(launch.argv[0]))
    tp = int(number(launch.argv, "--tensor-parallel-size", "-tp", "--tp") or 1)
    for place in PLACES:
        if place.engine == engine and place.where == (launch.backend or launch.device):
            setting = replace(setting_of(place, tp, packages), amx=amx)
            fatal = [f for f in judge(subject, place, setting).findings if f.fatal]
            if fatal:
                more = (
                    f" (and {len(fatal) - 1} more: `mmq check --engines {engine} {quote(str(target))}`)"
                    if fatal[1:]
                    else ""
                )
                why = f"{fatal[0].why}; {fatal[0].remedy}{more}; --ignore-rules starts it all the same"
                raise ValueError(f"{engine} would not serve {target} as it is: {why}")
