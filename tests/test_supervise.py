"""An engine that dies is started again, one that should end is let finish, and none outlives us; with a small server.

The real engine's deaths are in test_bad_requests.py.
"""

from __future__ import annotations

import _thread
import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmq.serve import lines, supervise
from mmq.serve.flags import Launch, Secret
from mmq.serve.log import why_it_died
from mmq.serve.process import wait
from mmq.serve.running import Server, free_port, healthy, running
from mmq.serve.supervise import foreground

# answers /slow in a second, in two pieces, with a mark as the guard has; dies of /die; ends at once when it is told to
SERVER = """
import http.server, os, subprocess, sys, time
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
print("key", os.environ.get("MMQ_API_KEY"), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mark = os.path.join(os.environ["MMQ_DOOR"], "busy", "1")
        self.send_response(200); self.end_headers()
        if self.path == "/slow":
            open(mark, "w").close()
            self.wfile.write(b"one "); self.wfile.flush(); time.sleep(1); self.wfile.write(b"two")
            self.wfile.flush(); self.connection.close(); os.unlink(mark)
        if self.path == "/die":
            print("MemoryError: the card is full", flush=True); os._exit(1)
    def log_message(self, *what): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever(0.05)
"""
# an mmq of this file's own: `foreground` of the launch above, in a process that can be killed
MMQ = """
import sys, pathlib
from mmq.serve import supervise
from mmq.serve.flags import Launch
from mmq.serve.running import running
from mmq.serve.supervise import foreground
how, code, port, log, grace = sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]), float(sys.argv[5])
argv = (sys.executable, "-c", code, port)
launch = Launch(argv, {}, (), f"http://127.0.0.1:{port}", "x", "127.0.0.1", int(port), "cpu", grace=grace)
say = lambda *words: print(*words, flush=True)
if how == "foreground":
    ready = lambda server: say("ready", server.pid)
    sys.exit(foreground(launch, log_path=log, on_line=say, on_ready=ready, on_note=lambda note: say("note", note)))
with running(launch, log_path=log) as server:
    say("ready", server.pid)
    import time; time.sleep(600)
"""


def small(code: str = SERVER, **more: object) -> Launch:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    return Launch((sys.executable, "-c", code, str(port)), {}, (), url, "x", "127.0.0.1", port, "cpu", **more)  # pyright: ignore


def started(how: str, tmp_path: Path, grace: float = 0.0) -> tuple[subprocess.Popen[str], int, int, int]:
    """(mmq's process, the port, the engine's pid, its child's)."""
    port = free_port()
    argv = [sys.executable, "-c", MMQ, how, SERVER, str(port), str(tmp_path / "log"), str(grace)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = dict(next(process.stdout).split() for _ in range(3 if how == "foreground" else 1))
    child = said.get("child") or (tmp_path / "log").read_text().split()[1]
    return process, port, int(said["ready"]), int(child)


def die(port: int, path: str = "/die") -> None:
    """Ask the server for what it dies of."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.getresponse().read()
    connection.close()


def gone(*pids: int) -> bool:
    """Whether all of them end within ten seconds; a zombie that nobody reaps counts as ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        stats = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z" for s in stats):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", ["foreground", "running"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_no_engine_outlives_us(how: str, number: signal.Signals, tmp_path: Path) -> None:
    """Though nothing of ours runs any more: a kill, an out-of-memory kill, a closed terminal."""
    process, _, engine, child = started(how, tmp_path)
    assert process.stdout is not None
    process.send_signal(number)
    assert process.wait(60) == -number
    assert gone(engine, child)
    process.stdout.close()
    watches = [
        int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if b"mmq-watch\0%d\0" % process.pid in _read(p)
    ]
    assert gone(*watches)  # and it goes itself


def test_the_first_process_of_a_container_reaps_what_an_engine_left() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    first = f"""
import ctypes, os, subprocess, sys, time
from mmq.serve.flags import Launch
from mmq.serve.process import started
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become our children, as process 1's do
argv = (sys.executable, "-c", {code!r})
with started(Launch(argv, {{}}, (), "", "x", "127.0.0.1", 1, "cpu", serves=False), subprocess.DEVNULL) as process:
    process.wait()
    begun = time.monotonic()
print(time.monotonic() - begun)
print(os.waitpid(-1, os.WNOHANG))
"""
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, check=False)
    assert "ChildProcessError" in done.stderr  # no child is left
    assert float(done.stdout) < 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_engine_outlives_us_from_its_first_moment(number: signal.Signals, tmp_path: Path) -> None:
    """We are killed as soon as its process is there, six times."""
    for attempt in range(6):
        code = f"import time; time.sleep(600)  # {tmp_path}/{attempt}"
        argv = [sys.executable, "-c", MMQ, "foreground", code, str(free_port()), str(tmp_path / "log"), "0"]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 30
            while not (found := _running(code) - {process.pid}) and time.monotonic() < until:
                pass
            process.send_signal(number)
            process.wait(30)
        assert found
        assert gone(*found, *_running(code))


def _running(code: str) -> set[int]:
    """Processes that have `code` among their words."""
    return {int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if code.encode() in _read(p)}


def test_a_second_machine_ends_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it saw the first listen, and not before: machines start in any order."""
    monkeypatch.setattr(supervise, "LOOK", 0.1)
    monkeypatch.setattr(supervise, "GONE", 0.5)
    lines: list[str] = []
    asleep = "import time; print('computing', flush=True); time.sleep(600)"
    launch = small(asleep, serves=False)
    begun: list[int] = []
    alive: list[bool] = []

    def first() -> None:
        time.sleep(1.0)  # longer than a first machine that was there may be silent
        alive.append(Path(f"/proc/{begun[0]}").exists())
        with socket.create_server(("127.0.0.1", launch.port)):
            time.sleep(0.5)

    machine = threading.Thread(target=first)

    def ready(server: Server) -> None:
        begun.append(server.pid)
        machine.start()

    with pytest.raises(RuntimeError, match=rf"the first machine is gone: .*:{launch.port} for 0.5 s"):
        foreground(launch, log_path=tmp_path / "log", on_line=lines.append, on_ready=ready)
    machine.join()
    assert alive == [True]
    assert gone(*begun)
    assert lines == ["computing"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_answers_under_way_are_finished(number: signal.Signals, tmp_path: Path) -> None:
    process, port, engine, child = started("foreground", tmp_path, grace=10)
    assert process.stdout is not None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/slow")
    reply = connection.getresponse()
    assert reply.read(4) == b"one "
    process.send_signal(number)
    assert reply.read() == b"two"
    process.wait(20)
    assert gone(engine, child)
    if number != signal.SIGKILL:
        assert process.returncode == 0
        assert "note ending: requests under way have 10 s" in process.stdout.read()
    process.stdout.close()


def test_a_start_is_ended(tmp_path: Path) -> None:
    """No requests can be under way then, and none are told of."""
    notes: list[str] = []
    loads = small("import time; print('loading', flush=True); time.sleep(600)", grace=30.0)
    interrupt = {"on_line": lambda _: _thread.interrupt_main(), "on_note": notes.append}
    assert foreground(loads, log_path=tmp_path / "log", on_ready=lambda _: None, **interrupt) == 0
    assert notes == ["ending the start; Ctrl-C again cuts it short"]


def test_a_second_signal_cuts_them_off(tmp_path: Path) -> None:
    process, port, engine, child = started("foreground", tmp_path, grace=60)
    assert process.stdout is not None
    os.kill(engine, signal.SIGSTOP)  # it would never end by itself
    process.send_signal(signal.SIGINT)
    assert next(process.stdout).startswith(("key", "note"))
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert gone(engine, child)
    process.stdout.close()
    assert not healthy(f"http://127.0.0.1:{port}", timeout=0.5)


def test_a_signal_that_does_not_wake_us_is_seen() -> None:
    """As one does that comes just before a wait begins, or that another thread takes."""
    with subprocess.Popen(["sleep", "60"]) as process:
        other = threading.Timer(1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        other.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                wait(process)
            assert process.poll() is None
        finally:
            process.kill()


def test_a_dead_engine_is_started_again_so_often(tmp_path: Path) -> None:
    launch = small()
    ready: list[int] = []
    notes: list[str] = []
    begun: list[float] = []

    def on_ready(server: Server) -> None:
        ready.append(server.pid)
        begun.append(time.monotonic())
        die(launch.port)

    log = tmp_path / "engine.log"
    with pytest.raises(RuntimeError, match=r"died: MemoryError: the card is full \(log: .*\); it was started 3 times"):
        foreground(launch, log_path=log, on_line=lambda _: None, on_ready=on_ready, on_note=notes.append, restarts=2)
    assert len(set(ready)) == 3
    assert gone(*ready)
    assert [note.rpartition("; ")[2] for note in notes] == ["start 1 of 2 in 1 s", "start 2 of 2 in 2 s"]
    for number, note in enumerate(notes, 1):  # each life has its log, and its note names it
        kept = tmp_path / f"engine.{number}.log"
        assert f"the engine died: MemoryError: the card is full (log: {kept})" in note
        assert why_it_died(kept, returncode=1) == "MemoryError: the card is full"
    assert begun[1] - begun[0] >= 1
    assert begun[2] - begun[1] >= 2


def test_what_never_ran_is_not_tried_again(tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(RuntimeError, match="died at its start: ValueError: no such model"):
        foreground(
            small("raise ValueError('no such model')"),
            log_path=tmp_path / "log",
            on_line=lambda _: None,
            on_ready=lambda _: None,
            on_note=notes.append,
            restarts=5,
        )
    assert notes == []


def test_last_words_that_are_read_slowly_are_told(tmp_path: Path) -> None:
    says = "print('loading', flush=True); raise RuntimeError('no such card')"
    with pytest.raises(RuntimeError, match="died at its start: RuntimeError: no such card"):
        foreground(small(says), log_path=tmp_path / "log", on_line=lambda _: time.sleep(0.1), on_ready=lambda _: None)


def test_an_engine_runs_on_where_nobody_reads(tmp_path: Path) -> None:
    """The terminal is closed, or `| head` has left: more than a pipe holds is said, and the log has it all."""
    launch = small(f"print('x' * 99 + chr(10), end='', flush=True)\nfor _ in range(5000): print('y' * 99)\n{SERVER}")

    def left(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    def ready(server: Server) -> None:
        die(launch.port)

    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="died: MemoryError"):
        foreground(launch, log_path=log, on_line=left, on_ready=ready, timeout=20)
    assert log.read_text().count("y" * 99) == 5000


def test_a_full_disk_stops_the_log_and_nothing_else(tmp_path: Path) -> None:
    log, notes = tmp_path / "log", []
    log.symlink_to("/dev/full")
    launch = small(f"for _ in range(5000): print('y' * 99)\n{SERVER}")  # more than a pipe holds
    with pytest.raises(RuntimeError, match="the engine died"):
        foreground(
            launch,
            log_path=log,
            on_line=lambda _: None,
            on_ready=lambda _: die(launch.port),
            on_note=notes.append,
            timeout=20,
        )
    assert [note.partition(":")[0] for note in notes] == ["the engine's lines are shown and not kept"]


def test_a_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST", 1000)
    shown: list[str] = []
    lines.begin(tmp_path / "a.log")
    lines.keep((b"%99d\n" % n for n in range(25)), tmp_path / "a.log", shown.append, pytest.fail)
    assert [int(line) for line in shown] == list(range(25))
    assert (tmp_path / "a.old.log").read_text().split() == [str(n) for n in range(10, 20)]
    assert (tmp_path / "a.log").read_text().split() == [str(n) for n in range(20, 25)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_a_sweep_of_temporary_files(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, _, engine, child = started("foreground", tmp_path)
    (door,) = tmp_path.glob("mmq-serve-*")
    shutil.rmtree(door)
    process.send_signal(number)
    assert process.wait(30) == (0 if number == signal.SIGTERM else -number)
    assert gone(engine, child)
    assert process.stdout is not None
    process.stdout.close()


def test_a_folder_that_takes_no_log(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(OSError, match=r"log .* cannot be written: Is a directory; start in another folder"):
        foreground(small(), log_path=tmp_path / "log", on_line=lambda _: None, on_ready=lambda _: None)


def test_an_engine_that_leaves_by_itself_died(tmp_path: Path) -> None:
    """vLLM's server ends with status 0 when its core is gone."""
    leaves = SERVER.replace("os._exit(1)", "os._exit(0)")
    launch = small(leaves)

    with pytest.raises(RuntimeError, match="the engine died: MemoryError"):
        foreground(launch, log_path=tmp_path / "log", on_line=lambda _: None, on_ready=lambda _: die(launch.port))


def test_an_answer_that_breaks_off_is_the_engines_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(launch: Launch, path: str) -> None:
        with running(launch, log_path=tmp_path / "log"):
            die(launch.port, path)
            raise RuntimeError("the server broke off its answer")

    with pytest.raises(RuntimeError, match="the engine died: MemoryError"):
        asked(small(), "/die")
    monkeypatch.setattr("mmq.serve.running.BROKEN_OFF", 0.5)
    with pytest.raises(RuntimeError, match="broke off"):  # where it runs on, it is what it was
        asked(small(), "/health")


def test_a_log_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with its server, and stays where an error names it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running(small()) as server:
        assert "child" in server.log_path.read_text()
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(RuntimeError, match="no such card") as told, running(small("raise ValueError('no such card')")):
        pass
    (log,) = tmp_path.iterdir()
    assert str(log) in str(told.value)


def test_the_engine_has_the_key_and_ps_has_not(tmp_path: Path) -> None:
    launch = small(secrets={"MMQ_API_KEY": Secret("s3cret", "$MMQ_API_KEY")})
    with running(launch, log_path=tmp_path / "log") as server:
        assert "key s3cret" in (tmp_path / "log").read_text()
        assert b"s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert "s3cret" not in repr(launch)


def test_an_engine_has_the_whole_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no shell could have, too; and signals as a program begins with them."""
    monkeypatch.setenv("its.own-name", "here")
    launch = replace(small(), argv=("/bin/cat", "/proc/self/status", "/proc/self/environ"))
    with pytest.raises(RuntimeError), running(launch, log_path=tmp_path / "log"):
        pass
    said = (tmp_path / "log").read_text()
    assert "its.own-name=here" in said
    assert int(said.split("SigIgn:")[1].split()[0], 16) & 1 << (signal.SIGPIPE - 1) == 0


def test_silent_deaths_are_told_as_such(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)\n"
        "INFO:     Shutting down\n"
    )
    assert "went without an error" in why_it_died(log, returncode=0)
