"""One run of another package's quantizer: mmq's samples written out, a script of peers/ run in that package's own
environment, its checkpoint brought home as an artifact.

Knows no package beyond its row in `backends.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..export.adopt import adopt
from ..export.alone import LOCK
from ..export.artifact import UNFINISHED, Artifact, hash_file, prepare
from ..quantize.inputs import encode, media_mask
from ..quantize.plan import check_groups, linears
from ..quantize.skeleton import Skeleton, build
from ..recipes.hub import Base
from ..recipes.progress import Tell, silent
from ..recipes.recipe import Recipe
from ..recipes.samples import Sample, digest
from .backends import BACKENDS, Asked
from .environments import environment
from .follow import clean, follow, listener

PEERS = Path(__file__).parent / "peers"


def quantize_with(
    asked: Asked,
    recipe: Recipe,
    base: Base,
    out: Path,
    *,
    samples: Sequence[Sample],
    calibration: str,
    device: str = "cpu",
    overwrite: bool = False,
    tell: Tell = silent,
) -> Artifact:
    """Quantize `base` with the package into the folder `out`, on `samples`. `calibration` is their name, for the
    manifest. Group size, limits and name are the recipe's; all else that quantizing needs are the package's defaults.

    ValueError for what cannot be made as asked, OSError for files and for an environment that cannot be made,
    RuntimeError with the package's last words where it fails (its log is kept beside `out`).
    """
    if not samples:
        raise ValueError("a backend needs calibration samples")
    if any(s.videos for s in samples):
        raise ValueError(f"backend {asked.backend} takes pictures and text; leave samples with videos out")
    skeleton = build(base.path)  # what cannot work is told here, and not after an hour
    check_groups(skeleton, linears(skeleton), recipe.group_size)
    tokens = _count(skeleton, samples)
    marks = {
        "backend": dataclasses.asdict(asked),
        "recipe": dataclasses.asdict(recipe),
        "base": {"config": hash_file(base.path / "config.json"), "revision": base.revision},
        "calibration": digest(samples),
        "mmq": __version__,
    }
    prepare(out, json.loads(json.dumps(marks)), overwrite=overwrite)
    try:
        python = environment(asked.backend, tell=tell)
        with tempfile.TemporaryDirectory(prefix=".mmq-backend-", dir=out.resolve().parent) as place:
            report = run_script(
                asked,
                base.path,
                Path(place),
                samples=samples,
                group_size=recipe.group_size,
                python=python,
                device=device,
                keep_log=out.resolve().parent / f"{out.name}-{asked.backend}.log",
                tell=tell,
            )
            return adopt(
                Path(place) / "made",
                recipe,
                base,
                out,
                method=asked.method,
                symmetric=asked.symmetric,
                backend=report,
                calibration={"name": calibration, "digest": marks["calibration"], **tokens},
                tell=tell,
            )
    except BaseException:
        if all(p.name in (UNFINISHED, LOCK) for p in out.iterdir()):
            shutil.rmtree(out)  # nothing was made: leave no folder that another try would stumble over
        raise


def _count(skeleton: Skeleton, samples: Sequence[Sample]) -> dict[str, int]:
    """How much the calibration holds, in samples and tokens."""
    ids = [encode(skeleton, s)["input_ids"] for s in samples]
    media = sum(int(media_mask(skeleton, i).sum()) for i in ids)
    return {"samples": len(ids), "text": sum(i.numel() for i in ids) - media, "media": media}


def run_script(
    asked: Asked,
    base: Path,
    place: Path,
    *,
    samples: Sequence[Sample],
    group_size: int,
    python: Path,
    device: str = "cpu",
    keep_log: Path | None = None,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Run the backend's script under `python` on the checkpoint in `base`; what it reports of itself. The packed
    checkpoint is then in `place`/made. RuntimeError where it fails; all it said is then copied to `keep_log`."""
    job = {
        "model": str(base.resolve()),
        "samples": str(write_samples(samples, place)),
        "out": str(place / "made"),
        "method": asked.method,
        "group_size": group_size,
        "symmetric": asked.symmetric,
        "device": device.partition(":")[0],
        "seed": 0,
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    env = clean()
    if device.startswith("cuda:"):  # the script knows one GPU, its first
        number = int(device.removeprefix("cuda:"))
        visible = env.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    log = place / "log"
    command = [str(python), str(PEERS / BACKENDS[asked.backend].script), str(place / "job.json")]
    # some packages leave files where they run: in `place`
    code, last = follow(command, env=env, log=log, on_line=listener(asked.backend, tell), cwd=place)
    report = place / "made" / "peer.json"
    if code or not report.is_file():
        if keep_log is not None:
            shutil.copyfile(log, keep_log)
        where = f"; all it said is in {keep_log}" if keep_log else ""
        raise RuntimeError(f"backend {asked.backend} failed ({_exit(code)}): {last}{where}")
    return json.loads(report.read_text(encoding="utf-8"))


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}" if code else "it left no report"


def write_samples(samples: Sequence[Sample], folder: Path) -> Path:
    """Write samples.jsonl into `folder`, and the pictures as PNG beside it; each picture's path is in its part."""
    lines = []
    number = 0
    for sample in samples:
        images = iter(sample.images)
        messages = []
        for message in sample.messages:
            content = message["content"]
            if not isinstance(content, str):
                parts = []
                for part in content:
                    if part["type"] == "image":
                        path = folder.resolve() / f"{number}.png"
                        number += 1
                        next(images).convert("RGB").save(path)
                        part = {"type": "image", "path": str(path)}
                    parts.append(part)
                content = parts
            messages.append({"role": message["role"], "content": content})
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
