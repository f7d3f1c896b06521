"""`lsg-patch convert`: a checkpoint of long inputs as the reference's script makes it, in our format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lsg_patch
from lsg_patch import cli
from lsg_patch.families import find_base
from tests import golden, models, published, seq2seq
from tests.models import CLS, MASK, POSITIONS, VOCABULARY

SETTINGS: dict[str, Any] = {"block_size": 16, "sparse_block_size": 16}
OPTIONS = ["--block-size", "16", "--sparse-block-size", "16"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a head and its tokenizer, of plain files that every transformers reads."""
    folder = tmp_path / "source"
    model = models.tiny_model("bert", transformers.BertForMaskedLM)
    model.config.cls_token_id = model.config.mask_token_id = None
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    words = [f"w{index}" for index in range(VOCABULARY)]
    words[:6] = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    made = transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=POSITIONS)
    made.save_pretrained(folder)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def original(folder: Path) -> Any:
    return transformers.BertForMaskedLM.from_pretrained(folder)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["convert", str(source), str(out), "--max-length", "300", "--test", *OPTIONS]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "reads 300 tokens" in printed[0] and printed[1] == "global tokens: 1, new"
    assert "short input (32 tokens): " in printed[2] and printed[2].endswith("as before")
    assert printed[3] == "long input (300 tokens): finite"
    model = lsg_patch.from_pretrained(out)
    assert type(model) is transformers.BertForMaskedLM
    # what a patch of the loaded model is, seed and all
    expected = lsg_patch.patch_model(
        original(source),
        **SETTINGS,
        max_position_embeddings=300,
        seed=123,
        tokenizer=transformers.AutoTokenizer.from_pretrained(source),
    )
    assert lsg_patch.get_config(model) == lsg_patch.get_config(expected)
    assert weights(model).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        assert torch.equal(weights(model)[name], value), name
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 300
    # another one into the same folder would mix them
    assert cli.main(argv) == 2
    assert "not empty" in capsys.readouterr().err


def test_defaults_are_those_of_the_script(source: Path, tmp_path: Path) -> None:
    done = lsg_patch.convert(source, tmp_path / "out")
    config = lsg_patch.get_config(lsg_patch.from_pretrained(tmp_path / "out"))
    assert done.passed and (config.max_position_embeddings, config.seed) == (4096, 123)
    assert (config.global_positional_stride, config.random_global_init) == (64, False)


@pytest.mark.parametrize("entry", golden.entries("conversion"), ids=lambda entry: entry["name"])
def test_rows_are_the_references(entry: golden.Entry, tmp_path: Path) -> None:
    """The tables of the golden conversions, where the reference is right: token types, no scale."""
    family = entry["arch"]
    tensors = {name: value.float() for name, value in golden.tensors(entry).items()}
    width = tensors["vanilla.word_rows"].shape[1]
    count = min(entry["deterministic_global_rows"], 64)
    words = 8
    stated = {"vocab_size": words, "max_position_embeddings": entry["table_positions"]}
    if family in golden.SEQ2SEQ:
        stated |= {"d_model": width, "bos_token_id": 5, "scale_embedding": False}
        model = seq2seq.tiny_model(family, "Model", **stated)
    else:
        if entry["offset"]:
            stated["max_position_embeddings"] += entry["offset"]
        sizes = dict.fromkeys(("hidden_size", "dim", "embedding_size"), width)
        model = models.tiny_model(family, None, **stated, **sizes)
        model.config.cls_token_id = 5
    model.config.mask_token_id = 4
    base, known = find_base(model)
    embeddings = base.get_submodule(known.embeddings)
    with torch.no_grad():
        table = getattr(embeddings, known.positions)
        if family != "pegasus":
            table.weight.copy_(tensors["vanilla.position_table"])
        getattr(embeddings, known.words).weight[[5, 4]] = tensors["vanilla.word_rows"]
        if known.token_types:
            row = tensors.get("vanilla.token_type_row0")
            # the reference leaves RoBERTa's out
            row = torch.zeros(width) if row is None or "roberta" in family else row
            row = torch.zeros(width) if family == "camembert" else row
            getattr(embeddings, known.token_types).weight[0] = row
    model.save_pretrained(tmp_path / "source")
    lsg_patch.convert(
        tmp_path / "source",
        tmp_path / "out",
        max_length=entry["max_sequence_length"],
        global_positional_stride=entry["global_positional_stride"],
        num_global_tokens=count,
    )
    found = lsg_patch.from_pretrained(tmp_path / "out")
    tolerance = 1e-6 if family == "pegasus" else 0
    torch.testing.assert_close(
        lsg_patch.global_embeddings(found).detach(),
        tensors["expected.global_embeddings"][:count],
        rtol=0,
        atol=tolerance,
    )
    base, _ = find_base(found)
    table = getattr(base.get_submodule(known.embeddings), known.positions).weight.detach()
    expected = tensors["expected.position_table"]
    torch.testing.assert_close(table[: len(expected)], expected, rtol=0, atol=tolerance)
    assert found.config.max_position_embeddings == entry["config_max_position_embeddings"]


def test_without_token_types(source: Path, tmp_path: Path) -> None:
    for name, used in (("with", True), ("without", False)):
        lsg_patch.convert(source, tmp_path / name, max_length=100, use_token_ids=used, **SETTINGS)
    rows = [
        lsg_patch.global_embeddings(lsg_patch.from_pretrained(tmp_path / name)).detach()
        for name in ("with", "without")
    ]
    row = original(source).bert.embeddings.token_type_embeddings.weight[0].detach()
    torch.testing.assert_close(rows[0] - rows[1], row[None], rtol=0, atol=1e-6)
    assert row.abs().max() > 0.1


def test_another_architecture(source: Path, tmp_path: Path) -> None:
    for name in ("BertForSequenceClassification", "LSGBertForSequenceClassification"):
        argv = ["convert", str(source), str(tmp_path / name), "--architecture", name, *OPTIONS]
        assert cli.main(argv) == 0
        model = lsg_patch.from_pretrained(tmp_path / name)
        assert type(model) is transformers.BertForSequenceClassification


def test_weights_that_the_class_leaves_out(source: Path, tmp_path: Path) -> None:
    """As the hub has them: a language model's checkpoint with a head for sentences."""
    transformers.BertForPreTraining(original(source).config).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (source / "config.json").write_text(json.dumps(config))
    assert lsg_patch.convert(source, tmp_path / "out", max_length=100, test=True).passed


def test_half_precision_becomes_float32(source: Path, tmp_path: Path) -> None:
    original(source).half().save_pretrained(source)
    lsg_patch.convert(source, tmp_path / "out", max_length=100)
    model = lsg_patch.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class TestOfPatched:
    """Sources that are patched already: as the reference saved them, and ours."""

    @pytest.fixture(params=["published", "ours"])
    def patched(self, request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
        model = lsg_patch.patch_model(
            original(source), max_position_embeddings=200, num_global_tokens=3, **SETTINGS,
            tokenizer=transformers.AutoTokenizer.from_pretrained(source),
        )  # fmt: skip
        with torch.no_grad():
            lsg_patch.global_embeddings(model).add_(1.0)
        folder = tmp_path / "patched"
        if request.param == "published":
            published.write(model, folder)
        else:
            model.save_pretrained(folder)
        tokenizer(folder)
        return folder

    def convert(self, folder: Path, **given: Any) -> tuple[Any, lsg_patch.conversion.Conversion]:
        out = folder.parent / "out"
        done = lsg_patch.convert(folder, out, test=True, **given)
        return lsg_patch.from_pretrained(out), done

    def test_nothing_asked_for_is_the_same_in_our_format(self, patched: Path) -> None:
        model, done = self.convert(patched)
        assert done.passed and "0.0e+00, as before" in done.lines[2]
        assert done.lines[1] == "global tokens: 3, kept"
        before = lsg_patch.from_pretrained(patched)
        assert lsg_patch.get_config(model) == lsg_patch.get_config(before)
        for name, value in weights(before).items():
            assert torch.equal(weights(model)[name], value), name
        stated = json.loads((patched.parent / "out" / "config.json").read_text())
        assert "auto_map" not in stated and stated["architectures"] == ["BertForMaskedLM"]

    def test_longer_makes_new_global_tokens(self, patched: Path) -> None:
        model, done = self.convert(patched, max_length=500)
        assert done.lines[1] == "global tokens: 3, new" and "may differ" in done.lines[2]
        before = lsg_patch.from_pretrained(patched)
        long = before.bert.embeddings.position_embeddings.weight.detach()
        table = model.bert.embeddings.position_embeddings.weight
        assert torch.equal(table, long.repeat(3, 1)[:500])
        expected = before.bert.embeddings.word_embeddings.weight[[CLS, MASK, MASK]]
        # the strided positions of the table that the source has
        expected = (
            expected + long[[0, 64, 128]] + before.bert.embeddings.token_type_embeddings.weight[0]
        )
        rows = lsg_patch.global_embeddings(model)
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)

    def test_longer_with_its_global_tokens(self, patched: Path) -> None:
        model, done = self.convert(patched, max_length=500, resize_lsg=True)
        assert done.passed and done.lines[1] == "global tokens: 3, kept"
        before = lsg_patch.global_embeddings(lsg_patch.from_pretrained(patched))
        assert torch.equal(lsg_patch.global_embeddings(model), before)
        assert model.config.max_position_embeddings == 500

    def test_the_first_one_is_kept(self, patched: Path) -> None:
        model, done = self.convert(patched, keep_first_global_token=True)
        assert done.lines[1] == "global tokens: 3, new, but the first"
        before = lsg_patch.global_embeddings(lsg_patch.from_pretrained(patched))
        now = lsg_patch.global_embeddings(model)
        assert torch.equal(now[0], before[0]) and not torch.equal(now[1:], before[1:])

    def test_more_global_tokens_than_were_saved(self, patched: Path) -> None:
        _, done = self.convert(patched, resize_lsg=True, num_global_tokens=4)
        assert done.lines[1] == "global tokens: 4, kept the first 3"

    def test_settings_win(self, patched: Path) -> None:
        model, _ = self.convert(patched, sparsity_type="stride", num_global_tokens=2)
        config = lsg_patch.get_config(model)
        assert (config.sparsity_type, config.num_global_tokens) == ("stride", 2)
        assert config.block_size == 16


@pytest.mark.parametrize("more", [{}, {"keep_first_global_token": True}], ids=str)
def test_positions_that_learned_are_not_tiled_again(
    more: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    model = lsg_patch.patch_model(
        original(source), max_position_embeddings=200, position_period=32, **SETTINGS
    )
    table = model.bert.embeddings.position_embeddings.weight
    with torch.no_grad():
        table[32:] += 1  # as freeze_except(model, "new_positions") lets them
    model.save_pretrained(tmp_path / "patched")
    tokenizer(tmp_path / "patched")
    lsg_patch.convert(tmp_path / "patched", tmp_path / "out", max_length=300, **more)
    found = lsg_patch.from_pretrained(tmp_path / "out").bert.embeddings.position_embeddings.weight
    assert torch.equal(found[:200], table)
    lsg_patch.convert(
        tmp_path / "patched", tmp_path / "anew", max_length=300, position_period=64, **more
    )
    found = lsg_patch.from_pretrained(tmp_path / "anew").bert.embeddings.position_embeddings.weight
    assert torch.equal(found, table[:64].repeat(5, 1)[:300])


def test_what_a_sentence_transformer_has_besides_is_told_of(source: Path, tmp_path: Path) -> None:
    (source / "modules.json").write_text("[]")
    done = lsg_patch.convert(source, tmp_path / "out", **SETTINGS)
    assert "NOT in it: pooling and prompts of the SentenceTransformer" in done.lines[2]


@pytest.mark.parametrize("family", ["bart", "mbart", "roberta", "electra", "distilbert"])
def test_other_families(family: str, tmp_path: Path) -> None:
    if family in seq2seq.FAMILIES:
        model = seq2seq.tiny_model(family, "ForConditionalGeneration")
    else:
        model = models.tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    done = lsg_patch.convert(
        tmp_path / "source", tmp_path / "out", max_length=200, test=True, **SETTINGS
    )
    assert done.passed and "tokenizer: none" in done.lines[2]
    # mBART's inputs do not begin with the token that a global one replaces
    assert ("as before" in done.lines[3]) is (family != "mbart")


def test_padding_that_is_the_last_word(tmp_path: Path) -> None:
    """Ids of the test's inputs are words all the same, and as many as the source reads."""
    model = models.tiny_model("bert", pad_token_id=VOCABULARY - 1)
    model.save_pretrained(tmp_path / "source")
    done = lsg_patch.convert(
        tmp_path / "source", tmp_path / "out", max_length=200, test=True, **SETTINGS
    )
    assert done.passed and "short input (32 tokens)" in done.lines[3]


def test_a_failed_test_is_told(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A source with a number that is none: what is read of it is none either."""
    model = original(source)
    model.bert.encoder.layer[0].output.dense.bias.data[0] = float("nan")
    model.save_pretrained(source)
    assert (
        cli.main(["convert", str(source), str(tmp_path / "out"), "--max-length", "100", "--test"])
        == 1
    )
    printed = capsys.readouterr().out
    assert "NOT as before" in printed and "NOT finite" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resize-lsg"], "resize_lsg=True, but"),
        (["--keep-first-global-token"], "keep_first_global_token=True, but"),
        (["--architecture", "Nothing"], "'Nothing'"),
        (["--block-size", "17"], "block_size"),
        (["--sparsity-type", "magic"], "'magic'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_requests(
    options: list[str], said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
