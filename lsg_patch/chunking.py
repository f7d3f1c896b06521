"""Late chunking: the vectors of a long text's parts, from one reading of the whole.

Source: Günther et al. 2024, https://arxiv.org/abs/2409.04701.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lsg_patch.attention.geometry import check_int
from lsg_patch.families import find_base
from lsg_patch.holders import Holder, in_eval_mode, module_of, tokenizer_in
from lsg_patch.offloading import device_of
from lsg_patch.patching import get_config, is_patched
from lsg_patch.plan import learned_tables

Span = tuple[int, int]


@dataclass(frozen=True)
class Chunks:
    """The chunks of a text: ``spans``, the first character and the one behind the last of each, and
    ``embeddings`` (number of chunks, width), in float32 on the CPU.
    """

    spans: list[Span]
    embeddings: Tensor


@dataclass
class _Text:
    """A tokenized text, its own tokens behind the first ``head`` of all and before the last ``tail``;
    ``chunks`` are ranges of all tokens, with the ``spans`` of their characters and the ``sums`` of
    their states.
    """

    inputs: dict[str, Tensor]
    head: int
    tail: int
    chunks: list[Span]
    spans: list[Span]
    sums: Tensor | None = None

    def windows(self, limit: int) -> Iterator[tuple[_Text, Tensor, Span]]:
        """What is read at a time: the text, the numbers of the tokens, and the range of those of which
        the states are taken.
        """
        numbers = torch.arange(len(self.inputs["input_ids"]))
        front, inside, end = numbers.tensor_split([self.head, len(numbers) - self.tail])
        size = limit - self.head - self.tail
        if size < 1:
            raise ValueError(f"the model reads {limit} tokens, no more than special ones")
        starts = [*range(0, len(inside) - size, size - size // 4), max(0, len(inside) - size)]
        # two windows share their overlap half and half
        middles = [self.head + (first + size + second) // 2 for first, second in pairwise(starts)]
        for start, own in zip(starts, pairwise([0, *middles, len(numbers)]), strict=True):
            yield self, torch.cat([front, inside[start : start + size], end]), own


def chunk_embeddings(
    model: nn.Module | Holder,
    tokenizer: Any,
    texts: Sequence[str],
    chunk_tokens: int = 256,
    overlap: int = 0,
    boundaries: str | Sequence[Sequence[Span]] = "tokens",
    normalize: bool = True,
    batch_size: int = 8,
    show_progress: bool = False,
    language: str = "en",
) -> list[Chunks]:
    """Read each text as a whole, and give the mean of the token states of each of its chunks.

    Each chunk has seen what is around it, up to the model's length: patched, or its own. Longer texts
    are read in windows that overlap by a quarter; each token's state is that of the window in which it
    is farthest from an end. The special tokens around a text belong to its first and its last
    chunk: a text of one chunk has the model's plain mean embedding, and the means of chunks without
    overlap, weighted by their tokens, make that of the text.

    Args:
        model: a model of a supported family, patched or not, or a ``SentenceTransformer``, whose pooling
            must be a mean; what comes after it there (a dense layer, a normalisation) is applied. It
            reads without dropout, and is left in the mode that it is in.
        tokenizer: a fast one, which gives the offsets of tokens. None: the one that ``model`` holds.
        chunk_tokens: a chunk's tokens, at most, special ones not counted.
        overlap: tokens, at most, that a chunk has of the one before it.
        boundaries: "tokens": chunks of ``chunk_tokens``. "sentences": whole sentences, as many as fit,
            longer ones cut (``pip install lsg-patch[sentences]``; ``language`` as in sentencex). Or the
            spans of each text's chunks, [(first character, one behind the last), ...]; a token belongs
            to where it ends, and ``chunk_tokens`` and ``overlap`` do not count.
        normalize: make each embedding of length 1.
        batch_size: texts, or windows of them, that are read at a time.

    Raises:
        ValueError: an argument is wrong, the tokenizer is not fast, the pooling is no mean, or a text or
            a span holds no token.
        ImportError: sentences are wanted, and there is no sentencex.
        TypeError: ``model`` is of no supported family.
    """
    module = module_of(model)
    tokenizer = tokenizer or tokenizer_in(model) or tokenizer_in(module)
    _check(tokenizer, texts, chunk_tokens, overlap, boundaries, batch_size)
    if is_patched(module) and not get_config(module).adaptive:
        raise ValueError(
            "the model was patched with adaptive=False, and texts are of any length: patch it with "
            "adaptive=True"
        )
    after, limit = _after_pooling(module), tokens_at_a_time(module, tokenizer)
    base: Any = find_base(module)[0]
    encoder = base.get_encoder() if base.config.is_encoder_decoder else base
    given = [boundaries] * len(texts) if isinstance(boundaries, str) else boundaries
    found = [
        _tokenized(tokenizer, text, where, chunk_tokens, overlap, language)
        for text, where in zip(texts, given, strict=True)
    ]
    windows = [window for text in found for window in text.windows(limit)]
    windows.sort(key=lambda window: -len(window[1]))
    bar = tqdm(total=len(windows), disable=not show_progress)
    with bar, torch.no_grad(), in_eval_mode(module):
        for i in range(0, len(windows), batch_size):
            _read(encoder, windows[i : i + batch_size], tokenizer.pad_token_id or 0)
            bar.update(len(windows[i : i + batch_size]))
        width = getattr(module, "truncate_dim", None)  # of a SentenceTransformer
        return [Chunks(text.spans, _means(text, after, width, normalize)) for text in found]


def _check(
    tokenizer: Any, texts: Any, chunk_tokens: int, overlap: int, boundaries: Any, batch_size: int
) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"texts is {texts!r:.40}: pass a list of them, [text]")
    check_int("chunk_tokens", chunk_tokens, 1)
    check_int("overlap", overlap, 0, chunk_tokens - 1)
    check_int("batch_size", batch_size, 1)
    named = isinstance(boundaries, str) and boundaries in ("tokens", "sentences")
    if not named and (isinstance(boundaries, str) or not isinstance(boundaries, Sequence)):
        raise ValueError(f'boundaries={boundaries!r}: pass "tokens", "sentences" or spans')
    if not isinstance(boundaries, str) and len(boundaries) != len(texts):
        raise ValueError(
            f"boundaries are spans of {len(boundaries)} texts, not of {len(texts)}: pass a list for each"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, and only fast tokenizers give offsets "
            "of tokens: pass AutoTokenizer.from_pretrained(..., use_fast=True)"
        )


def _after_pooling(module: nn.Module) -> list[nn.Module]:
    """What a SentenceTransformer applies to its pooled states."""
    if not (isinstance(module, nn.Sequential) and hasattr(module, "encode")):
        return []
    prompt: Any = getattr(module, "default_prompt_name", None)
    if prompt is not None:
        raise ValueError(
            f"default_prompt_name={prompt!r} puts words before each text: set it to None, and put them "
            "into the texts"
        )
    pooling: Any = module[1]
    mode = getattr(pooling, "pooling_mode", None) or pooling.get_pooling_mode_str()
    if mode != "mean":
        raise ValueError(
            f"the pooling of the {type(module).__name__} is {mode!r}, and a chunk has only a mean: pass "
            "the encoder and its tokenizer, chunk_embeddings(model[0].auto_model, model.tokenizer, ...)"
        )
    return list(module.children())[2:]


def tokens_at_a_time(module: nn.Module, tokenizer: Any) -> int:
    """How many tokens a model reads, patched or not, special ones among them."""
    base, family = find_base(module)
    stated: Any = base.config
    limits = [getattr(module, "max_seq_length", None)]
    if is_patched(module):
        limits.append(get_config(module).max_position_embeddings)
    else:
        tables, offset = learned_tables(base, family)
        rows = tables[0].num_embeddings - offset if tables else stated.max_position_embeddings
        limits += [tokenizer.model_max_length, rows]
    return int(min(limit for limit in limits if limit is not None))


def _tokenized(
    tokenizer: Any, text: str, boundaries: Any, chunk_tokens: int, overlap: int, language: str
) -> _Text:
    rows = tokenizer(
        text,
        return_attention_mask=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    if not rows["input_ids"]:
        raise ValueError(f"texts: {text[:40]!r} has no token, not even a special one: leave it out")
    special, offsets = rows.pop("special_tokens_mask"), rows.pop("offset_mapping")
    whole, count = len(special), len(special) - sum(special)
    head = special.index(0) if count else whole
    offsets = offsets[head : head + count]
    ends = [end for _, end in offsets]
    if isinstance(boundaries, str):
        pieces = _pieces(text, ends, boundaries, chunk_tokens, language)
        chunks = list(_packed(pieces, chunk_tokens, overlap)) if count else [(0, 0)]
        spans = [(offsets[a][0], offsets[b - 1][1]) if count else (0, 0) for a, b in chunks]
    else:
        spans = list(boundaries)
        chunks = [(bisect_right(ends, begin), bisect_right(ends, end)) for begin, end in spans]
        for span, (first, last) in zip(spans, chunks, strict=True):
            if first >= last and count:
                raise ValueError(
                    f"boundaries: no token ends in {span} of {text[:40]!r}: leave it out"
                )
    chunks = [(a and head + a, head + b if b < count else whole) for a, b in chunks]
    inputs = {name: torch.tensor(row) for name, row in rows.items()}
    return _Text(inputs, head, whole - head - count, chunks, spans)


def _pieces(
    text: str, ends: list[int], boundaries: str, chunk_tokens: int, language: str
) -> list[Span]:
    """Ranges of tokens that are not cut: single ones, or sentences, the too long ones cut."""
    if boundaries == "tokens":
        return [(i, i + 1) for i in range(len(ends))]
    try:
        from sentencex import segment
    except ImportError as error:
        raise ImportError(
            'boundaries="sentences" needs sentencex: pip install lsg-patch[sentences]'
        ) from error
    lengths = accumulate(map(len, segment(language, text)), initial=0)
    cuts = [bisect_right(ends, length) for length in lengths]
    return [
        (i, min(i + chunk_tokens, last))
        for first, last in pairwise(cuts)
        for i in range(first, last, chunk_tokens)
    ]


def _packed(pieces: list[Span], chunk_tokens: int, overlap: int) -> Iterator[Span]:
    """Neighbouring ``pieces``, ranges of tokens, as many together as fit, each in the next chunk too
    where the ``overlap`` has room.
    """
    first = last = 0
    while last < len(pieces):
        last += 1
        while last < len(pieces) and pieces[last][1] - pieces[first][0] <= chunk_tokens:
            last += 1
        yield pieces[first][0], pieces[last - 1][1]
        first = last
        while last < len(pieces) and first > 0:
            begin = pieces[first - 1][0]
            if pieces[last - 1][1] - begin > overlap or pieces[last][1] - begin > chunk_tokens:
                break
            first -= 1


def _read(encoder: Any, windows: list[tuple[_Text, Tensor, Span]], pad_id: int) -> None:
    """Read a batch of windows, and add their states to the chunks that they belong to."""
    inputs = {}
    for name in windows[0][0].inputs:
        rows = [text.inputs[name][numbers] for text, numbers, _ in windows]
        padded = pad_sequence(rows, True, pad_id if name == "input_ids" else 0)
        inputs[name] = padded.to(device_of(encoder))
    states = encoder(**inputs)[0].float().cpu()
    for (text, numbers, own), row in zip(windows, states, strict=True):
        if text.sums is None:
            text.sums = row.new_zeros(len(text.chunks), row.shape[1])
        for i, chunk in enumerate(text.chunks):
            first, last = max(chunk[0], own[0]), min(chunk[1], own[1])
            mine = (numbers >= first) & (numbers < last)
            text.sums[i] += row[: len(numbers)][mine].sum(0)


def _means(text: _Text, after: list[nn.Module], width: int | None, normalize: bool) -> Tensor:
    counts = torch.tensor([end - begin for begin, end in text.chunks])
    pooled: Tensor = cast("Tensor", text.sums) / counts[:, None]
    for module in after:
        like = next(module.parameters(), pooled)
        pooled = module({"sentence_embedding": pooled.to(like)})["sentence_embedding"]
    pooled = pooled[:, :width].float().cpu()
    return nn.functional.normalize(pooled, dim=-1) if normalize else pooled
