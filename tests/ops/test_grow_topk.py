"""Growth selection: exactly the k largest free scores, ties to the lower position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekd as skd
from sparsekd import Topology, ops
from sparsekd.errors import ShapeError, TopologyError
from sparsekd.testing import available_backends


def grow(topology: Topology, score: torch.Tensor, k: int) -> list[int]:
    return ops.grow_topk(score, topology.crow_indices, topology.col_indices, k).tolist()


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_sorting_by_score_then_position(rows, cols, seed, dtype, tied) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=generator) < 0.4
    score = torch.randn(rows, cols, generator=generator)
    score = (score.round() if tied else score).to(dtype)
    free = (~mask).flatten().nonzero().squeeze(1).tolist()
    k = int(torch.randint(len(free) + 1, (), generator=generator))
    flat = score.flatten().tolist()
    expected = sorted(sorted(free, key=lambda position: (-flat[position], position))[:k])
    for name in available_backends():
        with skd.backend(name):
            assert grow(Topology.from_mask(mask), score, k) == expected


@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_layer_of_real_size(backend: str, density: float, layout: str) -> None:
    torch.set_num_threads(2)
    mask = torch.rand(64, 32, 3, 3) < density
    score = torch.randn(mask.shape).abs()
    if layout == "channels_last":
        score = score.contiguous(memory_format=torch.channels_last)
    masked = score.masked_fill(mask, -1).flatten()
    expected = masked.topk(500).indices.sort().values
    assert grow(Topology.from_mask(mask), score, 500) == expected.tolist()


def test_infinite_scores_have_their_place(backend: str) -> None:
    topology = Topology.from_mask(torch.tensor([[True, False, False, False]]))
    score = torch.tensor([[float("nan"), -float("inf"), float("inf"), 0.0]])
    assert grow(topology, score, 2) == [2, 3]
    assert grow(topology, score, 3) == [1, 2, 3]
    assert grow(topology, score, 0) == []


def test_nan_among_the_candidates_is_refused(backend: str) -> None:
    topology = Topology.from_mask(torch.tensor([[True, False, False]]))
    with pytest.raises(ValueError, match="NaN"):
        grow(topology, torch.tensor([[0.0, float("nan"), 1.0]]), 1)


@pytest.mark.parametrize("k", [-1, 3])
def test_k_out_of_range_is_refused(backend: str, k: int) -> None:
    topology = Topology.from_mask(torch.tensor([[True, False, False]]))
    with pytest.raises(ShapeError, match=f"k: expected 0 <= k <= 2 free positions, got {k}"):
        grow(topology, torch.ones(1, 3), k)


def test_crafted_indices_are_refused(backend: str) -> None:
    crow = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(TopologyError):
        ops.grow_topk(torch.ones(1, 3), crow, torch.tensor([3], dtype=torch.int32), 1)
    two_rows = torch.tensor([0, 1, 1], dtype=torch.int32)
    with pytest.raises(ShapeError, match="score: expected a multiple of 2 rows"):
        ops.grow_topk(torch.ones(1, 3), two_rows, torch.tensor([0], dtype=torch.int32), 1)


def test_full_and_empty_topologies(backend: str) -> None:
    full = Topology.from_mask(torch.ones(2, 3, dtype=torch.bool))
    assert grow(full, torch.ones(2, 3), 0) == []
    empty = Topology.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    assert grow(empty, torch.ones(2, 3), 4) == [0, 1, 2, 3]
