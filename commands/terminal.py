"""What commands have in common on the terminal: tables, bars, the next command to type, a failed limit, `| head`."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

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


def until_left(callback: Callable[..., Any]) -> Callable[..., Any]:
    """`callback`, ended as other programs are where the reader of its output leaves (`| head`): without a word, with
    141. click and rich would make that 1, which is a verdict here."""

    @wraps(callback)
    def called(*args: Any, **options: Any) -> Any:
        try:
            return callback(*args, **options)
        except BrokenPipeError as e:
            outputs = select.poll()
            for number in (1, 2):
                outputs.register(number, 0)
            if not outputs.poll(0):  # another pipe, to a process of ours
                raise RuntimeError(f"a process that mmq needs is gone ({e})") from None
        except SystemExit as e:
            if not isinstance(e.__context__, BrokenPipeError):  # rich's way to say so
                raise
        for number in (1, 2):  # what is left to be written ends there
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.exit(128 + signal.SIGPIPE)

    return called


def show_table(head: list[str], rows: list[list[str]], *, err: bool = False) -> None:
    """A table on stdout, or on stderr."""
    from rich.console import Console

    from ..recipes.terminal import table

    Console(stderr=err).print(table(head, rows))


def next_step(*words: object, remark: str = "") -> None:
    """The next command, as it is typed: a folder's name may have spaces."""
    click.echo(f"\nnext: {shlex.join(str(word) for word in words)}{remark}")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """A progress bar a kind of step, on stderr, from the first step on; nothing when `quiet`."""
    from ..recipes.progress import Step, silent
    from ..recipes.terminal import bars, listener

    if quiet:
        yield silent
        return
    with ExitStack() as stack:
        move = listener(shown := bars())

        def tell(step: Step) -> None:
            if not shown.live.is_started:  # rich ends even no bars with an empty line
                stack.enter_context(shown)
            move(step)

        yield tell
