"""Pictures: who attends to whom, and what it costs. They need matplotlib, and give its Axes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsg_patch.attention import lsg_attention
from lsg_patch.attention.geometry import check_int
from lsg_patch.config import LSGConfig
from lsg_patch.costs import scores
from lsg_patch.families import find_base, find_modules
from lsg_patch.holders import Holder, in_eval_mode, module_of
from lsg_patch.offloading import device_of
from lsg_patch.patching import get_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# what a query and a key are to each other, by the number in a pattern
KINDS = ("not seen", "local", "sparse", "global", "hidden")
COLOURS = ("#f4f4f4", "#4c72b0", "#dd8452", "#55a868", "#bdbdbd")
HEADS, HEAD_SIZE = 4, 32  # of attention over random numbers
MOST_LENGTH = 1 << 14  # of a picture, which has a point for each pair of tokens


def pattern(
    model_or_config: nn.Module | Holder | LSGConfig,
    length: int,
    layer: int = 0,
    head: int = 0,
    input_ids: Tensor | None = None,
) -> Tensor:
    """(g + T, g + T): the index in ``KINDS`` of each key for each query, global tokens first.

    Read off the attention itself: with one-hot values it gives the share that each query has of
    each token, also of those that a pooled sparse token is made of.

    Args:
        model_or_config: a patched model, of which a layer attends to real keys; or settings, with
            random ones.
        length: tokens T of the text.
        layer, head: of the model; the head of random numbers is one of four.
        input_ids: (1, T). None: random words.

    Raises:
        ValueError: the model is not patched, or has no such layer or head.
    """
    check_int("length", length, 1, MOST_LENGTH)
    if isinstance(model_or_config, LSGConfig):
        config = model_or_config
        shares = _random_shares(config, length, head)
    else:
        config = get_config(model_or_config)
        shares = _shares_of_layer(module_of(model_or_config), length, layer, head, input_ids)
    rows = shares.shape[0]
    found = torch.full((rows, rows), KINDS.index("not seen"))
    block = (torch.arange(rows) - config.num_global_tokens) // config.block_size
    near = (block[:, None] - block).abs() <= 1
    seen = shares > 0
    found[seen] = KINDS.index("sparse")
    found[seen & near] = KINDS.index("local")
    found[seen & ((block < 0) | (block < 0)[:, None])] = KINDS.index("global")
    # the first token, where a global one replaces it
    found[:, ~seen.any(0)] = KINDS.index("hidden")
    return found


def _one_hot(key: Tensor) -> list[Tensor]:
    """Values like ``key`` that tell each row's share of the output, as many rows at a time as fit."""
    rows, width = key.shape[2:]
    whole = torch.eye(rows, -(-rows // width) * width, dtype=torch.float32, device=key.device)
    return [value.expand_as(key) for value in whole.split(width, dim=1)]


def _random_shares(config: LSGConfig, length: int, head: int) -> Tensor:
    check_int("head", head, 0, HEADS - 1)
    rows = config.num_global_tokens + length
    generator = torch.Generator().manual_seed(config.seed or 0)
    query, key = torch.randn(2, 1, HEADS, rows, HEAD_SIZE, generator=generator)
    columns = [
        lsg_attention(
            query,
            key,
            value,
            block_size=config.block_size,
            sparse_block_size=config.sparse_block_size,
            sparsity_factor=config.sparsity_factor,
            sparsity_type=config.sparsity_type,
            num_global_tokens=config.num_global_tokens,
            lsh_num_pre_rounds=config.lsh_num_pre_rounds,
            seed=config.seed,
        )[0, head]
        for value in _one_hot(key)
    ]
    return torch.cat(columns, dim=1)[:, :rows]


def _shares_of_layer(
    model: nn.Module, length: int, layer: int, head: int, input_ids: Tensor | None
) -> Tensor:
    base: Any
    base, family = find_base(model)
    modules = find_modules(base, family.attentions)
    heads = int(getattr(modules[0], family.names.heads))
    check_int("layer", layer, 0, len(modules) - 1)
    check_int("head", head, 0, heads - 1)
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        words = base.config.vocab_size
        input_ids = torch.randint(words // 10, words, (1, length), generator=generator)
    elif input_ids.shape != (1, length):
        raise ValueError(
            f"input_ids must be (1, length) = {(1, length)}, not of shape {tuple(input_ids.shape)}"
        )
    columns = []

    def read(module: Any, args: Any, kwargs: Any) -> None:
        query, key, _, choose_by, layout = module.projected(args, kwargs)
        # half precision would lose small shares
        query, key = query.float(), key.float()
        choose_by = None if choose_by is None else choose_by.float()
        for value in _one_hot(key):
            context = module.attend(layout, query, key, value, choose_by)
            columns.append(context.unflatten(-1, (heads, -1))[0, :, head])

    hook = modules[layer].register_forward_pre_hook(read, with_kwargs=True)
    with hook, torch.no_grad(), in_eval_mode(base):
        base(input_ids=input_ids.to(device_of(base)))
    shares = torch.cat(columns, dim=1).cpu()
    return shares[:, : shares.shape[0]]


def plot_pattern(
    model_or_config: nn.Module | Holder | LSGConfig,
    length: int,
    layer: int = 0,
    head: int = 0,
    query: int | None = None,
    *,
    input_ids: Tensor | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw who attends to whom: queries downwards, keys to the right, the global tokens first.

    Args:
        query: only what this token sees, as one row. None: all.
        axes: to draw into. None: new ones.

    For the others see ``pattern``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as ``pattern``, or there is no such ``query``.
    """
    colors, patches = _matplotlib("colors"), _matplotlib("patches")
    found = pattern(model_or_config, length, layer, head, input_ids)
    is_config = isinstance(model_or_config, LSGConfig)
    config: Any = model_or_config if is_config else get_config(model_or_config)  # type: ignore[arg-type]
    if query is not None:
        check_int("query", query, 0, length - 1)
        row = config.num_global_tokens + query
        found = found[row : row + 1]
    axes = _axes(axes)
    axes.imshow(
        found.numpy(),
        cmap=colors.ListedColormap(COLOURS),
        vmin=-0.5,
        vmax=len(KINDS) - 0.5,
        interpolation="nearest",
        aspect="auto" if query is not None else "equal",
    )
    axes.set(title=config.sparsity_type, xlabel="key", ylabel="query")
    present = [kind for kind in range(1, len(KINDS)) if (found == kind).any()]
    axes.legend(
        handles=[patches.Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in present],
        loc="upper right",
        fontsize="small",
    )
    return axes


def plot_cost(config: LSGConfig, lengths: Sequence[int], *, axes: Axes | None = None) -> Axes:
    """Draw the scores that a head computes against the length: operations and memory grow with them.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes = _axes(axes)
    full, ours = [n * n for n in lengths], [scores(config, n) for n in lengths]
    axes.plot(lengths, full, color=COLOURS[2], marker="o", label="full attention")
    axes.plot(lengths, ours, color=COLOURS[1], marker="o", label=f"LSG, {config.sparsity_type}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [f"{n:,}" for n in lengths], rotation=45)
    axes.set(xlabel="tokens", ylabel="scores of a head", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    return axes


def _axes(given: Axes | None) -> Axes:
    return given or _matplotlib("pyplot").subplots(figsize=(5, 5), layout="constrained")[1]


def _matplotlib(name: str) -> Any:
    try:
        return import_module(f"matplotlib.{name}")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install lsg-patch[plots]") from error
