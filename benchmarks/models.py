"""Models with random weights, of the size of real ones: speed and memory need no more."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from lsg_patch import patch_model

SELECTIONS = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none")
VOCABULARY = 1000


def bert(layers: int, positions: int) -> BertModel:
    """BERT-base in width, with fused full attention over up to `positions` tokens."""
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
    config._attn_implementation = "sdpa"
    return BertModel(config).eval()


def patched_copy(model: BertModel, sparsity_type: str) -> BertModel:
    """A patched deep copy, so that no patching happens where time is taken."""
    positions = model.config.max_position_embeddings
    return patch_model(
        copy.deepcopy(model), sparsity_type=sparsity_type, max_position_embeddings=positions
    )


def inputs(length: int, batch: int = 1) -> dict[str, Tensor]:
    """What a tokenizer gives for texts of exactly `length` tokens, (B, T)."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
