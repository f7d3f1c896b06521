"""Patched encoder-decoders against the reference's own numbers, each case within its tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import lsg_patch
from lsg_patch.families.bart import sinusoids
from tests import golden
from tests.parity.test_model_golden import assert_rows, inputs, patched_model

CASES = [e for e in golden.entries("model") if e["arch"] in golden.SEQ2SEQ]
PRECISIONS = [
    (entry, dtype)
    for entry in CASES
    for dtype in (torch.float64, torch.float32)
    if dtype is torch.float32 or entry["tol_fp64"] is not None
]


def name(parameter: object) -> str:
    return parameter["name"] if isinstance(parameter, dict) else str(parameter)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """4.36 to 4.44 make a decoder's causal mask in the default dtype, too small for float64's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_there_are_cases_of_every_family() -> None:
    assert {entry["arch"] for entry in CASES} == set(golden.SEQ2SEQ)
    assert {entry["lsg"]["pass_global_tokens_to_decoder"] for entry in CASES} == {True, False}
    assert {entry["lsg"]["mask_first_token"] for entry in CASES} == {True, False}


@pytest.mark.parametrize(("entry", "dtype"), PRECISIONS, ids=name)
def test_encoder_and_decoder(entry: golden.Entry, dtype: torch.dtype) -> None:
    tensors, settings = golden.tensors(entry), entry["lsg"]
    tolerance = entry["tol_fp64" if dtype is torch.float64 else "tol_fp32"]
    model = patched_model(entry, tensors, None, dtype)
    with torch.no_grad(), default_dtype(dtype):
        output = model(**inputs(tensors), output_hidden_states=True)
    assert_rows(
        output.last_hidden_state,
        tensors["out.last_hidden_state"],
        [output.last_hidden_state.shape[1]] * entry["batch"],
        tolerance,
    )
    globals_kept = settings["pass_global_tokens_to_decoder"] * settings["num_global_tokens"]
    lengths = [globals_kept + length for length in entry["valid_lengths"]]
    encoded = output.encoder_last_hidden_state
    assert_rows(encoded, tensors["out.encoder_last_hidden_state"], lengths, tolerance)
    if "out.hidden_states.1" in tensors:
        want = tensors["out.hidden_states.1"]
        if not globals_kept:
            first = want[:, :1]
            want = want[:, settings["num_global_tokens"] :].clone()
            if settings["pool_with_global"]:
                want[:, :1] = first  # ours are pooled as the last one is
        # stored in float32
        assert_rows(output.encoder_hidden_states[1], want, lengths, max(tolerance, 1e-5))


@pytest.mark.parametrize(
    ("entry", "task"), [(entry, task) for entry in CASES for task in entry["heads"]], ids=name
)
def test_heads(entry: golden.Entry, task: str) -> None:
    tensors = golden.tensors(entry)
    dtype = torch.float64 if entry["tol_fp64"] is not None else torch.float32
    model = patched_model(entry, tensors, task, dtype)
    given = inputs(tensors)
    if task != "lm":  # these make the decoder's input of the encoder's
        del given["decoder_input_ids"]
    with torch.no_grad(), default_dtype(dtype):
        output = model(**given)
    wanted = {
        key.removeprefix(f"out.{task}."): value
        for key, value in tensors.items()
        if key.startswith(f"out.{task}.")
    }
    positions = wanted.pop("positions", None)
    assert wanted
    for key, want in wanted.items():
        got = output[key] if positions is None else output[key][:, positions.long()]
        # stored in float32
        tolerance = max(entry["tol_fp64"] or entry["tol_fp32"], 1e-5)
        torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=tolerance)


def test_first_global_token_is_scaled_as_words_are() -> None:
    """The reference leaves the scale out; with it a short input can give the original's output."""
    for model_name in ("models/bart_v0", "models/mbart_v1", "models/pegasus_v1"):
        model, meta, _ = golden.vanilla_model(model_name)
        model.config.cls_token_id = bos = meta["conversion"]["bos_or_cls_token_id"]
        ids = torch.tensor([[bos, 7, 8]])
        expected = model.get_encoder()(ids).last_hidden_state
        with lsg_patch.patched(model, mask_first_token=True):
            actual = model.get_encoder()(ids).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_sinusoids() -> None:
    [entry] = [e for e in golden.entries("conversion") if e["arch"] == "pegasus"]
    tensors = golden.tensors(entry)
    stored, expected = tensors["vanilla.position_table"], tensors["expected.position_table"]
    table = sinusoids(stored, 0, entry["max_sequence_length"], None)
    assert len(table) == entry["max_sequence_length"]
    assert torch.equal(table[: len(stored)], stored)
    torch.testing.assert_close(table[: len(expected)], expected, rtol=0, atol=1e-7)
    # all of them, none kept
    torch.testing.assert_close(sinusoids(stored[:0], 0, len(table), None), table, rtol=0, atol=1e-6)
    assert torch.equal(sinusoids(stored, 0, 5, None), stored[:5])
