"""What a patch needs of a tokenizer: the ids of two tokens."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

logger = logging.getLogger(__name__)

# first the one that inputs of an encoder begin with
BOS = ("cls_token_id", "bos_token_id")
MASK = ("mask_token_id",)
_OF_TOKENIZERS = re.compile(r"^(tokenizer|vocab|.*spiece|.*sentencepiece|.*bpe)")


def find_token_ids(config: Any, tokenizer: Any, needs_mask: bool) -> tuple[int, int | None]:
    """Ids of the cls/bos token and of the mask token (None where it is not needed).

    They come from ``tokenizer``, and what it lacks from the model's config (Pegasus' tokenizers
    have no bos); where ``tokenizer`` is None, then also from the tokenizer of
    ``config._name_or_path``.

    Raises:
        ValueError: an id is not to be found or not in the vocabulary; ids are never guessed.
    """
    wanted = [BOS, MASK] if needs_mask else [BOS]
    sources, lacks = [tokenizer, config], "neither the tokenizer nor the model's config has"
    if tokenizer is None and any(_first_id(sources, names) is None for names in wanted):
        path = getattr(config, "_name_or_path", "")
        loaded, why = tokenizer_at(path) if path else (None, "it names no _name_or_path")
        why = f" (and {why})" if loaded is None else f" and the tokenizer of {path!r}"
        sources, lacks = [config, loaded], f"the model's config{why} has no"
    ids = []
    for kind, names in zip(("cls or bos", "mask"), wanted, strict=False):
        found = _first_id(sources, names)
        if found is None:
            raise ValueError(
                f"no {kind} token id for the global tokens: {lacks} {' or '.join(names)}. Pass "
                "tokenizer= (the model's tokenizer), or set the id on model.config, or use "
                "num_global_tokens=0"
            )
        if not 0 <= found < config.vocab_size:
            raise ValueError(
                f"the {kind} token id {found} is outside the model's vocabulary of "
                f"{config.vocab_size}: pass the model's own tokenizer as tokenizer="
            )
        ids.append(found)
    if tokenizer is not None:
        _warn_of_misfit(config, tokenizer)
    return ids[0], ids[1] if needs_mask else None


def _warn_of_misfit(config: Any, tokenizer: Any) -> None:
    """Say what shows that ``tokenizer`` is another model's: its padding, or words that have no row."""
    padding, own = (getattr(x, "pad_token_id", None) for x in (tokenizer, config))
    if None not in (padding, own) and padding != own:
        found = f"pads with {padding} and the model with {own}"
    elif hasattr(tokenizer, "__len__") and len(tokenizer) > config.vocab_size:
        found = f"has {len(tokenizer)} tokens and the model {config.vocab_size}"
    else:
        return
    logger.warning("the tokenizer %s: pass the model's own as tokenizer=", found)


def _first_id(sources: list[Any], names: tuple[str, ...]) -> int | None:
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((int(value) for value in values if value is not None), None)


def tokenizer_at(path: str) -> tuple[Any, str]:
    """The tokenizer of a checkpoint, or None and the reason; no code of it is run."""
    # of a folder without one, 5.x makes one that knows no words
    if os.path.isdir(path) and not any(map(_OF_TOKENIZERS.search, os.listdir(path))):
        return None, f"{path!r} has no files of one"
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False), ""
    except Exception as error:  # whatever a missing file, network or package raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, f"the tokenizer of {path!r} does not load: {reason}"
