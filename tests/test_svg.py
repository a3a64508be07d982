"""The plots' parts: scales, ticks, names that keep apart, text that stays text, colours that can be read."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmq.bench.charts import Dot, Line, dot_chart, line_chart
from mmq.bench.colours import PARTS, ROLES, SERIES, part, resolved, series, shipped, variables
from mmq.bench.report import Figure
from mmq.bench.show import change, number_of, times
from mmq.bench.spans import ratio_chart
from mmq.bench.stack import Bar, bar_chart
from mmq.bench.svg import (
    Scale,
    fitted,
    fitted_apart,
    log_ticks,
    number,
    plain,
    spread,
    text_width,
    ticks,
    words,
    wrapped,
)

SVG = "{http://www.w3.org/2000/svg}"
amounts = st.floats(1e-9, 1e12)


def test_names_that_begin_alike_are_told_apart() -> None:
    names = ["Qwen2.5-VL-7B-Instruct-AWQ", "Qwen2.5-VL-7B-Instruct-GPTQ", "bnb"]
    assert fitted_apart(names, 400) == names
    assert fitted_apart(names, 90) == ["…AWQ", "…GPTQ", "bnb"]
    assert fitted_apart(["one name", "another"], 40) == ["one…", "anot…"]  # they differ where they begin
    assert fitted_apart(["a-long-name", "a-long-name-too"], 40) == ["a-lo…", "…-too"]
    assert len(set(fitted_apart(["四比特量化版本甲", "四比特量化版本乙"], 60))) == 2


def test_a_scale_by_hand() -> None:
    linear = Scale(0, 10, 100, 0)
    assert [linear.at(v) for v in (0, 5, 10, 12)] == [100, 50, 0, 0]
    log = Scale(1, 100, 0, 50, log=True)
    assert [log.at(v) for v in (1, 10, 100)] == pytest.approx([0, 25, 50])
    with pytest.raises(ValueError, match="up to a larger one"):
        Scale(3, 3, 0, 1)
    with pytest.raises(ValueError, match="starts above 0"):
        Scale(0, 3, 0, 1, log=True)


@settings(max_examples=40)
@given(amounts, st.floats(1.001, 1e6), st.integers(2, 8))
def test_ticks_are_inside_evenly_apart_and_about_as_many(low: float, factor: float, count: int) -> None:
    high = low * factor
    found = ticks(low, high, count)
    assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) == pytest.approx(min(gaps), rel=1e-6)
    assert len(found) <= count + 1


@settings(max_examples=40)
@given(amounts, st.floats(1.5, 1e9))
def test_logarithmic_ticks_are_inside_and_few(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert 1 <= len(found) <= 7
    assert all(low * 0.99 <= t <= low * factor * 1.01 for t in found)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_names_keep_apart_in_their_order_and_stay_where_there_is_room(wanted: list[float]) -> None:
    placed = spread(wanted, 15, 0, 300)
    ordered = sorted(zip(wanted, placed, strict=True))
    assert all(b[1] - a[1] >= 15 - 1e-6 for a, b in itertools.pairwise(sorted(ordered, key=lambda p: p[1])))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(ordered) if a[0] < b[0])
    assert min(placed) >= -1e-6
    assert max(placed) <= 300 + 1e-6
    alone = sorted(wanted)
    if all(b - a >= 15 for a, b in itertools.pairwise(alone)):
        assert placed == pytest.approx(wanted)


@settings(max_examples=40)
@given(st.text())
def test_any_text_is_text_and_nothing_else(text: str) -> None:
    read = ET.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{words(0, 0, text)}</svg>')
    (shown,) = read
    assert shown.tag == f"{SVG}text"
    assert len(shown) == 0
    assert len(shown.text or "") == len(text)
    assert "<" not in plain(text)
    assert '"' not in plain(text)


@settings(max_examples=40)
@given(st.text(), st.floats(0, 400))
def test_text_is_cut_to_its_room(text: str, room: float) -> None:
    assert text_width(fitted(text, room)) <= max(room, text_width("…"))
    assert all(text_width(line) <= max(room, text_width("…")) for line in wrapped(text, room))


def test_lines_break_at_spaces_and_between_chinese_characters() -> None:
    assert wrapped("one two three", 50) == ["one two", "three"]
    assert wrapped("图中有一颗黄色的星", 48) == ["图中有一", "颗黄色的", "星"]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 1250, 12.5, 0.25, 3e-6)] == ["0", "1,250", "12.5", "0.25", "3e-06"]
    assert [number_of(v) for v in (12345, 172.64, 32.49, 0.0123)] == ["12,345", "172.6", "32.49", "0.0123"]
    assert [times(v) for v in (0.4312, 1.5, 26, 26.4, 250.7, 3, 0.0432)] == [
        *("0.43×", "1.50×", "26×", "26.4×", "251×", "3×", "0.043×")
    ]
    gib = 1 << 30
    sizes = [Figure(v * gib, "bytes", "measured") for v in (15.6, 6.7)]
    assert change(*sizes) == "15.6 → 6.7 GiB"
    assert change(Figure(1 << 20, "bytes", "computed"), sizes[1]) == "1 MiB → 6.7 GiB"


def test_colours_can_be_read_on_their_ground() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        bright, dark = sorted((light(one), light(other)), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    text = [
        "ink",
        "faint",
        "accent",
        "good",
        "bad",
        *(f"s{i}" for i in range(SERIES)),
        *(f"p{i}" for i in range(PARTS)),
    ]
    for which in (0, 1):
        for ground in ("ground", "raised"):
            assert all(contrast(ROLES[name][which], ROLES[ground][which]) >= 4.5 for name in text)
        assert contrast(ROLES["ink"][which], ROLES["warn"][which]) >= 4.5
        assert contrast(ROLES["ink"][which], ROLES["mark"][which]) >= 4.5


def test_style_sheets_name_only_colours_that_there_are() -> None:
    for name in ("chart.css", "report.css"):
        assert "var(" not in resolved(shipped(name))
    assert resolved(".x{color:var(--ink)}", dark=True) == f".x{{color:{ROLES['ink'][1]}}}"
    assert variables().count("--ink:") == 2
    assert [series(i) for i in (0, 7, 8, 14, 15)] == ["s0", "s7", "s1", "s7", "s1"]
    assert {part(i) for i in range(20)} == {f"p{i}" for i in range(PARTS)}


def parsed(svg: str) -> ET.Element:
    """The drawing, every coordinate in it a finite number inside the view, give or take the names."""
    root = ET.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for node in root.iter():
        for key, limit in (("x", width), ("y", height), ("cx", width), ("cy", height), ("x1", width), ("y2", height)):
            if key in node.attrib:
                assert math.isfinite(float(node.attrib[key]))
                assert -1 <= float(node.attrib[key]) <= limit + 1, ET.tostring(node)
    return root


@pytest.mark.parametrize("width", [328, 520])
def test_lines_are_drawn_and_named(width: float) -> None:
    lines = [Line("fp16", 0, [(1, 10), (8, 40)]), Line("a <b> & c", 1, [(1, 12), (8, 41)]),
             Line("fp16 p99", 0, [(1, 12), (8, 60)], dashed=True)]  # fmt: skip
    root = parsed(
        line_chart(lines, label="x", x_title="at once", y_title="ms", width=width, log_x=True, x_ticks=(1, 8))
    )
    said = [node.text for node in root.iter(f"{SVG}text")]
    assert {"fp16", "a <b> & c", "1", "8", "ms", "at once"} <= set(said)
    assert "fp16 p99" not in said
    assert len(list(root.iter(f"{SVG}polyline"))) == 3
    assert len(list(root.iter(f"{SVG}circle"))) == 2
    assert len(list(root.iter(f"{SVG}polygon"))) == 2


def test_lines_far_apart_have_a_logarithmic_scale_and_zeros_a_plain_one() -> None:
    def heading(*values: float) -> str:
        drawn = line_chart([Line("a", 0, list(enumerate(values)))], label="", x_title="", y_title="ms")
        return next(n.text or "" for n in parsed(drawn).iter(f"{SVG}text") if n.attrib["class"] == "axis")

    assert heading(1, 100) == "ms, log scale"
    assert heading(0, 100) == heading(90, 100) == "ms"
    with pytest.raises(ValueError, match="needs a point"):
        line_chart([Line("a", 0, [])], label="", x_title="", y_title="")
    parsed(line_chart([Line("a", 0, [(4, 0.0)])], label="", x_title="", y_title=""))


def test_intervals_stand_at_their_points_and_a_mark_lies_across() -> None:
    line = Line("awq", 1, [(1, 1.5), (8, 0.9)], spans=[(1, 1.4, 1.6), (8, 0.8, 1.0)])
    root = parsed(line_chart([line], label="", x_title="", y_title="", log_x=True, mark_at=1.0))
    (across,) = [n for n in root.iter(f"{SVG}line") if n.attrib["class"] == "limit"]
    one = float(across.attrib["y1"])
    tall = [n for n in root.iter(f"{SVG}line") if n.attrib["class"] == "whisker"]
    assert [(float(n.attrib["y1"]) < one, float(n.attrib["y2"]) < one + 0.01) for n in tall] == [
        (True, True),
        (False, True),
    ]
    marks = [float(n.attrib["points"].split()[0].split(",")[0]) + 4 for n in root.iter(f"{SVG}polygon")]
    assert [float(n.attrib["x1"]) for n in tall] == pytest.approx(marks, abs=0.1)


def test_bars_are_as_long_as_their_parts() -> None:
    bars = [
        Bar("fp16", [("weights", 16, "16"), ("cache", 4, "4")]),
        Bar("awq", [("weights", 6, "6"), ("cache", 0, "0")]),
    ]
    root = parsed(
        bar_chart(bars, label="", parts=["weights", "cache"], show=str, limit=(24, "24 asked for"), width=520)
    )
    widths = [float(n.attrib["width"]) + 1 for n in root.iter(f"{SVG}rect")]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.01)
    assert widths[0] / widths[2] == pytest.approx(16 / 6, rel=0.01)
    assert len(widths) == 3  # nothing is drawn of nothing
    with pytest.raises(ValueError, match="above 0"):
        bar_chart([Bar("a", [("weights", 0.0, "0")])], label="", parts=["weights"], show=str)


def test_ratios_stand_on_their_side_of_one() -> None:
    rows = [("output tok/s", [Dot("awq", 1, 1.5, 0, 1.4, 1.6), Dot("bnb", 3, 0.7, 0, 0.65, 0.75)]),
            ("time to first token", [Dot("awq", 1, 0.98, 0, 0.9, 1.1)])]  # fmt: skip
    root = parsed(ratio_chart(rows, label="", one="fp16"))
    one = next(float(n.attrib["x1"]) for n in root.iter(f"{SVG}line") if n.attrib["class"] == "limit")
    whiskers = [n for n in root.iter(f"{SVG}line") if n.attrib["class"] == "whisker"]
    assert [float(w.attrib["x1"]) < one < float(w.attrib["x2"]) for w in whiskers] == [False, False, True]
    assert float(whiskers[0].attrib["x1"]) > one > float(whiskers[1].attrib["x2"])
    marks = [n.attrib["class"] for n in root.iter(f"{SVG}polygon")]
    assert marks == ["dot", "dot", "dot hollow"]
    with pytest.raises(ValueError, match="ratios above 0"):
        ratio_chart([("x", [Dot("a", 0, 0.0, 0)])], label="", one="fp16")


def test_the_front_joins_what_nothing_beats() -> None:
    dots = [Dot("fp16", 0, 16, 0), Dot("awq", 1, 6, 0.04), Dot("bnb", 2, 7, 0.09)]
    root = parsed(dot_chart(dots, label="", x_title="GiB", y_title="KL"))
    (front,) = [n for n in root.iter(f"{SVG}polyline") if n.attrib["class"] == "front"]
    assert len(front.attrib["points"].split()) == 2
    assert len([n for n in root.iter() if n.attrib.get("class") == "dot"]) == 3
