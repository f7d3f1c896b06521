"""Patching and its exact reversal, and what users do in between."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lsg_patch
from lsg_patch import LSGConfig
from lsg_patch.modules.self_attention import LSGSelfAttention
from tests.models import (
    CLS,
    FAMILIES,
    POSITIONS,
    assert_same,
    ids_like,
    model_classes,
    right_padded,
    run,
    tiny_config,
    tiny_model,
)
from tests.tokenizers import tokenizer_like

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 200}
MASK_LONG = right_padded(90, 55)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a patch could leave behind: identities, classes, attributes, hooks, values."""
    found: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        found[f"{name} class"] = type(module)
        found[f"{name} id"] = id(module)
        found[f"{name} attributes"] = sorted(vars(module))
        for slot in ("_parameters", "_buffers", "_modules"):
            found[f"{name}{slot}"] = list(getattr(module, slot))
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, dict):
                found[f"{name} {key}"] = list(value)
        found[f"{name} buffers"] = sorted(module._non_persistent_buffers_set)
    for name, parameter in model.named_parameters():
        found[f"{name} parameter"] = (id(parameter), parameter.requires_grad, parameter.dtype)
    found["config"] = getattr(model, "config", None) and model.config.to_dict()
    return found


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def long_run(model: nn.Module, family: str) -> torch.Tensor:
    return run(model, ids_like(MASK_LONG, family), MASK_LONG)["last_hidden_state"]


@pytest.mark.parametrize("family", FAMILIES)
def test_revert_is_exact_for_every_class(family: str) -> None:
    short = right_padded(20, 11)
    ids = ids_like(short, family)
    for cls in model_classes(family):
        model = tiny_model(family, cls)
        outputs = run(model, ids, short)
        before, stored = fingerprint(model), values(model)
        lsg_patch.patch_model(model, **SETTINGS)
        run(model, ids, short)
        assert lsg_patch.unpatch_model(model) is model
        assert fingerprint(model) == before
        assert_bitwise(values(model), stored)
        assert_bitwise(run(model, ids, short), outputs)


def test_fingerprint_sees_a_patch() -> None:
    model = tiny_model("bert")
    before = fingerprint(model)
    lsg_patch.patch_model(model, **SETTINGS)
    changed = {key for key, value in fingerprint(model).items() if before.get(key) != value}
    assert {"config", "state_dict", "embeddings_modules", "encoder _forward_hooks"} <= changed


def test_patched_model_stays_what_it_was() -> None:
    model = tiny_model("bert", transformers.BertForMaskedLM)
    attention = model.bert.encoder.layer[0].attention.self
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert lsg_patch.patch_model(model, **SETTINGS) is model
    assert isinstance(model, transformers.BertForMaskedLM)
    assert type(model).__name__ == "BertForMaskedLM"
    assert model.bert.encoder.layer[0].attention.self is attention
    assert isinstance(attention, LSGSelfAttention)
    after = {name: id(p) for name, p in model.named_parameters()}
    positions = "bert.embeddings.position_embeddings.weight"
    added = "bert.embeddings.global_embeddings.weight"
    assert after.keys() - parameters.keys() == {added}
    assert {name for name in parameters if after[name] != parameters[name]} == {positions}
    assert model.config.max_position_embeddings == 200
    assert lsg_patch.is_patched(model)
    assert lsg_patch.get_config(model) == LSGConfig(**SETTINGS, mask_first_token=True)
    assert lsg_patch.global_embeddings(model) is model.bert.embeddings.global_embeddings.weight


def test_a_patched_model_states_the_parameters_of_its_forward() -> None:
    """Trainer leaves out the columns of a dataset that are none."""
    model = tiny_model("bert")
    expected = inspect.signature(model.forward)
    lsg_patch.patch_model(model, **SETTINGS)
    assert inspect.signature(model.forward) == expected


def test_what_is_made_of_the_class_of_a_patched_model_is_not_patched(tmp_path: Path) -> None:
    model = tiny_model("bert")
    lsg_patch.patch_model(model, **SETTINGS)
    cls, attention = type(model), model.encoder.layer[0].attention.self
    with lsg_patch.patched(tiny_model("bert"), **SETTINGS) as other:
        assert type(other) is cls
    fresh = cls(tiny_model("bert").config)
    assert type(fresh) is transformers.BertModel
    lsg_patch.unpatch_model(model).save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is transformers.BertModel
    assert_bitwise(values(loaded), values(model))
    lsg_patch.patch_model(model, **SETTINGS)
    config = {
        "config": model.config,
        **({"layer_idx": 0} if hasattr(attention, "layer_idx") else {}),
    }
    assert not isinstance(type(attention)(**config), LSGSelfAttention)


class PatchesItself(transformers.BertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        lsg_patch.patch_model(self, **SETTINGS)


class PatchesItselfAround(PatchesItself):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [PatchesItself, PatchesItselfAround])
def test_a_class_that_patches_itself(cls: type[Any]) -> None:
    first = cls(tiny_config("bert")).eval()
    second = type(first)(tiny_config("bert")).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(long_run(first, "bert"), long_run(second, "bert"))
    assert type(lsg_patch.unpatch_model(second)) is cls


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_revert_after_a_cast_gives_the_cast_model(kind: str) -> None:
    model = tiny_model("roberta")
    expected = values(getattr(copy.deepcopy(model), kind)())
    lsg_patch.patch_model(model, **SETTINGS)
    getattr(model, kind)()
    lsg_patch.unpatch_model(model)
    assert_bitwise(values(model), expected)


def test_copies_are_independent_and_revert_by_themselves() -> None:
    model = tiny_model("bert")
    stored = values(model)
    lsg_patch.patch_model(model, **SETTINGS)
    expected = long_run(model, "bert")
    for clone in (
        copy.deepcopy(model),
        _saved_and_loaded(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(long_run(clone, "bert"), expected)
        with torch.no_grad():
            lsg_patch.global_embeddings(clone).add_(1.0)
            clone.encoder.layer[0].attention.self.query.weight.add_(1.0)
        assert not torch.equal(long_run(clone, "bert"), expected)
        assert torch.equal(long_run(model, "bert"), expected)
        with torch.no_grad():
            clone.encoder.layer[0].attention.self.query.weight.copy_(
                stored["encoder.layer.0.attention.self.query.weight"]
            )
        lsg_patch.unpatch_model(clone)
        assert not lsg_patch.is_patched(clone) and lsg_patch.is_patched(model)
        assert type(clone.encoder.layer[0].attention.self) is type(
            tiny_model("bert").encoder.layer[0].attention.self
        )
        assert_bitwise(values(clone), stored)
    lsg_patch.unpatch_model(model)
    assert_bitwise(values(model), stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_every_family(family: str) -> None:
    model = tiny_model(family)
    stored = values(model)
    lsg_patch.patch_model(model, **SETTINGS)
    expected = long_run(model, family)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(long_run(clone, family), expected)
        assert_bitwise(values(lsg_patch.unpatch_model(clone)), stored)


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_context_reverts_on_leaving_also_by_an_exception() -> None:
    model = tiny_model("bert")
    before, stored = fingerprint(model), values(model)
    with lsg_patch.patched(model, sparsity_type="pooling", **SETTINGS) as same:
        assert same is model and lsg_patch.is_patched(model)
    assert fingerprint(model) == before
    with pytest.raises(KeyError, match="mine"), lsg_patch.patched(model, **SETTINGS):
        raise KeyError("mine")
    assert fingerprint(model) == before
    with lsg_patch.patched(model, **SETTINGS):
        lsg_patch.unpatch_model(model)  # leaving then finds nothing to do
    assert fingerprint(model) == before
    assert_bitwise(values(model), stored)


@pytest.mark.parametrize("step", ["resize_buffers", "swap_attention", "hook_edges", "set_limits"])
def test_a_patch_that_fails_half_way_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, tokenizer = tiny_model("bert"), tokenizer_like()
    before = fingerprint(model)
    real, calls = getattr(lsg_patch.patching, step), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(step)
        if step != "swap_attention" or len(calls) == 2:
            raise RuntimeError("half way")
        return real(*args, **kwargs)

    monkeypatch.setattr(lsg_patch.patching, step, failing)
    with pytest.raises(RuntimeError, match="half way"):
        lsg_patch.patch_model(model, tokenizer=tokenizer, **SETTINGS)
    assert fingerprint(model) == before
    assert tokenizer.model_max_length == POSITIONS


def test_training_while_patched_is_kept_by_the_revert() -> None:
    model = tiny_model("bert").train()
    optimizer_made_before = torch.optim.SGD(model.parameters(), lr=0.1)
    query = model.encoder.layer[0].attention.self.query.weight
    query_before = query.detach().clone()
    positions_before = model.embeddings.position_embeddings.weight
    first_rows = positions_before.detach().clone()
    lsg_patch.patch_model(model, **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = ids_like(MASK_LONG, "bert")
    model(ids, MASK_LONG).last_hidden_state.pow(2).mean().backward()
    assert lsg_patch.global_embeddings(model).grad is not None
    optimizer.step()
    optimizer_made_before.step()
    trained = model.embeddings.position_embeddings.weight.detach()[:POSITIONS].clone()
    lsg_patch.unpatch_model(model)
    assert model.encoder.layer[0].attention.self.query.weight is query
    assert not torch.equal(query, query_before)
    assert model.embeddings.position_embeddings.weight is positions_before
    assert torch.equal(positions_before, trained) and not torch.equal(positions_before, first_rows)


def test_every_parameter_gets_a_gradient() -> None:
    """Distributed training fails on parameters that a step does not use."""
    model = tiny_model("bert", num_hidden_layers=1)
    lsg_patch.patch_model(model, num_global_tokens=3, **SETTINGS)
    output = model(ids_like(MASK_LONG, "bert"), MASK_LONG)
    (output.last_hidden_state.sum() + output.pooler_output.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert lsg_patch.global_embeddings(model).grad.abs().sum(1).min() > 0  # type: ignore[union-attr]


def test_state_dicts_load_both_ways() -> None:
    model, other = tiny_model("bert"), tiny_model("bert", seed=5)
    lsg_patch.patch_model(model, num_global_tokens=2, **SETTINGS)
    lsg_patch.patch_model(other, num_global_tokens=2, **SETTINGS)
    other.load_state_dict(model.state_dict())
    assert torch.equal(long_run(other, "bert"), long_run(model, "bert"))
    # a published table has 512 rows; the caller's dictionary stays as it is
    state = model.state_dict()
    name = "embeddings.global_embeddings.weight"
    table = torch.randn(512, 32)
    state[name] = table
    model.load_state_dict(state)
    assert torch.equal(lsg_patch.global_embeddings(model), table[:2])
    assert state[name] is table
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, name: torch.randn(1, 32)})


def test_a_saved_patched_model_loads_unpatched_and_is_patched_again(tmp_path: Any) -> None:
    """The checkpoint is an ordinary one: the long position table, and one more tensor."""
    model = tiny_model("roberta")
    lsg_patch.patch_model(model, num_global_tokens=2, **SETTINGS)
    with torch.no_grad():
        lsg_patch.global_embeddings(model).add_(0.5)
    expected = long_run(model, "roberta")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = transformers.RobertaModel.from_pretrained(tmp_path).eval()
    assert not lsg_patch.is_patched(loaded)
    assert loaded.embeddings.position_embeddings.weight.shape == (202, 32)
    lsg_patch.patch_model(loaded, num_global_tokens=2, **SETTINGS)
    loaded.load_state_dict(state)
    assert torch.equal(long_run(loaded, "roberta"), expected)


def test_two_models_side_by_side() -> None:
    patched, plain = tiny_model("bert"), tiny_model("bert")
    short = right_padded(30, 9)
    ids = ids_like(short, "bert")
    expected = run(plain, ids, short)
    lsg_patch.patch_model(patched, **SETTINGS)
    assert_bitwise(run(plain, ids, short), expected)
    assert not lsg_patch.is_patched(plain)


def test_of_models_that_share_a_config_one_is_patched_at_a_time() -> None:
    """Else it would state a wrong length for the one as soon as the other is reverted."""
    config = tiny_config("bert")
    first, second = (transformers.BertForMaskedLM(config) for _ in range(2))
    lsg_patch.patch_model(first, **SETTINGS)
    before = fingerprint(second)
    for length in (200, 300):
        with pytest.raises(ValueError, match=r"^model.config.max_.* another patched model shares"):
            lsg_patch.patch_model(second, **{**SETTINGS, "max_position_embeddings": length})
    assert fingerprint(second) == before
    # as the message says
    lsg_patch.unpatch_model(first)
    second = copy.deepcopy(second)
    lsg_patch.patch_model(first, **SETTINGS)
    lsg_patch.patch_model(second, **SETTINGS)
    lsg_patch.unpatch_model(first)
    assert first.config.max_position_embeddings == POSITIONS
    assert second.config.max_position_embeddings == 200
    lsg_patch.unpatch_model(second)
    assert second.config.max_position_embeddings == POSITIONS


@pytest.mark.parametrize("replaced", ["model", "base", "both"])
def test_a_config_replaced_while_patched_states_the_length_after_the_revert(
    replaced: str, tmp_path: Any
) -> None:
    model = lsg_patch.patch_model(tiny_model("bert", transformers.BertForMaskedLM), **SETTINGS)
    first, stored = model.config, values(tiny_model("bert", transformers.BertForMaskedLM))
    for owner in {"model": [model], "base": [model.bert], "both": [model, model.bert]}[replaced]:
        owner.config = copy.deepcopy(first)
    lsg_patch.unpatch_model(model)
    for config in (first, model.config, model.bert.config, model.bert.encoder.config):
        assert config.max_position_embeddings == POSITIONS
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert_bitwise(values(loaded), stored)


def test_a_config_replaced_before_states_the_length_while_patched(tmp_path: Any) -> None:
    """What is saved is the outer one; the patch finds the table's length by the inner one."""
    model = tiny_model("bert", transformers.BertForMaskedLM)
    model.config = copy.deepcopy(model.config)
    lsg_patch.patch_model(model, **SETTINGS)
    assert model.config.max_position_embeddings == model.bert.config.max_position_embeddings == 200
    model.save_pretrained(tmp_path)
    transformers.BertForMaskedLM.from_pretrained(tmp_path)
    clone = copy.deepcopy(model)
    for each in (clone, model):
        lsg_patch.unpatch_model(each)
        assert each.config is not each.bert.config
        assert each.config.max_position_embeddings == POSITIONS
        assert each.bert.config.max_position_embeddings == POSITIONS


def test_a_config_that_said_something_else_says_so_again() -> None:
    """Where there is no table, nothing tells which of two configs is right."""
    model = tiny_model("esm", transformers.EsmForMaskedLM)
    model.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings = 999
    with lsg_patch.patched(model, **SETTINGS):
        assert model.config.max_position_embeddings == 200
    assert model.config.max_position_embeddings == 999


def test_a_config_of_another_kind_around_the_model_is_left_alone() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.RobertaConfig(max_position_embeddings=7)
            self.reader = nn.ModuleDict({"text": tiny_model("bert")})

    model = Reader()
    lsg_patch.unpatch_model(lsg_patch.patch_model(model, **SETTINGS))
    assert model.config.max_position_embeddings == 7
    model.reader.text.config.max_position_embeddings = 77
    with pytest.raises(
        ValueError, match=r"^model.reader.text.config.max_position_embeddings is 77"
    ):
        lsg_patch.patch_model(model, **SETTINGS)


def test_patched_in_inference_mode_a_model_trains_all_the_same() -> None:
    model = tiny_model("bert")
    with torch.inference_mode():
        lsg_patch.patch_model(model, **SETTINGS)
    model(ids_like(MASK_LONG, "bert"), MASK_LONG).last_hidden_state.sum().backward()
    with torch.inference_mode():
        lsg_patch.unpatch_model(model)
    assert not model.embeddings.position_embeddings.weight.is_inference()


def test_a_revert_that_fails_in_one_place_reverts_the_rest() -> None:
    class Locked(transformers.BertConfig):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError("locked")

    model = tiny_model("bert")
    before, kind = fingerprint(model), type(model.config)
    lsg_patch.patch_model(model, **SETTINGS)
    del model.embeddings.global_embeddings  # nothing to do there
    model.config.__class__ = Locked
    with pytest.raises(RuntimeError, match=r"but for something in model. \(locked\)"):
        lsg_patch.unpatch_model(model)
    assert lsg_patch.is_patched(model)
    run(model, ids_like(MASK_LONG[:, :POSITIONS], "bert"), None)  # it is what it was, but for that
    object.__setattr__(model.config, "__class__", kind)
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("sparsity_type", ["norm", "lsh"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layers_copied_while_patched_are_reverted(sparsity_type: str, again: Any) -> None:
    model, mask = tiny_model("bert"), right_padded(20, 11)
    ids, layers = ids_like(mask, "bert"), model.encoder.layer
    model.config.num_hidden_layers = 4  # what 4.x counts by
    model.encoder.layer = nn.ModuleList([*layers, *copy.deepcopy(layers)])
    expected, before = run(model, ids, mask), fingerprint(model.encoder.layer[:2])
    model.encoder.layer = layers
    lsg_patch.patch_model(model, sparsity_type=sparsity_type, **SETTINGS)
    kept = again(layers[1])
    layers.append(again(layers[0]))
    long_run(model, "bert")
    lsg_patch.unpatch_model(model)
    # one that was copied while patched, and comes back later
    layers.append(kept)
    assert not lsg_patch.is_patched(model) and isinstance(kept.attention.self, LSGSelfAttention)
    assert lsg_patch.unpatch_model(model) is model
    assert _without_ids(fingerprint(layers[2:])) == _without_ids(before)
    assert_bitwise(run(model, ids, mask), expected)
    with pytest.raises(ValueError, match="is not patched"):
        lsg_patch.unpatch_model(model)


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "esm"])
def test_a_feed_forward_in_chunks_is_whole_while_patched(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks for multiples of the chunk, which lengths with global tokens are not."""
    model, mask = tiny_model(family, chunk_size_feed_forward=4), right_padded(12, 8)
    chunked = [x for x in model.modules() if getattr(x, "chunk_size_feed_forward", 0)]
    assert chunked
    ids = ids_like(mask, family)
    before = run(model, ids, mask)
    with lsg_patch.patched(model, **SETTINGS):
        assert "chunk_size_feed_forward=4 is 0 while the model is patched" in caplog.text
        assert_same(run(model, ids, mask), before, mask, 1e-5)
        long_run(model, family)
    assert [x.chunk_size_feed_forward for x in chunked] == [4] * len(chunked)
    assert_bitwise(run(model, ids, mask), before)


def test_layers_keep_the_name_that_others_find_them_by() -> None:
    """So that what wraps layers by name, as FSDP does, still finds them."""
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    layer = model.encoder.layer[0]
    assert type(layer).__name__ == "BertLayer" != type(layer.attention.self).__name__
    assert isinstance(layer, type(tiny_model("bert").encoder.layer[0]))


def _without_ids(found: dict[str, Any]) -> dict[str, Any]:
    """Of a fingerprint what a copy has in common with the original."""
    return {
        name: value[1:] if name.endswith("parameter") else value
        for name, value in found.items()
        if not name.endswith(" id")
    }


def test_threads_share_a_patched_model() -> None:
    model = tiny_model("bert")
    lsg_patch.patch_model(model, **SETTINGS)
    masks = [right_padded(90 - 7 * i, 20 + i) for i in range(8)]
    inputs = [(ids_like(mask, "bert", seed=i), mask) for i, mask in enumerate(masks)]
    expected = [run(model, *pair)["last_hidden_state"] for pair in inputs]
    results: list[torch.Tensor | None] = [None] * len(inputs)

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = run(model, *inputs[index])["last_hidden_state"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_replica_uses_its_own_parameters() -> None:
    """What DataParallel does with a module: shallow copies that share hooks, with other tensors."""
    model = tiny_model("bert")
    lsg_patch.patch_model(model, sparsity_type="lsh", **SETTINGS)
    expected = long_run(model, "bert")
    replica = _replicate(model)
    assert torch.equal(long_run(replica, "bert"), expected)
    replica.embeddings.global_embeddings.weight = lsg_patch.global_embeddings(model).detach() + 1
    assert not torch.equal(long_run(replica, "bert"), expected)
    assert torch.equal(long_run(model, "bert"), expected)


def _replicate(model: nn.Module) -> Any:
    modules = list(model.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, replicas[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter.detach())
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(replica, name, buffer)
    return replicas[id(model)]


def test_a_module_that_holds_a_supported_model() -> None:
    class Retriever(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny_model("electra")
            self.projection = nn.Linear(32, 8)

    retriever = Retriever()
    lsg_patch.patch_model(retriever, **SETTINGS)
    assert lsg_patch.is_patched(retriever) and lsg_patch.is_patched(retriever.encoder)
    lsg_patch.unpatch_model(retriever)
    assert not lsg_patch.is_patched(retriever)


def test_a_subclass_of_a_supported_model() -> None:
    class MyBert(transformers.BertModel):  # type: ignore[misc]
        pass

    model = lsg_patch.patch_model(tiny_model("bert", MyBert), **SETTINGS)
    assert long_run(model, "bert").shape == (2, 90, 32)


def test_tokenizer_limit_is_raised_and_put_back() -> None:
    model, tokenizer = tiny_model("bert"), tokenizer_like()
    with lsg_patch.patched(model, tokenizer=tokenizer, **SETTINGS):
        assert tokenizer.model_max_length == 200
        clone = copy.deepcopy(model)
        lsg_patch.unpatch_model(clone)  # a copy has no part in the tokenizer
        assert tokenizer.model_max_length == 200
    assert tokenizer.model_max_length == POSITIONS


class TestRefusals:
    """Each is raised before anything is changed, and says what to do."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sparsity_type": "best"}, "sparsity_type must be one of norm"),
            ({"block_size": 0}, "block_size must be a whole number from 1"),
            (
                {"block_size": 10, "sparsity_factor": 4},
                "block_size=10 must be a multiple of sparsity_factor=4: pass block_size=12, or",
            ),
            ({"block_size": 33}, "pass block_size=34, or a factor that divides it, such as 1"),
            ({"sparse_block_size": 9}, "sparse_block_size=9 must be a multiple"),
            ({"sparse_block_size": -2}, "sparse_block_size must be a whole number from 0"),
            ({"sparsity_factor": -2}, "sparsity_factor must be"),
            ({"sparsity_type": "none", "sparse_block_size": -4}, "sparse_block_size must be"),
            ({"num_global_tokens": 513}, "num_global_tokens must be a whole number from 0 to 512"),
            ({"num_global_tokens": -1}, "num_global_tokens"),
            ({"max_position_embeddings": 0}, "max_position_embeddings"),
            ({"pool_with_global": False}, "mask_first_token=False or pool_with_global=True"),
            ({"mask_first_token": True, "num_global_tokens": 0}, "no global token replaces"),
            ({"mask_first_token": 1}, "mask_first_token must be True or False"),
            ({"adaptive": "yes"}, "adaptive must be True or False"),
            ({"attention_probs_dropout_prob": 1.5}, r"must be in \[0, 1\)"),
            ({"global_positional_stride": 0}, "global_positional_stride"),
            ({"lsh_num_pre_rounds": -1}, "lsh_num_pre_rounds"),
            ({"backend": "cuda"}, "backend must be one of auto"),
            ({"seed": -1}, "seed"),
        ],
        ids=str,
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        model = tiny_model("bert")
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            lsg_patch.patch_model(model, **settings)
        assert fingerprint(model) == before

    def test_a_config_and_settings_together(self) -> None:
        with pytest.raises(TypeError, match="sparsity_type, num_global_tokens"):
            lsg_patch.patch_model(tiny_model("bert"), LSGConfig(), "pooling", num_global_tokens=2)
        # a default that was asked for contradicts another setting as well
        config = LSGConfig(**SETTINGS, sparsity_type="lsh")
        with (
            pytest.raises(TypeError, match="and sparsity_type as well"),
            lsg_patch.patched(tiny_model("bert"), config, sparsity_type="norm"),
        ):
            pass
        model = lsg_patch.patch_model(tiny_model("bert"), config, tokenizer=tokenizer_like())
        assert lsg_patch.get_config(model).sparsity_type == "lsh"

    def test_the_signature_shows_the_defaults(self) -> None:
        parameters = inspect.signature(lsg_patch.patch_model).parameters
        defaults = dataclasses.asdict(LSGConfig())
        assert {name: parameters[name].default for name in defaults} == defaults
        assert parameters.keys() - defaults == {"model", "tokenizer"}
        with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
            lsg_patch.patch_model(tiny_model("bert"), blocks=8)  # type: ignore[call-arg]

    def test_a_backend_that_is_no_name(self) -> None:
        with pytest.raises(ValueError, match=r"backend must be one of .*, not \['sdpa'\]"):
            LSGConfig(backend=["sdpa"])  # type: ignore[arg-type]

    def test_unknown_models(self) -> None:
        with pytest.raises(TypeError, match=r"GPT2Model holds no model of a family .*bert"):
            lsg_patch.patch_model(
                transformers.GPT2Model(
                    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
                )
            )
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            lsg_patch.patch_model("bert-base-uncased")  # type: ignore[type-var]

    def test_a_model_named_like_a_known_one_but_built_otherwise(self) -> None:
        class BertModel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.config = tiny_config("bert")

        with pytest.raises(TypeError, match="is not built like a bert model"):
            lsg_patch.patch_model(BertModel())

    def test_several_models(self) -> None:
        pair = nn.ModuleDict({"query": tiny_model("bert"), "document": tiny_model("roberta")})
        with pytest.raises(ValueError, match=r"2 models .*model.query, model.document"):
            lsg_patch.patch_model(pair)
        lsg_patch.patch_model(pair["query"], **SETTINGS)

    def test_relative_positions(self) -> None:
        model = tiny_model("bert")
        model.config.position_embedding_type = "relative_key"
        with pytest.raises(ValueError, match="relative_key"):
            lsg_patch.patch_model(model)

    def test_a_patched_model(self) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        before = fingerprint(model)
        with pytest.raises(ValueError, match="patched already: unpatch_model"):
            lsg_patch.patch_model(model)
        assert fingerprint(model) == before

    def test_what_is_not_patched(self) -> None:
        model = tiny_model("bert")
        for function in (
            lsg_patch.unpatch_model,
            lsg_patch.get_config,
            lsg_patch.global_embeddings,
        ):
            with pytest.raises(ValueError, match="is not patched"):
                function(model)

    def test_no_global_tokens_to_give(self) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), num_global_tokens=0, **SETTINGS)
        with pytest.raises(ValueError, match="num_global_tokens=0"):
            lsg_patch.global_embeddings(model)

    def test_a_forward_that_would_hide_the_patch(self) -> None:
        model = tiny_model("bert")
        attention = model.encoder.layer[0].attention.self
        attention.forward = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match="would hide the patch"):
            lsg_patch.patch_model(model)

    def test_a_layer_alone(self) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        with pytest.raises(RuntimeError, match="inside its model only"):
            model.encoder.layer[0](torch.randn(1, 5, 32))

    def test_a_config_that_contradicts_the_table(self) -> None:
        model = tiny_model("bert")
        model.config.max_position_embeddings = 77
        with pytest.raises(ValueError, match="is 77, but the model has a table of 64"):
            lsg_patch.patch_model(model)


class TestTokenIds:
    """From the tokenizer given, else the config, else the checkpoint's tokenizer; never guessed."""

    def model(self) -> Any:
        model = tiny_model("bert")
        del model.config.cls_token_id, model.config.mask_token_id
        return model

    def test_nowhere_to_be_found(self) -> None:
        model = self.model()
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"no cls or bos token id .* Pass tokenizer="):
            lsg_patch.patch_model(model)
        model.config.cls_token_id = CLS
        with pytest.raises(ValueError, match=r"no mask token id .* Pass tokenizer="):
            lsg_patch.patch_model(model, num_global_tokens=2)
        del model.config.cls_token_id
        assert fingerprint(model) == before

    def test_only_what_is_needed_is_asked_for(self) -> None:
        lsg_patch.patch_model(self.model(), num_global_tokens=0)
        model = self.model()
        model.config.bos_token_id = CLS
        lsg_patch.patch_model(model, num_global_tokens=1)
        assert torch.equal(lsg_patch.global_embeddings(model)[0], _first_row(model, CLS))

    def test_the_tokenizer_given_comes_before_the_config(self) -> None:
        model = tiny_model("bert")
        lsg_patch.patch_model(model, tokenizer=tokenizer_like(cls_token_id=9, mask_token_id=10))
        assert torch.equal(lsg_patch.global_embeddings(model)[0], _first_row(model, 9))

    def test_a_tokenizer_of_another_model(self) -> None:
        with pytest.raises(ValueError, match="outside the model's vocabulary of 120"):
            lsg_patch.patch_model(
                tiny_model("bert"), tokenizer=tokenizer_like(cls_token_id=101 + 7000)
            )

    def test_the_checkpoints_own_tokenizer(self, tmp_path: Any) -> None:
        words = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *"abcdef"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
        model = self.model()
        model.config._name_or_path = str(tmp_path)
        lsg_patch.patch_model(model, num_global_tokens=2)
        assert torch.equal(lsg_patch.global_embeddings(model)[0], _first_row(model, CLS))

    def test_a_checkpoint_without_tokenizer(self, tmp_path: Any) -> None:
        model = self.model()
        model.config._name_or_path = str(tmp_path)
        with pytest.raises(ValueError, match=r"has no files of one.* Pass tokenizer="):
            lsg_patch.patch_model(model)


def _first_row(model: Any, token: int) -> torch.Tensor:
    embeddings = model.embeddings
    return (  # type: ignore[no-any-return]
        embeddings.word_embeddings.weight[token]
        + embeddings.position_embeddings.weight[0]
        + embeddings.token_type_embeddings.weight[0]
    )


@pytest.mark.parametrize("num_global_tokens", [0, 2])
def test_a_model_on_no_device(num_global_tokens: int) -> None:
    """As it is made before its weights are loaded."""
    with torch.device("meta"):
        model = tiny_model("bert")
        lsg_patch.patch_model(model, num_global_tokens=num_global_tokens, **SETTINGS)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    lsg_patch.unpatch_model(model)
    assert model.embeddings.position_embeddings.num_embeddings == POSITIONS
