"""ONNX: what torch.onnx exports gives the model's outputs in onnxruntime, at sizes it has not seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import lsg_patch
from benchmarks import store
from benchmarks.__main__ import main as benchmark
from lsg_patch import cli, exporting
from lsg_patch.demo import bundled_model, module_text
from tests.ecosystem.test_exporting import SETTINGS, check, encoder, example_of
from tests.models import ids_like, right_padded, tiny_model
from tests.seq2seq import tiny_model as tiny_seq2seq
from tests.tokenizers import real_tokenizer


@pytest.mark.parametrize("selection", ["norm", "lsh", "bos_pooling"])
def test_onnxruntime_gives_the_same(selection: str, tmp_path: Path) -> None:
    model, path = encoder(sparsity_type=selection), str(tmp_path / "model.onnx")
    size = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=100)}
    torch.onnx.export(
        model,
        example_of(31, True),
        path,
        dynamo=True,
        input_names=["ids", "mask"],
        dynamic_shapes=[size, size],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    check(run, model, masked=True)


def test_the_exporter_by_a_trace_is_told_of(tmp_path: Path) -> None:
    """It takes the example's sizes for those of all inputs, and onnxruntime then refuses others."""
    model, path = encoder(), str(tmp_path / "model.onnx")
    ids, mask = example_of(31, True)
    with pytest.warns(UserWarning, match="pass dynamo=True"):
        torch.onnx.export(
            model, (ids, mask), path, dynamo=False, input_names=["ids", "mask"], opset_version=17
        )
    session = onnxruntime.InferenceSession(path)
    [found] = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(ids, mask), rtol=0, atol=1e-4)


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_model_with_a_head(tmp_path: Path) -> None:
    """Its inputs and outputs have names; sizes that were not checked agree as well."""
    head = tiny_model("roberta", transformers.RobertaForTokenClassification)
    model = lsg_patch.patch_model(head, **SETTINGS)
    done = lsg_patch.export_onnx(model, tmp_path / "model.onnx")
    assert done.difference < 1e-4 and done.int8_path is None
    session = session_of(done.path)
    names = [x.name for x in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    assert [x.name for x in session.get_outputs()] == ["logits"]
    mask = right_padded(100, 41, 7)
    given = {"input_ids": ids_like(mask, "roberta"), "attention_mask": mask}
    given["token_type_ids"] = (torch.arange(100) > 50).long().expand(3, -1)
    with torch.no_grad():
        expected = model(**given).logits
    [found] = session.run(None, {name: x.numpy() for name, x in given.items()})
    torch.testing.assert_close(
        torch.from_numpy(found)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4
    )


def test_real_weights_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "encoder.onnx"
    more = ("--block-size", "64", "--sparsity-type", "none", "--max-length", "2048", "--int8")
    assert cli.main(["export", str(bundled_model()), str(out), *more]) == 0
    told = capsys.readouterr().out
    assert "largest difference" in told and "cosine" in told
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model = AutoModel.from_pretrained(bundled_model()).eval()
    lsg_patch.patch_model(model, 64, "none", max_position_embeddings=2048, tokenizer=tokenizer)
    texts = [module_text("json.decoder"), module_text("argparse")]
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert given["input_ids"].shape == (2, 2048)
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    for file, least in ((out, 1 - 1e-6), (tmp_path / "encoder.int8.onnx", 0.98)):
        session = session_of(file)
        feed = {x.name: given[x.name].numpy() for x in session.get_inputs()}
        found = torch.from_numpy(session.run(None, feed)[0])
        weights = given["attention_mask"][..., None]
        means = [(x * weights).sum(1) / weights.sum(1) for x in (found, expected)]
        assert torch.cosine_similarity(*means).min() > least


def test_what_was_saved_patched_is_exported_as_it_was_saved(tmp_path: Path) -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS, num_global_tokens=0)
    model.save_pretrained(tmp_path / "saved")
    done = exporting.export_checkpoint(str(tmp_path / "saved"), tmp_path / "model.onnx")
    mask = right_padded(90)
    given = {"input_ids": ids_like(mask, "bert"), "attention_mask": mask}
    given["token_type_ids"] = torch.zeros_like(mask)
    found = session_of(done.path).run(None, {name: x.numpy() for name, x in given.items()})[0]
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def decoder() -> nn.Module:
    return tiny_model("bert", transformers.BertLMHeadModel, is_decoder=True)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_model("bert"), {}, "not patched: patch_model"),
        (lambda: lsg_patch.patch_model(decoder(), **SETTINGS), {}, "has a decoder"),
        (lambda: lsg_patch.patch_model(tiny_seq2seq("bart"), **SETTINGS), {}, "has a decoder"),
        (lambda: encoder().model, {"opset": 17}, "opset=17 is none of 18 to .* leave it out"),
        (lambda: encoder().model, {"opset": 99}, "opset=99 is none of 18 to .* leave it out"),
        (lambda: encoder().model.double(), {}, r"model.float\(\) first"),
        (lambda: encoder().model.train(), {}, r"model.eval\(\) first"),
        (
            lambda: lsg_patch.patch_model(tiny_model("bert"), adaptive=False, **SETTINGS),
            {},
            "adaptive=False, a program takes any length",
        ),
        (lambda: encoder().model, {"path": "no/such/model.onnx"}, "no folder .* make it first"),
        (lambda: encoder().model, {"path": "there.onnx"}, "there already: name another"),
        (
            lambda: encoder().model,
            {"path": "x.onnx", "int8": True},
            "x.int8.onnx' is there already",
        ),
    ],
    ids=[
        "plain",
        "decoder",
        "seq2seq",
        "old opset",
        "new opset",
        "float64",
        "training",
        "whole blocks",
        "folder",
        "file",
        "int8 file",
    ],
)
def test_what_cannot_be_exported(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "x.int8.onnx").write_text("mine")
    before = sorted(tmp_path.iterdir())
    path = tmp_path / options.pop("path", "model.onnx")
    with pytest.raises(ValueError, match=message):
        lsg_patch.export_onnx(make(), path, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.onnx").read_text() == "mine"


def test_an_export_that_is_wrong_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.onnx.export

    def of_another(module: Any, *given: Any, **options: Any) -> Any:
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.model.encoder.layer[0].output.dense.bias[0] += 0.1
        return real(other, *given, **options)

    monkeypatch.setattr(torch.onnx, "export", of_another)
    with pytest.raises(RuntimeError, match="nothing was written"):
        lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise NotImplementedError("no such operator\n\nand more")  # reason: what torch raises

    monkeypatch.setattr(torch.onnx, "export", fails)
    said = "^BertModel cannot be exported with opset=20: no such operator$"
    with pytest.raises(RuntimeError, match=said):
        lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx", opset=20)
    assert not list(tmp_path.iterdir())


def test_every_real_row_is_compared() -> None:
    program = exporting.Program(encoder().model)
    given = program.example(3, 40)
    assert given["attention_mask"].sum(1).tolist() == [40, 27, 27]
    with torch.no_grad():
        ran = [x.clone() for x in program.outputs(given).values()]
    ran[0][1, -1] += 1  # padding
    assert program.difference(lambda _: ran, given) == 0
    for wrong in (0.5, torch.nan):
        ran[0][1, 0] = wrong
        with pytest.raises(RuntimeError, match=r"last_hidden_state of .* \(3, 40\)"):
            program.difference(lambda _: ran, given)


def test_weights_of_many_gigabytes_lie_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    names = [f"model{name}" for name in (".int8.onnx", ".int8.onnx.data", ".onnx", ".onnx.data")]
    with monkeypatch.context() as change:
        change.setattr(limit, 0)
        done = lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx", int8=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert done.least_cosine is not None and done.mean_cosine is not None
    assert 0.9 < done.least_cosine < done.mean_cosine < 1
    given = exporting.Program(encoder().model).example(2, 33)
    assert exporting.opened(tmp_path / "model.onnx")(given)[0].shape == (2, 33, 32)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"model.onnx.data' is there already"):
        lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx")
    # old weights do not stay
    lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == names[:3]


def test_a_sentence_transformer_gives_its_embedding(tmp_path: Path) -> None:
    real_tokenizer(tmp_path)
    tiny_model("bert").save_pretrained(tmp_path)
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(32), modules.Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu").eval()
    lsg_patch.patch_model(model, **SETTINGS)
    lsg_patch.export_onnx(model, tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx")
    mask = right_padded(70, 40, 70)
    given = {"input_ids": ids_like(mask, "bert"), "attention_mask": mask}
    given["token_type_ids"] = torch.zeros_like(mask)
    feed = {name: x.numpy() for name, x in given.items()}
    [found] = session.run(["sentence_embedding"], feed)
    expected = model({**given})["sentence_embedding"].detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PACKAGES", ("onnx", "not_there"))
    said = r"^an export needs not_there: pip install lsg-patch\[onnx\]$"
    with pytest.raises(ImportError, match=said):
        lsg_patch.export_onnx(encoder().model, tmp_path / "model.onnx")
    with pytest.raises(ImportError, match=said):
        exporting.export_checkpoint("no/such", tmp_path / "model.onnx")


def test_the_benchmark_has_both_models_in_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    argv = ["onnx", "--lengths", "300", "--layers", "1", "--repeats", "1", "--json", str(path)]
    assert benchmark(argv) == 0
    sides: dict[str, list[str]] = {}
    for record in store.read(path):
        sides.setdefault(record["case"], []).append(record["side"])
    assert sides == {
        f"{size} of 300 tokens, to full, {kind}": [f"full, {kind}", f"norm, {kind}"]
        for size in (1, 8)
        for kind in ("float32", "int8")
    }
