"""What a patch changes in a model, and what it costs: counted, and timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from lsg_patch.config import LSGConfig
from lsg_patch.families import find_base, find_modules
from lsg_patch.holders import module_of
from lsg_patch.patching import get_config, patch_model, patched

LENGTHS = tuple(2**n for n in range(9, 17))


def scores(config: LSGConfig, length: int) -> int:
    """Scores that one head computes for ``length`` tokens: pairs of a query and a key that it sees.

    Operations are 4 times the head size for each of them; kept in memory they are 4 bytes each in
    float32. Full attention computes ``length ** 2``.
    """
    geometry, num_global = config.geometry(), config.num_global_tokens
    total = num_global + length
    if length <= geometry.full_length:
        return total * total
    num_sparse = -(-length // geometry.sparsity_factor) if geometry.has_sparse else 0
    found = num_global * total
    for run in geometry.runs(range(length), range(num_sparse)):
        keys = num_global + run.local.size + sum(window.size for window in run.sparse)
        found += run.num_blocks * run.num_queries * keys
    return found


def overview(
    model: Any, tokenizer: Any, config: LSGConfig, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    """What ``patch_model(model, config, tokenizer=tokenizer)`` would change, as plain data.

    The model is as before. ``costs`` has for each length the operations of a forward and the scores of
    a layer as shares of those with full attention, and what the scores of a layer take in MiB, in float32,
    where they are kept (unfused attention). Operations are those of linear layers and of attention.

    Raises:
        ValueError: as ``patch_model``.
        TypeError: as ``patch_model``.
    """
    base, family = find_base(module_of(model))
    of_model: Any = base.config
    before, stated = _parameters(base), of_model.max_position_embeddings
    with patched(model, config, tokenizer=tokenizer):
        config = get_config(model)
        after, grown = _parameters(base), of_model.max_position_embeddings
    modules = find_modules(base, family.attentions)
    heads = int(getattr(modules[0], family.names.heads))
    query: Any = modules[0].get_submodule(family.names.query)
    width = int(query.weight.shape[0])
    layers = int(getattr(of_model, "num_hidden_layers", len(modules)))
    named = base.get_submodule(family.stack).named_parameters()
    weights = sum(x.numel() for n, x in named if x.dim() == 2 and "embed" not in n)
    # ALBERT's layers run several times
    linear = 2 * weights * layers // len(modules)
    costs = []
    for length in lengths:
        seen, full = scores(config, length), length**2
        ours, theirs = (length * linear + layers * 4 * width * count for count in (seen, full))
        costs.append(
            {
                "tokens": length,
                "operations": round(ours / theirs, 3),
                "scores": round(seen / full, 3),
                "scores_MiB": round(heads * seen * 4 / 2**20, 1),
                "full_scores_MiB": round(heads * full * 4 / 2**20, 1),
            }
        )
    # by operations; what a forward takes on a processor, `lsg-patch bench` measures
    step = config.block_size
    pays_from = next(n for n in range(step, 2**20, step) if scores(config, n) < 0.95 * n * n)
    geometry = config.geometry()
    keys = geometry.local_window.size + sum(window.size for window in geometry.sparse_windows)
    tables = base.get_submodule(family.embeddings).modules()
    token_width = next(x.embedding_dim for x in tables if isinstance(x, nn.Embedding))
    return {
        "family": family.name,
        "base_model": type(base).__name__,
        "attention_modules": len(modules),
        "positions": stated - (grown - config.max_position_embeddings),
        "positions_patched": config.max_position_embeddings,
        "parameters": before,
        "parameters_added": after - before,
        "of_them_global_tokens": config.num_global_tokens * token_width,
        "keys_a_query_sees": keys + config.num_global_tokens,
        "lossless_up_to": geometry.full_length,
        "fewer_operations_from": pays_from,
        "costs": costs,
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def time_forwards(
    model: nn.Module, tokenizer: Any, config: LSGConfig, lengths: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds of a forward (batch 1, random tokens) with full and with LSG attention, in turns.

    Full attention is that of a block of half the length, which sees everything; by PyTorch's fused
    attention, as the unpatched model has it.
    """
    base: Any = find_base(model)[0]
    found = []
    for length in lengths:
        ours = replace(config, max_position_embeddings=length)
        whole = replace(ours, block_size=-(-length // 2), sparsity_type="none")
        sides = [
            patch_model(copy.deepcopy(model), side, tokenizer=copy.copy(tokenizer))
            for side in (whole, ours)
        ]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, base.config.vocab_size, (1, length), generator=generator)
        times: list[list[float]] = [[], []]
        with torch.inference_mode():
            for turn in range(repeats + 1):
                for side, taken in zip(sides, times, strict=True):
                    began = time.perf_counter()
                    side(input_ids=ids)
                    if turn:  # the first one pays for what is set up once
                        taken.append(1000 * (time.perf_counter() - began))
        found.append(
            {
                "tokens": length,
                "full": round(median(times[0]), 1),
                "patched": round(median(times[1]), 1),
                "ratio": round(median(b / a for a, b in zip(*times, strict=True)), 2),
            }
        )
    return found
