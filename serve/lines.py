"""An engine's lines as they come: shown, and kept in a log that does not grow for ever. Knows no engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

LONGEST = 64 << 20  # bytes of a log; then it becomes NAME.old.log, in the place of the one before


def begin(path: Path) -> None:
    """Make the log at `path` an empty file. OSError where it cannot be one."""
    try:
        path.write_bytes(b"")
    except OSError as e:
        raise OSError(f"the engine's log {path} cannot be written: {e.strerror}; start in another folder") from None


def keep(lines: Iterable[bytes], path: Path, on_line: Callable[[str], None], on_note: Callable[[str], None]) -> None:
    """Copy lines to the log at `path` and to `on_line`, to their end.

    Whatever becomes of the two (a full disk, a closed terminal), the lines are read on, for an engine that nobody
    reads stands still at its next line; `on_note` is told when the log cannot be written, once until it can be again.
    """
    log, size, failed = path.open("ab", buffering=0), 0, False
    try:
        for raw in lines:
            try:
                if size >= LONGEST:
                    path.replace(path.with_suffix(f".old{path.suffix}"))
                    log.close()
                    log, size = path.open("ab", buffering=0), 0
                size += log.write(raw)
                failed = False
            except (OSError, ValueError) as e:  # ValueError: the next log could not be opened
                if not failed:
                    _tried(on_note, f"the engine's lines are shown and not kept: {path} cannot be written ({e})")
                failed = True
            _tried(on_line, raw.decode("utf-8", "replace").rstrip("\n"))
    finally:
        log.close()


def _tried(tell: Callable[[str], None], text: str) -> None:
    with contextlib.suppress(OSError):  # nobody looks any more
        tell(text)
