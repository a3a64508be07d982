"""A checkpoint's own Python, run because the user asked for it, with the repairs that transformers 5 makes necessary.

Such code was written against transformers 4. Names that have moved or gone since are put back while it is loaded, and
what newer releases expect of a model class is added; every repair is told. Knows nothing of tensors.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

ASKED = (
    "its model code is in the checkpoint itself ({files}); read it, then allow it with --trust-remote-code, from a hub "
    "together with --revision and the commit's full hash"
)


def own_code(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The Python files that config.json names for the model, or nothing."""
    found = [v for k, v in config.get("auto_map", {}).items() if k.startswith("AutoModel") and isinstance(v, str)]
    return tuple(dict.fromkeys(f"{v.rpartition('--')[2].partition('.')[0]}.py" for v in found))


def _apply_chunking(forward: Callable[..., Any], size: int, dim: int, *tensors: Any) -> Any:
    if size <= 0:
        return forward(*tensors)
    parts = zip(*(t.split(size, dim) for t in tensors), strict=True)
    return torch.cat([forward(*p) for p in parts], dim)


def _stand_ins() -> dict[tuple[str, str], Callable[[], Any]]:
    """(module, name) that transformers 4 had and 5 lacks -> what it is to be."""

    def at(module: str, name: str) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module(module), name)

    no = lambda: False  # noqa: E731
    flash = at("transformers.models.llama.modeling_llama", "LlamaAttention")
    return {
        ("transformers.utils", "is_torch_fx_available"): lambda: no,
        ("transformers.utils.import_utils", "is_torch_fx_available"): lambda: no,
        ("transformers.utils.import_utils", "is_torch_greater_or_equal_than_1_13"): lambda: True,
        ("transformers.pytorch_utils", "is_torch_greater_or_equal_than_1_13"): lambda: True,
        ("transformers.utils", "LossKwargs"): at("transformers.utils", "TransformersKwargs"),
        ("transformers.modeling_utils", "PretrainedConfig"): at("transformers", "PretrainedConfig"),
        ("transformers.modeling_utils", "prune_linear_layer"): at("transformers.pytorch_utils", "prune_linear_layer"),
        ("transformers.modeling_utils", "apply_chunking_to_forward"): lambda: _apply_chunking,
        ("transformers.pytorch_utils", "apply_chunking_to_forward"): lambda: _apply_chunking,
        ("transformers.image_utils", "VideoInput"): at("transformers.video_utils", "VideoInput"),
        ("transformers.image_utils", "make_batched_videos"): at("transformers.video_utils", "make_batched_videos"),
        ("transformers", "AutoModelForVision2Seq"): at("transformers", "AutoModelForImageTextToText"),
        ("transformers.models.llama.modeling_llama", "LlamaFlashAttention2"): flash,
        ("transformers.models.llama.modeling_llama", "LlamaSdpaAttention"): flash,
    }


def imported(folder: Path) -> dict[tuple[str, str], str]:
    """(module, name) of everything the folder's Python imports from transformers -> the file that does.

    Not what stands inside a `try`: such code knows how to go without."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as e:
            raise ValueError(f"{path}: not valid Python (line {e.lineno})") from None
        tried = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and id(node) not in tried:
                module = node.module or ""
                if module.split(".")[0] == "transformers":
                    found |= {(module, alias.name): path.name for alias in node.names if alias.name != "*"}
    return found


@contextmanager
def repaired(folder: Path) -> Iterator[list[str]]:
    """While it lasts the names that the folder's code imports and transformers no longer has are there again. What was
    put back is in the list. ValueError names what nothing can stand in for."""
    known, notes, added = _stand_ins(), [], []
    for (module, name), file in imported(folder).items():
        try:
            place = importlib.import_module(module)
        except ImportError:
            raise ValueError(f"{folder / file}: imports {module}, which this transformers no longer has") from None
        if hasattr(place, name) or _is_module(f"{module}.{name}"):
            continue
        if (module, name) not in known:
            raise ValueError(f"{folder / file}: imports {name} from {module}, which this transformers no longer has")
        setattr(place, name, known[module, name]())
        added.append((place, name))
        notes.append(f"{file}: {module}.{name} is gone from transformers 5; something in its place was put there")
    try:
        yield notes
    finally:
        for place, name in added:
            delattr(place, name)


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def open_remote(folder: Path, config: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[Any, Any, tuple[str, ...]]:
    """Model on the meta device, its processor or tokenizer, and what was repaired. ValueError where the code fails."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    asked = config["auto_map"]
    auto = next((n for n in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel") if n in asked), None)
    auto = auto or next(n for n in asked if n.startswith("AutoModel"))
    options: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    with repaired(folder) as notes:
        try:
            made = transformers.AutoConfig.from_pretrained(folder, **options)
            if hasattr(made, "quantization_config"):
                delattr(made, "quantization_config")
            made._attn_implementation = "eager"
            own = get_class_from_dynamic_module(asked[auto], folder)
            own, changed = repair_class(own)
            notes += changed
            with init_empty_weights(include_buffers=False):
                module = own._from_config(made, dtype=dtype)
            notes += repair_model(module)
            auto_words = transformers.AutoProcessor if _has_processor(folder) else transformers.AutoTokenizer
            words = auto_words.from_pretrained(folder, **options)
        except ValueError:
            raise
        except Exception as e:  # it is anybody's code
            why = " ".join(str(e).split())[:300]
            raise ValueError(f"{folder}: its own code does not run here: {type(e).__name__}: {why}") from e
    return module, words, tuple(dict.fromkeys(notes))


def _has_processor(folder: Path) -> bool:
    return any((folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json"))


def repair_class(own: Any) -> tuple[Any, list[str]]:
    """A model class of transformers 4 made fit for 5, and what was changed."""
    from transformers import GenerationMixin

    notes, mixin = [], cast(Any, GenerationMixin)  # a type checker would narrow `own` to it
    if not issubclass(own, mixin):
        joined: Any = type(own.__name__, (own, mixin), {"__module__": own.__module__})
        own = joined
        notes.append(
            f"{own.__name__} has no generate, which a model class had in transformers 4: GenerationMixin was added"
        )
    tied = getattr(own, "_tied_weights_keys", None)
    if isinstance(tied, list):
        own._tied_weights_keys = {}
        notes.append(f"{own.__name__}._tied_weights_keys is a list, as in transformers 4: made a table")
    if not hasattr(own, "all_tied_weights_keys"):
        own.all_tied_weights_keys = {}
        notes.append(f"{own.__name__} has no all_tied_weights_keys, which transformers 5 reads: an empty one was given")
    return own, notes


def repair_model(module: Any) -> list[str]:
    """Tell which head is tied to the embeddings where the class said so in transformers 4's way; what was changed."""
    config = module.config.get_text_config()
    head, words = module.get_output_embeddings(), module.get_input_embeddings()
    if head is None or words is None or not getattr(config, "tie_word_embeddings", False):
        return []
    names = {id(m): n for n, m in module.named_modules()}
    module._tied_weights_keys = {f"{names[id(head)]}.weight": f"{names[id(words)]}.weight"}
    module.all_tied_weights_keys = dict(module._tied_weights_keys)
    return []
