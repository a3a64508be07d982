"""mmq app: a chat on a web page."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import click

from .options import bin_option, check_flags, hub_options, several
from .terminal import progress


@click.command("app")
@click.argument("target")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--port", type=int, default=8080, show_default=True, help="Where the page is, on this machine alone.")
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves TARGET, where it is no URL.")
@bin_option
@click.option("--api-key-file", type=click.Path(path_type=Path), help="The server's key.  [default: $MMQ_API_KEY]")
@click.option("--open", "browse", is_flag=True, help="Open the page in the browser.")
@several(hub_options)
def command(
    target: str, engine_flags: tuple[str, ...], port: int, api_key_file: Path | None, browse: bool, **where: Any
) -> None:
    """Chat with TARGET (an artifact, a model, or the URL of a running server) on a web page, pictures and videos too.

    The page is for this machine alone. Flags after `--` go to the engine that is started.
    """
    from threading import Event

    from ..serve.app import page
    from ..serve.client import connect, served_name
    from ..serve.infer import at
    from ..serve.request import DEFAULT
    from ..serve.running import check_port
    from ..serve.safety import Safety, key_of

    check_flags(engine_flags)
    if engine_flags and "://" in target:
        raise ValueError(f"{' '.join(engine_flags)} is for an engine that is started here; {target} runs already")
    check_port("127.0.0.1", port)
    key = key_of(Safety(api_key_file=api_key_file), os.environ)
    with ExitStack() as stack:
        with progress(quiet=False) as tell:
            url, _ = stack.enter_context(at(target, DEFAULT, tell=tell, extra=engine_flags, **where))
            with connect(url, api_key=key.value if key else None) as client:
                served_name(client, url=url)  # a page before nobody would tell so at the first question only
        address = stack.enter_context(page(url, port=port, api_key=key.value if key else None))
        click.secho(f"the page: {address}   (Ctrl-C here ends it)", fg="green")
        if browse:
            click.launch(address)
        with suppress(KeyboardInterrupt):  # that is how it ends
            while not Event().wait(1):  # without an end, a Ctrl-C in the moment in which it begins would not be seen
                pass
