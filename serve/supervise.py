"""An engine in the foreground: its lines shown and kept, started again when it dies, ended when we are told to end.

Knows no engine's flags; how one process is started and ended is process.py's business.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..recipes.progress import Tell, silent
from .flags import Launch
from .lines import begin, keep
from .log import why_it_died
from .ports import listening
from .process import started, wait
from .running import DIED, START_TIMEOUT, Server, terminate_is_exit, wait_healthy

LONGEST_PAUSE = 60.0  # seconds between a crash and the next start
LOOK = 1.0  # seconds between two looks at the first of several machines, and
GONE = 15.0  # for how long it must not have listened, once it did, to be taken for gone


def foreground(
    launch: Launch,
    *,
    log_path: Path,
    on_line: Callable[[str], None],
    on_ready: Callable[[Server], None],
    on_note: Callable[[str], None] = lambda note: None,
    restarts: int = 0,
    timeout: float = START_TIMEOUT,
    tell: Tell = silent,
) -> int:
    """Run the launch until it ends or the user ends it; returns 0 when a signal to us ended it.

    Each line of the engine goes to `on_line` and to `log_path`; `on_ready` is called whenever it is healthy. An engine
    that was healthy once and dies is started again, at most `restarts` times in all and after a longer pause each
    time; `on_note` is told why, and the log of the dead one is kept as NAME.1.log, NAME.2.log. SIGINT and SIGTERM are
    passed on, and `on_note` is told how long requests under way have. Errors as in `running`.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    lived = False

    def ready(server: Server) -> None:
        nonlocal lived
        lived = True
        on_ready(server)

    with terminate_is_exit():
        for again in range(restarts + 1):
            try:
                _once(launch, log_path, on_line, ready, on_note, timeout, tell)
            except RuntimeError as e:
                if not lived or again == restarts:
                    tried = f"; it was started {again + 1} times" if again else ""
                    raise RuntimeError(f"{e}{tried}") from None
                kept = log_path.with_suffix(f".{again + 1}{log_path.suffix}")
                log_path.replace(kept)
                pause = min(2.0**again, LONGEST_PAUSE)
                on_note(f"{str(e).replace(str(log_path), str(kept))}; start {again + 1} of {restarts} in {pause:.0f} s")
                if not _slept(pause):
                    return 0
            else:
                return 0
    raise AssertionError("the last start returns or raises")


def _slept(seconds: float) -> bool:
    """Whether nobody ended us meanwhile."""
    try:
        time.sleep(seconds)
    except (KeyboardInterrupt, SystemExit):
        return False
    return True


def _once(
    launch: Launch,
    log_path: Path,
    on_line: Callable[[str], None],
    on_ready: Callable[[Server], None],
    on_note: Callable[[str], None],
    timeout: float,
    tell: Tell,
) -> None:
    """One life of the engine, which returns when a signal to us ended it. RuntimeError when it ends by itself."""
    begin(log_path)
    reader = None
    try:
        with started(launch, subprocess.PIPE) as process:
            reader = threading.Thread(target=keep, args=(process.stdout, log_path, on_line, on_note), daemon=True)
            reader.start()
            last_words = partial(reader.join, 1)  # children that it left may hold the pipe open
            note = "ending the start; Ctrl-C again cuts it short"
            try:
                startup = wait_healthy(process, launch, log_path, timeout, tell, written=last_words)
                note = f"ending: requests under way have {launch.grace:.0f} s; Ctrl-C again cuts them off"
                on_ready(Server(launch.url, launch.name, process.pid, log_path, startup))
                code = wait(process) if launch.serves else _waited(process, launch)
            except (KeyboardInterrupt, SystemExit):
                if launch.grace:
                    on_note(note)
                raise
            last_words()
            raise RuntimeError(f"{DIED}: {why_it_died(log_path, returncode=code)} (log: {log_path})")
    except (KeyboardInterrupt, SystemExit):
        return
    finally:
        if reader is not None:
            reader.join(5)


def _waited(process: subprocess.Popen[bytes], launch: Launch) -> int:
    """The status of an engine that computes for the first of several machines, once it ends. RuntimeError when that
    machine is gone: the engine would wait for it for ever. It is known to be there once its port was seen open, which
    it is for others where `mmq serve` has a --host there that they reach."""
    seen: float | None = None
    while True:
        try:
            return process.wait(LOOK)
        except subprocess.TimeoutExpired:
            if listening(launch.host, launch.port):
                seen = time.monotonic()
            elif seen is not None and time.monotonic() - seen > GONE:
                there = f"{launch.host}:{launch.port}"
                raise RuntimeError(
                    f"the first machine is gone: nothing has answered at {there} for {GONE:g} s"
                ) from None
