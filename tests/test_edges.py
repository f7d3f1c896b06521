"""Global tokens come in where the layers begin: what is outside of them has the input's length."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lsg_patch
from lsg_patch.modules.global_embeddings import GlobalEmbeddings
from tests import seq2seq
from tests.models import FAMILIES, ids_like, right_padded, run, takes, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
families = pytest.mark.parametrize("family", FAMILIES)


def patched_model(family: str = "bert", **settings: Any) -> Any:
    return lsg_patch.patch_model(tiny_model(family), **{**SETTINGS, **settings})


def embedded(model: Any, ids: Tensor) -> Tensor:
    boxes = torch.zeros(*ids.shape, 4, dtype=torch.long)  # LayoutLM's embeddings need them
    given = {"bbox": boxes} if takes(model.embeddings, "bbox") else {}
    with torch.no_grad():
        return model.embeddings(ids, **given)  # type: ignore[no-any-return]


@families
@pytest.mark.parametrize("num_global_tokens", [1, 3])
def test_embeddings_give_a_row_for_each_token(family: str, num_global_tokens: int) -> None:
    plain, model = tiny_model(family), patched_model(family, num_global_tokens=num_global_tokens)
    ids = ids_like(right_padded(60), family)
    assert torch.equal(embedded(model, ids), embedded(plain, ids))


@families
def test_nothing_is_left_on_what_a_hook_keeps(family: str) -> None:
    """Tools write such tensors to files."""
    model, kept = patched_model(family), []
    model.embeddings.register_forward_hook(lambda _, args, output: kept.append(output))
    run(model, ids_like(right_padded(60), family), None)
    assert len(kept) == 1 and not vars(kept[0])


@families
def test_hooks_on_the_embeddings_see_and_replace_the_tokens(family: str) -> None:
    """As attributions by layers do (captum): what they put in stands where it stood."""
    model, ids = patched_model(family), ids_like(right_padded(60), family)
    expected = run(model, ids, None)["last_hidden_state"]
    shapes = []

    def scaled(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        shapes.append(output.shape[1])
        return output * torch.linspace(1, 0.5, output.shape[1])[:, None]

    handle = model.embeddings.register_forward_hook(scaled)
    changed = run(model, ids, None)["last_hidden_state"]
    handle.remove()
    assert shapes == [60] and changed.shape == expected.shape
    assert (changed - expected)[:, -1].abs().max() > 1e-3
    model.embeddings.register_forward_hook(lambda _, args, output: output.clone())
    torch.testing.assert_close(run(model, ids, None)["last_hidden_state"], expected)


@families
def test_hooks_inside_of_the_embeddings_see_what_they_saw(family: str) -> None:
    """In the patch as well, and once for each forward: global tokens pass their modules unseen."""
    mask = right_padded(60, 41)
    ids = ids_like(mask, family)
    shapes: dict[bool, list[Any]] = {}
    for patches in (False, True):
        model, seen = tiny_model(family), shapes.setdefault(patches, [])

        def note(module: nn.Module, args: Any, output: Tensor, seen: Any = seen) -> None:
            assert output.dim() == 3, "as those that add noise to words want it"
            seen.append((type(module).__name__, tuple(output.shape)))

        for name, module in model.embeddings.named_modules():
            if name and "position" not in name and not list(module.children()):
                module.register_forward_hook(note)
        if patches:
            lsg_patch.patch_model(model, **SETTINGS)
            seen.clear()
        run(model, ids, mask)
    assert shapes[True] == shapes[False] != []


@pytest.mark.parametrize("length", [12, 60])
@pytest.mark.parametrize("masked", [False, True])
def test_the_stack_alone_adds_its_global_tokens(length: int, masked: bool) -> None:
    model, mask = patched_model(), right_padded(length, length - 3)
    ids = ids_like(mask, "bert")
    expected = run(model, ids, mask if masked else None)["last_hidden_state"]
    with torch.no_grad():
        given = mask if masked else None
        actual = model.encoder(embedded(model, ids), attention_mask=given)[0]
    torch.testing.assert_close(actual, expected)


def test_the_stack_alone_with_a_mask_of_another_length() -> None:
    model, ids = patched_model(), ids_like(right_padded(60), "bert")
    with pytest.raises(ValueError, match="60 hidden states and a mask of 61"):
        model.encoder(embedded(model, ids), attention_mask=torch.ones(1, 61))


def test_a_copy_or_a_pickle_has_its_own_global_tokens() -> None:
    """The stack finds them by its base model, which a copy has its own of."""
    model, ids = patched_model(), ids_like(right_padded(60), "bert")
    expected = run(model, ids, None)["last_hidden_state"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.lsg_base.module is other
        with torch.no_grad():
            lsg_patch.global_embeddings(other).mul_(torch.linspace(-2, 2, 32))
        assert (run(other, ids, None)["last_hidden_state"] - expected).abs().max() > 1e-2
        assert torch.equal(run(model, ids, None)["last_hidden_state"], expected)


def test_a_replica_runs_with_its_own_global_tokens() -> None:
    """As DataParallel makes them: modules of other weights with the hooks of the first ones."""
    model, ids = patched_model(), ids_like(right_padded(60), "bert")
    expected = run(model, ids, None)["last_hidden_state"]
    other = copy.deepcopy(model)
    other.encoder.lsg_base = model.encoder.lsg_base  # what a replica's shallow copy begins with
    with torch.no_grad():
        lsg_patch.global_embeddings(other).mul_(torch.linspace(-2, 2, 32))
    assert (run(other, ids, None)["last_hidden_state"] - expected).abs().max() > 1e-2
    assert torch.equal(run(model, ids, None)["last_hidden_state"], expected)


def test_a_copy_of_the_stack_alone_stays_with_its_model() -> None:
    """So PEFT's modules_to_save can have the stack: no second model comes along."""
    model, ids = patched_model(), ids_like(right_padded(60), "bert")
    expected = run(model, ids, None)["last_hidden_state"]
    stack = copy.deepcopy(model.encoder)
    assert stack.lsg_base.module is model
    model.encoder = stack
    assert torch.equal(run(model, ids, None)["last_hidden_state"], expected)


def test_embeddings_shared_with_a_model_that_nobody_patched() -> None:
    other, ids = tiny_model("bert", seed=1), ids_like(right_padded(60), "bert")
    model = tiny_model("bert")
    other.embeddings = model.embeddings
    expected = run(other, ids, None)["last_hidden_state"]
    lsg_patch.patch_model(model, **SETTINGS)
    assert torch.equal(run(other, ids, None)["last_hidden_state"], expected)
    lsg_patch.unpatch_model(model)
    assert torch.equal(run(other, ids, None)["last_hidden_state"], expected)


def test_what_was_embedded_earlier_meets_the_global_tokens_of_now() -> None:
    model, ids = patched_model(), ids_like(right_padded(60), "bert")
    rows = embedded(model, ids)
    with torch.no_grad():
        first = model.encoder(rows)[0]
        lsg_patch.global_embeddings(model).mul_(torch.linspace(-2, 2, 32))
        then, expected = model.encoder(rows)[0], model(ids).last_hidden_state
    assert torch.equal(then, expected) and not torch.equal(first, then)


def test_gradients_of_what_is_embedded_reach_every_token_and_global_token() -> None:
    model, ids = patched_model(mask_first_token=False), ids_like(right_padded(60), "bert")
    rows = embedded(model, ids).requires_grad_()  # kept from before, without gradients
    handle = model.embeddings.register_forward_hook(lambda _, args, output: rows)
    model(ids).last_hidden_state.square().sum().backward()
    handle.remove()
    assert rows.grad is not None and (rows.grad.abs().amax(-1) > 0).all()
    assert lsg_patch.global_embeddings(model).grad.abs().max() > 0  # type: ignore[union-attr]


# --- keys from outside, and inputs that do not begin with cls ------------------------------------


def prefix(model: Any) -> Any:
    """Keys and values of five tokens, as prefix tuning gives them."""
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8), layer)
    return cache


@pytest.mark.parametrize("masked", [False, True])
def test_keys_from_outside_are_refused_by_name(masked: bool) -> None:
    model, ids = patched_model(), ids_like(right_padded(20), "bert")
    assert takes(model, "past_key_values"), "what a prefix comes by"
    mask = torch.ones(1, 25) if masked else None
    with pytest.raises(ValueError, match=r"past_key_values.*prefix tuning.*LoRA"):
        model(ids, attention_mask=mask, past_key_values=prefix(model))
    run(model, ids, None)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_a_prompt_in_front_is_told_of(family: str) -> None:
    """Its first row would be hidden, and never learn: one warning, with the mend."""
    model, ids = patched_model(family), ids_like(right_padded(40, 33), family)
    words = model.get_input_embeddings()(ids).detach()
    prompt = torch.randn(2, 4, words.shape[2])
    inputs = torch.cat([prompt, words], dim=1)
    with warnings.catch_warnings(record=True) as shown, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            model(inputs_embeds=inputs)
    told = [str(w.message) for w in shown if "mask_first_token=False" in str(w.message)]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs_embeds=words)  # begins with cls
        mask = torch.tensor([[0] * 5 + [1] * 35] * 2)
        left = model.get_input_embeddings()(ids_like(mask, family)).detach()
        model(inputs_embeds=left, attention_mask=mask)
        mended = patched_model(family, mask_first_token=False)
        learned = inputs.requires_grad_()
        mended(inputs_embeds=learned).last_hidden_state[:, 5:].square().sum().backward()
    assert (learned.grad.abs().amax(-1)[:, 0] > 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", seq2seq.FAMILIES)
def test_a_prompt_in_front_of_an_encoder_decoder(family: str) -> None:
    model = seq2seq.tiny_model(family)
    lsg_patch.patch_model(model, mask_first_token=True, **SETTINGS)
    words = model.get_input_embeddings()(
        torch.tensor([[model.config.bos_token_id, 7, 8, 9]])
    ).detach()
    encoder = model.get_encoder()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        encoder(inputs_embeds=words)
    with pytest.warns(UserWarning, match="mask_first_token=False"), torch.no_grad():
        encoder(inputs_embeds=torch.randn_like(words))


def test_the_table_is_given_tensors_as_other_modules_are() -> None:
    """Tools that hook every module (Opacus) look at the batch size of its input."""
    table = GlobalEmbeddings(torch.randn(3, 16))
    assert table(torch.zeros(5, 7, 32)).shape == (5, 3, 16)
    seen: list[Any] = []
    model = patched_model()
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda _, args: seen.append(args))
    run(model, ids_like(right_padded(60), "bert"), None)
    assert seen and all(isinstance(x, (Tensor, tuple)) for args in seen for x in args)


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *seq2seq.FAMILIES])
def test_a_hook_on_the_model_sees_what_the_user_gives_and_gets(family: str, prepend: bool) -> None:
    """One that was there before the patch, and one that came after it; of BART on its encoder."""
    mask = right_padded(60, 41)
    if family in seq2seq.FAMILIES:
        model, ids = seq2seq.tiny_model(family), seq2seq.ids_like(mask)
        encoder = model.encoder
    else:
        encoder = model = tiny_model(family)
        ids = ids_like(mask, family)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        seen.append(("mask", tuple(kwargs["attention_mask"].shape)))
        assert kwargs["input_ids"].shape == mask.shape
        if output is not None:
            seen.append(("output", tuple(output[0].shape[:2])))

    for patches in (False, True):
        if patches:
            lsg_patch.patch_model(model, **SETTINGS)
        encoder.register_forward_pre_hook(note, with_kwargs=True, prepend=prepend)
        encoder.register_forward_hook(note, with_kwargs=True, prepend=prepend)
    with torch.no_grad():
        encoder(input_ids=ids, attention_mask=mask)
    assert seen == [("mask", (2, 60))] * 2 + [("mask", (2, 60)), ("output", (2, 60))] * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_fixes_neither_batch_nor_length() -> None:
    """More of it, with torch.export and ONNX, is in tests/ecosystem/test_exporting.py."""
    model, example, other = patched_model(), right_padded(41, 30), right_padded(57, 20, 3, 57, 12)
    given = [(ids_like(mask, "bert"), mask) for mask in (example, other)]
    with torch.no_grad():
        model.config.return_dict = False
        traced = torch.jit.trace(model, given[0], check_trace=False)
        expected, found = (run_it(*given[1])[0] for run_it in (model, traced))
    torch.testing.assert_close(found[other.bool()], expected[other.bool()], rtol=0, atol=1e-5)


def test_a_replaced_forward_may_give_something_else_first() -> None:
    model, ids = tiny_model("bert"), ids_like(right_padded(60), "bert")
    own = model.forward
    model.forward = lambda *x, **given: ("first", own(*x, **given).last_hidden_state)
    lsg_patch.patch_model(model, **SETTINGS)
    expected = run(patched_model(), ids, None)["last_hidden_state"]
    with torch.no_grad():
        name, found = model(ids)
    assert name == "first"
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
