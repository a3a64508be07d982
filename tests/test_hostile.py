"""Models, artifacts, recipes, datasets, adapters and templates that wish somebody ill: each is refused in a clear line
or does nothing, through the commands that a user types."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from test_cli import Run

from mmq.recipes.sizes import count_of

LIGHT = (["plan", "--vram", "24GiB"], ["serve", "--print"], ["serve", "--print", "--engine", "pytorch"])
ENGINES = ["check", "--engines", "all"]
QUANTIZE = ["quantize", "--method", "rtn", "--samples", "1"]
EVERY = (*LIGHT, ENGINES, QUANTIZE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model in a folder that a test may change."""
    return hostile.model(tmp_path / "model")


def refused(mmq: Run, message: str, *words: object, within: float = 40) -> None:
    """The command ends with one line that has `message`, and in time."""
    begun = time.monotonic()
    code, _, err = mmq(*words)
    lines = [line for line in err.splitlines() if line.startswith("mmq: ")]
    assert code == 2, (words, err)
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert message in lines[0]
    assert "\x1b" not in lines[0].replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert time.monotonic() - begun < within


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer for everybody": ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "no width": ({"text_config__hidden_size": 0}, "hidden_size is 0; it must be a whole number from 1"),
    "less than no heads": ({"text_config__num_attention_heads": -4}, "num_attention_heads is -4"),
    "a number in words": ({"text_config__num_hidden_layers": "four"}, "num_hidden_layers is 'four'"),
    "a number without end": ({"text_config__vocab_size": 10**200}, "vocab_size is a huge number"),
    "no number": ({"text_config__max_position_embeddings": float("nan")}, "max_position_embeddings is nan"),
    "true": ({"text_config__num_hidden_layers": True}, "num_hidden_layers is True"),
    "patches of nothing": ({"vision_config__patch_size": 0}, "patch_size is 0"),
    "patches without end": ({"vision_config__image_size": 10**6}, "image_size is 1000000"),
    "far inside": ({"a__b__c__d__num_layers": 10**9}, "num_layers is 1000000000"),
    "a text model in words": ({"text_config": "x"}, "text_config is 'x'; it must be an object"),
    "a tower in a list": ({"vision_config": [1]}, "vision_config is [1]; it must be an object"),
    "two types": ({"model_type": ["qwen2_vl"]}, "model_type is ['qwen2_vl']; it must be a name"),
    "classes by number": ({"architectures": [1]}, "architectures is [1]; it must be a list of names"),
    "code in a list": ({"auto_map": ["x"]}, "auto_map is ['x']; it must be an object"),
    "packed in words": ({"quantization_config": "awq"}, "quantization_config is 'awq'; it must be an object"),
    "a skip list of one number": (
        {"quantization_config": {"quant_method": "awq", "modules_to_not_convert": 5}},
        "modules_to_not_convert is 5; it must be a list of names",
    ),
    "groups of numbers": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}},
        "config_groups holds [1]; it must be objects",
    ),
    "a group of nothing": (
        {"quantization_config": {"quant_method": "awq", "config_groups": {"": None}}},
        "config_groups holds None; it must be objects",
    ),
    "bits in words": ({"quantization_config": {"quant_method": "gptq", "bits": "x"}}, "bits is 'x'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_no_model_is_refused(mmq: Run, model: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    hostile.config(model, **changes)
    for words in EVERY:
        refused(mmq, message, *words, model)


TEXTS = {
    "not JSON": (b"{", "is not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte"),
    "a list": (b"[]", "must be a JSON object, and is list"),
    "nested": (b'{"a": ' + hostile.deep() + b"}", "nested too deep"),
    "a long number": (b'{"a": ' + b"9" * 5_000 + b"}", "is not valid JSON (Exceeds the limit"),
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_settings_file_that_is_none_is_refused(mmq: Run, model: Path, file: str, name: str) -> None:
    data, message = TEXTS[name]
    hostile.write(model, file, data)
    for words in EVERY:
        refused(mmq, message, *words, model)


def test_a_settings_file_of_gigabytes_is_not_read(mmq: Run, model: Path) -> None:
    hostile.write(model, "config.json", "{")
    os.truncate(model / "config.json", 1 << 40)  # takes no room on the disk
    for words in EVERY:
        refused(mmq, "1099511627776 bytes, where at most", *words, model)


@pytest.mark.parametrize("size", [10**18, "x", -1])
def test_pictures_of_no_size_are_refused(mmq: Run, model: Path, size: object) -> None:
    """The planner looks for a picture's shape among all numbers up to its size."""
    hostile.write(model, "preprocessor_config.json", json.dumps({"size": {"longest_edge": size}}))
    for words in EVERY:
        refused(mmq, "longest_edge is", *words, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.safetensors", "only files of the same folder can be named"),
        ("sub/../../model.safetensors", "only files of the same folder can be named"),
        ("/etc/passwd", "only files of the same folder can be named"),
        ("..\\model.safetensors", "only files of the same folder can be named"),
        ("C:model.safetensors", "only files of the same folder can be named"),
        ("model\0.safetensors", "only files of the same folder can be named"),
        ("model\u202e.safetensors", "only files of the same folder can be named"),
        ("\x1b[2Jmodel.safetensors", "only files of the same folder can be named"),
        ("\ud800.safetensors", "only files of the same folder can be named"),
        ("m" * 300, "only files of the same folder can be named"),
        (".", "only files of the same folder can be named"),
        ("", "only files of the same folder can be named"),
        ("\uff0e\uff0e\uff0fmodel.safetensors", "lacks"),  # full-width dots and slash: a name like any other
        ("none.safetensors", "lacks none.safetensors"),
        (5, "names a file that is no text"),
        (["model.safetensors"], "names a file that is no text"),
        (None, "names a file that is no text"),
    ],
)
def test_an_index_names_no_file_elsewhere(mmq: Run, model: Path, name: object, message: str) -> None:
    shutil.copyfile(model / "model.safetensors", model.parent / "model.safetensors")
    hostile.index(model, name)
    for words in EVERY:
        refused(mmq, message, *words, model)


def test_an_index_names_no_file_twice_in_other_letters(mmq: Run, model: Path) -> None:
    hostile.index(model, "model.safetensors", "Model.safetensors")
    refused(mmq, "which many systems take for one file", *QUANTIZE, model)


# What a hostile artifact's manifest may say. The artifact is otherwise whole.
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a file above": (
        lambda m: {"files": {**m["files"], "../loot.txt": {"sha256": "0" * 64, "size": 4}}},
        "'../loot.txt'",
    ),
    "a file by its root": (lambda m: {"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 4}}}, "'/etc/passwd'"),
    "another system's": (lambda m: {"files": {"..\\x": {"sha256": "0" * 64, "size": 4}}}, "same folder"),
    "a name with an end": (lambda m: {"files": {"a\0b": {"sha256": "0" * 64, "size": 4}}}, "same folder"),
    "a name that turns": (lambda m: {"files": {"a\u202eb": {"sha256": "0" * 64, "size": 4}}}, "same folder"),
    "files in a list": (lambda m: {"files": ["config.json"]}, "files is missing or of another kind"),
    "a file of no size": (
        lambda m: {"files": {"config.json": {"sha256": "0" * 64}}},
        "config.json has no size and sha256",
    ),
    "a hash in words": (lambda m: {"files": {"config.json": {"sha256": "x", "size": 1}}}, "has no size and sha256"),
    "another's hash": (
        lambda m: {"files": {**m["files"], "config.json": {**m["files"]["config.json"], "sha256": "0" * 64}}},
        "its hash differs",
    ),
    "no recipe": (lambda m: {"recipe": "pebble"}, "recipe is missing or of another kind"),
    "a base in words": (lambda m: {"base": "pebble"}, "base is missing or of another kind"),
    "a base by number": (lambda m: {"base": {**m["base"], "model": 5}}, "base.model is missing or of another kind"),
    "a format by number": (lambda m: {"format": 5}, "format is missing or of another kind"),
    "another schema": (lambda m: {"schema": [1]}, "schema [1]"),
    "no linears": (lambda m: {"quantized": None}, "quantized is missing or of another kind"),
    "linears by number": (lambda m: {"quantized": [1]}, "quantized is missing or of another kind"),
    "layers in words": (lambda m: {"layers": "x"}, "layers is missing or of another kind"),
    "a layer of errors in words": (lambda m: {"layers": [{"index": 0, "errors": "x"}]}, "layers is missing or of"),
    "versions by number": (lambda m: {"versions": 5}, "versions is missing or of another kind"),
    "notes by number": (lambda m: {"notes": [5]}, "notes is missing or of another kind"),
    "a calibration by number": (lambda m: {"calibration": 5}, "calibration is missing or of another kind"),
    "a head in words": (lambda m: {"head": "lm_head"}, "head is missing or of another kind"),
    "paces of nothing": (lambda m: {"paces": None}, "paces is missing or of another kind"),
    "a base of no bytes": (lambda m: {"base": {**m["base"], "weight_bytes": "x"}}, "base.weight_bytes is missing or"),
    "a base of no hub": (lambda m: {"base": {"model": "a/b", "revision": None}}, "base.hub is missing or"),
    "what is kept by number": (lambda m: {"recipe": {**m["recipe"], "keep": [1]}}, "recipe.keep is missing or"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_names_only_its_own(mmq: Run, artifact: Callable[..., Path], tmp_path: Path, name: str) -> None:
    change, message = MANIFESTS[name]
    (tmp_path / "loot.txt").write_text("loot")
    made = artifact("awq")
    manifest = json.loads((made / "mmq.json").read_text(encoding="utf-8"))
    out = hostile.artifact(made, tmp_path / "out", **change(manifest))
    refused(mmq, message, "check", out, "--device", "cpu")
    refused(mmq, message, "convert", out, "--format", "compressed-tensors", "-o", tmp_path / "other")
    refused(mmq, message, "publish", out, "hf:me/it", "--dry-run", "--no-gate", "--no-reload")
    if "hash" not in name:  # a start of an engine compares sizes alone
        refused(mmq, message, "serve", "--print", out)
        refused(mmq, message, "plan", "--vram", "24GiB", out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "loot.txt"}


@pytest.mark.parametrize(
    "text", [b"[]", b'{"schema": 1}', hostile.deep(), b'{"files": {}, "files": {}, "schema": 1}', b"\xff"]
)
def test_a_manifest_that_is_none_is_refused(
    mmq: Run, artifact: Callable[..., Path], tmp_path: Path, text: bytes
) -> None:
    out = hostile.artifact(artifact("awq"), tmp_path / "out")
    hostile.write(out, "mmq.json", text)
    for words in (["check"], ["serve", "--print"], ["plan", "--vram", "24GiB"]):
        refused(mmq, "mmq.json: damaged", *words, out)


def test_links_that_lead_out_are_refused(mmq: Run, model: Path, tmp_path: Path) -> None:
    """The small files of a model are copied into what is made of it, and that is published."""
    (tmp_path / "secret").write_text("a key")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    for words in EVERY:
        refused(mmq, "outside the folder; if that is meant, put a copy of the file in its place", *words, model)


def test_links_into_a_hubs_cache_and_within_the_folder_are_followed(mmq: Run, tmp_path: Path) -> None:
    """huggingface_hub keeps a snapshot as links into blobs/ beside it."""
    repo = tmp_path / "models--me--it"
    (repo / "blobs").mkdir(parents=True)
    folder = hostile.model(repo / "snapshots" / ("0" * 40))
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.move(path.resolve() if not path.is_symlink() else path, blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    (folder / "alias.json").symlink_to("config.json")
    for words in EVERY:
        code, _, err = mmq(*words, folder)
        assert code == 0, err


def test_a_folder_by_a_link_is_a_folder(mmq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(model, target_is_directory=True)
    assert mmq("serve", "--print", tmp_path / "linked")[0] == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer_config.json", "notes.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "circle", "nowhere"])
def test_pipes_devices_and_circles_hang_nothing(mmq: Run, model: Path, file: str, kind: str) -> None:
    path = model / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "circle": path.name, "nowhere": "gone"}[kind])
    for words in EVERY[: None if file in ("config.json", "model.safetensors") or kind in ("pipe", "device") else 2]:
        code, _, err = mmq(*words, model)
        needed = file in ("config.json", "model.safetensors") or kind in ("pipe", "device")
        assert code == (2 if needed else 0), err
        assert "Traceback" not in err


SOUND = json.dumps({"a": hostile.entry()}).encode()
HEADERS: dict[str, bytes] = {
    "terabytes": hostile.tensors(b"{}", length=1 << 40),
    "the largest number": hostile.tensors(b"{}", length=(1 << 64) - 1),
    "no header": hostile.tensors(b"", length=0),
    "empty": b"",
    "seven bytes": b"1234567",
    "a list": hostile.tensors([]),
    "nested": hostile.tensors(b'{"a": ' + hostile.deep() + b"}"),
    "nested by little": hostile.tensors(SOUND[:-2] + b', "x": ' + hostile.deep(200) + b"}}", bytes(8)),
    "places that overlap": hostile.tensors({"a": hostile.entry(), "b": hostile.entry()}, bytes(8)),
    "places turned round": hostile.tensors({"a": hostile.entry(places=(8, 0))}, bytes(8)),
    "a hole": hostile.tensors({"a": hostile.entry((1,), (4, 8))}, bytes(8)),
    "places of terabytes": hostile.tensors({"a": hostile.entry(places=(0, 1 << 50))}, bytes(8)),
    "places below nothing": hostile.tensors({"a": hostile.entry(places=(-8, 0))}),
    "three places": hostile.tensors({"a": hostile.entry(places=(0, 8, 9))}, bytes(8)),
    "places in words": hostile.tensors({"a": hostile.entry(places=("0", "8"))}, bytes(8)),
    "places of nothing": hostile.tensors({"a": hostile.entry(places=())}, bytes(8)),
    "a shape below nothing": hostile.tensors({"a": hostile.entry((-2,))}, bytes(8)),
    "a shape of parts": hostile.tensors({"a": hostile.entry((2.0,))}, bytes(8)),
    "a shape of other bytes": hostile.tensors({"a": hostile.entry((3,))}, bytes(8)),
    "a shape past 64 bits": hostile.tensors({"a": hostile.entry((1 << 63, 1 << 63, 0), (0, 0))}),
    "a shape past all bits": hostile.tensors({"a": hostile.entry((10**400, 0), (0, 0))}),
    "a dtype of nobody": hostile.tensors({"a": hostile.entry(dtype="F31")}, bytes(8)),
    "a dtype by number": hostile.tensors({"a": hostile.entry(dtype=4)}, bytes(8)),
    "a key twice": hostile.tensors(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "notes of numbers": hostile.tensors({"__metadata__": {"a": 1}, "a": hostile.entry()}, bytes(8)),
    "half a pair": hostile.tensors(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "no number": hostile.tensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":NaN}}', bytes(8)),
    "a mark before": hostile.tensors(b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "more than it says": hostile.tensors({"a": hostile.entry()}, bytes(9)),
    "less than it says": hostile.tensors({"a": hostile.entry()}, bytes(7)),
    "HTML": b"<!DOCTYPE html><html>Not Found</html>",
    "zip": b"PK\x03\x04" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_weights_that_are_none_are_refused(mmq: Run, model: Path, name: str) -> None:
    hostile.write(model, "model.safetensors", HEADERS[name])
    for words in EVERY:
        refused(mmq, "get the file again", *words, model)


def test_a_header_of_a_hundred_megabytes_is_not_read(mmq: Run, model: Path) -> None:
    hostile.write(model, "model.safetensors", struct.pack("<Q", 90 << 20))
    os.truncate(model / "model.safetensors", 1 << 40)
    for words in EVERY:
        refused(mmq, "has a header of 94371840 bytes, where at most 33554432 are read", *words, model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_never_loaded(mmq: Run, model: Path, name: str, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    hostile.write(model, name, hostile.pickled(tmp_path / "RAN"))
    message = "is no whole safetensors file" if name.endswith("safetensors") else "unpickling runs code"
    for words in EVERY:
        refused(mmq, message, *words, model)
    assert not (tmp_path / "RAN").exists()


def test_what_lies_beside_the_weights_does_nothing(mmq: Run, model: Path, tmp_path: Path) -> None:
    """A pickle, code that config files name, classes that are none: of a model class that transformers has, all are
    left where they are, and none of it is in what is made but the Python files, which are text there."""
    ran = tmp_path / "RAN"
    hostile.config(model, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    words = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    words |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoProcessor": "evil.Evil"}}
    hostile.write(model, "tokenizer_config.json", json.dumps(words))
    hostile.write(model, "evil.py", hostile.python_that_makes(ran))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        hostile.write(model, name, hostile.pickled(ran))
    for command in (["plan", "--vram", "24GiB"], ["serve", "--print"], ENGINES):
        assert mmq(*command, model)[0] in (0, 1)
    code, _, err = mmq(*QUANTIZE, model, "-o", tmp_path / "out")
    assert code == 0, err
    assert not ran.exists()
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_code_of_an_unknown_class_does_not_run_unasked(mmq: Run, model: Path, tmp_path: Path) -> None:
    hostile.config(model, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    hostile.write(model, "evil.py", hostile.python_that_makes(tmp_path / "RAN"))
    refused(mmq, "allow it with --trust-remote-code", *QUANTIZE, model)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("kind", ["os.system", "AutoModelForCausalLM", "pipeline", "__doc__", "Evil"])
def test_settings_name_no_class_but_a_tokenizers(mmq: Run, model: Path, tmp_path: Path, kind: str) -> None:
    said = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))
    said["image_processor"]["image_processor_type"] = kind
    hostile.write(model, "processor_config.json", json.dumps({**said, "processor_class": kind}))
    hostile.write(model, "tokenizer_config.json", json.dumps({"tokenizer_class": kind}))
    code, _, err = mmq(*QUANTIZE, model, "-o", tmp_path / "out")
    assert code in (0, 2), err
    assert "Traceback" not in err


def test_a_recipe_lets_no_code_run(mmq: Run, model: Path, tmp_path: Path) -> None:
    hostile.config(model, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    hostile.write(model, "evil.py", hostile.python_that_makes(tmp_path / "RAN"))
    (tmp_path / "mine.yaml").write_text(f"name: mine\nmodel: {model}\ntrust_remote_code: true\n", encoding="utf-8")
    refused(mmq, "which a file cannot allow", *QUANTIZE, "mine.yaml")
    code, out, _ = mmq("run", "mine.yaml", "--list")
    assert code == 0
    assert "cannot allow" in " ".join(out.split())
    assert not (tmp_path / "RAN").exists()


def test_a_manifest_lets_no_code_run(mmq: Run, artifact: Callable[..., Path], tmp_path: Path) -> None:
    made = artifact("awq")
    manifest = json.loads((made / "mmq.json").read_text(encoding="utf-8"))
    out = hostile.artifact(made, tmp_path / "out", recipe={**manifest["recipe"], "trust_remote_code": True})
    refused(mmq, "then say --trust-remote-code", "publish", out, "hf:me/it", "--dry-run", "--no-gate")
    _, printed, _ = mmq("serve", "--print", out)
    assert "--trust-remote-code" not in printed


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "laughs": (
        "name: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"k{i}: &k{i} [*a, *a, *a]\n" for i in range(9)),
        "aliases (& and *) are not read",
    ),
    "an alias of itself": ("name: &a [*a]\nmodel: pebble\n", "aliases (& and *) are not read"),
    "a merge of an alias": ("x: &x {name: a}\n<<: *x\n", "aliases (& and *) are not read"),
    "a command": ("name: !!python/object/apply:os.system ['touch RAN']\nmodel: pebble\n", "tags"),
    "a module": ("name: !!python/module:os\nmodel: pebble\n", "tags"),
    "a tag of its own": ("name: !evil x\nmodel: pebble\n", "tags (!evil) are not read"),
    "bytes": ("name: !!binary AAAA\nmodel: pebble\n", "tags"),
    "a key twice": ("name: a\nmodel: pebble\nname: b\n", "the key name stands twice"),
    "a limit twice": ("name: a\nmodel: pebble\nlimits: {mean_kl: 0.1, mean_kl: 99}\n", "the key mean_kl stands twice"),
    "a list for a key": ("? [a]\n: b\n", "a key is no text"),
    "nested": ("name: " + "[" * 5_000 + "]" * 5_000, "nested deeper than"),
    "nested by lines": ("\n".join("  " * i + "a:" for i in range(200)), "nested deeper than"),
    "megabytes": ("# " + "x" * 2_000_000, "2000002 bytes, where at most"),
    "letters": ("name: a\nmodel: pebble\n# " + "x" * 400_000, "characters; at most"),
    "a date that is none": ("name: 2001-99-99\nmodel: pebble\n", "not valid YAML"),
    "a number without end": ("name: a\nmodel: pebble\nsamples: 0x" + "f" * 5_000, "a number of 5002 characters"),
    "samples for years": ("name: a\nmodel: pebble\nsamples: 1000000000000\n", "samples is 1000000000000"),
    "a limit that lets all pass": ("name: a\nmodel: pebble\nlimits: {mean_kl: .inf}\n", "mean_kl is inf"),
    "a limit that is none": ("name: a\nmodel: pebble\nlimits: {mean_kl: .nan}\n", "mean_kl is nan"),
    "a terminal's orders": ('name: "a\\e[2J"\nmodel: pebble\n', "it must be without control characters"),
    "words turned round": ('name: a\nmodel: pebble\nkeep: ["a\\u202Eb"]\n', "it must be without control characters"),
    "two documents": ("name: a\nmodel: pebble\n---\nname: b\n", "not valid YAML"),
    "bytes that are no text": (b"name: \xff\xfe\n", "not UTF-8"),
    "a control character": (b"name: a\x1b[2J\n", "not valid YAML"),
    "an id that climbs": ("name: a\nmodel: ../../etc\n", "no folder ../../etc"),
    "a revision that climbs": ("name: a\nmodel: me/it\nrevision: ../../x\n", "revision is '../../x'"),
    "a list": ("- name\n", "a recipe is a mapping"),
    "nothing": ("", "a recipe is a mapping"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_none_is_refused(mmq: Run, tmp_path: Path, name: str) -> None:
    text, message = RECIPES[name]
    (tmp_path / "evil.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(mmq, message, *QUANTIZE, "evil.yaml")
    assert not (tmp_path / "RAN").exists()


def test_a_recipe_is_no_pipe_and_no_device(mmq: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    refused(mmq, "no recipe file", *QUANTIZE, "pipe.yaml")
    refused(mmq, "no recipe file", *QUANTIZE, "zero.yaml")


TEMPLATES = {
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "does not end within",
    ),
    "gigabytes": ("{{ 'a' * 10 ** 10 }}", "makes more than 1 GiB"),
    "doubled": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "makes more than",
    ),
    "a book for a word": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "makes more than"),
    "wide": ("{{ '%9999999999d' % 1 }}", "makes more than 1 GiB"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for what a template may not have"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch RAN') }}", "reaches for what"),
    "code": ("{{ (raise_exception|attr('__globals__'))['sys'] }}", "reaches for what"),
    "a book": ("x" * 2_000_000, "where at most"),
}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("endless", "doubled")])
def test_a_chat_template_is_tried_out_first(mmq: Run, model: Path, name: str) -> None:
    text, message = TEMPLATES[name]
    hostile.write(model, "chat_template.jinja", text)
    for words in (["serve", "--print"], ["serve", "--print", "--engine", "pytorch"], QUANTIZE):
        refused(mmq, message, *words, model)
    assert not (model.parent / "RAN").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["endless", "doubled"])
def test_a_chat_template_that_takes_its_time_is_stopped(mmq: Run, model: Path, name: str) -> None:
    text, message = TEMPLATES[name]
    hostile.write(model, "chat_template.jinja", text)
    refused(mmq, message, "serve", "--print", model, within=70)


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "processor_config.json", "folder"])
def test_a_chat_template_is_found_wherever_it_lies(mmq: Run, model: Path, place: str) -> None:
    text, message = TEMPLATES["gigabytes"]
    if place == "folder":
        (model / "additional_chat_templates").mkdir()
        hostile.write(model / "additional_chat_templates", "tool_use.jinja", text)
    else:
        said = json.loads((model / place).read_text(encoding="utf-8")) if (model / place).exists() else {}
        kinds = {"tokenizer_config.json": [{"name": "default", "template": text}]}
        hostile.write(model, place, json.dumps({**said, "chat_template": kinds.get(place, text)}))
    refused(mmq, message, "serve", "--print", model)


def test_a_chat_template_that_says_no_is_let_pass(mmq: Run, model: Path) -> None:
    """What a template does not take, and one that is broken, are told when it is used: this looks for harm alone."""
    for text in ("{{ raise_exception('only tools') }}", "{% for %}", "{% include '/etc/passwd' %}", "{{ none.x.y }}"):
        hostile.write(model, "chat_template.jinja", text)
        assert mmq("serve", "--print", model)[0] == 0


def picture(wide: int, high: int) -> bytes:
    """A PNG that claims this size and holds a few zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, high, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


ROWS: dict[str, tuple[bytes, str]] = {
    "nested": (hostile.deep(), "nested too deep"),
    "nested inside": (b'{"messages": ' + hostile.deep() + b"}", "nested too deep"),
    "no number": (b'{"query": "x", "id": NaN}', "NaN is no number"),
    "a long number": (b'{"query": "x", "id": ' + b"9" * 5_000 + b"}", "a number of 5000 digits"),
    "half a pair": (b'{"query": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (b'{"query": "x", "\\uDFFF": 1}', "half of a surrogate pair"),
    "not UTF-8": (b'{"query": "\xff"}', "not UTF-8 at byte 12"),
    "UTF-16": ('{"query": "x"}'.encode("utf-16"), "not UTF-8 at byte 1"),
    "zeros": (bytes(100), "broken JSON"),
    "a number": (b"5", "no messages"),
    "an answer by number": (b'{"query": "x", "response": 5}', "must be text"),
    "answers by number": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"text": 5}]}]}',
        "text",
    ),
    "a turn by number": (b'{"query": "x", "history": [5]}', "history a list of [query, response]"),
    "a role in a list": (b'{"messages": [{"role": ["user"], "content": "x"}]}', "role"),
    "a picture by number": (b'{"query": "x", "images": [5]}', "path"),
    "a picture of a name without end": (b'{"query": "x", "images": ["' + b"a." * 500 + b'"]}', "cannot be read"),
    "a picture with an end in its name": (b'{"query": "x", "images": ["a\\u0000.png"]}', "cannot be read"),
    "a password": (b'{"query": "x", "images": ["../../../../../../../../etc/passwd"]}', "picture"),
    "a password by its root": (b'{"query": "x", "images": ["file:///etc/passwd"]}', "picture"),
}
NO_PICTURES: dict[str, bytes] = {
    "bomb.png": picture(30_000, 30_000),
    "line.png": picture((1 << 31) - 1, 1),
    "none.png": picture(0, 0),
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(RAN) (w) file closefile\n%%EOF\n",
    "page.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "page.png": b"<!DOCTYPE html>",
    "cut.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\xff\xff\xff\xff\0\0\0\0" * 9,
    "empty.png": b"",
}  # fmt: skip


def asked_for(mmq: Run, message: str, rows: Path) -> None:
    """Both readers refuse the rows: what is sent to a server, and what a model is calibrated on."""
    refused(mmq, message, "infer", "http://127.0.0.1:9", "--dataset", rows)
    refused(mmq, message, "quantize", "pebble", "--calibration", rows, "--samples", "1")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_none_is_refused(mmq: Run, tmp_path: Path, name: str) -> None:
    data, message = ROWS[name]
    (tmp_path / "rows.jsonl").write_bytes(b"\n" + data + b"\n")
    asked_for(mmq, message, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", NO_PICTURES)
def test_a_picture_that_is_none_is_refused(mmq: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(NO_PICTURES[name])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "x", "response": "y", "images": [name]}))
    asked_for(mmq, "picture", tmp_path / "rows.jsonl")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle"])
def test_a_picture_that_never_ends_is_not_read(mmq: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    (tmp_path / "rows.jsonl").write_text('{"query": "x", "response": "y", "images": ["a.png"]}')
    asked_for(mmq, "cannot be read", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("kind", ["videos", "audios"])
def test_a_row_sends_no_text_as_a_medium(mmq: Run, tmp_path: Path, kind: str) -> None:
    """A dataset may name files anywhere, as people's do; a key or a password of whoever asks is not sent for it."""
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "x", kind: [str(tmp_path / "key")]}))
    refused(mmq, "is text and no", "infer", "http://127.0.0.1:9", "--dataset", tmp_path / "rows.jsonl")


def test_a_line_of_a_gigabyte_is_not_read_whole(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"query": "')
    os.truncate(tmp_path / "rows.jsonl", 1 << 36)  # takes no room on the disk
    asked_for(mmq, "longer than", tmp_path / "rows.jsonl")


def test_a_mark_at_the_start_and_whole_pairs_are_text(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "\\ud83d\\ude00"}\r\n')
    refused(mmq, "no server answers", "infer", "http://127.0.0.1:9", "--dataset", tmp_path / "rows.jsonl")


SAID = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b1m\u202edlrow\r over \x08 a\ttab\nline"


def test_names_move_no_cursor(mmq: Run, model: Path, artifact: Callable[..., Path], tmp_path: Path) -> None:
    hostile.config(model, model_type="\x1b[2Jevil\u202e")
    refused(mmq, "\\x1b[2Jevil\\u202e", *QUANTIZE, model)
    out = hostile.artifact(artifact("awq"), tmp_path / "out", name="a\x1b[2J")
    refused(mmq, "name is missing or of another kind", "serve", "--print", out)


def test_a_tables_cells_are_words_and_no_markup() -> None:
    from rich.console import Console

    from mmq.recipes.terminal import table

    shown = Console(file=io.StringIO(), force_terminal=True, width=200)
    shown.print(table(["", ""], [["[/nothing]", "[link=https://evil.example]x[/link] :skull:"], [SAID, "ok"]]))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "[/nothing]" in text
    assert "[link=https://evil.example]x[/link] :skull:" in text
    assert "\\x1b]0;title\\x07\\x1b[2J" in text
    assert not {"\x1b", "\x9b", "\x07", "\x08", "\u202e"} & set(text)


def test_an_answer_on_a_terminal_moves_no_cursor() -> None:
    """Into a pipe it goes as the model made it."""
    import pty
    import subprocess

    code = f"import sys; from mmq.recipes.terminal import answer_writer; answer_writer(sys.stdout.write)({SAID!r})"
    host, guest = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=guest, check=True, timeout=60)
    seen = os.read(host, 10_000).decode()
    os.close(guest)
    os.close(host)
    assert "\\x1b]0;title\\x07\\x1b[2J\\x1b[31mred\\x9b1m\\u202edlrow\\x0d over \\x08 a\ttab\r\nline" in seen
    assert "\x1b" not in seen
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert piped.stdout.decode() == SAID


def test_a_report_of_a_check_is_inert() -> None:
    from types import SimpleNamespace
    from typing import cast

    from mmq.bench.verdict import markdown
    from mmq.recipes.recipe import Limits

    nasty = "<script>alert(1)</script>|[x](javascript:alert(1))"
    made = SimpleNamespace(manifest={"name": nasty})
    measures = {"accuracy_fp16": 1.0, "accuracy_int4": 1.0} | {f"accuracy_{w}.{nasty}": 1.0 for w in ("fp16", "int4")}
    found = SimpleNamespace(measures=measures, failures=[nasty], layers=[], samples=[])
    text = markdown(cast(Any, made), cast(Any, found), Limits())
    assert "<script>" not in text
    assert "[x](" not in text


ADAPTERS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "a list": ({"adapter_config.json": b"[]"}, "must be a JSON object"),
    "nested": ({"adapter_config.json": hostile.deep()}, "nested too deep"),
    "a rank of nothing": (
        {"adapter_model.safetensors": hostile.tensors({"a.lora_A.weight": hostile.entry((), (0, 4))}, bytes(4))},
        "which is no matrix",
    ),
    "half of one": (
        {"adapter_model.safetensors": hostile.tensors({"a.lora_A.weight": hostile.entry((2, 1))}, bytes(8))},
        "without its other half",
    ),
    "terabytes": ({"adapter_model.safetensors": hostile.tensors(b"{}", length=1 << 40)}, "get the file again"),
    "modules by number": ({"adapter_config.json": b'{"modules_to_save": 5}'}, "whole modules (5)"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_none_is_refused(mmq: Run, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "lora").mkdir()
    files, message = ADAPTERS[name]
    for file, data in {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", **files}.items():
        hostile.write(tmp_path / "lora", file, data)
    refused(mmq, message, "serve", "--print", model, "--lora", f"evil={tmp_path / 'lora'}")


def test_a_pickled_adapter_is_never_loaded(mmq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    hostile.write(tmp_path / "lora", "adapter_config.json", "{}")
    hostile.write(tmp_path / "lora", "adapter_model.bin", hostile.pickled(tmp_path / "RAN"))
    refused(mmq, "is a pickle", "serve", "--print", model, "--lora", f"evil={tmp_path / 'lora'}")
    (tmp_path / "lora" / "secret.txt").symlink_to("/etc/hostname")
    refused(mmq, "outside the folder", "serve", "--print", model, "--lora", f"evil={tmp_path / 'lora'}")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pytorch", "vllm"])
def test_an_engine_runs_nothing_that_lies_beside_the_weights(model: Path, tmp_path: Path, engine: str) -> None:
    """The real engines, on a folder with pickles under every usual name and code that every config names."""
    from mmq.serve.client import ask, connect
    from mmq.serve.engines import plan
    from mmq.serve.machine import this_machine
    from mmq.serve.ports import free_port
    from mmq.serve.running import running

    ran = tmp_path / "RAN"
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    hostile.config(model, auto_map=dict.fromkeys(names, "evil.Evil"))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        said = json.loads((model / name).read_text(encoding="utf-8")) if (model / name).exists() else {}
        hostile.write(model, name, json.dumps({**said, "auto_map": dict.fromkeys(names, "evil.Evil")}))
    for name in ("evil.py", "sitecustomize.py", "configuration_qwen2_vl.py", "transformers.py"):
        hostile.write(model, name, hostile.python_that_makes(ran))
    for name in ("pytorch_model.bin", "model.pt", "consolidated.pth", "training_args.bin"):
        hostile.write(model, name, hostile.pickled(ran))
    launch = plan(engine, model, machine=this_machine(), port=free_port())
    with running(launch, timeout=300, log_path=tmp_path / "engine.log") as server, connect(server.url) as client:
        answer = ask(client, [{"role": "user", "content": "What is this?"}], model=server.name, max_tokens=4)
    assert answer.tokens
    assert not ran.exists()


@pytest.mark.parametrize(("said", "count"), [(8, 8), ([8, 4], 4), ([None], 0), (None, 0), ({"": None}, 0), (8.0, 8)])
def test_heads_told_for_each_layer_are_dealt_out_by_what_divides_all(said: Any, count: int) -> None:
    assert count_of(said) == count
