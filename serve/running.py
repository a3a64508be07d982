"""A server that is started, waited for until it is healthy, and ended: a `Launch` in, a running `Server` out.

Knows no engine's flags; the processes are process.py's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..recipes.progress import Step, Tell, silent
from .flags import Launch
from .http import get
from .log import why_it_died
from .ports import check_port, free_port
from .process import end, started

__all__ = [
    "DIED",
    "START_TIMEOUT",
    "Server",
    "check_port",
    "end",
    "free_port",
    "healthy",
    "running",
    "started",
    "terminate_is_exit",
    "wait_healthy",
]

BROKEN_OFF = 8.0  # seconds; vLLM's server notices within five that its core is dead, and ends then
DIED = "the engine died"
START_TIMEOUT = 900.0  # seconds; a first start on a GPU compiles for minutes


@dataclass(frozen=True)
class Server:
    """A healthy server: `url` without /v1, `pid` of the process that leads its group, `startup_s` seconds to health."""

    url: str
    name: str
    pid: int
    log_path: Path
    startup_s: float


def healthy(url: str, *, timeout: float = 2.0) -> bool:
    """Whether the server at `url` answers 200 on /health."""
    try:
        return get(f"{url}/health", timeout=timeout)[0] == 200
    except OSError:
        return False


def wait_healthy(
    process: subprocess.Popen[bytes],
    launch: Launch,
    log: Path,
    timeout: float,
    tell: Tell,
    *,
    written: Callable[[], None] = lambda: None,
) -> float:
    """Seconds until /health answered. RuntimeError when the engine died (`written` is called before its log is read) or
    `timeout` seconds passed."""
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        code = process.poll()
        if code is not None:
            written()
            raise RuntimeError(f"{DIED} at its start: {why_it_died(log, returncode=code)} (log: {log})")
        if not launch.serves or healthy(launch.url):  # only the first of several machines can be asked
            return waited
        if waited > timeout:
            why = why_it_died(log)
            raise RuntimeError(f"the engine was not healthy after {timeout:.0f} s; its log ends: {why} (log: {log})")
        tell(Step("start the engine", int(waited), int(waited), "seconds"))  # nobody knows how long it will take
        time.sleep(0.25)


@contextlib.contextmanager
def terminate_is_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit within, so that `finally` runs and no engine outlives us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(
    launch: Launch, *, timeout: float = START_TIMEOUT, log_path: Path | None = None, tell: Tell = silent
) -> Iterator[Server]:
    """Run the launch in the background for the length of a `with`; yields the healthy server.

    Its log goes to `log_path` (by default a temporary file, which is kept where a RuntimeError tells of it). ValueError
    when the port is taken, RuntimeError with the engine's own error when it dies, at its start or while it is being
    asked (within the `with` that is an OSError, or a RuntimeError where an answer broke off).
    """
    kept = log_path is not None
    if log_path is None:
        handle, path = tempfile.mkstemp(prefix="mmq-serve-", suffix=".log")
        os.close(handle)
        log_path = Path(path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log_path.open("wb") as log, terminate_is_exit(), started(launch, log) as process:
            try:
                startup = wait_healthy(process, launch, log_path, timeout, tell)
                yield Server(launch.url, launch.name, process.pid, log_path, startup)
            except (OSError, RuntimeError) as e:
                code = _ended(process, within=2.0 if isinstance(e, OSError) else BROKEN_OFF)
                if code is None or DIED in str(e):
                    raise
                why = why_it_died(log_path, returncode=code)
                raise RuntimeError(f"{DIED}: {why} (log: {log_path})") from None
    except RuntimeError:
        kept = True
        raise
    finally:
        if not kept:
            log_path.unlink(missing_ok=True)


def _ended(process: subprocess.Popen[bytes], *, within: float) -> int | None:
    """The status of a process that is gone, or goes within so many seconds; None where it runs on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(within)
    return None
