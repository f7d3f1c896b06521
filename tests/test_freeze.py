"""``freeze_except``: parts of a patched model that train while the rest does not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsg_patch
from tests import models, seq2seq
from tests.models import POSITIONS, ids_like, right_padded, run, tiny_model
from tests.modules.test_position_period import LEARNED
from tests.modules.test_position_table import position_tables

LENGTH = 200
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": LENGTH,
}
LONG = right_padded(150, 90)
OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.1),
}


def tiny(family: str) -> Any:
    return (models if family in models.FAMILIES else seq2seq).tiny_model(family)


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, family: str, make: Any = OPTIMIZERS["AdamW"], steps: int = 3) -> Any:
    """All parameters are the optimizer's, as many a trainer has it."""
    optimizer = make(model.parameters())
    short = right_padded(20, 20)
    for mask in (LONG, short, *[LONG] * (steps - 2)):
        ids = ids_like(mask, family) if family in models.FAMILIES else seq2seq.ids_like(mask)
        more = {"decoder_input_ids": ids} if family in seq2seq.FAMILIES else {}
        model(
            input_ids=ids, attention_mask=mask, **more
        ).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def outputs(model: Any, family: str = "bert", mask: Tensor = LONG) -> Tensor:
    return run(model, ids_like(mask, family), mask)["last_hidden_state"]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_old_rows_stay_bit_for_bit_and_new_ones_learn(family: str, make: Any) -> None:
    model = lsg_patch.patch_model(tiny_model(family), **SETTINGS)
    [(table, offset)] = position_tables(model, family)
    rows, end = table.weight.detach().clone(), offset + POSITIONS
    state, expected = model.state_dict(), outputs(model, family)
    assert lsg_patch.freeze_except(model, "new_positions") is model
    assert trained(model) == {"embeddings.position_embeddings.new_rows"}
    assert torch.equal(outputs(model, family), expected)
    train(model, family, make)
    assert torch.equal(table.weight[:end], rows[:end])
    # rows that no text has reached stay too, but for weight decay
    assert (table.weight[end : offset + 150] != rows[end : offset + 150]).any(1).all()
    # state dicts are those of a model that is not split
    after = model.state_dict()
    assert list(after) == list(state)
    assert torch.equal(after["embeddings.position_embeddings.weight"], table.weight)


@pytest.mark.parametrize("family", LEARNED)
def test_every_learned_table_and_back(family: str) -> None:
    """With weights, after training: everything but the global tokens and the new rows is as it was."""
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    lsg_patch.patch_model(model, **SETTINGS, position_period=48)
    lsg_patch.freeze_except(model, "new_positions", "global")
    tables = position_tables(model, family)
    learned = [table.weight.detach().clone() for table, _ in tables]
    train(model, family)
    for (table, offset), rows in zip(tables, learned, strict=True):
        assert torch.equal(table.weight[: offset + 48], rows[: offset + 48])
        assert not torch.equal(
            table.weight[offset + 48 : offset + 90], rows[offset + 48 : offset + 90]
        )
    lsg_patch.unpatch_model(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(
        type(table).__name__ != "NewRows" and not hasattr(table, "new_rows") for table, _ in tables
    )
    model.requires_grad_(True)
    assert {name for name, _ in model.named_parameters()} == set(grads)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()]
)
def test_copies_and_casts_go_on_learning(again: Any) -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    model = again(train(lsg_patch.freeze_except(model, "new_positions"), "bert"))
    table = model.embeddings.position_embeddings
    rows = table.weight.detach().clone()
    train(model, "bert")
    assert torch.equal(table.weight[:POSITIONS], rows[:POSITIONS])
    assert not torch.equal(table.weight[POSITIONS:], rows[POSITIONS:])
    lsg_patch.unpatch_model(model)
    assert torch.equal(model.embeddings.position_embeddings.weight, rows[:POSITIONS])


def test_saved_loaded_and_frozen_again(tmp_path: Path) -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    train(lsg_patch.freeze_except(model, "new_positions"), "bert")
    model.save_pretrained(tmp_path)
    loaded = lsg_patch.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    # the loaded one knows which rows are old ones, and takes state dicts while it is split
    lsg_patch.freeze_except(loaded, "new_positions")
    assert loaded.embeddings.position_embeddings.new_rows.shape[0] == LENGTH - POSITIONS
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(loaded, "bert")
    assert not torch.equal(outputs(loaded), outputs(model))
    loaded.load_state_dict(state)
    assert torch.equal(outputs(loaded), outputs(model))
    lsg_patch.unpatch_model(loaded)
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(loaded.state_dict()[name], state[name])
    assert not any("new_rows" in name for name, _ in loaded.named_parameters())


def test_stretched_rows_are_all_new_in_a_loaded_model_too(tmp_path: Path) -> None:
    stretched = {**SETTINGS, "positions": "interpolate"}
    lsg_patch.patch_model(tiny_model("bert"), **stretched).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="all are: pass 'positions'"):
        lsg_patch.freeze_except(lsg_patch.from_pretrained(tmp_path), "new_positions")


def test_everything_trains_again_after_requires_grad() -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    lsg_patch.freeze_except(model, "new_positions").requires_grad_(True)
    table = model.embeddings.position_embeddings
    rows = table.weight.detach().clone()
    train(model, "bert")
    assert (table.weight[:150] != rows[:150]).any(1).all()
    lsg_patch.unpatch_model(model)
    assert not torch.equal(table.weight, rows[:POSITIONS])


def test_a_state_dict_of_an_unpatched_model_is_still_refused() -> None:
    state = tiny_model("bert", max_position_embeddings=LENGTH).state_dict()
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    lsg_patch.freeze_except(model, "new_positions")
    with pytest.raises(
        RuntimeError, match="nothing was loaded: the state dict has no embeddings.global"
    ):
        model.load_state_dict(state)


def test_another_call_takes_the_split_back_with_what_was_learned() -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    table = model.embeddings.position_embeddings
    cls = type(table)
    train(lsg_patch.freeze_except(model, "new_positions"), "bert")
    rows = table.weight.detach().clone()
    lsg_patch.freeze_except(model, "positions")
    assert type(table) is cls and torch.equal(table.weight, rows)
    assert trained(model) == {"embeddings.position_embeddings.weight"}
    train(model, "bert")
    assert not torch.equal(table.weight[:20], rows[:20])
    for _ in range(2):
        lsg_patch.freeze_except(model, "new_positions")
    lsg_patch.unpatch_model(model)
    assert type(table) is cls


def test_the_head_and_the_global_tokens() -> None:
    head = next(c for c in models.model_classes("bert") if c.__name__ == "BertForMaskedLM")
    model = lsg_patch.patch_model(tiny_model("bert", head), **SETTINGS)
    lsg_patch.freeze_except(model, "head", "positions", "global")
    found = trained(model)
    assert {x for x in found if x.startswith("bert.")} == {
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.global_embeddings.weight",
    }
    assert "cls.predictions.transform.dense.weight" in found
    assert not model.get_input_embeddings().weight.requires_grad


def test_compiled() -> None:
    torch._dynamo.reset()
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    lsg_patch.freeze_except(model, "new_positions")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = ids_like(LONG, "bert")
    models.assert_same(run(compiled, ids, LONG), run(model, ids, LONG), LONG, 1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "parts", "message"),
    [
        ("bert", {}, (), "freeze_except: pass some of global, positions, new_positions, head"),
        ("bert", {}, ("layers",), r"not \('layers',\)"),
        ("bert", {}, ("positions", "new_positions"), "of the two positions only one"),
        ("bert", {"num_global_tokens": 0}, ("global",), "num_global_tokens=0"),
        ("esm", {}, ("new_positions",), "are computed, or offloaded"),
        ("pegasus", {}, ("positions",), "are computed, or offloaded"),
        ("bert", {"positions": "interpolate"}, ("new_positions",), "all are: pass"),
        ("bert", {"max_position_embeddings": POSITIONS}, ("new_positions",), "or none is"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    family: str, settings: dict[str, Any], parts: tuple[str, ...], message: str
) -> None:
    model = lsg_patch.patch_model(tiny(family), **{**SETTINGS, **settings})
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        lsg_patch.freeze_except(model, *parts)
    assert trained(model) == before
    with pytest.raises(ValueError, match="is not patched"):
        lsg_patch.freeze_except(nn.Linear(1, 1), "head")


@pytest.mark.parametrize("part", ["positions", "new_positions"])
def test_two_patched_models_in_one(part: str) -> None:
    """Both train the parts that are named."""
    model = torch.nn.ModuleDict({name: tiny_model("bert") for name in ("first", "second")})
    for each in model.values():
        lsg_patch.patch_model(each, **SETTINGS)
    lsg_patch.freeze_except(model, "global", part)
    table = "embeddings.position_embeddings." + ("weight" if part == "positions" else "new_rows")
    expected = {table, "embeddings.global_embeddings.weight"}
    assert trained(model) == {f"{name}.{x}" for name in model for x in expected}
    lsg_patch.unpatch_model(model)


def test_a_head_that_is_not_there() -> None:
    model = lsg_patch.patch_model(tiny("bert"), **SETTINGS)
    before = trained(model)
    with pytest.raises(ValueError, match="'head', but the BertModel has none"):
        lsg_patch.freeze_except(model, "head")
    assert trained(model) == before
    assert trained(lsg_patch.freeze_except_global(model)) == {"embeddings.global_embeddings.weight"}


def test_a_replica_of_new_rows_gives_what_the_model_gives() -> None:
    """As ``DataParallel`` makes one for each device, whose gradients reach the model."""
    table = lsg_patch.patch_model(tiny("bert"), max_position_embeddings=LENGTH)
    table = lsg_patch.freeze_except(table, "new_positions").embeddings.position_embeddings
    replica, ids = table._replicate_for_data_parallel(), torch.tensor([3, LENGTH - 1])
    for name, parameter in table._parameters.items():
        setattr(replica, name, parameter * 1)
    assert torch.equal(replica(ids), table(ids))
    replica(ids).sum().backward()
    assert table.new_rows.grad is not None and table.new_rows.grad.sum() == 32
