"""Models that other tools have changed, wrapped or shared: patched and reverted, or refused before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import lsg_patch
from tests import seq2seq
from tests.models import ids_like, right_padded, run, tiny_model
from tests.test_patching import assert_bitwise, fingerprint, values

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 200}
SHORT, LONG = right_padded(16, 11), right_padded(90, 55)
LAYER = "encoder.layer.0"
ATTENTION = f"{LAYER}.attention.self"
TABLE = "embeddings.position_embeddings"


def outputs(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    return run(model, ids_like(mask, "bert"), mask)["last_hidden_state"][mask.bool()]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the state dict, which of quantized layers has other values as well."""
    state = model.state_dict()
    return {name: x.clone() for name, x in state.items() if isinstance(x, torch.Tensor)}


def at(path: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Put what ``change`` makes of the module at ``path`` in its place."""

    def changed(model: nn.Module) -> nn.Module:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, change(model.get_submodule(path)))
        return model

    return changed


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def quantized(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", amount=0.3)  # type: ignore[no-any-return]


def with_own_forward(module: Any) -> Any:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return module


def with_compiled_forward(module: Any) -> Any:
    module.forward = compiled(module.forward)
    return module


def with_bound_forward(module: Any) -> Any:
    """As transformers 5.0 and 5.1 leave it wherever they recorded outputs."""
    module.forward = module.forward
    return module


def sharing(path: str, other: str) -> Callable[[Any], Any]:
    return lambda model: at(path, lambda _: model.get_submodule(other))(model)


def of_inference(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(model)


def with_fewer_heads(model: Any) -> Any:
    if not hasattr(model, "prune_heads"):
        pytest.skip("this transformers prunes no heads")
    model.prune_heads({0: [1, 2]})
    return model


WORK: dict[str, Callable[[Any], Any]] = {
    "quantize_dynamic": quantized,
    "checkpointed layer": at(LAYER, checkpoint_wrapper),
    "compiled stack": at("encoder", compiled),
    "compiled layer": at(LAYER, compiled),
    "compiled attention": at(ATTENTION, compiled),
    "compiled query": at(f"{ATTENTION}.query", compiled),
    "compiled embeddings": at("embeddings", compiled),
    "compiled table": at(TABLE, compiled),
    "pruned query": at(f"{ATTENTION}.query", pruned),
    "weight_norm of key": at(f"{ATTENTION}.key", parametrizations.weight_norm),
    "orthogonal value": at(f"{ATTENTION}.value", parametrizations.orthogonal),
    "traced query": at(f"{ATTENTION}.query", torch.fx.symbolic_trace),
    "traced output": at(f"{LAYER}.attention.output", torch.fx.symbolic_trace),
    "own forward of the stack": at("encoder", with_own_forward),
    "own forward of the embeddings": at("embeddings", with_own_forward),
    "own forward of a layer": at(LAYER, with_own_forward),
    "compiled forward of a layer": at(LAYER, with_compiled_forward),
    "bound forward": at(ATTENTION, with_bound_forward),
    "shared layer": sharing("encoder.layer.1", LAYER),
    "shared attention": sharing("encoder.layer.1.attention.self", ATTENTION),
    "fewer heads": with_fewer_heads,
    "inference mode": of_inference,
    "data parallel": nn.DataParallel,
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pruned table": (at(TABLE, pruned), "computed from other tensors .*prune.remove"),
    "weight_norm of the table": (
        at(TABLE, parametrizations.weight_norm),
        "computed from other tensors .*remove_parametrizations",
    ),
    "another table": (
        at(TABLE, lambda x: nn.Sequential(x)),
        "Sequential and no torch.nn.Embedding",
    ),
    "own forward of attention": (
        at(ATTENTION, with_own_forward),
        "SelfAttention cannot .* replaced",
    ),
    "compiled forward of attention": (
        at(ATTENTION, with_compiled_forward),
        "SelfAttention cannot .* patch the model first",
    ),
    "a patched layer": (
        lambda model: at(
            LAYER, lambda _: lsg_patch.patch_model(tiny_model("bert")).encoder.layer[0]
        )(model),
        "or a module in it, is patched already",
    ),
}


# lsh asks for the size of a head
OF_HEADS = ["quantize_dynamic", "compiled query", "pruned query", "traced query", "fewer heads"]


@pytest.mark.parametrize(
    ("tool", "sparsity_type"),
    [*((tool, "norm") for tool in WORK), *((tool, "lsh") for tool in OF_HEADS)],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_what_other_tools_changed_is_patched_and_reverted(tool: str, sparsity_type: str) -> None:
    torch._dynamo.reset()
    model = WORK[tool](tiny_model("bert"))
    # a whole stack takes seconds to compile; what matters here is where its modules are found
    with torch.compiler.set_stance("force_eager" if tool == "compiled stack" else "default"):
        short, before, stored = outputs(model, SHORT), fingerprint(model), tensors(model)
        lsg_patch.patch_model(model, sparsity_type=sparsity_type, **SETTINGS)
        torch.testing.assert_close(outputs(model, SHORT), short, rtol=0, atol=1e-5)
        assert outputs(model, LONG).isfinite().all()
        lsg_patch.unpatch_model(model)
        assert fingerprint(model) == before
        assert torch.equal(outputs(model, SHORT), short)
    assert_bitwise(tensors(model), stored)


@pytest.mark.parametrize("tool", REFUSED)
def test_what_cannot_be_patched_is_refused_before(tool: str) -> None:
    change, message = REFUSED[tool]
    model = change(tiny_model("bert"))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as caught:
        lsg_patch.patch_model(model, **SETTINGS)
    assert fingerprint(model) == before and "\n" not in str(caught.value)


def test_an_unpatched_layer_in_a_patched_model() -> None:
    model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
    layer = model.encoder.layer[1]
    model.encoder.layer[1] = tiny_model("bert", seed=3).encoder.layer[1]
    with pytest.raises(RuntimeError, match="is not patched itself.*unpatch_model"):
        outputs(model, LONG)
    lsg_patch.unpatch_model(model)  # as it says; the one that was taken out is reverted as well
    lsg_patch.patch_model(model, **SETTINGS)
    assert outputs(model, LONG).isfinite().all()
    assert type(layer) is type(tiny_model("bert").encoder.layer[1])


class TestReverts:
    """What was changed while patched is told before anything is undone."""

    def refused(self, model: nn.Module, message: str) -> None:
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            lsg_patch.unpatch_model(model)
        assert fingerprint(model) == before and lsg_patch.is_patched(model)
        assert outputs(model, LONG).isfinite().all()

    @pytest.mark.parametrize(
        ("path", "change", "message"),
        [
            (
                TABLE,
                pruned,
                f"model.{TABLE} cannot be reverted, so nothing was: its weight is comp",
            ),
            (TABLE, lambda _: nn.Embedding(200, 32), "table of positions was replaced"),
            (ATTENTION, with_own_forward, f"model.{ATTENTION} cannot .* take the replacement away"),
        ],
        ids=["pruned table", "another table", "own forward"],
    )
    def test_changed_modules(self, path: str, change: Any, message: str) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        self.refused(at(path, change)(model), message)

    def test_another_class(self) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        attention = model.get_submodule(ATTENTION)
        kind = type(attention)
        attention.__class__ = type("Traced", (kind,), {})
        self.refused(model, f"model.{ATTENTION} cannot .* and was made a Traced")
        attention.__class__ = kind
        lsg_patch.unpatch_model(model)

    @pytest.mark.parametrize("change", [checkpoint_wrapper, compiled, with_bound_forward])
    def test_layers_wrapped_while_patched(self, change: Any) -> None:
        model, short = tiny_model("bert"), outputs(tiny_model("bert"), SHORT)
        at(LAYER, change)(lsg_patch.patch_model(model, **SETTINGS))
        outputs(model, LONG)
        lsg_patch.unpatch_model(model)
        assert torch.equal(outputs(model, SHORT), short)

    @pytest.mark.parametrize("path", [TABLE, "embeddings"])
    def test_a_copy_in_the_place_of_the_table(self, path: str) -> None:
        """As ``merge_and_unload`` of PEFT leaves it."""
        model, short = tiny_model("bert"), outputs(tiny_model("bert"), SHORT)
        at(path, copy.deepcopy)(lsg_patch.patch_model(model, **SETTINGS))
        outputs(model, LONG)
        lsg_patch.unpatch_model(model)
        assert torch.equal(outputs(model, SHORT), short)
        assert_bitwise(values(model), values(tiny_model("bert")))

    def test_a_copy_of_a_part_alone(self) -> None:
        """As PEFT makes them: each module has the record of what was changed of it."""
        model = lsg_patch.patch_model(tiny_model("roberta"), num_global_tokens=2, **SETTINGS)
        part = copy.deepcopy(model.embeddings)
        lsg_patch.unpatch_model(part)
        assert lsg_patch.is_patched(model)
        lsg_patch.unpatch_model(model)
        for embeddings in (part, model.embeddings):
            assert embeddings.position_embeddings.weight.shape == (66, 32)
            assert embeddings.position_embeddings.num_embeddings == 66
            assert embeddings.position_ids.shape == (1, 66)
            assert not any("lsg" in name for x in embeddings.modules() for name in vars(x))
            assert not hasattr(embeddings, "global_embeddings")
        assert_bitwise(values(part), values(model.embeddings))


class TestDistributed:
    """What shares out or splits the parameters knows those that there are: patch first."""

    @pytest.fixture(autouse=True)
    def group(self) -> Iterator[None]:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @staticmethod
    def sharded(model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.encoder.layer, model):
            fully_shard(module, mesh=mesh)
        return model

    @staticmethod
    def flattened(model: Any) -> Any:
        """By the first FSDP, whose parameters are views of one flat one."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)

    @pytest.mark.parametrize("kind", ["sharded", "parallel", "flattened"])
    def test_wrapped_first_then_patched(self, kind: str) -> None:
        wrap = getattr(self, kind, nn.parallel.DistributedDataParallel)
        model = wrap(tiny_model("bert"))
        before = fingerprint(model)
        with pytest.raises(ValueError, match="wrap or shard it after that"):
            lsg_patch.patch_model(model, **SETTINGS)
        assert fingerprint(model) == before

    @pytest.mark.parametrize("kind", ["sharded", "parallel"])
    def test_patched_first_then_wrapped(self, kind: str) -> None:
        model = lsg_patch.patch_model(tiny_model("bert"), **SETTINGS)
        long = outputs(model, LONG)
        wrap = self.sharded if kind == "sharded" else nn.parallel.DistributedDataParallel
        wrapped = wrap(model)
        assert torch.equal(outputs(wrapped, LONG), long)
        before = fingerprint(wrapped)
        with pytest.raises(ValueError, match="wrap or shard it after that"):
            lsg_patch.unpatch_model(wrapped)
        assert fingerprint(wrapped) == before
        assert torch.equal(outputs(wrapped, LONG), long)
        if kind == "parallel":
            lsg_patch.unpatch_model(wrapped.module)
            assert torch.equal(outputs(model, SHORT), outputs(tiny_model("bert"), SHORT))

    def test_a_sharded_part_beside_the_model(self) -> None:
        pair = nn.ModuleDict({"text": tiny_model("bert"), "other": nn.Linear(2, 2)})
        pair["other"] = nn.parallel.DistributedDataParallel(pair["other"])
        lsg_patch.unpatch_model(lsg_patch.patch_model(pair, **SETTINGS))


class TestSharedTables:
    def test_tied_inside_the_model(self) -> None:
        """Also while patched, and in a copy."""
        model = seq2seq.tiny_model("bart")
        own, of_decoder = model.encoder.embed_positions, model.decoder.embed_positions
        of_decoder.weight = weight = own.weight
        lsg_patch.patch_model(model, **SETTINGS)
        assert of_decoder.weight is own.weight and own.weight.shape[0] == 202
        with torch.no_grad():
            own.weight[5] += 1
        clone = copy.deepcopy(model)
        for each in (clone, model):
            lsg_patch.unpatch_model(each)
            assert each.encoder.embed_positions.weight is each.decoder.embed_positions.weight
        assert own.weight is weight
        assert_bitwise(values(clone), values(model))

    @pytest.mark.parametrize("kind", ["another model's", "a lone table"])
    def test_tied_to_what_is_not_patched(self, kind: str) -> None:
        model, other = tiny_model("electra"), tiny_model("electra", seed=1)
        table = other.embeddings.position_embeddings
        if kind == "a lone table":
            table = nn.Embedding(64, 16)
        table.weight = model.embeddings.position_embeddings.weight
        before = fingerprint(model)
        with pytest.raises(ValueError, match="shares its weight with another Embedding.*untie"):
            lsg_patch.patch_model(model, **SETTINGS)
        assert fingerprint(model) == before
        table.weight = nn.Parameter(table.weight.detach().clone())  # as it says
        lsg_patch.patch_model(model, **SETTINGS)

    def test_what_else_refers_to_the_weight(self) -> None:
        """An optimizer, a dictionary, a module that is gone."""
        model = tiny_model("electra")
        weight = model.embeddings.position_embeddings.weight
        optimizer, named = torch.optim.SGD(model.parameters()), dict(model.named_parameters())
        gone = nn.ModuleDict({"table": nn.Embedding(64, 16)})
        gone["table"].weight = weight
        gone["self"] = nn.Module()
        gone["self"].__dict__["cycle"] = gone
        del gone
        lsg_patch.patch_model(model, **SETTINGS)
        assert optimizer.param_groups and named["embeddings.position_embeddings.weight"] is weight

    def test_embeddings_of_two_models(self) -> None:
        """The other goes on giving a row for each token."""
        model, other = tiny_model("bert"), tiny_model("bert", seed=1)
        other.embeddings = model.embeddings
        short = outputs(other, SHORT)
        lsg_patch.patch_model(model, num_global_tokens=3, **SETTINGS)
        assert torch.equal(outputs(other, SHORT), short)
        lsg_patch.unpatch_model(model)
        assert torch.equal(outputs(other, SHORT), short)


def test_a_model_of_inference_mode_fails_by_itself() -> None:
    """Its first training step does, as it did before; the message is torch's."""
    model = lsg_patch.patch_model(of_inference(tiny_model("bert")), **SETTINGS)
    lsg_patch.unpatch_model(model)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(ids_like(SHORT, "bert")).last_hidden_state.sum().backward()
