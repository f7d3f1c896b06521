"""Which keys a block sees, by property."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lsg_patch.attention import Geometry
from lsg_patch.attention.geometry import Window, unfold_windows


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    factor = draw(st.integers(1, 6))
    block, sparse = factor * draw(st.integers(1, 6)), factor * draw(st.integers(0, 8))
    return Geometry(block, sparse, factor, draw(st.booleans()))


@given(geometries(), st.integers(0, 20))
def test_windows_meet_and_do_not_overlap(geometry: Geometry, block: int) -> None:
    """In tokens: the left sparse window ends where the local one starts, the right one begins
    where it ends, and each covers ``sparse_block_size * sparsity_factor`` tokens.
    """

    def span(window: Window, scale: int) -> tuple[int, int]:
        start = (block * window.stride + window.start) * scale
        return start, start + window.size * scale

    local = span(geometry.local_window, 1)
    own_end = (block + 1) * geometry.block_size
    assert local == (
        own_end - 2 * geometry.block_size,
        own_end + (0 if geometry.is_causal else geometry.block_size),
    )
    sparse = [span(window, geometry.sparsity_factor) for window in geometry.sparse_windows]
    if not geometry.has_sparse:
        assert sparse == []
        return
    reach = geometry.sparse_block_size * geometry.sparsity_factor
    assert sparse[0] == (local[0] - reach, local[0])
    assert sparse[1:] == ([] if geometry.is_causal else [(local[1], local[1] + reach)])


@given(
    st.lists(
        st.tuples(st.integers(-9, 9), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=3
    ),
    st.integers(1, 6),
    st.integers(1, 25),
    st.integers(0, 4),
)
def test_unfolded_windows_hold_what_their_ranges_say(
    shapes: list[tuple[int, int, int]], blocks: int, length: int, first: int
) -> None:
    windows = tuple(Window(*shape) for shape in shapes)
    x = torch.arange(1, length + 1).view(1, length, 1)
    for window, view in zip(windows, unfold_windows(x, windows, blocks, 1, first), strict=True):
        assert view.shape == (1, blocks, window.size, 1)
        for j in range(blocks):
            start = (first + j) * window.stride + window.start
            want = [i + 1 if 0 <= i < length else 0 for i in range(start, start + window.size)]
            assert view[0, j, :, 0].tolist() == want


@given(geometries(), st.integers(1, 150), st.integers(0, 150), st.integers(0, 50))
def test_runs_are_the_blocks_with_windows_cut_off_at_the_ends(
    geometry: Geometry, length: int, first: int, hidden: int
) -> None:
    """Every query in one run, which sees of each window the keys there are, in the same order."""
    num_sparse = max(0, geometry.num_blocks(length) * geometry.sparse_per_block - hidden)
    first %= min(geometry.block_size, length)

    def seen(window: Window, block: int, among: int, first: int = 0) -> list[int]:
        start = block * window.stride + window.start
        return [i for i in range(start, start + window.size) if first <= i < among]

    next_block = queries = 0
    for run in geometry.runs(range(first, length), range(num_sparse)):
        assert run.first_block == next_block
        next_block += run.num_blocks
        queries += run.num_blocks * run.num_queries
        for block in range(run.first_block, next_block):
            for cut in (run.local, *run.sparse):
                start = block * cut.stride + cut.start
                assert cut.size == len(seen(cut, block, length + num_sparse)) and start >= 0
            whole = [seen(window, block, num_sparse) for window in geometry.sparse_windows]
            assert [seen(w, block, num_sparse) for w in run.sparse] == [w for w in whole if w]
            local = seen(geometry.local_window, block, length, first)
            assert seen(run.local, block, length) == local
        for cut in (run.local, *run.sparse):
            all_seen = [
                key
                for block in range(run.first_block, next_block)
                for key in seen(cut, block, length + num_sparse)
            ]
            assert run.span(cut) == range(min(all_seen), max(all_seen) + 1)
    assert next_block == geometry.num_blocks(length) and queries == length
