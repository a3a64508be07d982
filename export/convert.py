"""A packed checkpoint in another format, the same weights to the bit: an artifact, or a folder that others packed.

Every linear is read onto its grid, packed anew, read again and compared. Lossless moves are all there are: asymmetric
AWQ and compressed-tensors into each other, symmetric ones into GPTQ as well. To the same format the tensors are copied
as they lie, and the config with its lists is written anew. A gigabyte is worked on at a time. Knows no engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..quantize.grid import Quantized
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Recipe
from .alone import alone
from .artifact import MANIFEST, Artifact, check_disk, check_elsewhere, finish, open_artifact, prepare, write_json
from .beside import copy_small_files, write_index
from .config import CONFIGS, Packing
from .move import Move, settle
from .order import REST_SHARD, versions
from .packing import LAYOUTS, pack_lossless
from .skips import skip_lists
from .words import mend_words
from .writer import Writer

OLD_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")  # of the format that was


def convert(
    folder: Path, out: Path, *, format: str | None = None, overwrite: bool = False, tell: Tell = silent
) -> Artifact:
    """Write into `out` what `folder` holds, in `format` (None: its own, with its lists and config mended).

    The manifest says what it came from (`converted_from`), and has the digest of all integers, scales and zero points
    (`grid`), which a way back leaves as it is. ValueError and OSError as `settle` and `prepare`; ValueError where a
    linear would not be the same.
    """
    check_elsewhere(out, folder)
    move = settle(folder, format)
    source = open_artifact(folder, verify=True) if (folder / MANIFEST).is_file() else None
    with alone(out, "mmq convert"):
        return _written(move, source, out, overwrite=overwrite, tell=tell)


def _written(move: Move, source: Artifact | None, out: Path, *, overwrite: bool, tell: Tell) -> Artifact:
    folder = move.subject.folder
    pieces = list(_pieces(move))
    files = [f"model-{i + 1:05d}-of-{len(pieces):05d}.safetensors" for i in range(len(pieces))]
    metas = move.packed.source.metas
    check_disk(out, int(sum(m.nbytes for m in metas.values()) * 1.1) + 16 * 2**20)
    marks = {"convert": str(folder.resolve()), "format": move.format, "digest": source.digest if source else None}
    prepare(out, marks, overwrite=overwrite)
    grid: dict[str, str] = {}
    with Writer() as writer:
        for at, (file, names) in enumerate(zip(files, pieces, strict=True)):
            linears = [n for n in names if n in move.packed.linears]
            if move.copied or not linears:
                every = [t for n in names for t in _tensors_of(move, n)]
                writer.copy(out / file, [(move.packed.source.files[t], t) for t in every])
                grid |= {n: _digest(move.packed.get(n)) for n in linears}
            else:
                tensors: dict[str, Tensor] = {}
                for name in names:
                    if name in move.packed.linears:
                        found, grid[name] = repacked(move, name)
                        tensors |= found
                    else:
                        tensors[name] = move.packed.source.get(name)
                writer.save(out / file, tensors, {})
            tell(Step("convert", at + 1, len(files)))
        hashes = writer.hashes()
    write_index(out, files)
    write_json(out / "config.json", _config(move))
    _copy_beside(folder, out, source)
    mend_words(out)
    return finish(out, hashes, _manifest(move, source, grid))


def repacked(move: Move, linear: str) -> tuple[dict[str, Tensor], str]:
    """One linear's tensors in the new format, by full names, and the digest of its grid. ValueError where what they
    are read back as is not what they were made of."""
    x = move.packed.get(linear)
    x = dataclasses.replace(x, symmetric=move.symmetric)
    tensors = pack_lossless(x, move.format, move.dtype)
    again = LAYOUTS[move.format].unpack(tensors)
    digest = _digest(x)
    if again.group_size != x.group_size or _digest(again) != digest:
        raise ValueError(f"{move.subject.folder}: {linear} would not be the same in {move.format}; please report it")
    return {f"{linear}.{suffix}": t for suffix, t in tensors.items()}, digest


def _digest(x: Quantized) -> str:
    """sha256 over the bytes of q, scale (float32) and zero."""
    found = hashlib.sha256()
    for tensor in (x.q, x.scale, x.zero):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _pieces(move: Move) -> Iterator[list[str]]:
    """What each new file holds: packed linears and other tensors, in the order in which they lie, a gigabyte a file."""
    seen: set[str] = set()
    piece: list[str] = []
    size, where = 0, None
    for name in move.packed.source.metas:
        unit = move.packed.owner(name) or name
        if unit in seen:
            continue
        seen.add(unit)
        file = move.packed.source.files[name]
        bytes_ = sum(move.packed.source.metas[t].nbytes for t in _tensors_of(move, unit))
        if piece and (size + bytes_ > REST_SHARD or file != where):
            yield piece
            piece, size = [], 0
        piece.append(unit)
        size, where = size + bytes_, file
    yield piece


def _tensors_of(move: Move, unit: str) -> list[str]:
    """The stored names of a packed linear's tensors, or the one tensor that `unit` is."""
    if unit not in move.packed.linears:
        return [unit]
    suffixes = LAYOUTS[move.packed.format].suffixes
    return [n for s in suffixes if (n := f"{unit}.{s}") in move.packed.source.metas]


def _config(move: Move) -> dict[str, Any]:
    """config.json with the new quantization_config, and none in a nested config."""
    prefixes, names = skip_lists(move.subject)
    dtype = str(move.dtype).removeprefix("torch.")
    head = move.subject.head.name if move.subject.head is not None and move.subject.head.packed else None
    packing = Packing(move.format, move.group_size, move.symmetric, prefixes, names, dtype, head)
    config = dict(move.subject.config)
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            config[key] = {k: v for k, v in config[key].items() if k != "quantization_config"}
    return config | {"quantization_config": CONFIGS[move.format](packing)}


def _copy_beside(folder: Path, out: Path, source: Artifact | None) -> None:
    """The small files: of an artifact those that its manifest has, so no report of a check; of another folder all."""
    if source is None:
        copy_small_files(folder, out)
    else:
        for name in source.manifest["files"]:
            if not name.endswith((".safetensors", ".index.json")) and name != "config.json":
                shutil.copyfile(folder / name, out / name)
    for name in OLD_CONFIGS:
        (out / name).unlink(missing_ok=True)


def _manifest(move: Move, source: Artifact | None, grid: Mapping[str, str]) -> dict[str, Any]:
    """The source's manifest, of an artifact; else what a folder tells of itself."""
    whole = hashlib.sha256("".join(f"{n} {grid[n]}\n" for n in sorted(grid)).encode()).hexdigest()
    came = {
        "folder": move.subject.folder.resolve().name,
        "format": move.packed.format,
        "quantization_config": dict(move.subject.quantization),
        "digest": source.digest if source else None,
    }
    changed = {
        "format": move.format,
        "symmetric": move.symmetric,
        "group_size": move.group_size,
        "quantized": sorted(move.packed.linears),
        "grid": whole,
        "converted_from": came,
        "versions": versions(),
    }
    if source is not None:
        other = ("schema", "files", "key")  # its key is of what `make` gives, which this is no longer
        kept = {k: v for k, v in source.manifest.items() if k not in other}
        before = source.manifest.get("converted_from")
        return kept | changed | {"converted_from": came | ({"before": before} if before else {})}
    name = move.subject.folder.resolve().name
    model = str(move.subject.config.get("_name_or_path") or "")
    recipe = Recipe(name=name, model=model or name)
    floats = sum(2 * x.inputs * x.outputs for x in move.subject.packed)
    rest = sum(m.nbytes for n, m in move.packed.source.metas.items() if move.packed.owner(n) is None)
    return {
        "name": name,
        "method": move.subject.method,
        "bits": 4,
        "recipe": dataclasses.asdict(recipe),
        "base": {"model": model, "hub": "local", "revision": None, "weight_bytes": floats + rest},
        "calibration": None,
        "layers": [],
        **changed,
    }
