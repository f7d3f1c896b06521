"""Pipelines and modules that hold a tokenizer: what they truncate at while patched, and after it."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lsg_patch
from tests.models import CLS, POSITIONS, tiny_model
from tests.test_patching import assert_bitwise, fingerprint, values
from tests.tokenizers import real_tokenizer, text_of, tokenizer_like

LENGTH = 200
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": LENGTH,
}
HEADS = {
    "text-classification": "BertForSequenceClassification",
    "zero-shot-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "feature-extraction": "BertModel",
    "fill-mask": "BertForMaskedLM",
}
ZERO_SHOT = {"id2label": {0: "no", 1: "entailment"}, "label2id": {"no": 0, "entailment": 1}}


def pipeline_of(task: str, tokenizer: Any, **kwargs: Any) -> Any:
    head = getattr(transformers, HEADS.get(task, "BertForQuestionAnswering"))
    overrides = ZERO_SHOT if task == "zero-shot-classification" else {}
    model = tiny_model("bert", head, **overrides)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device=-1, **kwargs)


@contextmanager
def lengths_read(model: nn.Module) -> Iterator[list[int]]:
    """The lengths of the inputs that reach ``model``."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def records(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    own = [r for r in caplog.records if r.name.startswith("lsg_patch") and r.levelno == level]
    return [r.getMessage() for r in own]


class TestPipelines:
    @pytest.mark.parametrize("task", HEADS)
    def test_one_line_makes_it_read_long_texts(self, task: str, tmp_path: Path) -> None:
        truncated = {"truncation": True}
        given: dict[str, Any] = {
            "text-classification": truncated,
            "feature-extraction": truncated,
            "fill-mask": {"tokenizer_kwargs": truncated},
        }.get(task, {})
        asked: dict[str, Any] = {}
        if task == "zero-shot-classification":
            asked = {"candidate_labels": ["w7"], "hypothesis_template": "w5 {}"}
        pipe = pipeline_of(task, real_tokenizer(tmp_path), **given)
        text = "[MASK] " + text_of(149)
        before, held, own = fingerprint(pipe.model), set(vars(pipe)), values(pipe.model)

        def lengths() -> list[int]:
            with lengths_read(pipe.model) as seen:
                pipe(text, **asked)
            return seen

        assert lengths() == [POSITIONS]
        assert lsg_patch.patch_model(pipe, **SETTINGS) is pipe
        assert lsg_patch.is_patched(pipe) and lsg_patch.is_patched(pipe.model)
        assert lsg_patch.get_config(pipe).block_size == 8
        rows = lsg_patch.global_embeddings(pipe)
        assert rows is lsg_patch.global_embeddings(pipe.model)
        assert lengths() == [155 if task == "zero-shot-classification" else 152]
        lsg_patch.freeze_except_global(pipe, train_head=False)
        assert [p for p in pipe.model.parameters() if p.requires_grad] == [rows]
        pipe.model.requires_grad_(True)
        assert lsg_patch.unpatch_model(pipe) is pipe
        assert not lsg_patch.is_patched(pipe)
        assert pipe.tokenizer.model_max_length == POSITIONS
        assert lengths() == [POSITIONS]
        assert fingerprint(pipe.model) == before and set(vars(pipe)) == held
        assert_bitwise(values(pipe.model), own)
        with pytest.raises(ValueError, match="is not patched"):
            lsg_patch.unpatch_model(pipe)

    def test_a_with_block(self, tmp_path: Path) -> None:
        pipe = pipeline_of("text-classification", real_tokenizer(tmp_path))
        with lsg_patch.patched(pipe, **SETTINGS) as given:
            assert given is pipe and pipe.tokenizer.model_max_length == LENGTH
            pipe(text_of(150))
        assert pipe.tokenizer.model_max_length == POSITIONS

    def test_reverted_by_its_model(self, tmp_path: Path) -> None:
        pipe = pipeline_of("text-classification", real_tokenizer(tmp_path))
        held = set(vars(pipe))
        lsg_patch.patch_model(pipe, **SETTINGS)
        lsg_patch.unpatch_model(pipe.model)
        assert pipe.tokenizer.model_max_length == POSITIONS and set(vars(pipe)) == held

    def test_a_copy_has_limits_of_its_own(self, tmp_path: Path) -> None:
        pipe = pipeline_of("text-classification", real_tokenizer(tmp_path))
        lsg_patch.patch_model(pipe, **SETTINGS)
        clone = copy.deepcopy(pipe)
        lsg_patch.unpatch_model(clone)
        assert clone.tokenizer.model_max_length == POSITIONS
        assert pipe.tokenizer.model_max_length == LENGTH and lsg_patch.is_patched(pipe)
        lsg_patch.unpatch_model(pipe)
        assert pipe.tokenizer.model_max_length == POSITIONS

    def test_a_length_that_was_chosen_stays_and_is_told_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = real_tokenizer(tmp_path)
        pipe = pipeline_of("text-classification", tokenizer, truncation=True, max_length=40)
        lsg_patch.patch_model(pipe, **SETTINGS)
        with lengths_read(pipe.model) as seen:
            pipe(text_of(150))
        assert seen == [40]
        (message,) = records(caplog, logging.WARNING)
        assert "max_length=40 of TextClassificationPipeline" in message and "200" in message
        pipe = pipeline_of(
            "fill-mask", tokenizer, tokenizer_kwargs={"truncation": True, "max_length": 30}
        )
        caplog.clear()
        lsg_patch.patch_model(pipe, **SETTINGS)
        (message,) = records(caplog, logging.WARNING)
        assert "max_length=30 of FillMaskPipeline" in message

    @pytest.mark.skipif(  # not every transformers has this pipeline
        not hasattr(transformers, "QuestionAnsweringPipeline"),
        reason="this transformers has no pipeline for question answering (5.x)",
    )
    def test_question_answering_reads_a_text_at_once(self, tmp_path: Path) -> None:
        """By itself it cuts texts to windows of at most 384 tokens."""
        pipe = pipeline_of("question-answering", real_tokenizer(tmp_path))
        settings = {**SETTINGS, "max_position_embeddings": 500}

        def lengths(text: str) -> list[int]:
            with lengths_read(pipe.model) as seen:
                pipe(question="w5 w6", context=text)
            return seen

        windows = lengths(text_of(450))
        assert len(windows) > 8 and max(windows) == POSITIONS
        with lsg_patch.patched(pipe, **settings):
            assert lengths(text_of(450)) == [455]
            assert lengths(text_of(10)) == [15]
        assert pipe._preprocess_params == {}
        assert lengths(text_of(450)) == windows
        chosen = pipeline_of("question-answering", real_tokenizer(tmp_path), max_seq_len=50)
        with lsg_patch.patched(chosen, **settings):
            assert chosen._preprocess_params == {"max_seq_len": 50}
        assert chosen._preprocess_params == {"max_seq_len": 50}

    def test_what_is_no_model_is_refused(self) -> None:
        for given in (3, SimpleNamespace(model="bert", tokenizer=None), nn.Linear(2, 2)):
            with pytest.raises(TypeError):
                lsg_patch.patch_model(given, **SETTINGS)


class Encoder(nn.Module):
    """As sentence-transformers before 6.0 has it: its own limit is handed to the tokenizer."""

    def __init__(self, tokenizer: Any, max_seq_length: int | None) -> None:
        super().__init__()
        self.auto_model = tiny_model("bert")
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length


class Whole(nn.Sequential):
    """A whole of modules, of which the first tokenizes."""

    @property
    def tokenizer(self) -> Any:
        return self[0].tokenizer


def whole(max_seq_length: int | None = 32, **ids: int) -> Any:
    return Whole(Encoder(tokenizer_like(**ids), max_seq_length), nn.Linear(32, 8))


def limits(model: Any) -> tuple[int, int | None]:
    return model[0].tokenizer.model_max_length, model[0].max_seq_length


class TestModules:
    def test_limits_are_raised_and_put_back(self, caplog: pytest.LogCaptureFixture) -> None:
        model = whole()
        before = fingerprint(model)
        with (
            caplog.at_level(logging.INFO, logger="lsg_patch"),
            lsg_patch.patched(model, **SETTINGS),
        ):
            assert limits(model) == (LENGTH, LENGTH)
        assert limits(model) == (POSITIONS, 32) and fingerprint(model) == before
        told = [text for text in records(caplog, logging.INFO) if "instead of" in text]
        assert told == [
            "model_max_length of Encoder is 200 instead of 64",
            "max_seq_length of Encoder is 200 instead of 32",
        ]
        assert not records(caplog, logging.WARNING)

    def test_no_limit_of_its_own(self) -> None:
        model = whole(None)
        with lsg_patch.patched(model, **SETTINGS):
            assert limits(model) == (LENGTH, None)
        assert limits(model) == (POSITIONS, None)

    def test_token_ids_come_from_it(self) -> None:
        model = whole(cls_token_id=9)
        lsg_patch.patch_model(model, **SETTINGS)
        embeddings = model[0].auto_model.embeddings
        expected = (
            embeddings.word_embeddings.weight[9]
            + embeddings.position_embeddings.weight[0]
            + embeddings.token_type_embeddings.weight[0]
        )
        torch.testing.assert_close(lsg_patch.global_embeddings(model)[0], expected)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_has_limits_of_its_own(self, copied: Any) -> None:
        model = lsg_patch.patch_model(whole(), **SETTINGS)
        clone = copied(model)
        lsg_patch.unpatch_model(clone)
        assert limits(clone) == (POSITIONS, 32) and limits(model) == (LENGTH, LENGTH)
        clone = copied(model)
        lsg_patch.unpatch_model(model)
        assert limits(model) == (POSITIONS, 32) and limits(clone) == (LENGTH, LENGTH)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_of_the_base_model_has_no_part_in_them(self, copied: Any) -> None:
        model = lsg_patch.patch_model(whole(), **SETTINGS)
        model[0].tokenizer.vocabulary = "many words"
        assert b"many words" in pickle.dumps(model)
        assert b"many words" not in pickle.dumps(model[0].auto_model)
        lsg_patch.unpatch_model(copied(model[0].auto_model))
        assert limits(model) == (LENGTH, LENGTH)
        lsg_patch.unpatch_model(model[0].auto_model)  # but the model itself has
        assert limits(model) == (POSITIONS, 32)
        assert not any(vars(module).get("_lsg_record") for module in model.modules())

    # by hand while patched, and what it is after the revert
    @pytest.mark.parametrize(
        ("by_hand", "after"), [(None, 32), (LENGTH, 32), (8192, 32), (2000, 32), (33, 32), (32, 32), (20, 20)]
    )  # fmt: skip
    def test_a_limit_that_was_changed_by_hand(self, by_hand: int | None, after: int) -> None:
        model = lsg_patch.patch_model(whole(), **SETTINGS)
        if by_hand:
            model[0].max_seq_length = by_hand
            model[0].tokenizer.model_max_length = by_hand
        lsg_patch.unpatch_model(model)
        expected = POSITIONS if by_hand in (None, LENGTH) or by_hand > POSITIONS else by_hand
        assert limits(model) == (expected, after)

    @pytest.mark.parametrize(("by_hand", "after"), [(None, 10**30), (100, 10**30), (50, 50)])
    def test_a_tokenizer_without_limit(self, by_hand: int | None, after: int) -> None:
        """A limit by hand may stay if the unpatched model reads so many."""
        tokenizer = tokenizer_like()
        tokenizer.model_max_length = 10**30
        model = tiny_model("bert")
        with lsg_patch.patched(model, tokenizer=tokenizer, **SETTINGS):
            assert tokenizer.model_max_length == LENGTH
            tokenizer.model_max_length = by_hand or LENGTH
        assert tokenizer.model_max_length == after

    def test_positions_that_no_token_has_are_not_counted(self) -> None:
        """Of RoBERTa's 64 + 2 rows two are none of a text's."""
        tokenizer = tokenizer_like()
        tokenizer.model_max_length = 10**30
        model = tiny_model("roberta")
        readable = model.config.max_position_embeddings - 2
        for by_hand, after in ((readable + 1, 10**30), (readable, readable)):
            with lsg_patch.patched(model, tokenizer=tokenizer, **SETTINGS):
                tokenizer.model_max_length = by_hand
            assert tokenizer.model_max_length == after

    def test_a_processor_and_a_tokenizer_that_is_given(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Reader(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = tiny_model("bert")
                self.processor = SimpleNamespace(tokenizer=tokenizer_like())

        model, given = Reader(), tokenizer_like()
        with lsg_patch.patched(model, tokenizer=given, **SETTINGS):
            assert given.model_max_length == LENGTH
            assert model.processor.tokenizer.model_max_length == LENGTH
        assert given.model_max_length == model.processor.tokenizer.model_max_length == POSITIONS
        same = model.processor.tokenizer
        with caplog.at_level(logging.INFO, logger="lsg_patch"):
            lsg_patch.patch_model(model, tokenizer=same, **SETTINGS)
        assert len([x for x in records(caplog, logging.INFO) if "instead of" in x]) == 1
        clone = copy.deepcopy(model)
        lsg_patch.unpatch_model(model)
        assert same.model_max_length == POSITIONS
        lsg_patch.unpatch_model(clone)
        assert clone.processor.tokenizer.model_max_length == POSITIONS

    def test_what_tokenizes_for_another_is_left_alone(self) -> None:
        class Routes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tokenizer = tokenizer_like()
                self.query = nn.Linear(2, 2)
                self.document = whole()

        model = Routes()
        with lsg_patch.patched(model, **SETTINGS):
            assert limits(model.document) == (LENGTH, LENGTH)
            assert model.tokenizer.model_max_length == POSITIONS

    def test_no_module_but_a_model_and_a_tokenizer(self) -> None:
        """As CrossEncoder before 4.0 of sentence-transformers."""

        class Scorer:
            def __init__(self, max_length: int | None) -> None:
                self.model = tiny_model("bert", transformers.BertForSequenceClassification)
                self.tokenizer = tokenizer_like()
                self.max_length = max_length

        for own in (None, 48):
            scorer = Scorer(own)
            with lsg_patch.patched(scorer, **SETTINGS):
                assert scorer.max_length == (own and LENGTH)
                assert scorer.tokenizer.model_max_length == LENGTH
            assert (scorer.max_length, scorer.tokenizer.model_max_length) == (own, POSITIONS)

    def test_a_limit_that_cannot_be_set(self) -> None:
        class Fixed:
            cls_token_id = CLS

            @property
            def model_max_length(self) -> int:
                return POSITIONS

        model = tiny_model("bert")
        before = fingerprint(model)
        with pytest.raises(AttributeError):
            lsg_patch.patch_model(model, tokenizer=Fixed(), **SETTINGS)
        assert fingerprint(model) == before

    def test_where_nothing_is_found_one_line_says_so(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        (message,) = records(caplog, logging.WARNING)
        assert "truncated elsewhere" in message and "tokenizer=" in message
        caplog.clear()
        lsg_patch.patch_model(tiny_model("bert"), tokenizer=tokenizer_like(), **SETTINGS)
        lsg_patch.patch_model(whole(), **SETTINGS)
        assert not records(caplog, logging.WARNING)


@pytest.mark.parametrize("length", [LENGTH, 2 * LENGTH])
@pytest.mark.parametrize("reverted_first", [0, 1])
def test_a_tokenizer_of_two_models(length: int, reverted_first: int) -> None:
    """It goes on serving the one that is patched still, and is what it was after both."""
    tokenizer, models = tokenizer_like(), [tiny_model("bert"), tiny_model("bert")]
    lengths = [LENGTH, length]
    for model, own in zip(models, lengths, strict=True):
        settings = {**SETTINGS, "max_position_embeddings": own}
        lsg_patch.patch_model(model, tokenizer=tokenizer, **settings)
    lsg_patch.unpatch_model(models[reverted_first])
    assert tokenizer.model_max_length == lengths[1 - reverted_first]
    lsg_patch.unpatch_model(models[1 - reverted_first])
    assert tokenizer.model_max_length == POSITIONS


def test_a_tokenizer_of_a_model_that_is_gone() -> None:
    tokenizer, model = tokenizer_like(), tiny_model("bert")
    lsg_patch.patch_model(tiny_model("bert"), tokenizer=tokenizer, **SETTINGS)
    gc.collect()
    tokenizer.model_max_length = POSITIONS
    with lsg_patch.patched(model, tokenizer=tokenizer, **SETTINGS):
        pass
    assert tokenizer.model_max_length == POSITIONS
