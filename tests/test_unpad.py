"""Ragged batches: the layers run on real tokens alone, and give what they give padded."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import lsg_patch
from lsg_patch.attention import SPARSITY_TYPES
from lsg_patch.modules import layout
from tests import seq2seq
from tests.models import (
    FAMILIES,
    assert_same,
    attentions,
    enable_checkpointing,
    ids_like,
    model_classes,
    right_padded,
    run,
    tiny_model,
)

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 128}
PACKED = [family for family in FAMILIES if family != "xmod"]
families = pytest.mark.parametrize("family", PACKED)

RIGHT = right_padded(93, 40, 37, 16, 11, 1)
LEFT = RIGHT.flip(1)
HOLES = RIGHT.clone()
HOLES[0, 5:9] = HOLES[1, 1] = HOLES[1, 20:29] = HOLES[3, 7] = 0
HOLES[2, 0] = 0
EMPTY = torch.cat([RIGHT[1:3], torch.zeros_like(RIGHT[:1]), RIGHT[:1]])
SHORT = right_padded(16, 3, 9)
ONE = right_padded(93, 21)[1:]
MASKS = {
    "right": RIGHT,
    "unordered": right_padded(93, 11, 40, 90, 16),
    "left": LEFT,
    "holes": HOLES,
    "empty row": EMPTY,
    "short": SHORT,
    "one row": ONE,
}


def pair(family: str, cls: type[Any] | None = None, **settings: Any) -> tuple[Any, Any]:
    """The same model, padded and unpadded."""
    padded, packed = (
        lsg_patch.patch_model(tiny_model(family, cls), **SETTINGS, **settings, unpad=unpad)
        for unpad in (False, True)
    )
    return padded, packed


def rows_in_stack(model: Any, family: str, mask: torch.Tensor) -> tuple[int, ...]:
    """(B, N) of what the layers run on."""
    seen: list[tuple[int, ...]] = []
    names = lsg_patch.families.FAMILIES[family].names
    query = getattr(attentions(model, family)[0], names.query)
    handle = query.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[:2])))
    run(model, ids_like(mask, family), mask)
    handle.remove()
    return seen[0]


@families
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_real_tokens_have_the_outputs_that_they_have_padded(
    family: str, mask: torch.Tensor
) -> None:
    padded, packed = pair(family)
    ids = ids_like(mask, family)
    with torch.no_grad():
        want, got = (
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            for model in (padded, packed)
        )
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    real = mask.bool()
    for x, y in zip((got[0], *got.hidden_states), (want[0], *want.hidden_states), strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x[real], y[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
def test_every_selection(sparsity_type: str, mask: torch.Tensor) -> None:
    ids = ids_like(mask, "bert")
    padded, packed = (run(model, ids, mask) for model in pair("bert", sparsity_type=sparsity_type))
    assert_same(packed, padded, mask, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_global_tokens": 0},
        {"num_global_tokens": 3},
        {"num_global_tokens": 3, "mask_first_token": False},
        {"num_global_tokens": 3, "mask_first_token": False, "pool_with_global": False},
        {"sparsity_type": "none"},
        {"backend": "dense"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["bert", "roformer", "mpnet"])
@pytest.mark.parametrize("mask", [LEFT, HOLES], ids=["left", "holes"])
def test_global_tokens_and_the_first_token(
    family: str, settings: dict[str, Any], mask: torch.Tensor
) -> None:
    ids = ids_like(mask, family)
    padded, packed = (
        {"states": run(model, ids, mask)["last_hidden_state"]} for model in pair(family, **settings)
    )
    assert_same(packed, padded, mask, 1e-5)


@families
def test_layers_run_on_real_tokens_alone(family: str) -> None:
    """Otherwise the tests above would pass with nothing packed."""
    _, packed = pair(family, mask_first_token=False)
    lengths = (93, 40, 40, 16, 16, 1)  # of as many blocks, as long as the longest of these
    assert rows_in_stack(packed, family, RIGHT) == (1, sum(lengths) + 6)


def test_what_saves_nothing_is_not_packed() -> None:
    padded, packed = pair("bert")
    for mask in (right_padded(40, 40), right_padded(40, 35)):
        assert rows_in_stack(packed, "bert", mask) == rows_in_stack(padded, "bert", mask) == (2, 41)


@families
def test_by_default_what_pays_is_packed(family: str) -> None:
    padded, packed = pair(family)
    model = lsg_patch.patch_model(tiny_model(family), **SETTINGS)
    assert lsg_patch.get_config(model).unpad is None
    for mask in (RIGHT, ONE):
        rows = rows_in_stack(model, family, mask)
        assert rows == rows_in_stack(packed, family, mask) != rows_in_stack(padded, family, mask)


def test_by_default_what_hardly_pays_or_is_short_is_not_packed() -> None:
    padded, packed = pair("bert")
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    hardly = right_padded(96, 96, 88)  # 1 block of 36
    for mask in (hardly, SHORT):
        rows = rows_in_stack(model, "bert", mask)
        assert rows == rows_in_stack(padded, "bert", mask) != rows_in_stack(packed, "bert", mask)


def test_by_default_what_cannot_be_unpadded_is_padded() -> None:
    for model in (tiny_model("xmod"), tiny_model("bert", is_decoder=True)):
        assert lsg_patch.get_config(lsg_patch.patch_model(model, **SETTINGS)).unpad is False
    assert lsg_patch.LSGConfig(adaptive=False).unpad is False


def test_padding_has_the_output_of_the_nearest_real_token() -> None:
    _, packed = pair("bert")
    mask = torch.zeros(2, 50, dtype=torch.long)
    mask[0, 9:30] = mask[1] = 1
    out = run(packed, ids_like(mask, "bert"), mask)["last_hidden_state"][0]
    assert torch.equal(out[:9], out[9:10].expand(9, -1))
    assert torch.equal(out[30:], out[29:30].expand(20, -1))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForPreTraining"),
        ("bert", "BertForMultipleChoice"),
        ("roberta", "RobertaForTokenClassification"),
        ("distilbert", "DistilBertForQuestionAnswering"),
    ],
)
def test_heads(family: str, name: str) -> None:
    cls = next(cls for cls in model_classes(family) if cls.__name__ == name)
    ids = ids_like(RIGHT, family)
    padded, packed = (run(model, ids, RIGHT) for model in pair(family, cls))
    assert_same(packed, padded, RIGHT, 1e-5)


def gradients(model: Any, family: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=ids_like(HOLES, family), attention_mask=HOLES).last_hidden_state
    (output * HOLES[..., None]).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(family: str, checkpointing: bool) -> None:
    # some gradients are zero but for rounding: of double precision there is none to speak of
    padded, packed = (model.train().double() for model in pair(family))
    if checkpointing:
        if not packed.supports_gradient_checkpointing:
            pytest.skip(f"{family} has no gradient checkpointing in this transformers")
        enable_checkpointing(packed, use_reentrant=False)
    want, got = gradients(padded, family), gradients(packed, family)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    padded, packed = (model.to(dtype) for model in pair("bert"))
    ids = ids_like(RIGHT, "bert")
    want, got = (run(model, ids, RIGHT)["last_hidden_state"] for model in (padded, packed))
    assert got.dtype == dtype
    error = (got - want)[RIGHT.bool()].abs().mean()
    assert error < 10 * torch.finfo(dtype).eps


def test_copies_and_the_way_back() -> None:
    plain = tiny_model("bert")
    mask = right_padded(60, 20)
    ids = ids_like(mask, "bert")
    before = run(plain, ids, mask)
    with lsg_patch.patched(plain, **SETTINGS, unpad=True):
        patched = run(plain, ids, mask)
        file = io.BytesIO()
        torch.save(plain, file)
        file.seek(0)
        for other in (copy.deepcopy(plain), torch.load(file, weights_only=False)):
            assert rows_in_stack(other, "bert", mask) == (1, 61 + 21)
            assert_same(run(other, ids, mask), patched, None, 0)
    assert_same(run(plain, ids, mask), before, None, 0)


def test_a_traced_model_is_padded() -> None:
    """The lengths of the batch that it was traced with would stand for all others."""
    padded, packed = pair("bert")
    ids, other = ids_like(RIGHT, "bert"), RIGHT.flip(0)
    packed.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(packed, (ids, RIGHT), check_trace=False)
        got = traced(ids_like(other, "bert"), other)[0]
    want = run(padded, ids_like(other, "bert"), other)["last_hidden_state"]
    torch.testing.assert_close(got[other.bool()], want[other.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["model", "stack"])
def test_a_compiled_model_is_padded(part: str) -> None:
    padded, packed = pair("bert")
    if part == "stack":
        packed.encoder.compile(backend="eager")
    else:
        packed.compile(backend="eager")
    ids = ids_like(RIGHT, "bert")
    with torch.no_grad():
        got = packed(ids, RIGHT, output_hidden_states=True)
        want = padded(ids, RIGHT, output_hidden_states=True)
    for x, y in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_a_batch_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base model, and not its stack, has recorded the hidden states."""
    calls: list[str] = []
    for name in ("pack", "place"):
        own = getattr(layout, name)
        monkeypatch.setattr(layout, name, lambda *x, own=own, n=name: calls.append(n) or own(*x))
    padded, packed = pair("bert")
    ids = ids_like(RIGHT, "bert")
    with torch.no_grad():
        want = padded(ids, RIGHT, output_hidden_states=True)
        assert calls == ["place"]
        calls.clear()
        got = packed(ids, RIGHT, output_hidden_states=True)
    blocks = {-(-int(length) // 8) for length in RIGHT.sum(1)}
    assert calls == ["pack", *["place"] * len(blocks)]
    for x, y in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_same({"states": x}, {"states": y}, RIGHT, 1e-5)


@pytest.mark.parametrize("called", ["another", "copy", "itself"])
def test_hidden_states_are_in_order_where_a_hook_calls_a_model(called: str) -> None:
    """Between the end of the stack and that of the model."""
    model = pair("bert")[1]
    inner = {"another": pair("bert")[1], "copy": copy.deepcopy(model), "itself": model}[called]
    ids, other = ids_like(RIGHT, "bert"), RIGHT[:2].flip(1)
    running: list[bool] = []

    def call(*_: Any) -> None:
        if not running:
            running.append(True)
            inner(ids_like(other, "bert"), other, output_hidden_states=True)

    with torch.no_grad():
        want = model(ids, RIGHT, output_hidden_states=True)
        hook = model.pooler.register_forward_pre_hook(call)
        got = model(ids, RIGHT, output_hidden_states=True)
    hook.remove()
    assert running
    for x, y in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["copied", "output replaced"])
def test_hidden_states_are_in_order_where_the_stack_was_changed(change: str) -> None:
    model = pair("bert")[1]
    ids = ids_like(RIGHT, "bert")
    with torch.no_grad():
        want = model(ids, RIGHT, output_hidden_states=True)
        if change == "copied":  # as PEFT's modules_to_save copies a part
            model.encoder = copy.deepcopy(model.encoder)
        else:
            model.encoder.register_forward_hook(
                lambda _, args, out: type(out)(**{**out, "last_hidden_state": out[0] + 0.0})
            )
        got = model(ids, RIGHT, output_hidden_states=True)
    for x, y in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert not vars(got.last_hidden_state)  # no note is left on what users get


def test_what_cannot_be_unpadded_is_refused() -> None:
    with pytest.raises(ValueError, match="XmodModel hands lang_ids to its layers.*unpad=False"):
        lsg_patch.patch_model(tiny_model("xmod"), **SETTINGS, unpad=True)
    with pytest.raises(ValueError, match="BertModel is a decoder.*unpad=False"):
        lsg_patch.patch_model(tiny_model("bert", is_decoder=True), **SETTINGS, unpad=True)
    family = next(iter(seq2seq.FAMILIES))
    with pytest.raises(ValueError, match="no place between its embeddings.*unpad=False"):
        lsg_patch.patch_model(seq2seq.tiny_model(family), **SETTINGS, unpad=True)
    with pytest.raises(ValueError, match="unpad=True with adaptive=False.*adaptive=True"):
        lsg_patch.LSGConfig(unpad=True, adaptive=False)
    with pytest.raises(ValueError, match="unpad must be True or False"):
        lsg_patch.LSGConfig(unpad="yes")  # type: ignore[arg-type]
