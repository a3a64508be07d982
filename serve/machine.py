"""What this machine has: GPUs by nvidia-smi, cores, memory and AMX by the kernel's files. Knows no engine, no torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card. Memory in bytes; `capability` is the compute capability, 8.9 for a 4090."""

    name: str
    memory: int
    free: int
    capability: float


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


def _container(total: int, available: int) -> tuple[int, int]:
    """A container's limit (cgroup v2, then v1) where it is lower than the machine's memory."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit_file).strip(), _read(used_file).strip()
        if limit.isdigit() and int(limit) < total:
            left = int(limit) - (int(used) if used.isdigit() else 0)
            return int(limit), max(0, min(available, left))
    return total, available


def parse_gpus(csv: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's `name,memory.total,memory.free,compute_cap` lines (MiB, no units); odd lines are left out."""
    gpus = []
    for line in csv.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 3)]
        try:
            name, total, free, capability = cells
            gpus.append(Gpu(name, int(total) << 20, int(free) << 20, float(capability)))
        except ValueError:
            continue
    return tuple(gpus)


def _gpus() -> tuple[Gpu, ...]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ()
    query = [smi, "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    gpus = parse_gpus(done.stdout) if done.returncode == 0 else ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    chosen = [item.strip() for item in visible.split(",")]
    if not all(item.isdigit() for item in chosen):  # a UUID or a MIG name: trust that it names one card
        return gpus[: len(chosen)] if visible.strip() not in ("", "-1") else ()
    return tuple(gpus[int(item)] for item in chosen if int(item) < len(gpus))


def this_machine() -> Machine:
    """Look at this machine now. Never fails: what cannot be read is left at zero or empty."""
    cpu, amx = _cpu(_read("/proc/cpuinfo"))
    memory, available = _container(*_memory(_read("/proc/meminfo")))
    ids = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    return Machine(cpu, len(ids) or os.cpu_count() or 1, memory, available, amx, _gpus(), ids)
