"""bench: arithmetic by hand, names and bases found, and real runs of the load generator against the real vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from safetensors import safe_open

from mmq.bench import memory, outcome
from mmq.bench.budget import Budget, budget_of, planned_for, scaled
from mmq.bench.capacity import Trial, max_batch, run
from mmq.bench.compare import compare
from mmq.bench.find import Subject, find
from mmq.bench.hollow import write
from mmq.bench.intervals import ratio, t_quantile, unsure
from mmq.bench.journal import forget_unpaired, open_journal
from mmq.bench.nvml import Card, Spell, begin, open_card, peak_of, taken
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
from mmq.bench.speed import Load, Run, figures, load_here, measures, percentile, read_run
from mmq.bench.table import markdown, sweep_table, table, tails, warnings
from mmq.bench.turns import block_of, levels_of, mode_of, runs_at, saturated, turn, visits
from mmq.bench.variants import Variant, dropped, flags_for, servers
from mmq.export.alone import alone
from mmq.export.convert import convert
from mmq.recipes.hub import fetch
from mmq.recipes.progress import silent
from mmq.serve.bill import Ask, read_model
from mmq.serve.engines import plan
from mmq.serve.flags import Launch
from mmq.serve.footprint import Footprint, group_members
from mmq.serve.machine import Gpu, Machine, this_machine
from mmq.serve.planner import planned
from mmq.serve.running import Server, free_port, running
from mmq.serve.shape import read_shape

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
GIB = 1 << 30
SMALL = Load(requests=4, concurrency=2, input_tokens=16, output_tokens=8, picture=(56, 84), runs=2, warmups=1)


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
    assert found["ttft_p90"].value == pytest.approx(numpy.percentile([100, 200, 300, 400], 90))
    assert found["e2e"].value == pytest.approx(1500)
    assert "itl" not in found
    assert "energy" not in found
    told = dataclasses.replace(fast, itl=(0.01, 0.02, 0.03), joules=36.0)
    assert figures([told])["itl"].value == pytest.approx(20)
    assert figures([told])["energy"] == Figure(3.0, "J/tok", "measured", 3.0, 3.0)
    assert "energy" not in figures([told, slow])
    assert measures(told)["energy"] == 3.0


def test_a_failed_request_fails_the_measurement() -> None:
    raw = {"errors": ["", "Traceback\nValueError: too long\n"], "failed": 1, "num_prompts": 2}
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: ValueError: too long"):
        read_run(raw)


CARD = Gpu("a card", 24 * GIB, 24 * GIB, 8.9)


def test_without_a_bill_a_flat_reserve(pebble: Path) -> None:
    with safe_open(pebble / "model.safetensors", framework="pt") as f:
        weights = sum(f.get_tensor(name).nbytes for name in f.keys())  # noqa: SIM118, it is no dict
    assert memory.weight_bytes(pebble) == weights
    kv_token = read_shape(pebble).kv_token
    card = dataclasses.replace(CARD, memory=weights * 2)
    found = memory.fit(pebble, card=card, context=100, billed=False)
    assert found.cache == int(weights * 2 * 0.9) - weights
    tokens = found.cache // kv_token // 16 * 16  # whole blocks
    assert found.max_length == min(tokens, 4096)
    assert found.max_batch == tokens // 100
    told = memory.fit(pebble, card=card, context=100, billed=False, cache_tokens=1250)
    assert (told.max_length, told.max_batch) == (1250, 12)
    small = memory.fit(pebble, card=dataclasses.replace(CARD, memory=weights // 2), context=100, billed=False)
    assert (small.cache, small.max_length, small.max_batch) == (0, 0, 0)
    with pytest.raises(ValueError, match="context is 0"):
        memory.fit(pebble, card=CARD, context=0)


def test_the_planners_bill_is_what_is_computed(pebble: Path, tmp_path: Path) -> None:
    plan = planned(read_model(pebble), CARD, Ask(context=2048))
    found = memory.fit(pebble, card=CARD, context=2048)
    assert (found.max_batch, found.max_length, found.cache) == (plan.max_batch, plan.max_context, plan.cache)
    parts = memory.stack(found)
    assert list(parts) == list(memory.STACK)
    whole = plan.cache + sum(part.size for part in plan.parts if part.counted)
    assert sum(figure.value for figure in parts.values()) == whole <= 0.9 * CARD.memory
    assert {figure.how for figure in parts.values()} == {"computed"}
    plain = write("qwen2.5-vl-7b", tmp_path / "fp16")
    seven = memory.fit(plain, card=CARD, context=2048, flags=("--max-num-seqs", "8"))
    four = memory.fit(write("qwen2.5-vl-7b", tmp_path / "awq", packed=True), card=CARD, context=2048)
    assert 0 < seven.max_batch < four.max_batch
    assert seven.plan is not None
    assert seven.plan.sequences == 8


def test_what_an_engine_told_wins_in_the_stack(pebble: Path) -> None:
    found = memory.fit(pebble, card=CARD, context=2048, cache_tokens=100_000)
    held = Footprint(resident=None, card=None, weights=GIB, cache_tokens=100_000)
    log = "Graph capturing finished in 3 secs, took 0.50 GiB\ntorch peak memory increase: 0.25GiB"
    parts = memory.stack(found, measured=held, peak=20 * GIB, log=log)
    assert parts["weights"] == Figure(GIB, "bytes", "measured")
    assert parts["cache"] == Figure(100_000 * found.kv_token, "bytes", "measured")
    assert (parts["graphs"].value, parts["activations"].value) == (GIB // 2, GIB // 4)
    assert sum(figure.value for figure in parts.values()) == 20 * GIB
    assert {figure.how for figure in parts.values()} == {"measured"}
    less = memory.stack(found, measured=held, peak=20 * GIB, log=log.splitlines()[0])
    assert list(less) == ["weights", "cache", "graphs", "other"]  # of activations only the bill spoke
    assert sum(figure.value for figure in less.values()) == 20 * GIB


def test_measured_weights_are_labelled(pebble: Path) -> None:
    taken = Footprint(resident=5 * GIB, card=None, weights=7 * GIB, cache_tokens=4000)
    found = memory.figures(memory.fit(pebble, card=CARD, context=1000), measured=taken, peak=9 * GIB)
    assert found["weights"] == Figure(7 * GIB, "bytes", "measured")
    assert found["peak_memory"] == Figure(9 * GIB, "bytes", "measured")
    assert found["max_batch"].how == "computed"
    with pytest.raises(ValueError, match="measured, computed or projected"):
        Figure(1.0, "s", "guessed")


# ratios, turns


def test_student_s_quantiles_are_the_printed_ones() -> None:
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)):
        assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-4)


def test_a_ratio_of_pairs_has_an_interval_that_drift_does_not_widen() -> None:
    first = [10.0, 12.0, 15.0, 11.0]  # the machine changes, for both alike
    found = ratio(first, [1.5 * value for value in first])
    assert found.value == found.low == found.high == pytest.approx(1.5)
    assert found.pairs == 4
    noisy = ratio([10.0, 10.0, 10.0], [10.0, 20.0, 8.0])
    logs = numpy.log([1.0, 2.0, 0.8])
    half = 4.30265 * logs.std(ddof=1) / 3**0.5
    assert noisy.low == pytest.approx(numpy.exp(logs.mean() - half), rel=1e-4)
    assert noisy.high == pytest.approx(numpy.exp(logs.mean() + half), rel=1e-4)
    assert unsure(noisy)
    assert not unsure(found)
    assert not unsure(ratio([10.0, 10.1, 10.0, 10.1], [10.1, 10.0, 10.1, 10.0]))  # the same, and sure of it
    for single in (ratio([10.0], [12.0]), ratio([10.0, 11.0], [12.0, 13.0], paired=False)):
        assert (single.low, single.high) == (None, None)
    with pytest.raises(ValueError, match="2 and 1 runs are no pairs"):
        ratio([1.0, 2.0], [1.0])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = numpy.random.default_rng(0)
    held = 0
    for _ in range(400):
        drift = random.normal(0, 0.5, 5)  # of the machine, shared by a pair
        first, second = (numpy.exp(drift + random.normal(at, 0.05, 5)) for at in (0.0, 0.2))
        found = ratio(list(first), list(second))
        held += (found.low or 0) <= numpy.exp(0.2) <= (found.high or 9)
    assert 0.92 <= held / 400 <= 0.98


def test_runs_of_one_start_are_one_observation() -> None:
    """What a start brings is in all of its runs: taken as five pairs they would be far surer than they are."""
    random = numpy.random.default_rng(0)
    blocks = [block_of("restart", number) for number in range(6)]
    held = {True: 0, False: 0}
    for _ in range(400):
        brought = random.normal(0, 0.03, 3)[blocks]  # by the start
        logs = brought + random.normal(0.2, 0.01, 6)
        for together in held:
            found = ratio([1.0] * 6, list(numpy.exp(logs)), blocks=blocks if together else None)
            assert found.pairs == (3 if together else 6)
            held[together] += (found.low or 9) <= numpy.exp(0.2) <= (found.high or 0)
    assert 0.92 <= held[True] / 400 <= 0.98
    assert held[False] / 400 < 0.9
    assert ratio([1.0] * 2, [2.0] * 2, blocks=[0, 0]).low is None


def test_whose_turn_it_is() -> None:
    assert visits("together", ["a", "b"], 3) == [(("a", "b"), (0, 1, 2))]
    assert visits("off", ["a", "b"], 2) == [(("a",), (0, 1)), (("b",), (0, 1))]
    started = visits("restart", ["a", "b"], 5)
    assert [label for (label,), _ in started] == ["a", "b", "b", "a", "a", "b"]  # who is first is not always so
    assert [numbers for _, numbers in started] == [(0, 3), (0, 3), (1, 4), (1, 4), (2,), (2,)]
    assert visits("restart", ["a", "b"], 1) == [(("a",), (0,)), (("b",), (0,))]
    assert [turn("abc", number) for number in (0, 1, 2)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
    assert [block_of("restart", number) for number in range(5)] == [0, 1, 2, 0, 1]
    assert [block_of("together", number) for number in range(3)] == [0, 1, 2]
    assert mode_of("auto", many=2, fit=lambda: True) == "together"
    assert mode_of("auto", many=2, fit=lambda: False) == "restart"
    assert mode_of("restart", many=2, fit=lambda: True) == "restart"
    assert mode_of("together", many=1, fit=lambda: True) == "off"
    with pytest.raises(ValueError, match="known are auto, together, restart, off"):
        mode_of("sometimes", many=2, fit=lambda: True)


def test_levels_and_saturation() -> None:
    load = Load(concurrency=4, runs=5)
    assert levels_of(load, None)[:4] == (1, 4, 8, 32)
    assert levels_of(load, (16, 2)) == (2, 4, 16)
    assert levels_of(load, ()) == (4,)
    assert (runs_at(load, 4), runs_at(load, 8)) == (5, 3)
    assert load.at(32).requests == 128
    assert load.at(4) == load
    with pytest.raises(ValueError, match="a sweep at 0"):
        levels_of(load, (0, 2))
    assert saturated({"a": 100.0, "b": 50.0}, {"a": 104.0, "b": 40.0})
    assert not saturated({"a": 100.0, "b": 50.0}, {"a": 100.0, "b": 60.0})
    assert not saturated({}, {"a": 1.0})


# a budget, what the card saw


def test_a_stated_card_on_another_one(tmp_path: Path) -> None:
    big = Machine("a processor", 8, 64 * GIB, 64 * GIB, False, (Gpu("H100", 80 * GIB, 79 * GIB, 9.0),))
    held = budget_of(big, "vllm", card="4090")
    assert held.enforced
    assert held.factor == pytest.approx(24 / 80)
    assert planned_for(big, held).gpus == (held.card,)
    launch = Launch(("vllm", "serve", "x", "--gpu-memory-utilization", "0.90"), {}, (), "", "", "", 1, "cuda")
    assert scaled(launch, 24 / 80).argv[-1] == "0.270000"
    folder = write("qwen2-vl-2b", tmp_path / "2b")
    flags = flags_for(folder, "vllm", held, Load(), 2, ("--max-num-seqs", "8"))
    assert flags == (
        *("--no-enable-prefix-caching", "--max-num-batched-tokens", "2048", "--max-model-len", "auto"),
        *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--max-num-seqs", "8"),
    )
    for machine, engine, why in (
        (dataclasses.replace(big, gpus=()), "vllm", "no GPU is here"),
        (big, "lmdeploy", "lmdeploy has no setting"),
        (dataclasses.replace(big, gpus=(Gpu("T4", 15 * GIB, 15 * GIB, 7.5),)), "vllm", "T4 has 15.0 GiB"),
        (dataclasses.replace(big, gpus=(Gpu("H100", 80 * GIB, 9 * GIB, 9.0),)), "vllm", "9.0 GiB are free"),
    ):
        free = budget_of(machine, engine, vram=24 * GIB)
        assert not free.enforced
        assert why in free.why
        assert planned_for(machine, free) == machine
    itself = budget_of(dataclasses.replace(big, gpus=(Gpu("4090", 24564 << 20, 24000 << 20, 8.9),)), "vllm")
    assert itself.factor == 1.0
    with pytest.raises(ValueError, match="--vram or --card"):
        budget_of(big, "vllm", vram=GIB, card="4090")


def test_the_peak_of_one_of_two_servers() -> None:
    """A start that needs more than it keeps, a run that grows it, a run that does not."""
    spells = [Spell(10, 14, None), Spell(2, 3, 5.0), Spell(0, 1, 5.0)]
    assert peak_of(spells) == 14
    assert peak_of([*spells, Spell(1, 5, None)]) == 17
    assert peak_of([]) == 0


def test_joules_of_a_part_of_a_spell() -> None:
    meter = [(10.0, 100.0), (11.0, 200.0), (12.0, 500.0)]
    assert taken(meter) == 400.0
    assert taken(meter, (10.5, 11.5)) == pytest.approx(200.0)
    assert taken(meter, (9.0, 99.0)) == 400.0
    assert taken([(10.0, None), (11.0, 200.0)]) is None


def test_a_card_is_watched() -> None:
    """Every look at this card finds a byte more and a joule more; at its highest it was ten bytes higher."""
    looks: list[int] = []

    def memory_now(handle: object) -> SimpleNamespace:
        looks.append(1)
        return SimpleNamespace(used=100 + len(looks) + (10 if len(looks) == 3 else 0))

    nvml = SimpleNamespace(
        nvmlDeviceGetMemoryInfo=memory_now,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1000 * len(looks),
        NVMLError=RuntimeError,
    )
    end = begin(Card(nvml, None))
    while len(looks) < 4:
        time.sleep(0.01)
    spell = end()
    assert spell is not None
    assert spell.grew == len(looks) - 1
    assert spell.peak >= 12
    assert spell.joules == len(looks) - 1
    assert begin(None)() is None
    assert open_card()[1]  # here is none, and it says why


# what it comes to


def raw_run(rate: float) -> dict[str, Any]:
    """The generator's file of two requests of four tokens each, at `rate` tok/s."""
    seconds = 8 / rate
    return {
        "errors": ["", ""],
        "failed": 0,
        "num_prompts": 2,
        "duration": seconds,
        "input_lens": [10, 10],
        "output_lens": [4, 4],
        "ttfts": [seconds / 4, seconds / 4],
        "itls": [[seconds / 4] * 3] * 2,
        "start_times": [1.0, 1.0],
    }


def test_a_report_is_made_of_a_journal(pebble: Path, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """As a GPU with a budget would have written it: measured capacity, the peak, energy; one variant was put off."""
    load = Load(requests=2, concurrency=2, runs=2)
    budget = Budget(24 * GIB, Gpu("GeForce RTX 4090", 24 * GIB, 24 * GIB, 8.9), 0.3)
    variants, paths = [], {"fp16": pebble, "awq": artifact("awq")}
    journal = open_journal(tmp_path, {}, created="now", labels=list(paths))
    for label, path in paths.items():
        argv = ("vllm", "serve", str(path), "--port", "1", "--max-num-seqs", "26")
        launch = Launch(argv, {}, (), "", label, "", 1, "cuda")
        variants.append(Variant(Subject(label, path, None, label), launch, lambda launch=launch: launch, ()))
        journal.add("start", label=label, seconds=9.0, spell=dataclasses.asdict(Spell(20 * GIB, 21 * GIB, None)))
        for concurrency, number in ((1, 0), (2, 0), (2, 1)):
            rate = (10.0 + number) * (2 if label == "awq" else 1)
            (journal.place / f"{label}-{concurrency}-{number}.json").write_text(json.dumps(raw_run(rate)))
            spell = dataclasses.asdict(Spell(0, GIB, 40.0))
            facts = run_line(label, number, concurrency) | {"file": f"{label}-{concurrency}-{number}.json"}
            journal.add("run", **facts, spell=spell)
        trial = {"sequences": 26, "tokens": 2048, "together": 26, "cache": 0.99, "preemptions": 0, "seconds": 1.0}
        off = trial | {"sequences": 25, "preemptions": 3}
        journal.add("max_batch", label=label, trials=[off, trial] if label == "fp16" else [off], spell=None)
        longest = trial | {"sequences": 1, "tokens": 4096, "together": 1}
        journal.add("max_length", label=label, trials=[longest], spell=dataclasses.asdict(Spell(0, 5 * GIB, None)))
        held = Footprint(resident=None, card=None, weights=GIB, cache_tokens=60_000)
        journal.add("footprint", label=label, footprint=dataclasses.asdict(held))
    told = {label: {"path": label, "digest": "d", "command": "c"} for label in paths}
    how: dict[str, Any] = {"engine": "vllm", "budget": budget, "load": load, "context": 2048, "mode": "together"}
    how |= {"failed": {}, "dark": "", "earlier": 3, "created": "now"}
    how |= {"machine": {"words": "a machine", "system": "Linux"}}
    report = outcome.report(journal, variants, told, **how)
    fp16, awq = report.numbers["fp16"], report.numbers["awq"]
    assert "3 runs were made before this command, which took them up; --fresh measures all anew" in warnings(report)
    assert fp16["max_batch"] == Figure(26, "sequences", "measured")
    assert awq["max_batch"] == Figure(60_000 // 2048, "sequences", "computed")
    assert "awq: 25 x 2048 tokens met 3 preemptions; its max batch is the cache's size only" in warnings(report)
    assert any(line.startswith("fp16: 26 at once is the engine's own limit") for line in warnings(report))
    assert fp16["max_length"] == Figure(4096, "tokens", "measured")
    assert fp16["peak_memory"] == Figure(25 * GIB, "bytes", "measured")
    assert "fp16 took 1.04 times the budget at its peak, as NVML saw it" in warnings(report)
    assert fp16["energy"].value == 5.0
    assert [level.concurrency for level in report.sweep["awq"]] == [1, 2]
    assert report.ratios["awq"]["output_rate"].value == pytest.approx(2.0)
    assert report.ratios["awq"]["output_rate"].pairs == 2
    assert "fp16" not in report.ratios
    parts = report.memory["awq"]
    assert sum(figure.value for figure in parts.values()) == 25 * GIB
    assert parts["cache"].how == parts["weights"].how == "measured"
    words = markdown(report)
    assert "the engine was given 24 GiB (GeForce RTX 4090) of this card; at its peak NVML saw fp16 25 GiB" in words
    assert "speed and energy do not" in words


# a journal


def run_line(label: str, number: int, concurrency: int = 4) -> dict[str, object]:
    return {"label": label, "number": number, "concurrency": concurrency, "file": "x.json", "output_rate": 1.0}


def test_a_run_that_broke_off_is_taken_up(tmp_path: Path) -> None:
    asked = {"load": {"picture": (56, 84)}, "engine": "vllm"}
    first = open_journal(tmp_path, asked, created="2026-11-21T10:00:00", labels=["fp16", "awq"])
    assert first.place.name == "20261121T100000-fp16-awq"
    for label, number in (("fp16", 0), ("awq", 0), ("fp16", 1)):
        first.add("run", **run_line(label, number))
    with (first.place / "journal.jsonl").open("a") as file:
        file.write('{"kind": "run", "la')  # killed while it wrote
    again = open_journal(tmp_path, asked, created="2026-11-21T11:00:00", labels=["fp16", "awq"])
    assert again.place == first.place
    assert again.lines == first.lines
    forget_unpaired(again, ["fp16", "awq"])
    assert [(line["label"], line["number"]) for line in again.found("run")] == [("fp16", 0), ("awq", 0)]
    again.add("run", **run_line("fp16", 1))
    assert len(open_journal(tmp_path, asked, created="now", labels=["fp16"]).found("run", label="fp16")) == 3
    for changed, fresh in ((asked | {"engine": "pytorch"}, False), (asked, True)):
        other = open_journal(tmp_path, changed, created="2026-11-21T11:00:00", labels=["fp16", "awq"], fresh=fresh)
        assert other.place != first.place
        assert not other.lines
        shutil.rmtree(other.place)
    (first.place / "report.json").write_text("{}")
    assert open_journal(tmp_path, asked, created="later", labels=["awq"]).place.name == "later-awq"


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


def test_folders_of_one_name_are_told_apart(folder: Path, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """A label is a column, a server's name and a file's: two with one would be one."""
    days = [tmp_path / day / "out-awq" for day in ("monday", "tuesday")]
    for place in days:
        shutil.copytree(artifact("awq"), place)
    found = find([*map(str, days), "gptq"], folder=folder)
    assert [s.label for s in found] == ["monday-out-awq", "tuesday-out-awq", "gptq"]
    with pytest.raises(ValueError, match="cannot be told apart"):
        find([str(days[0]), f"{days[0]}/"], folder=folder)


def test_a_conversion_does_not_make_a_name_ambiguous(folder: Path, artifact: Callable[..., Path]) -> None:
    """`mmq convert out-awq --format compressed-tensors`, then `mmq bench --compare fp16 awq`."""
    other = folder / "out-awq-compressed-tensors"
    convert(artifact("awq"), other, format="compressed-tensors")
    assert [s.path for s in find(["awq"], folder=folder)] == [folder / "out-awq"]
    assert [s.path for s in find(["compressed-tensors"], folder=folder)] == [other]


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
    settings = {"vram": 24 * GIB, "context": 2048, "load": dataclasses.asdict(Load())}
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


def test_a_sweep_is_a_row_a_level_and_noise_is_called_so() -> None:
    rate = {"output_rate": Figure(100.0, "tok/s", "measured", 99.0, 101.0), "ttft_p99": Figure(7.0, "ms", "measured")}
    report = report_of(rate, rate)
    report = dataclasses.replace(
        report,
        sweep={label: [Level(1, rate), Level(8, {"output_rate": rate["output_rate"]})] for label in ("fp16", "awq")},
        ratios={"awq": {"output_rate": Ratio(1.2, 0.01, 90.0, pairs=2)}},
    )
    head, rows = sweep_table(report, brief=True)
    assert head == ["at once", "output tok/s", "TTFT", "p99", "TPOT", "p99", "E2E", "p99"]
    assert rows[0] == ["fp16, 1", "100.0", "-", "7.00", "-", "-", "-", "-"]
    assert [row[0] for row in rows] == ["fp16, 1", "fp16, 8", "awq, 1", "awq, 8"]
    assert len(sweep_table(report)[0]) == 11
    assert table(report)[1][0][-1] == "1.20x (noise)"
    assert any(line.startswith("too noisy to say whether awq or fp16 is faster") for line in warnings(report))
    sure = dataclasses.replace(report, ratios={"awq": {"output_rate": Ratio(1.2, 1.1, 1.3, pairs=5)}})
    assert table(sure)[1][0][-1] == "1.20x (1.10 to 1.30)"
    assert not warnings(sure)
    assert "## Latency against load" in markdown(sure)
    assert "p99 is little else" not in markdown(sure)
    quick = {**sure.settings, "load": dataclasses.asdict(Load(requests=32, runs=3)), "levels": [1, 8]}
    few = dataclasses.replace(sure, settings=quick)
    assert tails(few) == "Of 96 requests a p99 is little else than the slowest."
    assert "Of 24 requests, as one level has, a p99 is little else than the slowest." in markdown(few)
    failed = dataclasses.replace(sure, settings={**sure.settings, "failed": {"gptq": "no room"}})
    assert warnings(failed) == ["gptq failed: no room"]


def stub(tmp_path: Path, name: str, code: str) -> Variant:
    """A variant whose engine is a few lines of Python."""
    port = free_port()
    argv = (sys.executable, "-c", code, str(port))
    launch = Launch(argv, {}, (), f"http://127.0.0.1:{port}", name, "127.0.0.1", port, "cpu")
    return Variant(Subject(name, tmp_path, None, name), launch, lambda: launch, ())


ALIVE = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
DEAD = "raise RuntimeError('no room for weights')"


def gone(server: Server) -> bool:
    return not group_members(server.pid)


def test_a_variant_that_dies_leaves_the_others(tmp_path: Path) -> None:
    failed: dict[str, str] = {}
    variants = [stub(tmp_path, "a", ALIVE), stub(tmp_path, "b", DEAD), stub(tmp_path, "c", ALIVE)]
    options: dict[str, Any] = {"place": tmp_path, "timeout": 30, "card": None, "tell": silent}
    with servers(variants, failed=lambda label, e: failed.update({label: str(e)}), **options) as ups:
        assert list(ups) == ["a", "c"]
        assert "no room for weights" in failed["b"]
        first, last = ups["a"].server, ups["c"].server
        os.kill(first.pid, signal.SIGKILL)
        died = dropped(ups, "a", RuntimeError("4 of 4 requests failed"))
        assert "it was killed (SIGKILL)" in str(died)
        assert list(ups) == ["c"]
        assert not gone(last)
    assert gone(last)


def test_ctrl_c_ends_every_server(tmp_path: Path) -> None:
    variants = [stub(tmp_path, name, ALIVE) for name in "ab"]
    up: list[Server] = []
    options: dict[str, Any] = {"place": tmp_path, "timeout": 30, "card": None, "tell": silent, "failed": print}
    with pytest.raises(KeyboardInterrupt), servers(variants, **options) as ups:  # noqa: PT012
        up += [one.server for one in ups.values()]
        signal.raise_signal(signal.SIGINT)
    assert len(up) == 2
    assert all(map(gone, up))


@needs_vllm
@pytest.mark.timeout(900)
def test_fp16_against_awq(folder: Path, tmp_path: Path) -> None:
    """Two servers up at once, in turns, with so small a cache that its capacity can be run."""
    asked: dict[str, Any] = {"folder": folder, "out": tmp_path / "results", "load": SMALL, "context": 512}
    asked |= {"answers": 2, "sweep": (1,), "capacity": True, "vram": GIB, "extra": ("--num-gpu-blocks-override", "30")}
    report, place = compare(["fp16", "awq"], **asked)
    numbers = report.numbers
    assert list(numbers) == ["fp16", "awq"]
    assert report.settings["interleave"]["mode"] == "together"
    assert not report.settings["failed"]
    for label in numbers:
        assert numbers[label]["output_rate"].value > 0
        assert (place / f"{label}.log").is_file()
        assert (place / f"{label}-2-1.json").is_file()
        assert len(report.raw[label]["runs"]) == SMALL.runs
        assert len(report.raw[label]["runs"][0]["ttft"]) == SMALL.requests
        assert [level.concurrency for level in report.sweep[label]] == [1, 2]
        (batch,) = [line for line in report.raw[label]["journal"] if line["kind"] == "max_batch"]
        trial = Trial(**batch["trials"][-1])
        assert trial.fine, trial.words
        assert trial.sequences >= 2
        assert trial.tokens == 512
        assert 0.5 < trial.cache <= 1
        (longest,) = [line for line in report.raw[label]["journal"] if line["kind"] == "max_length"]
        assert Trial(**longest["trials"][-1]).fine
        assert (longest["trials"][-1]["sequences"], longest["trials"][-1]["tokens"]) == (1, 512)
        assert report.stages[label]["decode"].value > 0
        assert numbers[label]["max_batch"].how == "computed"  # of 1 GiB of a card, which is not here
    assert report.ratios["awq"]["output_rate"].pairs == SMALL.runs
    assert report.ratios["awq"]["output_rate"].low is not None
    lines = [json.loads(line) for line in (place / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    order = [line["label"] for line in lines if line["kind"] == "run" and line["concurrency"] == SMALL.concurrency]
    assert order == ["fp16", "awq", "awq", "fp16"]
    assert numbers["awq"]["weights"].value < numbers["fp16"]["weights"].value
    commands = [shown.split(" serve ")[1].split() for shown in (s["command"] for s in report.subjects.values())]
    assert commands[0][0] == "pebble"
    same = [[w for w in words[1:] if w not in numbers and not w.isdigit()] for words in commands]
    assert same[0] == same[1]
    assert "--no-enable-prefix-caching" in same[0]
    assert [row[0] for row in table(report)[1]][:4] == [
        "input tok/s",
        "output tok/s",
        "time (s)",
        "model memory, computed",
    ]
    assert report.settings["stages"]["output_tokens"] == SMALL.output_tokens
    assert [list(one["answers"]) for one in report.answers] == [["fp16", "awq"]] * 2
    assert all((place / one["picture"]).is_file() for one in report.answers)
    assert any(said.startswith("awq takes 0.") and "memory of fp16" in said for said in report.verdicts)
    assert any("cannot say: not checked; mmq check " in said for said in report.verdicts)
    before = (place / "journal.jsonl").read_text(encoding="utf-8")
    again, same_place = compare(["fp16", "awq"], **asked)  # all is measured: nothing is started
    assert same_place == place
    assert (place / "journal.jsonl").read_text(encoding="utf-8") == before
    assert again.numbers == report.numbers
    assert again.answers == report.answers
    assert [line.startswith("8 runs were made before") for line in warnings(again)].count(True) == 1
    assert not any("were made before" in line for line in warnings(report))
    data, text = write_report(report, place, markdown=markdown(report))
    with pytest.raises(OSError, match=rf"no report .*; the newest below it is .*{place.name}"):
        read_report(place.parent)
    kept = json.loads(data.read_text(encoding="utf-8"))
    assert kept["numbers"]["awq"]["ttft"]["value"] == numbers["awq"]["ttft"].value
    assert kept["versions"]["mmq"]
    assert kept["machine"]["cores"] >= 1
    assert text.read_text(encoding="utf-8").startswith("# fp16 against awq")


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_dies_leaves_the_others_figures(folder: Path, pebble: Path, tmp_path: Path) -> None:
    """The real engine refuses a checkpoint that lacks a layer's weights; the artifact beside it is measured, started
    twice, and the folder's name says who was asked."""
    broken = tmp_path / "broken"
    shutil.copytree(pebble, broken)
    config = json.loads((broken / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] += 1
    text.pop("layer_types", None)
    (broken / "config.json").write_text(json.dumps(config))
    asked: dict[str, Any] = {"folder": folder, "out": tmp_path / "results", "load": SMALL, "sweep": (), "stages": False}
    report, place = compare([str(broken), "awq"], interleave="restart", **asked)
    assert list(report.numbers) == ["awq"]
    assert list(report.settings["failed"]) == ["broken"]
    assert "the engine died at its start" in report.settings["failed"]["broken"]
    assert "broken failed: the engine died" in markdown(report)
    assert len(report.raw["awq"]["runs"]) == SMALL.runs
    assert report.settings["interleave"]["starts"] == {"awq": 2}
    assert place.name.endswith("-broken-awq")


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_sequences_than_the_cache_holds_are_told(artifact: Callable[..., Path]) -> None:
    """The real server put off sequences: a run beyond its capacity is no answer."""
    extra = ("--num-gpu-blocks-override", "30", "--no-enable-prefix-caching")
    launch = plan("vllm", artifact("awq"), machine=this_machine(), port=free_port(), max_model_len=512, extra=extra)
    with running(launch, timeout=300) as server:
        fits = max_batch(server.url, model=server.name, context=512)[-1]
        assert fits.fine, fits.words
        beyond = run(server.url, model=server.name, sequences=fits.sequences + 4, prompt=312, out=200)
        assert not beyond.fine
        assert beyond.preemptions or beyond.together < beyond.sequences


@needs_vllm
def test_two_do_not_measure_in_one_folder(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"folder": folder, "out": tmp_path / "r", "load": SMALL, "stages": False, "timeout": 0.1}
    with pytest.raises(RuntimeError):  # no engine is up so soon: the folder is left to be taken up
        compare(["awq"], **asked)
    (place,) = (tmp_path / "r").iterdir()
    kept = (place / "journal.jsonl").read_text(encoding="utf-8")
    with (
        alone(place, "mmq bench"),
        pytest.raises(ValueError, match=r"another `mmq bench` works in .*-awq; wait"),
    ):
        compare(["awq"], **asked)
    assert (place / "journal.jsonl").read_text(encoding="utf-8") == kept


def test_a_context_too_long_is_told_before_any_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a context of 8192 tokens is more than awq can do: 4096"):
        compare(["awq"], folder=folder, out=tmp_path / "results", context=8192)
    assert not (tmp_path / "results").exists()


def test_a_quick_load_fills_its_places_often_enough() -> None:
    quick, usual = load_here(quick=True), load_here()
    assert 4 * quick.concurrency <= quick.requests <= usual.requests
    assert (quick.runs, quick.warmups) == (usual.runs, 1)
    assert load_here(quick=True, requests=3, runs=None).requests == 3


def test_a_load_is_checked() -> None:
    with pytest.raises(ValueError, match="requests of the load is 0"):
        Load(requests=0)
    with pytest.raises(ValueError, match="28 x 28"):
        Load(picture=(10, 10))
