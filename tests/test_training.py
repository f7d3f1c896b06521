"""Gradients, checkpointing, dropout, precisions, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import lsg_patch
from tests.models import (
    FAMILIES,
    assert_same,
    assert_same_gradients,
    attentions,
    enable_checkpointing,
    ids_like,
    model_classes,
    right_padded,
    run,
    tiny_model,
)

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
MASK = right_padded(75, 40)
ONE_LAYER = {"num_hidden_layers": 1}  # compiled in half of the time


def patched_model(family: str, cls: type[Any] | None = None, **settings: Any) -> Any:
    overrides = settings.pop("overrides", {})
    return lsg_patch.patch_model(tiny_model(family, cls, **overrides), **{**SETTINGS, **settings})


def train(model: Any, steps: int, lr: float) -> list[float]:
    """The losses of a classifier that learns two long texts by heart."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    ids, labels = ids_like(MASK, "bert"), torch.tensor([0, 1])
    losses = []
    for _ in range(steps):
        loss = model(ids, MASK, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: Any, family: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # another forward in between: what a layer needs must not be kept beside its arguments
    output = model(input_ids=ids_like(MASK, family), attention_mask=MASK).last_hidden_state
    with torch.no_grad():
        model(ids_like(right_padded(30), family))
    (output * MASK[..., None]).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool) -> None:
    model = patched_model(family).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{family} has no gradient checkpointing in this transformers")
    if use_reentrant and not _can_be_reentrant(family):
        pytest.skip(f"{family} does not train with it unpatched either in this transformers")
    expected = gradients(model, family)
    attention = attentions(model, family)[0]
    query = getattr(attention, lsg_patch.families.FAMILIES[family].names.query)
    runs: list[int] = []
    query.register_forward_hook(lambda *_: runs.append(1))
    enable_checkpointing(model, use_reentrant)
    actual = gradients(model, family)
    assert len(runs) == 3, "the layer runs again in backward"
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_around_the_whole_stack_gives_the_same_gradients(family: str) -> None:
    """The global tokens come in inside of it, and are the same when it runs again."""
    model = patched_model(family).train()
    expected = gradients(model, family)
    *above, name = lsg_patch.families.FAMILIES[family].stack.split(".")
    owner = model.get_submodule(".".join(above))
    wrapped = checkpoint_wrapper(getattr(owner, name), CheckpointImpl.NO_REENTRANT)
    setattr(owner, name, wrapped)
    actual = {
        n.replace("_checkpoint_wrapped_module.", ""): x for n, x in gradients(model, family).items()
    }
    assert_same_gradients(actual, expected)


def _can_be_reentrant(family: str) -> bool:
    """4.54 to 4.57 call some layers by keyword alone: then no input is seen to need gradients."""
    model = tiny_model(family).train()
    enable_checkpointing(model, use_reentrant=True)
    output = model(ids_like(right_padded(5), family)).last_hidden_state
    if not output.requires_grad:
        return False
    output.pow(2).sum().backward()
    # a norm after the last layer may need gradients all the same
    return any(p.grad is not None for p in attentions(model, family)[0].parameters())


@pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
def test_a_head_trains_with_dropout(sparsity_type: str) -> None:
    head = next(c for c in model_classes("bert") if c.__name__ == "BertForSequenceClassification")
    overrides = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    model = patched_model("bert", head, sparsity_type=sparsity_type, overrides=overrides).train()
    losses = train(model, steps=40, lr=2e-3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_attention_dropout_is_the_models_own_unless_given() -> None:
    ids = ids_like(MASK, "bert")
    for own, given, drops in (
        (0.5, None, True),
        (0.5, 0.0, False),
        (0.0, 0.5, True),
        (0.0, None, False),
    ):
        model = patched_model(
            "bert",
            attention_probs_dropout_prob=given,
            overrides={"attention_probs_dropout_prob": own},
        ).train()
        torch.manual_seed(0)
        first = model(ids, MASK).last_hidden_state
        second = model(ids, MASK).last_hidden_state
        assert torch.equal(first, second) is not drops
        model.eval()
        assert torch.equal(model(ids, MASK)[0], model(ids, MASK)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
def test_half_precision(family: str, dtype: torch.dtype, sparsity_type: str) -> None:
    model = patched_model(family, sparsity_type=sparsity_type)
    ids = ids_like(MASK, family)
    exact = run(model, ids, MASK)["last_hidden_state"]
    output = run(model.to(dtype), ids, MASK)["last_hidden_state"]
    assert output.dtype == dtype and torch.isfinite(output).all()
    if sparsity_type not in ("norm", "lsh"):  # their choices may differ by rounding
        near = (output.float() - exact)[MASK.bool()].abs().mean()
        assert near < (0.02 if dtype is torch.float16 else 0.1)
    if family == "xmod":
        return  # its adapters fail under autocast, patched or not
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(run(model.float(), ids, MASK)["last_hidden_state"]).all()


def test_lsh_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    model, same = (patched_model("bert", sparsity_type="lsh", seed=7) for _ in range(2))
    other = patched_model("bert", sparsity_type="lsh", seed=8)
    ids = ids_like(MASK, "bert")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = run(model, ids, MASK), run(model, ids, MASK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["last_hidden_state"], second["last_hidden_state"])
    assert torch.equal(first["last_hidden_state"], run(same, ids, MASK)["last_hidden_state"])
    assert not torch.equal(first["last_hidden_state"], run(other, ids, MASK)["last_hidden_state"])


def test_inference_mode() -> None:
    model, ids = patched_model("bert"), ids_like(MASK, "bert")
    expected = run(model, ids, MASK)["last_hidden_state"]
    with torch.inference_mode():
        assert torch.equal(model(ids, MASK).last_hidden_state, expected)


@pytest.mark.parametrize("sparsity_type", lsg_patch.attention.SPARSITY_TYPES)
def test_compiles_without_a_break(sparsity_type: str) -> None:
    torch._dynamo.reset()
    model = patched_model("bert", sparsity_type=sparsity_type, overrides=ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (75, 90):
        mask = right_padded(length, 40)
        ids = ids_like(mask, "bert")
        assert_same(run(compiled, ids, mask), run(model, ids, mask), mask, 1e-5)


@pytest.mark.parametrize("train_head", [True, False])
def test_training_the_global_tokens_alone(train_head: bool) -> None:
    head = next(c for c in model_classes("bert") if c.__name__ == "BertForSequenceClassification")
    model = patched_model("bert", head, num_global_tokens=4)
    assert lsg_patch.freeze_except_global(model, train_head) is model
    trained = {"bert.embeddings.global_embeddings.weight"}
    trained |= {"classifier.weight", "classifier.bias"} if train_head else set()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, steps=15, lr=1e-2)
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_weights_that_a_head_shares_are_frozen() -> None:
    head = next(c for c in model_classes("bert") if c.__name__ == "BertForMaskedLM")
    model = lsg_patch.freeze_except_global(patched_model("bert", head))
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.cls.predictions.transform.dense.weight.requires_grad
