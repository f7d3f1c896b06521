"""``position_period``: the first rows of a position table are tiled, not all of them."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lsg_patch
from lsg_patch import LSGConfig, cli
from lsg_patch.families import FAMILIES
from tests import models, seq2seq
from tests.models import POSITIONS, ids_like, right_padded, run, tiny_model
from tests.modules.test_position_table import WITH_TABLES, position_tables
from tests.tokenizers import real_tokenizer, tokenizer_like

PERIOD, LENGTH = 48, 200  # neither the table's 64 rows nor the length are a multiple
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": LENGTH,
    "position_period": PERIOD,
}
LEARNED = [family for family in WITH_TABLES if family != "pegasus"]


def tiny(family: str) -> Any:
    return (models if family in models.FAMILIES else seq2seq).tiny_model(family)


@pytest.mark.parametrize("family", LEARNED)
def test_every_learned_table_and_back(family: str) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tables = position_tables(model, family)
    old = [(table.weight, table.weight.detach().clone()) for table, _ in tables]
    lsg_patch.patch_model(model, **SETTINGS)
    for (table, offset), (_, rows) in zip(tables, old, strict=True):
        assert table.num_embeddings == offset + LENGTH
        assert torch.equal(table.weight[:offset], rows[:offset])
        expected = rows[offset + torch.arange(LENGTH) % PERIOD]
        assert torch.equal(table.weight[offset:], expected)
    lsg_patch.unpatch_model(model)
    for (table, _), (weight, _) in zip(tables, old, strict=True):
        assert table.weight is weight
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "bart"])
def test_up_to_two_blocks_the_outputs_are_the_original_s(family: str) -> None:
    """With a period of two blocks; the rows behind them are others."""
    room: Any = models if family in models.FAMILIES else seq2seq
    mask = right_padded(PERIOD, 30)
    ids = ids_like(mask, family) if room is models else seq2seq.ids_like(mask)
    model = tiny(family)
    expected = room.run(model, ids, mask)
    settings = {**SETTINGS, "block_size": PERIOD // 2, "sparsity_type": "none"}
    with lsg_patch.patched(model, **settings):
        models.assert_same(room.run(model, ids, mask), expected, mask, 1e-5)


def test_a_period_of_less_than_two_blocks_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with lsg_patch.patched(tiny_model("bert"), **{**SETTINGS, "block_size": 24}):
        assert "position_period" not in caplog.text
    with lsg_patch.patched(tiny_model("bert"), **{**SETTINGS, "block_size": 32}):
        assert "position_period=48 is less than two blocks of 32" in caplog.text


def test_the_length_that_there_is_is_tiled_too() -> None:
    model = tiny_model("bert")
    rows = model.embeddings.position_embeddings.weight.clone()
    with lsg_patch.patched(model, **{**SETTINGS, "max_position_embeddings": POSITIONS}):
        table = model.embeddings.position_embeddings.weight
        assert torch.equal(table, rows[torch.arange(POSITIONS) % PERIOD])
    assert torch.equal(model.embeddings.position_embeddings.weight, rows)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_the_first_rows_learned_stays_and_the_rest_is_as_it_was(family: str) -> None:
    model = tiny_model(family)
    [(table, offset)] = position_tables(model, family)
    rows = table.weight.detach().clone()
    lsg_patch.patch_model(model, **SETTINGS)
    with torch.no_grad():
        table.weight.mul_(2)
    lsg_patch.unpatch_model(copy.deepcopy(model))
    lsg_patch.unpatch_model(model)
    end = offset + PERIOD
    assert torch.equal(table.weight[:end], 2 * rows[:end])
    assert torch.equal(table.weight[end:], rows[end:])


def test_global_tokens_begin_at_positions_that_are_kept() -> None:
    model = tiny_model("bert")
    rows = model.embeddings.position_embeddings.weight.detach()
    settings = {**SETTINGS, "num_global_tokens": 5, "global_positional_stride": 16}
    lsg_patch.patch_model(model, **settings)
    words = model.embeddings.word_embeddings.weight[[3, 4, 4, 4, 4]]
    types = model.embeddings.token_type_embeddings.weight[0]
    expected = words + types + rows[[0, 16, 32, 1, 17]]  # of 64 positions the fourth would be 48
    torch.testing.assert_close(lsg_patch.global_embeddings(model), expected)


def outputs(model: Any) -> Tensor:
    mask = right_padded(150, 90)
    return run(model, ids_like(mask, "bert"), mask)["last_hidden_state"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS, num_global_tokens=3)
    model.save_pretrained(tmp_path)
    loaded = lsg_patch.from_pretrained(tmp_path)
    assert lsg_patch.get_config(loaded) == lsg_patch.get_config(model)
    assert torch.equal(outputs(loaded), outputs(model))
    lsg_patch.unpatch_model(loaded)
    assert loaded.config.max_position_embeddings == LENGTH
    # what was saved before there was the setting
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text("utf-8"))
    del stated["lsg_patch"]["position_period"]
    path.write_text(json.dumps(stated), encoding="utf-8")
    loaded = lsg_patch.from_pretrained(tmp_path)
    assert lsg_patch.get_config(loaded).position_period is None
    assert torch.equal(outputs(loaded), outputs(model))
    # longer: the rows that were saved, which may be trained, go on from the first
    longer = lsg_patch.from_pretrained(tmp_path, max_position_embeddings=300)
    table = longer.embeddings.position_embeddings.weight
    assert torch.equal(table, model.embeddings.position_embeddings.weight[torch.arange(300) % 200])
    with pytest.raises(ValueError, match="position_period=16, but .* tiled already: leave it out"):
        lsg_patch.from_pretrained(tmp_path, position_period=16)


def test_convert(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tiny_model("bert").save_pretrained(source)
    real_tokenizer(source)
    argv = ["convert", str(source), str(tmp_path / "out"), "--max-length", "200"]
    argv += ["--block-size", "8", "--sparse-block-size", "8", "--test", "--position-period"]
    assert cli.main([*argv, "16"]) == 0
    rows = tiny_model("bert").embeddings.position_embeddings.weight
    table = lsg_patch.from_pretrained(tmp_path / "out").embeddings.position_embeddings.weight
    assert torch.equal(table, rows[torch.arange(200) % 16])
    # of a patched source: tiled anew of what it has; its tokenizer does not know the trained length
    argv[1:3] = [str(tmp_path / "out"), str(tmp_path / "again")]
    assert cli.main([*argv, "trained"]) == 2
    assert cli.main([*argv, "40"]) == 0
    again = lsg_patch.from_pretrained(tmp_path / "again")
    assert lsg_patch.get_config(again).position_period == 40
    expected = table[torch.arange(200) % 40]
    assert torch.equal(again.embeddings.position_embeddings.weight, expected)
    argv[1:3] = [str(source), str(tmp_path / "trained")]
    assert cli.main([*argv, "trained"]) == 0
    config = lsg_patch.get_config(lsg_patch.from_pretrained(tmp_path / "trained"))
    assert config.position_period == POSITIONS


@pytest.mark.parametrize(("limit", "expected"), [(40, 40), (POSITIONS, POSITIONS), (4096, None)])
def test_the_length_that_the_model_was_used_at(
    limit: int, expected: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny_model("bert"), tokenizer_like()
    tokenizer.model_max_length = limit
    settings = {**SETTINGS, "position_period": "trained", "tokenizer": tokenizer}
    if expected is None:  # such a length was never read
        with pytest.raises(ValueError, match="no tokenizer says at which length .* or the number"):
            lsg_patch.patch_model(model, **settings)
        return
    with caplog.at_level(logging.INFO, "lsg_patch"), lsg_patch.patched(model, **settings):
        assert lsg_patch.get_config(model).position_period == expected
    said = f"position_period is {expected}, the model_max_length of SimpleNamespace"
    assert said in caplog.messages


def test_wrong_settings() -> None:
    for wrong in (0, 1.5, "all", True):
        with pytest.raises(ValueError, match="position_period .* whole number from 1"):
            LSGConfig(position_period=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position_period=128 with positions='interpolate'"):
        LSGConfig(position_period=128, positions="interpolate")
    config = LSGConfig(position_period=128)
    assert LSGConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("family", ["pegasus", "esm", "roformer"])
def test_computed_positions_are_refused(family: str) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="computed and not learned: pass position_period=None"):
        lsg_patch.patch_model(model, **SETTINGS)
    assert FAMILIES[family] and not lsg_patch.is_patched(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sinusoids_of_distilbert_are_computed() -> None:
    with pytest.raises(ValueError, match="computed and not learned"):
        lsg_patch.patch_model(tiny_model("distilbert", sinusoidal_pos_embds=True), **SETTINGS)


def test_a_period_longer_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="position_period=65, .* 64 positions: pass at most 64"):
        lsg_patch.patch_model(tiny_model("roberta"), **{**SETTINGS, "position_period": 65})
