"""Start a server, wait until it is healthy, end it: a `Launch` in, a running `Server` out. Knows no engine's flags.

The engine runs in a session of its own, so the whole family of its processes is ended together, and nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..recipes.progress import Step, Tell, silent
from .flags import Launch
from .http import get
from .log import why_it_died

GRACE = 15.0  # seconds between SIGTERM and SIGKILL
START_TIMEOUT = 900.0  # seconds; a first start on a GPU compiles for minutes


@dataclass(frozen=True)
class Server:
    """A healthy server: `url` without /v1, `pid` of the process that leads its group, `startup_s` seconds to health."""

    url: str
    name: str
    pid: int
    log_path: Path
    startup_s: float


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """ValueError when `port` of `host` cannot be listened on, naming it and the way out."""
    if not 0 < port < 65536:
        raise ValueError(f"port {port} is not between 1 and 65535")
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((host, port))
    except PermissionError:
        raise ValueError(f"port {port} needs root; give one above 1023 with --port") from None
    except socket.gaierror:
        raise ValueError(f"{host} is no address of this machine; --host 127.0.0.1 is the usual one") from None
    except OSError as e:
        raise ValueError(f"port {port} on {host} cannot be used ({e.strerror}); give another with --port") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def healthy(url: str, *, timeout: float = 2.0) -> bool:
    """Whether the server at `url` answers 200 on /health."""
    try:
        return get(f"{url}/health", timeout=timeout)[0] == 200
    except OSError:
        return False


def _environment(launch: Launch) -> dict[str, str]:
    env = {**os.environ, **launch.env}
    # engines compile kernels with the ninja of their own environment, which need not be activated
    env["PATH"] = os.pathsep.join([str(Path(launch.argv[0]).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    return env


def _spawn(launch: Launch, stdout: Any) -> subprocess.Popen[bytes]:
    check_port(launch.host, launch.port)
    try:
        return subprocess.Popen(
            launch.argv,
            env=_environment(launch),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as e:
        raise RuntimeError(f"{launch.argv[0]} cannot be started: {e.strerror}") from None


def _group_alive(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end(process: subprocess.Popen[bytes], *, grace: float = GRACE) -> None:
    """End the process and its whole group: SIGTERM, then SIGKILL to what is left after `grace` seconds.

    The leader is asked first and ends its own children: signalled all at once, an engine reports the death of its
    workers as a failure. A second Ctrl-C meanwhile cuts the grace short and leaves nothing behind.
    """
    until = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError, PermissionError):
        process.send_signal(signal.SIGTERM)
    orphans_told = False
    try:
        while time.monotonic() < until:
            if process.poll() is not None:
                if not _group_alive(process.pid):
                    return
                if not orphans_told:
                    _signal_group(process.pid, signal.SIGTERM)
                    orphans_told = True
            time.sleep(0.05)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(pgid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


def _wait_healthy(process: subprocess.Popen[bytes], launch: Launch, log: Path, timeout: float, tell: Tell) -> float:
    """Seconds until /health answered. RuntimeError when the engine died or `timeout` seconds passed."""
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        code = process.poll()
        if code is not None:
            raise RuntimeError(f"the engine died at its start: {why_it_died(log, returncode=code)} (log: {log})")
        if healthy(launch.url):
            return waited
        if waited > timeout:
            why = why_it_died(log)
            raise RuntimeError(f"the engine was not healthy after {timeout:.0f} s; its log ends: {why} (log: {log})")
        tell(Step("start the engine", int(waited), int(waited), "seconds"))  # nobody knows how long it will take
        time.sleep(0.25)


@contextlib.contextmanager
def _terminate_is_exit() -> Iterator[None]:
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

    Its log goes to `log_path` (a temporary file by default, kept). ValueError when the port is taken, RuntimeError
    with the engine's own error when it dies, at its start or while it is being asked (an OSError within the `with`).
    """
    if log_path is None:
        handle, path = tempfile.mkstemp(prefix="mmq-serve-", suffix=".log")
        os.close(handle)
        log_path = Path(path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log, _terminate_is_exit():
        process = _spawn(launch, log)
        try:
            startup = _wait_healthy(process, launch, log_path, timeout, tell)
            yield Server(launch.url, launch.name, process.pid, log_path, startup)
        except OSError:
            code = _ended(process)
            if code is None:
                raise
            why = why_it_died(log_path, returncode=code)
            raise RuntimeError(f"the engine died: {why} (log: {log_path})") from None
        finally:
            end(process)


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The status of a process that is gone, or goes within a moment; None where it runs on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(2)
    return None


def foreground(
    launch: Launch,
    *,
    log_path: Path,
    on_line: Callable[[str], None],
    on_ready: Callable[[Server], None],
    timeout: float = START_TIMEOUT,
    tell: Tell = silent,
) -> int:
    """Run the launch until it ends or the user ends it; returns its exit status, 0 when a signal to us ended it.

    Each line of the engine goes to `on_line` and to `log_path`; `on_ready` is called once, when it is healthy.
    SIGINT and SIGTERM are passed on. Errors as in `running`.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log, _terminate_is_exit():
        process = _spawn(launch, subprocess.PIPE)
        reader = threading.Thread(target=_pump, args=(process, log, on_line), daemon=True)
        reader.start()
        try:
            startup = _wait_healthy(process, launch, log_path, timeout, tell)
            on_ready(Server(launch.url, launch.name, process.pid, log_path, startup))
            code = process.wait()
            if code:
                reader.join(5)
                why = why_it_died(log_path, returncode=code)
                raise RuntimeError(f"the engine died: {why} (log: {log_path})")
            return code
        except (KeyboardInterrupt, SystemExit):
            return 0
        finally:
            end(process)
            reader.join(5)


def _pump(process: subprocess.Popen[bytes], log: Any, on_line: Callable[[str], None]) -> None:
    """Copy the engine's lines to the log and to `on_line` until its last process closes its end."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip("\n")
        log.write(line + "\n")
        log.flush()
        on_line(line)
