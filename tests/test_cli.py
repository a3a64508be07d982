"""The command line: each kind of bad input is one clear line and an exit code, and nothing is lost by it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import vlm
from transformers import AutoTokenizer

from mmq.__main__ import said
from mmq.commands.terminal import until_left
from mmq.export.alone import alone
from mmq.recipes.pebble import model_folder
from mmq.recipes.template import check_templates

Run = Callable[..., tuple[int, str, str]]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def one_line(err: str) -> str:
    """The last line of stderr, which must be the only one that is mmq's, and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("mmq: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "Qwen2-VL-2B"], "did you mean Qwen2-VL-2B-Instruct"),
        (["recipes", "peble"], "did you mean pebble"),
        (["quantize", "pebble", "--format", "gptq", "--asymmetric"], "cannot hold asymmetric awq"),
        (["quantize", "pebble", "--group-size", "100"], "group_size is 100; it must be one of 32, 64, 128"),
        (["quantize", "pebble", "--samples", "0"], "samples is 0"),
        (["quantize", "pebble", "--calibration", "nowhere.jsonl"], "no calibration 'nowhere.jsonl'"),
        (["quantize", "pebble", "--revision", "main"], "leave --revision out"),
        (["quantize", "pebble", "--keep", "mpl", "--samples", "2"], "nothing in the model is named 'mpl'"),
        (["quantize", "pebble", "--device", "tpu"], "it must be auto, cpu, cuda"),
        (["check", "nowhere"], "nowhere: no such folder"),
        (["check", "."], "not an mmq artifact"),
        (["serve", "nowhere", "--print"], "no recipe, folder or hub id 'nowhere'"),
        (["serve", "pebble", "--print", "--engine", "triton"], "known engines are"),
        (["serve", "pebble", "--max-body", "64"], "--max-body is '64'; write a number and its unit"),
        (["infer"], "name what to ask"),
        (["infer", "--url", "http://127.0.0.1:9", "hello", "--", "--max-model-len", "64"], "runs already"),
        (["infer", "--url", "http://127.0.0.1:9", "hello"], "no server answers at http://127.0.0.1:9"),
        (["serve", "pebble", "out-awq"], "out-awq: name one model; an engine's own flags come after --"),
        (["app", "pebble", "out-awq"], "out-awq: name one model"),
        (["infer", "pebble", "What", "is", "this?"], 'put the whole prompt in quotes, as "What is this?"'),
        (["infer", "http://127.0.0.1:9", "What", "is"], 'put the whole prompt in quotes, as "What is"'),
        (["infer", "http://127.0.0.1:9", "--", "-tp", "2"], "-tp 2 is for an engine that is started here"),
        (["infer", "--url", "127.0.0.1:9", "hello"], "'127.0.0.1:9' is no server's address; it looks like http"),
        (["infer", "http://127.0.0.1:port", "hello"], "is no server's address"),
        (["infer", "http://[::1", "hello"], "is no server's address"),
        (["infer", "localhost:8000", "hello"], "if that is a server's address, write http://localhost:8000"),
        (["app", "http://127.0.0.1:9", "--port", "18080"], "no server answers at http://127.0.0.1:9"),
        (["infer", "pebble", "--json"], "give a prompt"),
        (["infer", "pebble", "hello", "--dataset", "in.jsonl"], "give a prompt"),
        (["infer", "pebble", "hello", "--image", "none.png"], "none.png"),
        (["infer", "pebble", "<video>what?"], "give each its --video"),
        (["infer", "pebble", "hello", "--logprobs"], "--logprobs goes with --dataset"),
        (["infer", "pebble", "--dataset", "in.jsonl#no"], "after # comes how many rows"),
        (["infer", "pebble", "--dataset", "in.jsonl", "--image", "a.png"], "name their own pictures"),
        (["infer", "pebble", "hello", "--api-key-file", "none.key"], "none.key cannot be read"),
        (["infer", "http://127.0.0.1:9", "--", "--max-model-len", "64"], "runs already"),
        (["bench", "--compare", "fp16", "awq"], "awq"),
        (["bench", "pebble", "--vram", "lots"], "lots"),
    ],
)
def test_bad_words(mmq: Run, words: list[str], message: str) -> None:
    code, _, err = mmq(*words)
    assert code == 2
    assert message in one_line(err)


def test_a_folder_that_is_nearly_named(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "out-awq").mkdir()
    (tmp_path / "out-awq" / "config.json").write_text("{}")
    for typed in ("out-aqw", tmp_path / "out_awq"):
        code, _, err = mmq("serve", typed, "--print")
        assert (code, f"no folder {typed}: did you mean" in one_line(err), "out-awq?" in err) == (2, True, True)
    code, _, err = mmq("infer", "out-awq/config.json", "hello")
    assert (code, "is a file; name the folder of the model" in one_line(err)) == (2, True)


def test_a_folder_that_another_process_writes_is_left_to_it(
    mmq: Run, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("quantize", "pebble", "--quality", "fast", "--samples", "2", "--overwrite", "-o")
    with alone(tmp_path / "out", "mmq quantize"):
        (tmp_path / "out" / ".mmq-unfinished.json").write_text("{}")
        code, _, err = mmq(*words, tmp_path / "out")
        assert (code, "another `mmq quantize` works in" in one_line(err)) == (2, True)
        code, _, err = mmq("convert", artifact("awq"), "--repair", "-o", tmp_path / "out", "--overwrite")
        assert (code, "another `mmq convert` works in" in one_line(err)) == (2, True)
    assert (tmp_path / "out" / ".mmq-unfinished.json").read_text() == "{}"
    code, _, err = mmq(*words, tmp_path / "out")
    assert code == 0, err
    assert not list((tmp_path / "out").glob(".mmq-*"))


def test_a_base_within_what_is_replaced_stays(mmq: Run, artifact: Callable[..., Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact("awq"), tmp_path / "out"))
    base = Path(shutil.copytree(model_folder(), out / "base"))
    code, _, err = mmq("quantize", base, "-o", out, "--overwrite")
    assert (code, "holds what is to be read" in one_line(err)) == (2, True)
    assert (base / "config.json").is_file()
    (tmp_path / "file").touch()
    code, _, err = mmq("quantize", "pebble", "-o", tmp_path / "file")
    assert (code, "is a file; name a folder with -o" in one_line(err)) == (2, True)


@needs_vllm
def test_a_port_that_is_taken(mmq: Run, tmp_path: Path) -> None:
    """Told before anything else, and the log of the server that has it stays."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        log = tmp_path / f"mmq-serve-{port}.log"
        log.write_text("of the other")
        code, _, err = mmq("serve", "pebble", "--port", port)
    assert (code, log.read_text(), err.count("\n")) == (2, "of the other", 1)
    assert f"port {port} on 127.0.0.1 cannot be used" in one_line(err)


def test_no_gpu_is_told(mmq: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, _, err = mmq("quantize", "pebble", "--device", "cuda")
    assert code == 2
    assert "torch sees no NVIDIA GPU" in one_line(err)


def test_an_unknown_key_in_a_recipe(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: pebble\ngroupsize: 64\n", encoding="utf-8")
    code, _, err = mmq("quantize", "mine.yaml")
    assert code == 2
    assert "mine.yaml: unknown key 'groupsize'; did you mean 'group_size'?" in one_line(err)


def test_a_recipe_of_ones_own(mmq: Run, tmp_path: Path) -> None:
    text = "name: mine\nmodel: pebble\nmethod: rtn\nsamples: 2\ngroup_size: 64\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    code, out, _ = mmq("quantize", "mine.yaml", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["artifact"] == "out-rtn"
    assert facts["linears"] == 35
    manifest = json.loads((tmp_path / "out-rtn" / "mmq.json").read_text(encoding="utf-8"))
    assert (manifest["name"], manifest["group_size"]) == ("mine-rtn", 64)


def test_pickle_only_is_refused(mmq: Run, pebble: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pebble, tmp_path / "old"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, _, err = mmq("quantize", "./old")
    assert code == 2
    assert "safetensors" in one_line(err)


def test_an_unknown_family(mmq: Run, pebble: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pebble, tmp_path / "strange"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kosmos"}))
    code, _, err = mmq("quantize", "./strange")
    assert code == 2
    assert "add a row" in one_line(err)


def test_a_broken_line_is_numbered(mmq: Run, tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]})
    (tmp_path / "data.jsonl").write_text(f"{good}\n{good[:-3]}\n", encoding="utf-8")
    code, _, err = mmq("quantize", "pebble", "--calibration", "data.jsonl")
    assert code == 2
    assert "data.jsonl" in one_line(err)
    assert "line 2" in one_line(err)
    assert not (tmp_path / "out-awq").exists()


def test_an_unreadable_picture_is_named(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    line = {"messages": [{"role": "user", "content": "<image>什么？"}], "images": ["torn.png"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    code, _, err = mmq("quantize", "pebble", "--calibration", "data.jsonl")
    assert code == 2
    assert "torn.png" in one_line(err)
    assert "line 1" in one_line(err)


def test_a_group_size_that_does_not_divide(mmq: Run, tmp_path: Path) -> None:
    vlm("qwen2_vl", tmp_path / "odd", intermediate=192)
    code, _, err = mmq("quantize", "./odd", "--samples", "2")
    assert code == 2
    assert "group size 128 does not divide the 192 inputs of model.layers.0.mlp.down_proj" in one_line(err)


def test_a_folder_that_is_not_empty(mmq: Run, tmp_path: Path) -> None:
    (tmp_path / "out-awq").mkdir()
    (tmp_path / "out-awq" / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        code, _, err = mmq("quantize", "pebble", "--samples", "2", *more)
        assert code == 2
        assert "out-awq is not empty" in one_line(err)
    assert (tmp_path / "out-awq" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk(mmq: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    code, _, err = mmq("quantize", "pebble", "--samples", "2")
    assert code == 2
    assert "GiB needed, 0.00 GiB free" in one_line(err)
    assert not (tmp_path / "out-awq").exists()


def test_an_engine_that_is_not_installed(mmq: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_templates(model_folder())  # now, while there is a Python for its trial
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = mmq("serve", "pebble", "--print")
    assert code == 2
    assert "pip install vllm" in one_line(err)


def test_ctrl_c_is_taken_up_again(mmq: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real SIGINT to a real process while it walks; the same command then finishes from there."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from mmq.__main__ import main\n"
        "def shoot():\n"
        "    while not Path('out-awq/model-00001-of-00006.safetensors').exists(): time.sleep(0.002)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=shoot, daemon=True).start()\n"
        "sys.argv = ['mmq', 'quantize', 'pebble', '--samples', '48']\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 130, run.stderr
    assert "go on from there" in run.stderr
    assert not (tmp_path / "out-awq" / "mmq.json").exists()
    first = (tmp_path / "out-awq" / "model-00001-of-00006.safetensors").stat().st_mtime_ns
    code, out, err = mmq("quantize", "pebble", "--samples", "48", "--json")
    assert code == 0, err
    assert (tmp_path / "out-awq" / "model-00001-of-00006.safetensors").stat().st_mtime_ns == first
    assert json.loads(out)["linears"] == 35


def test_a_check_past_its_limits_exits_1(mmq: Run, tmp_path: Path) -> None:
    text = "name: strict\nmodel: pebble\nmethod: rtn\nsamples: 2\nlimits: {mean_kl: 0.0}\n"
    (tmp_path / "strict.yaml").write_text(text, encoding="utf-8")
    assert mmq("quantize", "strict.yaml", "--json")[0] == 0
    code, out, err = mmq("check", "out-rtn", "--samples", "13", "--json")
    assert code == 1
    assert "past the limit: mean_kl is" in err
    assert any("mean_kl" in failure for failure in json.loads(out)["failures"])
    report = json.loads((tmp_path / "out-rtn" / "check.json").read_text(encoding="utf-8"))
    assert report["passed"] is False
    assert report["measures"]["mean_kl"] > 0
    assert "| mean KL to FP16" in (tmp_path / "out-rtn" / "check.md").read_text(encoding="utf-8")


def test_a_check_is_shown_though_its_report_cannot_be_kept(mmq: Run, artifact: Callable[..., Path]) -> None:
    shutil.copytree(artifact("awq"), "out-awq")
    Path("out-awq/check.json.part").mkdir()
    code, out, err = mmq("check", "out-awq", "--samples", "2")
    assert code == 2
    assert "mean KL to FP16" in out
    assert "the report cannot be written to out-awq/check.json (Is a directory)" in one_line(err.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen2_5_vl", "its model type is qwen2_5_vl, not qwen2_vl"),
        ("qwen2_vl", r"its model.embed_tokens.weight is \[1772, 256\], not \[2048, 256\]"),
        ("", r"is not there; name where it is now \(check: --base"),
    ],
)
def test_another_base_is_told_before_the_walk(
    mmq: Run, artifact: Callable[..., Path], tmp_path: Path, kind: str, message: str
) -> None:
    shutil.copytree(artifact("awq"), "out-awq")
    manifest = json.loads(Path("out-awq/mmq.json").read_text("utf-8"))
    manifest["base"] |= {"hub": "local", "model": str(tmp_path / "other")}
    Path("out-awq/mmq.json").write_text(json.dumps(manifest), "utf-8")
    if kind:
        vlm(kind, tmp_path / "other")
    code, _, err = mmq("check", "out-awq", "--samples", "2")
    assert code == 2
    assert re.search(message, one_line(err)), err


def test_summaries_name_the_next_command(mmq: Run, tmp_path: Path) -> None:
    """As it is typed: the folder's name has a space."""
    code, out, _ = mmq("quantize", "pebble", "--method", "rtn", "--samples", "2", "-o", "我的 rtn")
    assert code == 0
    assert out.rstrip().endswith("next: mmq check '我的 rtn'")
    assert "x smaller" in out
    code, out, _ = mmq("convert", "我的 rtn", "--format", "compressed-tensors")
    assert code == 0
    assert mmq(*shlex.split(out.rpartition("next: mmq ")[2]))[0] in (0, 1)  # not every engine reads it
    assert "run `mmq check '我的 rtn'` first" in mmq("publish", "我的 rtn", "hf:me/x", "--dry-run")[2]
    code, out, _ = mmq("recipes")
    assert code == 0
    assert "MiniCPM-V-2_6" in out


def test_what_fell_back_is_told(mmq: Run, tmp_path: Path) -> None:
    """A word whose embedding is no number, and a layer whose values are all zero: o_proj is fed nothing else."""
    checkpoint = vlm("qwen2_vl", tmp_path / "odd") / "model.safetensors"
    tensors = load_file(checkpoint)
    (odd, *_) = AutoTokenizer.from_pretrained(tmp_path / "odd")("ꙮ")["input_ids"]
    tensors["model.embed_tokens.weight"][odd] = torch.nan
    for leaf in ("weight", "bias"):
        tensors[f"model.layers.0.self_attn.v_proj.{leaf}"].zero_()
    save_file(tensors, checkpoint, metadata={"format": "pt"})
    lines = [[{"role": "user", "content": text}, {"role": "assistant", "content": "好。"}] for text in ("你好", "ꙮ?")]
    data = "".join(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in lines)
    (tmp_path / "data.jsonl").write_text(data, encoding="utf-8")
    code, out, err = mmq("quantize", "./odd", "--calibration", "data.jsonl", "--json")
    assert code == 0, err
    facts = json.loads(out)
    why = "the calibration fed it nothing, or nothing but zeros"
    assert facts["fallbacks"] == {"layer 0 self_attn.o_proj": why}
    assert facts["left_out"] > 0
    code, out, _ = mmq("quantize", "./odd", "--calibration", "data.jsonl", "--overwrite")
    told = " ".join(out.split())
    assert f"{facts['left_out']} tokens whose activations are not finite" in told
    assert f"1 linears, all in mmq.json; layer 0 self_attn.o_proj: {why}" in told


@needs_vllm
def test_serve_print_starts_nothing(mmq: Run) -> None:
    code, out, _ = mmq("serve", "pebble", "--print", "--port", "8123", "--", "--seed", "7")
    assert code == 0
    assert "vllm serve" in out
    assert "--port 8123" in out
    assert "--seed 7" in out
    assert "only this machine can connect" in " ".join(out.split())


@pytest.mark.parametrize(
    "words", [["recipes"], ["recipes", "pebble"], pytest.param(["serve", "pebble", "--print"], marks=needs_vllm)]
)
def test_a_reader_that_leaves(words: list[str], tmp_path: Path) -> None:
    """As `| head`, and as other programs: no word, and no code that is a verdict."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mmq", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "/x: No space left.*make room"), (errno.EROFS, "/x: Read-")]
)
def test_what_the_system_says_is_told_with_what_to_do(number: int, told: str) -> None:
    assert re.match(told, said(OSError(number, os.strerror(number), "/x")))


def test_another_pipe_that_breaks_is_told() -> None:
    def write() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(RuntimeError, match=r"a process that mmq needs is gone \(.*Broken pipe"):
        until_left(write)()


def test_streams_that_the_caller_has_closed(tmp_path: Path) -> None:
    """As a daemon's may be: a chat without input ends, and nothing is a fault of ours."""
    command = f"{sys.executable} -m mmq infer http://127.0.0.1:9 <&- >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "no server answers" in one_line(done.stderr)) == (2, True)
