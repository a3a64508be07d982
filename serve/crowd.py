"""Many requests at once, a bounded number under way: who asks, and in what order what comes back is shown.

Knows requests and a server's address; not where the questions come from, nor where the answers go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from .client import TIMEOUT, Answer, Message, ask_async, connect_async

Asked = tuple[int, Callable[[], Sequence[Message]]]
PLACE = 60.0  # seconds more that a request may take for each that waits with it


async def crowd(
    url: str,
    todo: Iterable[Asked],
    keep: Callable[[int, Answer | Exception], None],
    *,
    concurrency: int,
    api_key: str | None = None,
    on_piece: Callable[[int, str], None] | None = None,
    **options: Any,
) -> None:
    """Ask all of `todo` (a number and what makes its messages), `concurrency` at once; `keep` gets each answer as it
    comes, or the error of a request that the server refused (ValueError) or failed at (RuntimeError).

    `concurrency` workers take from the one iterator and make messages in threads, where pictures are read and decoded,
    so only that many are in memory. OSError when the server is gone; what `todo` and its makers raise goes through.
    """
    async with connect_async(url, api_key=api_key, timeout=TIMEOUT + PLACE * concurrency) as client:
        left = iter(todo)

        async def worker() -> None:
            for number, make in left:
                messages = await asyncio.to_thread(make)
                told = None if on_piece is None else partial(on_piece, number)
                try:
                    found: Answer | Exception = await ask_async(client, messages, on_piece=told, **options)
                except (ValueError, RuntimeError) as e:  # this one request; a server that is gone ends the run
                    found = e
                keep(number, found)

        with first_error():
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())


def waited(work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives. ValueError within a running event loop (a notebook): there it is awaited."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    work.close()
    raise ValueError("an event loop runs here already, as in a notebook: use `await ...infer_async(...)`")


@contextmanager
def first_error() -> Iterator[None]:
    """The first error of a task group instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:  # the first worker to fail ends the others; its error is the story
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def in_order(
    numbers: Iterable[int], write: Callable[[int, str], None]
) -> tuple[Callable[[int, str], None], Callable[[int], None]]:
    """(piece, end) for answers that come together and are read one after the other, in the order of `numbers`.

    Of the first that has not ended the pieces are written at once, those of the others when their turn comes;
    `end(number)` closes one with a newline.
    """
    turns = deque(numbers)
    waiting: dict[int, list[str]] = {}
    ended: set[int] = set()

    def flush() -> None:
        while turns:
            for text in waiting.pop(turns[0], ()):
                write(turns[0], text)
            if turns[0] not in ended:
                return
            turns.popleft()

    def piece(number: int, text: str) -> None:
        waiting.setdefault(number, []).append(text)
        flush()

    def end(number: int) -> None:
        ended.add(number)
        piece(number, "\n")

    return piece, end
