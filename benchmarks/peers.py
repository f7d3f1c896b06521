"""Other ways to read long inputs, of the same size and with random weights."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import VOCABULARY, bert
from lsg_patch.demo import bundled_model


def _made(name: str, layers: int, positions: int, **settings: Any) -> nn.Module:
    """The model of that name in transformers, BERT-base in width."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        pad_token_id=0,
        **settings,
    )
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    model.eval()
    return model


def eager(layers: int, positions: int) -> nn.Module:
    """BERT with full attention whose scores are written out."""
    model: nn.Module = bert(layers, positions, "eager")
    return model


def bigbird(layers: int, positions: int) -> nn.Module:
    return _made("BigBird", layers, positions)


def longformer(layers: int, positions: int) -> nn.Module:
    return _made("Longformer", layers, positions + 2, attention_window=512)


def nystromformer(layers: int, positions: int) -> nn.Module:
    # its segments' length is how long its inputs are, at most and in fact
    return _made("Nystromformer", layers, positions, segment_means_seq_len=positions)


def modernbert(layers: int, positions: int) -> nn.Module:
    ids = {f"{name}_token_id": i for i, name in enumerate(("bos", "cls", "eos", "sep"), start=1)}
    return _made("ModernBert", layers, positions, **ids, attn_implementation="sdpa")


class Peer(NamedTuple):
    """Another model: how it is made, of (layers, positions), and transformers' class that it is."""

    make: Callable[[int, int], nn.Module]
    base: str


PEERS = {
    "full (eager)": Peer(eager, "BertModel"),
    "BigBird": Peer(bigbird, "BigBirdModel"),
    "Longformer": Peer(longformer, "LongformerModel"),
    "Nystromformer": Peer(nystromformer, "NystromformerModel"),
    "ModernBERT": Peer(modernbert, "ModernBertModel"),
}


def available(*names: str) -> dict[str, Callable[[int, int], nn.Module]]:
    """How peers of these names (none: all) are made; says which this transformers does not have."""
    found = {}
    for name in names or PEERS:
        if hasattr(transformers, PEERS[name].base):
            found[name] = PEERS[name].make
        else:
            leave_out(name, f"transformers {transformers.__version__} does not have it")
    return found


def local_attention(window: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The local window alone, by the package local-attention; says so where it is not installed."""
    if importlib.util.find_spec("local_attention") is None:
        leave_out("local-attention", "it is not installed (pip install local-attention)")
        return None
    from local_attention import LocalAttention

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = LocalAttention(
        window_size=window, look_backward=1, look_forward=1, causal=False, autopad=True
    )
    return attend


def sentence_transformer(layers: int) -> Any:
    """all-MiniLM-L6-v2 in sentence-transformers; None, which it says, where they are not installed.

    It reads as many tokens as it has positions, 512, of which its own setting takes half.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        leave_out("batches", "it is not installed (pip install sentence-transformers)")
        return None
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(bundled_model(), device="cpu")
    except ImportError as error:
        leave_out("batches", str(error))
        return None
    del model[0].auto_model.encoder.layer[layers:]
    model.max_seq_length = model[0].auto_model.config.max_position_embeddings
    return model


def texts_of(model: Any, count: int, short: int, long: int) -> list[str]:
    """Texts of `short` to `long` tokens, log-normal around the middle of both as lengths in corpora are."""
    chance = random.Random(0)
    words = [w for w in model.tokenizer.get_vocab() if w.isalpha() and w.isascii()]  # a token each
    words.sort()
    middle, spread = math.log(short * long) / 2, math.log(long / short) / 4
    drawn = (round(chance.lognormvariate(middle, spread)) for _ in range(count))
    lengths = [max(short, min(long, length)) for length in drawn]
    return [" ".join(chance.choices(words, k=length - 2)) for length in lengths]  # and cls and sep


def leave_out(name: str, reason: str) -> None:
    """Say that something is not measured, and why."""
    print(f"{name} is left out: {reason}", file=sys.stderr)
