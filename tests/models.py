"""Tiny random models, and every head that transformers has for a family, found by looking."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lsg_patch
from lsg_patch.families import find_modules

CLS, MASK, VOCABULARY, POSITIONS = 3, 4, 120, 64

# config class, module of the models, what a tiny config needs beyond the common sizes
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "bert", {}),
    "electra": ("ElectraConfig", "electra", {"embedding_size": 16}),
    "roberta": ("RobertaConfig", "roberta", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "xlm_roberta", {"pad_token_id": 1}),
    "camembert": ("CamembertConfig", "camembert", {"pad_token_id": 1}),
    "ernie": ("ErnieConfig", "ernie", {"use_task_id": True}),
    "data2vec-text": (
        "Data2VecTextConfig",
        "data2vec.modeling_data2vec_text",
        {"pad_token_id": 1, "initializer_range": 0.2},
    ),
    "roberta-prelayernorm": (
        "RobertaPreLayerNormConfig",
        "roberta_prelayernorm",
        {"pad_token_id": 1},
    ),
    "xlm-roberta-xl": ("XLMRobertaXLConfig", "xlm_roberta_xl", {"pad_token_id": 1}),
    "xmod": (
        "XmodConfig",
        "xmod",
        {"pad_token_id": 1, "languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    ),
    "megatron-bert": ("MegatronBertConfig", "megatron_bert", {}),
    "bert-generation": ("BertGenerationConfig", "bert_generation", {}),
    "rembert": (
        "RemBertConfig",
        "rembert",
        {"input_embedding_size": 16, "output_embedding_size": 24, "classifier_dropout_prob": 0.0},
    ),
    # its heads multiply outputs with each other, which makes rounding visible
    "splinter": ("SplinterConfig", "splinter", {"initializer_range": 0.1}),
    "layoutlm": ("LayoutLMConfig", "layoutlm", {"max_2d_position_embeddings": 32}),
    "markuplm": (
        "MarkupLMConfig",
        "markuplm",
        {
            "pad_token_id": 1,
            "max_depth": 3,
            "xpath_unit_hidden_size": 4,
            "max_xpath_tag_unit_embeddings": 9,
            "max_xpath_subs_unit_embeddings": 9,
            "tag_pad_id": 7,
            "subs_pad_id": 8,
        },
    ),
    "esm": (
        "EsmConfig",
        "esm",
        {"pad_token_id": 1, "mask_token_id": MASK, "position_embedding_type": "rotary"},
    ),
    "roformer": ("RoFormerConfig", "roformer", {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", "mpnet", {"pad_token_id": 1}),
    "albert": ("AlbertConfig", "albert", {"embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig",
        "distilbert",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
}


# how the classes of a family go on after its name
KINDS = ("Model", "For", "LMHeadModel", "Encoder", "Decoder")


def tiny_config(family: str, **overrides: Any) -> Any:
    name, _, own = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS + (2 if "pad_token_id" in own else 0),
        "type_vocab_size": 2,
        # large weights: with the usual 0.02 attention is flat and a wrong one goes unseen
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **own,
    }
    config = getattr(transformers, name)(**{**settings, **overrides})
    config.cls_token_id, config.mask_token_id = CLS, MASK
    return config


def modeling_module(family: str) -> Any:
    package = FAMILIES[family][1]
    path = package if "." in package else f"{package}.modeling_{package}"
    return importlib.import_module(f"transformers.models.{path}")


def model_classes(family: str) -> list[type[Any]]:
    """The base model and all heads, so that a new head is tested the day it appears."""
    module = modeling_module(family)
    prefix = FAMILIES[family][0].removesuffix("Config")
    return [
        cls
        for name, cls in sorted(vars(module).items())
        if inspect.isclass(cls)
        and issubclass(cls, transformers.PreTrainedModel)
        and name.startswith(prefix)
        and name.removeprefix(prefix).startswith(KINDS)
    ]


def base_class(family: str) -> type[Any]:
    name = lsg_patch.families.FAMILIES[family].base_classes[0]
    return getattr(modeling_module(family), name)  # type: ignore[no-any-return]


def tiny_model(family: str, cls: type[Any] | None = None, seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    model = (cls or base_class(family))(tiny_config(family, **overrides)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and layer norms of fresh models are all alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def stand_in(family: str) -> dict[str, Any]:
    """Settings by which the first global token replaces the first token of an input."""
    own = lsg_patch.families.FAMILIES[family].begins_with_cls
    return {} if own else {"mask_first_token": True}


def padding_id(family: str) -> int:
    return int(FAMILIES[family][2].get("pad_token_id", 0))


def ids_like(mask: Tensor, family: str, seed: int = 1, begin_with_cls: bool = True) -> Tensor:
    """Random ids where ``mask`` is 1 and padding elsewhere, cls at each row's first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, mask.shape, generator=generator)
    if begin_with_cls:
        first = mask.argmax(1, keepdim=True)
        ids = ids.scatter(1, first, CLS)
    return ids.masked_fill(mask == 0, padding_id(family))


def right_padded(*lengths: int) -> Tensor:
    """A mask (B, longest) of rows of these lengths."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def run(model: nn.Module, ids: Tensor, mask: Tensor | None, **kwargs: Any) -> dict[str, Tensor]:
    """The tensors that a model gives, also one for multiple choice or for given questions."""
    if takes(model, "question_positions"):
        first = torch.zeros_like(ids[:, :1]) if mask is None else mask.argmax(1, keepdim=True)
        kwargs = {"question_positions": first, **kwargs}
    if "MultipleChoice" in type(model).__name__:
        ids, mask = (x if x is None else torch.stack([x, x.flip(0)], 1) for x in (ids, mask))
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, **kwargs)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def attentions(model: nn.Module, family: str) -> list[nn.Module]:
    """The self-attention modules of a model or of the base model in it."""
    base = getattr(model, "base_model", model)
    return find_modules(base, lsg_patch.families.FAMILIES[family].attentions)


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def enable_checkpointing(model: Any, use_reentrant: bool) -> None:
    """Gradient checkpointing, by the name that this transformers has for it."""
    # 5.23 renamed it; before 4.35 it was always reentrant and took no argument
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(*([{"use_reentrant": use_reentrant}] if inspect.signature(enable).parameters else []))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], mask: Tensor | None, tolerance: float
) -> None:
    """Outputs agree: those with a value for each token at the tokens that are not padding."""
    assert actual.keys() == expected.keys() and expected
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if mask is not None and want.dim() >= 2 and want.shape[:2] == mask.shape:
            got, want = got[mask.bool()], want[mask.bool()]
        torch.testing.assert_close(
            got, want, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients agree, relative to the largest of each parameter: rounding grows with that one."""
    assert actual.keys() == expected.keys() and expected
    for name, want in expected.items():
        atol = 5e-5 * max(1.0, want.abs().max().item())
        torch.testing.assert_close(actual[name], want, rtol=1e-4, atol=atol, msg=name)
