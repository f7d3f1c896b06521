"""Checkpoints that are broken, or meant to do harm: refused by name, nothing of them run.

Each is a small change of a good one, in our format and in the reference's.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lsg_patch
from tests import models, published

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = f"{BIN}.index.json"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
PLACES = "bert.embeddings.position_embeddings.weight"
ROWS = "bert.embeddings.global_embeddings.weight"
WIDE = "bert.encoder.layer.0.intermediate.dense.weight"
HEAD = "classifier.weight"


class Case(NamedTuple):
    """A change of a checkpoint, and what its refusal says: the place, the value or the reason, the mend."""

    name: str
    change: Callable[[Path], None]
    said: str


class Code:
    """Its pickle runs code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "RAN"),)


def weights(**changed: Any) -> Callable[[Path], None]:
    """Other weights, by their names with __ for a dot; None: without it, a function: made of it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / SAFE)
        for key, value in changed.items():
            name = key.replace("__", ".")
            old = tensors.pop(name, None)
            value = value(old) if callable(value) else value
            if value is not None:
                tensors[name] = value.contiguous()
        save_file(tensors, folder / SAFE, {"format": "pt"})

    return change


def weight(name: str, value: Any) -> Callable[[Path], None]:
    return weights(**{name.replace(".", "__"): value})


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def pickled(make: Callable[[dict[str, Any], Path], Any], **how: Any) -> Callable[[Path], None]:
    """A pickle in place of the weights."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / SAFE)
        (folder / SAFE).unlink()
        torch.save(make(tensors, folder), folder / BIN, **how)

    return change


def plain_pickle(folder: Path) -> None:
    (folder / SAFE).unlink()
    (folder / BIN).write_bytes(pickle.dumps({"a": Code(folder)}))


def sharded(change: Callable[[dict[str, Any]], Any], code: bool = False) -> Callable[[Path], None]:
    """Two files and an index, which ``change`` makes another."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / SAFE)
        (folder / SAFE).unlink()
        names = sorted(tensors)
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, part in parts.items():
            held: dict[str, Any] = {name: tensors[name] for name in part}
            torch.save({**held, **({"x": Code(folder)} if code else {})}, folder / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / INDEX).write_text(json.dumps(change(index)))

    return split


def mapped(file: Any) -> Callable[[Path], None]:
    return sharded(lambda index: {"weight_map": {**index["weight_map"], QUERY: file}})


def config(**changed: Any) -> Callable[[Path], None]:
    """Other values in config.json; ``...``: without the key."""

    def change(folder: Path) -> None:
        stated = {**json.loads((folder / "config.json").read_text()), **changed}
        kept = {key: value for key, value in stated.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def setting(**changed: Any) -> Callable[[Path], None]:
    """Other settings, where the format has them."""

    def change(folder: Path) -> None:
        stated = json.loads((folder / "config.json").read_text())
        (stated.get("lsg_patch", stated)).update(changed)
        (folder / "config.json").write_text(json.dumps(stated))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


FIT = "correct it, or save or fetch the checkpoint again"
AGAIN = "[Ss]ave or fetch it again"
CASES = [
    # files of weights
    Case("no weights", lambda folder: (folder / SAFE).unlink(), f"no file of weights.*{FIT}"),
    Case("an empty file", bytes_of(SAFE, lambda _: b""), f"{SAFE} cannot be read.*{AGAIN}"),
    Case("half a file", bytes_of(SAFE, lambda x: x[: len(x) // 2]), f"{SAFE} cannot .*{AGAIN}"),
    Case("all but its end", bytes_of(SAFE, lambda x: x[:-4]), f"{SAFE} cannot be read.*{AGAIN}"),
    Case("half a header", bytes_of(SAFE, lambda x: x[:40]), f"{SAFE} cannot be read.*{AGAIN}"),
    Case("an endless header", bytes_of(SAFE, lambda x: b"\xff" * 8 + x[8:]), f"{SAFE} .*{AGAIN}"),
    Case("a text", text(SAFE, "weights"), f"{SAFE} cannot be read.*{AGAIN}"),
    Case("no weights in it", lambda folder: save_file({}, folder / SAFE), "no file of weights"),
    # weights
    Case("without a projection", weight(QUERY, None), f"lacks {QUERY}.*{FIT}"),
    Case("without words", weight(WORDS, None), f"lacks .*word_embeddings.weight: {FIT}"),
    Case("without its head", weight(HEAD, None), f"lacks {HEAD}.*{FIT}"),
    Case("without global tokens", weight(ROWS, None), "has 0 weights .*global_embeddings.weight"),
    Case(
        "a narrow projection", weight(QUERY, lambda x: x[:, :31]), f"another shape {QUERY}.*{FIT}"
    ),
    Case("a turned projection", weight(WIDE, lambda x: x.T), f"another shape {WIDE}.*{FIT}"),
    Case("a flat one", weight(QUERY, lambda x: x.flatten()), f"another shape {QUERY}.*{FIT}"),
    Case("too few words", weight(WORDS, lambda x: x[:-1]), f"another shape {WORDS}.*{FIT}"),
    Case("too few positions", weight(PLACES, lambda x: x[:-9]), f"another shape {PLACES}.*{FIT}"),
    Case("a head of others", weight(HEAD, torch.ones(7, 32)), f"another shape {HEAD}.*{FIT}"),
    Case(
        "narrow global tokens",
        weight(ROWS, lambda x: x[:, 1:]),
        r"shape \(\d+, 31\).*save it again",
    ),
    Case("too few global tokens", weight(ROWS, lambda x: x[:1]), r"shape \(1, 32\).*save it again"),
    Case("flat global tokens", weight(ROWS, lambda x: x[:, 0]), r"shape \(\d+,\).*save it again"),
    Case("one more", weight("bert.more", torch.ones(3)), f"no place .*bert.more.*{FIT}"),
    Case(
        "a layer more",
        weight(QUERY.replace("1", "2"), torch.ones(32, 32)),
        f"no place in the model for {QUERY.replace('1', '2')}.*{FIT}",
    ),
    Case("whole numbers", weight(QUERY, lambda x: x.long()), f"has {QUERY} as .*int64.*{FIT}"),
    Case("bytes", weight(QUERY, lambda x: x.to(torch.int8)), f"has {QUERY} as .*{FIT}"),
    Case("true and false", weight(WORDS, lambda x: x > 0), f"has {WORDS} as .*{FIT}"),
    Case("eight bits", weight(QUERY, lambda x: x.to(torch.float8_e5m2)), f"has {QUERY} as .*{FIT}"),
    Case("whole global tokens", weight(ROWS, lambda x: x.long()), f"has {ROWS} as .*int64.*{FIT}"),
    # pickles
    Case("code", pickled(lambda x, at: {**x, "x": Code(at)}), f"{BIN} cannot be read.*{AGAIN}"),
    Case("code alone", pickled(lambda x, at: Code(at)), f"{BIN} cannot be read.*{AGAIN}"),
    Case(
        "code as before torch 1.6",
        pickled(lambda x, at: {**x, "x": Code(at)}, _use_new_zipfile_serialization=False),
        f"{BIN} cannot be read.*{AGAIN}",
    ),
    Case("a plain pickle", plain_pickle, f"{BIN} cannot be read.*{AGAIN}"),
    Case("a list", pickled(lambda x, at: list(x.values())), f"{BIN} cannot be read.*{AGAIN}"),
    Case("a number among them", pickled(lambda x, at: {**x, "n": 5}), f"'n' is a int.*{AGAIN}"),
    Case("a whole pickle of numbers", pickled(lambda x, at: {**x, QUERY: x[QUERY].int()}), FIT),
    Case("code in a shard", sharded(lambda x: x, code=True), f"bin cannot be read.*{AGAIN}"),
    # an index
    Case("a file above", mapped("../b.bin"), r"names the file '\.\./b.bin'.*take it out"),
    Case(
        "a file of the system", mapped("/etc/passwd"), "names the file '/etc/passwd'.*take it out"
    ),
    Case("backslashes", mapped("..\\b.bin"), "names the file .*take it out"),
    Case("a number", mapped(5), "names the file 5.*take it out"),
    Case("one that is not there", mapped("c.bin"), f"'c.bin', which is not there.*{AGAIN}"),
    Case("nothing", sharded(lambda x: {}), "weight_map=None.*save it again"),
    Case("no files", sharded(lambda x: {"weight_map": {}}), "weight_map={}.*save it again"),
    Case(
        "a list of files", sharded(lambda x: {"weight_map": ["a.bin"]}), r"weight_map=\['a.bin'\]"
    ),
    Case("a list alone", sharded(lambda x: []), "not an object: save it again"),
    # what is in config.json and not of LSG
    Case("no config", lambda folder: (folder / "config.json").unlink(), "no config.json"),
    Case("no JSON", text("config.json", "{"), f"config.json is not JSON.*{AGAIN}"),
    Case("a list", text("config.json", "[]"), "config.json holds a list.*save it again"),
    Case("lists in lists", text("config.json", "[" * 10**5), f"config.json is not JSON.*{AGAIN}"),
    Case("a long number", text("config.json", '{"a": ' + "9" * 9999 + "}"), f"not JSON.*{AGAIN}"),
    Case("other bytes", bytes_of("config.json", lambda x: b"\xff\xfe" + x), f"not JSON.*{AGAIN}"),
    Case("hidden_size huge", config(hidden_size=10**12), f"hidden_size=10+, more than.*{FIT}"),
    Case("hidden_size negative", config(hidden_size=-32), f"hidden_size=-32, which.*{FIT}"),
    Case("hidden_size a text", config(hidden_size="32"), f"hidden_size='32', which.*{FIT}"),
    Case("hidden_size true", config(hidden_size=True), f"hidden_size=True, which.*{FIT}"),
    Case("hidden_size half", config(hidden_size=32.5), f"hidden_size=32.5, which.*{FIT}"),
    Case("hidden_size another", config(hidden_size=36), r"32\).*36\).*save"),
    Case("vocab_size huge", config(vocab_size=10**11), f"vocab_size=10+, more than.*{FIT}"),
    Case("vocab_size another", config(vocab_size=121), f"another shape {WORDS}.*{FIT}"),
    Case(
        "type_vocab_size another", config(type_vocab_size=3), f"another shape .*token_type.*{FIT}"
    ),
    Case("layers without end", config(num_hidden_layers=10**9), f"num_hidden_layers=10+, .*{FIT}"),
    Case("a layer more in the config", config(num_hidden_layers=3), f"lacks .*layer.2.*{FIT}"),
    Case("a layer fewer", config(num_hidden_layers=1), f"no place .*layer.1.*{FIT}"),
    Case("heads that do not divide", config(num_attention_heads=5), "does not load as Bert.*5"),
    Case("no heads", config(num_attention_heads=0), "does not load as Bert.*ZeroDivision"),
    Case("heads without end", config(num_attention_heads=10**15), "num_attention_heads=10+, more"),
    Case("intermediate_size negative", config(intermediate_size=-1), "intermediate_size=-1, which"),
    Case("labels without end", config(num_labels=10**12), f"num_labels=10+, more than.*{FIT}"),
    Case("id2label a number", config(id2label=5), f"id2label=5, which must be .*dict.*{FIT}"),
    Case("a word for padding", config(pad_token_id="x"), "pad_token_id='x'"),
    Case("padding beyond the words", config(pad_token_id=10**9), "does not load as Bert"),
    Case("a word for a rate", config(hidden_dropout_prob="x"), "hidden_dropout_prob='x', which"),
    Case("a rate of 7", config(hidden_dropout_prob=7.0), "does not load as Bert.*7"),
    Case(
        "no number for a rate", config(hidden_dropout_prob=float("nan")), "=nan, which must be fin"
    ),
    Case("no such function", config(hidden_act="magic"), "does not load as Bert.*magic"),
    Case("a number for a function", config(hidden_act=5), "hidden_act=5, which must be .*str"),
    Case("another kind", config(model_type="gpt2"), "model_type='gpt2'"),
    Case("no kind", config(model_type=...), "model_type=None"),
    Case("a list for a kind", config(model_type=["bert"]), "model_type=.*bert"),
    Case("code of its own", config(model_type="mine"), "model_type='mine'"),
    Case("code of a hub", config(_attn_implementation="evil/code"), "'evil/code', .*take it out"),
    Case("no class", config(architectures=["Nothing"]), r"architectures=\['Nothing'\]"),
    Case("a module", config(architectures=["utils"]), r"architectures=\['utils'\]"),
    Case("another class", config(architectures=["GPT2Model"]), "model_type='bert', .*GPT2Model"),
    Case("the class of all", config(architectures=["PreTrainedModel"]), "architectures="),
    Case("a class above", config(architectures=["../code.py"]), "architectures="),
    # what is of LSG
    Case("max_position_embeddings huge", config(max_position_embeddings=10**12), "max_position"),
    Case("max_position_embeddings negative", setting(max_position_embeddings=-5), "max_position_"),
    Case("max_position_embeddings a text", setting(max_position_embeddings="x"), "max_pos.*'x'"),
    Case("block_size 0", setting(block_size=0), "block_size .*0"),
    Case("block_size negative", setting(block_size=-16), "block_size .*-16"),
    Case("block_size a text", setting(block_size="16"), "block_size .*'16'"),
    Case("block_size of another factor", setting(block_size=17), "block_size.*17"),
    Case("sparsity_type unknown", setting(sparsity_type="magic"), "sparsity_type .*'magic'"),
    Case("sparse_block_size negative", setting(sparse_block_size=-8), "sparse_block_size .*-8"),
    Case("sparsity_factor a text", setting(sparsity_factor="2"), "sparsity_factor .*'2'"),
    Case("num_global_tokens 513", setting(num_global_tokens=513), "num_global_tokens .*513"),
    Case("num_global_tokens negative", setting(num_global_tokens=-1), "num_global_tokens .*-1"),
    Case("num_global_tokens a list", setting(num_global_tokens=[1]), r"num_global_tokens .*\[1\]"),
    Case("mask_first_token a text", setting(mask_first_token="yes"), "mask_first_token .*'yes'"),
    Case("adaptive a number", setting(adaptive=1), "adaptive .*1"),
    Case("pool_with_global null", setting(pool_with_global=None), "pool_with_global .*None"),
    Case("lsh_num_pre_rounds half", setting(lsh_num_pre_rounds=0.5), "lsh_num_pre_rounds .*0.5"),
]


@pytest.fixture(scope="module", params=["ours", "published"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "good"
    model = models.tiny_model("bert", transformers.BertForSequenceClassification, num_labels=3)
    lsg_patch.patch_model(
        model,
        block_size=16,
        sparse_block_size=16,
        max_position_embeddings=200,
        num_global_tokens=2,
        mask_first_token=False,
    )
    if request.param == "published":
        return published.write(model, folder)
    model.save_pretrained(folder)
    if not (folder / SAFE).exists():  # before 4.35 it was no default
        tensors = torch.load(folder / BIN, weights_only=True)
        save_file({name: x.clone() for name, x in tensors.items()}, folder / SAFE, {"format": "pt"})
        (folder / BIN).unlink()
    return folder


def test_the_good_one(good: Path) -> None:
    assert lsg_patch.is_patched(lsg_patch.from_pretrained(good))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused(good: Path, case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(good, folder)
    (folder / "code.py").write_text(f"import os; os.mkdir({str(folder / 'RAN')!r})")
    config(auto_map={"AutoModel": "code.Model", "AutoConfig": "code.Config"})(folder)
    case.change(folder)
    modules, own = set(sys.modules), transformers.PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises((ValueError, OSError), match=f"(?s){case.said}"):
        lsg_patch.from_pretrained(folder)
    assert "RAN" not in os.listdir(folder)
    assert not [x for x in set(sys.modules) - modules if "transformers_modules" in x or x == "code"]
    # nothing is left of the attempt
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is own
    assert "_keys_to_ignore_on_load_unexpected" not in vars(
        transformers.BertForSequenceClassification
    )


def test_there_are_enough() -> None:
    assert len({case.name for case in CASES}) >= 40
