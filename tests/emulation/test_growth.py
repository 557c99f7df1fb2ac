"""Growth on both GPU backends takes the best free positions, its kernels running on the CPU."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from sparsekd import Topology, ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("cuda-forward", "cuda-backward", "cuda-shuffled")
BACKENDS = (*ORDERS, "triton")


@pytest.fixture
def largest(request: pytest.FixtureRequest) -> type:
    """Run the test on the backend that the parameter names, and return its LargestK.

    The threads of a block of the backend "cuda" take their turns in the order that follows.
    """
    name, _, order = request.param.partition("-")
    if name == "triton":
        request.getfixturevalue("on_triton")
        from sparsekd.ops.triton.growth import LargestK

        return LargestK
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("Triton's interpreter has nothing to do with it")
    request.getfixturevalue("on_cuda").set_order(order)
    return request.getfixturevalue("emulated_module").LargestK


def grow(mask: Tensor, score: Tensor, k: int) -> list[int]:
    topology = Topology.from_mask(mask)
    return ops.grow_topk(score, topology.crow_indices, topology.col_indices, k).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "largest, seed",
    [(name, seed) for name in BACKENDS for seed in range(6 if name == "triton" else 12)],
    indirect=["largest"],
)
def test_growth_equals_sorting_by_score_then_position(largest, seed: int, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, cols = 1 + seed % 5, 3 + 40 * seed
    mask = torch.rand(rows, cols, generator=generator) < 0.3
    score = torch.randn(rows, cols, generator=generator)
    score = (score.round() if seed % 2 else score).to(dtype)  # with ties, -0 and 0 among them
    free = (~mask).flatten().nonzero().squeeze(1).tolist()
    flat = score.flatten().tolist()
    ranked = sorted(free, key=lambda position: (-flat[position], position))
    for k in (0, 1, len(free) // 3, len(free)):
        assert grow(mask, score, k) == sorted(ranked[:k])


@pytest.mark.parametrize("largest", BACKENDS, indirect=True)
def test_growth_takes_rectangles_as_they_come(largest) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(20, 37, generator=generator) < 0.2
    score = torch.randn(20, 37, generator=generator)
    topology = Topology.from_mask(mask)
    best = largest(topology.crow_indices, topology.col_indices, 20, 37, 100, torch.float32)
    for row, rows in ((12, 8), (0, 12)):
        for col, cols in ((30, 7), (0, 30)):
            best.offer(score[row : row + rows, col : col + cols], row, col, True)
    expected = score.abs().masked_fill(mask, -1).flatten().topk(100).indices.sort().values
    assert torch.equal(best.positions(), expected)


@pytest.mark.parametrize("largest", ["cuda-forward", "triton"], indirect=True)
def test_infinite_scores_and_nan(largest) -> None:
    mask = torch.tensor([[True, False, False, False]])
    score = torch.tensor([[math.nan, -math.inf, math.inf, 0.0]])
    assert grow(mask, score, 2) == [2, 3]
    assert grow(mask, score, 3) == [1, 2, 3]
    for k in (0, 1):
        with pytest.raises(ValueError, match="NaN"):
            grow(mask, torch.tensor([[0.0, math.nan, 1.0, 2.0]]), k)
