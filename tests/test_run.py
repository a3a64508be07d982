"""`mmq run`: what a matrix is, what becomes of its jobs, what is kept, and what an interruption leaves. Real processes
of mmq's own on the embedded model; and the same on a Ray of this machine, where Ray is (see test_cluster.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from mmq.bench import run as running
from mmq.bench.done import Done, StepDone, facts, state_of, worst
from mmq.bench.jobs import Job, addresses, as_matrix, check_addresses, check_apart, matrix
from mmq.bench.run import call, published, run
from mmq.bench.run_page import markdown
from mmq.bench.steps import Settings, kept_artifact, kept_check
from mmq.export.alone import alone
from mmq.export.artifact import open_artifact
from mmq.recipes.recipe import limits_from, recipe_for

STRICT = "name: strict\nmodel: pebble\nsamples: 8\nlimits: {mean_kl: 0}\n"
LOOSE = "name: strict\nmodel: pebble\nsamples: 8\nversion: 2\nlimits: {top1: 0, accuracy_drop: 1, repeating: 1}\n"
HAS_RAY = importlib.util.find_spec("ray") is not None
PYTHON = os.environ.get("MMQ_TEST_RAY") or (sys.executable if HAS_RAY else "")
PEBBLE = recipe_for("pebble")
QUICK = ("--samples", "3", "--device", "cpu")


def mmq(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmq", "run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "mmq-run" / "run.json").read_text(encoding="utf-8"))
    return {job["name"]: job for job in found["jobs"]}


# what is to be made


def test_a_matrix_is_recipes_times_methods(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: 我的\nmodel: a/b\nmethod: gptq\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("name: bad\nmodl: a/b\n", encoding="utf-8")
    mine, bad = str(tmp_path / "mine.yaml"), str(tmp_path / "bad.yaml")
    assert [job.name for job in matrix(["pebble", mine])] == ["pebble-awq", "我的-gptq"]
    jobs = matrix(["pebble", bad], ["awq", "gptq"])
    assert [job.name for job in jobs] == ["pebble-awq", "pebble-gptq", "bad-awq", "bad-gptq"]
    assert [job.recipe is None for job in jobs] == [False, False, True, True]
    assert "unknown key 'modl'" in jobs[2].problem
    assert as_matrix(jobs[:1]) == {"include": [{"recipe": "pebble", "method": "awq", "name": "pebble-awq"}]}


def test_a_method_that_a_recipe_cannot_have_is_that_jobs_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: pebble\nquality: best\n", encoding="utf-8")
    awq, bnb = matrix([str(tmp_path / "mine.yaml")], ["awq", "bnb"])
    assert awq.recipe is not None
    assert bnb.recipe is None
    assert "method bnb has one quality only" in bnb.problem


def test_a_folder_of_recipes_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("name: one\nmodel: pebble\n", encoding="utf-8")
    (tmp_path / "two.yml").write_text("name: two\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a recipe")
    one, two, pebble = matrix([str(tmp_path), "pebble"])
    assert (one.name, two.name, pebble.name) == ("one-awq", "two-awq", "pebble-awq")
    assert one.recipe
    assert "key 'model' is missing" in two.problem
    (tmp_path / "config.json").write_text("{}")  # a model, whatever else is there
    assert [job.source for job in matrix([str(tmp_path)])] == [str(tmp_path)]


def test_what_no_matrix_is() -> None:
    with pytest.raises(ValueError, match=r"no method 'awk'; --methods takes awq, gptq"):
        matrix(["pebble"], ["awk"])
    with pytest.raises(ValueError, match=r"pebble and pebble would both make pebble-awq"):
        matrix(["pebble", "pebble"])


@pytest.mark.parametrize("name", ["../up", "a b", "/etc", "-x", ".hidden", ""])
def test_a_name_that_is_no_folders_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: {json.dumps(name)}\nmodel: pebble\n", encoding="utf-8")
    (job,) = matrix([str(tmp_path / "mine.yaml")])
    assert job.recipe is None
    assert job.name == "mine-awq"


def test_addresses_take_the_recipes_name() -> None:
    awq, gptq = matrix(["pebble"], ["awq", "gptq"])
    places = ("hf:me/{name}-{method}", "modelscope:me/{name}-{method}-v{version}")
    assert addresses(places, awq) == ["hf:me/pebble-awq", "modelscope:me/pebble-awq-v1"]
    check_apart(places, [awq, gptq])
    with pytest.raises(ValueError, match=r"would both be published at hf:me/pebble; add \{method\}"):
        check_apart(["hf:me/{name}"], [awq, gptq])
    for wrong in ("hf:me/{nam}", "hf:me/{0}", "hf:me/{", "hf:me/{name.__class__}"):
        with pytest.raises(ValueError, match="--publish"):
            check_addresses([wrong])
    for wrong in ("hub:me/{name}", "me/{name}", "hf:{name}", "hf:me/{name}/{method}", "hf:me/{name} "):
        with pytest.raises(ValueError, match="is no place to publish to"):
            check_addresses([wrong])


def test_a_name_that_no_hub_takes_is_that_jobs_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: 配方\nmodel: pebble\n", encoding="utf-8")
    mine, pebble = matrix([str(tmp_path / "mine.yaml"), "pebble"], publish=["hf:me/{name}"])
    assert pebble.recipe
    assert "'hf:me/配方' is no place to publish to" in mine.problem


# what comes out


def done(**changes: Any) -> Done:
    return Done("a-awq", "a.yaml", "awq", **changes)


def test_the_worst_job_is_the_exit_code() -> None:
    codes = [done(code=code, state=state_of(code)) for code in (0, 3, 1, 2)]
    assert worst(codes) == 3
    assert worst([]) == 0
    assert [result.state for result in codes] == ["done", "engine died", "past a limit", "failed"]
    assert facts(codes)["code"] == 3
    assert state_of(139) == "fault"


def test_the_page_is_words_whatever_a_recipe_says() -> None:
    hostile = "<img src=x onerror=alert(1)> | [click](javascript:x) `a` **b** @everyone https://x.example"
    text = markdown([done(code=2, state="failed", why=(hostile,), steps=(StepDone("quantize", 2, 1.0),))])
    assert "<img" not in text
    assert "\\[click\\]" in text
    assert "| [" not in text
    assert "@everyone" not in text
    assert "://" not in text  # a bare address would become a link
    assert markdown([]).startswith("# 0 of 0")


def test_the_page_has_the_tables() -> None:
    good = done(
        state="done",
        steps=(StepDone("quantize", 0, 3.0), StepDone("check", 0, kept=True)),
        bytes={"base": 2**30, "artifact": 2**28},
        measures={"mean_kl": 0.0123, "top1": 0.99},
        limits={"mean_kl": 0.1, "top1": 0.9},
        published=("hf:me/a-awq", "modelscope:me/a-awq"),
    )
    text = markdown([good, Done("b-awq", "b.yaml", "awq")])
    assert "# 1 of 2 artifacts" in text
    assert "| `a-awq` | ✅ done | 0.0123 | 0.99 | 256.00 MiB | 3 s |" in text
    assert "| mean KL to FP16 (nats a token) | 0.0123 | ≤ 0.1 |" in text
    assert "<https://huggingface.co/me/a-awq>" in text
    assert "<https://modelscope.cn/models/me/a-awq>" in text
    assert "| `b-awq` | ⬜ not begun |" in text


# processes


def test_a_steps_last_word_is_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert call(["recipes", "pebble"], log) == (0, ())
    code, why = call(["recipes", "peble"], log)
    assert code == 2
    assert why == ("no recipe, folder or hub id 'peble': did you mean pebble?",)
    said = log.read_text(encoding="utf-8")
    assert "$ mmq recipes pebble\n" in said
    assert "name: pebble" in said


def test_a_crash_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(program))
    code, why = call(["quantize"], tmp_path / "log")
    assert code == 70
    assert why == ("mmq quantize was ended by SIGKILL; the system may have run out of memory",)


def test_the_command_lists_and_refuses(tmp_path: Path) -> None:
    listed = mmq("pebble", "--methods", "awq, gptq", "--list", "--json", folder=tmp_path)
    assert [job["name"] for job in json.loads(listed.stdout)["include"]] == ["pebble-awq", "pebble-gptq"]
    for words, said in (
        (("pebble", "--", "--public"), "--public is for `mmq publish`; give --publish, or leave it out"),
        (("pebble", "--publish", "hf:me/{nme}"), "{nme} is unknown; known are {name}, {method}, {version}"),
        (("pebble", "--publish", "hf:me/{name}", "--", "--pubic"), "--pubic"),
        (("pebble", "--publish", "hf:me/{name}", "--", "--public", "hf:me/x"), "addresses are --publish hf:me/x"),
    ):
        refused = mmq(*words, folder=tmp_path)
        assert refused.returncode == 2
        assert said in refused.stderr
    assert not (tmp_path / "mmq-run").exists()


@pytest.mark.parametrize(("hub", "told"), [("hf", "log in with `hf auth login`"), ("modelscope", "`modelscope login`")])
def test_without_a_token_nothing_is_made_to_be_published(
    hub: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HOME", "MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    refused = mmq("pebble", "--publish", f"{hub}:me/{{name}}", folder=tmp_path)
    assert refused.returncode == 2
    assert "needs a token" in refused.stderr
    assert told in refused.stderr
    assert not (tmp_path / "mmq-run").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with (
            alone(out, "mmq run"),
            pytest.raises(ValueError, match="another `mmq run` works in"),
            alone(out, "mmq run"),
        ):
            pass
        assert not out.exists()  # nothing came into it
    with alone(out, "mmq run"):
        (out / "run.json").write_text("{}")
        refused = mmq("pebble", "--json", "-o", "out", folder=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")  # no results with code 0
    assert [p.name for p in out.iterdir()] == ["run.json"]


def test_remote_code_is_not_pinned_by_the_run_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: owner/model\ntrust_remote_code: true\n", encoding="utf-8")
    (found,) = run(matrix([str(tmp_path / "mine.yaml")]), Settings(tmp_path / "out"))
    assert found.code == 2
    assert "which a file cannot allow" in found.why[0]
    (found,) = run(matrix([str(tmp_path / "mine.yaml")], trust=True), Settings(tmp_path / "out"))
    assert found.code == 2
    assert "the full hash of the commit that you have read" in found.why[0]


def test_what_the_hub_does_not_have_is_that_jobs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: owner/model\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    told = []
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        jobs = matrix([str(tmp_path / "mine.yaml")], ["awq", "gptq"])
        found = run(jobs, Settings(tmp_path / "out"), on_done=lambda results: told.append([r.state for r in results]))
    assert [result.code for result in found] == [2, 2]
    assert all("no model owner/model" in result.why[0] for result in found)
    assert told == [["failed", "not begun"], ["failed", "failed"]]


def test_what_a_folder_does_not_take_is_that_jobs_alone(tmp_path: Path) -> None:
    """A name that is none of a file's, and a log that cannot be written."""
    (tmp_path / "long.yaml").write_text(f"name: {'配' * 90}\nmodel: pebble\n", encoding="utf-8")
    (tmp_path / "held.yaml").write_text("name: held\nmodel: pebble\n", encoding="utf-8")
    settings = Settings(tmp_path / "out", samples=1)
    settings.out.mkdir()
    (settings.out / "logs" / "held-awq.log").mkdir(parents=True)
    named, held, other = run(
        matrix([str(tmp_path / "long.yaml"), str(tmp_path / "held.yaml"), str(tmp_path / "none.yaml")]), settings
    )
    assert (named.code, held.code, other.code) == (2, 2, 2)
    assert "200 bytes at most" in named.why[0]
    assert "held-awq.log" in held.why[0]
    assert "no recipe file" in other.why[0]


def begun(folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A run of bad.yaml and strict.yaml that has finished its first layer, and that layer's file."""
    for name, text in (("strict", STRICT), ("bad", "name: bad\n")):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mmq", "run", "bad.yaml", "strict.yaml", *QUICK]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    layer = folder / "mmq-run" / "strict-awq" / "model-00001-of-00006.safetensors"
    until = time.monotonic() + 120
    while not layer.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    return process, layer


def at_work(folder: Path) -> list[int]:
    """Processes that work in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow  # test_workflows.py has an interruption by default
def test_interrupted_taken_up_failed_and_kept(tmp_path: Path) -> None:
    """A life of two recipes, one of which cannot be read, and the other is past its limits at first."""
    process, layer = begun(tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert at_work(tmp_path) == []
    assert results(tmp_path)["strict-awq"]["state"] == "interrupted"
    assert not (layer.parent / "mmq.json").exists()
    written = layer.stat().st_mtime_ns

    words = ("bad.yaml", "strict.yaml", *QUICK)
    first = mmq(*words, "--summary", "page.md", folder=tmp_path)
    assert first.returncode == 2, first.stderr  # the worst of 2 and 1
    assert layer.stat().st_mtime_ns == written  # taken up, not made again
    bad, strict = results(tmp_path).values()
    assert (bad["code"], bad["state"]) == (2, "failed")
    assert "key 'model' is missing" in bad["why"][0]
    assert (strict["code"], strict["state"]) == (1, "past a limit")
    assert strict["why"][0].startswith("past the limit: mean_kl is")
    assert strict["measures"]["mean_kl"] > 0
    assert "| `strict-awq` | ❌ past a limit (check) |" in (tmp_path / "page.md").read_text(encoding="utf-8")

    log = tmp_path / strict["log"]
    before = log.read_bytes()
    again = mmq(*words, "--json", folder=tmp_path)
    assert again.returncode == 2
    kept = json.loads(again.stdout)["jobs"][1]
    assert log.read_bytes() == before  # nothing was started
    assert kept["digest"] == strict["digest"]
    assert all(step["kept"] for step in kept["steps"])
    assert (kept["code"], kept["why"]) == (1, strict["why"][: len(kept["why"])])  # a failed check stays one


def test_what_is_there_is_kept_and_the_gate_holds(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """An artifact of the recipe's key with a report of a check: no process is started, whatever the report says."""
    folder = Path(shutil.copytree(artifact("awq"), tmp_path / "out" / "stone-awq"))
    recipe = "name: stone\nmodel: pebble\nsamples: 48\nversion: 2\nlimits: {mean_kl: 1}\n"
    (tmp_path / "stone.yaml").write_text(recipe, encoding="utf-8")
    jobs = matrix([str(tmp_path / "stone.yaml")])
    settings = Settings(tmp_path / "out", samples=1)
    before = open_artifact(folder)
    limits = json.loads(json.dumps(dataclasses.asdict(limits_from({"mean_kl": 1}, where=""))))
    report = {"digest": before.digest, "limits": limits, "asked": 1, "samples": [{}], "measures": {"mean_kl": 2.0}}
    failed = {**report, "passed": False, "failures": ["mean_kl is 2, the limit is <= 1"]}
    for told, code, why in ((failed, 1, ("past the limit: mean_kl is 2, the limit is <= 1",)), (report, 0, ())):
        (folder / "check.json").write_text(json.dumps({"passed": True, "failures": [], **told}), encoding="utf-8")
        (found,) = run(jobs, settings)
        assert (found.code, found.why, found.digest) == (code, why, before.digest)
        assert [(step.name, step.kept) for step in found.steps] == [("quantize", True), ("check", True)]
        assert not settings.log(jobs[0]).exists()
    now = open_artifact(folder)
    assert (now.manifest["name"], now.manifest["recipe"]["version"]) == ("stone-awq", 2)  # what it says now
    assert kept_check(now, settings)
    assert not kept_check(now, Settings(settings.out, samples=2))
    assert kept_artifact(folder, {"digest": "another"}, PEBBLE) is None
    kept_artifact(folder, now.manifest["key"], PEBBLE)  # other limits: to be checked anew
    assert not kept_check(open_artifact(folder), settings)


def test_a_dry_run_has_published_nothing(artifact: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(artifact("awq"), tmp_path / "pebble-awq")
    flags = ("--dry-run", "--no-reload", "--no-gate")
    settings = Settings(tmp_path, publish=("hf:me/{name}",), publish_flags=flags)
    (tmp_path / "logs").mkdir()
    found = published(done(), matrix(["pebble"])[0], settings)
    assert (found.code, found.state, found.published) == (0, "done", ())
    assert (tmp_path / "pebble-awq" / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_or_killed_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    process, layer = begun(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    until = time.monotonic() + 30
    while at_work(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert at_work(tmp_path) == []
    assert layer.exists()
    assert not (layer.parent / "mmq.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_step_outlives_us_from_its_first_moment(number: signal.Signals, tmp_path: Path) -> None:
    """We are killed as soon as its watch or it is there; by itself it would wait for an answer for long."""
    for others in (1, 2, 2):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            code = f"from pathlib import Path; from mmq.bench.run import call; call(['infer', '{url}'], Path('log'))"
            with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
                until = time.monotonic() + 30
                while len(set(at_work(tmp_path)) - {process.pid}) < others and time.monotonic() < until:
                    pass
                process.send_signal(number)
            until = time.monotonic() + 60
            while at_work(tmp_path) and time.monotonic() < until:
                time.sleep(0.05)
            assert at_work(tmp_path) == []


def test_a_job_knows_its_name_without_a_recipe() -> None:
    assert Job("recipes/some.yaml", "awq", None, "why").name == "some-awq"


@pytest.mark.skipif(not PYTHON, reason="Ray is not installed, and MMQ_TEST_RAY names no Python that has it")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recipes_on_a_ray_of_this_machine(tmp_path: Path) -> None:
    """As on one machine: a failure stops nobody else, a second run keeps what is there. And Ctrl-C leaves nothing."""
    (tmp_path / "strict.yaml").write_text(STRICT, encoding="utf-8")
    (tmp_path / "loose.yaml").write_text(LOOSE.replace("strict", "loose"), encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("name: bad\n", encoding="utf-8")
    recipes = ("strict.yaml", "loose.yaml", "bad.yaml")
    command = [PYTHON, "-m", "mmq", "run", *recipes, *QUICK, "--ray", "local", "--json"]
    for kept in (False, True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 2, done.stderr[-2000:]
        found = {job["name"]: job for job in json.loads(done.stdout.splitlines()[-1])["jobs"]}
        assert [found[name]["code"] for name in ("strict-awq", "loose-awq", "bad-awq")] == [1, 0, 2]
        assert all(step["kept"] == kept for step in found["loose-awq"]["steps"])
        assert found["strict-awq"]["why"][0].startswith("past the limit: mean_kl is")

    again = [*command, "--methods", "gptq"]
    process = subprocess.Popen(again, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not list((tmp_path / "mmq-run").glob("*-gptq/model-00001-*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert at_work(tmp_path) == []
    assert "interrupted" in [job["state"] for job in results(tmp_path).values()]
