"""Wrong uses: each is refused by name, with the value or the mend, and changes nothing.

Broken checkpoints are in ``tests/test_hostile.py``, wrong command lines also in ``tests/test_cli.py``.
A fuzz of settings, configs and command lines follows; ``LSG_FUZZ_SECONDS=300`` makes it longer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lsg_patch
from lsg_patch import LSGConfig, RelativeBias, cli, lsg_attention
from lsg_patch.config import SavedPatch
from lsg_patch.plots import pattern
from tests.models import tiny_model
from tests.test_patching import fingerprint, values
from tests.tokenizers import real_tokenizer, tokenizer_like

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 99}


class Things(NamedTuple):
    """What is used wrongly."""

    plain: Any
    patched: Any
    checkpoint: Path
    out: Path


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    folder = tmp_path_factory.mktemp("wrong")
    plain, patched = tiny_model("bert", transformers.BertForMaskedLM), tiny_model("bert")
    lsg_patch.patch_model(patched, tokenizer=tokenizer_like(), **SETTINGS)
    plain.save_pretrained(folder / "checkpoint")
    real_tokenizer(folder / "checkpoint")
    return Things(plain, patched, folder / "checkpoint", folder / "out")


def state_of(things: Things) -> Any:
    files = sorted((x.name, x.stat().st_mtime_ns) for x in things.checkpoint.iterdir())
    models = (things.plain, things.patched)
    trained = [[x.requires_grad for x in model.parameters()] for model in models]
    states = [[x.sum().item() for x in values(model).values()] for model in models]
    prints = [fingerprint(model) for model in models]
    return files, trained, states, prints, things.out.exists(), torch.get_rng_state().tolist()


class Case(NamedTuple):
    """A wrong use, the error that it is, and what that says."""

    name: str
    use: Callable[[Things], Any]
    error: type[Exception]
    said: str


def patch(error: str, **wrong: Any) -> Case:
    """A wrong setting."""
    shown = ", ".join(f"{name}={str(value)[:20]}" for name, value in wrong.items())
    return Case(
        f"patch {shown}",
        lambda x: lsg_patch.patch_model(x.plain, **{**SETTINGS, **wrong}),
        ValueError,
        error,
    )


def attend(error: str, **wrong: Any) -> Case:
    """A wrong argument of lsg_attention."""
    shown = ", ".join(
        f"{name}={type(value).__name__ if isinstance(value, Tensor) else str(value)[:20]}"
        for name, value in wrong.items()
    )
    x = torch.ones(2, 2, 45, 4)
    right = {"query": x, "key": x, "value": x, "block_size": 8, "sparse_block_size": 8}
    right |= {"num_global_tokens": 2}
    return Case(f"attend {shown}", lambda _: lsg_attention(**{**right, **wrong}), ValueError, error)


def run_model(name: str, error: str, **wrong: Any) -> Case:
    """A wrong input of a patched model."""
    right = {"input_ids": torch.ones(2, 40, dtype=torch.long)}
    return Case(f"input {name}", lambda x: x.patched(**{**right, **wrong}), ValueError, error)


def call(name: str, use: Callable[[Things], Any], error: type[Exception], said: str) -> Case:
    return Case(name, use, error, said)


def on_what_is_no_model(function: Callable[[Any], Any]) -> list[Case]:
    name = function.__name__
    return [
        Case(
            f"{name} {shown}", lambda _, x=x: function(x), TypeError, f"model must be .*not {kind}"
        )
        for shown, x, kind in (("None", None, "NoneType"), ("name", "bert", "str"))
    ] + [
        Case(
            f"{name} a class", lambda _: function(nn.Module), TypeError, "model must be .*not type"
        ),
        Case(
            f"{name} state dict",
            lambda x: function(x.plain.state_dict()),
            TypeError,
            "model must be",
        ),
        Case(
            f"{name} a pipeline without a model",
            lambda _: function(SimpleNamespace(tokenizer=tokenizer_like(), model=None)),
            TypeError,
            "or a pipeline that holds one",
        ),
    ]


def train_global(model: Any) -> Any:
    return lsg_patch.freeze_except(model, "global")


MASK = torch.ones(2, 40)
WHOLE = "must be a whole number from"
FLAG = "must be True or False, not"
FLOATS = "must be a tensor of floating point numbers, not"
ADDED = "must be 1 for tokens and 0 for padding.*added to scores.*pass"
CASES = [
    # settings
    *(
        patch(rf"{name} {WHOLE} \d+ to \d+, not ", **{name: value})
        for name in (
            "block_size",
            "sparse_block_size",
            "sparsity_factor",
            "num_global_tokens",
            "max_position_embeddings",
            "lsh_num_pre_rounds",
            "global_positional_stride",
            "seed",
        )
        for value in (-1, 2.5, "8", True, [8], 10**30, np.array([8, 8]))
    ),
    *(
        patch(f"position_period .*{WHOLE} 1 to .*, not ", position_period=value)
        for value in (0, "all", 1.5, [1], np.array([1, 2]))
    ),
    patch("position_period=65, but .*64 positions: pass at most 64", position_period=65),
    patch("no tokenizer says .*pass tokenizer=", position_period="trained"),
    *(
        patch(f"{name} {FLAG} ", **{name: value})
        for name in ("pool_with_global", "adaptive", "random_global_init", "mask_first_token", "unpad")
        for value in (1, "no")
    ),
    *(
        patch("sparsity_type must be one of norm, .*, not ", sparsity_type=value)
        for value in ("nrom", "", 1, ["norm"], np.array([1, 2]))
    ),
    *(
        patch("positions must be one of tile, interpolate, not ", positions=value)
        for value in ("tiled", None, ["tile"], np.array([1, 2]))
    ),
    *(
        patch("attention_probs_dropout_prob must be in .*, not ", attention_probs_dropout_prob=value)
        for value in (1.0, -0.1, float("nan"), "0.1", True, np.array([0.1, 0.2]))
    ),
    *(patch("backend must be one of auto, .*, not ", backend=x) for x in ("cuda", None, ["sdpa"])),
    patch("block_size=9 must be a multiple of sparsity_factor=2: pass block_size=10", block_size=9),
    patch("sparse_block_size=7 must be a multiple .*pass sparse_block_size=8", sparse_block_size=7),
    patch("pass num_global_tokens=1 or", mask_first_token=True, num_global_tokens=0),
    patch("pass mask_first_token=False or pool_with_global=True", pool_with_global=False),
    patch("pass positions=\"tile\" or", position_period=8, positions="interpolate"),
    patch("pass adaptive=True or unpad=False", adaptive=False, unpad=True),
    patch("block_size must be .*not {'block_size': 8}", block_size={"block_size": 8}),
    *(
        call(
            f"patch tokenizer={value!r:.20}",
            lambda x, value=value: lsg_patch.patch_model(x.plain, tokenizer=value, **SETTINGS),
            TypeError,
            "tokenizer must be .*pass AutoTokenizer.from_pretrained",
        )
        for value in (5, "bert-base-uncased", [], {})
    ),
    call(
        "a setting of no name",
        lambda x: lsg_patch.patch_model(x.plain, blocksize=8),
        TypeError,
        "'blocksize'",
    ),
    call(
        "settings twice",
        lambda x: lsg_patch.patch_model(x.plain, LSGConfig(), seed=1),
        TypeError,
        "seed as well: put all settings into one",
    ),
    *(
        call(f"from_dict {x!r}", lambda _, x=x: LSGConfig.from_dict(x), ValueError, "a dictionary")
        for x in (None, [], "block_size")
    ),
    *(
        call(f"saved {x!r:.40}", lambda _, x=x: SavedPatch.from_dict(x), ValueError, said)
        for x, said in (
            (None, "must be a dictionary: save the model again"),
            ({}, "format_version must be"),
            ({"format_version": 99}, "pip install --upgrade lsg-patch"),
            ({"format_version": 1, 5: 5}, "wrong setting: keywords must be strings. Take it out"),
            ({"format_version": 1, "bos_id": -1}, f"bos_id {WHOLE}"),
            ({"format_version": 1, "block_size": 0}, "wrong setting: block_size"),
        )
    ),
    # tensors
    *(
        attend(f"{name} {FLOATS} ", **{name: value})
        for name in ("query", "key", "value", "choose_by")
        for value in ([[1.0]], np.ones((2, 2, 45, 4)), torch.ones(2, 2, 45, 4).long())
    ),
    attend("key is torch.float64 on cpu, query", key=torch.ones(2, 2, 45, 4).double()),
    attend("value is torch.float16 on cpu, query", value=torch.ones(2, 2, 45, 4).half()),
    attend("key is .* on meta, query .*alike", key=torch.ones(2, 2, 45, 4, device="meta")),
    *(
        attend(r"query must be \(B, H, N, D\)", query=x, key=x, value=x)
        for x in (torch.ones(2, 0, 45, 4), torch.ones(2, 2, 45, 0), torch.ones(45, 4))
    ),
    *(attend(f"{name} {FLAG} ", **{name: "yes"}) for name in ("is_causal", "first_token_global")),
    *(attend(f"num_global_tokens {WHOLE}", num_global_tokens=x) for x in ("2", 2.0, None, True)),
    attend("num_global_tokens=46 must be from 0 to the 45 rows", num_global_tokens=46),
    attend("dropout_p must be a number from 0 to 1, not 2.0", dropout_p=2.0),
    attend("dropout_p must be a number from 0 to 1, not nan", dropout_p=float("nan")),
    attend("dropout_p must be a number from 0 to 1, not 'x'", dropout_p="x"),
    attend("scale must be a finite number or None, not nan", scale=float("nan")),
    attend("scale must be a finite number or None, not '1'", scale="1"),
    *(attend(f"seed {WHOLE}", sparsity_type="lsh", seed=x) for x in (-1, "5", 0.5, 2**70)),
    *(
        attend("lsh_projections must be of the shapes", sparsity_type="lsh", lsh_projections=x)
        for x in (5, [5], [], torch.ones(2, 4, 4))
    ),
    attend("relative_bias must be a RelativeBias", relative_bias=torch.ones(2, 5)),
    attend("table must be .*H = 2", relative_bias=RelativeBias(torch.ones(3, 5))),
    attend(f"table {FLOATS} list", relative_bias=RelativeBias([1])),
    *(
        attend(
            "positions must be a tensor of whole", relative_bias=RelativeBias(torch.ones(2, 5), x)
        )
        for x in ([1], torch.arange(45.0)[None])
    ),
    attend("padding_mask must be a tensor, not list", padding_mask=[[1] * 43] * 2),
    attend(r"padding_mask must be \(B, T\) = \(2, 43\)", padding_mask=torch.ones(2, 45)),
    *(
        attend(f"padding_mask {ADDED}", padding_mask=torch.zeros(2, 43).index_fill(1, torch.tensor(5), x))
        for x in (-torch.inf, torch.finfo(torch.float32).min, torch.nan)
    ),
    # inputs of a patched model
    *(
        run_model(f"a mask of {x}", f"attention_mask {ADDED}", attention_mask=MASK * x)
        for x in (-torch.inf, torch.finfo(torch.float32).min, torch.nan)
    ),
    run_model("a mask too long", r"\(2, 40\), 1 for tokens", attention_mask=torch.ones(2, 41)),
    run_model("a square mask", r"\(B, T\) = \(2, 40\)", attention_mask=torch.ones(2, 1, 40, 40)),
    run_model("no tokens", "no tokens", input_ids=torch.ones(2, 0, dtype=torch.long)),
    run_model(
        "too long", "100 tokens, .*truncate it, or", input_ids=torch.ones(1, 100, dtype=torch.long)
    ),
    run_model("head_mask", "head_mask is not supported.*pass None", head_mask=torch.ones(2, 4)),
    # models
    *(
        case
        for function in (
            lsg_patch.patch_model,
            lsg_patch.unpatch_model,
            lsg_patch.is_patched,
            lsg_patch.get_config,
            lsg_patch.global_embeddings,
            train_global,
        )
        for case in on_what_is_no_model(function)
    ),
    *(
        call(
            f"{function.__name__} unpatched",
            lambda x, function=function: function(x.plain),
            ValueError,
            r"is not patched: patch_model\(model\) patches it",
        )
        for function in (
            lsg_patch.unpatch_model,
            lsg_patch.get_config,
            lsg_patch.global_embeddings,
            train_global,
        )
    ),
    call("patch twice", lambda x: lsg_patch.patch_model(x.patched), ValueError, "unpatch_model.*first"),
    call(
        "patch a layer", lambda x: lsg_patch.patch_model(x.plain.bert.encoder), TypeError, "known: bert"
    ),
    call(
        "patch two",
        lambda x: lsg_patch.patch_model(nn.ModuleList([x.plain, tiny_model("bert")])),
        ValueError,
        "patch each of them for itself",
    ),
    *(
        call(
            f"freeze {parts}",
            lambda x, parts=parts: lsg_patch.freeze_except(x.patched, *parts),
            ValueError,
            "freeze_except: pass some of global, positions",
        )
        for parts in ((), ("all",), (["global"],), ("global", None), ("positions", "new_positions"))
    ),
    call(
        "an unpatched state dict",
        lambda x: x.patched.load_state_dict(tiny_model("bert").state_dict()),
        RuntimeError,
        "nothing was loaded: .*lsg_patch.auto_patching",
    ),
    call("register a dict", lambda _: lsg_patch.register_family({}), TypeError, "Family is registered"),
    # checkpoints
    *(
        call(f"{f.__name__} {x!r}", lambda t, f=f, x=x: f(x, t.out), error, said)
        for f in (lsg_patch.from_pretrained, lsg_patch.convert)
        for x, error, said in (
            (None, TypeError, "name a folder or a repository .*, not None"),
            (5, TypeError, "name a folder or a repository .*, not 5"),
            ([], TypeError, "name a folder or a repository"),
            ("", OSError, "name the folder or the repository"),
            ("\0", OSError, "name the folder or the repository"),
        )
    ),
    call(
        "from_pretrained of an unpatched one",
        lambda x: lsg_patch.from_pretrained(x.checkpoint),
        ValueError,
        "was not saved patched.*then lsg_patch.patch_model",
    ),
    call(
        "from_pretrained with its code",
        lambda x: lsg_patch.from_pretrained(x.checkpoint, trust_remote_code=True),
        ValueError,
        "no code of a checkpoint is run; leave it out",
    ),
    call(
        "convert into what is there",
        lambda x: lsg_patch.convert(x.checkpoint, x.checkpoint),
        ValueError,
        "exists and is not empty: name another",
    ),
    # pictures
    *(
        call(f"pattern {name}={value!r}", lambda _, how=how: pattern(**how), ValueError, f"{name} {WHOLE}")
        for name, value in (("length", "9"), ("length", 0), ("length", 10**9), ("head", 4), ("head", "0"))
        for how in [{"model_or_config": LSGConfig(), "length": 9, name: value}]
    ),
    # texts in chunks
    *(
        call(
            f"chunks {name}={value!r}",
            lambda x, how=how: lsg_patch.chunk_embeddings(x.patched, **how),
            ValueError,
            said,
        )
        for name, value, said in (
            ("texts", "a text", r"pass a list of them, \[text\]"),
            ("texts", 5, r"pass a list of them, \[text\]"),
            ("chunk_tokens", 0, f"chunk_tokens {WHOLE} 1 to .*, not 0"),
            ("chunk_tokens", "9", f"chunk_tokens {WHOLE} 1 to .*, not '9'"),
            ("overlap", 256, f"overlap {WHOLE} 0 to 255, not 256"),
            ("batch_size", None, f"batch_size {WHOLE} 1 to .*, not None"),
            ("boundaries", "words", 'boundaries=.words.: pass "tokens"'),
            ("boundaries", 5, 'boundaries=5: pass "tokens"'),
            ("boundaries", [], "spans of 0 texts, not of 1"),
            ("tokenizer", 5, "tokenizer is a int, .*fast"),
        )
        for how in [{"tokenizer": SimpleNamespace(is_fast=True), "texts": ["w5"], name: value}]
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_by_name_and_changes_nothing(things: Things, case: Case) -> None:
    before = state_of(things)
    with pytest.raises(case.error, match=case.said) as raised:
        case.use(things)
    assert "Error" not in str(raised.value)  # of something inside
    assert state_of(things) == before


def test_there_are_enough() -> None:
    assert len({case.name for case in CASES}) >= 200


# --- command lines and files that were never thought of -------------------------------------------


CONFIGS: list[dict[str, Any]] = [
    {"model_type": ...},
    {"model_type": 5},
    {"model_type": "x"},
    {"hidden_size": "a"},
    {"hidden_size": -1},
    {"hidden_size": 36},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5},
    {"hidden_act": "zz"},
    {"vocab_size": 5},
    {"num_hidden_layers": 1.5},
    {"pad_token_id": 10**9},
    {"id2label": 7},
    {"dtype": "zz"},
    {"quantization_config": {"a": 1}},
]


def with_config(checkpoint: Path, folder: Path, changed: dict[str, Any]) -> Path:
    shutil.copytree(checkpoint, folder)
    stated = {**json.loads((checkpoint / "config.json").read_text()), **changed}
    kept = {name: value for name, value in stated.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("changed", CONFIGS, ids=str)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_wrong_config_is_one_line_on_the_command_line(
    things: Things, command: str, changed: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    folder = with_config(things.checkpoint, tmp_path / "it", changed)
    assert_told([command, str(folder), *[str(tmp_path / "out")] * (command == "convert")], capsys)
    assert not (tmp_path / "out").exists()


def assert_told(line: list[str], capsys: Any) -> int:
    """A command line that is wrong ends with 2 and a line that begins with the program's name."""
    code = cli.main(line)
    told = capsys.readouterr().err
    assert "Traceback" not in told, (line, told)
    ours = [x for x in told.splitlines() if x.startswith("lsg-patch")]
    assert code == 2 and (len(ours) == 1 or "─ Error ─" in told), (line, code, told)
    return code


PIECES = [
    "",
    "-",
    "--",
    "--json",
    "--json=5",
    "--debug=1",
    "\0",
    "é",
    "9" * 40,
    "-1",
    "0",
    "nan",
    "a/b",
]
OPTIONS = [f"--{field.name.replace('_', '-')}" for field in fields(LSGConfig)]


@st.composite
def _wrong_lines(draw: st.DrawFn) -> list[str]:
    """A line of which every piece may be wrong; nothing of it is a model that exists."""
    command = draw(st.sampled_from(["inspect", "convert", "export", "bench", "families", "", "x"]))
    values = st.one_of(st.sampled_from(PIECES), st.text(max_size=9), st.integers().map(str))
    options = st.tuples(st.sampled_from([*OPTIONS, "--max-length", "--opset"]), values)
    more = draw(st.lists(options, max_size=3))
    names = draw(st.lists(values, max_size=3))
    return [command, *names, *(piece for pair in more for piece in pair), "--no-such-option"]


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(
            ["norm", "lsh", "none", "tile", "trained", "auto", "dense", 1, 2, 4, 8, 64]
        ),
    ),
    lambda x: st.one_of(
        st.lists(x, max_size=3), st.dictionaries(st.text(max_size=5), x, max_size=3)
    ),
    max_leaves=5,
)
NAMES = [field.name for field in fields(LSGConfig)]
SECONDS = float(os.environ.get("LSG_FUZZ_SECONDS", "0"))


def fuzz(check: Callable[[Any], None], strategy: Any, share: float, examples: int) -> None:
    """Rounds of ``examples`` for a ``share`` of the seconds, the first one always the same."""
    until = time.monotonic() + share * SECONDS
    of_round = 0
    while of_round == 0 or time.monotonic() < until:
        run = given(strategy)(check)
        run = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(run)
        seed(of_round)(run)()
        of_round += 1


def assert_names_a_setting(error: ValueError, *others: str) -> None:
    assert any(name in str(error) for name in others or NAMES)


def test_settings_of_any_kind_are_taken_or_refused() -> None:
    """Those that are taken make a patched model that runs, those that are refused name one of them."""
    model, ids = tiny_model("bert"), torch.ones(1, 40, dtype=torch.long)
    before = fingerprint(model)

    def check(given: dict[str, Any]) -> None:
        try:
            config = LSGConfig(**given)
        except ValueError as error:
            assert_names_a_setting(error)
            return
        assert LSGConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        if max(config.max_position_embeddings, config.lsh_num_pre_rounds) > 9999:
            return
        try:
            lsg_patch.patch_model(model, config)
        except ValueError as error:
            assert_names_a_setting(error)
        else:
            with torch.no_grad():
                if config.max_position_embeddings >= 40 and config.adaptive:
                    assert model(ids)[0].isfinite().all()
            lsg_patch.unpatch_model(model)
        assert fingerprint(model) == before

    drawn = dict.fromkeys(NAMES, ANYTHING)
    fuzz(check, st.fixed_dictionaries({}, optional=drawn), 0.2, 100)
    likely = {
        "block_size": st.sampled_from([1, 2, 3, 4, 8, 100]),
        "sparse_block_size": st.sampled_from([0, None, 1, 2, 4, 8, 100]),
        "sparsity_factor": st.sampled_from([0, None, 1, 2, 4, 8]),
        "sparsity_type": st.sampled_from(["norm", "lsh", "pooling", "stride", "bos_pooling", None]),
        "num_global_tokens": st.integers(0, 5),
        "max_position_embeddings": st.integers(1, 99),
        "global_positional_stride": st.integers(1, 1 << 24),
        "lsh_num_pre_rounds": st.integers(0, 3),
        "position_period": st.sampled_from([None, 1, 20, 64, 65]),
        "positions": st.sampled_from(["tile", "interpolate"]),
        "pool_with_global": st.booleans(),
        "mask_first_token": st.sampled_from([None, True, False]),
        "unpad": st.sampled_from([None, True, False]),
        "random_global_init": st.booleans(),
        "seed": st.integers(0, 1 << 62),
        "backend": st.sampled_from(["auto", "dense", "sdpa"]),
    }
    fuzz(check, st.fixed_dictionaries({}, optional=likely), 0.4, 60)


def test_saved_patches_of_any_kind_are_taken_or_refused() -> None:
    good = SavedPatch(LSGConfig()).to_dict()

    def check(given: Any) -> None:
        values = {**good, **given} if isinstance(given, dict) else given
        try:
            SavedPatch.from_dict(values)
        except ValueError as error:
            assert_names_a_setting(error, "the checkpoint's config has lsg_patch")

    drawn = dict.fromkeys(good, ANYTHING)
    fuzz(check, st.one_of(ANYTHING, st.fixed_dictionaries({}, optional=drawn)), 0.1, 100)


def test_command_lines_of_any_kind_are_told(capsys: Any) -> None:
    fuzz(lambda line: assert_told(line, capsys) and None, _wrong_lines(), 0.1, 40)


def test_configs_of_any_kind_are_told(things: Things, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint with one wrong value in its config: taken, or refused in one line."""
    stated = json.loads((things.checkpoint / "config.json").read_text())
    numbers = random.Random(0)

    def check(change: tuple[str, Any]) -> None:
        folder = tmp_path / str(numbers.random())
        with_config(things.checkpoint, folder, dict([change]))
        small = ["--block-size", "8", "--sparse-block-size", "8", "--max-length", "70"]
        if cli.main(["inspect", str(folder), *small]):
            told = capsys.readouterr().err
            assert "lsg-patch: " in told and "Traceback" not in told
        shutil.rmtree(folder)

    small = st.one_of(ANYTHING.filter(lambda x: not isinstance(x, int)), st.integers(-9, 99))
    fuzz(check, st.tuples(st.sampled_from(sorted(stated)), small), 0.2, 30)
