"""LSG checkpoints that the reference wrote, or would write: they load here, and none of their code runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lsg_patch
from lsg_patch.published import NAMES
from tests import golden, models, published, seq2seq
from tests.golden import SEQ2SEQ
from tests.parity.test_model_golden import feed_drawn, inputs, patched_model
from tests.parity.test_seq2seq_golden import default_dtype

SAVED = sorted((golden.ROOT / "checkpoints").iterdir())
KINDS = ("model.safetensors", "pytorch_model.bin")
# a base model, and each head that the case has outputs of
CASES = [
    (entry, task)
    for entry in golden.entries("model")
    for task in (None, *entry["heads"])
    if hasattr(transformers, entry["heads"].get(task, "BertModel"))
]


def compare(actual: Any, expected: dict[str, Tensor], mask: Tensor, tolerance: float) -> None:
    """Outputs at real tokens; global tokens before an encoder's states are real."""
    assert expected
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if want.dim() > 1 and want.shape[1] >= mask.shape[1]:
            more = mask.new_ones(len(mask), want.shape[1] - mask.shape[1])
            real = torch.cat([more, mask], dim=1).bool()
            got, want = got[real], want[real]
        torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_what_the_reference_saved(folder: Path, tmp_path: Path) -> None:
    model = lsg_patch.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert [f"LSG{type(model).__name__}"] == config["architectures"]
    tensors = load_file(folder / "expected.safetensors")
    tolerance = 5e-6 if config["sparsity_type"] == "pooling" else 1e-12
    model.save_pretrained(tmp_path)
    for loaded in (model, lsg_patch.from_pretrained(tmp_path)):
        loaded = loaded.eval().double()
        for length in ("short", "long"):
            given = {
                key.removeprefix(f"{length}.in."): value
                for key, value in tensors.items()
                if key.startswith(f"{length}.in.")
            }
            expected = {
                key.removeprefix(f"{length}.out."): value
                for key, value in tensors.items()
                if key.startswith(f"{length}.out.")
            }
            with torch.no_grad(), default_dtype(torch.float64):
                output = loaded(**given)
            compare(output, expected, given["attention_mask"], tolerance)


@pytest.mark.parametrize(
    ("entry", "task"), CASES, ids=lambda x: x["name"] if isinstance(x, dict) else str(x)
)
def test_every_family_and_head(entry: golden.Entry, task: str | None, tmp_path: Path) -> None:
    """As the reference would save the models of the golden cases: what they compute."""
    tensors = golden.tensors(entry)
    kind = KINDS[len(entry["name"]) % 2]
    source = patched_model(entry, tensors, task, torch.float32)
    published.write(source, tmp_path / "saved", kind)
    dtype = torch.float64 if entry["tol_fp64"] is not None else torch.float32
    model = lsg_patch.from_pretrained(tmp_path / "saved")
    assert type(model) is type(source)
    for read in (model, source):  # no more positions and no fewer
        assert read.config.max_position_embeddings == source.config.max_position_embeddings
        length = lsg_patch.get_config(read).max_position_embeddings
        assert length == lsg_patch.get_config(source).max_position_embeddings
    assert lsg_patch.global_embeddings(model).shape == tensors["global_embeddings"].shape
    model = model.eval().to(dtype)
    feed_drawn(tensors, model)
    given = inputs(tensors)
    if entry["arch"] in SEQ2SEQ and task in ("seqcls", "qa"):
        del given["decoder_input_ids"]
    with torch.no_grad(), default_dtype(dtype):
        output = model(**given)
    tolerance = max(entry["tol_fp64"] or entry["tol_fp32"], 1e-5)
    prefix = f"out.{task}." if task else "out."
    expected = {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and not key.endswith(".positions")
    }
    if task is None:
        names = ("last_hidden_state", "encoder_last_hidden_state", "pooler_output")
        expected = {name: expected[name] for name in names if name in expected}
    mask = given["attention_mask"]
    if f"{prefix}positions" in tensors:
        at = tensors[f"{prefix}positions"].long()
        real = mask[:, at] if task == "mlm" else torch.ones(len(mask), len(at))
        got = {"logits": output["logits"][:, at]}
        compare(got, expected, real.long(), tolerance)
    else:
        compare(output, expected, mask, tolerance)
    assert not (tmp_path / "saved" / "RAN").exists()


ENCODERS = [
    (name, cls) for name in NAMES if name not in SEQ2SEQ for cls in models.model_classes(name)
]
HEADS = [
    *((name, cls, False) for name, cls in ENCODERS),
    *((name, cls, False) for name in SEQ2SEQ for cls in seq2seq.model_classes(name)),
    # language models of an encoder's family are decoders if they are told so
    *(
        (name, cls, True)
        for name, cls in ENCODERS
        if cls.__name__.endswith(("CausalLM", "LMHeadModel"))
    ),
]


@pytest.mark.parametrize(
    ("family", "cls", "is_decoder"), HEADS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_every_head_that_there_is(
    family: str, cls: type[Any], is_decoder: bool, tmp_path: Path
) -> None:
    settings = {"block_size": 16, "sparse_block_size": 16, "num_global_tokens": 2}
    mask = models.right_padded(90, 55)
    if family in SEQ2SEQ:
        source = seq2seq.tiny_model(family, cls.__name__.removeprefix(seq2seq.FAMILIES[family][0]))
        run, ids = seq2seq.run, seq2seq.ids_like(mask)
    else:
        source = models.tiny_model(family, cls, is_decoder=is_decoder)
        run, ids = models.run, models.ids_like(mask, family)
    lsg_patch.patch_model(
        source,
        max_position_embeddings=100,
        pass_global_tokens_to_decoder=family in SEQ2SEQ,
        **settings,
    )
    loaded = lsg_patch.from_pretrained(published.write(source, tmp_path)).eval()
    assert isinstance(loaded, cls) and type(loaded).__name__ == cls.__name__
    expected, actual = run(source, ids, mask), run(loaded, ids, mask)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("entry", golden.entries("model")[::9], ids=lambda e: e["name"])
def test_saved_again_it_is_ours(entry: golden.Entry, tmp_path: Path) -> None:
    source = patched_model(entry, golden.tensors(entry), None, torch.float32)
    published.write(source, tmp_path / "saved")
    model = lsg_patch.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    stated = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stated["architectures"] == [type(model).__name__]
    own = {"auto_map", "base_model_prefix", *published.DEFAULTS}
    assert (
        not own & stated.keys() and stated["lsg_patch"]["block_size"] == entry["lsg"]["block_size"]
    )
    again = lsg_patch.from_pretrained(tmp_path / "ours")
    assert lsg_patch.get_config(again) == lsg_patch.get_config(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class TestOneCheckpoint:
    """Keywords, files and names of one small checkpoint."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        model = models.tiny_model("bert", transformers.BertForMaskedLM)
        lsg_patch.patch_model(model, max_position_embeddings=200, mask_first_token=False)
        return published.write(model, tmp_path / "saved")

    def test_defaults_are_the_references(self, saved: Path) -> None:
        config = lsg_patch.get_config(lsg_patch.from_pretrained(saved))
        stated = json.loads((saved / "config.json").read_text())
        assert not stated.keys() & published.DEFAULTS.keys()
        own = {"pass_global_tokens_to_decoder": False, "max_position_embeddings": 200}
        for name, value in {**published.DEFAULTS, **own}.items():
            assert getattr(config, name) == value, name

    def test_auto_patching_loads_it_as_it_was_saved(self, saved: Path) -> None:
        """Also by an Auto class, as pipelines and others load models."""
        expected = lsg_patch.from_pretrained(saved)
        with lsg_patch.auto_patching():
            model = transformers.AutoModelForMaskedLM.from_pretrained(saved)
        assert lsg_patch.get_config(model) == lsg_patch.get_config(expected)
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_patched_anew_it_is_warned_of(
        self, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = transformers.AutoModelForMaskedLM.from_pretrained(saved)
        assert not lsg_patch.is_patched(model)
        lsg_patch.patch_model(model)
        assert "saved patched and loaded without that" in caplog.text

    def test_an_encoder_decoder_passes_its_global_tokens(self, tmp_path: Path) -> None:
        model = seq2seq.tiny_model("bart", "ForConditionalGeneration")
        lsg_patch.patch_model(
            model, max_position_embeddings=200, pass_global_tokens_to_decoder=True
        )
        published.write(model, tmp_path)
        assert "pass_global_tokens_to_decoder" not in (tmp_path / "config.json").read_text()
        assert lsg_patch.get_config(
            lsg_patch.from_pretrained(tmp_path)
        ).pass_global_tokens_to_decoder

    def test_settings_as_keywords(self, saved: Path) -> None:
        model = lsg_patch.from_pretrained(
            saved,
            num_global_tokens=16,
            block_size=64,
            sparsity_type="none",
            mask_first_token=True,
            attention_probs_dropout_prob=0.0,
        )
        config = lsg_patch.get_config(model)
        assert (config.block_size, config.sparsity_type) == (64, "none") and config.mask_first_token
        rows = load_file(saved / "model.safetensors")["bert.embeddings.global_embeddings.weight"]
        assert torch.equal(lsg_patch.global_embeddings(model), rows[:16])

    def test_another_class_and_its_keywords(self, saved: Path) -> None:
        for cls in (
            transformers.BertForSequenceClassification,
            transformers.AutoModelForSequenceClassification,
        ):
            model, info = lsg_patch.from_pretrained(
                saved, cls, num_labels=5, output_loading_info=True
            )
            assert type(model) is transformers.BertForSequenceClassification
            assert model.config.num_labels == 5 and "classifier.weight" in info["missing_keys"]
        model = lsg_patch.from_pretrained(saved, torch_dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_another_length(self, saved: Path) -> None:
        model = lsg_patch.from_pretrained(saved, max_position_embeddings=300)
        table = model.bert.embeddings.position_embeddings.weight
        stored = load_file(saved / "model.safetensors")[
            "bert.embeddings.position_embeddings.weight"
        ]
        assert torch.equal(table, torch.cat([stored, stored[:100]]))

    def test_a_base_models_names(self, saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        expected = lsg_patch.from_pretrained(saved, transformers.BertModel, add_pooling_layer=False)
        own = {x.removeprefix("bert."): y for x, y in tensors.items() if x.startswith("bert.")}
        save_file(own, saved / "model.safetensors", {"format": "pt"})
        for cls in (transformers.BertModel, transformers.AutoModel):
            model = lsg_patch.from_pretrained(saved, cls, add_pooling_layer=False)
            assert model.name_or_path == str(saved)
            for name, value in expected.state_dict().items():
                assert torch.equal(model.state_dict()[name], value), name

    def test_words_that_only_a_head_has(self, saved: Path) -> None:
        """4.x would read them, and tie the head to a new table."""
        tensors = load_file(saved / "model.safetensors")
        words = tensors.pop("bert.embeddings.word_embeddings.weight")
        tensors["cls.predictions.decoder.weight"] = words
        save_file(tensors, saved / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks .*embeddings.word_embeddings.weight"):
            lsg_patch.from_pretrained(saved)

    def test_sharded(self, saved: Path) -> None:
        """Files and an index of them; as the hub has large ones."""
        tensors = load_file(saved / "model.safetensors")
        expected = lsg_patch.from_pretrained(saved).state_dict()
        (saved / "model.safetensors").unlink()
        names = sorted(tensors)
        index = {}
        for part in range(2):
            file = f"pytorch_model-0000{part + 1}-of-00002.bin"
            torch.save({name: tensors[name] for name in names[part::2]}, saved / file)
            index.update(dict.fromkeys(names[part::2], file))
        (saved / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        )
        for name, value in lsg_patch.from_pretrained(saved).state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_a_decoder_alone_is_what_it_was(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The reference leaves decoders of encoder-decoders as they are."""
        whole = seq2seq.tiny_model("bart", "ForConditionalGeneration")
        lsg_patch.patch_model(whole, max_position_embeddings=200)
        published.write(whole, tmp_path, architectures=["LSGBartForCausalLM"])
        decoder = transformers.BartForCausalLM(whole.config)
        decoder.save_pretrained(tmp_path / "own")
        for file in (tmp_path / "own").glob("*model*"):
            shutil.copy(file, tmp_path)
        if not (tmp_path / "own" / "model.safetensors").exists():
            (tmp_path / "model.safetensors").unlink()
        with lsg_patch.auto_patching():
            transformers.BartForCausalLM.from_pretrained(tmp_path)
        model = lsg_patch.from_pretrained(tmp_path)
        assert "decoder alone" in caplog.text and not lsg_patch.is_patched(model)
        for name, value in decoder.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_nothing_of_it_is_imported(self, saved: Path) -> None:
        before = set(sys.modules)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            lsg_patch.from_pretrained(saved, trust_remote_code=True)
        lsg_patch.from_pretrained(saved)
        lsg_patch.from_pretrained(saved, transformers.AutoModel)
        assert not (saved / "RAN").exists()
        assert not [name for name in set(sys.modules) - before if "transformers_modules" in name]
