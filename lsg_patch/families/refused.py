"""Models that look as if they could be patched and cannot: why, and what to do."""

from __future__ import annotations

from torch import nn

_OWN_SPARSE = "its attention is sparse already, so it reads long inputs without a patch"
_USE_OTHER = "patch a BERT, RoBERTa or ELECTRA model of the same language or domain"
_DISENTANGLED = (
    "its attention scores have terms of one token's content with its distance from the other, which "
    "pooled and global tokens do not have"
)
_BIASED_BY_FIRST_LAYER = (
    "its first layer makes a bias for all pairs of tokens, which the other layers go on with"
)
_AS_IT_IS = "use it unpatched"

# class name, of a model or of what it is derived from -> (reason, alternative)
REFUSED: dict[str, tuple[str, str]] = {
    "BigBirdPreTrainedModel": (_OWN_SPARSE, _AS_IT_IS),
    "ConvBertPreTrainedModel": (
        "half of its heads are convolutions over neighbouring tokens, which global tokens are not",
        _USE_OTHER,
    ),
    "DebertaPreTrainedModel": (_DISENTANGLED, _USE_OTHER),
    "DebertaV2PreTrainedModel": (_DISENTANGLED, _USE_OTHER),
    "LongformerPreTrainedModel": (_OWN_SPARSE, _AS_IT_IS),
    "LukePreTrainedModel": (
        "its attention is over words and entities, two sequences with queries of their own",
        "patch a RoBERTa model, or XLM-RoBERTa in place of mLUKE",
    ),
    "MobileBertPreTrainedModel": (
        "its layers attend with queries, keys and values of different bottlenecks",
        "patch a DistilBERT or a small BERT model",
    ),
    "ModernBertPreTrainedModel": (
        "it reads 8192 tokens and alternates local and global attention already",
        _AS_IT_IS,
    ),
    "MT5PreTrainedModel": (_BIASED_BY_FIRST_LAYER, "use LongT5, which is made for long inputs"),
    "T5PreTrainedModel": (_BIASED_BY_FIRST_LAYER, "use LongT5, which is made for long inputs"),
    "UMT5PreTrainedModel": (_BIASED_BY_FIRST_LAYER, "use LongT5, which is made for long inputs"),
}


def why_refused(model: nn.Module) -> str | None:
    """Why ``model``, or one inside it, cannot be patched and what to do; None if it is not known."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in REFUSED:
                reason, alternative = REFUSED[cls.__name__]
                return f"{type(module).__name__} cannot be patched: {reason}; {alternative}"
    return None
