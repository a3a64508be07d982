"""--engine lmdeploy: its command line, and its program behind the guard. LMDeploy itself wants a GPU."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from math import floor
from pathlib import Path

import openai
import pytest
from environments import environment

from mmq.bench.hollow import write
from mmq.serve.bill import read_model
from mmq.serve.engines import plan
from mmq.serve.flags import Launch
from mmq.serve.http import get
from mmq.serve.lmdeploy_memory import cache_of
from mmq.serve.machine import GIB, Gpu, Machine
from mmq.serve.running import free_port, running
from mmq.serve.safety import guarded

LAPTOP = Machine("a processor", cores=2, memory=16 * GIB, available=14 * GIB, amx=False)
CARD = Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 24000 << 20, 8.9)
DESK = replace(LAPTOP, gpus=(CARD,))


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"MMQ_LMDEPLOY": str(environment(tmp_path / "env", "lmdeploy", "lmdeploy-0.18.0", "transformers-5.17.0"))}


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen2.5-VL-7B's shape, as TurboMind takes it."""
    place = tmp_path_factory.mktemp("seven")
    return {kind: write("qwen2.5-vl-7b", place / kind, packed=kind == "awq") for kind in ("fp16", "awq")}


def value(launch: Launch, flag: str) -> str | None:
    return launch.argv[launch.argv.index(flag) + 1] if flag in launch.argv else None


def test_the_engine_within_is_chosen_by_the_rules(
    artifact: Callable[..., Path], seven: dict[str, Path], environ: dict[str, str], tmp_path: Path
) -> None:
    def chosen(folder: Path, *extra: str) -> tuple[str | None, str | None, str]:
        launch = plan("lmdeploy", folder, machine=DESK, environ=environ, extra=extra)
        return launch.backend, value(launch, "--model-format"), dict(launch.reasons).get("--backend pytorch", "")

    assert chosen(seven["fp16"]) == ("turbomind", None, "")
    assert chosen(seven["awq"]) == ("turbomind", "awq", "")
    backend, format, why = chosen(artifact("awq"))
    assert (backend, format) == ("pytorch", "awq")
    assert "heads of 32 in the picture encoder" in why
    assert chosen(seven["awq"], "--backend", "pytorch")[0] == "pytorch"
    with pytest.raises(ValueError, match=r"lmdeploy would not serve .* heads of 32"):
        chosen(artifact("awq"), "--backend", "turbomind")
    with pytest.raises(ValueError, match="the PyTorch engine loads AWQ, not gptq"):
        chosen(artifact("gptq"))
    shutil.copytree(artifact("gptq"), tmp_path / "eyes")
    (tmp_path / "eyes" / "mmq.json").unlink()
    config = json.loads((tmp_path / "eyes" / "config.json").read_text())
    config["vision_config"] |= {"num_heads": config["vision_config"]["embed_dim"] // 64}
    (tmp_path / "eyes" / "config.json").write_text(json.dumps(config))
    assert chosen(tmp_path / "eyes")[:2] == ("turbomind", "gptq")


def test_memory(seven: dict[str, Path], environ: dict[str, str]) -> None:
    """Session, batch and cache follow from the card; a fraction is never more than LMDeploy's own."""

    def planned(folder: Path, machine: Machine = DESK, **options: object) -> Launch:
        return plan("lmdeploy", folder, machine=machine, environ=environ, **options)

    wide, tight = planned(seven["awq"]), planned(seven["fp16"])
    shares = [float(value(launch, "--cache-max-entry-count") or 0) for launch in (wide, tight)]
    assert 0.8 >= shares[0] > shares[1] > 0.1
    assert value(wide, "--session-len") == "32768"
    assert value(planned(seven["awq"], max_model_len=2048), "--session-len") == "2048"
    given = planned(seven["awq"], extra=("--session-len", "4096", "--quant-policy", "8"))
    assert given.argv.count("--session-len") == 1
    assert value(given, "--session-len") == "4096"
    small = replace(DESK, gpus=(replace(CARD, memory=8 * GIB, free=8 * GIB),))
    with pytest.raises(ValueError, match="GiB of weights leave room"):
        planned(seven["fp16"], small)
    two = planned(seven["awq"], replace(DESK, gpus=(CARD, CARD)), tp=2)
    assert value(two, "--tp") == "2"
    for cards, machine in ((2, DESK), (3, replace(DESK, gpus=(CARD,) * 4))):
        with pytest.raises(ValueError, match=f"--tp {cards}"):
            planned(seven["awq"], machine, tp=cards)


def test_the_cache_by_hand(seven: dict[str, Path]) -> None:
    """As LMDeploy takes it: a share of what CUDA has free behind the weights; its PyTorch engine keeps some aside."""
    model, vocabulary = read_model(seven["awq"]), 152064
    turbomind, pytorch = (cache_of(model, CARD, backend=name) for name in ("turbomind", "pytorch"))
    # 28 layers x keys and values x 4 heads x 128 wide x 2 bytes; TurboMind has a scale and a zero beside each head
    assert pytorch.kv_token == 28 * 2 * 4 * 128 * 2 == 57344
    assert turbomind.kv_token == 57344 + 28 * 2 * 4 * 4
    assert pytorch.reserved == (8192 + 2 * 128) * vocabulary * 2  # two bytes a logit
    assert turbomind.reserved == 0
    context = 5 * 2**27  # what a process has of the card before any weight
    for cache in (turbomind, pytorch):
        assert cache.weights == pytest.approx(6.64 * GIB, rel=0.01)  # as vLLM has them, on an H100
        assert cache.free == CARD.free - context - cache.weights - cache.beside
        base = cache.free - cache.reserved
        assert cache.tokens == int(base * cache.share) // (64 * cache.kv_token) * 64
        assert cache.free - cache.tokens * cache.kv_token >= cache.work
    # the most that leaves the work its room, in hundredths; what is reserved serves the work too
    assert turbomind.share == floor(100 * (1 - turbomind.work / turbomind.free)) / 100 < 0.8
    assert pytorch.share == 0.8
    # TurboMind: one picture of 16384 tokens (65536 patches), and what it gives, beside a layer over 8192 tokens
    tower = 65536 * 2 * (1176 + 3 * 1280 + max(8 * 1280, 3 * 3420)) + 2**26
    layer = 8192 * 2 * (3 * 3584 + 3 * 18944) + 16384 * 3584 * 2
    assert turbomind.work == tower + layer + 23 * GIB // 100 + int(0.005 * CARD.memory)
    packed = {policy: cache_of(model, CARD, backend="pytorch", policy=policy).kv_token for policy in ("8", "4", "fp8")}
    assert packed == {"8": 28 * 2 * 4 * (128 + 4), "4": 28 * 2 * 4 * (64 + 4), "fp8": 28 * 2 * 4 * 128}
    two = cache_of(model, CARD, backend="turbomind", tp=2)
    assert two.kv_token == turbomind.kv_token // 2
    assert two.tokens > 2 * turbomind.tokens


def test_held_against_the_engine(seven: dict[str, Path], tmp_path: Path) -> None:
    """LMDeploy 0.18.0 on an H200 of which 24 GiB were free, 2026-11-21: what CUDA had free behind the weights (in the
    log "Object cache budget ... from free", "minimal free gpu memory") and the blocks that it made of it."""
    model, card = read_model(seven["awq"]), replace(CARD, free=24575 << 20, capability=9.0)
    turbomind, pytorch = (cache_of(model, card, backend=name) for name in ("turbomind", "pytorch"))
    assert turbomind.free == pytest.approx(14247.56 * 2**20, rel=0.07)
    assert turbomind.free < 14247 << 20  # never more than there was
    assert pytorch.free == pytest.approx(13013 << 20, rel=0.03)
    assert pytorch.tokens == pytest.approx(2414 * 64, rel=0.03)
    # under 24 large pictures and texts: what the passes took beside the cache; the logits' reserve is a part of it
    assert turbomind.work > 2235 << 20
    assert pytorch.reserved + (1 - pytorch.share) * (pytorch.free - pytorch.reserved) > 4120 << 20
    two, whole = read_model(write("qwen2-vl-2b", tmp_path / "two")), replace(card, free=143155 << 20)
    assert cache_of(two, whole, backend="turbomind").free == pytest.approx(137273 << 20, rel=0.01)
    ada = cache_of(model, replace(card, capability=8.9), backend="pytorch")  # Triton's kernels, no second copy
    assert ada.free - pytorch.free == pytorch.beside


def test_a_small_card_has_a_smaller_prefill(seven: dict[str, Path]) -> None:
    """The PyTorch engine halves it until sixteen blocks of the cache fit; so does the plan."""
    seeing = read_model(seven["awq"])
    model = replace(seeing, vision=None, shape=replace(seeing.shape, vision=False))
    card = replace(CARD, memory=10 * GIB, free=int(9.7 * GIB))
    found = cache_of(model, card, backend="pytorch")
    least = 16 * 64 * found.kv_token
    assert (found.free - (8192 + 256) * 152064 * 2) * 0.8 < least
    assert found.reserved == (4096 + 256) * 152064 * 2
    assert found.tokens * found.kv_token >= least


def test_a_head_that_is_the_embeddings_is_there_twice_in_turbomind(tmp_path: Path) -> None:
    model = read_model(write("qwen2-vl-2b", tmp_path / "two"))
    turbomind, pytorch = (cache_of(model, CARD, backend=name) for name in ("turbomind", "pytorch"))
    assert turbomind.weights - pytorch.weights == 151936 * 1536 * 2


def test_what_it_has_not_is_told(artifact: Callable[..., Path], environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LMDeploy needs an NVIDIA GPU"):
        plan("lmdeploy", artifact("awq"), machine=LAPTOP, environ=environ)
    with pytest.raises(ValueError, match="no --lora in mmq"):
        plan("lmdeploy", artifact("awq"), machine=DESK, environ=environ, lora=("a=b",))
    with pytest.raises(OSError, match=r"--engine-bin names .*nowhere"):
        plan("lmdeploy", artifact("awq"), machine=DESK, environ={}, engine_bin=tmp_path / "nowhere")
    with pytest.raises(OSError, match="lmdeploy is not installed: `uv venv lmdeploy"):
        plan("lmdeploy", artifact("awq"), machine=DESK, environ={"PATH": str(tmp_path)})
    named = plan("lmdeploy", artifact("awq"), machine=DESK, environ={}, engine_bin=tmp_path / "env")
    assert named.argv[0] == str(tmp_path / "env" / "bin" / "python")  # the environment's own, as LMDeploy is run
    assert named.env["PYTHONPATH"].endswith("serve/inside")


def test_turbomind_finds_its_libraries(seven: dict[str, Path], environ: dict[str, str], tmp_path: Path) -> None:
    """torch of CUDA 13 brings others: those of CUDA 12 are packages beside it."""
    site = tmp_path / "env" / "lib" / "python3.12" / "site-packages" / "nvidia"
    (site / "cublas" / "lib").mkdir(parents=True)
    launch = plan("lmdeploy", seven["awq"], machine=DESK, environ=environ)
    assert launch.env["LD_LIBRARY_PATH"] == str(site / "cublas" / "lib")
    kept = plan("lmdeploy", seven["awq"], machine=DESK, environ=environ, extra=("--backend", "pytorch"))
    assert "LD_LIBRARY_PATH" not in kept.env


SERVER = """
def run():
    import sys, uvicorn
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        body = (await receive()).get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": " ".join(sys.argv).encode() + body})
    uvicorn.run(app=app, host="127.0.0.1", port=int(sys.argv[-1]), log_level="warning", lifespan="off")
"""


def test_its_program_is_behind_the_guard(tmp_path: Path) -> None:
    """A package called lmdeploy whose command starts a server as LMDeploy does; wrapper and guard are the real ones."""
    pytest.importorskip("uvicorn")
    (tmp_path / "lmdeploy" / "cli").mkdir(parents=True)
    (tmp_path / "lmdeploy" / "__init__.py").write_text("")
    (tmp_path / "lmdeploy" / "cli" / "__init__.py").write_text(SERVER)
    port = free_port()
    argv = (sys.executable, "-m", "mmq_lmdeploy", "serve", "api_server", "--server-port", str(port))
    bare = Launch(argv, {}, (), f"http://127.0.0.1:{port}", "x", "127.0.0.1", port, "cuda")
    launch = guarded("lmdeploy", bare, environ={"PYTHONPATH": str(tmp_path), "MMQ_API_KEY": "sesame"})
    with running(launch, timeout=30, log_path=tmp_path / "log") as server:
        assert get(f"{server.url}/health") == (200, f"lmdeploy serve api_server --server-port {port}")
        assert get(f"{server.url}/v1/models")[0] == 401  # the key, which LMDeploy takes on its command line alone
        with openai.OpenAI(base_url=server.url, api_key="sesame", max_retries=0) as client:
            assert "api_server" in client.get("/v1/models", cast_to=str)
            for path in ("/terminate", "/update_weights", "/openapi.json", "/distserve/free_cache"):
                with pytest.raises(openai.NotFoundError, match="no such route"):
                    client.get(path, cast_to=str)
