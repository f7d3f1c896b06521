"""LSG checkpoints that the reference wrote: what their config says, as ours has it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

from lsg_patch.config import KEY, MAX_GLOBAL_TOKENS, LSGConfig, SavedPatch
from lsg_patch.families import FAMILIES

# before the names of classes of transformers
PREFIX = "LSG"
# families that the reference has
NAMES: tuple[str, ...] = ("albert", "bart", "bert", "camembert", "distilbert", "electra")
NAMES += ("mbart", "pegasus", "roberta", "xlm-roberta")
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


def is_published(stated: Mapping[str, Any]) -> bool:
    """Whether a config, as JSON, is one that the reference wrote."""
    names = stated.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    of_reference = isinstance(first, str) and first.startswith(PREFIX)
    return KEY not in stated and (of_reference or stated.get("base_model_prefix") == "lsg")


def as_ours(stated: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A config of the reference as one of transformers with our ``KEY``, and the settings ``changed``.

    Nothing that names code is left in it. Its 512 global tokens are a matter of the weights. Without
    ``KEY``, if it is that of a decoder alone, which the reference leaves as it is.

    Raises:
        ValueError: it is of no family that the reference has, or says something wrong.
    """
    where = "config.json of an LSG checkpoint"
    kind, names = stated.get("model_type"), stated.get("architectures") or []
    length, padding = stated.get("max_position_embeddings", 0), stated.get("pad_token_id", 1)
    if kind not in NAMES:
        raise ValueError(
            f"{where} has model_type={kind!r}, not one of {', '.join(NAMES)}: correct it"
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where} has architectures={names!r}, which must be a list of class names: correct it"
        )
    for name, value in (("max_position_embeddings", length), ("pad_token_id", padding)):
        if type(value) is not int:
            raise ValueError(f"{where} has {name}={value!r}, no whole number: correct it")
    family, table = FAMILIES[kind], cast("Any", SimpleNamespace(padding_idx=padding))
    said = {name: stated.get(name, default) for name, default in DEFAULTS.items()}
    offset = family.position_offset(table) if family.config_counts_offset else 0
    said["max_position_embeddings"] = length - offset
    if family.decoder is None:
        said["pass_global_tokens_to_decoder"] = False
    said.update(changed)
    if "num_global_tokens" not in changed and said["num_global_tokens"] == 0:
        raise ValueError(
            f"{where} has num_global_tokens=0, where the reference takes 1: pass num_global_tokens, "
            f"from 0 to {MAX_GLOBAL_TOKENS}"
        )
    try:
        saved = SavedPatch(LSGConfig(**said))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}, or a keyword: {error}. Pass another value as keyword"
        ) from error
    dropped = {*DEFAULTS, "auto_map", "base_model_prefix"}
    ours = {name: value for name, value in stated.items() if name not in dropped}
    ours["architectures"] = [name.removeprefix(PREFIX) for name in names]
    decoder_alone = family.decoder and names and names[0].endswith("ForCausalLM")
    return ours if decoder_alone else {**ours, KEY: saved.to_dict()}
