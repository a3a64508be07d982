"""What the peer scripts share: the job they are given, its samples as model inputs, their report and their last words.

Runs inside a peer's own environment, so it imports nothing of mmq; torch only where it is used. Knows no peer. The
scripts stand beside it under the names of the packages they drive: `import` must find the packages, not the scripts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One job file. `samples` is a JSONL file of conversations, `out` the folder to write, `device` cpu or cuda."""

    model: Path
    samples: Path
    out: Path
    method: str
    group_size: int
    symmetric: bool
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r}: cpu or cuda")


@dataclass(frozen=True)
class Times:
    """Seconds of loading the model, of quantizing alone and of writing; `layers` is the number of decoder layers."""

    load: float
    quantize: float
    save: float
    layers: int


class Watch:
    """A stopwatch: each reading gives the seconds since the last, after the GPU has finished what it was given."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def read(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed


def main(backend: str, version: Callable[[], str], run: Callable[[Job], Times]) -> None:
    """Read the job that the command line names, run it and write peer.json; any error becomes one last line, exit 1."""
    try:
        job = Job(**_paths(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
        if job.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU, so before it is imported
        job.out.mkdir(parents=True, exist_ok=True)
        _seed(job.seed)
        times = run(job)
        report = {
            "backend": backend,
            "version": version(),
            "seconds": times.quantize,
            "load_seconds": times.load,
            "save_seconds": times.save,
            "peak_gpu_bytes": _peak_gpu(),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
            "layers": times.layers,
        }
        (job.out / "peer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except Exception as e:
        import traceback

        traceback.print_exc()
        print(f"{backend}: {type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)


def mend_torchvision() -> None:
    """Let torchvision be imported beside a CPU build of torch; transformers 5 reads pictures through it.

    PyPI's torchvision is linked to CUDA libraries that such a torch lacks, so its own library does not load and the
    import ends with "operator torchvision::nms does not exist". Resizing needs no operator of that library: where the
    import fails, the missing ones are declared (without kernels) and it is tried again.
    """
    import torch

    try:
        import torchvision  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left half done
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]


_declared: list[Any] = []  # operators live as long as the library that declared them


def inputs(processor: Any, job: Job) -> list[dict[str, Any]]:
    """The processor's tensors for each sample, batches of one, the whole conversation with the assistant's answers."""
    from PIL import Image

    found = []
    for messages in conversations(job):
        paths = [part["path"] for m in messages for part in _parts(m) if part["type"] == "image"]
        bare = [{**m, "content": [_bare(part) for part in _parts(m)]} for m in messages]
        text = processor.apply_chat_template(bare, tokenize=False)
        media = {"images": [Image.open(path).convert("RGB") for path in paths]} if paths else {}
        found.append(dict(processor(text=[text], return_tensors="pt", **media)))
    return found


def conversations(job: Job) -> list[list[dict[str, Any]]]:
    """The messages of each sample, in order. ValueError where the file holds none."""
    lines = job.samples.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["messages"] for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{job.samples} holds no samples")
    return found


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else part


def _paths(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: Path(v) if k in ("model", "samples", "out") else v for k, v in fields.items()}


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _peak_gpu() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
