"""Saving a patched model, and getting it back."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import wrapt
from safetensors.torch import load_file, save_file

import lsg_patch
from lsg_patch.config import FORMAT, KEY, SavedPatch
from tests.models import (
    POSITIONS,
    ids_like,
    model_classes,
    right_padded,
    run,
    tiny_model,
)
from tests.test_patching import assert_bitwise, fingerprint
from tests.tokenizers import tokenizer_like

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "num_global_tokens": 3,
    "max_position_embeddings": 200,
}
MASK = right_padded(90, 55)
IDS = ids_like(MASK, "bert")
ROWS = "embeddings.global_embeddings.weight"


def patched_model(family: str = "bert", cls: type[Any] | None = None, **settings: Any) -> Any:
    """With global tokens that no rule gives."""
    model = lsg_patch.patch_model(tiny_model(family, cls), **{**SETTINGS, **settings})
    rows = lsg_patch.global_embeddings(model)
    with torch.no_grad():
        rows.add_(torch.linspace(-1, 1, rows.shape[1]))
    return model


def outputs(model: Any, family: str = "bert") -> dict[str, torch.Tensor]:
    return run(model, ids_like(MASK, family), MASK)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")


def change_weights(folder: Path, **values: Any) -> None:
    """Weights by their names, "/" for "."; None takes one out."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in values.items():
        weights.pop(name, None) if value is None else weights.update({name: value})
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def original() -> Any:
    return patched_model()


@pytest.fixture
def saved(original: Any, tmp_path: Path) -> Path:
    original.save_pretrained(tmp_path / "saved", **SAFE)
    return tmp_path / "saved"


# 5.0 and later write nothing else
SAFE = {"safe_serialization": True} if transformers.__version__ < "5" else {}


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "esm"])
def test_every_head(family: str, tmp_path: Path) -> None:
    """By the class that the config names, or by the one that is given; global tokens trained."""
    for cls in model_classes(family):
        model = patched_model(family, cls)
        model.save_pretrained(tmp_path)
        named = hasattr(transformers, cls.__name__)
        loaded = lsg_patch.from_pretrained(tmp_path, None if named else cls)
        assert isinstance(loaded, cls) and type(loaded).__name__ == cls.__name__
        assert not loaded.training
        assert_bitwise(outputs(loaded, family), outputs(model, family))


def test_the_config_says_how_it_is_patched(original: Any, saved: Path) -> None:
    stated = json.loads((saved / "config.json").read_text("utf-8"))
    assert stated["max_position_embeddings"] == 200
    assert stated[KEY] == {
        "format_version": FORMAT,
        **lsg_patch.get_config(original).to_dict(),
        "global_reach": POSITIONS,
        "bos_id": 3,
    }
    assert SavedPatch.from_dict(stated[KEY]).config == lsg_patch.get_config(original)


def test_a_revert_takes_the_key_away(saved: Path) -> None:
    """Of a model that was loaded patched as well, and of a config that took another's place."""
    changed = lsg_patch.from_pretrained(saved, block_size=16)
    assert KEY not in lsg_patch.unpatch_model(changed).config.to_dict()
    model = lsg_patch.from_pretrained(saved)
    model.config = copy.deepcopy(model.config)
    lsg_patch.unpatch_model(model)
    assert KEY not in model.config.to_dict()
    ordinary = transformers.BertModel.from_pretrained(saved)
    ids = IDS[:, :64]
    assert_bitwise(run(model, ids, MASK[:, :64]), run(ordinary, ids, MASK[:, :64]))
    assert_bitwise(model.state_dict(), ordinary.state_dict())


def test_an_interpolated_table_is_taken_as_it_is(tmp_path: Path) -> None:
    model = patched_model(positions="interpolate")
    model.save_pretrained(tmp_path)
    loaded = lsg_patch.from_pretrained(tmp_path)
    assert_bitwise(outputs(loaded), outputs(model))
    table = loaded.embeddings.position_embeddings.weight
    with torch.no_grad():
        table.add_(1)
    lsg_patch.unpatch_model(loaded)  # nothing was stretched here: what it learned stays
    assert loaded.embeddings.position_embeddings.weight is table
    expected = model.embeddings.position_embeddings.weight + 1
    assert torch.equal(table, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_fewer_global_tokens_are_the_first_ones(original: Any, saved: Path, count: int) -> None:
    loaded = lsg_patch.from_pretrained(saved, num_global_tokens=count, mask_first_token=False)
    if count:
        rows = lsg_patch.global_embeddings(original)
        assert torch.equal(lsg_patch.global_embeddings(loaded), rows[:count])
    assert lsg_patch.get_config(loaded).num_global_tokens == count


def test_more_global_tokens_are_new_by_the_usual_rule(original: Any, saved: Path) -> None:
    """Those that a patch with so many had made at first: the original's positions count."""
    loaded = lsg_patch.from_pretrained(saved, num_global_tokens=9, tokenizer=tokenizer_like())
    rows = lsg_patch.global_embeddings(loaded)
    assert torch.equal(rows[:3], lsg_patch.global_embeddings(original))
    fresh = lsg_patch.patch_model(tiny_model("bert"), **{**SETTINGS, "num_global_tokens": 9})
    assert torch.equal(rows[3:], lsg_patch.global_embeddings(fresh)[3:])


def test_saved_ones_need_no_token_ids(saved: Path) -> None:
    change_config(saved, cls_token_id=999)
    assert lsg_patch.is_patched(lsg_patch.from_pretrained(saved))
    with pytest.raises(ValueError, match="token id 999 is outside"):
        lsg_patch.from_pretrained(saved, num_global_tokens=4)


def test_a_prompt_in_the_place_of_cls_is_told_of(saved: Path) -> None:
    """As in the model that was saved: the token that is expected there is known."""
    loaded = lsg_patch.from_pretrained(saved)
    words = loaded.embeddings.word_embeddings
    with pytest.warns(UserWarning, match="mask_first_token=False"):
        loaded(inputs_embeds=words(IDS) + 1)


def test_settings_that_are_given_win(original: Any, saved: Path) -> None:
    tokenizer = tokenizer_like()
    loaded = lsg_patch.from_pretrained(
        str(saved), sparsity_type="pooling", max_position_embeddings=320, tokenizer=tokenizer
    )
    config = lsg_patch.get_config(loaded)
    assert (config.sparsity_type, config.block_size) == ("pooling", 8)
    assert tokenizer.model_max_length == loaded.config.max_position_embeddings == 320
    table = original.embeddings.position_embeddings.weight
    expected = torch.cat([table, table[:120]])
    assert torch.equal(loaded.embeddings.position_embeddings.weight, expected)
    assert loaded(torch.ones(1, 320).long())[0].isfinite().all()


def test_as_saved_then_changed(saved: Path, tmp_path: Path) -> None:
    """What is saved again says what was changed."""
    lsg_patch.from_pretrained(saved, sparsity_type="lsh", seed=3).save_pretrained(tmp_path / "2")
    again = lsg_patch.from_pretrained(tmp_path / "2", block_size=16)
    config = lsg_patch.get_config(again)
    assert (config.sparsity_type, config.seed, config.block_size) == ("lsh", 3, 16)
    lsg_patch.patch_model(lsg_patch.unpatch_model(again), block_size=4, sparse_block_size=4)
    assert again.config.lsg_patch["block_size"] == 4


def test_the_rest_goes_to_the_class(saved: Path) -> None:
    loaded, info = lsg_patch.from_pretrained(
        saved,
        transformers.AutoModelForSequenceClassification,
        torch_dtype=torch.float16,
        num_labels=5,
        output_loading_info=True,
    )
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert loaded.dtype == lsg_patch.global_embeddings(loaded).dtype == torch.float16
    assert loaded.classifier.out_features == 5
    assert not info["unexpected_keys"]
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]


def test_a_head_gives_its_base_model(tmp_path: Path) -> None:
    model = patched_model("bert", transformers.BertForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = lsg_patch.from_pretrained(tmp_path, transformers.AutoModel)
    assert_bitwise(
        dict(loaded.named_parameters()), {**dict(model.bert.named_parameters()), **pooler(loaded)}
    )


def pooler(model: Any) -> dict[str, torch.Tensor]:
    """What the base model has and the head had not."""
    return {name: p for name, p in model.named_parameters() if name.startswith("pooler")}


def test_nothing_scares(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The global tokens are no unexpected weights; others still are, and refused by name."""
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            lsg_patch.from_pretrained(saved)
        assert caplog.text == ""
        change_weights(saved, other=torch.ones(2))
        with pytest.raises(ValueError, match="no place in the model for other: "):
            lsg_patch.from_pretrained(saved)
    finally:
        theirs.disable_propagation()
    assert "_keys_to_ignore_on_load_unexpected" not in vars(transformers.BertModel)


def test_shards(original: Any, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path, max_shard_size="20kB", **SAFE)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_bitwise(outputs(lsg_patch.from_pretrained(tmp_path)), outputs(original))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights(original: Any, tmp_path: Path, new: bool, sharded: bool) -> None:
    original.config.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["BertModel"])
    names = list(original.state_dict())
    files = {"pytorch_model.bin": names}
    if sharded:
        files = {"a.bin": names[:9], "b.bin": names[9:]}
        index = {"metadata": {}, "weight_map": {n: f for f, of in files.items() for n in of}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    for file, of in files.items():
        weights = {name: original.state_dict()[name] for name in of}
        torch.save(weights, tmp_path / file, _use_new_zipfile_serialization=new)
    assert_bitwise(outputs(lsg_patch.from_pretrained(tmp_path)), outputs(original))


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", [2, "plain"])
def test_no_pickle_is_run(original: Any, tmp_path: Path, protocol: Any) -> None:
    original.config.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["BertModel"])
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    weights = {**original.state_dict(), "x": Bomb(trace)}
    if protocol == "plain":
        file.write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, file)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        lsg_patch.from_pretrained(tmp_path)
    assert not trace.exists()


def test_subfolder_and_variant(original: Any, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "sub", variant="fp16", **SAFE)
    assert (tmp_path / "sub" / "model.fp16.safetensors").exists()
    loaded = lsg_patch.from_pretrained(tmp_path, subfolder="sub", variant="fp16")
    assert_bitwise(outputs(loaded), outputs(original))
    with lsg_patch.auto_patching():
        loaded = transformers.AutoModel.from_pretrained(tmp_path, subfolder="sub", variant="fp16")
    assert_bitwise(outputs(loaded), outputs(original))


def test_from_the_cache_of_the_hub(original: Any, saved: Path, tmp_path: Path) -> None:
    """By name and revision, and no network is asked."""
    commit = "0" * 39 + "1"
    repository = tmp_path / "cache" / "models--someone--long-bert"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    loaded = lsg_patch.from_pretrained(
        "someone/long-bert",
        revision="v1",
        cache_dir=str(tmp_path / "cache"),
        local_files_only=True,
    )
    assert_bitwise(outputs(loaded), outputs(original))


def test_global_tokens_of_a_given_state_dict(original: Any, saved: Path) -> None:
    config = transformers.BertConfig.from_pretrained(saved)
    with lsg_patch.auto_patching():
        loaded = transformers.BertModel.from_pretrained(
            None, config=config, state_dict=original.state_dict()
        )
    assert_bitwise(outputs(loaded), outputs(original))


def test_two_patched_models_in_one(tmp_path: Path) -> None:
    encoder = tiny_model("bert")
    decoder = tiny_model(
        "bert", transformers.BertLMHeadModel, is_decoder=True, add_cross_attention=True
    )
    lsg_patch.patch_model(encoder, **SETTINGS)
    lsg_patch.patch_model(decoder, **{**SETTINGS, "num_global_tokens": 2})
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.save_pretrained(tmp_path)
    given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}
    with torch.no_grad():
        expected = model(**given).logits
        loaded = lsg_patch.from_pretrained(tmp_path)
        assert torch.equal(loaded(**given).logits, expected)
    assert lsg_patch.get_config(loaded.encoder).num_global_tokens == 3
    assert lsg_patch.get_config(loaded.decoder).num_global_tokens == 2


def test_in_a_new_process(original: Any, saved: Path) -> None:
    code = (
        "import sys, torch, lsg_patch\n"
        "torch.set_num_threads(1)\n"
        "model = lsg_patch.from_pretrained(sys.argv[1])\n"
        "ids, mask, expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(ids, attention_mask=mask)[0], expected)\n"
    )
    expected = outputs(original)["last_hidden_state"]
    torch.save((IDS, MASK, expected), saved / "expected")
    subprocess.run([sys.executable, "-c", code, saved, saved / "expected"], check=True)


# what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"format_version": FORMAT + 1}, "pip install --upgrade lsg-patch"),
        ({"format_version": None}, "format_version must be a whole number from 1 to .*, not None"),
        ({"format_version": "1"}, "format_version must be a whole number"),
        ({"block_size": "x"}, "wrong setting: block_size"),
        ({"num_global_tokens": 10**9}, "num_global_tokens must be a whole number from 0 to 512"),
        ({"auto_map": {}}, "wrong setting: .*'auto_map'. Take it out"),
        ({"bos_id": -1}, "bos_id must be a whole number from 0 to .*, not -1"),
        ({"global_reach": 10**30}, "global_reach"),
        ({"num_global_tokens": 4}, "its config says num_global_tokens=4"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ("yes", "must be a dictionary"),
    ],
    ids=str,
)
def test_wrong_settings(saved: Path, stated: Any, message: str) -> None:
    known = json.loads((saved / "config.json").read_text("utf-8"))[KEY]
    change_config(saved, **{KEY: {**known, **stated} if isinstance(stated, dict) else stated})
    with pytest.raises(ValueError, match=message):
        lsg_patch.from_pretrained(saved)
    with lsg_patch.auto_patching(), pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "saved without its global tokens"),
        (torch.ones(2, 32), r"shape \(2, 32\)"),
        (torch.ones(3, 31), r"shape \(3, 31\), not floating-point rows \(n, 32\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(3, 32).long(), "torch.int64"),
    ],
    ids=["missing", "too few", "width", "flat", "integers"],
)
def test_wrong_global_tokens(saved: Path, rows: Any, message: str) -> None:
    change_weights(saved, **{ROWS: rows})
    with pytest.raises(ValueError, match=message):
        lsg_patch.from_pretrained(saved)


def test_what_was_not_saved_patched(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved patched"):
        lsg_patch.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no config.json"):
        lsg_patch.from_pretrained(tmp_path / "nothing", local_files_only=True)


def test_no_code_of_a_checkpoint(saved: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        lsg_patch.from_pretrained(saved, trust_remote_code=True)
    for name in ("LSGBertModel", "AutoModel", "models", "BertConfig", "__name__", 3):
        change_config(saved, architectures=[name])
        with pytest.raises(ValueError, match="pass cls"):
            lsg_patch.from_pretrained(saved)
    change_config(saved, architectures=["BertModel"], auto_map={"AutoModel": "evil.Model"})
    (saved / "evil.py").write_text("raise SystemExit('run')", "utf-8")
    assert lsg_patch.is_patched(lsg_patch.from_pretrained(saved, trust_remote_code=False))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", 3, "gone.bin"])
def test_an_index_names_files_beside_it(saved: Path, name: Any) -> None:
    (saved / "model.safetensors").rename(saved / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "model-1.safetensors", ROWS: name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match="names"):
        lsg_patch.from_pretrained(saved)


def test_a_patch_on_top_of_what_was_loaded_without_us(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a new one, which is said, on the positions as they were saved; a revert is exact."""
    model = transformers.BertModel.from_pretrained(saved).eval()
    before = fingerprint(model)
    lsg_patch.patch_model(model, 16, sparse_block_size=16, max_position_embeddings=200)
    assert "lsg_patch.from_pretrained loads it as it was saved" in caplog.text
    assert model.config.lsg_patch["block_size"] == 16
    assert model.config.lsg_patch["num_global_tokens"] == 1
    lsg_patch.unpatch_model(model)
    assert fingerprint(model) == before


# auto patching ---------------------------------------------------------------------------------


def own() -> Any:
    return vars(transformers.PreTrainedModel)["from_pretrained"]


def test_auto_patching_is_taken_back_exactly(original: Any, saved: Path) -> None:
    before = own()
    with lsg_patch.auto_patching():
        for cls in (transformers.AutoModel, transformers.BertModel):
            assert_bitwise(outputs(cls.from_pretrained(saved)), outputs(original))
        with lsg_patch.auto_patching():
            lsg_patch.enable_auto_patching()
            lsg_patch.enable_auto_patching()
            assert own().__wrapped__ is before, "wrapped twice is wrapped once"
        assert lsg_patch.is_patched(transformers.AutoModel.from_pretrained(saved))
        lsg_patch.disable_auto_patching()
        assert lsg_patch.is_patched(transformers.AutoModel.from_pretrained(saved))
    assert own() is before
    assert not lsg_patch.is_patched(transformers.AutoModel.from_pretrained(saved))
    lsg_patch.enable_auto_patching()
    try:
        with lsg_patch.auto_patching():
            pass
        assert lsg_patch.is_patched(transformers.AutoModel.from_pretrained(saved))
    finally:
        lsg_patch.disable_auto_patching()
    lsg_patch.disable_auto_patching()  # off already
    assert own() is before


def test_an_error_takes_it_back(saved: Path) -> None:
    before = own()
    with pytest.raises(KeyError), lsg_patch.auto_patching():
        raise KeyError
    change_weights(saved, **{ROWS: None})
    with pytest.raises(ValueError, match="global tokens"):
        lsg_patch.from_pretrained(saved)
    assert own() is before


def test_other_checkpoints_load_as_ever(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    with lsg_patch.auto_patching():
        loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert not lsg_patch.is_patched(loaded)
    ids, mask = IDS[:, :40], MASK[:, :40]
    assert_bitwise(run(loaded, ids, mask), run(model, ids, mask))


def test_below_another_wrapper_it_is_switched_off(saved: Path) -> None:
    before = own()
    with lsg_patch.auto_patching():
        calls = []
        above = wrapt.FunctionWrapper(own(), lambda f, _, a, k: (calls.append(1), f(*a, **k))[1])
        transformers.PreTrainedModel.from_pretrained = above
    try:
        assert not lsg_patch.is_patched(transformers.BertModel.from_pretrained(saved))
        with lsg_patch.auto_patching():
            assert own() is above, "it is in place still"
            assert lsg_patch.is_patched(transformers.BertModel.from_pretrained(saved))
        assert len(calls) == 2
        transformers.PreTrainedModel.from_pretrained = above.__wrapped__
        with lsg_patch.auto_patching():
            pass
    finally:
        transformers.PreTrainedModel.from_pretrained = before


def in_its_own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Two loads at a time leave functions of transformers 5 replaced, which other tests must not meet."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("LSG_PATCH_OWN_PROCESS") == test.__name__:
            return test(*args, **kwargs)
        environment = {**os.environ, "LSG_PATCH_OWN_PROCESS": test.__name__}
        command = ["-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::{test.__name__}"]
        subprocess.run([sys.executable, *command], check=True, env=environment)
        return None

    return run


@in_its_own_process
def test_several_threads(saved: Path) -> None:
    """Loads of ours wait for each other: several at once break transformers 5 for all later ones."""
    before, tie = own(), vars(transformers.PreTrainedModel)["tie_weights"]

    def load(auto: bool) -> bool:
        for _ in range(4):
            if auto:
                with lsg_patch.auto_patching():
                    assert lsg_patch.is_patched(transformers.BertModel.from_pretrained(saved))
            assert lsg_patch.is_patched(lsg_patch.from_pretrained(saved))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, [True, False, True, False]))
    assert own() is before and vars(transformers.PreTrainedModel)["tie_weights"] is tie
    assert "_keys_to_ignore_on_load_unexpected" not in vars(transformers.BertModel)


@in_its_own_process
def test_loads_of_other_threads_are_their_own(saved: Path) -> None:
    """While one thread is inside of our from_pretrained, another's loads an ordinary model."""
    inside, done, found = threading.Event(), threading.Event(), []

    class Slow(transformers.BertModel):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            inside.set()
            assert done.wait(60)

    thread = threading.Thread(target=lambda: found.append(lsg_patch.from_pretrained(saved, Slow)))
    thread.start()
    assert inside.wait(60)
    other = transformers.BertConfig.from_pretrained(saved)
    plain = transformers.BertModel.from_pretrained(saved, config=other)
    done.set()
    thread.join()
    assert lsg_patch.is_patched(found[0]) and not lsg_patch.is_patched(plain)
