"""Tokenizers: a stand-in where only its ids and its limit matter, and a real one."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import transformers

from tests.models import CLS, MASK, POSITIONS, VOCABULARY


def tokenizer_like(cls_token_id: int = CLS, mask_token_id: int = MASK) -> Any:
    return types.SimpleNamespace(
        cls_token_id=cls_token_id, mask_token_id=mask_token_id, model_max_length=POSITIONS
    )


def real_tokenizer(folder: Path) -> Any:
    """A tokenizer of whole words, w5 to w119, with the ids that the tiny models have."""
    words = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(5, VOCABULARY))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    names = ("BertTokenizerFast", "BertTokenizer")  # the first where there are slow ones too
    cls = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    tokenizer = cls(str(folder / "vocab.txt"), model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_of(num_words: int) -> str:
    return " ".join(f"w{5 + i % (VOCABULARY - 5)}" for i in range(num_words))
