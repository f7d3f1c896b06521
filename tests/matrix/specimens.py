"""One way to call the tiny models of every family, encoder or encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lsg_patch.families import FAMILIES as REGISTERED
from lsg_patch.families import find_modules
from tests import golden, models, seq2seq
from tests.parity import test_model_golden, test_seq2seq_golden

# the first of these that a family has is tested for all
HEADS = ("ForTokenClassification", "ForConditionalGeneration", "ForQuestionAnswering", "Decoder")


@dataclass(frozen=True)
class Specimen:
    """A family as this transformers has it."""

    family: str

    @property
    def is_seq2seq(self) -> bool:
        return self.family in seq2seq.FAMILIES

    @property
    def is_absent(self) -> bool:
        if self.is_seq2seq:
            return not hasattr(transformers, f"{seq2seq.FAMILIES[self.family][0]}Model")
        return not hasattr(transformers, models.FAMILIES[self.family][0])

    def model(self, cls: type[Any] | None = None) -> Any:
        if self.is_seq2seq:
            name = "Model" if cls is None else cls.__name__
            return seq2seq.tiny_model(
                self.family, name.removeprefix(seq2seq.FAMILIES[self.family][0])
            )
        return models.tiny_model(self.family, cls)

    def head(self) -> type[Any]:
        source: Any = seq2seq if self.is_seq2seq else models
        classes: list[type[Any]] = source.model_classes(self.family)
        return next(cls for end in HEADS for cls in classes if cls.__name__.endswith(end))

    def ids(self, mask: Tensor) -> Tensor:
        return seq2seq.ids_like(mask) if self.is_seq2seq else models.ids_like(mask, self.family)

    def inputs(self, model: nn.Module, mask: Tensor) -> dict[str, Any]:
        """Of a base model."""
        if self.is_seq2seq:
            return seq2seq.inputs_for(model, self.ids(mask), mask)
        return {"input_ids": self.ids(mask), "attention_mask": mask}

    def run(self, model: nn.Module, mask: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The tensors that a model gives."""
        call = seq2seq.run if self.is_seq2seq else models.run
        return call(model, self.ids(mask), mask, **kwargs)

    def hidden_states(self, model: nn.Module, mask: Tensor) -> tuple[Tensor, ...]:
        """Of the patched layers, and before the first of them."""
        with torch.no_grad():
            output = model(**self.inputs(model, mask), output_hidden_states=True)
        found: tuple[Tensor, ...] = output[
            "encoder_hidden_states" if self.is_seq2seq else "hidden_states"
        ]
        return found

    def query(self, model: Any) -> nn.Module:
        """The query of the first layer that is patched."""
        family = REGISTERED[self.family]
        query: nn.Module = getattr(
            find_modules(model.base_model, family.attentions)[0], family.names.query
        )
        return query

    @property
    def golden_cases(self) -> list[golden.Entry]:
        return [entry for entry in golden.entries("model") if entry["arch"] == self.family]

    def compare_with_golden(self, entry: golden.Entry) -> None:
        dtype = torch.float32 if entry["tol_fp64"] is None else torch.float64
        if self.is_seq2seq:
            test_seq2seq_golden.test_encoder_and_decoder(entry, dtype)
        else:
            test_model_golden.test_base_model(entry, dtype)


SPECIMENS = [Specimen(family) for family in (*models.FAMILIES, *seq2seq.FAMILIES)]
