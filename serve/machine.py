"""What this machine has: GPUs by nvidia-smi, cores, memory and AMX by the kernel's files. Knows no engine, no torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .mig import Slice, parse_slices

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card. Memory in bytes; `capability` is the compute capability, 8.9 for a 4090."""

    name: str
    memory: int
    free: int
    capability: float
    uuid: str = field(default="", compare=False)


@dataclass(frozen=True)
class Machine:
    """Memory in bytes: `memory` is what this process may have at most, `available` what is not in use now."""

    cpu: str
    cores: int
    memory: int
    available: int
    amx: bool
    gpus: tuple[Gpu, ...] = ()
    core_ids: tuple[int, ...] = ()  # as the kernel counts them; of a container, those that it may use

    @property
    def words(self) -> str:
        """One line for a human: the card and its memory, or the processor, its cores and the memory."""
        if self.gpus:
            first = self.gpus[0]
            return f"{len(self.gpus)} x {first.name}, {first.memory / GIB:.0f} GiB"
        return f"{self.cpu}, {self.cores} cores, {self.memory / GIB:.0f} GiB, no GPU"

    @property
    def order(self) -> dict[str, tuple[str, str]]:
        """The variable (name -> value, reason) by which CUDA counts unlike cards as they are counted here."""
        if len({(gpu.name, gpu.memory) for gpu in self.gpus}) < 2:
            return {}
        return {
            "CUDA_DEVICE_ORDER": ("PCI_BUS_ID", "cards as nvidia-smi counts them; CUDA would begin with the fastest")
        }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu(cpuinfo: str) -> tuple[str, bool]:
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return named.get("model name") or platform.processor() or platform.machine(), "amx_tile" in named.get("flags", "")


def _memory(meminfo: str) -> tuple[int, int]:
    """(total, available) in bytes from /proc/meminfo, whose figures are KiB; from sysconf where there is none."""
    found = {}
    for line in meminfo.splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    total = found.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, found.get("MemAvailable", total)


def _container(total: int, available: int, root: str = "/sys/fs/cgroup") -> tuple[int, int]:
    """A container's limit (cgroup v2, then v1) where it is lower than the machine's memory. What it uses counts files
    that were read, a model just downloaded above all: those the kernel lets go of when memory is wanted."""
    for limit_file, used_file, stat_file, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        limit, used = (_read(f"{root}/{name}").strip() for name in (limit_file, used_file))
        if limit.isdigit() and int(limit) < total:
            stat = dict(line.split(" ", 1) for line in _read(f"{root}/{stat_file}").splitlines() if " " in line)
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            left = int(limit) - max(0, (int(used) if used.isdigit() else 0) - files)
            return int(limit), max(0, min(available, left))
    return total, available


def parse_gpus(csv: str, sliced: Collection[str] = ()) -> tuple[Gpu, ...]:
    """Read nvidia-smi's `name,memory.total,memory.free,compute_cap,uuid` lines (MiB, no units); odd lines are left out,
    but that of a card whose id is among `sliced` may lack its memory, as inside a container that has a slice of it."""
    gpus = []
    for line in csv.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 4)]
        try:
            name, total, free, capability, uuid = cells
            if uuid in sliced:
                total, free = (cell if cell.isdigit() else "0" for cell in (total, free))
            gpus.append(Gpu(name, int(total) << 20, int(free) << 20, float(capability), uuid))
        except ValueError:
            continue
    return tuple(gpus)


def visible(gpus: Sequence[Gpu], chosen: str | None, slices: Sequence[Slice] = ()) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES chooses, by number or by the beginning of an id, up to the first that there is
    not, as CUDA reads it; all where it is not set.

    A card in slices (MIG) is none itself: its first slice stands for it, or the one that is chosen by its id, and CUDA
    uses one slice and nothing beside. A slice that nvidia-smi does not list, or without its size, has memory 0.
    """
    if not gpus:
        return ()
    parts = [_part(part, gpus) for part in slices]
    whole = [gpu for gpu in gpus if gpu.uuid not in {part.card for part in slices}]
    if chosen is None:
        return tuple(whole) or tuple(parts[:1])
    found: list[Gpu] = []
    for item in map(str.strip, chosen.split(",")):
        if item.startswith("MIG-"):
            named = [part for part in parts if part.uuid.startswith(item)]
            return tuple(found) or (named[0] if named else Gpu("MIG slice", 0, 0, gpus[0].capability, item),)
        named = [gpu for at, gpu in enumerate(gpus) if str(at) == item or (item and gpu.uuid.startswith(item))]
        if not named:
            break
        if named[0] not in whole:
            return tuple(found) or tuple(_part(part, gpus) for part in slices if part.card == named[0].uuid)[:1]
        found.append(named[0])
    return tuple(found)


def sized(gpu: Gpu) -> Gpu:
    """The card. ValueError where it is a slice whose memory is not known."""
    if not gpu.memory:
        raise ValueError(
            f"nvidia-smi does not tell how large {gpu.name} {gpu.uuid} is: `mmq plan --vram 20GiB` plans for that "
            "size, and --max-model-len N starts vLLM without a plan"
        )
    return gpu


def _part(part: Slice, gpus: Sequence[Gpu]) -> Gpu:
    card = next((gpu for gpu in gpus if gpu.uuid == part.card), gpus[0])
    return Gpu(f"{card.name} MIG {part.profile}", part.memory, part.free, card.capability, part.uuid)


def _gpus() -> tuple[Gpu, ...]:
    query = ("--query-gpu=name,memory.total,memory.free,compute_cap,uuid", "--format=csv,noheader,nounits")
    if not (csv := _smi(*query)):
        return ()
    listed = _smi("-L")
    slices = parse_slices(listed, _smi("-q", "-x")) if "MIG-" in listed else ()
    gpus = parse_gpus(csv, {part.card for part in slices})
    return visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"), slices)


def _smi(*words: str) -> str:
    """What nvidia-smi says, "" where there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def this_machine() -> Machine:
    """Look at this machine now. Never fails: what cannot be read is left at zero or empty."""
    cpu, amx = _cpu(_read("/proc/cpuinfo"))
    memory, available = _container(*_memory(_read("/proc/meminfo")))
    ids = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    return Machine(cpu, len(ids) or os.cpu_count() or 1, memory, available, amx, _gpus(), ids)
