"""BERT and the families of its shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lsg_patch.families.base import Family, after_padding_row
from lsg_patch.offloading import value_of


def first_task(embeddings: Any, config: Any) -> Tensor | None:
    """ERNIE's embedding of task 0, in models that know tasks."""
    return value_of(embeddings.task_type_embeddings)[0] if config.use_task_id else None


# positions from 0 on
BERT = Family("bert", ("BertModel",))
BERT_GENERATION = Family(
    "bert-generation", ("BertGenerationEncoder",), token_types=None, begins_with_cls=False
)
ELECTRA = Family("electra", ("ElectraModel",), projection="embeddings_project")
ERNIE = Family("ernie", ("ErnieModel",), first_token_extra=first_task)
# its norms are before each layer and after the last: none in the embeddings
MEGATRON_BERT = Family("megatron-bert", ("MegatronBertModel",), global_path=("dropout",))
# the stack itself widens the embeddings
REMBERT = Family("rembert", ("RemBertModel",))
SPLINTER = Family("splinter", ("SplinterModel",))

# positions from the padding index on
CAMEMBERT = Family("camembert", ("CamembertModel",), position_offset=after_padding_row)
DATA2VEC_TEXT = Family("data2vec-text", ("Data2VecTextModel",), position_offset=after_padding_row)
ROBERTA = Family("roberta", ("RobertaModel",), position_offset=after_padding_row)
ROBERTA_PRELAYERNORM = Family(
    "roberta-prelayernorm", ("RobertaPreLayerNormModel",), position_offset=after_padding_row
)
XLM_ROBERTA = Family("xlm-roberta", ("XLMRobertaModel",), position_offset=after_padding_row)
XLM_ROBERTA_XL = Family(
    "xlm-roberta-xl",
    ("XLMRobertaXLModel",),
    global_path=("dropout",),
    position_offset=after_padding_row,
)
XMOD = Family("xmod", ("XmodModel",), position_offset=after_padding_row)

FAMILIES = (
    BERT,
    BERT_GENERATION,
    CAMEMBERT,
    DATA2VEC_TEXT,
    ELECTRA,
    ERNIE,
    MEGATRON_BERT,
    REMBERT,
    ROBERTA,
    ROBERTA_PRELAYERNORM,
    SPLINTER,
    XLM_ROBERTA,
    XLM_ROBERTA_XL,
    XMOD,
)
