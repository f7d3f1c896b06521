"""Pictures show what the attention does: held to the dense oracle, which they share no code with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsg_patch
from lsg_patch import LSGConfig
from lsg_patch.attention import SPARSITY_TYPES, draw_projections, projection_shapes
from lsg_patch.costs import scores
from lsg_patch.plots import COLOURS, HEAD_SIZE, HEADS, KINDS, pattern
from tests.models import tiny_model
from tests.oracle import oracle_attention

matplotlib = pytest.importorskip("matplotlib", reason="the environments of old releases lack it")
matplotlib.use("Agg")

BLOCK, LENGTH, GLOBALS = 8, 61, 2
ROWS = GLOBALS + LENGTH


def config_of(sparsity_type: str, **more: Any) -> LSGConfig:
    settings = {"sparse_block_size": BLOCK, "sparsity_factor": 2, "num_global_tokens": GLOBALS}
    return LSGConfig(BLOCK, sparsity_type, **{**settings, **more})


def seen_by_the_oracle(config: LSGConfig, head: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, HEADS, ROWS, HEAD_SIZE, generator=generator)
    shapes = projection_shapes(config.geometry(), HEADS, HEAD_SIZE, config.lsh_num_pre_rounds)
    shares = oracle_attention(
        query,
        key,
        torch.eye(ROWS).expand(1, HEADS, -1, -1),
        block_size=BLOCK,
        sparse_block_size=config.sparse_block_size,
        sparsity_factor=config.sparsity_factor,
        sparsity_type=config.sparsity_type,
        num_global_tokens=GLOBALS,
        lsh_projections=draw_projections(shapes, None),
    ).output
    return shares[0, head] > 0


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_who_is_seen_is_what_the_oracle_says(sparsity_type: str, head: int) -> None:
    config = config_of(sparsity_type)
    found = pattern(config, LENGTH, head=head)
    assert torch.equal(found != KINDS.index("not seen"), seen_by_the_oracle(config, head))


def test_each_kind_is_where_it_belongs() -> None:
    found = pattern(config_of("stride"), LENGTH)
    kind = {name: found == index for index, name in enumerate(KINDS)}
    assert kind["global"][:GLOBALS].all() and kind["global"][:, :GLOBALS].all()
    tokens = {name: where[GLOBALS:, GLOBALS:] for name, where in kind.items()}
    block = torch.arange(LENGTH) // BLOCK
    near = (block[:, None] - block).abs() <= 1
    assert torch.equal(tokens["local"], near)
    assert tokens["sparse"].any() and not (tokens["sparse"] & near).any()
    assert not kind["hidden"].any()


def test_short_texts_see_everything() -> None:
    assert (pattern(config_of("norm"), 2 * BLOCK) != KINDS.index("not seen")).all()


@pytest.mark.parametrize("family", ["bert", "roformer", "distilbert"])
def test_a_layer_of_a_model(family: str) -> None:
    """With real keys; the first token, which the global one replaces, is hidden."""
    settings = {"block_size": BLOCK, "sparse_block_size": BLOCK, "max_position_embeddings": 64}
    model = lsg_patch.patch_model(tiny_model(family), sparsity_type="pooling", **settings)
    found = pattern(model, LENGTH, layer=1, head=2)
    assert (found[:, 1] == KINDS.index("hidden")).all()
    expected = pattern(config_of("pooling", num_global_tokens=1), LENGTH)
    assert torch.equal(found[1:, 2:], expected[1:, 2:])
    ids = torch.full((1, LENGTH), 7)
    assert torch.equal(pattern(model, LENGTH, input_ids=ids)[:, 2:], expected[:, 2:])


def test_the_picture_is_the_same_in_training_mode_and_in_half_precision() -> None:
    config = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5}
    settings = {"block_size": BLOCK, "sparse_block_size": BLOCK, "max_position_embeddings": 64}
    model = tiny_model("bert", **config)
    lsg_patch.patch_model(model, sparsity_type="pooling", **settings)
    expected = pattern(model, LENGTH)
    assert torch.equal(pattern(model.train(), LENGTH), expected) and model.training
    assert torch.equal(pattern(model.bfloat16(), LENGTH), expected)
    with pytest.raises(ValueError, match=r"input_ids must be \(1, length\) = \(1, 61\)"):
        pattern(model, LENGTH, input_ids=torch.ones(1, 60, dtype=torch.long))


def test_the_choice_of_a_model_is_its_own() -> None:
    settings = {"block_size": BLOCK, "sparse_block_size": BLOCK, "max_position_embeddings": 64}
    model = lsg_patch.patch_model(tiny_model("bert"), sparsity_type="norm", **settings)
    layers = [pattern(model, LENGTH, layer=layer) for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_the_axes_have_the_colours_of_the_kinds() -> None:
    axes = lsg_patch.plot_pattern(config_of("norm"), LENGTH)
    [image] = axes.images
    assert image.get_array().shape == (ROWS, ROWS)
    shown = {text.get_text() for text in axes.get_legend().texts}
    assert shown == {"local", "sparse", "global"}
    assert len(COLOURS) == len(KINDS)
    row = lsg_patch.plot_pattern(config_of("norm"), LENGTH, query=30)
    [image] = row.images
    assert torch.equal(
        torch.tensor(image.get_array())[0], pattern(config_of("norm"), LENGTH)[GLOBALS + 30]
    )


@pytest.mark.parametrize("sparsity_type", ["norm", "none"])
def test_scores_are_counted_as_the_oracle_sees_keys(sparsity_type: str) -> None:
    """At factor 1 each sparse key is a token, so that keys can be counted in the picture."""
    config = config_of(sparsity_type, sparsity_factor=1)
    for length in (5, 16, 17, 61, 80):
        assert scores(config, length) == int((pattern(config, length) > 0).sum())


def test_the_cost_is_drawn_against_full_attention() -> None:
    lengths = [256, 1024, 4096]
    axes = lsg_patch.plot_cost(LSGConfig(), lengths)
    full, ours = (list(line.get_ydata()) for line in axes.lines)
    assert full == [n * n for n in lengths]
    assert ours == [scores(LSGConfig(), n) for n in lengths]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_model("bert"), {}, "not patched"),
        (lambda: config_of("norm"), {"head": 4}, "head must be a whole number from 0 to 3, not 4"),
        (
            lambda: config_of("norm"),
            {"query": 61},
            "query must be a whole number from 0 to 60, not 61",
        ),
        (
            lambda: lsg_patch.patch_model(tiny_model("bert")),
            {"layer": 2},
            "layer must be a whole number from 0 to 1, not 2",
        ),
    ],
    ids=["plain", "head", "query", "layer"],
)
def test_what_is_not_there(make: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lsg_patch.plot_pattern(make(), LENGTH, **options)
