"""MPNet: a bias by distance, the same in short inputs, in linear memory in long ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsg_patch
from lsg_patch.attention import SPARSITY_TYPES
from lsg_patch.memory import peak_memory
from tests.models import (
    CLS,
    VOCABULARY,
    assert_same,
    attentions,
    ids_like,
    right_padded,
    run,
    tiny_model,
)
from tests.oracle import oracle_attention

FARTHEST = 150  # beyond the distance from which on the bias is the same
SETTINGS: dict[str, Any] = {"block_size": 16, "sparse_block_size": 16}


def mpnet(seed: int = 0, **overrides: Any) -> Any:
    """With a bias that decides as much as the words do."""
    model = tiny_model("mpnet", seed=seed, **overrides)
    table = model.encoder.relative_attention_bias.weight
    table.data = 2 * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    return model


def by_distance(model: Any) -> Tensor:
    """(H, 2 * FARTHEST + 1), of what an unpatched model makes for all pairs."""
    of_pairs = model.encoder.compute_position_bias(torch.zeros(1, 2 * FARTHEST + 1, 1))
    return of_pairs[0, :, FARTHEST]  # type: ignore[no-any-return]


def test_the_bias_of_far_tokens_is_that_of_the_farthest_that_are_told_apart() -> None:
    model, length = mpnet(), 700
    bias = lsg_patch.RelativeBias(
        lsg_patch.families.FAMILIES["mpnet"].relative_bias(model.encoder)  # type: ignore[misc]
    )
    everything = slice(None)
    expected = model.encoder.compute_position_bias(torch.zeros(1, length, 1))
    assert torch.equal(bias.between_rows(length, everything, everything), expected)
    assert bias.reach < length / 2


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("g", [0, 1, 3])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_a_layer_of_a_long_input_is_the_oracles(sparsity_type: str, g: int, backend: str) -> None:
    model = mpnet().double()
    table, length = by_distance(model), 90
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :11], mask[1, 70:] = 0, 0  # padding on either side
    ids = ids_like(mask, "mpnet")
    attention: Any = attentions(model, "mpnet")[1]
    seen: list[tuple[Tensor, Tensor]] = []
    attention.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    with lsg_patch.patched(
        model,
        **SETTINGS,
        sparsity_type=sparsity_type,
        num_global_tokens=g,
        global_positional_stride=40,
        max_position_embeddings=length,
        backend=backend,
        mask_first_token=False,
        unpad=False,
    ):
        run(model, ids, mask)
        projections = [getattr(attention, f"lsh_projection_{i}", None) for i in range(2)]
    ((hidden, output),) = seen
    query, key, value = (
        getattr(attention, name)(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for name in "qkv"
    )
    # padding has been turned to the right, and the last block is filled up with it
    tokens = torch.zeros(2, hidden.shape[1] - g)
    tokens[0, : length - 11] = tokens[1, :70] = 1
    places = [[*[0, 40, 80][:g], *range(tokens.shape[1])]] * 2
    expected, _ = oracle_attention(
        query,
        key,
        value,
        tokens,
        **SETTINGS,
        sparsity_type=sparsity_type,
        num_global_tokens=g,
        lsh_projections=None if projections[0] is None else projections,
        bias_by_distance=table,
        places=places,
    )
    expected = attention.o(expected.transpose(1, 2).flatten(2))
    for row, text in enumerate((length - 11, 70)):
        error = (output - expected)[row, : g + text].abs().max()
        assert error <= 1e-10, (row, error)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_blocks_larger_than_the_reach_of_the_bias(sparsity_type: str) -> None:
    """The sizes that a patch has by default: sparse tokens are all beyond it."""
    mask = right_padded(700, 500)
    ids = ids_like(mask, "mpnet")
    outputs = []
    for backend in ("dense", "sdpa"):
        model = lsg_patch.patch_model(mpnet(), sparsity_type=sparsity_type, backend=backend)
        outputs.append(run(model, ids, mask))
    assert_same(*outputs, mask, 1e-4)


def test_the_bias_matters_in_a_long_input() -> None:
    model, mask = mpnet(), right_padded(100, 80)
    ids = ids_like(mask, "mpnet")
    lsg_patch.patch_model(model, **SETTINGS)
    before = run(model, ids, mask)["last_hidden_state"]
    # read in each forward
    model.encoder.relative_attention_bias.weight.data *= -1
    after = run(model, ids, mask)["last_hidden_state"]
    assert (after - before)[mask.bool()].abs().mean() > 0.1


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("block_size", [16, 160])
def test_nothing_quadratic(block_size: int, trains: bool) -> None:
    """Also no tensor that is thrown away before the layers."""
    model = mpnet(num_hidden_layers=1).train(trains)
    used = {}
    with lsg_patch.patched(
        model, block_size=block_size, sparse_block_size=16, max_position_embeddings=8192
    ):
        for length in (2048, 8192):
            ids = ids_like(right_padded(length), "mpnet")
            with torch.set_grad_enabled(trains), peak_memory() as memory:
                output = model(ids, right_padded(length)).last_hidden_state
                if trains:
                    output.sum().backward()
            model.zero_grad()
            used[length] = memory.peak_bytes
            # scores of all heads that are written out
            assert memory.largest_numel <= 4 * length * (3 * block_size + 3 * 16)
    assert used[8192] <= 5 * used[2048]


def test_the_table_trains_as_it_does_unpatched() -> None:
    model, mask = mpnet(), right_padded(32, 20)
    ids = ids_like(mask, "mpnet")
    table = model.encoder.relative_attention_bias.weight

    def gradient() -> Tensor:
        output = model(ids, mask).last_hidden_state
        (found,) = torch.autograd.grad((output * mask[..., None]).pow(2).sum(), table)
        return found  # type: ignore[no-any-return]

    expected = gradient()
    with lsg_patch.patched(model, **SETTINGS):
        actual = gradient()
        ids, mask = ids_like(right_padded(500), "mpnet"), right_padded(500)
        of_all_buckets = gradient()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # bucket 16 is for a distance of 0 from the other side, which there is not
    used = of_all_buckets.abs().sum(1) > 0
    assert used.sum() == len(table) - 1 and not used[16]


def test_global_tokens_stand_where_they_did_after_saving_and_loading(tmp_path: Any) -> None:
    settings: dict[str, Any] = {
        **SETTINGS,
        "num_global_tokens": 3,
        "max_position_embeddings": 200,
    }
    model, mask = lsg_patch.patch_model(mpnet(), **settings), right_padded(190, 150)
    ids = ids_like(mask, "mpnet")
    expected = run(model, ids, mask)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    lsg_patch.patch_model(loaded, **settings).load_state_dict(state)
    assert_same(run(loaded, ids, mask), expected, mask, 1e-6)


def test_reverted_it_makes_its_bias_again() -> None:
    model, zeros = mpnet(), torch.zeros(2, 5, 1)
    expected = model.encoder.compute_position_bias(zeros)
    with lsg_patch.patched(model):
        assert model.encoder.compute_position_bias(zeros) is None
    assert "compute_position_bias" not in vars(model.encoder)
    assert torch.equal(model.encoder.compute_position_bias(zeros), expected)


def test_an_input_of_any_tokens_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = lsg_patch.patch_model(mpnet(), **SETTINGS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (75, 90):
        mask = right_padded(length, 40)
        ids = ids_like(mask, "mpnet")
        assert_same(run(compiled, ids, mask), run(model, ids, mask), mask, 1e-5)


def test_a_model_whose_stack_lacks_the_method_is_left_as_it_was() -> None:
    class MPNetModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            other = tiny_model("bert", vocab_size=VOCABULARY)
            self.config, self.embeddings, self.encoder = (
                other.config,
                other.embeddings,
                other.encoder,
            )
            for layer in self.encoder.layer:
                layer.attention.attn = mpnet().encoder.layer[0].attention.attn

    model = MPNetModel()
    with pytest.raises(TypeError, match="not built like a mpnet model: .*compute_position_bias"):
        lsg_patch.patch_model(model)
    assert not lsg_patch.is_patched(model)


def test_the_first_global_token_stands_for_cls() -> None:
    model = mpnet()
    tables = model.embeddings
    first = tables.word_embeddings.weight[CLS] + tables.position_embeddings.weight[2]
    lsg_patch.patch_model(model)
    torch.testing.assert_close(lsg_patch.global_embeddings(model)[0], first, rtol=0, atol=1e-6)
