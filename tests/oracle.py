"""A dense oracle of LSG attention, written from the definition alone.

Every query has an explicit row of a boolean mask over the keys
``[front | sparse tokens | ordinary tokens]`` (the front holds the global tokens, or token 0 where
it replaces one), and the softmax over that row is computed by hand. Speed does not matter
here: batch rows, heads, chunks and blocks are Python loops.

Means are exact. The reference implementation adds 1e-6 (`pooling`) and 1e-8 (`lsh`) to the counts
that it divides by, which is noise within the tolerance of its golden numbers.

Symbols: b block_size, s sparse_block_size, f sparsity_factor, g num_global_tokens, T tokens that
are not global.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class OracleResult(NamedTuple):
    """Output (B, H, N, D), and a (B, N) bool: does this query see a visible key in every head."""

    output: Tensor
    sees_key: Tensor


class Sparse(NamedTuple):
    """The sparse tokens of one batch row and one head, in order."""

    keys: Tensor  # (S, D)
    values: Tensor  # (S, D)
    visible: Tensor  # (S,) bool
    places: list[int]  # S indices of tokens: where each stands, for a bias by distance


def oracle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None = None,
    *,
    block_size: int = 128,
    sparse_block_size: int | None = 128,
    sparsity_factor: int | None = 2,
    sparsity_type: str | None = "norm",
    num_global_tokens: int = 0,
    first_token_global: bool = False,
    is_causal: bool = False,
    lsh_num_pre_rounds: int = 1,
    lsh_projections: Sequence[Tensor] | None = None,
    choose_by: Tensor | None = None,
    scale: float | None = None,
    bias_by_distance: Tensor | None = None,
    places: Sequence[Sequence[int]] | None = None,
) -> OracleResult:
    """What `lsg_attention` has to return; rows that see nothing are zeros here.

    `choose_by` (B, H, N, D): a token's vector whose length `norm`, and whose direction `lsh`, looks at.

    `bias_by_distance` (H, 2m + 1) holds, for each head, what the scores of keys m, m - 1, ... tokens
    before the query, of the query itself, and 1, ..., m tokens behind it have besides; for farther
    keys the first or the last of these. Row n of batch row r stands at `places[r][n]`.
    """
    batch, heads, length, head_dim = query.shape
    g = num_global_tokens
    tokens = length - g
    scale = head_dim**-0.5 if scale is None else scale
    if padding_mask is None:
        padding_mask = torch.ones(batch, tokens)
    is_long = tokens > 2 * block_size
    has_sparse = (
        is_long
        and sparsity_type not in (None, "none")
        and sparse_block_size not in (None, 0)
        and sparsity_factor not in (None, 0)
    )

    outputs = torch.zeros(batch, heads, length, value.shape[-1], dtype=query.dtype)
    outputs = [[outputs[row, head] for head in range(heads)] for row in range(batch)]
    sees_key = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        visible = padding_mask[row] != 0
        # Seen by all, as a global token is, whatever the padding mask says of it.
        seen_by_full_queries = visible.clone()
        if first_token_global:
            seen_by_full_queries[0] = True
        for head in range(heads):
            global_keys, keys = key[row, head, :g], key[row, head, g:]
            global_values, values = value[row, head, :g], value[row, head, g:]

            if not is_long:
                front_keys, front_values = global_keys, global_values
                sparse = _no_sparse_tokens(keys, values)
                allowed = _short_mask(seen_by_full_queries, g, is_causal)
            else:
                visible_in_windows = visible.clone()
                front_keys, front_values = global_keys, global_values
                if first_token_global:
                    # Token 0 is listed once, in front, and nowhere else.
                    front_keys, front_values = keys[:1], values[:1]
                    visible_in_windows[0] = False
                sparse = _no_sparse_tokens(keys, values)
                if has_sparse:
                    sparse = _select(
                        keys,
                        values,
                        visible_in_windows,
                        visible,
                        choose_by=(key if choose_by is None else choose_by)[row, head, g:],
                        first_query=query[row, head, g],
                        scale=scale,
                        head=head,
                        b=block_size,
                        s=sparse_block_size,
                        f=sparsity_factor,
                        kind=sparsity_type,
                        pre_rounds=lsh_num_pre_rounds,
                        projections=lsh_projections,
                    )
                allowed = _long_mask(
                    seen_by_full_queries,
                    visible_in_windows,
                    sparse.visible,
                    b=block_size,
                    s=sparse_block_size if has_sparse else 0,
                    step=block_size // sparsity_factor if has_sparse else 0,
                    g=g,
                    first_token_global=first_token_global,
                    is_causal=is_causal,
                )

            bias = None
            if bias_by_distance is not None:
                of_rows = list(range(length)) if places is None else list(places[row])
                front = of_rows[: 1 if is_long and first_token_global else g]
                of_sparse = [of_rows[g] + place for place in sparse.places]
                bias = _bias(bias_by_distance[head], of_rows, [*front, *of_sparse, *of_rows[g:]])
            outputs[row][head] = _attend(
                query[row, head],
                torch.cat([front_keys, sparse.keys, keys]),
                torch.cat([front_values, sparse.values, values]),
                allowed,
                scale,
                bias,
            )
            sees_key[row] &= allowed.any(dim=1)
    if batch == 0:
        return OracleResult(torch.zeros_like(query), sees_key)
    return OracleResult(torch.stack([torch.stack(of_row) for of_row in outputs]), sees_key)


def _bias(by_distance: Tensor, query_places: list[int], key_places: list[int]) -> Tensor:
    """(queries, keys): the entry of each pair's distance, at most that of the farthest."""
    farthest = (len(by_distance) - 1) // 2
    distances = [[min(max(k - q, -farthest), farthest) for k in key_places] for q in query_places]
    return by_distance[farthest + torch.tensor(distances, dtype=torch.long)]


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention by hand; a query with no allowed key gets zeros."""
    scores = (query @ keys.T) * scale
    scores = scores if bias is None else scores + bias
    # Scores of forbidden keys are replaced before anything is computed from them: they may be huge.
    scores = torch.where(allowed, scores, torch.full_like(scores, -torch.inf))
    highest = scores.max(dim=1, keepdim=True).values.detach()
    highest = torch.where(highest == -torch.inf, torch.zeros_like(highest), highest)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return weights @ values


# --- which key each query sees --------------------------------------------------------------------


def _short_mask(visible: Tensor, g: int, is_causal: bool) -> Tensor:
    """T <= 2b: full attention over [globals | tokens]; causal: tokens see themselves and before."""
    tokens = visible.shape[0]
    allowed = torch.zeros(g + tokens, g + tokens, dtype=torch.bool)
    allowed[:, :g] = True
    allowed[:, g:] = visible
    if is_causal:
        for t in range(tokens):
            allowed[g + t, g + t + 1 :] = False
    return allowed


def _long_mask(
    visible: Tensor,
    visible_in_windows: Tensor,
    sparse_visible: Tensor,
    *,
    b: int,
    s: int,
    step: int,
    g: int,
    first_token_global: bool,
    is_causal: bool,
) -> Tensor:
    """The block path: a (g + T, front + S + T) bool."""
    tokens = visible.shape[0]
    num_sparse = sparse_visible.shape[0]
    front = 1 if first_token_global else g
    allowed = torch.zeros(g + tokens, front + num_sparse + tokens, dtype=torch.bool)

    # The front is seen by all, whatever the padding mask says of token 0.
    allowed[:, :front] = True
    # Global queries: every token.
    allowed[:g, front + num_sparse :] = visible

    for j in range(-(-tokens // b)):
        left = _clip((j - 1) * step - s, (j - 1) * step, num_sparse)
        right = _clip((j + 2) * step, (j + 2) * step + s, num_sparse)
        local = _clip((j - 1) * b, (j + 2) * b, tokens)
        for t in range(j * b, min((j + 1) * b, tokens)):
            row_sparse = allowed[g + t, front : front + num_sparse]
            row_tokens = allowed[g + t, front + num_sparse :]
            row_sparse[left] = sparse_visible[left]
            if not is_causal:
                row_sparse[right] = sparse_visible[right]
            row_tokens[local] = visible_in_windows[local]
            if is_causal:
                row_tokens[t + 1 :] = False

    if first_token_global and not is_causal:
        # Query 0 is the global query: full attention.
        allowed[0] = False
        allowed[0, front + num_sparse :] = visible
    return allowed


def _clip(start: int, stop: int, length: int) -> slice:
    """Indices [start, stop) that exist, as a slice."""
    start = min(max(start, 0), length)
    return slice(start, max(start, min(stop, length)))


# --- which sparse tokens there are ----------------------------------------------------------------


def _no_sparse_tokens(keys: Tensor, values: Tensor) -> Sparse:
    return Sparse(keys[:0], values[:0], torch.zeros(0, dtype=torch.bool), [])


def _pad(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _select(
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    caller_visible: Tensor,
    *,
    choose_by: Tensor,
    first_query: Tensor,
    scale: float,
    head: int,
    b: int,
    s: int,
    f: int,
    kind: str,
    pre_rounds: int,
    projections: Sequence[Tensor] | None,
) -> Sparse:
    """Sparse tokens of one batch row and head; masked tokens fill up the last block."""
    # chunks tile the blocks: the reference's min(b, s), wherever that divides b
    chunk = math.gcd(b, min(b, s))
    length = -(-keys.shape[0] // b) * b
    # Masked tokens carry nothing, whatever their numbers are.
    keys = _pad(torch.where(caller_visible[:, None], keys, torch.zeros_like(keys)), length)
    values = _pad(torch.where(caller_visible[:, None], values, torch.zeros_like(values)), length)
    choose_by = _pad(choose_by, length)
    visible = _pad(visible, length)
    caller_visible = _pad(caller_visible, length)

    if f == 1:
        return Sparse(keys, values, visible, list(range(length)))
    if kind == "norm":
        return _norm(choose_by, keys, values, visible, chunk, chunk // f)
    if kind == "pooling":
        return _pooling(keys, values, visible, f)
    if kind == "bos_pooling" or (kind == "lsh" and f == s):
        # A token 0 that is put first counts in its chunk all the same.
        return _bos_pooling(keys, values, caller_visible, first_query, scale, f)
    if kind == "stride":
        return _take(keys, values, visible, [m * f + head % f for m in range(length // f)])
    if kind == "block_stride":
        offsets = [(r + head * (b // f)) % b for r in range(b // f)]
        chosen = [start + offset for start in range(0, length, b) for offset in offsets]
        return _take(keys, values, visible, chosen)
    if kind == "lsh":
        return _lsh(
            choose_by, keys, values, visible, chunk, chunk // f, pre_rounds, projections, head
        )
    raise ValueError(f"unknown sparsity_type {kind!r}")


def _take(keys: Tensor, values: Tensor, visible: Tensor, indices: list[int]) -> Sparse:
    return Sparse(keys[indices], values[indices], visible[indices], indices)


def _norm(
    choose_by: Tensor, keys: Tensor, values: Tensor, visible: Tensor, chunk: int, count: int
) -> Sparse:
    """The `count` tokens of highest norm of each chunk, ascending; ties: the earlier token wins."""
    norms = choose_by.detach().norm(dim=1).tolist()
    is_visible = visible.tolist()
    chosen: list[int] = []
    for start in range(0, keys.shape[0], chunk):
        worst_to_best = sorted(
            range(start, start + chunk), key=lambda t: (is_visible[t], norms[t], -t)
        )
        chosen += worst_to_best[-count:]
    return _take(keys, values, visible, chosen)


def _pooling(keys: Tensor, values: Tensor, visible: Tensor, f: int) -> Sparse:
    """Means of the visible tokens of each chunk of f."""
    new_keys, new_values, new_visible = [], [], []
    is_visible = visible.tolist()
    for start in range(0, keys.shape[0], f):
        seen = [t for t in range(start, start + f) if is_visible[t]]
        new_keys.append(keys[seen].sum(dim=0) / max(len(seen), 1))
        new_values.append(values[seen].sum(dim=0) / max(len(seen), 1))
        new_visible.append(len(seen) > 0)
    return Sparse(
        torch.stack(new_keys),
        torch.stack(new_values),
        torch.tensor(new_visible),
        _middles(keys.shape[0], f),
    )


def _middles(length: int, f: int) -> list[int]:
    """The mean index of each chunk of f, rounded down."""
    return [sum(range(start, start + f)) // f for start in range(0, length, f)]


def _bos_pooling(
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    first_query: Tensor,
    scale: float,
    f: int,
) -> Sparse:
    """Means of each chunk of f, weighted by the attention of the first token's query."""
    new_keys, new_values, new_visible = [], [], []
    for start in range(0, keys.shape[0], f):
        inside = slice(start, start + f)
        allowed = visible[inside][None]
        query = first_query[None]
        new_keys.append(_attend(query, keys[inside], keys[inside], allowed, scale)[0])
        new_values.append(_attend(query, keys[inside], values[inside], allowed, scale)[0])
        new_visible.append(bool(visible[inside].any()))
    return Sparse(
        torch.stack(new_keys),
        torch.stack(new_values),
        torch.tensor(new_visible),
        _middles(keys.shape[0], f),
    )


def _lsh(
    choose_by: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    chunk: int,
    final_size: int,
    pre_rounds: int,
    projections: Sequence[Tensor] | None,
    head: int,
) -> Sparse:
    """Means over buckets of similar keys, in rounds; counts are carried from round to round."""
    new_keys, new_values, new_visible = [], [], []
    places: list[int] = []
    sizes = [chunk] * pre_rounds + [final_size]
    for start in range(0, keys.shape[0], chunk):
        inside = slice(start, start + chunk)
        count = visible[inside].to(keys.dtype)
        by_sum = choose_by[inside] * count[:, None]
        key_sum = keys[inside] * count[:, None]
        value_sum = values[inside] * count[:, None]
        # the visible tokens in each bucket, followed through the rounds
        members = [[start + t] if count[t] else [] for t in range(chunk)]
        for number, size in enumerate(sizes):
            if size == 1:
                bucket = torch.zeros(count.shape[0], dtype=torch.long)
            else:
                if projections is None:
                    raise ValueError("the oracle draws nothing: lsh needs lsh_projections")
                length = by_sum.norm(dim=1, keepdim=True).clamp_min(1e-12)
                direction = by_sum / length * count.clamp_max(1)[:, None]
                hashed = direction.detach() @ projections[number][head].to(keys.dtype)
                bucket = torch.cat([hashed, -hashed], dim=1).argmax(dim=1)
            member = (bucket[None, :] == torch.arange(size)[:, None]).to(keys.dtype)
            by_sum, count = member @ by_sum, member @ count
            key_sum, value_sum = member @ key_sum, member @ value_sum
            into = bucket.tolist()
            members = [
                [t for old, tokens in enumerate(members) if into[old] == new for t in tokens]
                for new in range(size)
            ]
        new_keys.append(key_sum / count.clamp_min(1)[:, None])
        new_values.append(value_sum / count.clamp_min(1)[:, None])
        new_visible.append(count > 0)
        places += [sum(tokens) // max(len(tokens), 1) for tokens in members]
    return Sparse(torch.cat(new_keys), torch.cat(new_values), torch.cat(new_visible), places)
