"""Options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from ..serve.safety import Safety

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

size_options = (
    click.option("--tp", type=int, help="GPUs that share each layer."),
    click.option("--pp", type=int, help="Stages of a pipeline that share the layers."),
    click.option("--dp", type=int, help="Replicas behind one address."),
)
lora_option = click.option(
    "--lora", multiple=True, metavar="NAME=FOLDER", help="An adapter, which requests name as their model. Repeatable."
)

FLAG = re.compile(r"--?[A-Za-z]")  # how an engine's begin


def check_flags(words: Sequence[str], *, instead: str = "name one model") -> None:
    """ValueError where the words that are for the engine are none of its flags, as those of a prompt without quotes."""
    if words and not FLAG.match(words[0]):
        raise ValueError(f"{' '.join(words)}: {instead}; an engine's own flags come after -- and begin with -")


LET_IN = {  # of `serve.safety.Safety`, and its option
    "media_domains": "media-domain",
    "media_networks": "media-network",
    "max_body": "max-body",
    "max_media": "max-media",
}
let_in_options = (
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
    click.option("--max-body", metavar="SIZE", help="Largest request.  [default: 64MiB]"),
    click.option("--max-media", type=int, help="Pictures and videos in a request.  [default: 64]"),
)


def safety_of(*, max_body: str | None = None, max_media: int | None = None, **let_in: Any) -> Safety:
    """What a server lets in, as the options say; what they leave out is the default."""
    from ..bench.report import parse_bytes
    from ..serve.safety import Safety

    if max_body is not None:
        try:
            let_in["max_body"] = parse_bytes(max_body)
        except ValueError:
            raise ValueError(f"--max-body is {max_body!r}; write a number and its unit, as 64MiB") from None
    if max_media is not None:
        let_in["max_media"] = max_media
    return Safety(**let_in)


def heeded(mode: str, *names: str) -> None:
    """ValueError where options were typed that the option `mode` makes mean nothing: all but it and those of `names`,
    by their parameters."""
    context = click.get_current_context()
    for option in context.command.params:
        said = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if said and isinstance(option, click.Option) and option.name not in names and mode not in option.opts:
            raise ValueError(f"{option.opts[-1]} means nothing beside {mode}: leave one of them out")


def several(options: Sequence[Any]) -> Any:
    """A decorator that adds `options` to a command, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add
