"""A checkpoint is made one of long inputs, as the reference's conversion script does, and saved as ours."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsg_patch.checkpoints import from_pretrained, load_any, named_class
from lsg_patch.config import TRAINED, LSGConfig
from lsg_patch.families import find_base
from lsg_patch.patching import get_config, global_embeddings, is_patched, patch_model, unpatch_model
from lsg_patch.published import PREFIX
from lsg_patch.tokenizer import find_token_ids, tokenizer_at
from lsg_patch.weights import Source

# the reference's script takes them
LENGTH, SEED = 4096, 123
# of a short input's largest output; rounding is a hundredth of it
TOLERANCE = 1e-4
# what says what global tokens and positions are at first, and what changes the outputs of short inputs
_OF_ROWS = ("global_positional_stride", "random_global_init", "position_period")
_OF_SHORT = (
    "mask_first_token",
    "pool_with_global",
    "num_global_tokens",
    "pass_global_tokens_to_decoder",
)


class Conversion(NamedTuple):
    """What was done and found out, a line each, and whether the tests passed."""

    lines: tuple[str, ...]
    passed: bool


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    architecture: str | None = None,
    keep_first_global_token: bool = False,
    resize_lsg: bool = False,
    use_token_ids: bool = True,
    test: bool = False,
    **settings: Any,
) -> Conversion:
    """Read a checkpoint, patch it for long inputs and save it with its tokenizer, in float32.

    ``from_pretrained(out)`` gives the patched model. A ``source`` that was saved patched, by us or by
    the reference, keeps its global tokens with ``resize_lsg``, and where nothing but settings of the
    attention is asked for. Else it is patched anew, of the positions that it has.

    Args:
        source: a folder or a repository of the hub.
        out: the folder to write, new or empty.
        max_length: tokens that it reads afterwards. None: 4096, or those of a patched source.
        architecture: the class of the model, perhaps with the reference's prefix LSG. None: the one
            that the source's config names.
        keep_first_global_token: of a patched source the first global token stays.
        resize_lsg: of a patched source all of them stay.
        use_token_ids: new global tokens have the first token type, as first tokens have. False: none.
        test: compare a short input's outputs with the source's, and read a long one.
        settings: those of ``LSGConfig``, ``random_global_init``, ``global_positional_stride`` and
            ``seed`` (123 where it is not given) among them. Those that are not given are the
            defaults, or those of a patched source.

    Raises:
        ValueError: an argument, the source or ``out`` is wrong; nothing is written.
        TypeError: the model is of no family that can be patched.
        OSError: there is no such source, or ``out`` cannot be written.
    """
    found, folder = Source.of(source, {}), os.fspath(out)
    path = found.path
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(
            f"out={folder!r} exists and is not empty: name another folder, or empty it"
        )
    cls = None if architecture is None else named_class([architecture.removeprefix(PREFIX)])
    tokenizer, why = tokenizer_at(path)
    model = load_any(path, cls).float().eval()
    if max_length is not None:
        settings = {"max_position_embeddings": max_length, **settings}
    was, kept = get_config(model) if is_patched(model) else None, False
    if was is None:
        if resize_lsg or keep_first_global_token:
            name = "resize_lsg" if resize_lsg else "keep_first_global_token"
            raise ValueError(f"{name}=True, but {path!r} is not patched: leave it out")
        config = LSGConfig(**{"max_position_embeddings": LENGTH, "seed": SEED, **settings})
    else:
        if settings.get("position_period") == TRAINED:
            raise ValueError(
                f"position_period={TRAINED!r}, but {path!r} is patched, and its tokenizer states the "
                "patched length: pass the number"
            )
        config = replace(was, **settings)
        new_rows = keep_first_global_token or any(name in settings for name in _OF_ROWS)
        longer = config.max_position_embeddings != was.max_position_embeddings
        kept = resize_lsg or not (new_rows or longer)
        if not kept:  # its positions are tiled already, and may be trained
            config = replace(config, position_period=settings.get("position_period"))
    base, family = find_base(model)
    stated: Any = base.config
    table: Any = SimpleNamespace(padding_idx=stated.pad_token_id or 0)
    offset = family.position_offset(table) if family.config_counts_offset else 0
    # of up to two blocks, and no more than the source can read
    reach = min(stated.max_position_embeddings - offset, config.max_position_embeddings, 128)
    period = config.position_period if isinstance(config.position_period, int) else reach
    short = _ids(stated, tokenizer, min(2 * config.block_size, reach, period))
    before = _outputs(base, short) if test else None
    if kept:
        changed = {name: value for name, value in vars(config).items() if value != vars(was)[name]}
        model = from_pretrained(path, cls, tokenizer=tokenizer, **changed).float()
    else:
        first = global_embeddings(model).detach()[:1].clone() if keep_first_global_token else None
        patch_model(unpatch_model(model) if was else model, config, tokenizer=tokenizer)
        if config.num_global_tokens:
            rows = global_embeddings(model).data
            if family.token_types and not use_token_ids:
                types: Any = base.get_submodule(f"{family.embeddings}.{family.token_types}")
                rows -= types.weight.data[0]
            if first is not None:
                rows[:1] = first
    config = get_config(model)
    model.save_pretrained(folder)
    made = "new, but the first" if keep_first_global_token else "new"
    if was is not None and kept:
        more = config.num_global_tokens > was.num_global_tokens
        made = f"kept the first {was.num_global_tokens}" if more else "kept"
    lines = [
        f"{type(model).__name__}: reads {config.max_position_embeddings} tokens, saved in {folder}",
        f"global tokens: {config.num_global_tokens}, {made}",
    ]
    if found.find("modules.json") is not None:
        lines.append(
            "NOT in it: pooling and prompts of the SentenceTransformer that the source is. For these "
            "patch_model(SentenceTransformer(...)), and save that"
        )
    if tokenizer is None:
        lines.append(f"tokenizer: none, {why}")
    else:
        tokenizer.model_max_length = config.max_position_embeddings
        # before 4.34 nothing else is saved
        tokenizer.init_kwargs["model_max_length"] = config.max_position_embeddings
        tokenizer.save_pretrained(folder)
    if before is None:
        return Conversion(tuple(lines), True)
    if was is None:
        stands_in = bool(config.mask_first_token) and config.pool_with_global and use_token_ids
        same = config.num_global_tokens == 0 or (config.num_global_tokens == 1 and stands_in)
    else:
        same = kept and all(vars(was)[name] == vars(config)[name] for name in _OF_SHORT)
    # whether a short input gives what it gave, and a long one something
    model = from_pretrained(folder)
    base, _ = find_base(model)
    difference = (_outputs(base, short) - before).abs().max().item()
    fits = difference <= TOLERANCE * max(1.0, before.abs().max().item())
    said = "as before" if fits else "NOT as before"
    if not same:
        said = "it may differ: global tokens are seen besides its own, or are others than before"
    length = config.max_position_embeddings
    finite = bool(_outputs(base, _ids(base.config, None, length)).isfinite().all())
    lines += [
        f"short input ({short.shape[1]} tokens): largest difference {difference:.1e}, {said}",
        f"long input ({length} tokens): {'finite' if finite else 'NOT finite'}",
    ]
    return Conversion(tuple(lines), finite and (fits or not same))


def _ids(stated: Any, tokenizer: Any, length: int) -> Tensor:
    """Ids (1, length) that are drawn, none of padding; the first is cls or bos where there is one."""
    ids = torch.randint(stated.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids[ids == stated.pad_token_id] = int(stated.pad_token_id == 0)
    with suppress(ValueError):  # without such a token there are no global tokens to replace it
        ids[0, 0] = find_token_ids(stated, tokenizer, needs_mask=False)[0]
    return ids


def _outputs(base: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids[:, :4]} if base.config.is_encoder_decoder else {}
    with torch.no_grad():
        return base(input_ids=ids, **more)[0]  # type: ignore[no-any-return]
