"""From a checkpoint folder to the model it describes, without weights, and to its processor.

Three ways: transformers has a class; a row of family.py names code of ours; or the folder's own Python, which runs only
where it is asked for (remote.py). Knows neither tensors nor layers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .family import Row, row_of
from .remote import ASKED, open_remote, own_code

COPY = "copy it from where the model came from"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Opened:
    """A model on the meta device with its processor (for a text model its tokenizer), the rules that map its
    checkpoint's names to its own before transformers' rules do, and what a user should know."""

    module: Any
    processor: Any
    rules: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()


def check_class(config: dict[str, Any], *, trust: bool = False) -> None:
    """ValueError where a model of this config.json cannot be opened, naming what is missing. Opens nothing.

    `trust`: the checkpoint's own Python may run."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if row_of(config) is not None or kind in CONFIG_MAPPING:
        return
    unknown = (
        f"model type {kind!r} is not known: transformers {transformers.__version__} has no class for it; to "
        "open it by code of your own, add a row to ROWS in quantize/family.py"
    )
    files = own_code(config)
    if not files:
        raise ValueError(unknown)
    if not trust:
        raise ValueError(f"{unknown}; {ASKED.format(files=', '.join(files))}")


def open_model(folder: Path, config: dict[str, Any], *, dtype: torch.dtype, trust: bool = False) -> Opened:
    """The model of the checkpoint in `folder`, whose config.json says `config`. ValueError as in `check_class`."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_class(config, trust=trust)
    transformers.utils.logging.set_verbosity_error()
    row = row_of(config)
    if row is not None:
        code = _code(row)
        with init_empty_weights(include_buffers=False):
            module, processor = code.build(folder, config, dtype=dtype)
        rules = tuple(code.rules(module)) if hasattr(code, "rules") else ()
        return Opened(module, processor, rules, (row.note,) if row.note else ())
    if config.get("model_type") not in CONFIG_MAPPING:
        module, processor, notes = open_remote(folder, config, dtype=dtype)
        return Opened(module, processor, notes=notes)
    hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(hf_config, "quantization_config"):
        delattr(hf_config, "quantization_config")
    auto = model_class(hf_config)
    with init_empty_weights(include_buffers=False):
        module = auto.from_config(hf_config, dtype=dtype)
    return Opened(module, open_processor(folder))


def _code(row: Row) -> Any:
    return importlib.import_module(f".{row.code}", __package__)


def model_class(config: Any) -> Any:
    """The auto class that makes a generating model of this transformers config. ValueError when none does."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name, choice in (
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", transformers.AutoModelForImageTextToText),
        ("MODEL_FOR_CAUSAL_LM_MAPPING", transformers.AutoModelForCausalLM),
    ):
        if type(config) in getattr(auto, name):
            return choice
    raise ValueError(
        f"model type {config.model_type!r}: transformers has no class of it that generates text from images or text"
    )


def open_processor(folder: Path) -> Any:
    """The model's own processor, or its tokenizer where there are no settings for pictures. ValueError when it does not
    load."""
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    settings = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
    auto = AutoProcessor if any((folder / name).is_file() for name in settings) else AutoTokenizer
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises whatever its parts raise
        if not any((folder / name).is_file() for name in TOKENIZERS) and not any(folder.glob("*.tiktoken")):
            raise ValueError(f"{folder}: no tokenizer (tokenizer.json is missing); {COPY}") from None
        raise ValueError(f"{folder}: its processor does not load: {' '.join(str(e).split())[:300]}") from None
