"""What nvcc makes of the CUDA kernels, executed: layers equal dense torch, mistakes are found."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from ptx_machine import (
    AbsentLane,
    Deadlock,
    DivergentBarrier,
    Misaligned,
    Module,
    OutOfBounds,
    Race,
    Uninitialised,
)
from structures import assert_topology_says_what_the_mask_does, random_mask

from sparsekd import Topology, ops
from sparsekd.testing import LayerCase, assert_layer_matches_dense, poisoned_memory

CONV = LayerCase(
    seed=5,
    in_features=6,
    out_features=10,
    batch=(5,),
    density=0.4,
    bias=True,
    dtype=torch.float32,
    layout="contiguous",
    kernel_size=(3, 2),
    map_size=(5, 7),
    options={"padding": 1, "stride": 2, "groups": 2},
)
CASES = {
    "convolution": CONV,
    "dilated, channels_last": dataclasses.replace(
        CONV, layout="channels_last", batch=(9,), options={"padding": (2, 1), "dilation": 2}
    ),
    "linear": dataclasses.replace(
        CONV,
        batch=(3,),
        in_features=70,
        out_features=13,
        kernel_size=None,
        map_size=(1, 1),
        options={},
    ),
    "empty rows": dataclasses.replace(CONV, density=0.02),
    "dense": dataclasses.replace(CONV, density=1.0),
}
# As in test_ops.py: sums in float32, rounded once.
LIMITS = {torch.float32: 2e-5} | {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_layers_equal_masked_dense(on_ptx, name: str, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert_layer_matches_dense(dataclasses.replace(CASES[name], dtype=dtype), LIMITS[dtype])
    assert on_ptx.kernels


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("k", [0, 1, 100, 870])
def test_growth_takes_the_best(on_ptx, dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    mask = torch.rand(30, 40, generator=generator) < 0.2
    score = torch.randn(30, 40, generator=generator).mul(4).round().to(dtype)
    topology = Topology.from_mask(mask)
    found = ops.grow_topk(score, topology.crow_indices, topology.col_indices, k)
    flat = score.float().masked_fill(mask, -99).flatten()
    expected = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(found, expected)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 48), (70, 37), (3, 1040), (0, 5), (5, 0)], ids=str)
def test_topologies_say_what_the_mask_does(on_ptx, shape: tuple[int, int], density: float) -> None:
    with poisoned_memory():
        assert_topology_says_what_the_mask_does(random_mask(*shape, density))


def test_every_kernel_has_run(on_ptx, request: pytest.FixtureRequest) -> None:
    tests = {item.function for item in request.session.items if item.path == request.path}
    needed = {
        test_layers_equal_masked_dense,
        test_growth_takes_the_best,
        test_topologies_say_what_the_mask_does,
    }
    if not needed <= tests:
        pytest.skip("the tests above do not run")
    assert on_ptx.kernels == set(on_ptx.module.kernels)


# The mistakes of planted.cu and what has to be found; nvcc keeps them all.
PLANTED = {
    "missing_barrier": (Race, "reads memory that was written"),
    "missing_second_barrier": (Race, "unordered"),
    "missing_warp_barrier": (Race, "reads memory that was written"),
    "unwritten_shared": (Uninitialised, "nobody has written"),
    "divergent_barrier": (DivergentBarrier, "different barriers"),
    "caller_not_in_mask": (AbsentLane, "does not name the calling lane"),
    "lane_leaves_before_shuffle": (AbsentLane, "lane 5, which has left"),
    "absent_lanes": (AbsentLane, "lane 8, which has left"),
    "different_collectives": (AbsentLane, "different collectives"),
    "different_masks": (AbsentLane, "different masks"),
    "shuffle_from_outside": (AbsentLane, "lane 20, which takes no part"),
    "deadlock": (Deadlock, "deadlock"),
    "read_past_the_end": (OutOfBounds, r"\+256 bytes from the start"),
    "shared_past_the_end": (OutOfBounds, "4 bytes at 256 of 256"),
    "misaligned_vector": (Misaligned, "16 bytes at"),
    "plain_update": (Race, "of block"),
    "plain_count": (Race, "unordered"),
}


@pytest.fixture(scope="module")
def planted(compile_to_ptx) -> Module:
    return Module(compile_to_ptx(Path(__file__).with_name("planted.cu")).read_text())


def run_planted(module: Module, name: str) -> list[float]:
    (full,) = (k for k in module.kernels if re.search(rf"\d{name}_kernel", k))
    out = torch.zeros(64)
    buffers = [(out.data_ptr(), out.nbytes)]
    threads, blocks = {"absent_lanes": (40, 1), "plain_update": (32, 2)}.get(name, (64, 1))
    kernel = module[full]
    kernel.launch((blocks,), (threads,), kernel.arguments(out.data_ptr()), buffers)
    return out.tolist()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(planted: Module, name: str) -> None:
    error, diagnosis = PLANTED[name]
    with pytest.raises(error, match=diagnosis) as found:
        run_planted(planted, name)
    assert f"{name}_kernel" in str(found.value)
    assert "planted.cu:" in str(found.value), "the diagnosis says where"


def test_nothing_is_found_in_clean_code(planted: Module) -> None:
    assert run_planted(planted, "sum") == [2016.0] * 64
