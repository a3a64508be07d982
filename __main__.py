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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .recipes.sets import CHECKED

if TYPE_CHECKING:
    from .bench.check import Checked
    from .recipes.progress import Tell
    from .serve.request import RequestConfig
    from .serve.running import Server


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mmq")
def cli() -> None:
    """From a vision-language checkpoint to an int4 artifact that is proven, served and measured.

    MODEL is a recipe's name (`mmq recipes`), a local folder or a hub id.
    """


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
hub_options = (
    click.option("--hub", type=click.Choice(["hf", "modelscope"]), envvar="MMQ_HUB", default="hf", show_default=True),
    click.option("--revision", help="Branch, tag or commit on the hub; pinned to its commit in the manifest."),
)
bin_option = click.option(
    "--engine-bin",
    metavar="PATH",
    help="The engine's program, or its environment's folder.  [default: $MMQ_VLLM, $MMQ_PYTORCH or $MMQ_LMDEPLOY, else "
    "beside mmq, else on PATH]",
)
recipe_options = (  # each has the name of the recipe's key that it replaces
    click.option(
        "--method",
        type=click.Choice(["awq", "gptq", "bnb", "rtn", "autoround"]),
        help="Default: the recipe's, else awq. autoround is for --backend auto-round.",
    ),
    click.option("--quality", type=click.Choice(["fast", "default", "best"]), help="How much is done for each layer."),
    click.option("--format", type=click.Choice(["awq", "gptq", "compressed-tensors", "bnb"])),
    click.option("--group-size", type=int, help="Input columns that share a scale: 32, 64 or 128."),
    click.option("--symmetric/--asymmetric", default=None, help="Default: what the format's engines want."),
    click.option("--keep", multiple=True, metavar="PREFIX", help="Leave modules of this name in 16 bit. Repeatable."),
    click.option("--head", type=click.Choice(["16bit", "int4"]), help="The output head.  [default: 16bit]"),
    click.option("--calibration", metavar="NAME|FILE|FOLDER", help="drawn, text, a JSONL file or a folder."),
    click.option("--samples", type=int, help="Calibration samples to use."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        default=None,
        help="Let the checkpoint's own Python run; from a hub with --revision and a commit's full hash.",
    ),
)


def several(options: Sequence[Any]) -> Any:
    """A decorator that adds `options` to a command, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


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
@several(recipe_options)
@click.option(
    "--backend",
    metavar="NAME",
    help="Let autoawq, auto-gptq, gptqmodel, llmcompressor or auto-round do it, with its own defaults, in an "
    "environment of its own (`mmq doctor` tells which are there), and check what comes of it.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: ./out-METHOD]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@click.option("--max-vram", metavar="SIZE", help="GPU memory to stay inside, as 24GiB.  [default: what is free]")
@device_option
@several(hub_options)
@json_option
def quantize(
    model: str,
    backend: str | None,
    out: Path | None,
    overwrite: bool,
    max_vram: str | None,
    device: str,
    hub: str,
    as_json: bool,
    **asked: Any,
) -> None:
    """Make MODEL's decoder int4, calibrated on pictures and text."""
    from .bench.produce import produce, settle
    from .bench.report import parse_bytes
    from .quantize.device import load_torch, pick_device

    job = settle(model, backend=backend, out=out, **asked)
    load_torch()
    from .bench.verdict import facts as check_facts
    from .bench.verdict import in_short
    from .export.summary import facts, rows
    from .quantize import ranks

    start = time.monotonic()
    place = pick_device(device)
    if ranks.launched():
        place = ranks.join(place)
    limit = parse_bytes(max_vram) if max_vram else None
    with progress(quiet=as_json or ranks.rank() > 0) as tell:
        artifact, result = produce(job, hub=hub, device=place, max_vram=limit, overwrite=overwrite, tell=tell)
    if ranks.rank() > 0:
        return
    told = facts(artifact, seconds=time.monotonic() - start)
    if as_json:
        click.echo(json.dumps(told if result is None else {**told, "check": check_facts(result)}))
    else:
        show_table(["", ""], rows(artifact, told) + ([["check", in_short(result, job.out)]] if result else []))
    exit_past_limits(result)
    if not as_json:
        next_step(f"mmq serve {job.out}" if result else f"mmq check {job.out}")


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="The FP16 checkpoint, where the manifest's is elsewhere.")
@click.option("--dataset", metavar="FILE|FOLDER", help="Held-out samples of your own (JSONL with answers).")
@click.option("--samples", "count", type=int, default=CHECKED, show_default=True, help="Held-out samples to use.")
@click.option("--engine", type=click.Choice(["vllm", "pytorch"]), help="Ask the artifact as this engine serves it.")
@bin_option
@click.option(
    "--engines",
    metavar="NAME,...",
    help="Tell which of vllm, sglang, lmdeploy, transformers (or all) would load it, from its headers alone.",
)
@click.option("--tp", type=int, default=1, show_default=True, help="With --engines: GPUs that share each layer.")
@click.option("--trust-remote-code", "trust", is_flag=True, help="Let the checkpoint's own Python run.")
@device_option
@json_option
def check(
    artifact: Path, base: Path | None, engines: str | None, tp: int, device: str, as_json: bool, **asked: Any
) -> None:
    """Hold ARTIFACT against its FP16 base; exit 1 past the recipe's limits.

    With --engines ask instead whether engines would load it; exit 1 where one named would not.
    """
    if engines is not None:
        check_engines(artifact, engines, tp, as_json=as_json)
        return
    from .export.artifact import base_of, open_artifact
    from .quantize.device import load_torch, pick_device

    opened = open_artifact(artifact, verify=True)
    load_torch()
    from .bench.examine import examine
    from .bench.verdict import facts, limits_of, rows

    if asked["engine"] and device != "auto":
        raise ValueError(
            "--device goes without --engine: the engine chooses its own, and the walk beside it runs on the CPU"
        )
    place = "cpu" if asked["engine"] else pick_device(device)
    with progress(quiet=as_json) as tell:
        result, path = examine(opened, base or base_of(opened, tell=tell).path, device=place, tell=tell, **asked)
    if as_json:
        click.echo(json.dumps(facts(result)))
    else:
        show_table(["measure", "value", "limit"], rows(result, limits_of(opened)))
        click.echo(f"report: {path} and {path.with_suffix('.md').name}")
    exit_past_limits(result)
    if not as_json:
        next_step(f"mmq serve {artifact}")


def check_engines(folder: Path, engines: str, tp: int, *, as_json: bool) -> None:
    """Verdicts of the engines named; exit 1 where one of them would not load it."""
    from .serve.programs import installed
    from .serve.rules.verdicts import chosen, facts, refused, rows, verdicts

    found = verdicts(folder, chosen(engines), tp=tp, packages=installed())
    if as_json:
        click.echo(json.dumps(facts(found), ensure_ascii=False))
    else:
        show_table(["engine", "", "why", "what to do"], rows(found))
    if no := refused(found):
        click.echo(f"mmq: would not load it: {', '.join(no)}", err=True)
        sys.exit(1)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["awq", "gptq", "compressed-tensors"]))
@click.option("--repair", is_flag=True, help="Keep the format; write its config and skip list anew, for every engine.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: ARTIFACT-FORMAT]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@json_option
def convert(
    artifact: Path, format_: str | None, repair: bool, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Put ARTIFACT (or a folder that another package packed) into another int4 format, the same weights to the bit."""
    if repair == (format_ is not None):
        raise ValueError("give either --format awq, gptq or compressed-tensors, or --repair")
    out = out or artifact.with_name(f"{artifact.resolve().name}-{format_ or 'repaired'}")
    from .quantize.device import load_torch

    load_torch()
    from .export.convert import convert as converted
    from .export.summary import conversion

    with progress(quiet=as_json) as tell:
        facts = conversion(converted(artifact, out, format=format_, overwrite=overwrite, tell=tell))
    if as_json:
        click.echo(json.dumps(facts))
        return
    show_table(["", ""], [[name, str(value)] for name, value in facts.items()])
    next_step(f"mmq check --engines all {out}")


size_options = (
    click.option("--tp", type=int, help="GPUs that share each layer."),
    click.option("--pp", type=int, help="Stages of a pipeline that share the layers."),
    click.option("--dp", type=int, help="Replicas behind one address."),
)
spread_options = (  # with the sizes, as `spread_of`'s
    *size_options,
    click.option("--nodes", type=int, help="Machines; `--print` shows what to type on each."),
    click.option("--node-rank", type=int, help="Which of them this is: 0 answers requests."),
    click.option("--master-addr", metavar="HOST", help="Where the others reach machine 0."),
    click.option("--ray", is_flag=True, help="The machines are a Ray cluster."),
)
lora_option = click.option(
    "--lora", multiple=True, metavar="NAME=FOLDER", help="An adapter, which requests name as their model. Repeatable."
)


@cli.command("plan")
@click.argument("target")
@click.option("--vram", metavar="SIZE", help="A card's memory, as 24GiB.  [default: this machine's GPU]")
@click.option("--card", metavar="NAME", help="A card by name instead: 4090, 3090, a10, l4, h100, ...")
@click.option("--context", type=int, help="Tokens a sequence.  [default: as many as fit]")
@click.option("--concurrency", type=int, help="Sequences at once, each as long as the context.")
@click.option("--images", type=int, help="Pictures a prompt, and no video.  [default: 8, and videos]")
@click.option("--pixels", type=int, help="The largest picture, for families that scale pictures (Qwen-VL).")
@several(size_options)
@lora_option
@click.option("--kv-cache-dtype", "kv_dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True)
@several(hub_options)
@json_option
def plan_(
    target: str, vram: str | None, card: str | None, hub: str, revision: str | None, as_json: bool, **asked: Any
) -> None:
    """Tell what serving TARGET (an artifact, or a model as `serve` takes it) under vLLM takes of a card, what fits, and
    the flags; exit 1 where it does not fit.

    From headers and config alone; nothing starts. An estimate, not yet held against an engine on a GPU.
    """
    from .bench.report import parse_bytes
    from .serve import plan_table
    from .serve.cards import chosen_card
    from .serve.machine import this_machine
    from .serve.target import servable

    gpu, bandwidth = chosen_card(this_machine(), vram=parse_bytes(vram) if vram else None, card=card)
    with progress(quiet=as_json) as tell:
        folder, _ = servable(target, hub=hub, revision=revision, tell=tell)
    facts, rows, lines = plan_table.told(folder, gpu, bandwidth=bandwidth, **asked)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        show_table(["", "", ""], rows)
    for line in lines:
        click.echo(line, err=True)
    sys.exit(0 if facts["fits"] else 1)


safety_options = (  # `serve.safety.Safety`'s
    click.option(
        "--api-key-file", type=click.Path(path_type=Path), help="Holds the key.  [default: MMQ_API_KEY, none]"
    ),
    click.option(
        "--media-domain",
        "media_domains",
        multiple=True,
        metavar="HOST",
        help="Take media by URL from this host (.x.org: all below x.org; any; none). Repeatable.  "
        "[default: any on loopback, else none]",
    ),
    click.option(
        "--media-network",
        "media_networks",
        multiple=True,
        metavar="NET",
        help="A private network that media may come from, as 10.0.0.0/8. Repeatable.",
    ),
    click.option(
        "--media-folder", type=click.Path(path_type=Path), help="Take file:// URLs of what is in this folder."
    ),
    click.option("--max-body", metavar="SIZE", default="64MiB", show_default=True, help="Largest request."),
    click.option("--max-media", type=int, default=64, show_default=True, help="Pictures and videos in a request."),
    click.option(
        "--grace", type=int, default=30, show_default=True, help="Seconds that requests under way have at the end."
    ),
)


@cli.command(context_settings={"ignore_unknown_options": False})
@click.argument("target")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves it: vllm, lmdeploy or pytorch.")
@bin_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--max-model-len", type=int, help="Longest sequence in tokens.  [default: what fits]")
@click.option("--served-model-name", help="The model's name in requests.  [default: the folder's]")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint's own Python files run.")
@several(spread_options)
@lora_option
@click.option(
    "--print", "print_only", is_flag=True, help="Print the command with a reason for each flag, start nothing."
)
@click.option("--ignore-rules", is_flag=True, help="Start the engine though its rules say no (`mmq check --engines`).")
@click.option(
    "--restart", type=click.IntRange(0), default=0, metavar="N", help="Start a dead engine again, at most N times."
)
@several(safety_options)
@several(hub_options)
def serve(
    target: str,
    engine_flags: tuple[str, ...],
    engine: str,
    print_only: bool,
    restart: int,
    max_body: str,
    hub: str,
    revision: str | None,
    served_model_name: str | None,
    **options: Any,
) -> None:
    """Serve TARGET (an artifact, or a model in 16 bit) with an OpenAI-compatible API.

    Flags after `--` go to the engine as they are and win over mmq's own.
    """
    from .bench.report import parse_bytes
    from .serve.engines import lines, plan
    from .serve.machine import this_machine
    from .serve.safety import Safety
    from .serve.supervise import foreground
    from .serve.target import servable

    let_in = {field.name: options.pop(field.name) for field in dataclasses.fields(Safety) if field.name in options}
    options["safety"] = Safety(max_body=parse_bytes(max_body), **let_in)
    with progress(quiet=print_only) as tell:
        folder, name = servable(target, hub=hub, revision=revision, tell=tell)
    options |= {"served_model_name": served_model_name or name, "extra": engine_flags}
    options |= {"machine": this_machine()}
    if print_only:
        for where, typed in lines(engine, folder, **options):
            click.echo(f"# {where}\n{typed}" if (options["nodes"] or 1) > 1 else typed)
        options["node_rank"] = options["node_rank"] or (0 if (options["nodes"] or 1) > 1 else None)
    launch = plan(engine, folder, **options)
    show_table(["", ""], [[flag, why] for flag, why in launch.reasons], err=not print_only)
    if print_only:
        return

    def ready(server: Server) -> None:
        if not launch.serves:
            click.secho(f"computing for {server.url} (Ctrl-C here ends this machine's part)", fg="green", err=True)
            return
        names = ", ".join([server.name, *(item.partition("=")[0] for item in options["lora"])])
        line = f"ready after {server.startup_s:.0f} s: {server.url}/v1, model {names}"
        click.secho(f"\n{line}", fg="green", err=True)
        for why in (why for _, why in launch.reasons if why.startswith("WARNING")):  # its row above is long gone
            click.secho(why, fg="yellow", err=True)
        next_step(f'mmq infer {server.url} "What is in the picture?" --image PICTURE   (Ctrl-C here ends the server)')

    log = Path.cwd() / f"mmq-serve-{launch.port}.log"
    line, note = partial(click.echo, err=True), partial(click.secho, fg="yellow", err=True)
    sys.exit(foreground(launch, log_path=log, on_line=line, on_ready=ready, on_note=note, restarts=restart))


answer_options = (  # how an answer is made: `RequestConfig`'s
    click.option("--max-tokens", type=int, default=512, show_default=True),
    click.option("--temperature", type=float, default=0.0, show_default=True),
    click.option("--top-p", type=float),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text. Repeatable."),
    click.option("--logprobs", is_flag=True, help="With --dataset or --json: each token's log-probability."),
    click.option("--stream/--no-stream", default=None, help="Show answers as they come.  [default: but for --dataset]"),
    click.option("--fps", type=float, help="Of a video look at so many frames a second.  [default: the engine's rule]"),
    click.option("--frames", type=int, help="Of a video look at no more than so many frames, evenly."),
    click.option("--extra", metavar="JSON", help="More for the request's body, as '{\"repetition_penalty\": 1.05}'."),
)
media_options = tuple(
    click.option(f"--{kind}", f"{kind}s", multiple=True, metavar="FILE|URL", help=f"{what} to ask about. Repeatable.")
    for kind, what in (("image", "A picture"), ("video", "A video"), ("audio", "A sound"))
)
dataset_options = (
    click.option(
        "--dataset", "datasets", multiple=True, metavar="FILE[#N]", help="Ask a JSONL's (first N) rows. Repeatable."
    ),
    click.option(
        "--result-path", type=click.Path(path_type=Path), help="Answers to --dataset.  [default: NAME-answers.jsonl]"
    ),
    click.option("--concurrency", type=int, default=32, show_default=True, help="Requests under way at once."),
    click.option("--overwrite", is_flag=True, help="Ask again what --result-path has answers for."),
    click.option("--ray", "cluster", metavar="ADDRESS", help="Answer --dataset on Ray: local, auto or HOST:PORT."),
    click.option("--replicas", type=int, default=1, show_default=True, help="With --ray: how many engines."),
)


@cli.command()
@click.argument("target", required=False)
@click.argument("prompt", required=False)
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--url", help="A running server's address, in place of TARGET.")
@click.option("--system", help="The system message; in a dataset that of rows without one.")
@several(media_options)
@several(dataset_options)
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves TARGET, where it is no URL.")
@bin_option
@click.option("--model", metavar="NAME", help="Which of the server's models, or LoRA adapters.  [default: its first]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The server's key.  [default: $MMQ_API_KEY]")
@several(answer_options)
@several(size_options)
@lora_option
@several(hub_options)
@json_option
def infer(
    target: str | None,
    prompt: str | None,
    engine_flags: tuple[str, ...],
    url: str | None,
    system: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    audios: tuple[str, ...],
    datasets: tuple[str, ...],
    engine: str,
    engine_bin: str | None,
    model: str | None,
    api_key_file: Path | None,
    hub: str,
    revision: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Ask TARGET (an artifact, a model, or the URL of a running server) PROMPT, or every row of --dataset.

    With neither, chat: `multi-line`, `single-line`, `reset-system`, `clear`, `quit`; <image> in a text asks for one.
    Flags after `--` go to the engine that is started. Exit 1 where rows of a dataset got no answer.
    """
    if url is not None:  # what stands where a target would is the prompt
        target, prompt, engine_flags = url, target, (*([prompt] if prompt else []), *engine_flags)
    if target is None:
        raise ValueError("name what to ask: an artifact, a model, or a running server's address")
    if prompt is not None and prompt.startswith("--"):  # there was no prompt, and `--` was before it
        prompt, engine_flags = None, (prompt, *engine_flags)
    if bool(prompt) == bool(datasets) and (as_json or prompt is not None):
        raise ValueError(
            'give a prompt, as in `mmq infer out-awq "What is this?" --image photo.jpg`, or --dataset FILE; '
            "with neither it is a chat, which has no --json"
        )
    if engine_flags and "://" in target:
        raise ValueError(f"{' '.join(engine_flags)} is for an engine that is started here; {target} runs already")
    from .recipes.terminal import line_reader
    from .serve.chat import HELP, asked, begin, talk
    from .serve.infer import answering, asking, at
    from .serve.request import config_of
    from .serve.safety import Safety, key_of

    many = {name: rest.pop(name) for name in ("result_path", "concurrency", "overwrite", "cluster", "replicas")}
    started = {name: value for name in ("tp", "pp", "dp", "lora") if (value := rest.pop(name))}
    config = config_of(**rest, by_default=not datasets and not as_json)
    if started and "://" in target:
        raise ValueError(f"--{next(iter(started))} is for an engine that is started here; {target} runs already")
    if "lora" in started and many["cluster"] is not None:
        raise ValueError("--lora goes without --ray: there the model alone is asked")
    if config.logprobs and not datasets and not as_json:
        raise ValueError("--logprobs goes with --dataset, or with a prompt and --json")
    if datasets and (images or videos or audios):
        raise ValueError("the rows of --dataset name their own pictures, videos and sounds; leave the options out")
    if many["cluster"] is not None and (not datasets or "://" in target or engine != "vllm"):
        raise ValueError("--ray starts vLLM engines for a --dataset; TARGET is an artifact or a model then, no URL")
    chat = begin(system=system, images=images, videos=videos, audios=audios)  # bad input is told before a server starts
    if prompt is not None:
        chat = asked(chat, prompt)
    key = key_of(Safety(api_key_file=api_key_file), {}) if api_key_file else None
    who: dict[str, Any] = {"model": model, "api_key": key.value if key else None}
    where: dict[str, Any] = {"hub": hub, "revision": revision, "engine": engine, "engine_bin": engine_bin}
    where |= {"extra": engine_flags, **started}
    if datasets:
        infer_rows(target, datasets, config, where, {**who, "system": system}, as_json=as_json, **many)
        return
    write = partial(click.echo, nl=False)
    with ExitStack() as stack:
        with progress(quiet=as_json) as tell:  # the bars end before an answer is written under them
            address, config = stack.enter_context(at(target, config, tell=tell, **where))
        if prompt is None:
            click.secho(HELP, dim=True, err=True)
            answer = stack.enter_context(answering(address, config, **who))
            talk(chat, answer, read=line_reader(), write=write, note=partial(click.secho, dim=True, err=True))
        elif as_json:
            whole = stack.enter_context(asking(address, config, **who))(chat.messages)
            click.echo(json.dumps(whole.facts(), ensure_ascii=False))
        else:
            for piece in stack.enter_context(answering(address, config, **who))(chat.messages):
                write(piece)
            write("\n")


def infer_rows(
    target: str,
    datasets: Sequence[str],
    config: RequestConfig,
    where: dict[str, Any],
    who: dict[str, Any],
    *,
    result_path: Path | None,
    concurrency: int,
    overwrite: bool,
    cluster: str | None,
    replicas: int,
    as_json: bool,
) -> NoReturn:
    """Answers to datasets, by a server or a cluster; exit 1 where rows got none."""
    from .serve.dataset import check_dataset, infer_dataset
    from .serve.infer import at
    from .serve.results import failed

    check_dataset(datasets, system=who["system"])
    out = result_path or Path(f"{Path(datasets[0].partition('#')[0]).stem}-answers.jsonl")
    with ExitStack() as stack:
        tell = stack.enter_context(progress(quiet=as_json or config.stream))
        options: dict[str, Any] = {"overwrite": overwrite, "tell": tell}
        if cluster is not None:
            from .serve.cluster import infer_on_ray

            options |= {"address": cluster, "replicas": replicas, "system": who["system"]}
            facts = infer_on_ray(target, datasets, out, config, **where, **options)
        else:
            url, config = stack.enter_context(at(target, config, tell=tell, **where))
            options |= {"concurrency": concurrency, "show": lambda number, piece: click.echo(piece, nl=False)}
            facts = infer_dataset(url, datasets, out, config, **who, **options)
    if as_json:
        click.echo(json.dumps({"result": str(out), **facts}))
    else:
        show_table(["", ""], [[name, f"{value:g}"] for name, value in facts.items()])
        for line in failed(out):
            click.secho(line, fg="yellow", err=True)
        click.echo(f"answers: {out}")
    sys.exit(1 if facts["failed"] else 0)


@cli.command("app")
@click.argument("target")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--port", type=int, default=8080, show_default=True, help="Where the page is, on this machine alone.")
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves TARGET, where it is no URL.")
@bin_option
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The server's key.  [default: $MMQ_API_KEY]")
@click.option("--open", "browse", is_flag=True, help="Open the page in the browser.")
@several(hub_options)
def app_(
    target: str, engine_flags: tuple[str, ...], port: int, api_key_file: Path | None, browse: bool, **where: Any
) -> None:
    """Chat with TARGET (an artifact, a model, or the URL of a running server) on a web page, pictures and videos too.

    The page is for this machine alone. Flags after `--` go to the engine that is started.
    """
    from threading import Event

    from .serve.app import page
    from .serve.infer import at
    from .serve.request import DEFAULT
    from .serve.running import check_port
    from .serve.safety import Safety, key_of

    if engine_flags and "://" in target:
        raise ValueError(f"{' '.join(engine_flags)} is for an engine that is started here; {target} runs already")
    check_port("127.0.0.1", port)
    key = key_of(Safety(api_key_file=api_key_file), os.environ)
    with ExitStack() as stack:
        with progress(quiet=False) as tell:
            url, _ = stack.enter_context(at(target, DEFAULT, tell=tell, extra=engine_flags, **where))
        address = stack.enter_context(page(url, port=port, api_key=key.value if key else None))
        click.secho(f"the page: {address}   (Ctrl-C here ends it)", fg="green")
        if browse:
            click.launch(address)
        with suppress(KeyboardInterrupt):  # that is how it ends
            Event().wait()


@cli.command()
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--compare", is_flag=True, help="NAMES side by side, each against the first (what several names do anyway)."
)
@click.option("--engine", default="vllm", show_default=True)
@bin_option
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
    engine_bin: str | None,
    vram: str,
    context: int,
    out: Path,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure NAMES under one engine and one load: speed, memory, max length, max batch.

    A name is fp16 (the common base), a method or a name among the artifacts of this folder, or a path.
    """
    from .bench.compare import compare as measure
    from .bench.compare import load_line, markdown, table, warnings
    from .bench.report import parse_bytes, write_report
    from .bench.speed import load_here

    load = load_here(**asked)
    options: dict[str, Any] = {"vram": parse_bytes(vram), "context": context, "load": load}
    options |= {"engine": engine, "engine_bin": engine_bin}
    with progress(quiet=as_json) as tell:
        report, place = measure(names, out=out, tell=tell, **options)
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
    from .bench.doctor import findings, row

    found = findings()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(f) for f in found], ensure_ascii=False))
        return
    show_table(["", "", ""], [row(f) for f in found])


def exit_past_limits(result: Checked | None) -> None:
    """Exit 1 with a line for each measure past its limit, where there is one."""
    if result is not None and result.failures:
        for line in result.failures:
            click.echo(f"mmq: past the limit: {line}", err=True)
        sys.exit(1)


def show_table(head: list[str], rows: list[list[str]], *, err: bool = False) -> None:
    """A table on stdout, or on stderr."""
    from rich.console import Console

    from .recipes.terminal import table

    Console(stderr=err).print(table(head, rows))


def next_step(line: str) -> None:
    """The next command to type."""
    click.echo(f"\nnext: {line}")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """A progress bar a kind of step, on stderr; nothing when `quiet`."""
    from .recipes.progress import silent
    from .recipes.terminal import bars, listener

    if quiet:
        yield silent
        return
    with bars() as shown:
        yield listener(shown)


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
