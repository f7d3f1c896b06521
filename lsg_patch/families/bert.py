"""BERT and the families of its shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lsg_patch.families.base import Family, after_padding_row
from lsg_patch.offloading import value_of


def first_task(embeddings: Any, config: Any) -> Tensor | None:
    """ERNIE's embedding of task 0, in models that know tasks."""
    return value_of(embeddings.task_type_embeddings)[0] if config.use_task_id else None


FAMILIES = (
    Family("bert", ("BertModel",)),
    Family("bert-generation", ("BertGenerationEncoder",), token_types=None, begins_with_cls=False),
    Family("camembert", ("CamembertModel",), position_offset=after_padding_row),
    Family("data2vec-text", ("Data2VecTextModel",), position_offset=after_padding_row),
    Family("electra", ("ElectraModel",), projection="embeddings_project"),
    Family("ernie", ("ErnieModel",), first_token_extra=first_task),
    # its norms are before each layer and after the last: none in the embeddings
    Family("megatron-bert", ("MegatronBertModel",), global_path=("dropout",)),
    # the stack itself widens the embeddings
    Family("rembert", ("RemBertModel",)),
    Family("roberta", ("RobertaModel",), position_offset=after_padding_row),
    Family(
        "roberta-prelayernorm", ("RobertaPreLayerNormModel",), position_offset=after_padding_row
    ),
    Family("splinter", ("SplinterModel",)),
    Family("xlm-roberta", ("XLMRobertaModel",), position_offset=after_padding_row),
    Family(
        "xlm-roberta-xl",
        ("XLMRobertaXLModel",),
        global_path=("dropout",),
        position_offset=after_padding_row,
    ),
    Family("xmod", ("XmodModel",), position_offset=after_padding_row),
)
