"""How much memory a running server takes, measured: by the kernel, by nvidia-smi, by the engine's own word.

Knows processes and a log, no model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .log import loaded_bytes
from .metrics import cache_tokens, metrics
from .running import Server


@dataclass(frozen=True)
class Footprint:
    """Bytes, each None where it cannot be measured here.

    `resident` is the proportional set size of all the server's processes, `card` what they hold of the GPUs,
    `weights` what loading the weights took on the GPU, `cache_tokens` the capacity of the key-value cache in tokens.
    """

    resident: int | None
    card: int | None
    weights: int | None
    cache_tokens: int | None


def group_members(pgid: int) -> list[int]:
    """Ids of the processes in a process group, by /proc; empty where there is no /proc."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == pgid:
                members.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue
    return members


def _proportional(pid: int) -> int | None:
    """A process's PSS in bytes; its resident size where the kernel does not tell the former."""
    for file, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            for line in Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError):
            continue
    return None


def _on_cards(pids: list[int]) -> int | None:
    """What these processes hold of all GPUs; None where nvidia-smi is absent or sees other process ids than we do."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = []
    for line in done.stdout.splitlines():
        pid, _, size = line.partition(",")
        if pid.strip().isdigit() and size.strip().isdigit() and int(pid) in pids:
            sizes.append(int(size) << 20)
    return sum(sizes) if sizes else None


def footprint(server: Server) -> Footprint:
    """Measure the running server now."""
    members = group_members(server.pid)
    sizes = [size for size in map(_proportional, members) if size is not None]
    try:
        tokens = cache_tokens(metrics(server.url))
    except OSError:
        tokens = None
    log = server.log_path.read_text(encoding="utf-8", errors="replace") if server.log_path.is_file() else ""
    return Footprint(sum(sizes) if sizes else None, _on_cards(members), loaded_bytes(log), tokens)
