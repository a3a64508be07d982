"""The quality study: its measures on known logits, its settings, its runs that are taken up again, its report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmq.bench import quality
from mmq.bench.backends import BACKENDS
from mmq.bench.measure import SOFT
from mmq.bench.quality import study
from mmq.bench.quality_measure import KINDS, Asked, ask, compare, states
from mmq.bench.quality_report import draw, keep, ratio, rivals, tables, write
from mmq.bench.quality_settings import SETTINGS, UNEVEN
from mmq.bench.quality_variants import THEIRS, VARIANTS, Variant, by_mmq, by_peer
from mmq.quantize.skeleton import build
from mmq.recipes.pebble.tasks import samples
from mmq.recipes.samples import Sample


def asked_of(kinds: Sequence[Sequence[int]], following: Sequence[Sequence[int]]) -> Asked:
    """Held-out samples of which only kinds and tokens matter; token 0 stands before each."""
    plain = [Sample([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], task="t")] * len(kinds)
    inputs = [{"input_ids": torch.tensor([[0, *f]])} for f in following]
    return Asked(tuple(plain), tuple(inputs), tuple(torch.tensor(k) for k in kinds))


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softened(p: Sequence[float]) -> list[float]:
    powers = [x ** (1 / SOFT) for x in p]
    return [x / sum(powers) for x in powers]


def test_measures_are_those_of_the_textbook_by_kind_of_position() -> None:
    """Two tokens and a head that is the identity: states are logits, and every measure can be done by hand."""
    before, after = [0.8, 0.2], [0.6, 0.4]
    a = torch.tensor([before, before, before]).log()
    b = torch.tensor([after, before, after[::-1]]).log()
    found = compare(asked_of([[0, 1, 2]], [[0, 1, 0]]), [a], [b], torch.eye(2))["measures"]
    assert found["answer.kl"] == pytest.approx(kl(before, after), rel=1e-4)
    assert found["image.kl"] == pytest.approx(kl(before, after[::-1]), rel=1e-4)
    assert found["text.kl"] == pytest.approx(0, abs=1e-7)
    assert found["answer.soft"] == pytest.approx(SOFT**2 * kl(softened(before), softened(after)), rel=1e-3)
    assert (found["answer.agree"], found["text.agree"], found["image.agree"]) == (1, 1, 0)
    assert found["text.entropy"] == pytest.approx(-sum(p * math.log(p) for p in before), rel=1e-4)
    error = ((b[0] - a[0]).square().sum() / a[0].square().sum()).item()
    assert found["answer.error"] == pytest.approx(error, rel=1e-4)
    assert [found[f"{k}.tokens"] for k in KINDS] == [1, 1, 1]


def test_a_rounded_head_counts() -> None:
    same = torch.eye(2)
    asked = asked_of([[0, 0]], [[0, 1]])
    assert compare(asked, [same], [same], torch.eye(2))["measures"]["answer.kl"] == 0
    found = compare(asked, [same], [same], torch.eye(2), torch.eye(2) * 2)["measures"]
    assert found["answer.kl"] == pytest.approx(kl(softmax(1, 0), softmax(2, 0)), rel=1e-4)
    assert found["answer.error"] == 0


def softmax(*logits: float) -> list[float]:
    return [math.exp(x) / sum(map(math.exp, logits)) for x in logits]


def test_twenty_tokens_can_make_the_mean_and_not_the_median() -> None:
    a = torch.zeros(100, 2)
    b = a.clone()
    b[:20, 0] = 8.0
    found = compare(asked_of([[0] * 100], [[0] * 100]), [a], [b], torch.eye(2))["measures"]
    assert found["answer.kl_top20_share"] == pytest.approx(1)
    assert found["answer.kl_median"] == 0
    assert found["answer.kl"] > 0.5


def test_a_sample_is_right_when_every_token_of_its_answer_is() -> None:
    a = torch.eye(2)[torch.tensor([0, 1])]
    wrong = torch.eye(2)[torch.tensor([0, 0])]
    both = asked_of([[0, 0], [1, 0]], [[0, 1], [1, 1]])  # of the second sample only the last token is an answer's
    found = compare(both, [a, a], [a, wrong], torch.eye(2))
    assert [s["right"] for s in found["samples"]] == [True, False]
    assert (found["measures"]["right"], found["measures"]["right_fp16"]) == (0.5, 1.0)


def test_kinds_tell_answer_text_and_picture_apart(pebble: Path) -> None:
    base = build(pebble)
    held_out = list(samples("test", 4, seed=9))
    asked = ask(base, held_out)
    pictures = 0
    for sample, inputs, kinds in zip(asked.samples, asked.inputs, asked.kinds, strict=True):
        following = inputs["input_ids"][0, 1:]
        assert kinds.shape == following.shape
        said = base.processor.tokenizer.decode(following[kinds == KINDS.index("answer")], skip_special_tokens=True)
        assert said.strip() == (sample.answer or "").strip()
        here = int((kinds == KINDS.index("image")).sum())
        assert here == int((inputs["input_ids"] == base.module.config.image_token_id).sum())
        pictures += here
    assert pictures > 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: SETTINGS[name](tmp_path_factory.mktemp("settings") / name) for name in ("shipped", "trained", "uneven")
    }


def test_settings_are_one_function_with_other_channels(two: dict[str, Path]) -> None:
    asked = ask(build(two["shipped"]), list(samples("test", 2, seed=9)))
    found = {name: states(build(path), asked) for name, path in two.items()}
    for a, b, c in zip(found["shipped"], found["trained"], found["uneven"], strict=True):
        assert torch.equal(a, b)  # powers of two: to the last bit
        assert float((a - c).norm() / a.norm()) < 0.05  # other numbers, rounded once to the checkpoint's 16 bits
        assert not torch.equal(a, c)
    norms = {name: first_norm(path) for name, path in two.items()}
    assert float((norms["shipped"] / norms["trained"]).max()) >= 16  # what was planted is gone
    octaves = (norms["uneven"] / norms["trained"]).log2()
    assert float(octaves.std()) == pytest.approx(UNEVEN, rel=0.15)


def first_norm(checkpoint: Path) -> Tensor:
    from mmq.quantize.source import open_source

    source = open_source(checkpoint)
    name = next(n for n in source.metas if n.endswith("layers.0.input_layernorm.weight"))
    return source.get(name).float()


def test_a_study_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, *, mark: str = "a") -> Variant:
        rtn = by_mmq(name, method="rtn")

        def quantize(base: Path, calibrated: Sequence[Sample], out: Path) -> object:
            calls.append(name)
            assert len(calibrated) == 4
            return rtn.make(base, calibrated, out)

        return dataclasses.replace(rtn, make=quantize, mark={**rtn.mark, "test": mark})

    def again(*variants: Variant) -> list[dict[str, Any]]:
        calls.clear()
        return study(variants, ["shipped"], [0], out=tmp_path, calibrated=4, held_out=6)

    first = again(counted("one"))
    assert calls == ["one"]
    assert 0 < first[0]["measures"]["image.kl"] < 10
    assert len(first[0]["samples"]) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]  # no artifact is left
    assert again(counted("one")) == json.loads(json.dumps(first))
    assert calls == []
    assert [r["variant"] for r in again(counted("one"), counted("two"))] == ["one", "two"]
    assert calls == ["two"]
    again(counted("one", mark="b"))  # another algorithm under the same name
    assert calls == ["one"]
    monkeypatch.setattr(quality, "SETTINGS", {"shipped": two_layers_swapped})
    again(counted("one", mark="b"))  # another model under the same name
    assert calls == ["one"]


def two_layers_swapped(folder: Path) -> Path:
    """The shipped pebble with two of its norms exchanged: another checkpoint."""
    import shutil

    from safetensors.torch import load_file, save_file

    from mmq.recipes.pebble import model_folder

    shutil.copytree(model_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    names = [n for n in tensors if n.endswith(("layers.0.input_layernorm.weight", "layers.1.input_layernorm.weight"))]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_cannot_be_studied_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of shipped, trained, uneven"):
        study([VARIANTS["rtn"]], ["wild"], [0], out=tmp_path)
    with pytest.raises(ValueError, match="calibration must be one of drawn, text"):
        study([dataclasses.replace(VARIANTS["rtn"], calibration="films")], ["shipped"], [0], out=tmp_path)
    with pytest.raises(ValueError, match="backend autoawq cannot do that"):
        by_peer("autoawq-gptq", "autoawq", method="gptq", symmetric=True)
    assert not list(tmp_path.iterdir())


def test_every_backend_is_in_the_study_once_for_each_thing_it_makes() -> None:
    listed = [(v.mark["backend"], v.mark["method"], v.mark["symmetric"]) for v in THEIRS]
    assert len(set(listed)) == len(listed)
    able = {(name, method, grid) for name, b in BACKENDS.items() for method, grid in b.makes}
    assert able - set(listed) == {("llmcompressor", "awq", True)}
    marks = [json.dumps(v.mark, sort_keys=True) for v in VARIANTS.values()]
    assert len(set(marks)) == len(marks)


@pytest.mark.skipif(os.environ.get("MMQ_TEST_BACKENDS") != "1", reason="MMQ_TEST_BACKENDS=1 runs the real packages")
@pytest.mark.timeout(1800)
def test_a_real_package_is_studied(tmp_path: Path) -> None:
    made = study([VARIANTS["llmcompressor-gptq"]], ["shipped"], [0], out=tmp_path, calibrated=16, held_out=6)
    assert made[0]["mark"]["backend"] == "llmcompressor"
    assert 0 < made[0]["measures"]["image.kl"] < 1


def made_up(variant: str, seed: int, value: float) -> dict[str, Any]:
    measures = {f"{k}.{m}": value for k in KINDS for m in ("kl", "kl_median", "kl_p99", "soft", "error")}
    run = {"setting": "shipped", "variant": variant, "seed": seed, "created": "2026-11-21T00:00:00+00:00"}
    mark = {"versions": {"torch": "2.13.0"}, "test": "0f", "code": "1e"}
    return {**run, "mark": mark, "measures": {**measures, "right": 0.5, "right_fp16": 1.0}, "samples": [{}] * 7}


RUNS = [made_up("awq", 0, 1.0), made_up("awq", 1, 4.0), made_up("best", 0, 0.5), made_up("best", 1, 8.0)]


def test_the_table_says_what_the_runs_say(tmp_path: Path) -> None:
    text = tables(RUNS, against="awq")
    assert "### shipped" in text
    row = next(line for line in text.splitlines() if line.startswith("| awq "))
    assert "2.5 (1..4)" in row
    assert "50.00% of 100.00%" in row
    shares = text.split("As a share of awq's")[1]
    assert next(line for line in shares.splitlines() if line.startswith("| best")).split(" | ")[1] == "1.000"  # 1/2 x 2
    write(RUNS, tmp_path / "quality.md", against="awq")
    written = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert written.startswith("4 runs, calibration seeds 0, 1, 7 held-out samples; torch 2.13.0; 2026-11-21.")
    assert "best other package" not in written
    write(RUNS, tmp_path / "quality.md", against="awq", theirs=["awq"])
    assert "best other package" in (tmp_path / "quality.md").read_text(encoding="utf-8")


def test_ours_beside_the_best_of_theirs() -> None:
    """The best is told by the seeds that all others have: one lucky seed of its own makes no winner."""
    lucky = made_up("lucky", 2, 0.001)
    others = [made_up("lucky", 0, 3.0), lucky, made_up("steady", 0, 2.0), made_up("steady", 1, 8.0)]
    text = rivals([*RUNS, *others], ["best", "absent"], ["lucky", "steady", "never run"], ["answer.kl"])
    assert text.splitlines()[2] == "| shipped | answer.kl | steady | 0.50 (0.25..1.00) |  |"


def test_the_runs_are_kept_in_one_file_without_their_samples(tmp_path: Path) -> None:
    keep(RUNS, tmp_path / "quality.json")
    kept = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert (kept["versions"], kept["test"]) == ({"torch": "2.13.0"}, "0f")
    assert kept["runs"] == [{**r, "mark": {"code": "1e"}, "samples": 7} for r in RUNS]


def test_a_ratio_is_taken_seed_by_seed() -> None:
    mine, other = {0: {"x": 2.0}, 1: {"x": 8.0}, 5: {"x": 100.0}}, {0: {"x": 1.0}, 1: {"x": 1.0}, 7: {"x": 9.0}}
    assert ratio(mine, other, "x") == pytest.approx(4.0)
    assert math.isnan(ratio(mine, {7: {"x": 9.0}}, "x"))
    assert math.isnan(ratio(mine, {0: {"x": 0.0}}, "x"))


def test_a_picture_of_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures: pip install 'mmq-toolkit[study]'")
    (path,) = draw(RUNS, tmp_path)
    first = path.read_text(encoding="utf-8")
    assert path.name == "quality-shipped.svg"
    assert ">best<" in first
    assert ">picture tokens<" in first
    assert draw(RUNS, tmp_path)[0].read_text(encoding="utf-8") == first  # the same bytes


def test_the_command_writes_runs_table_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures: pip install 'mmq-toolkit[study]'")
    few = ["--calibrated", "2", "--held-out", "2", "--seeds", "0", "--settings", "shipped"]
    quality.main(["--out", str(tmp_path), "--variants", "rtn", "rtn-sym", "--against", "rtn", *few])
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "quality-shipped.svg",
        "quality.json",
        "quality.md",
        "shipped.rtn-sym.0.json",
        "shipped.rtn.0.json",
    ]
