"""Other packages' quantizers: their environments, the run, and their checkpoints as artifacts.

What needs no other package runs always. MMQ_TEST_BACKENDS=1 also runs each real package on the embedded model, in an
environment that is made for it (minutes, and gigabytes the first time).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import ImageChops
from safetensors.torch import load_file, save_file
from test_cli import Run, one_line
from torch import Tensor

from mmq.bench.backends import BACKENDS, Backend, settle
from mmq.bench.check import check
from mmq.bench.environments import environment, find_uv, state
from mmq.bench.follow import clean, follow
from mmq.bench.peer import PEERS, quantize_with, run_script, write_samples
from mmq.export.adopt import adopt
from mmq.export.artifact import UNFINISHED, Artifact, open_artifact, prepare
from mmq.export.packed_folder import open_packed
from mmq.export.packing import LAYOUTS
from mmq.export.view import view
from mmq.quantize.grid import Grid, dequantize, quantize
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.pebble.tasks import samples as pebble_samples
from mmq.recipes.recipe import recipe_for
from mmq.recipes.samples import load

FOREIGN = {  # kind -> mmq's format, symmetric, the config as that package writes it
    "autoawq": ("awq", False, {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}),
    "gptqmodel": ("gptq", True, {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "sym": True}),
    "gptq v2": ("gptq", True, {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "sym": True}),
    "auto-round": ("gptq", True, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4}),
    "auto-round awq": ("awq", False, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "llmcompressor": (
        "compressed-tensors",
        False,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"format": "pack-quantized", "weights": {"num_bits": 4}}},
        },
    ),
}
PACKED = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
NORM = "model.layers.1.input_layernorm.weight"


def renamed(name: str) -> str:
    """A checkpoint's name as transformers 5 calls the module."""
    name = re.sub(r"^model\.", "model.language_model.", name)
    return re.sub(r"^visual\.", "model.visual.", name)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A folder such as another package leaves, and the weights that its packed linears stand for, by base name."""

    folder: Path
    weights: dict[str, Tensor]
    norm: Tensor


@pytest.fixture
def foreign(pebble: Path, tmp_path: Path) -> Callable[..., Foreign]:
    """`foreign(kind)`: pebble rounded and packed under other names, in float16, with a norm of one layer changed.
    `change(tensors)` may spoil what is about to be written."""

    def build(kind: str, *, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Foreign:
        format, symmetric, declared = FOREIGN[kind]
        base = open_source(pebble)
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        tensors, weights = {}, {}
        for name in base.metas:
            value = base.get(name)
            if PACKED.fullmatch(name):
                x = quantize(value.float(), Grid(128, symmetric, torch.float16))
                weights[name] = dequantize(x)
                packed = LAYOUTS[format].pack(x, torch.float16)
                if kind == "gptq v2":
                    packed["qzeros"] += 0x11111111
                head = renamed(name).removesuffix(".weight")
                tensors |= {f"{head}.{suffix}": t for suffix, t in packed.items()}
            else:
                tensors[renamed(name)] = value.half() * (1.5 if name == NORM else 1)
        norm = tensors[renamed(NORM)].clone()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((pebble / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
        return Foreign(folder, weights, norm)

    return build


def bring_home(found: Foreign, out: Path, *, symmetric: bool, **recipe: object) -> Artifact:
    prepare(out, {})
    return adopt(
        found.folder,
        dataclasses.replace(recipe_for("pebble"), **recipe),
        fetch("pebble"),
        out,
        method="gptq" if symmetric else "awq",
        symmetric=symmetric,
        backend={"backend": "another", "version": "1.2.3", "seconds": 4.5},
        calibration=None,
    )


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_comes_home(foreign: Callable[..., Foreign], pebble: Path, tmp_path: Path, kind: str):
    """Every packing: the same weights to the bit, the base's names and other tensors, the changed norm, whole."""
    format, symmetric, _ = FOREIGN[kind]
    found = foreign(kind)
    bring_home(found, tmp_path / "home", symmetric=symmetric)
    artifact = open_artifact(tmp_path / "home", verify=True)
    assert (artifact.format, artifact.manifest["symmetric"]) == (format, symmetric)
    assert artifact.manifest["backend"]["version"] == "1.2.3"
    assert len(artifact.manifest["quantized"]) == len(found.weights)
    base, shown = open_source(pebble), view(artifact.path)
    assert set(shown.metas) == set(base.metas)
    for name in base.metas:
        if name in found.weights:
            assert torch.equal(shown.get(name), found.weights[name]), name
        elif name == NORM:
            assert torch.equal(shown.get(name), found.norm.bfloat16())
            assert not torch.equal(shown.get(name), base.get(name))
        else:
            assert torch.equal(shown.get(name), base.get(name)), name
    layers = json.loads((artifact.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in layers.items() if ".layers." in name}) == len(artifact.manifest["layers"])
    assert {p.name for p in pebble.glob("*.json")} <= {p.name for p in artifact.path.iterdir()} | {"model.safetensors"}


def test_old_names_come_home_too(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    """As transformers 4 named them: visual.* beside model.layers.*."""

    def older(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[old] = tensors.pop(name)

    found = foreign("autoawq", change=older)
    artifact = bring_home(found, tmp_path / "home", symmetric=False)
    shown = view(artifact.path)
    assert all(torch.equal(shown.get(name), weight) for name, weight in found.weights.items())


def test_a_scale_that_float16_cannot_hold_is_kept(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    """GPTQModel writes AWQ scales in bfloat16."""
    scales = "model.language_model.layers.0.mlp.up_proj.scales"

    def tiny(tensors: dict[str, Tensor]) -> None:
        tensors[scales] = tensors[scales].bfloat16()
        tensors[scales][0, 0] = 2.0**-40

    found = foreign("autoawq", change=tiny)
    artifact = bring_home(found, tmp_path / "home", symmetric=False)
    assert float(open_source(artifact.path).get("model.layers.0.mlp.up_proj.scales")[0, 0]) == 2.0**-40


def spoil(name: str, to: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        value = to(tensors.pop(name))
        if value is not None:
            tensors[name] = value.contiguous()

    return change


def unpacked(tensors: dict[str, Tensor]) -> None:
    head = "model.language_model.layers.2.mlp.up_proj"
    for suffix in LAYOUTS["gptq"].suffixes:
        del tensors[f"{head}.{suffix}"]
    tensors[f"{head}.weight"] = torch.zeros(768, 256)


def with_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.language_model.layers.0.mlp.down_proj.bias"] = torch.ones(256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("model.language_model.layers.0.mlp.up_proj.g_idx", lambda t: t.flip(0)), "activation order"),
        (spoil("model.language_model.layers.0.mlp.up_proj.qzeros", lambda t: t + 1), "not symmetric: zero points from"),
        (
            spoil("model.language_model.layers.0.mlp.up_proj.scales", lambda t: None),
            "up_proj: its tensor scales is missing",
        ),
        (spoil("model.language_model.embed_tokens.weight", lambda t: t * 2), "embed_tokens.weight differs"),
        (spoil("model.language_model.norm.weight", lambda t: None), "no tensor for"),
        (unpacked, "up_proj is not packed, but what engines fuse it with is"),
        (with_bias, "down_proj.bias belongs to a linear"),
    ],
)
def test_what_is_not_the_base_is_refused(
    foreign: Callable[..., Foreign], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bring_home(foreign("gptqmodel", change=change), tmp_path / "home", symmetric=True)


def test_another_grid_than_asked_is_refused(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    found = foreign("autoawq")
    with pytest.raises(ValueError, match="has groups of 128, and 64 was asked for"):
        bring_home(found, tmp_path / "home", symmetric=False, group_size=64)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "packed as awq gemv"),
        ({"quant_method": "gptq", "bits": 8}, "8"),
        ({"quant_method": "fp8"}, "packed as fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"}, "compressed-tensors"),
        (None, "packed as None"),
    ],
)
def test_other_layouts_are_refused(foreign: Callable[..., Foreign], declared: dict | None, message: str) -> None:
    folder = foreign("gptqmodel").folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_packed(folder)


# environments


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A requirements file of one package, which uv finds in a folder beside it, and a cache of its own."""
    try:
        find_uv()
    except OSError as e:
        pytest.skip(str(e))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    files = {
        "tinypeer.py": "VALUE = 42\n",
        "tinypeer-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinypeer\nVersion: 1.0\n",
        "tinypeer-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["tinypeer-1.0.dist-info/RECORD"] = "".join(f"{n},,\n" for n in [*files, "tinypeer-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(wheels / "tinypeer-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("MMQ_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tinypeer.txt"
    file.write_text("# one package\ntinypeer==1.0\n")
    return file


def made(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "backends").glob("tinypeer-*"))


def test_an_environment_is_made_once(tiny: Path, tmp_path: Path) -> None:
    assert not state("tinypeer", requirements=tiny).ready
    python = environment("tinypeer", requirements=tiny)
    code = "import tinypeer, importlib.util as u; print(tinypeer.VALUE, u.find_spec('torch'), u.find_spec('mmq'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean(), check=True)
    assert done.stdout.split() == ["42", "None", "None"]  # an environment of its own
    assert made(tmp_path) == [python.parent.parent]
    told = state("tinypeer", requirements=tiny)
    assert told.ready
    assert "tinypeer 1.0" in told.text
    steps: list[object] = []
    assert environment("tinypeer", requirements=tiny, tell=steps.append) == python
    assert steps == []  # nothing was done
    tiny.write_text("tinypeer==1.0\n\n")
    assert not state("tinypeer", requirements=tiny).ready  # other pins, another environment


def test_a_half_made_environment_is_never_used(tiny: Path, tmp_path: Path) -> None:
    def interrupt(step: object) -> None:
        if getattr(step, "done", 0) == 1:  # the interpreter is there, the package is not
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment("tinypeer", requirements=tiny, tell=interrupt)
    assert [p for p in made(tmp_path) if p.is_dir()] == []
    assert not state("tinypeer", requirements=tiny).ready
    python = environment("tinypeer", requirements=tiny)
    (python.parent.parent / "mmq-environment.json").unlink()  # as a copy that was cut short would be
    assert not state("tinypeer", requirements=tiny).ready
    assert environment("tinypeer", requirements=tiny) == python
    assert state("tinypeer", requirements=tiny).ready


def test_what_cannot_be_installed_is_told_in_one_line(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text("tinypeer==2.0\n")
    with pytest.raises(OSError, match="tinypeer cannot be installed: ") as e:
        environment("tinypeer", requirements=tiny)
    assert "\n" not in str(e.value)
    assert "2.0" in str(e.value)
    told = state("tinypeer", requirements=tiny)
    assert not told.ready
    assert str(e.value) in told.text
    assert [p for p in made(tmp_path) if p.is_dir()] == []
    (log,) = [p for p in made(tmp_path) if p.suffix == ".log"]
    assert "tinypeer" in log.read_text()


def test_no_uv_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(OSError, match="pip install uv"):
        environment("tinypeer", requirements=tiny)
    assert state("tinypeer", requirements=tiny).mend == "pip install uv"


def test_an_interpreter_of_the_users_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMQ_TINYPEER_PYTHON", sys.executable)
    assert environment("tinypeer", requirements=tiny) == Path(sys.executable)
    assert state("tinypeer", requirements=tiny).ready
    monkeypatch.setenv("MMQ_TINYPEER_PYTHON", "/nowhere/python")
    with pytest.raises(OSError, match="MMQ_TINYPEER_PYTHON names /nowhere/python"):
        environment("tinypeer", requirements=tiny)


def test_an_interrupted_command_is_ended(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    heard: list[str] = []

    def interrupt(line: str) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow([sys.executable, "-c", code], env=os.environ, log=tmp_path / "log", on_line=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(heard[0]), 0)


# the run


SCRIPT = """
import json, pathlib, shutil, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
lines = [json.loads(line) for line in open(job["samples"], encoding="utf-8")]
print("one", "\\rbar:  50%|xxx   | 1/2 [00:01<00:01]\\rbar: 100%|xxxxxx| 2/2 [00:02<00:00]")
{action}
shutil.copytree({folder!r}, job["out"])
report = {{"backend": "standin", "version": "0", "seconds": 1.0, "asked": job, "lines": len(lines)}}
(pathlib.Path(job["out"]) / "peer.json").write_text(json.dumps(report))
"""


@pytest.fixture
def standin(
    foreign: Callable[..., Foreign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Foreign]:
    """`standin(action)`: a backend in this very environment, whose script leaves a packed folder after `action`."""
    found = foreign("autoawq")

    def install(action: str) -> Foreign:
        script = tmp_path / "standin.py"
        script.write_text(SCRIPT.format(action=action, folder=str(found.folder)))
        monkeypatch.setitem(BACKENDS, "standin", Backend(str(script), {("awq", False): "awq"}))
        monkeypatch.setenv("MMQ_STANDIN_PYTHON", sys.executable)
        return found

    return install


def ask(name: str) -> tuple:
    return settle(name, method=None, symmetric=None, format=None), recipe_for("pebble"), fetch("pebble")


def test_a_run_becomes_an_artifact(standin: Callable[[str], Foreign], tmp_path: Path) -> None:
    found = standin("")
    steps: list = []
    artifact = quantize_with(
        *ask("standin"), tmp_path / "out", samples=drawn(4), calibration="drawn", tell=steps.append
    )
    manifest = open_artifact(tmp_path / "out", verify=True).manifest
    assert (manifest["name"], manifest["method"]) == ("pebble-standin-awq", "awq")
    assert manifest["backend"]["lines"] == 4
    asked = manifest["backend"]["asked"]
    assert (asked["method"], asked["group_size"], asked["symmetric"], asked["device"]) == ("awq", 128, False, "cpu")
    assert manifest["calibration"]["samples"] == 4
    assert manifest["calibration"]["media"] > 0
    assert ("standin", 1, 2) in [(s.name, s.done, s.total) for s in steps]  # its own bar
    shown = view(artifact.path)
    assert all(torch.equal(shown.get(name), weight) for name, weight in found.weights.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".mmq")] == []  # scratch is gone


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("sys.exit('standin: ValueError: no such layer')", r"failed \(exit code 1\): standin: ValueError: no such"),
        ("import os; os.kill(os.getpid(), 9)", r"failed \(signal 9\)"),
        ("sys.exit(0)", "it left no report"),
    ],
)
def test_a_failed_run_keeps_its_log(
    standin: Callable[[str], Foreign], tmp_path: Path, action: str, message: str
) -> None:
    standin(action)
    with pytest.raises(RuntimeError, match=message):
        quantize_with(*ask("standin"), tmp_path / "out", samples=drawn(2), calibration="drawn")
    assert "bar: 100%" in (tmp_path / "out-standin.log").read_text()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_left_alone(standin: Callable[[str], Foreign], tmp_path: Path) -> None:
    standin("sys.exit('must not run')")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        quantize_with(*ask("standin"), tmp_path / "out", samples=drawn(2), calibration="drawn", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert UNFINISHED not in [p.name for p in (tmp_path / "out").iterdir()]


def test_samples_read_back_as_they_were(tmp_path: Path) -> None:
    """The file that a script gets is one that mmq reads itself: same words, same pixels."""
    given = drawn(8)
    back = load(write_samples(given, tmp_path))
    assert [s.messages for s in back] == [s.messages for s in given]
    assert sum(len(s.images) for s in given) > 3
    for a, b in zip(given, back, strict=True):
        for x, y in zip(a.images, b.images, strict=True):
            assert ImageChops.difference(x.convert("RGB"), y).getbbox() is None


@pytest.mark.parametrize(
    ("name", "asked", "made_of_it"),
    [
        ("llmcompressor", {}, ("awq", False, "compressed-tensors")),
        ("llmcompressor", {"method": "gptq"}, ("gptq", True, "compressed-tensors")),
        ("llmcompressor", {"symmetric": True}, ("awq", True, "compressed-tensors")),
        ("gptqmodel", {}, ("gptq", True, "gptq")),
        ("gptqmodel", {"format": "awq"}, ("awq", False, "awq")),
        ("autoawq", {}, ("awq", False, "awq")),
        ("auto-round", {"symmetric": False}, ("autoround", False, "awq")),
    ],
)
def test_what_is_left_open_is_filled_in(name: str, asked: dict, made_of_it: tuple) -> None:
    settled = settle(name, **{"method": None, "symmetric": None, "format": None, **asked})
    assert (settled.method, settled.symmetric, settled.format) == made_of_it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "nope"], "known are autoawq, auto-gptq, gptqmodel, llmcompressor, auto-round"),
        (["--backend", "autoawq", "--method", "gptq"], "it makes asymmetric awq in awq"),
        (["--backend", "auto-gptq", "--asymmetric"], "it makes symmetric gptq in gptq"),
        (["--backend", "gptqmodel", "--keep", "mlp"], "leave --keep out"),
        (["--backend", "gptqmodel", "--quality", "best"], "leave it out"),
        (["--method", "autoround"], "add --backend auto-round"),
    ],
)
def test_what_a_backend_cannot_do_is_one_line(mmq: Run, words: list[str], message: str) -> None:
    code, _, err = mmq("quantize", "pebble", *words)
    assert code == 2
    assert message in one_line(err)


def test_doctor(mmq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMQ_CACHE", str(tmp_path))
    code, out, _ = mmq("doctor", "--json")
    assert code == 0
    told = {row["name"]: row for row in json.loads(out)}
    assert {f"backend {name}" for name in BACKENDS} <= set(told)
    assert told["torch"]["text"] == torch.__version__
    assert not told["backend autoawq"]["ready"]
    assert "mmq quantize MODEL --backend autoawq" in told["backend autoawq"]["mend"]
    code, out, _ = mmq("doctor")
    assert code == 0
    assert "llmcompressor" in out


# the real packages


# How a package itself reads what it packed: `read(tensors of one linear, config)` gives [out, in] in its own dtype.
AWQ_READING = """
from {module} import dequantize_gemm
def read(t, config):
    return dequantize_gemm(t["qweight"], t["qzeros"], t["scales"], 4, config["group_size"]).T
"""
GPTQ_READING = """
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
def read(t, config):
    sizes = {"in_features": t["g_idx"].numel(), "out_features": t["scales"].shape[1]}
    layer = TorchLinear(bits=4, group_size=config["group_size"], sym=True, desc_act=False, bias=False,
                        register_buffers=True, **sizes)
    for name, tensor in t.items():
        getattr(layer, name).data.copy_(tensor)
    convert_gptq_v1_to_v2_format_module(layer, 4, torch.int32)
    layer.post_init()
    return layer.dequantize_weight().T
"""
CT_READING = """
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
def read(t, config):
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    return PackedQuantizationCompressor.decompress(t, scheme)["weight"]
"""
OWN_READING = {
    ("llmcompressor", "compressed-tensors"): CT_READING,
    ("gptqmodel", "gptq"): GPTQ_READING,
    ("gptqmodel", "awq"): AWQ_READING.format(module="gptqmodel.quantization.awq.utils.packing_utils"),
    ("autoawq", "awq"): AWQ_READING.format(module="awq.utils.packing_utils"),
}
READER = """
import json, pathlib, sys
sys.path.append({peers!r})
import torch
from peers.job import mend_torchvision
mend_torchvision()
from safetensors.torch import load_file, save_file
{reading}
folder, out = map(pathlib.Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())["quantization_config"]
tensors = {{}}
for file in folder.glob("*.safetensors"):
    tensors |= load_file(file)
suffixes = {suffixes!r}
linears = {{n.rpartition(".")[0] for n in tensors if n.endswith("." + suffixes[0])}}
parts = lambda n: {{s: tensors[n + "." + s] for s in suffixes if n + "." + s in tensors}}
save_file({{n: read(parts(n), config).contiguous() for n in linears}}, out)
"""


def own_reading(name: str, format: str, folder: Path, out: Path) -> dict[str, Tensor]:
    """The weights that the package itself reads in what it packed, by its own names."""
    script = READER.format(
        peers=str(PEERS.parent), reading=OWN_READING[(name, format)], suffixes=LAYOUTS[format].suffixes
    )
    done = subprocess.run(
        [environment(name), "-c", script, folder, out],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env=clean(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.skipif(os.environ.get("MMQ_TEST_BACKENDS") != "1", reason="MMQ_TEST_BACKENDS=1 runs the real packages")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "method"), [(n, m) for n, b in BACKENDS.items() for m in {m: 0 for m, _ in b.makes}])
def test_a_real_package(name: str, method: str, pebble: Path, tmp_path: Path) -> None:
    """Quantized by the package itself, brought home, checked; and read back by the package to the same weights."""
    try:
        python = environment(name)
    except OSError as e:
        pytest.skip(str(e))
    asked = settle(name, method=method, symmetric=None, format=None)
    report = run_script(asked, pebble, tmp_path, samples=drawn(32), group_size=128, python=python)
    assert report["layers"] == 5
    assert report["seconds"] > 0
    prepare(tmp_path / "home", {})
    artifact = adopt(
        tmp_path / "made",
        recipe_for("pebble"),
        fetch("pebble"),
        tmp_path / "home",
        method=asked.method,
        symmetric=asked.symmetric,
        backend=report,
        calibration=None,
    )
    assert artifact.format == asked.format
    if (name, asked.format) in OWN_READING:
        theirs = own_reading(name, asked.format, tmp_path / "made", tmp_path / "read.safetensors")
        shown = view(artifact.path)
        assert len(theirs) == len(artifact.manifest["quantized"])
        for linear in artifact.manifest["quantized"]:
            weight = theirs[linear if linear in theirs else renamed(linear)]
            assert torch.equal(weight, shown.get(f"{linear}.weight").to(weight.dtype)), linear
    limits = recipe_for("pebble").limits
    found = check(artifact, pebble, samples=list(pebble_samples("test", 26)), limits=limits)
    assert not found.failures
    assert found.measures["mean_kl"] < 0.02
