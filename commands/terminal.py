"""What commands have in common on the terminal: tables, bars, the next command to type, a failed limit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..bench.check import Checked
    from ..recipes.progress import Tell


def exit_past_limits(result: Checked | None) -> None:
    """Exit 1 with a line for each measure past its limit, where there is one."""
    if result is not None and result.failures:
        for line in result.failures:
            click.echo(f"mmq: past the limit: {line}", err=True)
        sys.exit(1)


def show_table(head: list[str], rows: list[list[str]], *, err: bool = False) -> None:
    """A table on stdout, or on stderr."""
    from rich.console import Console

    from ..recipes.terminal import table

    Console(stderr=err).print(table(head, rows))


def next_step(line: str) -> None:
    """The next command to type."""
    click.echo(f"\nnext: {line}")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """A progress bar a kind of step, on stderr; nothing when `quiet`."""
    from ..recipes.progress import silent
    from ..recipes.terminal import bars, listener

    if quiet:
        yield silent
        return
    with bars() as shown:
        yield listener(shown)
