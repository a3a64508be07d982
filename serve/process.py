"""One process of an engine, and the family of those that it starts: begun, and ended together. Knows no engine's flags.

The engine runs in a session of its own, so the whole family of its processes is ended together, and nothing else is.
A watch outlives us where we are killed, and ends the family then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .flags import Launch
from .ports import check_port

GRACE = 15.0  # seconds between SIGTERM and SIGKILL, after those that requests under way have
LEFT_BEHIND = 3.0  # seconds between the two for what is left of an engine that died


def _environment(launch: Launch, door: Path) -> dict[str, str]:
    env = {**os.environ, **launch.env, **{name: secret.value for name, secret in launch.secrets.items()}}
    # engines compile kernels with the ninja of their own environment, which need not be activated
    env["PATH"] = os.pathsep.join([str(Path(launch.argv[0]).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    env["MMQ_DOOR"] = str(door)  # once a file `closed` is in this folder, the guard lets nothing in
    return env


# Not a shell: some pass on no variable whose name they could not have themselves.
_START = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and what is ignored is inherited
os.write(0, b"%d\\n" % os.getpid())
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def watch(script: str, *words: str) -> subprocess.Popen[bytes]:
    """A shell with `script`, which outlives us: $1 is our process, for who reads `ps`, then come `words`. We hold its
    standard input, which ends when we do, however that comes about."""
    argv = ["/bin/sh", "-c", script, "mmq-watch", str(os.getpid()), *words]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)


def announced(argv: Sequence[str]) -> list[str]:
    """`argv` for a process that tells a watch its number before it becomes the program, so that however early we are
    killed the watch knows whom to end. The watch reads what is written to the process's standard input."""
    return [sys.executable, "-I", "-S", "-c", _START, *argv]


def _spawn(launch: Launch, stdout: Any, door: Path, watch_input: IO[bytes]) -> subprocess.Popen[bytes]:
    if launch.serves:
        check_port(launch.host, launch.port)
    if shutil.which(launch.argv[0]) is None:
        raise RuntimeError(f"{launch.argv[0]} cannot be started: it is no program that may be run")
    return subprocess.Popen(
        announced(launch.argv),
        env=_environment(launch, door),
        stdin=watch_input,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _group_alive(pgid: int) -> bool:
    """Whether the group of a leader that has ended has processes. What they left to us is reaped: as the first process
    of a container we inherit them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-pgid, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


# $1 is our process, for who reads `ps`; $2 and $3 are fifths of a second for requests under way and for the engine's
# end, $4 is the door. The first line read is the engine's process and its group. Then reads until we, who hold the
# other end of its standard input, are gone, however that came about, and ends the engine as we would have.
_WATCH = """
read -r engine
read -r nothing
mkdir -p "$4/busy" && touch "$4/closed"
busy() { for mark in "$4"/busy/*; do [ -e "$mark" ] && return; done; return 1; }
wait_while() { while "$@" && [ "$left" -gt 0 ]; do sleep 0.2; left=$((left - 1)); done; }
if [ -n "$engine" ]; then
    left=$2
    wait_while busy "$@"
    left=$3
    kill -TERM "$engine"
    wait_while kill -0 "$engine"
    kill -TERM "-$engine"
    wait_while kill -0 "-$engine"
    kill -KILL "-$engine"
fi
rm -rf "$4/closed" "$4/busy" && rmdir "$4"
"""


@contextlib.contextmanager
def started(launch: Launch, stdout: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The engine's process, which is ended with its whole group where the `with` ends, or where we are killed (by
    SIGKILL, by a closed terminal): a watch waits for that. Requests under way have the launch's grace."""
    with tempfile.TemporaryDirectory(prefix="mmq-serve-", ignore_cleanup_errors=True) as place:
        door = Path(place)
        (door / "busy").mkdir()  # the guard's files, one for each process that has requests under way
        times = [str(int(seconds * 5)) for seconds in (launch.grace, GRACE)]
        with watch(_WATCH, *times, place) as watching:
            assert watching.stdin is not None
            process = _spawn(launch, stdout, door, watching.stdin)  # interrupted here, the watch ends what was begun
            try:
                yield process
            finally:
                with contextlib.suppress(OSError):
                    (door / "busy").mkdir(parents=True, exist_ok=True)  # temporary files are swept away, after days
                    (door / "closed").touch()
                try:  # what a dead engine left behind would answer nobody
                    alive = process.poll() is None
                    end(process, grace=GRACE if alive else LEFT_BEHIND, busy=door / "busy", patience=launch.grace)
                finally:
                    watching.kill()


def wait(process: subprocess.Popen[bytes]) -> int:
    """The status of `process` once it ends, looked for each second: a signal to us that comes in the moment in which a
    wait begins is seen only at that wait's end."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1)


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
        while busy is not None and _marked(busy) and process.poll() is None and time.monotonic() < until:
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
        _group_alive(process.pid)


def _marked(busy: Path) -> bool:
    """Whether requests are under way; no folder has none."""
    try:
        return any(busy.iterdir())
    except OSError:
        return False


def _signal_group(pgid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)
