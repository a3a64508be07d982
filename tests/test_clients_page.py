"""The recipes of docs/clients.md, run as they stand: shell by shell, Python in one namespace, against the real vLLM."""

from __future__ import annotations

import contextlib
import doctest
import functools
import http.server
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmq.serve.running import Server

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "clients.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def recipes(language: str) -> list[tuple[str, str]]:
    """(code, what it prints) of the page's blocks in this language, in order."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    return [
        (code, after[1])
        for (kind, code), after in zip(blocks, [*blocks[1:], ("", "")], strict=True)
        if kind == language
    ]


def told(text: str) -> str:
    """Without what a terminal's width decides: one space between words, none at the ends of lines."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines()) + "\n"


def held(got: str, wanted: str, code: str) -> None:
    checker = doctest.OutputChecker()
    assert checker.check_output(told(wanted), told(got), doctest.ELLIPSIS), f"{code}\n-- printed\n{got}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's pictures, and a `mmq` for its shell."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "docs" / "media", folder / "docs" / "media")
    for name, line in (("mmq", '-m mmq "$@"'), ("python", '"$@"')):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {line}\n')
        program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def web(place: Path) -> Iterator[str]:
    """An address that has the folder's files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=place)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def here(code: str, served: Server, web: str) -> str:
    """The recipe for the server that runs here."""
    code = code.replace("http://127.0.0.1:8000", served.url).replace("http://127.0.0.1:8001", web)
    return re.sub(r'(?<=")pebble(?=")|(?<=\')pebble(?=\')', served.name, code)


def test_every_block_has_what_it_prints() -> None:
    kinds = [kind for kind, _ in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    assert kinds[1::2] == ["text"] * len(kinds[1::2])
    assert {kinds.count(kind) for kind in ("sh", "python")} == {7}


def test_commands_for_who_comes_from_elsewhere_exist() -> None:
    from mmq.__main__ import cli

    text = (PAGE.parent / "from-elsewhere.md").read_text(encoding="utf-8")
    commands = [shlex.split(code) for code in re.findall(r"`(mmq [^`]+)`", text)]
    assert len(commands) > 15
    for _, name, *words in commands:
        with cli.commands[name].make_context(name, words):  # parses, and runs nothing
            pass


@needs_vllm
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("number", range(7))
def test_shell(served: Server, web: str, place: Path, number: int) -> None:
    code, wanted = recipes("sh")[number]
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "NO_PROXY": "127.0.0.1", "COLUMNS": "100"}
    script = here(re.sub(r"^(curl .*?')$", r"\1; echo", code, flags=re.MULTILINE | re.DOTALL), served, web)
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=place,
        env=env,
        capture_output=True,
        timeout=120,
        check=False,
    )
    got = done.stdout.decode()
    assert done.returncode == 0, got + done.stderr.decode()
    held(got, here(wanted, served, web), code)


@needs_vllm
def test_python(served: Server, web: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names: dict[str, object] = {}
    for code, wanted in recipes("python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(here(code, served, web), str(PAGE), "exec"), names)
        held(out.getvalue(), here(wanted, served, web), code)


@needs_vllm
def test_the_readme_s_python(served: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the server that runs here, with fewer questions."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copy(place / "docs" / "media" / "square.png", "x.jpg")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From Python\n")[2]
    code = "\n".join(re.findall(r"^(?:    (.*))?$", section.partition("\n### ")[0], re.MULTILINE))
    assert '"out-awq"' in code
    assert "* 100" in code
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.replace('"out-awq"', repr(served.url)).replace("* 100", "* 3"), "README.md", "exec"), {})
    first, again = out.getvalue().splitlines()
    answer, _, figures = first.partition(" {")
    assert answer == again
    assert "正方形" in answer
    assert "'num_samples': 3" in figures
