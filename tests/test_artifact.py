"""Artifacts: complete, told apart from damaged ones, the same bytes after an interruption, names engines understand."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmq.export.artifact import MANIFEST, UNFINISHED, check_disk, finish, open_artifact, prepare
from mmq.export.beside import copy_small_files
from mmq.export.config import settle
from mmq.export.make import make
from mmq.export.view import packed_linears, view
from mmq.export.writer import Writer
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.progress import Step
from mmq.recipes.recipe import Recipe, recipe_for

Artifact = Callable[..., Path]


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


def test_everything_an_engine_needs_is_there(artifact: Artifact, pebble: Path) -> None:
    opened = open_artifact(artifact("awq"), verify=True)
    names = {p.name for p in opened.path.iterdir()}
    beside = {p.name for p in pebble.iterdir() if p.suffix not in (".safetensors", ".md")}
    assert beside <= names
    assert {MANIFEST, "model.safetensors.index.json", "chat_template.jinja", "generation_config.json"} <= names
    assert UNFINISHED not in names
    config = json.loads((opened.path / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "awq"
    assert config == json.loads((pebble / "config.json").read_text())


def test_names_are_the_checkpoints_own(artifact: Artifact, pebble: Path) -> None:
    base, packed = open_source(pebble), open_source(artifact("awq"))
    linears = packed_linears(packed.metas, "awq")
    restored = {n for n in packed.metas if n.rpartition(".")[0] not in linears or n.endswith(".bias")}
    assert restored | {f"{n}.weight" for n in linears} == set(base.metas)
    index = json.loads((artifact("awq") / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(packed.metas)
    assert index["metadata"]["total_size"] == sum(m.nbytes for m in packed.metas.values())  # of tensors, not of files


def test_what_stays_16_bit_is_untouched(artifact: Artifact, pebble: Path) -> None:
    """All that lies outside the decoder's layers, to the bit: vision tower, projector, embeddings, the last norm."""
    base, made = open_source(pebble), open_source(artifact("awq"))
    kept = [n for n in base.metas if not n.startswith("model.layers.")]
    assert len(kept) > 20
    assert all(torch.equal(base.get(n), made.get(n)) for n in kept)


def test_the_manifest_says_what_was_done(artifact: Artifact) -> None:
    manifest = open_artifact(artifact("awq")).manifest
    assert manifest["base"]["model"] == "pebble"
    assert manifest["calibration"]["media"] > 0
    assert manifest["calibration"]["text"] > 0
    assert len(manifest["quantized"]) == 7 * len(manifest["layers"])
    assert all(0 < e < 0.2 for layer in manifest["layers"] for e in layer["errors"].values())
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # PyPI's says no CUDA version


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "mmq.json is missing"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja: missing"),
        (lambda f: cut(f / "model-00002-of-00006.safetensors"), "model-00002-of-00006.safetensors: .* bytes"),
        (lambda f: flip(f / "model-00003-of-00006.safetensors"), "model-00003-of-00006.safetensors: changed"),
        (lambda f: (f / MANIFEST).write_text("{"), "mmq.json: damaged"),
    ],
)
def test_damage_is_named(artifact: Artifact, tmp_path: Path, damage: Callable, message: str) -> None:
    folder = copy_of(artifact("awq"), tmp_path)
    damage(folder)
    with pytest.raises(OSError, match=message):
        open_artifact(folder, verify=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("method", ["awq", "gptq", "bnb"])
def test_an_interrupted_run_is_taken_up(artifact: Artifact, tmp_path: Path, method: str) -> None:
    """Ctrl-C after the second layer; the same call again gives the very bytes of an uninterrupted run."""
    recipe = Recipe(**{**vars(recipe_for("pebble")), "method": method, "samples": 48})
    out = tmp_path / "out"
    heard: list[Step] = []

    def interrupt(step: Step) -> None:
        if step.name == "layer" and step.done == 2:
            raise KeyboardInterrupt

    arguments = {"samples": [] if method == "bnb" else drawn(48), "calibration": "drawn"}
    with pytest.raises(KeyboardInterrupt):
        make(recipe, fetch("pebble"), out, tell=interrupt, **arguments)
    with pytest.raises(OSError, match="unfinished run"):
        open_artifact(out)
    other = Recipe(**{**vars(recipe), "group_size": 64})
    with pytest.raises(ValueError, match="unfinished run with other options"):
        make(other, fetch("pebble"), out, **arguments)
    again = make(recipe, fetch("pebble"), out, tell=heard.append, **arguments)
    if method != "bnb":
        assert [s.note for s in heard if s.name == "layer"][:2] == ["already done"] * 2
    assert again.digest == open_artifact(artifact(method)).digest


def test_a_folder_with_other_things_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty"):
            prepare(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_half_a_file_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    """A run killed while it wrote its manifest, taken up again."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"{MANIFEST}.part").write_text("{")
    base = {"model": "pebble", "hub": "embedded", "revision": None, "weight_bytes": 1}
    told = {"name": "out", "method": "awq", "format": "awq", "recipe": {"name": "out", "keep": []}, "base": base}
    told |= {"group_size": 128, "quantized": [], "layers": [], "versions": {}}
    assert set(finish(tmp_path, {}, told).manifest["files"]) == {"config.json"}
    open_artifact(tmp_path, verify=True)


def test_hidden_files_of_the_base_are_not_copied(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    for name in (".env", ".gitattributes", "chat_template.jinja", "modeling_x.py", "model.safetensors"):
        (base / name).write_text("x")
    assert copy_small_files(base, out) == []
    assert {p.name for p in out.iterdir()} == {"chat_template.jinja", "modeling_x.py"}
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (told,) = copy_small_files(base, out)
    assert "the chat templates tool_use of additional_chat_templates are not in it" in told


def test_overwrite_replaces_an_artifact(artifact: Artifact, tmp_path: Path) -> None:
    folder = copy_of(artifact("awq"), tmp_path)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(folder, {})
    assert prepare(folder, {"a": 1}, overwrite=True) is False
    assert [p.name for p in folder.iterdir()] == [UNFINISHED]


def test_a_disk_that_is_full_in_the_middle_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk, with another errno
    try:
        with Writer() as files:
            files.save(tmp_path / "layer.safetensors", {"a": torch.zeros(10000)}, {})
            with pytest.raises(OSError, match=r"layer.safetensors cannot be written: File too large"):
                files.hashes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"too small: 1048576\.00 GiB needed, .* GiB free"):
        check_disk(tmp_path / "not" / "there", 2**50)


@pytest.mark.parametrize(
    ("method", "symmetric", "format", "expected"),
    [
        ("awq", None, None, (False, "awq")),
        ("awq", None, "gptq", (True, "gptq")),
        ("awq", None, "compressed-tensors", (False, "compressed-tensors")),
        ("gptq", None, None, (True, "gptq")),
        ("gptq", None, "awq", (False, "awq")),
        ("gptq", None, "compressed-tensors", (True, "compressed-tensors")),
        ("bnb", None, None, (False, "bnb")),
    ],
)
def test_what_is_left_open_is_settled(method: str, symmetric: bool | None, format: str | None, expected: tuple) -> None:
    assert settle(method, symmetric, format) == expected


@pytest.mark.parametrize(("method", "symmetric", "format"), [("awq", False, "gptq"), ("bnb", None, "awq")])
def test_lossy_formats_are_refused(method: str, symmetric: bool | None, format: str) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        settle(method, symmetric, format)


def test_formats_hold_the_same_weights(artifact: Artifact) -> None:
    """AWQ and compressed-tensors are two spellings of one result."""
    one, two = view(artifact("awq")), view(artifact("awq", "compressed-tensors"))
    assert set(one.metas) == set(two.metas)
    assert all(torch.equal(one.get(n), two.get(n)) for n in one.metas)


def test_skip_lists_hold_in_every_engine(artifact: Artifact, pebble: Path) -> None:
    """Each engine's own rule on the names it will ask about: nothing int4 is skipped, nothing 16-bit is forgotten."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = json.loads((artifact("awq") / "config.json").read_text())["quantization_config"]
    entries = config["modules_to_not_convert"]
    linears = packed_linears(open_source(artifact("awq")).metas, "awq")
    base = open_source(pebble)
    still = {
        n.removesuffix(".weight")
        for n, m in base.metas.items()
        if n.endswith(".weight") and len(m.shape) == 2 and "embed" not in n
    } - linears

    def spellings(name: str) -> tuple[str, str]:
        """The checkpoint's name, and the one transformers 5 and vLLM know the module by."""
        if name.startswith("visual."):
            return name, f"model.{name}"
        return name, re.sub(r"^model\.", "model.language_model.", name)

    rules = {
        "substring (vLLM, SGLang)": lambda name: any(e in name for e in entries),
        "module boundary (transformers)": lambda name: not should_convert_module(name, entries),
        "contained in an entry (LMDeploy)": lambda name: any(name in e for e in entries),
    }
    assert len(still) > 10
    for rule, skips in rules.items():
        for name in still:
            assert all(skips(s) for s in spellings(name)), f"{rule} would quantize {name}"
        for name in linears:
            assert not any(skips(s) for s in spellings(name)), f"{rule} would leave {name} in 16 bit"
