"""A tokenizer from its files alone, where the class that config files name is the model's own code.

Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def plain_tokenizer(folder: Path, *, names: dict[str, str] | None = None) -> Any:
    """The tokenizer in `folder`: from tokenizer.json, from a class of transformers that tokenizer_config.json names, or
    from SentencePiece's tokenizer.model. `names` gives tokens a name: `tokenizer.image_token`.

    ValueError where there is none of these.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = "AutoTokenizer" in settings.get("auto_map", {})
    named = None if own else getattr(transformers, str(settings.get("tokenizer_class")), None)
    options: dict[str, Any] = {"local_files_only": True}
    if names:
        options["extra_special_tokens"] = names
    try:
        if named is not None:  # not AutoTokenizer, which asks whether the model's code may run
            return named.from_pretrained(folder, **options)
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if (folder / "tokenizer.model").is_file():
            return transformers.LlamaTokenizer.from_pretrained(folder, add_prefix_space=False, **options)
    except Exception as e:  # transformers raises whatever its parts raise
        raise ValueError(f"{folder}: its tokenizer does not load: {' '.join(str(e).split())[:300]}") from None
    raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model, and its tokenizer class is its own code")
