"""Conversions: there and back the same integers, scales and zero points, and the same files; what is refused; lists
mended; folders that other packages packed, made by them where their environments are (MMQ_TEST_BACKENDS=1)."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_backends import FOREIGN, Foreign, foreign  # noqa: F401  (foreign is a fixture)
from test_cli import Run, one_line
from test_owners import asked

from mmq.bench.backends import settle
from mmq.bench.environments import environment
from mmq.bench.peer import run_script
from mmq.export.artifact import base_of, open_artifact
from mmq.export.convert import convert
from mmq.export.packed_folder import open_packed
from mmq.export.packing import pack_last
from mmq.export.view import packed_linears, view
from mmq.quantize.source import open_source
from mmq.recipes.calibration import drawn
from mmq.serve.rules.verdicts import PLACES, verdicts

MOVES = (  # made as, then converted to, in this order
    (("awq", None), ("compressed-tensors", "awq")),
    (("awq", "compressed-tensors"), ("awq", "compressed-tensors")),
    (("gptq", None), ("compressed-tensors", "awq", "gptq")),
    (("gptq", "compressed-tensors"), ("gptq", "awq", "compressed-tensors")),
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()}


def same(one: Path, two: Path) -> None:
    """The same tensors to the bit, whatever file they lie in."""
    mine, theirs = tensors_of(one), tensors_of(two)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("made", "ways"), MOVES)
def test_there_and_back_is_the_same_to_the_bit(
    artifact: Callable[..., Path], tmp_path: Path, made: tuple[str, str | None], ways: tuple[str, ...]
) -> None:
    source = artifact(*made)
    before, grids = source, []
    for number, format in enumerate(ways):
        out = tmp_path / str(number)
        made_now = convert(before, out, format=format)
        assert open_artifact(out, verify=True).digest == made_now.digest
        assert made_now.format == format
        assert made_now.manifest["converted_from"]["digest"] == open_artifact(before).digest
        grids.append(made_now.manifest["grid"])
        here, there = view(source), view(out)
        assert here.metas.keys() == there.metas.keys()
        assert all(torch.equal(here.get(n), there.get(n)) for n in here.metas)
        before = out
    assert len(set(grids)) == 1
    same(source, before)


def test_what_an_artifact_keeps(artifact: Callable[..., Path], tmp_path: Path) -> None:
    source = open_artifact(artifact("awq"))
    made = convert(source.path, tmp_path / "out", format="compressed-tensors")
    for key in ("name", "method", "recipe", "base", "calibration", "quantized", "layers"):
        assert made.manifest[key] == source.manifest[key], key
    assert "key" in source.manifest
    assert "key" not in made.manifest  # `mmq run` would take it for what the recipe makes
    small = {n for n in source.manifest["files"] if not n.endswith((".safetensors", ".index.json"))}
    assert small == {n for n in made.manifest["files"] if not n.endswith((".safetensors", ".index.json"))}
    back = convert(made.path, tmp_path / "back", format="awq")
    assert back.manifest["converted_from"]["before"]["format"] == "awq"
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    old = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in config.items() if k != "quantization_config"} == {
        k: v for k, v in old.items() if k != "quantization_config"
    }


def test_a_report_of_a_check_stays_behind(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """It is of the artifact that was checked."""
    source = tmp_path / "source"
    shutil.copytree(artifact("awq"), source)
    (source / "check.json").write_text("{}")
    convert(source, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out" / "check.json").exists()


def test_one_gigabyte_at_a_time(artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards as large as others write them are taken apart: here at 64 KiB."""
    source = tmp_path / "one"
    shutil.copytree(artifact("awq"), source, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json"))
    save_file(tensors_of(artifact("awq")), source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("mmq.export.convert.REST_SHARD", 65536)
    made = convert(source, tmp_path / "many", format="compressed-tensors")
    assert sum(n.endswith(".safetensors") for n in made.manifest["files"]) > 20
    whole = convert(artifact("awq"), tmp_path / "few", format="compressed-tensors")
    assert made.manifest["grid"] == whole.manifest["grid"]
    same(made.path, whole.path)


def test_what_cannot_be_without_loss_is_refused(artifact: Callable[..., Path], pebble: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no engine loads GPTQ so; it can be awq or compressed-tensors"):
        convert(artifact("awq"), out, format="gptq")
    with pytest.raises(ValueError, match="code book is no grid of integers"):
        convert(artifact("bnb"), out, format="awq")
    with pytest.raises(ValueError, match="is not quantized"):
        convert(pebble, out, format="awq")
    with pytest.raises(OSError, match=r"^no folder .*nowhere"):
        convert(tmp_path / "nowhere", out, format="awq")
    for inside in (artifact("awq"), artifact("awq").parent):
        with pytest.raises(ValueError, match="holds what is to be read"):
            convert(artifact("awq"), inside, format="awq", overwrite=True)
    assert not out.exists()


def test_a_cut_off_source_is_found(artifact: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(artifact("awq"), source)
    shard = max(source.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OSError, match="changed since it was made"):
        convert(source, tmp_path / "out", format="compressed-tensors")


def test_asymmetric_gptq_becomes_what_engines_load(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """No engine takes it as it is; its grid is AWQ's all the same."""
    source = tmp_path / "source"
    packed = open_packed(artifact("awq"))
    shutil.copytree(
        packed.source.folder, source, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json")
    )
    tensors = {n: packed.source.get(n) for n in packed.source.metas if packed.owner(n) is None}
    for linear in packed.linears:
        x = packed.get(linear)
        tensors[f"{linear}.qweight"] = pack_last(x.q).T.contiguous()
        tensors[f"{linear}.qzeros"] = pack_last(x.zero.T.contiguous())
        tensors[f"{linear}.scales"] = x.scale.T.half().contiguous()
        tensors[f"{linear}.g_idx"] = torch.arange(x.q.shape[1], dtype=torch.int32) // x.group_size
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "sym": False}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="no engine loads GPTQ so"):
        convert(source, tmp_path / "same")
    made = convert(source, tmp_path / "out", format="awq")
    same(artifact("awq"), made.path)


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]


EIGHT_BITS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
MORE = {  # what a config says besides, of compressed-tensors, and what of it is told
    "activations": (lambda c: group_of(c).update(input_activations=EIGHT_BITS), "has input_activations"),
    "a cache": (lambda c: c["quantization_config"].update(kv_cache_scheme=EIGHT_BITS), "has kv_cache_scheme"),
    "rotations": (
        lambda c: c["quantization_config"].update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "has transform_config",
    ),
    "no integers": (lambda c: group_of(c)["weights"].update(type="float"), "has weights of type float"),
    "another grid": (lambda c: group_of(c)["weights"].update(symmetric=True), "the config says symmetric"),
}


def foreigner(artifact: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """An artifact's files as a folder of somebody else's, with another config."""
    shutil.copytree(artifact, to, ignore=shutil.ignore_patterns("mmq.json"))
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    change(config)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


@pytest.mark.parametrize("format", [None, "awq"])
@pytest.mark.parametrize("more", MORE)
def test_what_a_config_says_besides_is_not_left_out(
    artifact: Callable[..., Path], tmp_path: Path, more: str, format: str | None
) -> None:
    change, told = MORE[more]
    folder = foreigner(artifact("awq", "compressed-tensors"), tmp_path / "theirs", change)
    with pytest.raises(ValueError, match=told):
        convert(folder, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_config_is_found_where_older_packages_put_it(artifact: Callable[..., Path], tmp_path: Path) -> None:
    def nested(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    folder = foreigner(artifact("awq"), tmp_path / "nested", nested)
    made = convert(folder, tmp_path / "out", format="compressed-tensors")
    config = json.loads((made.path / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quantization_config" not in config["text_config"]
    same(convert(made.path, tmp_path / "back", format="awq").path, artifact("awq"))

    folder = foreigner(artifact("awq"), tmp_path / "beside", lambda config: config.pop("quantization_config"))
    (folder / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}'
    )
    assert convert(folder, tmp_path / "again", format="compressed-tensors").manifest["grid"] == made.manifest["grid"]


def test_zero_points_that_are_all_8_stay_where_they_are_stored(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """compressed-tensors with and without them are read by different loaders."""
    symmetric = convert(artifact("gptq"), tmp_path / "symmetric", format="compressed-tensors").path
    source = tmp_path / "source"
    shutil.copytree(symmetric, source, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "mmq.json"))
    tensors = tensors_of(symmetric)
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        rows, groups = tensors[name].shape
        eights = torch.full((rows, groups), 8, dtype=torch.uint8)
        zeros = pack_last(eights.T.contiguous()).T.contiguous()
        tensors[name.replace("weight_scale", "weight_zero_point")] = zeros
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    mended = convert(source, tmp_path / "mended")
    declared = json.loads((mended.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert declared["config_groups"]["group_0"]["weights"]["symmetric"] is False
    same(source, mended.path)
    assert convert(source, tmp_path / "gptq", format="gptq").manifest["symmetric"] is True


def answers(folder: Path) -> dict[str, bool]:
    """By place, whether the skip list is read as it is packed."""
    found = verdicts(folder, PLACES)
    return {
        v.place.name: not any(f.fatal and f.rule in ("skip list", "head", "layout") for f in v.findings) for v in found
    }


@pytest.mark.parametrize("made", [("awq", None), ("awq", "compressed-tensors")])
def test_lists_are_mended(artifact: Callable[..., Path], tmp_path: Path, made: tuple[str, str | None]) -> None:
    source = tmp_path / "source"
    shutil.copytree(artifact(*made), source, ignore=shutil.ignore_patterns("mmq.json"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("modules_to_not_convert", "ignore"):
        if key in config["quantization_config"]:
            config["quantization_config"][key] = ["lm_head"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert not answers(source)["vllm:cuda"]
    mended = convert(source, tmp_path / "out")
    assert all(answers(mended.path).values())
    same(source, mended.path)
    assert mended.manifest["converted_from"]["digest"] is None
    with pytest.raises(OSError, match="names no base; give the 16-bit checkpoint with --base"):
        base_of(mended)


def test_a_layer_kept_in_16_bit_is_listed_for_every_engine(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """SGLang compares the fused name, vLLM the names of what is fused."""
    source = artifact("awq", keep=("model.language_model.layers.1.self_attn",))
    if open_artifact(source).manifest["quantized"] == open_artifact(artifact("awq")).manifest["quantized"]:
        pytest.fail("nothing was kept")
    for folder in (source, convert(source, tmp_path / "out").path):
        found = answers(folder)
        assert found.pop("lmdeploy:pytorch") is False  # it takes the whole decoder for packed, whatever is listed
        assert all(found.values()), found


# what other packages packed


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_folder_is_converted_as_it_lies(
    foreign: Callable[..., Foreign],  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    made = foreign(kind)
    packed = open_packed(made.folder)
    goal = "awq" if packed.format == "compressed-tensors" else "compressed-tensors"
    there = convert(made.folder, tmp_path / "there", format=goal)
    back = convert(there.path, tmp_path / "back", format=packed.format)
    assert there.manifest["grid"] == back.manifest["grid"]
    for linear in packed.linears:
        mine, again = packed.get(linear), open_packed(back.path).get(linear)
        assert torch.equal(mine.q, again.q)
        assert torch.equal(mine.scale, again.scale)
        assert torch.equal(mine.zero, again.zero)
    rest = {n for n in packed.source.metas if packed.owner(n) is None}
    after = open_source(back.path)
    assert all(torch.equal(packed.source.get(n), after.get(n)) for n in rest)
    assert packed_linears(after.metas, packed.format) == packed.linears


def test_the_command(mmq: Run, artifact: Callable[..., Path], tmp_path: Path) -> None:
    code, out, err = mmq("convert", str(artifact("gptq")), "--format", "awq", "-o", "out", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["from"], facts["format"], facts["symmetric"], facts["linears"]) == ("gptq", "awq", True, 35)
    assert open_artifact(tmp_path / "out").digest == facts["digest"]
    code, _, err = mmq("convert", str(artifact("gptq")), "--format", "awq", "-o", "out")
    assert code == 2
    assert "--overwrite" in one_line(err)
    assert mmq("convert", "out", "--repair")[0] == 0
    assert (tmp_path / "out-repaired" / "mmq.json").is_file()
    _, _, err = mmq("convert", "out")
    assert "give either --format awq, gptq or compressed-tensors, or --repair" in one_line(err)


@asked
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backend", "method", "symmetric"),
    [
        ("autoawq", "awq", False),
        ("gptqmodel", "gptq", True),
        ("gptqmodel", "awq", False),
        ("llmcompressor", "awq", False),
        ("llmcompressor", "gptq", True),
        ("auto-round", "autoround", True),
    ],
)
def test_what_a_package_made_here(pebble: Path, tmp_path: Path, backend: str, method: str, symmetric: bool) -> None:
    """Its own folder, before mmq brings it home: opened, judged, mended, converted there and back."""
    job = settle(backend, method=method, symmetric=symmetric, format=None)
    place = tmp_path / "place"
    place.mkdir()
    run_script(job, pebble, place, samples=drawn(8), group_size=128, python=environment(backend))
    folder = place / "made"
    packed = open_packed(folder)
    assert len(packed.linears) == 35
    before = answers(folder)
    logging.getLogger(__name__).info("%s %s, as it was made: %s", backend, method, before)
    mended = convert(folder, tmp_path / "mended")
    after = answers(mended.path)
    assert after.pop("sglang:cuda") or packed.format == "gptq"  # SGLang takes all of a GPTQ model for packed
    assert all(after.values()), after
    goal = "awq" if packed.format == "compressed-tensors" else "compressed-tensors"
    there = convert(mended.path, tmp_path / "there", format=goal)
    back = convert(there.path, tmp_path / "back", format=packed.format)
    assert mended.manifest["grid"] == there.manifest["grid"] == back.manifest["grid"]
