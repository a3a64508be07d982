"""mmq publish from the command line, of a real artifact that a real check passed, through the real hub libraries to a
loopback hub; and what came back, by mmq's own download, served."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_keeper import SIGNED, TOKEN, HubKeeper
from test_upload import environment, half, point

from mmq.bench.examine import examine
from mmq.bench.reload import trusts
from mmq.bench.report import Figure, Report
from mmq.bench.verdict import write
from mmq.export.artifact import Artifact, open_artifact
from mmq.recipes.hub import fetch

BOTH = ("hf:me/pebble-awq", "modelscope:me/elsewhere")  # one server is both hubs here
NAME = "me/pebble-awq"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checked(artifact: Callable[..., Path], pebble: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AWQ pebble and its real check; never change it."""
    folder = Path(shutil.copytree(artifact("awq"), tmp_path_factory.mktemp("checked") / "out-awq"))
    opened = open_artifact(folder)
    write(opened, examine(opened, pebble, count=3), asked=3)
    return folder


@pytest.fixture
def mine(checked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checked, tmp_path / "out-awq"))


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubKeeper]:
    with HubKeeper() as server:
        point(monkeypatch, server.url, tmp_path)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def mmq(mmq: Run) -> Run:
    """The command line, which tells no token and no signed address, whatever it is asked."""

    def run(*words: object) -> tuple[int, str, str]:
        code, out, err = mmq(*words)
        assert TOKEN not in out + err
        assert SIGNED not in out + err
        return code, out, err

    return run


def whole(keeper: HubKeeper, artifact: Artifact, ref: str = "main") -> dict[str, bytes]:
    """What the hub shows, once it is known to hold each of the artifact's files."""
    files = keeper.files(NAME, ref)
    for name in artifact.manifest["files"]:
        assert files[name] == (artifact.path / name).read_bytes(), name
    return files


def test_published_to_both_hubs_and_a_second_time_nothing(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    code, out, err = mmq("publish", mine, *BOTH, "--no-reload", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    opened = open_artifact(mine)
    assert told["digest"] == opened.digest
    assert told["tag"] == "v1"
    assert [p["target"] for p in told["published"]] == list(BOTH)
    files = whole(keeper, opened, "v1")
    assert sorted(files) == sorted([*opened.manifest["files"], "mmq.json", "check.json", "README.md", ".gitattributes"])
    assert "samples" not in json.loads(files["check.json"])
    assert json.loads(files["mmq.json"])["files"] == opened.manifest["files"]
    assert b"without being loaded in an engine first" in files["README.md"]
    assert [len(p["sent"]) for p in told["published"]] == [len(files) - 1] * 2
    keeper.calls.clear()
    code, out, err = mmq("publish", mine, BOTH[1], "--no-reload", "--json")
    assert (code, json.loads(out)["published"][0]["sent"]) == (0, [])
    assert not [c for c in keeper.calls if not c.startswith("GET")]


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_what_comes_down_is_what_went_up(keeper: HubKeeper, mmq: Callable, mine: Path, hub: str) -> None:
    assert mmq("publish", mine, f"{hub}:{NAME}", "--no-reload")[0] == 0
    base = fetch(NAME, hub=hub)
    down = open_artifact(base.path, verify=True)
    assert down.digest == open_artifact(mine).digest
    assert base.revision == keeper.repos[NAME].branches["main"]
    assert fetch(NAME, hub=hub, revision="v1").path == base.path


def test_past_a_limit_nothing_is_sent_and_the_code_is_1(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    path = mine / "check.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "measures": {**report["measures"], "mean_kl": 7.0}}))
    code, _, err = mmq("publish", mine, BOTH[0], "--no-reload")
    assert code == 1
    assert "past the limit: check.json: mean_kl is 7" in err
    assert keeper.calls == []
    assert mmq("publish", mine, BOTH[0], "--no-reload", "--no-gate")[0] == 0
    card = keeper.files(NAME)["README.md"].decode()
    assert "Published without the gate" in card
    assert "mean\\_kl is 7, the limit is" in card


def test_without_a_check_the_code_is_2(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    (mine / "check.json").unlink()
    code, _, err = mmq("publish", mine, BOTH[0])
    assert code == 2
    assert "check.json is not there: run `mmq check" in err
    assert keeper.calls == []


def test_a_changed_byte_is_found_before_anything_is_sent(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    weights = next(iter(sorted(mine.glob("*.safetensors"))))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = mmq("publish", mine, BOTH[0])
    assert code == 2
    assert "changed since it was made" in err
    assert keeper.calls == []


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_hub_that_refuses_gives_code_2_and_no_secret(
    keeper: HubKeeper, mmq: Callable, mine: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own words hold the token and a signed address; `mmq` asserts that none of it comes out."""
    keeper.fail = lambda number, method, path: status if method == "POST" and "/commit/" in path else None
    code, out, _ = mmq("publish", mine, *BOTH, "--no-reload", "--json")
    assert code == 2
    told = json.loads(out)
    assert set(told["failed"]) == set(BOTH)
    assert told["published"] == []
    assert half(keeper, NAME, {}) == ""
    monkeypatch.setenv("MMQ_DEBUG", "1")
    keeper.fail = lambda number, method, path: status
    with pytest.raises(OSError, match=r"127\.0\.0\.1") as failed:
        mmq("publish", mine, BOTH[0], "--no-reload")
    assert TOKEN not in "".join(map(str, [failed.value, failed.getrepr(showlocals=False)]))


def test_one_hub_that_fails_does_not_keep_the_other_from_its_own(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    keeper.fail = lambda number, method, path: 403 if path.startswith("/api/models/me/no/commit") else None
    code, out, err = mmq("publish", mine, "hf:me/no", "modelscope:me/yes", "--no-reload", "--json")
    assert code == 2
    assert [p["target"] for p in json.loads(out)["published"]] == ["modelscope:me/yes"]
    assert "mmq: hf:me/no: 127.0.0.1" in err
    assert "config.json" in keeper.files("me/yes")


def test_a_hub_that_is_away_does_not_keep_the_other_from_its_own(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    keeper.fail = lambda number, method, path: "before" if path.startswith("/api/models/me/no") else None
    code, out, err = mmq("publish", mine, "hf:me/no", "modelscope:me/yes", "--no-reload", "--json")
    assert code == 2
    told = json.loads(out)
    assert [p["target"] for p in told["published"]] == ["modelscope:me/yes"]
    assert "was lost while me/no was looked at" in told["failed"]["hf:me/no"]
    keeper.fail = lambda number, method, path: "before"
    code, out, err = mmq("publish", mine, "hf:me/no", "modelscope:me/yes", "--no-reload")
    assert (code, out) == (2, "")
    assert "was lost while me/no was looked at" in err


def test_an_engine_that_dies_gives_code_3_and_nothing_is_sent(
    keeper: HubKeeper, mmq: Callable, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "token: $HF_TOKEN"; ls "$2"; echo "RuntimeError: no"; exit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("MMQ_VLLM", str(program))
    code, _, err = mmq("publish", mine, BOTH[0])
    assert code == 3
    assert "the engine died at its start" in err
    log = Path(err.rpartition("(log: ")[2].rstrip(")\n")).read_text()
    assert "token: \n" in log
    listed = log.split("token: \n")[1].splitlines()
    assert "README.md" not in listed
    assert {"mmq.json", "config.json", "check.json"} <= set(listed)
    assert keeper.repos == {}
    assert not list(tmp_path.glob(".mmq-clean-*"))


def test_where_no_engine_is_it_says_so_and_goes_on(
    keeper: HubKeeper, mmq: Callable, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMQ_VLLM", "/nowhere/vllm")
    code, _, err = mmq("publish", mine, BOTH[0])
    assert code == 0
    assert "note: not loaded in an engine first: MMQ_VLLM names /nowhere/vllm" in err
    assert b"without being loaded in an engine first" in keeper.files(NAME)["README.md"]


def test_a_dry_run_asks_nobody_and_leaves_the_card(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    code, out, _ = mmq("publish", mine, *BOTH, "--dry-run")
    assert code == 0
    assert keeper.calls == []
    assert "model.safetensors.index.json" in out
    assert (mine / "README.md").read_text(encoding="utf-8").startswith("---\n")
    assert open_artifact(mine, verify=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["me/model"], "is no place to publish to"),
        (["hf:me/model", "hf:me/Model"], "names that differ in case alone are one"),
        (["hf:me/model", "--tag", "a b"], "tag is 'a b'"),
        (["hf:me/model", "--tag", "main"], "no branch's name"),
        (["hf:me/model", "--license", "gemma"], "may not let you publish what is made of it"),
        (["hf:me/model", "--report", "nothing"], "no report nothing"),
    ],
)
def test_what_is_wrong_is_said_before_any_hub_is_asked(
    keeper: HubKeeper, mmq: Callable, mine: Path, words: list[str], told: str
) -> None:
    code, _, err = mmq("publish", mine, *words, "--no-reload")
    assert code == 2
    assert told in err
    assert keeper.calls == []


def test_a_licence_that_was_read_may_pass(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    code, _, err = mmq("publish", mine, BOTH[0], "--no-reload", "--license", "gemma", "--may-redistribute")
    assert (code, err.count("mmq:")) == (0, 0)
    assert b"license: gemma\n" in keeper.files(NAME)["README.md"]


def test_the_base_on_a_hub_tells_licence_and_languages(
    keeper: HubKeeper, mmq: Callable, mine: Path, tmp_path: Path
) -> None:
    """Of a base on a hub the card is read at the commit that the manifest pins."""
    readme = b"---\nlicense: mit\nlanguage: [en, zh]\n---\n# base\n"
    base = keeper.create("org/base", public=True, files={"README.md": readme, "config.json": b"{}"})
    commit = base.branches["main"]
    keeper.commit(base, {"README.md": b"---\nlicense: gemma\n---\n"})
    manifest = json.loads((mine / "mmq.json").read_text())
    for hub in ("hf", "modelscope"):
        manifest["base"] |= {"model": "org/base", "hub": hub, "revision": commit}
        (mine / "mmq.json").write_text(json.dumps(manifest))
        assert mmq("publish", mine, f"{hub}:me/{hub}", "--no-reload")[0] == 0
        card = keeper.files(f"me/{hub}")["README.md"].decode()
        assert "license: mit\n" in card
        assert "base_model:\n- org/base\n" in card
        assert f"mmq quantize org/base {'--hub modelscope ' if hub == 'modelscope' else ''}--revision {commit}" in card
    base.gated = True
    code, _, err = mmq("publish", mine, "modelscope:me/other", "--no-reload")
    assert code == 2
    assert "gated" in err or "forbids" in err


def report(digest: str, *, label: str = "awq") -> Report:
    """A small bench report of an artifact with this digest, under this label."""
    numbers = {
        "fp16": {"output_rate": Figure(100.0, "tok/s", "measured"), "weights": Figure(2 << 30, "bytes", "computed")},
        label: {"output_rate": Figure(321.5, "tok/s", "measured"), "weights": Figure(1 << 30, "bytes", "computed")},
    }
    subjects = {"fp16": {"digest": "headers:1"}, label: {"digest": digest}}
    load = {"requests": 16, "concurrency": 4, "input_tokens": 64, "output_tokens": 64, "pictures": 1}
    load |= {"picture": (112, 112), "runs": 3, "warmups": 2, "seed": 0}
    settings = {"load": load, "vram": 24 << 30, "context": 2048}
    machine, when = {"words": f"a card of 24 GiB {label}"}, "2026-11-21T10:00:00+00:00"
    return Report("bench", when, "vllm", subjects, numbers, {}, settings, machine, {"mmq": label})


def test_a_bench_report_of_this_artifact_is_on_the_card(
    keeper: HubKeeper, mmq: Callable, mine: Path, tmp_path: Path
) -> None:
    from mmq.bench.report import write_report

    results = tmp_path / "bench-results"
    write_report(report(open_artifact(mine).digest), results / "20261121T100000-fp16-awq", markdown="")
    write_report(report("another"), results / "20261121T110000-fp16-awq", markdown="")
    (results / "20261121T100000-fp16-awq" / "curve.png").write_bytes(b"\x89PNG picture")
    assert mmq("publish", mine, BOTH[0], "--no-reload")[0] == 0
    files = keeper.files(NAME)
    card = files["README.md"].decode()
    assert "321.5" in card
    assert "| 每秒输出词元 | 100 | 321.5 |" in card
    assert "figures/curve.png" in card
    assert files["figures/curve.png"] == b"\x89PNG picture"
    code, _, err = mmq("publish", mine, BOTH[0], "--no-reload", "--report", results / "20261121T110000-fp16-awq")
    assert code == 2
    assert "did not measure this artifact" in err


@pytest.mark.parametrize("nasty", ["<img src=x>", "[a](http://e.x)", "http://e.x www.e.x", "a | b\n# c", "`x` @me *y*"])
def test_what_a_report_calls_things_is_inert_on_the_card(mine: Path, nasty: str) -> None:
    from test_card import artifact, markdown

    from mmq.bench.card_speed import speed_of
    from mmq.export.card import Told, card
    from mmq.export.source import Source

    def kinds(label: str) -> list[str]:
        opened = open_artifact(mine)
        told = Told(True, speed=speed_of(report(opened.digest, label=label), opened))
        text = card(artifact(), Source("m", None, "local", None), told)
        assert "://" not in text
        assert "@" not in text
        found = markdown(text.split("\n---\n", 1)[1])
        assert {target for kind, target in found if kind == "link_open"} == {"#english", "#%E4%B8%AD%E6%96%87"}
        return [kind for kind, _ in found if kind.endswith(("_open", "_block", "html_inline", "code_inline", "image"))]

    assert kinds(nasty) == kinds("harmless")


def test_a_clean_copy_has_what_is_published_and_nothing_else(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmq.bench.reload import clean_copy
    from mmq.export.remote import item

    items = [item("config.json", mine / "config.json"), item("sub/b.json", mine / "mmq.json")]
    opened = open_artifact(mine)
    with clean_copy(opened, items) as folder:
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["b.json", "config.json"]
        assert (folder / "config.json").samefile(mine / "config.json")
    assert not folder.exists()

    def link(one: object, two: object) -> None:
        raise OSError("no hard links between disks")

    monkeypatch.setattr(os, "link", link)
    with clean_copy(opened, items) as folder:
        assert (folder / "config.json").read_bytes() == (mine / "config.json").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="the disk is too small"), clean_copy(opened, items):
        pass
    assert not list(tmp_path.glob(".mmq-clean-*"))


def test_a_line_for_each_engine_that_would_load_it(mine: Path) -> None:
    from mmq.serve.hub_lines import hub_lines

    said = {line.engine: line.command for line in hub_lines(mine, "me/m", hub="hf", format="awq")}
    assert said["mmq"] == "mmq serve me/m"
    assert said["vLLM"] == "vllm serve me/m"
    assert said["LMDeploy"] == "lmdeploy serve api_server me/m --backend pytorch --model-format awq"
    there = {line.engine: line.command for line in hub_lines(mine, "me/m", hub="modelscope", format="awq", trust=True)}
    assert there["mmq"] == "mmq serve me/m --hub modelscope"
    assert there["vLLM"] == "VLLM_USE_MODELSCOPE=True vllm serve me/m --trust-remote-code"
    assert "transformers" not in there
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (mine / "config.json").write_text(json.dumps(config))
    assert "vLLM" not in {line.engine for line in hub_lines(mine, "me/m", hub="hf", format="awq")}


def test_the_licence_goes_with_the_artifact(tmp_path: Path) -> None:
    from mmq.export.beside import copy_small_files

    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    terms = ["LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "licence.md"]
    for name in (*terms, "README.md", ".env", "tokenizer.json", "notes.md"):
        (tmp_path / "base" / name).write_text(name)
    copy_small_files(tmp_path / "base", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*terms, "tokenizer.json"])


def test_no_token_in_any_process_list(keeper: HubKeeper, mine: Path, tmp_path: Path) -> None:
    """The command and all that it starts, looked at while it works; and everything that it says."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nps -eo args > seen.txt\nexit 1\n")
    program.chmod(0o755)
    command = [sys.executable, "-m", "mmq", "publish", str(mine), BOTH[0]]
    env = {**environment(keeper, tmp_path), "MMQ_VLLM": str(program), "MMQ_DEBUG": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    seen = (tmp_path / "seen.txt").read_text()
    assert "publish" in seen
    assert TOKEN not in seen + done.stdout + done.stderr


def block(card: str, language: str) -> str:
    """The first fenced block of a language under the English part's heading on making it again."""
    return card.split("### Making it again")[1].split(f"```{language}\n")[1].split("\n```")[0]


def test_the_recipe_on_the_card_is_the_recipe(keeper: HubKeeper, mmq: Callable, mine: Path) -> None:
    from mmq.recipes.recipe import parse

    assert mmq("publish", mine, BOTH[0], "--dry-run")[0] == 0
    recipe = parse(block((mine / "README.md").read_text(encoding="utf-8"), "yaml"), where="the card")
    manifest = open_artifact(mine).manifest["recipe"]
    told = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert told == manifest | {"keep": list(manifest["keep"])}


@pytest.mark.slow
def test_the_lines_on_the_card_make_the_same_bytes(
    keeper: HubKeeper, mmq: Callable, mine: Path, tmp_path: Path
) -> None:
    assert mmq("publish", mine, BOTH[0], "--dry-run")[0] == 0
    quantize, check = block((mine / "README.md").read_text(encoding="utf-8"), "sh").splitlines()
    assert check == "mmq check out-awq"
    (tmp_path / "again").mkdir()
    env = {**environment(keeper, tmp_path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *quantize.split()]
    done = subprocess.run(
        line, cwd=tmp_path / "again", env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert open_artifact(tmp_path / "again" / "out-awq", verify=True).digest == open_artifact(mine).digest


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_published_downloaded_and_served_by_the_real_engine(
    keeper: HubKeeper, mmq: Callable, mine: Path, tmp_path: Path, hub: str
) -> None:
    """The clean copy before it goes up, and the download of it after, each by a vLLM of its own."""
    from mmq.recipes.pebble.tasks import samples
    from mmq.recipes.samples import as_openai
    from mmq.serve.client import connect
    from mmq.serve.engines import plan
    from mmq.serve.machine import this_machine
    from mmq.serve.running import free_port, running

    code, out, err = mmq("publish", mine, f"{hub}:{NAME}", "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)["answer"]
    assert first
    assert b"vLLM loaded a clean copy of these files and answered" in keeper.files(NAME)["README.md"]
    again = json.loads(mmq("publish", mine, f"{hub}:{NAME}", "--json")[1])
    assert (again["answer"], again["published"][0]["sent"]) == (None, [])  # nothing new: no engine was started
    base = fetch(NAME, hub=hub, revision="v1")
    assert open_artifact(base.path, verify=True).digest == open_artifact(mine).digest
    launch = plan("vllm", base.path, machine=this_machine(), port=free_port())
    with running(launch, timeout=300, log_path=tmp_path / "log") as server, connect(server.url) as client:
        sample = next(iter(samples("test", 1)))
        reply = client.chat.completions.create(
            model=server.name,
            messages=as_openai(sample.question),  # pyright: ignore[reportArgumentType]
            max_tokens=32,
            temperature=0,
        )
    assert reply.choices[0].message.content == first == sample.answer
    assert "HF_TOKEN" in os.environ


def test_python_of_its_own_is_noticed(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """As MiniCPM-V's artifacts are: mmq read them without it, the recipe asks for none, and engines want it."""
    plain = open_artifact(artifact("awq"))
    assert not trusts(plain)
    ships = {**plain.manifest, "files": {**plain.manifest["files"], "modeling_new.py": {}}}
    assert not trusts(dataclasses.replace(plain, manifest=ships))  # Qwen2-VL's class is transformers' own
    config = json.loads((plain.path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "never_heard_of", "auto_map": {"AutoModel": "modeling_new.New"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert trusts(dataclasses.replace(plain, path=tmp_path, manifest=ships))
    assert not trusts(dataclasses.replace(plain, path=tmp_path))  # named, and not there
