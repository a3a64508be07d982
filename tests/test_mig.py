"""Cards in slices (MIG): which one is planned for, and how large it is, by outputs of the form that drivers have.

The form (names, nesting, units) is that of outputs that others published of drivers 535 and 575; the values are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmq.serve.cards import chosen_card
from mmq.serve.engines import plan
from mmq.serve.machine import GIB, Gpu, Machine, this_machine
from mmq.serve.mig import Slice, parse_slices

A, B = "GPU-11111111-aaaa-bbbb-cccc-000000000001", "GPU-22222222-aaaa-bbbb-cccc-000000000002"
ONE, TWO = "MIG-33333333-0000-5000-8000-000000000001", "MIG-44444444-0000-5000-8000-000000000002"
LISTED = f"""GPU 0: NVIDIA A100-SXM4-80GB (UUID: {A})
GPU 1: NVIDIA A100-SXM4-80GB (UUID: {B})
  MIG 3g.40gb     Device  0: (UUID: {ONE})
  MIG 1g.10gb     Device  1: (UUID: {TWO})
"""
CSV = f"""NVIDIA A100-SXM4-80GB, 81920, 81050, 8.0, {A}
NVIDIA A100-SXM4-80GB, [Insufficient Permissions], [Insufficient Permissions], 8.0, {B}
"""
SLICE = """
      <mig_device>
        <index>{0}</index>
        <gpu_instance_id>{1}</gpu_instance_id>
        <compute_instance_id>0</compute_instance_id>
        <device_attributes>
          <shared><multiprocessor_count>42</multiprocessor_count></shared>
        </device_attributes>
        <fb_memory_usage>
          <total>{2}</total>
          <reserved>0 MiB</reserved>
          <used>38 MiB</used>
          <free>{3}</free>
        </fb_memory_usage>
        <bar1_memory_usage><total>65536 MiB</total><free>65535 MiB</free></bar1_memory_usage>
      </mig_device>"""
DESCRIBED = f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>575.57.08</driver_version>
  <attached_gpus>2</attached_gpus>
  <gpu id="00000000:10:00.0">
    <uuid>{A}</uuid>
    <mig_mode><current_mig>Disabled</current_mig></mig_mode>
    <mig_devices>None</mig_devices>
    <fb_memory_usage><total>81920 MiB</total><free>81050 MiB</free></fb_memory_usage>
  </gpu>
  <gpu id="00000000:15:00.0">
    <mig_mode><current_mig>Enabled</current_mig></mig_mode>
    <mig_devices>{SLICE.format(0, 1, "40448 MiB", "40410 MiB")}{SLICE.format(1, 9, "9728 MiB", "9690 MiB")}
    </mig_devices>
    <uuid>{B}</uuid>
    <fb_memory_usage><total>81920 MiB</total><free>N/A</free></fb_memory_usage>
  </gpu>
</nvidia_smi_log>
"""
WHOLE = Gpu("NVIDIA A100-SXM4-80GB", 81920 << 20, 81050 << 20, 8.0)
THREE = Gpu("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40448 << 20, 40410 << 20, 8.0)
SMALL = Gpu("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9728 << 20, 9690 << 20, 8.0)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Gpu, ...]]:
    """`smi(chosen, csv=, listed=, described=)`: the cards of this machine, by an nvidia-smi that says so."""

    def cards(chosen: str | None, csv: str = CSV, listed: str = LISTED, described: str = DESCRIBED) -> tuple[Gpu, ...]:
        for name, text in (("csv", csv), ("listed", listed), ("described", described)):
            (tmp_path / name).write_text(text)
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\ncd {tmp_path}\ncase "$1" in -L) cat listed;; -q) cat described;; *) cat csv;; esac\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        return this_machine().gpus

    return cards


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (None, [WHOLE]),  # a card in slices is none itself
        ("0", [WHOLE]),
        ("1", [THREE]),
        (B[:12], [THREE]),
        (ONE, [THREE]),
        (TWO, [SMALL]),
        (TWO[:8], [SMALL]),
        (f"{TWO},{ONE}", [SMALL]),  # CUDA uses one slice
        ("0,1", [WHOLE]),
        ("1,0", [THREE]),
        ("2", []),
        ("", []),
    ],
)
def test_the_slice_that_is_chosen(smi: Callable[..., tuple[Gpu, ...]], chosen: str | None, found: list[Gpu]) -> None:
    assert smi(chosen) == tuple(found)


def test_inside_a_container_with_one_slice(smi: Callable[..., tuple[Gpu, ...]]) -> None:
    alone = f"GPU 0: NVIDIA A100-SXM4-80GB (UUID: {B})\n  MIG 1g.10gb     Device  0: (UUID: {TWO})\n"
    parts = f"<mig_devices>{SLICE.format(0, 9, '9728 MiB', '9690 MiB')}</mig_devices>"
    described = f"<nvidia_smi_log><gpu><uuid>{B}</uuid>{parts}</gpu></nvidia_smi_log>"
    for chosen in (None, "0", TWO):
        assert smi(chosen, CSV.splitlines()[1], alone, described) == (SMALL,)
    assert smi(None, "", alone, described) == ()


@pytest.mark.parametrize(
    "described", ["", "<x", DESCRIBED.replace("40448 MiB", "N/A"), DESCRIBED.replace("index", "i")]
)
def test_a_slice_whose_size_nobody_tells(
    smi: Callable[..., tuple[Gpu, ...]], pebble: Path, tmp_path: Path, described: str
) -> None:
    (card,) = smi(ONE, described=described)
    assert (card.name, card.memory, card.uuid) == (THREE.name, 0, ONE)
    machine = Machine("x", 8, GIB, GIB, False, (card,))
    with pytest.raises(
        ValueError, match=f"does not tell how large NVIDIA A100-SXM4-80GB MIG 3g.40gb {ONE} is: .*--vram"
    ):
        chosen_card(machine)
    assert chosen_card(machine, vram=20 * GIB)[0].memory == 20 * GIB
    (tmp_path / "vllm").touch(mode=0o755)
    environ = {"MMQ_VLLM": str(tmp_path / "vllm")}
    with pytest.raises(ValueError, match="--max-model-len N starts vLLM without a plan"):
        plan("vllm", pebble, machine=machine, environ=environ)
    launch = plan("vllm", pebble, machine=machine, environ=environ, max_model_len=512)
    assert "nobody knows whether NVIDIA A100" in dict(launch.reasons)["--max-model-len 512"]


def test_a_slice_that_is_not_listed(smi: Callable[..., tuple[Gpu, ...]]) -> None:
    (card,) = smi("MIG-GPU-11111111-aaaa/1/0")  # as drivers before 470 named them
    assert (card.name, card.memory, card.capability) == ("MIG slice", 0, 8.0)
    assert smi("MIG-1", csv="", listed="") == ()


def test_what_is_odd_in_a_listing() -> None:
    assert parse_slices("", DESCRIBED) == ()
    assert parse_slices("GPU 0: x\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\nno devices\n", "") == (
        Slice("MIG-1", "", "1g.5gb", 0, 0),
    )
