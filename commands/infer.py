"""mmq infer: a question, a chat, or a dataset."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .options import (
    FLAG,
    LET_IN,
    bin_option,
    check_flags,
    hub_options,
    json_option,
    let_in_options,
    lora_option,
    safety_of,
    several,
    size_options,
)
from .terminal import progress, show_table

if TYPE_CHECKING:
    from ..serve.request import RequestConfig


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
start_options = (  # of an engine that is started here
    click.option("--max-model-len", type=int, help="Of the engine that is started: longest sequence in tokens."),
    click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint's own Python files run."),
    *let_in_options,
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


@click.command("infer")
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
@several(start_options)
@several(hub_options)
@json_option
def command(
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
    An engine that is started here takes `mmq serve`'s options of the model's size and of media, and the flags after
    `--`. Exit 1 where rows of a dataset got no answer.
    """
    from ..serve.client import root

    if url is not None:  # what stands where a target would is the prompt
        target, prompt, engine_flags = root(url), target, (*([prompt] if prompt else []), *engine_flags)
    if target is None:
        raise ValueError("name what to ask: an artifact, a model, or a running server's address")
    if prompt is not None and FLAG.match(prompt):  # there was no prompt, and `--` was before it
        prompt, engine_flags = None, (prompt, *engine_flags)
    check_flags(engine_flags, instead=f'put the whole prompt in quotes, as "{prompt} {" ".join(engine_flags)}"')
    if bool(prompt) == bool(datasets) and (as_json or prompt is not None):
        raise ValueError(
            'give a prompt, as in `mmq infer out-awq "What is this?" --image photo.jpg`, or --dataset FILE; '
            "with neither it is a chat, which has no --json"
        )
    if engine_flags and "://" in target:
        raise ValueError(f"{' '.join(engine_flags)} is for an engine that is started here; {target} runs already")
    from ..recipes.plain import shown
    from ..recipes.terminal import answer_writer, line_reader
    from ..serve.chat import HELP, asked, begin, talk
    from ..serve.infer import answering, asking, at
    from ..serve.request import config_of
    from ..serve.safety import Safety, key_of

    many = {name: rest.pop(name) for name in ("result_path", "concurrency", "overwrite", "cluster", "replicas")}
    let_in = {name: value for name in LET_IN if (value := rest.pop(name)) not in (None, ())}
    names = ("tp", "pp", "dp", "lora", "max_model_len", "trust_remote_code")
    started = {name: value for name in names if (value := rest.pop(name))}
    asked_for = [option.replace("_", "-") for option in (*started, *(LET_IN[name] for name in let_in))]
    config = config_of(**rest, by_default=not datasets and not as_json)
    if asked_for and "://" in target:
        raise ValueError(f"--{asked_for[0]} is for an engine that is started here; {target} runs already")
    if "lora" in started and many["cluster"] is not None:
        raise ValueError("--lora goes without --ray: there the model alone is asked")
    if let_in and many["cluster"] is not None:
        raise ValueError(f"--{LET_IN[next(iter(let_in))]} goes without --ray: no guard stands before its engines")
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
    if let_in:
        where["safety"] = safety_of(**let_in)
    if datasets:
        infer_rows(target, datasets, config, where, {**who, "system": system}, as_json=as_json, **many)
        return
    write = answer_writer(partial(click.echo, nl=False))
    with ExitStack() as stack:
        with progress(quiet=as_json) as tell:  # the bars end before an answer is written under them
            address, config = stack.enter_context(at(target, config, tell=tell, **where))
        if prompt is None:
            answer = stack.enter_context(answering(address, config, **who))
            click.secho(HELP, dim=True, err=True)
            talk(
                chat,
                answer,
                read=line_reader(),
                write=write,
                note=lambda text: click.secho(shown(text), dim=True, err=True),
                patient="://" in target and sys.stdin.isatty(),  # started again there, by --restart or by hand
            )
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
    from ..recipes.plain import shown
    from ..recipes.samples import source_of
    from ..recipes.terminal import answer_writer
    from ..serve.dataset import check_dataset, infer_dataset
    from ..serve.infer import at
    from ..serve.results import failed

    out = result_path or Path(f"{source_of(datasets[0])[0].absolute().stem}-answers.jsonl")
    check_dataset(datasets, out, system=who["system"], overwrite=overwrite)
    write = answer_writer(partial(click.echo, nl=False))
    with ExitStack() as stack:
        options: dict[str, Any] = {"overwrite": overwrite}
        if cluster is not None:
            from ..serve.cluster import infer_on_ray

            tell = stack.enter_context(progress(quiet=as_json))
            options |= {"address": cluster, "replicas": replicas, "system": who["system"], "tell": tell}
            facts = infer_on_ray(target, datasets, out, config, **where, **options)
        else:
            with progress(quiet=as_json) as tell:  # the bars end before answers are streamed under them
                url, config = stack.enter_context(at(target, config, tell=tell, **where))
            tell = stack.enter_context(progress(quiet=as_json or config.stream))
            show = None if as_json else lambda number, piece: write(piece)
            options |= {"concurrency": concurrency, "show": show, "tell": tell}
            facts = infer_dataset(url, datasets, out, config, **who, **options)
    if as_json:
        click.echo(json.dumps({"result": str(out), **facts}, ensure_ascii=False))
    else:
        show_table(["", ""], [[name, f"{value:,}"] for name, value in facts.items()])
        for line in failed(out):
            click.secho(shown(line), fg="yellow", err=True)
        click.echo(f"answers: {out}")
    sys.exit(1 if facts["failed"] else 0)
