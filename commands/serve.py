"""mmq serve: an engine behind the OpenAI API."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import bin_option, check_flags, hub_options, let_in_options, lora_option, safety_of, several, size_options
from .terminal import next_step, progress, show_table

if TYPE_CHECKING:
    from ..serve.running import Server


spread_options = (  # with the sizes, as `spread_of`'s
    *size_options,
    click.option("--nodes", type=int, help="Machines; `--print` shows what to type on each."),
    click.option("--node-rank", type=int, help="Which of them this is: 0 answers requests."),
    click.option("--master-addr", metavar="HOST", help="Where the others reach machine 0."),
    click.option("--ray", is_flag=True, help="The machines are a Ray cluster."),
)

safety_options = (  # `serve.safety.Safety`'s
    click.option(
        "--api-key-file", type=click.Path(path_type=Path), help="Holds the key.  [default: MMQ_API_KEY, none]"
    ),
    click.option(
        "--media-folder", type=click.Path(path_type=Path), help="Take file:// URLs of what is in this folder."
    ),
    *let_in_options,
    click.option(
        "--grace", type=int, default=30, show_default=True, help="Seconds that requests under way have at the end."
    ),
)


@click.command("serve", context_settings={"ignore_unknown_options": False})
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
def command(
    target: str,
    engine_flags: tuple[str, ...],
    engine: str,
    print_only: bool,
    restart: int,
    hub: str,
    revision: str | None,
    served_model_name: str | None,
    **options: Any,
) -> None:
    """Serve TARGET (an artifact, or a model in 16 bit) with an OpenAI-compatible API.

    Flags after `--` go to the engine as they are and win over mmq's own.
    """
    from ..export.subject import takes_pictures
    from ..recipes.folder import read_config
    from ..serve.engines import lines, plan
    from ..serve.machine import this_machine
    from ..serve.ports import check_port
    from ..serve.safety import Safety
    from ..serve.supervise import foreground
    from ..serve.target import servable

    check_flags(engine_flags)
    let_in = {field.name: options.pop(field.name) for field in dataclasses.fields(Safety) if field.name in options}
    options["safety"] = safety_of(**let_in)
    with progress(quiet=print_only) as tell:
        folder, name = servable(target, hub=hub, revision=revision, tell=tell)
    options |= {"served_model_name": served_model_name or name, "extra": engine_flags}
    options |= {"machine": this_machine()}
    if print_only:
        for where, typed in lines(engine, folder, **options):
            click.echo(f"# {where}\n{typed}" if (options["nodes"] or 1) > 1 else typed)
        options["node_rank"] = options["node_rank"] or (0 if (options["nodes"] or 1) > 1 else None)
    launch = plan(engine, folder, **options)
    if launch.serves and not print_only:  # before the table, and before the log of whoever has the port is overwritten
        check_port(launch.host, launch.port)
    show_table(["", ""], [[flag, why] for flag, why in launch.reasons], err=not print_only)
    if print_only:
        return

    def say(text: str, color: str | None = None) -> None:
        with suppress(OSError):  # a terminal that was closed, `| head`: the server goes on, and its log has all
            click.secho(text, fg=color, err=True)

    def ready(server: Server) -> None:
        if not launch.serves:
            say(f"computing for {server.url} (Ctrl-C here ends this machine's part)", "green")
            return
        names = ", ".join([server.name, *(item.partition("=")[0] for item in options["lora"])])
        say(f"\nready after {server.startup_s:.0f} s: {server.url}/v1, model {names}", "green")
        for why in (why for _, why in launch.reasons if why.startswith("WARNING")):  # its row above is long gone
            say(why, "yellow")
        sees = takes_pictures(read_config(folder))
        asks = ["What is in the picture?", "--image", "FILE"] if sees else ["Who are you?"]
        key = ["--api-key-file", options["safety"].api_key_file] if options["safety"].api_key_file else []
        with suppress(OSError):
            next_step("mmq", "infer", server.url, *asks, *key, remark="   (Ctrl-C here ends the server)")

    log, note = Path.cwd() / f"mmq-serve-{launch.port}.log", partial(say, color="yellow")
    sys.exit(foreground(launch, log_path=log, on_line=say, on_ready=ready, on_note=note, restarts=restart))
