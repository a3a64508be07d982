"""The projection of decode speed: bytes by hand, on checkpoints whose every tensor is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmq.bench.projection import _weights_read, card_here, carries_over, projected, reached, step_bytes
from mmq.export.subject import read_subject
from mmq.serve.cards import card_named
from mmq.serve.machine import GIB, Gpu, Machine
from mmq.serve.shape import kv_token_bytes
from mmq.serve.weights import PARTS, Weights, read_weights

CPU = Machine("a processor", 2, GIB, GIB, False)
CARD = card_named("4090")


def test_a_step_reads_the_decoder_and_the_head_once_and_each_sequences_cache(pebble: Path) -> None:
    subject = read_subject(pebble)
    parts = read_weights(subject).parts
    once = sum(parts[name] for name in ("decoder", "other")) + (parts["head"] or parts["embeddings"])
    assert once < sum(parts.values())
    token = kv_token_bytes(subject.config)
    assert step_bytes(pebble, context=0) == once
    assert step_bytes(pebble, context=100, batch=3) == once + 300 * token


def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    parts = {**dict.fromkeys(PARTS, 0), "decoder": 1000, "head": 100, "embeddings": 100}
    weights = Weights(parts, 0, False, experts=800)
    config = {"num_experts": 8, "num_experts_per_tok": 2}
    assert _weights_read(weights, config, 1) == 1100 - 800 * 6 // 8
    assert _weights_read(weights, config, 2) == 1100 - 800 * 9 // 16
    assert _weights_read(weights, config, 1000) == 1100


def test_the_limit_is_bandwidth_by_bytes_and_int4_is_nearer_to_it(artifact: Callable[..., Path], pebble: Path) -> None:
    found = projected(pebble, CARD, context=512, batch=4)
    assert list(found) == ["decode_limit"]
    assert found["decode_limit"].how == "projected"
    assert found["decode_limit"].value == pytest.approx(4 * 1008e9 / step_bytes(pebble, context=512, batch=4))
    assert projected(artifact("awq"), CARD, context=0)["decode_limit"].value > found["decode_limit"].value / 4


def test_the_share_that_was_reached_here_is_carried_to_the_other_card(pebble: Path) -> None:
    here = card_named("h100")
    ideal = 1000 * step_bytes(pebble, context=64) / here.bandwidth  # ms
    share = reached(pebble, here, tpot=2 * ideal, context=64)
    assert share == pytest.approx(0.5)
    found = projected(pebble, CARD, context=64, reached=share)
    assert found["decode_projected"].value == pytest.approx(found["decode_limit"].value / 2)


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "H100 80GB SXM"),
        ("NVIDIA GeForce RTX 4090", 24, "GeForce RTX 4090"),
        ("NVIDIA A10", 22.5, "A10"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB SXM"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40GB"),
        ("NVIDIA B200", 180, None),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "GeForce RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3090 Ti", 24, None),  # of the same size, with another bandwidth
        ("NVIDIA GeForce RTX 4080 SUPER", 16, None),
        ("NVIDIA H100 PCIe", 80, None),
        ("NVIDIA A100-PCIE-40GB", 40, "A100 40GB"),
    ],
)
def test_the_card_that_is_here(name: str, gib: float, card: str | None) -> None:
    gpu = Gpu(name, int(gib * GIB), int(gib * GIB), 9.0)
    found = card_here(Machine("x", 8, GIB, GIB, False, (gpu,)))
    assert (found.name if found else None) == card


def test_what_carries_over_is_said() -> None:
    said = " ".join(carries_over(CARD, CPU, budgeted=False))
    assert "computed for its memory, held to nothing" in said
    assert "every speed, latency, stage and watt" in said
    assert "1008 GB/s" in said
    gpu = Gpu("NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, 8.9)
    assert carries_over(CARD, Machine("x", 8, GIB, GIB, False, (gpu,)), budgeted=True) == [
        "Every figure was taken on the card itself, GeForce RTX 4090."
    ]
