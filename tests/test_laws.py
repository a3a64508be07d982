"""The laws of the house, held by reading the source: who imports whom, who may be heavy, who may print."""

from __future__ import annotations

import ast
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"  # scripts for other packages' environments: shipped as files, never imported
ROOMS = ("recipes", "quantize", "export", "serve", "bench", "commands")  # a room imports itself and the rooms before it
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "vllm", "modelscope"}
TRAINER = "recipes.pebble.train"
# the PyTorch engine itself, which serve starts as a program of its own, and its parts
PROGRAM = tuple(f"serve.pytorch_{part}" for part in ("engine", "requests", "answer", "prompt", "lora", "own"))


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is dotted from the package root ("" for mmq itself), or from the top if `outside`."""

    target: str
    outside: bool
    line: int
    at_start: bool  # runs when the module is imported: not within a function, not under TYPE_CHECKING


def modules() -> dict[str, Path]:
    """Every module of the rooms: dotted name -> file, packages without their `__init__`. Not the peers' scripts."""
    found = {}
    for room in ROOMS:
        for path in sorted(set((ROOT / room).rglob("*.py")) - set(PEERS.glob("*.py"))):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
FILES = MODULES | {"__main__": ROOT / "__main__.py"}


@cache
def tree(name: str) -> ast.Module:
    """A module's syntax tree, parsed once."""
    # Python 3.11 raises SystemError ("recursion depth mismatch") when a garbage collection in the middle of a parse
    # runs a finalizer that parses too, and the tests before this one leave such: so none is collected meanwhile.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(FILES[name].read_text(encoding="utf-8"), filename=str(FILES[name]))
    finally:
        if collecting:
            gc.enable()


@cache
def imports(name: str) -> tuple[Import, ...]:
    """What a module of the rooms imports, wherever the statement stands."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: list[Import] = []

    def visit(node: ast.AST, at_start: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, True, node.lineno, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(Import(node.module or "", True, node.lineno, at_start))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level]
            assert node.level <= len(package) + 1, f"{path}:{node.lineno} reaches out of the package"
            target = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                inner = ".".join([*target, alias.name])
                found.append(Import(inner if inner in MODULES else ".".join(target), False, node.lineno, at_start))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_start)
        else:
            inside = at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inside)

    visit(tree(name), True)
    return tuple(found)


def place(name: str, found: Import) -> str:
    return f"{FILES[name].relative_to(ROOT)}:{found.line} imports {found.target or 'mmq'}"


def test_every_room_is_there_and_read():
    assert {name.split(".")[0] for name in MODULES} == set(ROOMS)
    assert len(MODULES) > 20
    assert sum(len(imports(name)) for name in MODULES) > 100


def test_a_room_imports_only_the_rooms_before_it():
    wrong = []
    for name in MODULES:
        allowed = ROOMS[: ROOMS.index(name.split(".")[0]) + 1]
        wrong += [
            place(name, found)
            for found in imports(name)
            if not found.outside and found.target and found.target.split(".")[0] not in allowed
        ]
    assert not wrong


def test_inside_the_package_imports_are_relative():
    assert not [place(n, f) for n in MODULES for f in imports(n) if f.outside and f.target.split(".")[0] == "mmq"]


def test_no_room_imports_the_command_line():
    assert not [place(n, f) for n in MODULES for f in imports(n) if not f.outside and f.target == "__main__"]


def test_serve_knows_no_torch_and_bench_no_engine():
    strangers = {"serve": {"torch", "transformers", "vllm"}, "bench": {"vllm", "lmdeploy"}}
    assert not [
        place(name, found)
        for name in MODULES
        for found in imports(name)
        if name not in PROGRAM and found.outside and found.target.split(".")[0] in strangers.get(name.split(".")[0], ())
    ]
    others = [name for name in FILES if name not in PROGRAM]
    assert not [place(name, found) for name in others for found in imports(name) if found.target in PROGRAM]


def test_recipes_and_serve_start_without_torch():
    """The trainer of the embedded model may start with it: modules that nothing but the trainer imports."""
    light = {name for name in MODULES if name.split(".")[0] in ("recipes", "serve")} - set(PROGRAM)
    heavy = {n: f for n in light for f in imports(n) if f.outside and f.at_start and top(f) in HEAVY}
    while more := {n: f for n in light - heavy.keys() for f in imports(n) if f.at_start and f.target in heavy}:
        heavy |= more
    assert [place(name, found) for name, found in sorted(heavy.items()) if name not in trainers_own()] == []


def trainers_own() -> set[str]:
    """The trainer and what it imports, less what anything else imports too, at its start or later."""
    own, todo = set(), [TRAINER]
    while todo:
        name = todo.pop()
        if name in MODULES and name not in own:
            own.add(name)
            todo += [found.target for found in imports(name) if not found.outside]
    while shared := {f.target for n in FILES if n not in own for f in imports(n) if f.target in own}:
        own -= shared
    return own


def top(found: Import) -> str:
    return found.target.split(".")[0]


def test_only_the_command_line_prints():
    """A script (a module that can be run) may; a library module leaves the terminal to `commands` and `__main__`."""
    for name in (n for n in MODULES if n.split(".")[0] != "commands"):
        calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
        prints = [c.lineno for c in calls if ast.unparse(c.func) in ("print", "click.echo", "click.secho")]
        runnable = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree(name).body)
        assert runnable or not prints, f"{name} prints at lines {prints}"


def test_the_root_has_exactly_two_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_package_is_shipped():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    folders = {name.rpartition(".")[0] for name in MODULES if MODULES[name].name != "__init__.py"}
    assert folders <= packages, "a folder with modules has no __init__.py"
    assert set(listed) == {"mmq", *(f"mmq.{name}" for name in packages)}


def test_the_peers_scripts_import_nothing_of_ours():
    """They run where mmq is not installed; `peers.job` and the like stand beside them."""
    scripts = sorted(PEERS.glob("*.py"))
    assert scripts
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path.name}:{node.lineno} imports from the package around it"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "mmq" not in {name.split(".")[0] for name in names}, f"{path.name} imports mmq: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["serve", "--help"],
        ["recipes"],
        ["plan", str(ROOT / "recipes" / "pebble" / "model"), "--card", "4090"],
    ],
)
def test_a_light_command_imports_nothing_heavy(arguments):
    code = """
import json, sys
from mmq.__main__ import main
sys.argv = ["mmq", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert not HEAVY & set(loaded)


def test_help_comes_in_less_than_three_tenths_of_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmq", "--help"], capture_output=True, timeout=60, check=True)
        return time.perf_counter() - start

    # The best of several: what the code costs, and not what else the machine was doing.
    tries = (seconds() for _ in range(40))
    assert any(taken < 0.3 for taken in tries)
