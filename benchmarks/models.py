"""Models with random weights, of the size of real ones: speed and memory need no more."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

from lsg_patch import patch_model

SELECTIONS = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none")
VOCABULARY = 1000


def bert(layers: int, positions: int, attention: str = "sdpa") -> BertModel:
    """BERT-base in width, with full attention (fused, or "eager") over up to `positions` tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        cls_token_id=1,
        mask_token_id=2,
    )
    # Models before transformers 4.48 have no choice of attention; newer ones choose this one
    # themselves, and it is set here so that nothing weaker is ever the reference.
    config._attn_implementation = attention
    return BertModel(config).eval()


def patched_copy(model: BertModel, sparsity_type: str, unpad: bool | None = None) -> BertModel:
    """A patched deep copy, so that no patching happens where time is taken."""
    return patch_model(
        copy.deepcopy(model),
        sparsity_type=sparsity_type,
        max_position_embeddings=model.config.max_position_embeddings,
        unpad=unpad,
    )


def inputs(length: int) -> dict[str, Tensor]:
    """What a tokenizer gives for a text of exactly `length` tokens, (1, T)."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of these inputs, padded to the longest, (B, T)."""
    return {
        name: pad_sequence([text[name][0] for text in texts], batch_first=True) for name in texts[0]
    }


@torch.inference_mode()
def run(model: torch.nn.Module, *batches: dict[str, Any]) -> None:
    for batch in batches:
        model(**batch)
