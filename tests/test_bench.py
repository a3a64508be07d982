"""bench: arithmetic by hand, names and bases found, and real runs of the load generator against the real vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open

from mmq.bench import memory
from mmq.bench.compare import compare, markdown, table, warnings
from mmq.bench.find import find
from mmq.bench.report import (
    Figure,
    Level,
    Ratio,
    Report,
    digest_of,
    markdown_table,
    parse_bytes,
    read_report,
    write_report,
)
from mmq.bench.speed import Load, Run, figures, measure, percentile, read_run
from mmq.recipes.hub import fetch
from mmq.serve.footprint import Footprint
from mmq.serve.running import Server
from mmq.serve.shape import read_shape

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
GIB = 1 << 30
SMALL = Load(requests=4, concurrency=2, input_tokens=16, output_tokens=8, picture=(56, 84), runs=1, warmups=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("24G", 24 * GIB), ("512mib", 512 << 20), ("1.5 Ti", 3 * 2**39)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GB", "24 GiBs", ""])
def test_other_words_are_no_memory(text: str) -> None:
    with pytest.raises(ValueError, match="write 24GiB"):
        parse_bytes(text)


def test_percentiles_are_the_usual_ones() -> None:
    samples = [5.0, 1.0, 9.0, 2.5, 2.5, 7.0]
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(samples, share) == pytest.approx(numpy.percentile(samples, 100 * share))
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


def test_figures_of_runs_by_hand() -> None:
    slow = Run(4.0, (10, 30), (5, 7), (0.1, 0.3), (0.01, 0.03), (1.0, 2.0))
    fast = Run(2.0, (10, 30), (5, 7), (0.2, 0.4), (0.02, 0.04), (1.0, 2.0))
    found = figures([slow, fast])
    assert found["input_rate"] == Figure(15.0, "tok/s", "measured", 10.0, 20.0)
    assert found["output_rate"] == Figure(4.5, "tok/s", "measured", 3.0, 6.0)
    assert found["time"] == Figure(3.0, "s", "measured", 2.0, 4.0)
    assert found["ttft"].value == pytest.approx(250)
    assert found["tpot"].value == pytest.approx(25)
    assert found["ttft_p99"].value == pytest.approx(numpy.percentile([100, 200, 300, 400], 99))


def test_a_failed_request_fails_the_measurement() -> None:
    raw = {"errors": ["", "Traceback\nValueError: too long\n"], "failed": 1, "num_prompts": 2}
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: ValueError: too long"):
        read_run(raw)


def test_what_fits_by_hand(pebble: Path) -> None:
    with safe_open(pebble / "model.safetensors", framework="pt") as f:
        weights = sum(f.get_tensor(name).nbytes for name in f.keys())  # noqa: SIM118, it is no dict
    assert memory.weight_bytes(pebble) == weights
    kv_token = read_shape(pebble).kv_token
    budget = weights * 2
    found = memory.fit(pebble, budget=budget, context=100)
    assert found.cache == int(budget * 0.9) - weights
    tokens = found.cache // kv_token // 16 * 16  # whole blocks
    assert found.max_length == min(tokens, 4096)
    assert found.max_batch == tokens // 100
    told = memory.fit(pebble, budget=budget, context=100, cache_tokens=1250)
    assert (told.max_length, told.max_batch) == (1250, 12)
    small = memory.fit(pebble, budget=weights // 2, context=100)
    assert (small.cache, small.max_length, small.max_batch) == (0, 0, 0)
    with pytest.raises(ValueError, match="context is 0"):
        memory.fit(pebble, budget=budget, context=0)


def test_int4_holds_more_than_its_base(pebble: Path, artifact: Callable[..., Path]) -> None:
    awq = artifact("awq")
    assert memory.weight_bytes(awq) < memory.weight_bytes(pebble)
    assert read_shape(awq).kv_token == read_shape(pebble).kv_token
    budget = memory.weight_bytes(pebble) * 2
    assert (
        memory.fit(awq, budget=budget, context=64).max_batch > memory.fit(pebble, budget=budget, context=64).max_batch
    )


def test_measured_wins_and_is_labelled(pebble: Path) -> None:
    taken = Footprint(resident=5 * GIB, card=None, weights=7 * GIB, cache_tokens=4000)
    computed = memory.figures(pebble, budget=GIB, context=1000, measured=taken)
    assert computed["weights"] == Figure(7 * GIB, "bytes", "measured")
    assert computed["max_batch"].how == "computed"
    measured = memory.figures(pebble, budget=GIB, context=1000, measured=taken, same_budget=True)
    assert measured["max_batch"] == Figure(4, "sequences", "measured")
    assert measured["max_length"] == Figure(4000, "tokens", "measured")
    with pytest.raises(ValueError, match="measured, computed or projected"):
        Figure(1.0, "s", "guessed")


# names


@pytest.fixture
def folder(tmp_path: Path, artifact: Callable[..., Path]) -> Path:
    """A folder as a user has it: an AWQ and a GPTQ artifact, and other things."""
    for method in ("awq", "gptq"):
        (tmp_path / f"out-{method}").symlink_to(artifact(method), target_is_directory=True)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_names_mean_artifacts_and_their_base(folder: Path) -> None:
    found = find(["fp16", "awq", "gptq"], folder=folder)
    assert [s.label for s in found] == ["fp16", "awq", "gptq"]
    assert found[0].path == fetch("pebble").path
    assert found[0].artifact is None
    assert [s.path.name for s in found[1:]] == ["out-awq", "out-gptq"]
    assert [s.path for s in find(["pebble-gptq"], folder=folder)] == [folder / "out-gptq"]
    path = str(folder / "out-awq")
    by_path = find([path, "fp16"], folder=Path("elsewhere"))
    assert [s.label for s in by_path] == ["out-awq", "fp16"]


def test_names_that_mean_nothing_or_too_much(folder: Path, artifact: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no artifact 'bnb' in .*: here are awq, gptq, out-awq, out-gptq and fp16"):
        find(["bnb"], folder=folder)
    with pytest.raises(ValueError, match="each name once"):
        find(["awq", "awq"], folder=folder)
    with pytest.raises(ValueError, match="there is none; `mmq quantize` makes one"):
        find(["awq"], folder=folder / "notes")
    with pytest.raises(ValueError, match="has none; give its path"):
        find(["fp16"], folder=folder / "notes")
    (folder / "second").symlink_to(artifact("awq"), target_is_directory=True)
    with pytest.raises(ValueError, match=r"could be any of .*out-awq, .*second; give the path of one"):
        find(["awq"], folder=folder)
    other = tmp_path / "other"
    shutil.copytree(artifact("awq"), other)
    manifest = json.loads((other / "mmq.json").read_text())
    manifest["base"]["model"] = "someone/else"
    (other / "mmq.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"fp16 could be several bases: .*someone/else and .*out-gptq of pebble"):
        find(["fp16", str(other), "gptq"], folder=folder)


def test_a_damaged_artifact_is_not_skipped(folder: Path, artifact: Callable[..., Path]) -> None:
    broken = folder / "broken"
    shutil.copytree(artifact("awq"), broken)
    (broken / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"broken/config\.json: 2 bytes, the manifest says"):
        find(["gptq"], folder=folder)


def test_digests_tell_checkpoints_apart(pebble: Path, artifact: Callable[..., Path], tmp_path: Path) -> None:
    assert digest_of(artifact("awq")) != digest_of(artifact("gptq"))
    copy = tmp_path / "copy"
    shutil.copytree(pebble, copy)
    assert digest_of(copy) == digest_of(pebble)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert digest_of(copy) != digest_of(pebble)


# reports


def report_of(first: dict[str, Figure], second: dict[str, Figure]) -> Report:
    settings = {"vram": 24 * GIB, "context": 2048, "reserve": 0.1, "load": dataclasses.asdict(Load())}
    subjects = {name: {"path": name, "digest": "d", "command": f"vllm serve {name}"} for name in ("fp16", "awq")}
    machine = {"words": "a machine", "system": "Linux"}
    return Report(
        "bench", "now", "vllm", subjects, {"fp16": first, "awq": second}, {}, settings, machine, {"vllm": "0.32.0"}
    )


def test_the_table_has_a_ratio() -> None:
    def numbers(rate: float, size: float) -> dict[str, Figure]:
        return {
            "output_rate": Figure(rate, "tok/s", "measured", rate * 0.9, rate * 1.3),
            "weights": Figure(size, "bytes", "measured"),
            "max_batch": Figure(size / GIB, "sequences", "computed"),
        }

    report = report_of(numbers(32.49, 15.59 * GIB), numbers(64.98, 6.67 * GIB))
    head, rows = table(report)
    assert head == ["", "fp16", "awq", "awq / fp16"]
    assert rows[0] == ["output tok/s", "32.49", "64.98", "2.00x"]
    assert rows[1] == ["model memory", "15.59 GiB", "6.67 GiB", "0.43x"]
    assert rows[2][0] == "max batch in 24 GiB (2048 tokens each), computed"
    assert markdown_table(head, rows) in markdown(report)
    assert len(warnings(report)) == 2
    assert "when it is quiet" in markdown(report)


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    figure = Figure(32.49, "tok/s", "measured", 30.0, 35.0)
    plain = report_of({"output_rate": figure}, {"output_rate": figure})
    full = dataclasses.replace(
        plain,
        sweep={
            "awq": [Level(1, {"ttft_p90": Figure(3.0, "ms", "measured")}, {"tpot": Ratio(0.8, 0.7, 0.9)}), Level(8, {})]
        },
        ratios={"awq": {"output_rate": Ratio(1.4, 1.3, 1.5, pairs=4), "time": Ratio(0.7, None, None)}},
        stages={"awq": {"prefill": Figure(7.0, "ms", "measured")}},
        memory={"awq": {"cache": Figure(2.0, "bytes", "projected")}},
        quality={"awq": {"measures": {"kl": 0.01}, "layers": [0.1, 0.2], "tasks": {}}},
        answers=[{"picture": "1.png", "question": "图里有什么？", "reference": "a", "answers": {"awq": "a"}}],
        verdicts=["int4 helps"],
    )
    for report in (plain, full):
        data, _ = write_report(report, tmp_path, markdown="")
        back = read_report(data)
        assert back == read_report(tmp_path)
        assert json.loads(json.dumps(dataclasses.asdict(back))) == json.loads(json.dumps(dataclasses.asdict(report)))
        assert back.sweep == report.sweep
        assert back.ratios == report.ratios
    (tmp_path / "report.json").write_text('{"kind": "bench"}')
    with pytest.raises(ValueError, match=r"report\.json is no report of `mmq bench`: .*missing"):
        read_report(tmp_path)
    with pytest.raises(OSError, match=r"no report .*nowhere; `mmq bench"):
        read_report(tmp_path / "nowhere")


@needs_vllm
def test_a_server_is_measured(served: Server, artifact: Callable[..., Path], tmp_path: Path) -> None:
    (run,) = measure(
        served.url, model=served.name, tokenizer=artifact("awq"), load=SMALL, out=tmp_path / "raw", label="awq"
    )
    assert run.output_lens == (SMALL.output_tokens,) * SMALL.requests
    # each prompt has its words, the picture's 56 * 84 / 28**2 tokens and the template's
    assert all(SMALL.input_tokens + 6 < n < SMALL.input_tokens + 60 for n in run.input_lens)
    assert len(run.ttft) == len(run.tpot) == len(run.latency) == SMALL.requests
    for whole, first, further, count in zip(run.latency, run.ttft, run.tpot, run.output_lens, strict=True):
        assert whole == pytest.approx(first + further * (count - 1))
    assert max(run.latency) <= run.seconds
    raw = json.loads((tmp_path / "raw" / "awq-1.json").read_text())
    assert read_run(raw) == run


@needs_vllm
def test_the_generators_own_error_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"`vllm bench serve` failed: .*\bnowhere\b"):
        measure("http://127.0.0.1:1", model="x", tokenizer=tmp_path / "nowhere", load=SMALL, out=tmp_path)


@needs_vllm
@pytest.mark.timeout(400)
def test_fp16_against_awq(folder: Path, tmp_path: Path) -> None:
    report, place = compare(["fp16", "awq"], folder=folder, out=tmp_path / "results", vram=GIB, load=SMALL, context=512)
    numbers = report.numbers
    assert list(numbers) == ["fp16", "awq"]
    for label in numbers:
        assert numbers[label]["output_rate"].value > 0
        assert (place / f"{label}.log").is_file()
        assert (place / f"{label}-1.json").is_file()
        assert len(report.raw[label]["runs"][0]["ttft"]) == SMALL.requests
    assert numbers["awq"]["weights"].value < numbers["fp16"]["weights"].value
    commands = [shown.split(" serve ")[1].split() for shown in (s["command"] for s in report.subjects.values())]
    assert commands[0][0] == "pebble"
    same = [[w for w in words[1:] if w not in numbers and not w.isdigit()] for words in commands]
    assert same[0] == same[1]
    assert "--no-enable-prefix-caching" in same[0]
    assert [row[0] for row in table(report)[1]][:6] == [
        "input tok/s",
        "output tok/s",
        "time (s)",
        "model memory, computed",
        "max length in 1 GiB (tokens), computed",
        "max batch in 1 GiB (512 tokens each), computed",
    ]
    data, text = write_report(report, place, markdown=markdown(report))
    kept = json.loads(data.read_text(encoding="utf-8"))
    assert kept["numbers"]["awq"]["ttft"]["value"] == numbers["awq"]["ttft"].value
    assert kept["versions"]["mmq"]
    assert kept["machine"]["cores"] >= 1
    assert text.read_text(encoding="utf-8").startswith("# fp16 against awq")


def test_a_context_too_long_is_told_before_any_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a context of 8192 tokens is more than awq can do: 4096"):
        compare(["awq"], folder=folder, out=tmp_path / "results", context=8192)
    assert not (tmp_path / "results").exists()


def test_a_load_is_checked() -> None:
    with pytest.raises(ValueError, match="requests of the load is 0"):
        Load(requests=0)
    with pytest.raises(ValueError, match="28 x 28"):
        Load(picture=(10, 10))
