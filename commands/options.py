"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

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


def several(options: Sequence[Any]) -> Any:
    """A decorator that adds `options` to a command, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add
