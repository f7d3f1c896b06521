"""What the peer's mixins ask of a family: tiny models, their inputs, and a test case for each head."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import TestCase

import torch

from tests import models, seq2seq

FAMILIES = ("bert", "roberta", "distilbert", "electra", "albert", "bart")
POSITIONS = models.POSITIONS
BATCH, LENGTH = 4, 13
MASK = models.right_padded(LENGTH, LENGTH - 5, LENGTH, LENGTH - 1)


class EncoderInputs:
    """Configs and inputs of an encoder; the attributes are those that the mixins read."""

    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    batch_size = BATCH
    seq_length = LENGTH
    num_choices = 2
    is_training = True

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        return models.tiny_config(self.family)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        # words in the padding too: inputs_embeds has no padding id to count positions by
        ids = models.ids_like(torch.ones_like(MASK), self.family)
        return self.get_config(), {"input_ids": ids, "attention_mask": MASK.clone()}


class Seq2SeqInputs(EncoderInputs):
    """Configs and inputs of an encoder-decoder."""

    def get_config(self) -> Any:
        return seq2seq.tiny_config(self.family, decoder_layers=2)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        # one eos in each row, at the same place for both sides: the classifier reads the decoder there
        full = torch.ones_like(MASK)
        return self.get_config(), {
            "input_ids": seq2seq.ids_like(full),
            "attention_mask": MASK.clone(),
            "decoder_input_ids": seq2seq.ids_like(full, seed=2),
            "decoder_attention_mask": full,
        }


def heads(family: str) -> list[type[Any]]:
    """The base model and all heads of ``family``."""
    home = seq2seq if family in seq2seq.FAMILIES else models
    return home.model_classes(family)


def case_class(family: str, head: type[Any], *mixins: type[Any]) -> type[TestCase]:
    """The tests of ``mixins`` for one head."""
    is_seq2seq = family in seq2seq.FAMILIES

    def _prepare_for_class(
        self: Any, inputs: dict[str, Any], model_class: type[Any], return_labels: bool = False
    ) -> dict[str, Any]:
        made: dict[str, Any] = super(made_class, self)._prepare_for_class(  # type: ignore[misc]
            inputs, model_class, return_labels=return_labels
        )
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            made["labels"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
            for name in ("next_sentence_label", "sentence_order_label"):
                if name in inspect.signature(model_class.forward).parameters:
                    made[name] = torch.zeros(BATCH, dtype=torch.long)
        return made

    attributes = {
        "model_tester": (Seq2SeqInputs if is_seq2seq else EncoderInputs)(family),
        "all_model_classes": (head,),
        "is_encoder_decoder": is_seq2seq,
        "test_resize_position_embeddings": family == "distilbert",
        "_prepare_for_class": _prepare_for_class,
    }
    made_class = type(f"{head.__name__}Test", (*mixins, TestCase), attributes)
    return made_class


def test_names(case: type[TestCase]) -> list[str]:
    """The tests of a case, without those that need another machine (a GPU, several, a library)."""
    found = {name: getattr(case, name) for name in dir(case) if name.startswith("test_")}
    return [
        name
        for name, test in sorted(found.items())
        if callable(test) and not getattr(test, "__unittest_skip__", False)
    ]
