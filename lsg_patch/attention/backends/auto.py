"""The choice of a backend where none is asked for: said once in the log, and it never fails."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lsg_patch.attention.backends import flex, sdpa
from lsg_patch.attention.backends.flex import Call
from lsg_patch.attention.blocks import Blocks
from lsg_patch.attention.keys import Keys

logger = logging.getLogger(__name__)


def choose(call: Call, block_size: int) -> tuple[str, str]:
    """The backend for a call beyond two blocks of tokens, and why it is the one."""
    reason = flex.why_not(call)
    if reason is not None:
        return "sdpa", f"flex cannot run this: {reason}"
    if call.device_type == "cpu":
        return "sdpa", "on a CPU it is faster than flex, and compiles nothing"
    if call.dtype == torch.float32:
        return "sdpa", "flex is made for half precision, and this is float32"
    if block_size < flex.QUERY_TILE:
        return "sdpa", f"blocks of {block_size} tokens waste flex's tiles of {flex.QUERY_TILE}"
    return "flex", f"{call.device_type} in half precision, without dropout"


def block_attention(blocks: Blocks) -> Tensor:
    """LSG attention of the tokens' queries, behind the front, by the backend that suits them."""
    call = Call.of(blocks)
    name, reason = choose(call, blocks.geometry.block_size)
    if not call.is_compiling:  # a log has no place in a graph
        _say(logging.INFO, f"LSG attention runs by {name}: {reason}")
    out = _flex(blocks, call.needs_grad) if name == "flex" else None
    return sdpa.block_attention(blocks) if out is None else out


# configurations, with or without a gradient, that flex failed in and that it has run backward in
_failed: set[tuple[flex.Configuration, bool]] = set()
_rehearsed: set[flex.Configuration] = set()
_said: set[str] = set()


def _say(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def _flex(blocks: Blocks, needs_grad: bool) -> Tensor | None:
    """By flex; None where it cannot be compiled, which is tried once for a configuration."""
    configuration = flex.Configuration.of(blocks.query, blocks.scale)
    if (configuration, needs_grad) in _failed:
        return None
    try:
        if needs_grad and configuration not in _rehearsed:
            _rehearse(blocks)
            _rehearsed.add(configuration)
        return flex.block_attention(blocks)
    except torch.cuda.OutOfMemoryError:
        raise  # no reason to take a way that needs more
    except Exception as error:  # a compiler of many parts raises anything
        _failed.add((configuration, needs_grad))
        why = str(error).strip().partition("\n")[0]
        _say(
            logging.WARNING,
            f"LSG attention runs by sdpa: flex failed, {type(error).__name__}: {why}",
        )
        return None


def _rehearse(blocks: Blocks) -> None:
    """Forward and backward over the first blocks.

    A backward is compiled when it is run: if that failed there, it would be too late to fall back.
    What is compiled here serves all lengths.
    """
    geometry, number = blocks.geometry, 3

    def first(x: Tensor, count: int) -> Tensor:
        return x[:, :, :count].detach().requires_grad_(x.is_floating_point())

    def first_keys(keys: Keys, count: int) -> Keys:
        key, value, mask = (first(x, count) for x in (keys.key, keys.value, keys.mask))
        return keys._replace(key=key, value=value, mask=mask)

    length, sparse = number * geometry.block_size, blocks.sparse
    few = blocks._replace(
        query=first(blocks.query, length),
        global_keys=first_keys(blocks.global_keys, blocks.global_keys.key.shape[2]),
        sparse=None if sparse is None else first_keys(sparse, number * geometry.step),
        tokens=first_keys(blocks.tokens, length),
        front=None,
    )
    with torch.enable_grad():
        flex.block_attention(few).sum().backward()
