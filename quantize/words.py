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
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)):
        named = None  # whatever else of transformers a file may name
    options: dict[str, Any] = {"local_files_only": True}
    if names:
        options["extra_special_tokens"] = names
    try:
        if named is not None:  # not AutoTokenizer, which asks whether the model's code may run
            return named.from_pretrained(folder, **options)
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if (folder / "tokenizer.model").is_file():
            made = transformers.LlamaTokenizer.from_pretrained(folder, add_prefix_space=False, **options)
            return _at_their_ids(made, settings.get("added_tokens_decoder", {}))
    except Exception as e:  # transformers raises whatever its parts raise
        raise ValueError(f"{folder}: its tokenizer does not load: {' '.join(str(e).split())[:300]}") from None
    raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model, and its tokenizer class is its own code")


def _at_their_ids(words: Any, declared: dict[str, Any]) -> Any:
    """The tokenizer with its added tokens at the ids that tokenizer_config.json gives them: InternLM2 puts them in the
    place of pieces that it leaves unused, transformers behind the last one."""
    from tokenizers import Tokenizer

    wanted = {token["content"]: int(number) for number, token in declared.items()}
    if all(words.convert_tokens_to_ids(token) == number for token, number in wanted.items()):
        return words
    data = json.loads(words.backend_tokenizer.to_str())
    taken = set(wanted.values())
    vocab = {piece: number for piece, number in data["model"]["vocab"].items() if number not in taken}
    data["model"]["vocab"] = {piece: n for piece, n in vocab.items() if piece not in wanted} | wanted
    gone = set(words.get_vocab()) - set(data["model"]["vocab"])
    data["model"]["merges"] = [m for m in data["model"]["merges"] if not gone & {*m, "".join(m)}]
    kept = [t for t in data["added_tokens"] if t["content"] in wanted or t["id"] not in taken]
    data["added_tokens"] = [{**t, "id": wanted.get(t["content"], t["id"])} for t in kept]
    words._tokenizer = Tokenizer.from_str(json.dumps(data))
    return words
