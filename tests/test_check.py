"""The check on a really trained model: methods are ranked as they should be, and damage of every kind is noticed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmq.bench.check import Checked, check
from mmq.bench.measure import SOFT, common_prefix, compare_logits, repeats, summary
from mmq.bench.verdict import rows
from mmq.export.artifact import MANIFEST, finish, open_artifact
from mmq.export.packing import AWQ_ORDER, pack_last, unpack_last
from mmq.recipes.pebble import model_folder
from mmq.recipes.pebble.tasks import exact, samples
from mmq.recipes.recipe import Limits, recipe_for
from mmq.recipes.samples import blind

Artifact = Callable[..., Path]
COUNT = 52  # four of each task
FEW = 13  # one of each: enough to notice damage by


@cache
def checked(folder: Path, count: int = COUNT) -> Checked:
    opened = open_artifact(folder, verify=True)
    held_out = list(samples("test", count))
    return check(
        opened, model_folder(), samples=held_out, limits=recipe_for("pebble").limits, score=exact, max_new_tokens=80
    )


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_an_honest_artifact_passes(artifact: Artifact, method: str) -> None:
    result = checked(artifact(method))
    assert result.failures == ()
    assert result.measures["coverage"] == 1
    assert result.measures["image_effect"] > 0.8
    assert result.measures["accuracy_fp16"] >= 0.9


def test_nf4_is_checked_too(artifact: Artifact) -> None:
    """It knows no calibration and pebble has outlier channels, so a limit may be passed; it is whole and answers."""
    measures = checked(artifact("bnb")).measures
    assert (measures["coverage"], measures["unintended"], measures["finite"]) == (1, 0, 1)
    assert measures["accuracy_int4"] > 0.7


def test_awq_beats_rounding(artifact: Artifact) -> None:
    assert checked(artifact("awq")).measures["mean_kl"] < checked(artifact("rtn")).measures["mean_kl"]


def test_gptq_beats_rounding(artifact: Artifact) -> None:
    """On the same symmetric grid."""
    mine, plain = checked(artifact("gptq")), checked(artifact("rtn", "gptq"))
    assert mine.measures["mean_kl"] < plain.measures["mean_kl"]


def test_rounding_loses_measurably(artifact: Artifact) -> None:
    """Else nothing here would prove anything."""
    assert checked(artifact("rtn")).measures["mean_kl"] > 1e-3


def change(folder: Path, to: Path, shard: str, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with one shard edited and its manifest made to fit, so that only the check can notice."""
    copy = Path(shutil.copytree(folder, to / "out"))  # makes `to` where it is missing
    with safe_open(copy / shard, framework="pt") as f:
        tensors, metadata = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()  # noqa: SIM118
    edit(tensors)
    save_file(tensors, copy / shard, metadata=metadata)
    manifest = json.loads((copy / MANIFEST).read_text())
    finish(copy, {}, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    return copy


def shard_of(folder: Path, tensor: str) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return next(file for name, file in index.items() if tensor in name)


def swap_nibbles(tensors: dict[str, Tensor]) -> None:
    for name, words in tensors.items():
        if name.endswith("qweight"):
            count = words.shape[1] * 8
            tensors[name] = pack_last(unpack_last(words, count, AWQ_ORDER))


def zero_scales(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] = torch.zeros_like(tensors[name])


def noise_in_vision(tensors: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    for name, t in tensors.items():
        if name.startswith("visual.") and t.ndim >= 2:
            tensors[name] = (torch.randn(t.shape) * t.float().std()).to(t.dtype)


def test_swapped_nibbles_fail(artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact("awq")
    bad = change(folder, tmp_path, shard_of(folder, "layers.0.mlp"), swap_nibbles)
    assert any("mean_kl" in f for f in checked(bad, FEW).failures)


def test_zeroed_scales_fail_and_the_layer_is_named(artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact("awq")
    for layer in (0, 2):
        shard = shard_of(folder, f"layers.{layer}.mlp")
        failures = checked(change(folder, tmp_path / str(layer), shard, zero_scales), FEW).failures
        assert any("mean_kl" in f for f in failures)
        assert f"decoder layer {layer}" in failures[-1]


def test_a_vision_tower_of_noise_fails(artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact("awq")
    bad = change(folder, tmp_path, shard_of(folder, "visual.blocks"), noise_in_vision)
    result = checked(bad, FEW)
    assert any("mean_kl" in f for f in result.failures)
    assert result.measures["image.mean_kl"] > 10 * result.measures["text.mean_kl"]


def test_a_linear_left_in_16_bit_fails(artifact: Artifact, tmp_path: Path, pebble: Path) -> None:
    def unpack_one(tensors: dict[str, Tensor]) -> None:
        linear = next(n for n in tensors if n.endswith("down_proj.qweight")).removesuffix(".qweight")
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{linear}.{suffix}"]
        with safe_open(pebble / "model.safetensors", framework="pt") as f:
            tensors[f"{linear}.weight"] = f.get_tensor(f"{linear}.weight")

    folder = artifact("awq")
    bad = change(folder, tmp_path, shard_of(folder, "layers.1.mlp"), unpack_one)
    index = json.loads((bad / "model.safetensors.index.json").read_text())
    assert any("coverage" in f for f in checked(bad, FEW).failures), index["metadata"]


def test_another_chat_template_is_noticed(artifact: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact("awq"), tmp_path / "out"))
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ValueError, match="processor"):
        check(
            open_artifact(artifact("awq")).__class__(copy, open_artifact(artifact("awq")).manifest),
            model_folder(),
            samples=list(samples("test", 2)),
            limits=Limits(),
        )


def test_a_missing_chat_template_fails(artifact: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact("awq"), tmp_path / "out"))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(OSError, match=r"chat_template\.jinja: missing"):
        open_artifact(copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    opened = finish(copy, {}, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    with pytest.raises(ValueError, match="no chat template"):
        check(opened, model_folder(), samples=list(samples("test", 2)), limits=Limits())


def test_blind_takes_the_pictures_out() -> None:
    sample = next(samples("test", 1, tasks=["several"]))
    assert sample.images
    unseen = blind(sample)
    assert unseen.images == ()
    assert unseen.answer == sample.answer
    assert all(p["type"] == "text" for m in unseen.messages for p in m["content"])


def test_measures_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    found = compare_logits(p.log(), q.log(), torch.tensor([0, 0]))
    assert found.kl[0] == pytest.approx(0.25 * 0.6931472, abs=1e-6)  # 0.5 ln 2 - 0.25 ln 2
    assert found.kl[1] == 0
    assert found.agree.tolist() == [False, True]
    soft = [
        [x ** (1 / SOFT) / sum(y ** (1 / SOFT) for y in row) for x in row] for row in (p[0].tolist(), q[0].tolist())
    ]
    by_hand = sum(a * math.log(a / b) for a, b in zip(*soft, strict=True)) * SOFT**2
    assert found.soft.tolist() == pytest.approx([by_hand, 0], abs=1e-5)
    ratio = summary([found])["perplexity_ratio"]
    assert ratio == pytest.approx(2**0.5)


def test_one_token_does_not_make_the_softened_measure() -> None:
    """Of a hundred sure tokens one is moved far: the mean KL is that token's; the softened one hears all the others."""
    sure = torch.zeros(100, 50)
    sure[:, 0] = 20.0
    noise = torch.randn(sure.shape, generator=torch.Generator().manual_seed(0))
    moved = sure + noise
    moved[0, 1] = 22.0
    found = compare_logits(sure, moved, torch.zeros(100, dtype=torch.long))
    assert float(found.kl[0] / found.kl.sum()) > 0.99
    assert float(found.soft[0] / found.soft.sum()) < 0.5


def test_the_softened_measure_is_told_and_held_to_a_limit_where_there_is_one(artifact: Artifact) -> None:
    good, rounded = checked(artifact("awq")), checked(artifact("rtn"))
    assert 0 < 5 * good.measures["soft_kl"] < rounded.measures["soft_kl"]
    assert {"image.soft_kl", "text.soft_kl"} <= good.measures.keys()
    assert any(line.startswith("soft_kl is ") for line in rounded.failures)
    shown = {limits.soft_kl: rows(good, limits) for limits in (Limits(), Limits(soft_kl=0.25))}
    told = {bound: next(r for r in found if "temperature 4, times" in r[0])[2] for bound, found in shown.items()}
    assert told == {None: "", 0.25: "<= 0.25"}
    held_out = list(samples("test", 4))
    opened = open_artifact(artifact("rtn"))
    loose = check(opened, model_folder(), samples=held_out, limits=Limits(mean_kl=9, p99_kl=9), max_new_tokens=8)
    assert not any("soft_kl" in line for line in loose.failures)


def test_nan_is_noticed() -> None:
    logits = torch.zeros(1, 3)
    assert not compare_logits(logits, logits * torch.nan, torch.tensor([0])).finite


def test_prefix_and_loops() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
    assert repeats([9, 1, 2, 1, 2, 1, 2, 1, 2])
    assert repeats([5, 7, 7, 7, 7])
    assert not repeats([1, 2, 3, 1, 2, 3, 4])


def test_options_that_would_mean_nothing_are_told(mmq: Callable[..., tuple[int, str, str]]) -> None:
    for words, why in (
        (("check", "out", "--tp", "2"), "--tp is of --engines"),
        (("check", "out", "--engines", "vllm", "--samples", "3"), "--samples means nothing beside --engines"),
        (("bench", "--history", "--card", "4090"), "--card means nothing beside --history"),
    ):
        code, _, said = mmq(*words)
        assert code == 2
        assert why in said
