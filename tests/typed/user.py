"""A user's program of the whole public API, as `mypy --strict` sees it against the installed wheel.

`tests/typed/check.py` checks it. Where a type is known, ``assert_type`` sees that it reaches the user;
each ``type: ignore`` is a mistake that must be found, since an ignore without a mistake is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from typing_extensions import assert_type

import lsg_patch


class Held:
    """As a pipeline does, it holds a model beside its tokenizer."""

    model: Any
    tokenizer: Any


def patching(config: BertConfig, held: Held) -> None:
    model = BertModel(config)
    assert_type(lsg_patch.patch_model(model), BertModel)
    assert_type(lsg_patch.patch_model(model, 64, "pooling", position_period="trained"), BertModel)
    assert_type(lsg_patch.patch_model(model, lsg_patch.LSGConfig(block_size=64)), BertModel)
    assert_type(lsg_patch.patch_model(held, tokenizer=held.tokenizer), Held)
    assert_type(lsg_patch.is_patched(model), bool)
    assert_type(lsg_patch.get_config(model), lsg_patch.LSGConfig)
    assert_type(lsg_patch.global_embeddings(held), nn.Parameter)
    assert_type(lsg_patch.freeze_except(model, "global", "head"), BertModel)
    assert_type(lsg_patch.freeze_except_global(held, train_head=False), Held)
    assert_type(lsg_patch.unpatch_model(model), BertModel)
    with lsg_patch.patched(model, block_size=64) as same:
        assert_type(same, BertModel)
    lsg_patch.patch_model("bert-base-uncased")  # type: ignore[type-var]
    lsg_patch.patch_model(model, blok_size=64)  # type: ignore[call-arg]
    lsg_patch.patch_model(model, sparsity_factor="2")  # type: ignore[arg-type]
    lsg_patch.patched(model, blok_size=64)  # type: ignore[call-arg]
    lsg_patch.patch_modle(model)  # type: ignore[attr-defined]


def settings() -> None:
    config = lsg_patch.LSGConfig(64, "lsh", seed=1)
    assert_type(config.sparsity_factor, int | None)
    assert_type(config.to_dict(), dict[str, Any])
    assert_type(lsg_patch.LSGConfig.from_dict({}), lsg_patch.LSGConfig)
    config.block_size = 32  # type: ignore[misc]


def checkpoints(folder: Path) -> None:
    assert_type(lsg_patch.from_pretrained(folder, BertModel), BertModel)
    _, info = lsg_patch.from_pretrained(folder, BertModel, output_loading_info=True)
    assert_type(info, dict[str, Any])
    lsg_patch.enable_auto_patching()
    lsg_patch.disable_auto_patching()
    with lsg_patch.auto_patching() as nothing:
        assert_type(nothing, None)
    done = lsg_patch.convert(folder, folder / "long", max_length=1024, block_size=64)
    assert_type(done.lines, tuple[str, ...])
    assert_type(done.passed, bool)


def tools(model: BertModel, held: Held, config: lsg_patch.LSGConfig) -> None:
    [chunks] = lsg_patch.chunk_embeddings(model, held.tokenizer, ["a text"])
    assert_type(chunks, lsg_patch.Chunks)
    assert_type(chunks.embeddings, Tensor)
    assert_type(chunks.spans, list[tuple[int, int]])
    assert_type(lsg_patch.overview(model, None, config), dict[str, Any])
    exported = lsg_patch.export_onnx(model, "model.onnx", int8=True)
    assert_type(exported.path, Path)
    assert_type(exported.int8_path, Path | None)
    assert_type(lsg_patch.plot_pattern(model, 512), Axes)
    assert_type(lsg_patch.plot_cost(config, [512, 1024]), Axes)


def attention() -> None:
    query = torch.randn(1, 4, 512, 32)
    bias = lsg_patch.RelativeBias(torch.zeros(4, 9))
    assert_type(bias.positions, Tensor | None)
    assert_type(lsg_patch.lsg_attention(query, query, query, relative_bias=bias), Tensor)
    lsg_patch.lsg_attention(query, query)  # type: ignore[call-arg]


def families() -> None:
    names = lsg_patch.AttentionNames(query="q", key="k", value="v")
    rotary = lsg_patch.Rotary(lambda stack, positions: (positions.cos(), positions.sin()))
    family = lsg_patch.Family("mine", ("MyEncoder",), names=names, rotary=rotary)
    assert_type(lsg_patch.register_family(family), lsg_patch.Family)
