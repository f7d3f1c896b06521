"""Position tables and initial global tokens against the reference's conversion."""

from __future__ import annotations

import pytest
import torch

import lsg_patch
from lsg_patch.families import find_base
from lsg_patch.modules.global_embeddings import initial_rows
from lsg_patch.modules.position_table import tiled
from tests import golden
from tests.tokenizers import tokenizer_like

# sinusoidal tables are not tiled
TILED = [
    e
    for e in golden.entries("conversion")
    if "positions are sinusoids of the new length, not tiles" not in e["flags"]
]
WITH_TOKEN_TYPE = ("bert", "electra", "albert")


def test_there_are_cases() -> None:
    assert len(TILED) >= 10


@pytest.mark.parametrize("entry", TILED, ids=lambda e: e["name"])
def test_position_table(entry: golden.Entry) -> None:
    tensors = golden.tensors(entry)
    table = tiled(tensors["vanilla.position_table"], entry["offset"], entry["max_sequence_length"])
    assert torch.equal(table, tensors["expected.position_table"])


@pytest.mark.parametrize("entry", TILED, ids=lambda e: e["name"])
def test_initial_global_tokens(entry: golden.Entry) -> None:
    """Where the reference leaves RoBERTa's token type out, ours has it: it is not added here."""
    tensors = golden.tensors(entry)
    expected = tensors["expected.global_embeddings"]
    rows = initial_rows(
        tensors["vanilla.word_rows"],
        tensors["vanilla.position_table"][entry["offset"] :],
        tensors["vanilla.token_type_row0"] if entry["arch"] in WITH_TOKEN_TYPE else None,
        num_global_tokens=entry["deterministic_global_rows"],
        stride=entry["global_positional_stride"],
        bos_id=0,
        mask_id=1,
    )
    assert torch.equal(rows, expected[: entry["deterministic_global_rows"]])


@pytest.mark.parametrize("name", golden.model_names())
def test_a_patched_model_has_the_references_position_table(name: str) -> None:
    model, meta, extra = golden.vanilla_model(name)
    conversion = meta["conversion"]
    tokenizer = tokenizer_like(conversion["bos_or_cls_token_id"], conversion["mask_token_id"])
    lsg_patch.patch_model(
        model, max_position_embeddings=conversion["max_sequence_length"], tokenizer=tokenizer
    )
    base, family = find_base(model)
    tables = {"expected.position_table": f"{family.embeddings}.{family.positions}"}
    if family.decoder_positions:
        tables["expected.decoder_position_table"] = family.decoder_positions
    for stored, path in tables.items():
        table = base.get_submodule(path)
        # of sinusoids, the same for both, only the first ones are stored
        expected = extra.get(stored, extra["expected.position_table"]).float()
        length = conversion["max_sequence_length"]
        assert table.num_embeddings == length + family.position_offset(table)
        assert torch.equal(table.weight[: len(expected)], expected)
    assert model.config.max_position_embeddings == meta["expected_config_max_position_embeddings"]
