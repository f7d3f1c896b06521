"""LSG checkpoints that the reference wrote: what their config says, as ours has it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lsg_patch.config import KEY, MAX_GLOBAL_TOKENS, LSGConfig, SavedPatch
from lsg_patch.families import FAMILIES

PREFIX = "LSG"
# families that the reference has
NAMES = (
    "albert",
    "bart",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "mbart",
    "pegasus",
    "roberta",
    "xlm-roberta",
)
# what the reference takes where a config does not say it; our own defaults are others
DEFAULTS: dict[str, Any] = {
    "adaptive": True,
    "block_size": 128,
    "lsh_num_pre_rounds": 1,
    "mask_first_token": False,
    "num_global_tokens": 1,
    "pass_global_tokens_to_decoder": True,
    "pool_with_global": True,
    "sparse_block_size": 128,
    "sparsity_factor": 2,
    "sparsity_type": "norm",
}


def without_prefix(architecture: str) -> str:
    """The class of transformers that a class of the reference is made from."""
    return architecture.removeprefix(PREFIX)


def is_published(stated: Mapping[str, Any]) -> bool:
    """Whether a config, as JSON, is one that the reference wrote."""
    names = stated.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    of_reference = isinstance(first, str) and first.startswith(PREFIX)
    return KEY not in stated and (of_reference or stated.get("base_model_prefix") == "lsg")


def is_decoder_alone(stated: Mapping[str, Any]) -> bool:
    """Whether the model has no encoder: the reference leaves such decoders as they are."""
    family = FAMILIES.get(str(stated.get("model_type")))
    names = stated.get("architectures") or [""]
    return family is not None and bool(family.decoder) and str(names[0]).endswith("ForCausalLM")


def as_ours(stated: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A config of the reference as one of transformers with our ``KEY``, and the settings ``changed``.

    Nothing that names code is left in it. Its 512 global tokens are a matter of the weights.

    Raises:
        ValueError: it is of no family that the reference has, or says something wrong.
    """
    kind, length = stated.get("model_type"), stated.get("max_position_embeddings", 0)
    if kind not in NAMES:
        raise ValueError(
            f"config.json of an LSG checkpoint has model_type={kind!r}, not one of {', '.join(NAMES)}: "
            "correct it"
        )
    names = stated.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"config.json has architectures={names!r}, which must be a list of class names: correct it"
        )
    family, padding = FAMILIES[kind], stated.get("pad_token_id", 1)
    for name, value in (("max_position_embeddings", length), ("pad_token_id", padding)):
        if type(value) is not int:
            raise ValueError(f"config.json has {name}={value!r}, no whole number: correct it")
    table: Any = SimpleNamespace(padding_idx=padding)
    said = {name: stated.get(name, default) for name, default in DEFAULTS.items()}
    offset = family.position_offset(table) if family.config_counts_offset else 0
    said["max_position_embeddings"] = length - offset
    if family.decoder is None:
        said["pass_global_tokens_to_decoder"] = False
    said.update(changed)
    number = said["num_global_tokens"]
    if "num_global_tokens" not in changed and number == 0:
        raise ValueError(
            "config.json of an LSG checkpoint has num_global_tokens=0, where the reference takes 1: pass "
            f"num_global_tokens, from 0 to {MAX_GLOBAL_TOKENS}"
        )
    try:
        saved = SavedPatch(LSGConfig(**said))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config.json of an LSG checkpoint, or a keyword: {error}. Pass another value as keyword"
        ) from error
    dropped = {*DEFAULTS, "auto_map", "base_model_prefix"}
    ours = {name: value for name, value in stated.items() if name not in dropped}
    ours["architectures"] = [without_prefix(name) for name in names]
    return ours if is_decoder_alone(ours) else {**ours, KEY: saved.to_dict()}
