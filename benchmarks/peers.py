"""Other ways to read long inputs, of the same size and with random weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from benchmarks.models import VOCABULARY, bert


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


def leave_out(name: str, reason: str) -> None:
    """Say that something is not measured, and why."""
    print(f"{name} is left out: {reason}", file=sys.stderr)
