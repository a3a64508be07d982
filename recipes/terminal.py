"""What the terminal shows, built and not printed: tables, progress bars, sizes in words; and lines read from it.

Knows no command; printing is the command line's. rich is imported on use.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .plain import shown
from .progress import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table


WIDE = 44  # characters of a word that a table keeps on one line


def human(size: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.2f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    raise AssertionError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of words, or of figures where more than one column has a title."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, show_header=any(head))
    figures = len(head) > 2 and all(head[1:])  # columns of figures keep their width, and the words before them give way
    for column, title in enumerate(head):
        keep = figures == (column > 0)
        # a cell longer than this is folded, so that it leaves room for what stands beside it
        wide = WIDE if keep and not figures and any(len(row[column]) > WIDE for row in rows) else None
        justify = "right" if figures and column else "left"
        found.add_column(title, no_wrap=keep and not wide, overflow="fold", justify=justify, max_width=wide)
    for row in rows:
        found.add_row(*(Text(shown(cell)) for cell in row))  # not a str, in which rich would read its markup
    return found


def answer_writer(write: Callable[[str], None]) -> Callable[[str], None]:
    """`write` for text that a model made: where a person looks at stdout, control characters are shown and do nothing;
    into a file or a pipe it goes as it is."""
    return (lambda text: write(shown(text))) if sys.stdout.isatty() else write


def line_reader() -> Callable[[str], str]:
    """A function that shows a prompt and returns the line typed, edited and recalled with the usual keys; EOFError at
    the end. Where nobody types (a pipe, a file) no prompt is shown. Bytes that are no UTF-8 come as lone surrogates.
    """
    with contextlib.suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  (imported, it works for `input`)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    typed = sys.stdin.isatty()

    def read(prompt: str) -> str:
        try:
            return input(prompt if typed else "")
        except EOFError:
            if typed:
                sys.stdout.write("\n")  # Ctrl-D leaves the cursor behind the prompt
            raise

    return read


def bars() -> Progress:
    """Progress bars for stderr, shown while it is used as a context manager; `listener` moves them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True))


def listener(on: Progress) -> Callable[[Step], None]:
    """Who is told of steps and keeps a bar for each kind of them."""
    tasks: dict[str, TaskID] = {}

    def tell(step: Step) -> None:
        if step.name not in tasks:
            tasks[step.name] = on.add_task(step.name, total=step.total, note="")
        on.update(tasks[step.name], completed=step.done, total=step.total, note=shown(step.note))

    return tell
