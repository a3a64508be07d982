"""The small files that an engine wants beside the weights: index, config, processors, tokenizer.

Knows names and shapes only, no tensor's values.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..quantize.skeleton import Skeleton, read_config
from ..quantize.spelling import idle_linears, spellings
from ..recipes.folder import headers
from ..recipes.remote import INDEX, TEMPLATES, goes_along
from .artifact import write_json
from .config import CONFIGS, Packing
from .order import Order, quantized_names
from .skips import every_name

TEXT = ("text_config", "llm_config", "language_config")  # where a config keeps its text model's
WRITTEN = ("config.json", INDEX, "mmq.json")  # here, not copied


def write_index(out: Path, files: Iterable[str]) -> None:
    """The index of the safetensors `files` in `out`. Its `total_size` is what the tensors take, as transformers counts,
    without the files' headers."""
    where: dict[str, str] = {}
    total = 0
    for file in files:
        for name, entry in headers(out / file).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                where[name], total = file, total + end - begin
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def write_config(skeleton: Skeleton, order: Order) -> None:
    """The base's config.json as it stands, and the quantization it now has. A packed head is no longer the embeddings'
    weight, whatever it was."""
    quantized = set(quantized_names(skeleton, order))
    spelled = {n.removesuffix(".weight"): c.removesuffix(".weight") for n, c in skeleton.names.items()}
    skip, head = skeleton.family.skip, order.head
    if head:
        spelled[head.name] = head.stored
        skip = tuple(s for s in skip if s not in f"{head.name}." and s not in f"{head.stored}.")
    skipped = []
    for name, module in skeleton.module.named_modules():
        if _is_matrix(name, module, skeleton) and spelled.get(name) not in quantized:
            skipped += dict.fromkeys((name, spelled.get(name, name), *spellings(skeleton, name)))
    skipped += idle_linears(skeleton)
    config = read_config(order.base.path)
    skipped = list(dict.fromkeys(every_name(str((config.get("architectures") or [""])[0]), skipped)))
    dtype = str(skeleton.stored).removeprefix("torch.")
    packing = Packing(
        order.format,
        order.grid.group_size,
        order.grid.symmetric,
        skip,
        tuple(skipped),
        dtype,
        head.stored if head else None,
    )
    if head and head.tied:
        for part in (config, *(config[key] for key in TEXT if isinstance(config.get(key), dict))):
            part["tie_word_embeddings"] = False
    config["quantization_config"] = CONFIGS[order.format](packing)
    write_json(order.out / "config.json", config)


def _is_matrix(name: str, module: nn.Module, skeleton: Skeleton) -> bool:
    """Whether an engine may hold a module as a linear: a Linear, or what transformers makes of a mixture's router."""
    weight = module._parameters.get("weight")
    router = weight is not None and weight.ndim == 2 and name.startswith(f"{skeleton.family.layers}.")
    return isinstance(module, nn.Linear) or router


def copy_small_files(base: Path, out: Path) -> list[str]:
    """Everything beside the weights: processors, tokenizer, chat template, generation config, the model's own code.
    What of the model's is not taken along, in words: an artifact has no folders."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name not in WRITTEN and goes_along(path.name):
            shutil.copyfile(path, out / path.name)
    named = sorted(path.stem for path in base.glob(f"{TEMPLATES}/*.jinja"))
    return [f"the chat templates {', '.join(named)} of {TEMPLATES} are not in it; the model's own is"] if named else []
