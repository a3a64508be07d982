"""The pages: their links lead somewhere, their commands exist, their tables are those of the files they name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mmq.__main__ import cli
from mmq.bench.quality_report import by_variant, rivals, tables
from mmq.bench.quality_variants import THEIRS
from mmq.bench.quantizer_measure import Run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [*sorted((ROOT / ".github").rglob("*.md")), ROOT / "recipes" / "pebble" / "README.md"]
QUALITY = ROOT / "docs" / "quality"
# What a name in the summary's table is called in the files; the files in which it is looked up, the first that has it.
NAMED = {
    "mmq awq, best": "awq-best",
    "mmq gptq, best": "gptq-best",
    "mmq awq (default)": "awq",
    "mmq gptq": "gptq",
    "mmq gptq, fast": "gptq-fast",
    "mmq awq, fast": "awq-fast",
    "AutoRound, asymmetric": "auto-round-asym",
    "AutoRound (symmetric, its default)": "auto-round",
    "AutoGPTQ": "auto-gptq",
    "AutoAWQ": "autoawq",
    "llm-compressor GPTQ": "llmcompressor-gptq",
    "llm-compressor AWQ": "llmcompressor-awq",
    "GPTQModel GPTQ": "gptqmodel-gptq",
    "GPTQModel AWQ": "gptqmodel-awq",
    "rounding to nearest": "rtn",
}


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Each `mmq ...` of a page as words, and whether it is a line to be typed, not one that is only spoken of."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for line in text.splitlines():
        typed = re.match(r"(?:\s{4,}|\$ )(?:[A-Z_]+=\S+ )*(mmq [a-z].*)$", line)
        for code in [typed[1]] if typed else re.findall(r"`(?:[A-Z_]+=\S+ )*(mmq [a-z][^`]*)`", line):
            words = shlex.split(code, comments=True)
            ends = [i for i, w in enumerate(words) if w in ("|", ">", "2>", "&", "&&")]
            yield words[1 : ends[0] if ends else None], bool(typed)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_are_taken(page: Path) -> None:
    """Parsed by the command line as it is; nothing runs. `mmq serve` in a sentence needs no TARGET."""
    for (name, *words), typed in commands(page):
        # "`mmq bench --tasks` lets ...": values are left out there, and an option may be taken for one
        spoken = (click.MissingParameter, click.BadOptionUsage, click.BadParameter)
        with contextlib.suppress(*(() if typed else spoken)), cli.commands[name].make_context(name, words):
            pass


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_have_the_options_that_they_are_given(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for module, rest in re.findall(r"-m mmq\.([\w.]+)([^`\n|;]*)", text):
        source = ROOT / f"{module.replace('.', '/')}.py"
        assert source.is_file(), module
        known = set(re.findall(r'"(--[\w-]+)"', source.read_text(encoding="utf-8")))
        assert set(re.findall(r"(?<=\s|\[)--[\w-]+", rest)) - {"--enforce-eager"} <= known, (module, rest)


def rows(text: str) -> list[str]:
    return ["|".join(c.strip() for c in line.split("|")) for line in text.splitlines() if line.startswith("|")]


def runs(name: str) -> list[dict]:
    return json.loads((QUALITY / f"{name}.json").read_text(encoding="utf-8"))["runs"]


def test_the_study_s_tables_are_those_of_its_runs() -> None:
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    theirs = [v.name for v in THEIRS]
    made = set()
    for name, against in (("quality", "awq-fast"), ("groups", "awq"), ("calibration", "awq"), ("head", "awq")):
        found = runs(name)
        made |= set(rows(tables(found, against=against).replace("\\_", "_")))
        names = list(dict.fromkeys(r["variant"] for r in found))
        if others := [n for n in names if n in theirs]:
            made |= set(rows(rivals(found, [n for n in names if n not in theirs], others).replace("\\_", "_")))
    shown = [r for r in rows(page) if re.search(r"\d\.\.\d", r)]
    assert len(shown) > 90
    assert not [r for r in shown if r not in made]


def test_the_study_s_summary_is_of_the_files_it_names() -> None:
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8").partition("## In short")[2].partition("\n## ")[0]
    files = [runs("since"), runs("quality")]
    told = 0
    for _, name, *figures, _ in (r.replace("*", "").replace("`", "").split("|") for r in rows(page)):
        if name.strip() not in NAMED:
            continue
        for setting, figure in zip(("trained", "shipped", "uneven"), figures, strict=True):
            seeds = next(
                v[NAMED[name.strip()]] for v in (by_variant(f, setting) for f in files) if NAMED[name.strip()] in v
            )
            mean = statistics.fmean(m["answer.soft"] for m in seeds.values())
            assert float(figure) == pytest.approx(mean, abs=0.0051 if mean > 1 else 0.00051), (name, setting)
            told += 1
    assert told == 3 * len(NAMED)


def bench(name: str) -> dict:
    return json.loads((ROOT / "docs" / "bench" / f"{name}.json").read_text(encoding="utf-8"))


def quantized(name: str, number: int) -> Run:
    known = {f.name for f in dataclasses.fields(Run)}
    return Run(**{k: v for k, v in bench(f"h100-quantizer-7b{name}")["runs"][number].items() if k in known})


def test_the_quantizer_s_tables_are_of_the_files() -> None:
    shown = rows((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    for label, name, number in (
        ("awq default", "", 0),
        ("gptq default", "-llmcompressor-gptq", 0),
        ("awq fast (AWQ as published) *", "-fast-best", 0),
        ("awq best *", "-fast-best", 1),
    ):
        run = quantized(name, number)
        sizes = (f"{x / 2**30:.2f} GiB" for x in (run.gpu_peak, run.gpu_reserved, run.host_anonymous_peak))
        assert "|".join(["", label, f"{run.seconds:.1f} s", f"{run.warm_layer_seconds:.3f} s", *sizes, ""]) in shown
    for method in ("awq", "gptq"):
        for number, label in enumerate((f"mmq {method} default", f"llm-compressor {method.upper()}")):
            run = quantized(f"-llmcompressor-{method}", number)
            layer = f"{run.layer_seconds:.{2 if number else 3}f} s"
            assert f"|{label}|{run.seconds:.1f} s|{layer}|{run.gpu_peak / 2**30:.2f} GiB|" in shown


def test_the_table_of_serving_is_of_its_reports() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = {r.split("|")[1]: r.split("|")[2:-1] for r in rows(page.partition("\n### Beside the published")[0])}
    for at, model in ((0, "qwen2.5-vl-7b"), (3, "minicpm-v-2.6")):
        report = bench(f"h200-bench-{model}")
        for place, label in ((at, model), (at + 1, f"{model}-awq")):
            own = report["numbers"][label]
            levels = report["sweep"][label]
            rates = {level["concurrency"]: level["numbers"]["output_rate"]["value"] for level in levels}
            rates[8] = own["output_rate"]["value"]
            for requests, rate in rates.items():
                assert shown[f"output tok/s, {requests} at once"][place] == f"{rate:,.0f}"
            assert shown["time per output token, 8 at once (ms)"][place] == f"{own['tpot']['value']:.2f}"
            assert shown["model memory"][place] == f"{own['weights']['value'] / 2**30:.2f} GiB"
            assert shown["max batch of 2,048 tokens each"][place] == str(own["max_batch"]["value"])
            assert shown["energy, J per output token"][place] == f"{own['energy']['value']:.2f}"
        for measure, row in (
            ("tpot", "time per output token, 8 at once (ms)"),
            ("output_rate", "output tok/s, 8 at once"),
        ):
            told = report["ratios"][f"{model}-awq"][measure]
            assert shown[row][at + 2] == f"{told['value']:.2f}x ({told['low']:.2f} to {told['high']:.2f})"
