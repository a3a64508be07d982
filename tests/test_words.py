"""A tokenizer from SentencePiece's file alone, where its class is the checkpoint's own code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mmq.quantize.words import plain_tokenizer

spm = pytest.importorskip("sentencepiece")
TEXT = ["hello world this is a test 你好 世界 图片里有什么", "the colour of the square is red", "how many? three."] * 50
SPECIAL = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def test_added_tokens_take_the_places_that_are_declared(tmp_path: Path) -> None:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        user_defined_symbols=["[UNUSED_TOKEN_1]"],
    )
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue())
    unused = pieces.piece_to_id("[UNUSED_TOKEN_1]")
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", str(unused): "<|im_start|>"}
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {n: {"content": token, **SPECIAL} for n, token in added.items()},
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = plain_tokenizer(tmp_path)
    for text in ("hello world", "the square 你好"):
        assert words(text, add_special_tokens=False).input_ids == pieces.encode(text)
        assert words.decode(pieces.encode(text)) == text
    ids = words("<|im_start|>hello", add_special_tokens=False).input_ids
    assert ids == [unused, *pieces.encode("hello")]
    assert max(words.get_vocab().values()) < pieces.vocab_size()


def test_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no tokenizer\.model"):
        plain_tokenizer(tmp_path)
