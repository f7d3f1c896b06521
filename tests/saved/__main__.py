"""Write a checkpoint of each kind, as the installed transformers writes it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import lsg_patch
from tests import models, seq2seq
from tests.matrix.test_saved import outputs

SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "sparse_block_size": 4,
    "num_global_tokens": 2,
    "max_position_embeddings": 40,
}


def main() -> None:
    small = {"max_position_embeddings": 16, "vocab_size": 120}
    bert = models.tiny_model(
        "bert",
        transformers.BertForSequenceClassification,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        **small,
    )
    names = ("encoder_attention_heads", "decoder_attention_heads")
    width = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 8)
    bart = seq2seq.tiny_model(
        "bart",
        "ForConditionalGeneration",
        encoder_layers=1,
        **dict.fromkeys(names, 2),
        **width,
        **small,
    )
    for model, safe in ((bert, True), (bart, False)):
        lsg_patch.patch_model(model, **SETTINGS)
        with torch.no_grad():
            lsg_patch.global_embeddings(model).add_(torch.linspace(-1, 1, 8))
        name = f"{transformers.__version__}-{model.config.model_type}"
        folder = Path(__file__).parent / name
        chosen = {"safe_serialization": safe}
        known = inspect.signature(model.save_pretrained).parameters
        model.save_pretrained(folder, **(chosen if "safe_serialization" in known else {}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected = {key: value.tolist() for key, value in outputs(model).items()}
        (folder / "expected.json").write_text(json.dumps(expected) + "\n", "utf-8")


main()
