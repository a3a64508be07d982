"""Start a server, wait until it is healthy, end it: a `Launch` in, a running `Server` out. Knows no engine's flags.

The engine runs in a session of its own, so the whole family of its processes is ended together, and nothing else is.
A watch outlives us where we are killed, and ends the family then.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..recipes.progress import Step, Tell, silent
from .flags import Launch
from .http import get
from .log import why_it_died

GRACE = 15.0  # seconds between SIGTERM and SIGKILL, after those that requests under way have
LEFT_BEHIND = 3.0  # seconds between the two for what is left of an engine that died
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


def _environment(launch: Launch, door: Path) -> dict[str, str]:
    env = {**os.environ, **launch.env, **{name: secret.value for name, secret in launch.secrets.items()}}
    # engines compile kernels with the ninja of their own environment, which need not be activated
    env["PATH"] = os.pathsep.join([str(Path(launch.argv[0]).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    env["MMQ_DOOR"] = str(door)  # once a file `closed` is in this folder, the guard lets nothing in
    return env


def _spawn(launch: Launch, stdout: Any, door: Path) -> subprocess.Popen[bytes]:
    if launch.serves:
        check_port(launch.host, launch.port)
    try:
        return subprocess.Popen(
            launch.argv,
            env=_environment(launch, door),
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


# $1 is the engine's process and its group; $2 and $3 are fifths of a second for requests under way and for its end, $4
# is the door. Reads until we, who hold the other end of its standard input, are gone, however that came about; then
# ends the engine as we would have.
_WATCH = """
read -r nothing
: > "$4/closed"
busy() { for mark in "$4"/busy/*; do [ -e "$mark" ] && return; done; return 1; }
wait_while() { while "$@" && [ "$left" -gt 0 ]; do sleep 0.2; left=$((left - 1)); done; }
left=$2
wait_while busy "$@"
left=$3
kill -TERM "$1"
wait_while kill -0 "$1"
kill -TERM "-$1"
wait_while kill -0 "-$1"
kill -KILL "-$1"
rm -rf "$4/closed" "$4/busy" && rmdir "$4"
"""


@contextlib.contextmanager
def started(launch: Launch, stdout: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The engine's process, which is ended with its whole group where the `with` ends, or where we are killed (by
    SIGKILL, by a closed terminal): a watch waits for that. Requests under way have the launch's grace."""
    with tempfile.TemporaryDirectory(prefix="mmq-serve-") as place:
        door = Path(place)
        (door / "busy").mkdir()  # the guard's files, one for each process that has requests under way
        process = _spawn(launch, stdout, door)
        times = [str(int(seconds * 5)) for seconds in (launch.grace, GRACE)]
        argv = ["/bin/sh", "-c", _WATCH, "mmq-watch", str(process.pid), *times, place]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True) as watch:
            try:
                yield process
            finally:
                (door / "closed").touch()
                try:  # what a dead engine left behind would answer nobody
                    alive = process.poll() is None
                    end(process, grace=GRACE if alive else LEFT_BEHIND, busy=door / "busy", patience=launch.grace)
                finally:
                    watch.kill()


def end(
    process: subprocess.Popen[bytes], *, grace: float = GRACE, busy: Path | None = None, patience: float = 0.0
) -> None:
    """End the process and its whole group: SIGTERM, then SIGKILL to what is left after `grace` seconds.

    Before that it has up to `patience` seconds while files are in the folder `busy`. vLLM's own drain is not used: its
    server ends with its core, and under load the last pieces of answers were lost between the two.
    The leader is asked first and ends its own children: signalled all at once, an engine reports the death of its
    workers as a failure. A second Ctrl-C meanwhile cuts it all short and leaves nothing behind.
    """
    try:
        until = time.monotonic() + patience
        while busy is not None and any(busy.iterdir()) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        until = time.monotonic() + grace
        with contextlib.suppress(ProcessLookupError, PermissionError):
            process.send_signal(signal.SIGTERM)
        orphans_told = False
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


def wait_healthy(process: subprocess.Popen[bytes], launch: Launch, log: Path, timeout: float, tell: Tell) -> float:
    """Seconds until /health answered. RuntimeError when the engine died or `timeout` seconds passed."""
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        code = process.poll()
        if code is not None:
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

    Its log goes to `log_path` (a temporary file by default, kept). ValueError when the port is taken, RuntimeError
    with the engine's own error when it dies, at its start or while it is being asked (within the `with` that is an
    OSError, or a RuntimeError where an answer broke off).
    """
    if log_path is None:
        handle, path = tempfile.mkstemp(prefix="mmq-serve-", suffix=".log")
        os.close(handle)
        log_path = Path(path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
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


def _ended(process: subprocess.Popen[bytes], *, within: float) -> int | None:
    """The status of a process that is gone, or goes within so many seconds; None where it runs on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(within)
    return None
