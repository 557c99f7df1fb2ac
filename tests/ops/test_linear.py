"""Linear layers of every batch size, on every instruction set, equal masked dense torch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import sparsekd as skd
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    dense_results,
    poisoned_memory,
    relative_error,
    sparse_results,
    with_layout,
)

CASE = LayerCase(
    seed=1,
    in_features=65,
    out_features=43,
    batch=(1,),
    density=0.2,
    bias=True,
    dtype=torch.float32,
    layout="contiguous",
)
# Around the sizes of the tiles that a batch is cut into, for both dtypes.
BATCHES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 128, 131, 255, 1024, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", BATCHES)
def test_batch_sizes(backend: str, batch: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1 + batch % 3)
    case = dataclasses.replace(CASE, seed=batch, batch=(batch,), dtype=dtype)
    with poisoned_memory():
        assert_layer_matches_dense(case)


@pytest.mark.parametrize("isa", ["scalar", "generic", "avx2", "avx512"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted", "expanded"])
def test_layouts_on_every_instruction_set(isa: str, layout: str) -> None:
    core = pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    if isa not in core.info()["isas"]:
        pytest.skip(f"this processor has no {isa}")
    core.set_isa(isa)
    try:
        with skd.backend("cpp"), poisoned_memory():
            for batch in ((3,), (70,), (2, 3, 11)):
                case = dataclasses.replace(CASE, batch=batch, layout=layout)
                grad = with_layout(torch.randn(*batch, CASE.out_features), layout)
                expected, actual = dense_results(case, grad.double()), sparse_results(case, grad)
                for name, tensor in expected.items():
                    assert relative_error(actual[name], tensor) < 2e-5, name
    finally:
        core.set_isa("auto")


@pytest.mark.parametrize("batch", [1, 7, 130])
@pytest.mark.parametrize("features", [(3000, 37), (37, 3000), (1, 5000), (5000, 1)])
def test_wide_layers(backend: str, batch: int, features: tuple[int, int]) -> None:
    torch.set_num_threads(2)
    case = dataclasses.replace(
        CASE, in_features=features[0], out_features=features[1], batch=(batch,), density=0.05
    )
    with poisoned_memory():
        assert_layer_matches_dense(case)


@pytest.mark.parametrize("features", [(0, 5), (5, 0), (0, 0)])
def test_layers_without_features(backend: str, features: tuple[int, int]) -> None:
    for batch in (), (0,), (3,), (2, 3):
        assert_layer_matches_dense(
            dataclasses.replace(
                CASE, in_features=features[0], out_features=features[1], batch=batch
            )
        )


@pytest.mark.parametrize("features", [(5, 65536), (65536, 5)])
def test_results_larger_than_a_cache(features: tuple[int, int]) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    torch.set_num_threads(2)
    case = dataclasses.replace(
        CASE, in_features=features[0], out_features=features[1], batch=(70,), density=0.4
    )
    with skd.backend("cpp"), poisoned_memory():
        assert_layer_matches_dense(case)


@pytest.mark.parametrize("batch", [1, 6, 100, 200])
def test_results_do_not_depend_on_the_number_of_threads(batch: int) -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    case = dataclasses.replace(CASE, in_features=400, out_features=301, batch=(batch,))
    with skd.backend("cpp"):
        alone = sparse_results(case)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            together = sparse_results(case)
            assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_row_leaves_the_others_alone(backend: str, value: float) -> None:
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    topology = skd.Topology.from_mask(mask)
    x = torch.ones(9, 30)
    clean = skd.functional.linear(topology, torch.ones(topology.nnz), x)
    x[4] = value
    y = skd.functional.linear(topology, torch.ones(topology.nnz), x)
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])
    assert not y[4, mask.any(dim=1)].isfinite().any()
