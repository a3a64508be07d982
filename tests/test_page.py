"""The page of a report, its slide and its card section: complete, harmless whatever labels hold, and drawn by a real
browser. What a browser needs: see browsing.py; the slide needs resvg-py."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, needs_browser
from PIL import Image
from reports import LABELS, bare_report, full_report, with_pictures, written

from mmq.bench.beside import compared, inlined
from mmq.bench.headline import moment, tiles, title
from mmq.bench.load_plots import load_plots
from mmq.bench.page import MISSING, coded, page, write_page
from mmq.bench.plots import memory_plot, pareto_plot
from mmq.bench.report import Figure, Level, Ratio, Report, read_report
from mmq.bench.section import card_section
from mmq.bench.slide import png, slide, write_slide
from mmq.bench.table import markdown

needs_resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")
VOID = {"meta", "link", "img", "br"}
HOSTILE = (
    "<script>window.hurt=1</script>",
    '"><img src=x onerror="window.hurt=1">',
    "</style><style>body{display:none}</style>",
    "</title></head><body onload=hurt()>{{ 7 * 7 }}{% raw %}",
)


OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.width && q.width && p.x + 1 < q.x + q.width && q.x + 1 < p.x + p.width &&
        p.y + 4 < q.y + q.height && q.y + 4 < p.y + p.height).map(([b]) => [a, b]));
})"""
OUTSIDE = """() => [...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).flatMap(svg => {
    const whole = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]).filter(([a, box]) =>
        box.right > whole.right + 12 || box.left < whole.left - 12).map(([a]) => a);
})"""  # a font may be wider than it was taken for, by a little
DOCS = Path(__file__).resolve().parent.parent / "docs" / "report"


class Read(HTMLParser):
    """A page as elements: (tag, attributes), its text, and whether every one was closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hostile(report_of: Any = full_report) -> Report:
    """A report whose labels are markup, and whose every other word is too."""
    report = report_of(LABELS, rename=dict(zip(LABELS, HOSTILE, strict=True)))

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key in ("picture", "clock", "model") or value in HOSTILE else value + HOSTILE[1]
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        return [spoil(v, key) for v in value] if isinstance(value, list) else value

    fields = ("subjects", "machine", "versions", "answers", "verdicts")
    changed = {name: spoil(json.loads(json.dumps(getattr(report, name)))) for name in fields}
    changed["engine"] = HOSTILE[0]
    changed["settings"] = {**report.settings, "notes": [HOSTILE[2]], "carries_over": [HOSTILE[3]]}
    return Report(**{**vars(report), **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_full_page_has_every_section_and_figure(folder: Path) -> None:
    text = page(full_report(), folder)
    read = Read(text)
    assert len(text) < 400_000
    outline = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert all(after - before <= 1 for before, after in itertools.pairwise([0, *outline]))  # no level is left out
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        *("Side by side", "Latency against load", "Memory", "Quality", "Where the time goes", "Answers"),
        *("What carries over", "How it was measured"),
    ]
    assert {a["href"] for a in read.all("a")} == {f"#{s['id']}" for s in read.all("section")}
    assert "Not in this report" not in read.text
    assert title(full_report()) == "Qwen/Qwen2-VL-7B-Instruct: fp16 against awq, gptq, bnb"
    for said in ("1.52×", "1.47 to 1.57", "15.6 → 6.7 GiB", "0.512 ± 0.016", "412 tokens in", "2026-11-21 15:02 UTC"):
        assert said in read.text
    figures = read.all("svg")
    assert len(figures) == 2 * 10
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in figures)
    assert all(image["alt"] for image in read.all("img"))
    assert all(th["scope"] for th in read.all("th"))
    assert text.count("<mark>") == 1  # "blue", of the one whose answer differs
    assert "<dt>reference · fp16 · awq · gptq</dt>" in text


def test_every_plot_is_well_formed(folder: Path) -> None:
    for report in (full_report(), hostile(), bare_report(("fp16",))):
        for svg in re.findall(r"<svg.*?</svg>", page(report, folder), re.DOTALL):
            ET.fromstring(svg)


@pytest.mark.parametrize("labels", [("fp16",), ("fp16", "awq")])
def test_what_is_missing_is_said_with_what_would_fill_it(labels: tuple[str, ...], tmp_path: Path) -> None:
    text = page(bare_report(labels), tmp_path)
    read = Read(text)
    assert all(line.replace("`", "") in read.text for line in MISSING.values())
    assert text.count("<code>mmq ") == sum(line.count("`mmq ") for line in MISSING.values()) == 6
    assert [s["id"] for s in read.all("section")] == ["table", "carries", "conditions"]
    assert [a["href"] for a in read.all("a")] == ["#table", "#carries", "#conditions"]
    assert read.all("svg") == []
    assert ("no interval here" in read.text) == (len(labels) > 1)


def test_an_artifact_past_its_limits_is_told(tmp_path: Path) -> None:
    said = {"awq": {"measures": {"mean_kl": 0.3}, "failures": ["mean_kl is 0.3, the limit is <= 0.05"], "layers": []}}
    text = page(bare_report(quality=said), tmp_path)
    assert '<p class="bad">awq is past its recipe&#39;s limits: mean_kl is 0.3, the limit is &lt;= 0.05</p>' in text


def test_an_unchecked_artifact_is_told_with_what_to_type(tmp_path: Path) -> None:
    said = {"awq": {"unchecked": "not checked; `mmq check out-awq`"}}
    text = page(bare_report(quality=said), tmp_path)
    assert "<p>awq: not checked; <code>mmq check out-awq</code></p>" in text
    assert coded("a ` <b>") == "a ` &lt;b&gt;"
    assert coded("`<b>` is") == "<code>&lt;b&gt;</code> is"


def test_the_page_needs_nothing_and_allows_nothing(folder: Path) -> None:
    text = page(full_report(), folder)
    read = Read(text)
    assert "script" not in {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            assert re.match(r"data:|#", attributes.get(name) or "#"), attributes
    assert "url(" not in read.style
    assert "@import" not in read.style
    (policy,) = [m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(read.style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy


def test_hostile_words_are_words(folder: Path) -> None:
    def shape(text: str) -> list[tuple[str, list[str]]]:
        outside = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)  # a drawing has what fits into it
        return [(tag, sorted(attributes)) for tag, attributes in Read(outside).tags]

    plain = full_report(LABELS, rename={label: label.upper() for label in LABELS})
    notes = {**plain.settings, "notes": ["a note"], "carries_over": ["a line"]}
    text = page(hostile(), folder)
    assert shape(text) == shape(page(Report(**{**vars(plain), "settings": notes}), folder))  # nothing came in
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert {tag for tag, _ in Read(drawings).tags} == {
        *("svg", "g", "text", "title", "line", "polyline", "polygon", "circle", "rect")
    }
    text = Read(page(hostile(), folder)).text
    assert "{{ 7 * 7 }}" in text
    assert "<script>window.hurt=1</script>" in text


def test_pictures_come_from_the_reports_folder_alone(tmp_path: Path) -> None:
    inside = with_pictures(tmp_path / "inside")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (inside / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(inside / "deep" / "x.png")
    for name in ("", ".", "..", "../outside.png", str(tmp_path / "outside.png"), "link.png", "deep/x.png"):
        shown, why = inlined(inside, name)
        assert shown is None
        assert "names no picture of its own folder" in why
    for name in ("broken.png", "missing.png", "nul\0.png"):
        assert inlined(inside, name)[0] is None
    shown, why = inlined(inside, "answer-2.png")
    assert shown is not None
    assert why == ""
    kind, data = shown[0].split(";base64,")
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, small.size, shown[1:]) == ("data:image/jpeg", (320, 240), (320, 240))
    report = full_report()
    gone = Report(**{**vars(report), "answers": [{**report.answers[0], "picture": "../outside.png"}]})
    assert "names no picture of its own folder" in Read(page(gone, inside)).text


def test_answers_are_compared_by_words_and_characters() -> None:
    assert compared("a red star", "a blue star") == [(False, "a "), (True, "red"), (False, " star")]
    assert compared("红色的星", "黄色的星") == [(True, "红"), (False, "色的星")]
    assert compared("same", "same") == [(False, "same")]
    assert compared("", "something") == [(True, "(no answer)")]


def test_colours_of_ratios_are_earned() -> None:
    """Speed is coloured where its interval leaves out 1, memory where it differs, and never on what is not known."""

    def classes(report: Report) -> dict[str, str]:
        return {tile["title"]: tile["lines"][0]["class"] for tile in tiles(report)}

    report = bare_report()
    assert classes(report) == {
        **{"Model memory": "good", "Output tok/s": "", "Time per output token (ms)": "", "Max batch": "good"}
    }
    ratios = {"awq": {"output_rate": Ratio(1.2, 0.99, 1.4, pairs=5), "tpot": Ratio(1.3, 1.2, 1.4, pairs=5)}}
    told = classes(Report(**{**vars(report), "ratios": ratios}))
    assert (told["Output tok/s"], told["Time per output token (ms)"]) == ("", "bad")


def test_the_plots_choose_what_there_is() -> None:
    report = full_report()
    assert [p.title for p in load_plots(report)] == [
        *(
            "Output rate as a multiple of fp16's",
            "Output rate",
            "Time to first token",
            "Time per output token",
            "Whole request",
        )
    ]
    one = {label: levels[:1] for label, levels in report.sweep.items()}
    assert load_plots(Report(**{**vars(report), "sweep": one})) == []
    alone = {label: [replace(level, ratios={}) for level in levels] for label, levels in report.sweep.items()}
    assert len(load_plots(Report(**{**vars(report), "sweep": alone}))) == 4
    small = {**report.settings, "vram": 2400 << 30}  # a budget far beyond every bar is no line across
    far = memory_plot(Report(**{**vars(report), "settings": small}))
    near = memory_plot(report)
    assert far is not None
    assert near is not None
    assert ("asked for" in near.wide, "asked for" in far.wide) == (True, False)
    plot = pareto_plot(report)
    assert plot is not None
    assert plot.rows[0] == ["fp16", "15.6 GiB", "0"]
    unchecked = {k: {"unchecked": "not checked"} for k in report.quality}
    assert pareto_plot(Report(**{**vars(report), "quality": unchecked})) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_broken_model_has_a_page_too(bad: float, folder: Path) -> None:
    """Weights that give no numbers: KL and errors by layer are NaN, figures are what they should not be. What can be
    drawn is, the rest stands in the tables."""
    report = full_report()

    def broken(value: Any) -> Any:
        if isinstance(value, Figure):
            return replace(value, value=bad, low=bad, high=bad)
        if isinstance(value, Ratio):
            return replace(value, value=bad, low=bad, high=bad)
        if isinstance(value, Level):
            return Level(value.concurrency, broken(value.numbers), broken(value.ratios))
        if isinstance(value, dict):
            return {k: broken(v) for k, v in value.items()}
        if isinstance(value, list):
            return [broken(v) for v in value]
        return bad if isinstance(value, float) else value

    for names in (("quality",), ("sweep", "ratios"), ("stages", "memory"), ("numbers",)):
        for labels in (["bnb"], list(LABELS)):
            fields = {n: {k: broken(v) if k in labels else v for k, v in getattr(report, n).items()} for n in names}
            changed = replace(report, **fields)
            text = page(changed, folder)
            for svg in [*re.findall(r"<svg.*?</svg>", text, re.DOTALL), slide(changed)]:
                drawn = ET.fromstring(svg)
                places = [v for n in drawn.iter() for k, v in n.attrib.items() if k in ("x", "y", "x1", "cx", "points")]
                assert not [v for v in places if "nan" in v or "inf" in v]
            assert card_section(changed)


@pytest.mark.parametrize("draw", [lambda r: page(r, Path()), slide, card_section])
def test_what_cannot_be_shown_is_told(draw: Any) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kind": "quantizer"}, "of the kind 'quantizer'"),
        ({"numbers": {}}, "without figures"),
        ({"settings": {"vram": 1}}, "without load, context in its settings"),
    )
    for changed, why in cases:
        with pytest.raises(ValueError, match=why):
            draw(bare_report(**changed))


def test_the_moment_is_told_in_utc() -> None:
    assert moment("2026-11-21T16:02:11+01:00") == "2026-11-21 15:02 UTC"
    assert moment("yesterday") == "yesterday"


def test_the_section_of_a_card() -> None:
    text = card_section(full_report(("fp16", "awq")))
    lines = text.splitlines()
    assert "| model memory | 15.6 GiB | 6.7 GiB | 0.43× |" in lines
    assert "| output tok/s | 324.9 | 493.8 | 1.52× (1.47 to 1.57) |" in lines
    assert "| max length in 24 GiB (tokens), computed | 2,048 | 6,144 | 3× |" in lines
    assert "### Quality" in lines
    assert "a card made up, 24 GiB; vllm; mmq 0.1.0, python 3.11.9, vllm 0.33.0; 2026-11-21 15:02 UTC" in text
    assert "### Quality" not in card_section(bare_report())
    for line in card_section(hostile()).splitlines():
        assert not re.search(r"(?<!\\)[<>]", line)
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (6, 9)  # four labels, three ratios


def test_markdown_of_hostile_words_is_words() -> None:
    report = hostile()
    report = replace(report, machine={**report.machine, "system": "<b>"}, verdicts=["a|b [x](y) `c` <img src=x>"])
    text = markdown(report)
    assert r"- a\|b \[x\](y) \`c\` &lt;img src=x&gt;" in text.splitlines()
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", text)  # what is in a block of code is words as it is
    assert not re.search(r"(?<!\\)[<>]", outside)
    for line in outside.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (6, 9, 12)  # four labels: stages, ratios, percentiles


# the slide


@needs_resvg
@pytest.mark.parametrize("dark", [False, True])
def test_the_slide_is_a_picture_of_what_there_is(dark: bool, tmp_path: Path) -> None:
    path = write_slide(full_report(), tmp_path, dark=dark)
    with Image.open(path) as drawn:
        assert drawn.size == (1600, 900)
        colours = drawn.convert("RGB")
    ground = (0x14, 0x17, 0x1B) if dark else (255, 255, 255)
    assert colours.getpixel((5, 5)) == ground
    for box in ((0, 60, 1500, 120), (60, 420, 740, 800), (800, 200, 1500, 500), (800, 560, 1500, 880)):
        assert len(colours.crop(box).getcolors(1 << 20) or ()) > 20, box  # title, table, two plots


def test_a_slide_tells_what_the_page_warns_of() -> None:
    report = full_report()
    assert "Beware" not in slide(report)
    noted = Report(**{**vars(report), "settings": {**report.settings, "notes": ["the fan was off", "twice"]}})
    assert "Beware: the fan was off (and 1 more)" in slide(noted)


def test_a_slide_tells_whom_it_has_no_room_for() -> None:
    report = full_report()
    more = {f"v{number}": report.numbers["awq"] for number in range(3)}
    assert "in the report besides" not in slide(report)
    assert "in the report besides: v1, v2 ·" in slide(Report(**{**vars(report), "numbers": {**report.numbers, **more}}))


@needs_resvg
def test_a_slide_of_hostile_or_little_is_drawn_too() -> None:
    for report in (hostile(), bare_report(("fp16",)), hostile(bare_report)):
        svg = slide(report)
        ET.fromstring(svg)
        assert "var(" not in svg
        assert png(svg).startswith(b"\x89PNG")


def test_without_resvg_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"pip install 'mmq-toolkit\[png\]'"):
        png("<svg/>")


# the command


def test_the_command_draws_a_report_anew(tmp_path: Path) -> None:
    place = written(full_report(("fp16", "awq")), tmp_path / "run")

    def mmq(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", "-m", "mmq", "report", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = mmq(str(place))
    assert (done.returncode, done.stdout) == (0, f"page: {place / 'report.html'}\n")
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)  # a second, not ten
    assert (place / "report.html").read_text(encoding="utf-8") == page(read_report(place), place)
    done = mmq(str(place / "report.json"), "-o", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == (place / "report.html").read_bytes()
    assert mmq(str(place), "--card").stdout == card_section(read_report(place))
    nothing = mmq(str(tmp_path))
    assert nothing.returncode == 2
    assert "no report" in nothing.stderr


def test_the_page_in_the_docs_is_of_its_report_and_names_no_place() -> None:
    kept, report = (DOCS / "report.html").read_text(encoding="utf-8"), read_report(DOCS)
    assert len(kept) < 400_000
    read, fresh = Read(kept), Read(page(report, DOCS))
    assert [s["id"] for s in read.all("section")] == [s["id"] for s in fresh.all("section")]
    assert all(verdict in read.text for verdict in report.verdicts)
    assert len(read.all("img")) == len(report.answers) > 0
    for text in (kept, (DOCS / "report.json").read_text(encoding="utf-8")):
        assert not re.search(r"/(tmp|home|root|work|opt)/", text)


# a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """A tab that shows the file, and what it complained of or asked of anywhere else."""
    tab = browser.new_context(**{"viewport": {"width": 1180, "height": 800}, **options}).new_page()
    faults: list[str] = []
    tab.on("request", lambda r: None if r.url.startswith(("data:", path.as_uri())) else faults.append(r.url))
    tab.on("pageerror", lambda e: faults.append(str(e)))
    tab.on("console", lambda m: faults.append(m.text))
    tab.goto(path.as_uri())
    return tab, faults


@needs_browser
@pytest.mark.parametrize("width", [1180, 360])
def test_a_browser_draws_every_plot_and_nothing_sticks_out(browser: Any, folder: Path, width: int) -> None:
    tab, faults = opened(browser, write_page(full_report(), folder), viewport={"width": width, "height": 800})
    boxes = [box for svg in tab.locator("svg:visible").all() if (box := svg.bounding_box()) is not None]
    assert len(boxes) == 10  # each once: the wide drawing or the narrow one
    for box in boxes:
        assert box["width"] > 280
        assert box["height"] > 80
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    inner = tab.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => s.getBBox().width)"
    )
    assert min(inner) > 250
    sizes = tab.evaluate("""[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility()).map(
        t => t.getBoundingClientRect().height)""")
    assert min(sizes) > 10  # words in plots can be read
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("summary").evaluate_all("all => all.forEach(s => s.click())")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # open tables scroll by themselves
    assert tab.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)") == [320, 320]
    assert faults == []
    tab.context.close()


@needs_browser
@pytest.mark.parametrize("width", [1180, 360])
def test_words_in_plots_do_not_lie_on_one_another(browser: Any, folder: Path, width: int) -> None:
    """Of all pairs of words in each drawing, by the browser's own fonts: a page by hand, a noisy real one, one of names
    as the hubs have them."""
    names = {label: f"Qwen2.5-VL-7B-Instruct-{label}-asym-g128-calibrated-on-my-own-invoices" for label in LABELS}
    reports = {"plain": full_report(), "long": full_report(rename=names)}
    paths = [write_page(report, folder, out=folder / name) for name, report in reports.items()]
    for path in (*paths, DOCS / "report.html"):
        tab, _ = opened(browser, path, viewport={"width": width, "height": 800})
        assert tab.evaluate(OVERLAPS) == []
        assert tab.evaluate(OUTSIDE) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.context.close()
    tab, _ = opened(browser, paths[1], viewport={"width": width, "height": 800})
    said = tab.evaluate("[...document.querySelectorAll('#load svg .own')].map(t => t.textContent)")
    assert {name[:4] for name in said} == {"…fp1", "…awq", "…gpt", "…bnb"}  # not four times the same beginning
    if width > 1000:
        table = tab.evaluate("[...document.querySelectorAll('#table .scroll')].map(t => t.scrollWidth - t.clientWidth)")
        assert not any(table)  # all of the table is seen
    tab.context.close()


@needs_browser
def test_the_dark_is_dark_in_plots_too_and_paper_is_light(browser: Any, folder: Path) -> None:
    path = write_page(full_report(), folder)
    seen = []
    look = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        ...[['.s1 .path', 'stroke'], ['svg .tick', 'fill'], ['.p0 .fill', 'fill'], ['.grid', 'stroke']].map(
            ([where, what]) => getComputedStyle(document.querySelector(where))[what])]"""
    for scheme in ("light", "dark"):
        tab, _ = opened(browser, path, color_scheme=scheme)
        seen.append(tab.evaluate(look))
        tab.emulate_media(media="print", color_scheme=scheme)
        assert tab.evaluate(look)[0] == "rgb(255, 255, 255)"
        tab.context.close()
    light, dark = seen
    assert all(a != b and a.startswith("rgb(") for a, b in zip(light, dark, strict=True))


@needs_browser
def test_hostile_labels_do_nothing_in_a_browser(browser: Any, folder: Path) -> None:
    path = folder / "hostile.html"
    path.write_text(page(hostile(), folder), encoding="utf-8")
    for width in (1180, 360):
        tab, faults = opened(browser, path, viewport={"width": width, "height": 800})
        assert tab.evaluate("window.hurt") is None
        assert tab.locator("img").count() == 2
        assert tab.locator("h1").inner_text().count("<script>") == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert faults == []
        tab.context.close()


@needs_browser
def test_the_page_would_run_no_script(browser: Any, folder: Path) -> None:
    """The policy itself, were the escaping ever wrong: neither a script nor a style that is not the page's own."""
    text = page(full_report(), folder)
    spoiled = text.replace("<main>", "<main><script>window.hurt=1</script><style>body{display:none}</style>")
    path = folder / "spoiled.html"
    path.write_text(spoiled, encoding="utf-8")
    tab, faults = opened(browser, path)
    assert tab.evaluate("window.hurt") is None
    assert tab.locator("h1").is_visible()
    assert len(faults) == 2
    assert all("Content Security Policy" in fault for fault in faults)
    tab.context.close()
