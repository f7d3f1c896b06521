"""Models with accelerate's hooks, also with weights that are elsewhere: patched, run and reverted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_submodules,
)
from accelerate.state import AcceleratorState
from torch import nn

import lsg_patch
from tests import models, seq2seq
from tests.models import ids_like, right_padded, tiny_model
from tests.test_patching import assert_bitwise, fingerprint, values

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "sparse_block_size": 8,
    "max_position_embeddings": 200,
    "num_global_tokens": 2,
}
SHORT, LONG = right_padded(16, 11), right_padded(90, 55)
ORDERS = ["hooked first", "patched first"]
MODULES = ["embeddings", "encoder", "pooler"]


def outputs(model: Any, mask: torch.Tensor, family: str = "bert") -> torch.Tensor:
    if family in seq2seq.FAMILIES:
        ids = seq2seq.ids_like(mask)
        with torch.no_grad():
            output = model(ids, mask, decoder_input_ids=ids[:, :5])
        return torch.cat([output[0], output.encoder_last_hidden_state], dim=1)
    return models.run(model, ids_like(mask, family), mask)["last_hidden_state"]


def tiny(family: str) -> Any:
    if family in seq2seq.FAMILIES:
        return seq2seq.tiny_model(family)
    return tiny_model(family)


def structure(model: nn.Module) -> dict[str, Any]:
    """All but the parameters, which accelerate makes anew in each forward."""
    return {name: x for name, x in fingerprint(model).items() if not name.endswith(" parameter")}


def check(hook: Callable[[Any], Any], order: str, family: str = "bert", **settings: Any) -> None:
    """Patched and hooked in this ``order`` it runs as without hooks, and is then what it was."""
    settings = {**SETTINGS, **settings}
    plain = tiny(family)
    short, stored = outputs(plain, SHORT, family), values(plain)
    lsg_patch.patch_model(plain, **settings)
    long = outputs(plain, LONG, family)
    model = tiny(family)
    if order == "patched first":
        lsg_patch.patch_model(model, **settings)
        model = hook(model)
    else:
        model = hook(model)
        before = structure(model)
        lsg_patch.patch_model(model, **settings)
    assert torch.equal(outputs(model, LONG, family), long)
    lsg_patch.unpatch_model(model)
    if order == "hooked first":
        assert structure(model) == before
    assert torch.equal(outputs(model, SHORT, family), short)
    remove_hook_from_submodules(model)
    assert torch.equal(outputs(model, SHORT, family), short)
    assert_bitwise(values(model), stored)
    lsg_patch.patch_model(model, **settings)
    assert torch.equal(outputs(model, LONG, family), long)


def offloaded(model: nn.Module) -> nn.Module:
    hooked = cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return hooked  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", [*models.FAMILIES, *seq2seq.FAMILIES])
def test_offloaded_to_the_cpu(family: str, order: str) -> None:
    check(offloaded, order, family)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity_type": "lsh"},
        {"positions": "interpolate"},
        {"max_position_embeddings": 100, "random_global_init": True, "seed": 3},
        {"num_global_tokens": 0},
    ],
    ids=str,
)
def test_offloaded_with_other_settings(settings: dict[str, Any], order: str) -> None:
    check(offloaded, order, **settings)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["disk", "some to disk", "all to disk", "buffers", "every module"])
def test_other_hooks(how: str, order: str, tmp_path: Any) -> None:
    def hook(model: Any) -> Any:
        if how == "disk":
            return disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        if how == "buffers":
            return cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        if how == "every module":
            for module in model.modules():
                add_hook_to_module(module, ModelHook(), append=True)
            return model
        where = dict.fromkeys(MODULES, "disk" if how == "all to disk" else "cpu")
        where["embeddings"] = "disk"
        return dispatch_model(model, where, offload_dir=tmp_path)

    check(hook, order)


@pytest.mark.parametrize("on_disk", MODULES[:2])
def test_loaded_to_several_places(on_disk: str, tmp_path: Any) -> None:
    model = tiny_model("bert")
    short = outputs(model, SHORT)
    model.save_pretrained(tmp_path / "saved")
    lsg_patch.patch_model(model, **SETTINGS)
    long = outputs(model, LONG)
    where = {name: "disk" if name == on_disk else "cpu" for name in MODULES}
    loaded = transformers.BertModel.from_pretrained(
        tmp_path / "saved", device_map=where, offload_folder=tmp_path / "kept"
    ).eval()
    assert "meta" in {p.device.type for p in loaded.parameters()}
    loaded.config.cls_token_id, loaded.config.mask_token_id = models.CLS, models.MASK
    with lsg_patch.patched(loaded, **SETTINGS):
        assert torch.equal(outputs(loaded, LONG), long)
    assert torch.equal(outputs(loaded, SHORT), short)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_prepared(order: str, precision: str) -> None:
    AcceleratorState._reset_state(True)
    prepare = Accelerator(cpu=True, mixed_precision=precision).prepare
    plain, model = tiny_model("bert"), tiny_model("bert")
    short = outputs(prepare(plain), SHORT)
    lsg_patch.patch_model(plain, **SETTINGS)
    long = outputs(plain, LONG)
    if order == "patched first":
        model = prepare(lsg_patch.patch_model(model, **SETTINGS))
    else:
        model = lsg_patch.patch_model(prepare(model), **SETTINGS)
    assert torch.equal(outputs(model, LONG), long)
    lsg_patch.unpatch_model(model)
    assert torch.equal(outputs(model, SHORT), short)


@pytest.mark.parametrize("again", [False, True])
def test_hooks_removed_while_patched(again: bool) -> None:
    """The weights are the model's own then, or another hook's."""
    model = tiny_model("bert")
    short, stored = outputs(model, SHORT), values(model)
    offloaded(model)
    lsg_patch.patch_model(model, **SETTINGS)
    long = outputs(model, LONG)
    remove_hook_from_submodules(model)
    if again:
        offloaded(model)
    assert torch.equal(outputs(model, LONG), long)
    lsg_patch.unpatch_model(model)
    assert torch.equal(outputs(model, SHORT), short)
    remove_hook_from_submodules(model)
    assert_bitwise(values(model), stored)


def test_a_hook_that_keeps_all_embeddings_is_refused() -> None:
    """It looks for a new parameter below them in its own store, which has none."""
    model = tiny_model("bert")
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=dict(model.state_dict()),
        preload_module_classes=["BertEmbeddings"],
    )
    before = structure(model)
    with pytest.raises(
        ValueError, match="weights of a BertEmbeddings as a whole.*offload it after"
    ):
        lsg_patch.patch_model(model, **SETTINGS)
    assert structure(model) == before


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_model_prepared_for_mixed_precision(patched_first: bool) -> None:
    """It replaces its forward: it is patched and reverted below that, and after that is taken away."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, ids = tiny_model("bert"), ids_like(right_padded(60), "bert")
    short = ids[:, :14]

    def run_on(x: Any, given: Any) -> Any:
        with torch.no_grad():
            return x(given)[0]

    plain = run_on(model, short)
    if patched_first:
        lsg_patch.patch_model(model, **{**SETTINGS, "num_global_tokens": 1})
    prepared = accelerator.prepare(model)
    if not patched_first:
        lsg_patch.patch_model(prepared, **{**SETTINGS, "num_global_tokens": 1})
    assert run_on(prepared, ids).shape[1] == 60
    torch.testing.assert_close(run_on(prepared, short), plain, rtol=0, atol=0.1)
    if patched_first:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        torch.testing.assert_close(run_on(model, short), plain, rtol=0, atol=1e-5)
        prepared = accelerator.prepare(model)
    lsg_patch.unpatch_model(prepared)
    torch.testing.assert_close(run_on(prepared, short), plain, rtol=0, atol=0.1)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(run_on(model, short), plain)
    assert type(model) is transformers.BertModel
