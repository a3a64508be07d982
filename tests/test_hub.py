"""fetch against a real loopback hub, each call in a process of its own, through both hub libraries; local folders."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer, Repo, safetensors

from mmq.recipes.hub import Base, _interruptible, fetch
from mmq.recipes.progress import Step
from mmq.recipes.remote import RemoteFile, small, weights

MIB = 1 << 20
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
SCRIPT = """
import json, sys
from mmq.recipes.hub import fetch
steps = []
try:
    base = fetch(sys.argv[1], hub=sys.argv[2], revision=sys.argv[3] or None, tell=steps.append)
    told = {"path": str(base.path), "name": base.name, "hub": base.hub, "revision": base.revision}
except (ValueError, OSError) as e:
    told = {"error": str(e), "kind": "ValueError" if isinstance(e, ValueError) else "OSError"}
except KeyboardInterrupt:
    told = {"kind": "KeyboardInterrupt"}
last = {s.name: [s.done, s.total] for s in steps}
print(json.dumps({**told, "last": last, "torch": "torch" in sys.modules}))
"""


def whole(**more: bytes) -> dict[str, bytes]:
    """A small checkpoint with everything that stands beside one, needed or not."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "LICENSE": b"free",
        "README.md": b"# A model",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "chat_template.jinja": b"{{ messages }}",
        "config.json": b'{"model_type": "qwen2_vl"}',
        "consolidated.safetensors": safetensors({"again": 10}),
        "figures/chart.png": b"\x89PNG",
        "generation_config.json": b'{"top_k": 1}',
        "merges.txt": "你好".encode(),
        "model.onnx": b"onnx",
        "model.safetensors": safetensors({"weight": 3 * MIB}),
        "modeling_mine.py": b"x = 1",
        "original/model.safetensors": safetensors({"original": 10}),
        "preprocessor_config.json": b'{"max_pixels": 1}',
        "pytorch_model.bin": b"pickle",
        "tokenizer.json": b'{"model": {}}',
        "training_args.bin": b"pickle",
        **more,
    }


NEEDED = [
    "LICENSE",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "modeling_mine.py",
    "preprocessor_config.json",
    "tokenizer.json",
]


def repo(files: dict[str, bytes] | None = None, **more: object) -> Repo:
    return Repo({NEW: files or whole()}, {"main": NEW, "master": NEW}, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Here:
    """One hub library with caches of its own, pointed at the loopback server."""

    hub: str
    folder: Path
    server: HubServer

    def environment(self, **more: str) -> dict[str, str]:
        ours = ("HF_", "HUGGING", "MODELSCOPE_", "MMQ_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        return {
            **kept,
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / "hf"),
            "HF_ENDPOINT": self.server.url,
            "HF_HUB_DISABLE_XET": "1",
            "MODELSCOPE_CACHE": str(self.folder / "ms"),
            "MODELSCOPE_HOME": str(self.folder / "ms-home"),
            "MODELSCOPE_ENDPOINT": self.server.url,
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # else 7 s for every question to a closed port
            **more,
        }

    def start(self, model: str = "some/model", revision: str = "", **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, model, self.hub, revision]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(**env), stdout=pipe, stderr=pipe, text=True)

    def fetch(self, model: str = "some/model", revision: str = "", **env: str) -> dict:
        with self.start(model, revision, **env) as process:
            out, err = process.communicate(timeout=90)
        assert (process.returncode, err) == (0, "")  # the libraries are kept quiet, whatever happens
        told = json.loads(out)
        assert not told["torch"]
        return told

    def fails(self, kind: str = "OSError", **kwargs: str) -> str:
        told = self.fetch(**kwargs)
        assert told.get("kind") == kind, told
        assert "\n" not in told["error"]
        return told["error"]

    def token(self, value: str) -> dict[str, str]:
        return {"HF_TOKEN" if self.hub == "hf" else "MODELSCOPE_API_TOKEN": value}


@pytest.fixture(params=["hf", "modelscope"])
def here(request, tmp_path):
    with HubServer({"some/model": repo()}) as server:
        yield Here(request.param, tmp_path, server)


def files(folder: str) -> dict[str, bytes]:
    base = Path(folder)
    return {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}


def test_the_needed_files_come_and_no_others(here):
    told = here.fetch()
    assert (told["name"], told["hub"], told["revision"]) == ("model", here.hub, NEW)
    assert here.server.got() == NEEDED
    assert files(told["path"]) == {path: whole()[path] for path in NEEDED}
    size = len(whole()["model.safetensors"])
    assert told["last"]["download"] == [size, size]


def test_a_second_fetch_downloads_nothing_and_a_pinned_one_asks_nothing(here):
    first = here.fetch()
    here.server.asked.clear()
    assert here.fetch()["path"] == first["path"]
    assert here.server.asked == []
    here.server.calls.clear()
    assert here.fetch(revision=NEW)["path"] == first["path"]
    assert [c for c in here.server.calls if "some/model" in c] == []


def test_a_branch_becomes_its_commit_and_follows_when_it_moves(here):
    newer = whole(**{"config.json": b'{"model_type": "newer"}'})
    there = here.server.repos["some/model"]
    there.commits = {OLD: whole(), NEW: newer}
    there.branches = {"main": OLD, "master": OLD, "next": NEW}
    assert here.fetch()["revision"] == OLD
    assert here.fetch(revision="next")["revision"] == NEW
    assert here.fetch(revision=OLD)["revision"] == OLD
    there.branches["main"] = there.branches["master"] = NEW
    told = here.fetch()
    assert told["revision"] == NEW
    assert files(told["path"])["config.json"] == newer["config.json"]


def test_shards_are_those_that_the_index_names(here):
    parts = {"a.safetensors": safetensors({"a": 5}), "sub/b.safetensors": safetensors({"b": 6})}
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "sub/b.safetensors"}}
    sharded = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **parts}
    here.server.repos["some/model"] = repo({**sharded, "stray.safetensors": safetensors({"c": 7})})
    assert files(here.fetch()["path"]) == sharded
    here.server.repos["some/broken"] = repo({k: v for k, v in sharded.items() if not k.startswith("sub")})
    said = here.fails("ValueError", model="some/broken")
    assert "names sub/b.safetensors, which is not on the hub" in said


def test_a_dropped_connection_is_resumed_where_it_broke(here):
    # huggingface_hub takes pieces of 10 MiB, and only whole pieces count as received.
    big = safetensors({"weight": 16 * MIB})
    here.server.repos["some/model"] = repo(whole(**{"model.safetensors": big}))
    here.server.cut["model.safetensors"] = 11 * MIB
    told = here.fetch()
    assert files(told["path"])["model.safetensors"] == big
    ranges = [a.range for a in here.server.asked if a.method == "GET" and a.path == "model.safetensors"]
    assert len(ranges) == 2
    assert ranges[0] is None
    offset = int(ranges[1].removeprefix("bytes=").removesuffix("-"))  # type: ignore[union-attr]
    assert offset == 10 * MIB if here.hub == "hf" else 10 * MIB < offset <= 11 * MIB


def killed_midway(here: Here, path: str, after: int) -> None:
    here.server.stall[path] = after
    with here.start() as process:
        try:
            assert here.server.stalled.wait(timeout=60)
            # The bytes are sent; wait until the library has had the time to write what it writes.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=10)
    here.server.resume.set()


def test_a_killed_download_goes_on(here):
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    parts = {"a.safetensors": safetensors({"a": MIB}), "b.safetensors": safetensors({"b": 6 * MIB})}
    sharded = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **parts}
    here.server.repos["some/model"] = repo(sharded)
    killed_midway(here, "b.safetensors", 4 * MIB)
    assert "error" in here.fetch(**{"HF_HUB_OFFLINE": "1", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"})
    here.server.asked.clear()
    told = here.fetch()
    assert files(told["path"]) == sharded
    assert here.server.got() == ["b.safetensors"]  # what was whole is not asked for again
    (asked,) = [a for a in here.server.asked if a.method == "GET"]
    if here.hub == "hf":  # huggingface_hub begins the file that it was killed in anew
        assert asked.range is None
    else:
        assert asked.range is not None
        assert 0 < int(asked.range.removeprefix("bytes=").removesuffix("-")) <= 4 * MIB


def test_ctrl_c_ends_a_download_without_waiting_for_its_end(here):
    here.server.repos["some/model"] = repo(whole(**{"model.safetensors": safetensors({"weight": 80 * MIB})}))
    here.server.slow.add("model.safetensors")  # 20 s in all
    with here.start() as process:
        assert here.server.stalled.wait(timeout=60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (json.loads(out)["kind"], err) == ("KeyboardInterrupt", "")


def test_ctrl_c_that_does_not_wake_us_is_seen():
    """A signal that comes just before a wait begins leaves it asleep; as does one that another thread takes."""
    stop, stopped = threading.Event(), list[bool]()

    def work() -> None:
        time.sleep(1)  # by then it is awaited
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        stopped.append(stop.wait(20))

    with pytest.raises(KeyboardInterrupt):
        _interruptible(work, stop)
    assert stopped == [True]


def test_a_wrong_hash_is_named_and_the_file_deleted(here):
    here.server.repos["some/model"].wrong.add("model.safetensors")
    said = here.fails()
    assert "some/model: model.safetensors came with a wrong hash" in said
    assert "run again" in said
    left = [p for p in here.folder.rglob("*") if p.is_file() and p.stat().st_size >= 3 * MIB]
    assert left == []
    here.server.repos["some/model"].wrong.clear()
    here.server.asked.clear()
    told = here.fetch()
    assert here.server.got() == ["model.safetensors"]
    assert files(told["path"])["model.safetensors"] == whole()["model.safetensors"]


def test_a_file_spoiled_after_the_record_is_not_taken_for_whole(here):
    path = Path(here.fetch()["path"])
    (path / "model.safetensors").resolve().write_bytes(b"cut off")
    here.server.close()
    assert "model.safetensors" in here.fails()


def test_an_unknown_id_and_an_unknown_revision(here):
    said = here.fails(model="some/thing")
    assert "no model some/thing on 127.0.0.1" in said
    assert "log in with" in said
    assert "no revision v9" in here.fails(revision="v9")
    assert here.server.asked == []


def test_private_gated_and_a_stale_token(here):
    here.server.repos["some/model"].token = "s3cret"
    assert "or a private one" in here.fails()
    stale = here.fails(**here.token("stale"))
    assert "token" in stale
    assert "stale" not in stale
    assert here.fetch(**here.token("s3cret"))["revision"] == NEW
    assert "s3cret" in here.server.tokens
    here.server.repos["some/gated"] = repo(gated=True, token="s3cret")
    said = here.fails(model="some/gated", **here.token("s3cret"))
    assert "some/gated" in said
    assert ("accept its terms" if here.hub == "hf" else "ask for access") in said
    assert "s3cret" not in said


def test_pickles_alone_are_refused_before_any_download(here):
    here.server.repos["some/model"] = repo({"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"p"})
    said = here.fails("ValueError")
    assert "pickles alone (pytorch_model-00001-of-00002.bin)" in said
    assert "save_pretrained" in said
    assert here.server.asked == []


def test_a_disk_too_small_is_told_before_the_weights(here):
    here.server.repos["some/model"].claims["model.safetensors"] = 1 << 60
    said = here.fails()
    assert "some/model needs 1073741824.0 GiB, " in said
    assert f" GiB free in {here.folder}" in said
    assert "model.safetensors" not in here.server.got()


def test_without_network_a_whole_cache_does(here):
    online = here.fetch()
    here.server.close()
    for revision in ("", NEW):
        offline = here.fetch(revision=revision)
        assert (offline["path"], offline["revision"]) == (online["path"], NEW)
    said = here.fails(revision="v9")
    assert "cannot reach 127.0.0.1" in said
    assert "some/model at v9 is not in the cache" in said
    assert "some/other at m" in here.fails(model="some/other")


def test_without_network_an_incomplete_cache_says_what_is_missing(here):
    path = Path(here.fetch()["path"])
    (path / "config.json").unlink()
    here.server.close()
    said = here.fails()
    assert "the copy in the cache is not whole" in said
    assert "config.json" in said


def test_offline_mode_of_huggingface_hub_is_kept(tmp_path):
    with HubServer({"some/model": repo()}) as server:
        here = Here("hf", tmp_path, server)
        assert "HF_HUB_OFFLINE is set" in here.fails(HF_HUB_OFFLINE="1")
        here.fetch()
        server.calls.clear()
        assert here.fetch(HF_HUB_OFFLINE="1")["revision"] == NEW
        assert server.calls == []


def test_a_cache_made_by_huggingface_hub_itself_is_taken(tmp_path):
    with HubServer({"some/model": repo()}) as server:
        here = Here("hf", tmp_path, server)
        code = "from huggingface_hub import snapshot_download as s; s('some/model')"
        quiet = here.environment(HF_HUB_DISABLE_PROGRESS_BARS="1")
        subprocess.run([sys.executable, "-c", code], env=quiet, check=True, timeout=60)
        server.asked.clear()
        told = here.fetch()
        assert server.asked == []
        assert told["last"]["verify"][0] == len(whole()["model.safetensors"])
        code = "from huggingface_hub import scan_cache_dir as s; (r,) = s().repos; print(r.repo_id, len(s().warnings))"
        done = subprocess.run([sys.executable, "-c", code], env=quiet, check=True, timeout=60, capture_output=True)
        assert done.stdout.split() == [b"some/model", b"0"]  # our record does not disturb the library's view


# Folders and names, in this process


@pytest.fixture
def folder(tmp_path):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(safetensors({"a": 100}))
    (tmp_path / "two.safetensors").write_bytes(safetensors({"b": 100}))
    return tmp_path


def test_a_local_folder_is_taken_as_it_is(folder):
    steps: list[Step] = []
    assert fetch(str(folder), tell=steps.append) == Base(folder.resolve(), folder.name, "local", None)
    assert steps == []
    with pytest.raises(ValueError, match="has no revision"):
        fetch(str(folder), revision="main")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds a LoRA adapter, not a model"),
        (lambda f: (f / "config.json").rename(f / "a.gguf"), "holds GGUF files (a.gguf)"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "two.safetensors").unlink(), "lacks two.safetensors, which model.safetensors.index.json names"),
        (lambda f: cut(f / "two.safetensors"), "two.safetensors has 171 bytes where its header counts 172"),
        (lambda f: (f / "two.safetensors").write_bytes(b"\1"), "two.safetensors is no whole safetensors file"),
        (lambda f: (f / "two.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"), "has no safetensors header"),
        (lambda f: (f / "two.safetensors").write_text(POINTER), "two.safetensors is a Git LFS pointer"),
        (
            lambda f: (f / "two.safetensors").write_bytes(safetensors({"c": 1})),
            "places b in two.safetensors",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is no index: it has no weight_map"),
    ],
)
def test_a_spoiled_folder_is_told_by_file(folder, spoil, said):
    spoil(folder)
    with pytest.raises(OSError, match=re.escape(said)):
        fetch(str(folder))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickles alone"),
        ("adapter_model.safetensors", "LoRA adapter"),
        ("model-q4.gguf", "GGUF"),
        ("flax_model.msgpack", r"holds no \.safetensors"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds(tmp_path, name, said):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=said):
        fetch(str(tmp_path))


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_a_download_that_fails_tells_no_signed_address(hub, monkeypatch):
    from mmq.recipes import hub_hf, hub_modelscope

    monkeypatch.setenv("HF_TOKEN", "my-very-own-token")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "my-very-own-token")
    wrong = RuntimeError("GET https://cdn.example/blob?X-Signature=abcdef with my-very-own-token: \x1b[2J broken")
    told = str(hub_hf._explained(wrong, "a/b", None) if hub == "hf" else hub_modelscope._explained(wrong, "a/b"))
    assert "broken" in told
    for secret in ("abcdef", "cdn.example", "my-very-own-token", "\x1b"):
        assert secret not in told


def test_names_that_are_nothing():
    with pytest.raises(ValueError, match=r"no folder \./nowhere, and it is no hub id either"):
        fetch("./nowhere")
    with pytest.raises(ValueError, match="hub is 'gitee'; it must be one of hf, modelscope"):
        fetch("some/model", hub="gitee")
    for elsewhere in ("../../etc", "/etc/hostname"):
        with pytest.raises(ValueError, match="revision is"):
            fetch("some/model", revision=elsewhere)
    with pytest.raises(ValueError, match="pebble is on this machine"):
        fetch("pebble", revision="main")


def test_one_whole_file_goes_before_shards_without_an_index():
    listed = [RemoteFile(n, 1) for n in ("model.safetensors", "model.fp16.safetensors", "sub/x.safetensors")]
    assert [f.path for f in weights("m", listed)] == ["model.safetensors"]
    assert [f.path for f in weights("m", listed[1:])] == ["model.fp16.safetensors"]
    assert small(listed) == []


ELSEWHERE = ("../evil.json", "../../evil.json", "/tmp/evil.json", "a/../../evil.json")
ELSEWHERE += ("../../additional_chat_templates/evil.jinja", "additional_chat_templates/../../evil.jinja")


def test_listed_names_that_leave_the_folder_are_not_asked_for(here):
    """A hub may list what it likes."""
    here.server.repos["some/model"] = repo({**whole(), **dict.fromkeys(ELSEWHERE, b"evil")})
    here.fetch()
    assert here.server.got() == NEEDED
    above = (here.folder.parent, here.folder.parent.parent, Path("/tmp"))  # other tests' folders are below them
    assert not [*here.folder.rglob("evil*"), *(path for place in above for path in place.glob("evil*"))]


@pytest.mark.parametrize("name", ["..\\evil.json", "evil\x1b[2J\u202e.json"])
def test_listed_names_that_are_none_are_refused(here, name):
    here.server.repos["some/model"] = repo({**whole(), name: b"evil"})
    assert "only files of the same folder can be named" in here.fails("ValueError")
    assert here.server.got() == []


def test_an_index_from_the_hub_names_no_file_elsewhere(here):
    index = json.dumps({"weight_map": {"a": "../../model.safetensors"}}).encode()
    listed = {"../../model.safetensors": safetensors({"a": 5}), "model.safetensors.index.json": index}
    here.server.repos["some/model"] = repo({"config.json": b"{}", **listed})
    assert "only files of the same folder can be named" in here.fails("ValueError")
