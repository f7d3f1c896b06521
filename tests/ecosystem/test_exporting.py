"""One exported program serves all lengths and batch sizes, and compiled code needs few graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsg_patch
from tests.models import ids_like, right_padded, tiny_model

SETTINGS: dict[str, Any] = {"block_size": 8, "sparse_block_size": 8, "max_position_embeddings": 100}
# on both sides of two blocks, whole blocks and others, and one token
LENGTHS = (1, 9, 16, 17, 24, 100)
masked = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
can_export = pytest.mark.skipif(  # reason: torch before 2.7 does not say that it exports
    not hasattr(torch.compiler, "is_exporting"), reason="torch.export of all sizes needs torch 2.7"
)
Run = Callable[[Tensor, Tensor | None], Tensor]


class Encoder(nn.Module):
    """A model as a tracer wants it: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = self.model(input_ids=ids, attention_mask=mask)[0]
        return output


def encoder(family: str = "bert", **settings: Any) -> Encoder:
    model = lsg_patch.patch_model(tiny_model(family), **{**SETTINGS, **settings})
    model.config.return_dict = False
    return Encoder(model).eval()


def example_of(length: int, masked: bool, family: str = "bert") -> tuple[Tensor, ...]:
    mask = right_padded(length, length - 3)
    return (ids_like(mask, family), mask)[: 1 + masked]


def inputs(masked: bool, family: str = "bert") -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of other sizes, with padding on either side where they have a mask."""
    for batch in (1, 5):
        for length in LENGTHS:
            mask = right_padded(length, *[max(1, length - 3)] * (batch - 1))
            for some in (mask, mask.flip(1))[: 1 + masked]:
                yield ids_like(some, family), some if masked else None


def check(run: Run, like: nn.Module, masked: bool, family: str = "bert") -> None:
    for ids, mask in inputs(masked, family):
        with torch.no_grad():
            actual, expected = run(ids, mask), like(ids, mask)
        if mask is not None:
            actual, expected = actual[mask.bool()], expected[mask.bool()]
        message = f"batch and length {tuple(ids.shape)}"
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-4, msg=lambda m, at=message: f"{at}: {m}"
        )


def exported(model: Encoder, example: tuple[Tensor, ...], strict: bool, sizes: Any) -> Run:
    shapes = [{0: sizes[0], 1: sizes[1]} for _ in example]
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=tuple(shapes), strict=strict)
    module = program.module()
    return lambda ids, mask: module(*(x for x in (ids, mask) if x is not None))


@can_export
@masked
@pytest.mark.parametrize(
    ("strict", "example"), [(False, 12), (True, 31)], ids=["not strict", "strict"]
)
def test_one_program_for_all_sizes(masked: bool, strict: bool, example: int) -> None:
    sizes = torch.export.Dim("B", max=64), torch.export.Dim("T", max=100)
    model = encoder()
    check(exported(model, example_of(example, masked), strict, sizes), model, masked)


@can_export
def test_sizes_that_torch_finds_out() -> None:
    sizes, model = (torch.export.Dim.AUTO, torch.export.Dim.AUTO), encoder()
    check(exported(model, example_of(31, True), False, sizes), model, True)


@can_export
@pytest.mark.parametrize("selection", ["lsh", "block_stride"])
def test_one_program_for_every_selection(selection: str) -> None:
    sizes = torch.export.Dim("B", max=64), torch.export.Dim("T", max=100)
    model = encoder(sparsity_type=selection, num_global_tokens=3)
    check(exported(model, example_of(31, True), False, sizes), model, True)


@can_export
# with a projection, rotary positions, a bias by distance, shared layers
@pytest.mark.parametrize("family", ["electra", "roformer", "mpnet", "albert"])
def test_one_program_for_other_families(family: str) -> None:
    sizes = torch.export.Dim("B", max=64), torch.export.Dim("T", max=100)
    model = encoder(family)
    run = exported(model, example_of(31, True, family), False, sizes)
    check(run, model, True, family)


@masked
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("selection", "example"), [("norm", 12), ("lsh", 31), ("bos_pooling", 12)])
def test_a_trace_is_right_at_other_lengths(masked: bool, selection: str, example: int) -> None:
    """One of a short input took full attention for all, off by up to 1, without a word."""
    model = encoder(sparsity_type=selection)
    with torch.no_grad():
        traced = torch.jit.trace(model, example_of(example, masked), check_trace=False)
    check(lambda ids, mask: traced(*(x for x in (ids, mask) if x is not None)), model, masked)


@masked
@pytest.mark.parametrize(
    ("backend", "lengths"),
    [("aot_eager", (100, 99, 96, 12, 9, 16, 33)), ("eager", (12, 90, 96, 5, 40))],
    ids=str,
)
def test_few_graphs_for_lengths_in_any_order(
    backend: str, lengths: tuple[int, ...], masked: bool
) -> None:
    """One of the first size, and one each for short and for long inputs."""
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += any("attention" in str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    model = encoder()
    compiled = torch.compile(model, backend=counting)
    for length in lengths:
        mask = right_padded(length, max(1, length - 5))
        ids, given = ids_like(mask, "bert"), mask if masked else None
        with torch.no_grad():
            actual, expected = compiled(ids, given), model(ids, given)
        real = mask.bool() if masked else slice(None)
        torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-4)
    assert 2 <= graphs <= 3
