"""Mistakes planted in the kernels themselves: parity or the machine's diagnoses find each."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptx_machine import Module, PtxError, Race
from structures import (
    assert_indices,
    assert_padding_meets_nothing,
    assert_topology_says_what_the_mask_does,
    random_mask,
    starts_of,
)

from sparsekd import Topology, cuda_library, ops
from sparsekd.errors import BackendError
from sparsekd.testing import LayerCase, assert_layer_matches_dense

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ORDERS = ("forward", "backward", "shuffled")

LAYER = LayerCase(
    seed=5,
    in_features=90,
    out_features=7,
    batch=(37,),
    density=0.6,
    bias=True,
    dtype=torch.float32,
    layout="contiguous",
)
MAPS = dataclasses.replace(
    LAYER,
    in_features=4,
    kernel_size=(3, 3),
    map_size=(9, 11),
    options={"padding": 1, "stride": 2},
)


def products() -> None:
    for case in (LAYER, MAPS):
        assert_layer_matches_dense(case)


def borders() -> None:
    assert_padding_meets_nothing(MAPS, math.inf, 2e-5)


def growth() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(30, 40, generator=generator) < 0.3
    score = torch.randn(30, 40, generator=generator).mul(4).round()
    topology = Topology.from_mask(mask)
    k = int((score[~mask] > 0).sum()) + 30  # not all of the zeros, and these of either sign
    found = ops.grow_topk(score, topology.crow_indices, topology.col_indices, k)
    flat = score.masked_fill(mask, -99).flatten()
    expected = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(found, expected)


def topologies() -> None:
    for cols in (48, 37):  # rows of whole vectors, and of bytes
        mask = random_mask(70, cols, 0.5)
        crow = torch.empty(71, dtype=torch.int32)
        library = cuda_library.library_for(mask.device)
        library.run("mask_crow", mask.device, *mask.shape, mask, crow)
        assert_indices(crow, starts_of(mask))  # before columns are written where it says
        assert_topology_says_what_the_mask_does(mask)


WRONG, FAULT = AssertionError, BackendError
# What is changed in which file, the check that runs, and how it must fail.
MUTANTS: dict[str, tuple[str, str, str, Callable[[], None], type[Exception]]] = {
    "no barrier before the nonzeros are read": (
        "gather.cuh", "    __syncwarp();\n    if (live) {", "    if (live) {", products, WRONG,
    ),
    "no barrier before they are overwritten": (
        "gather.cuh", "    __syncwarp();  // nobody", "    // nobody", products, WRONG,
    ),
    "idle lanes leave before the barriers": (
        "gather.cuh", "  float sum[kVec];\n", "  if (!live) return;\n  float sum[kVec];\n",
        products, FAULT,
    ),
    "one nonzero too few": (
        "gather.cuh", "i < count; ++i", "i + 1 < count; ++i", products, WRONG,
    ),
    "values in the order of the weight": (
        "gather.cuh", "slots ? slots[k] : k", "k", products, WRONG,
    ),
    "a barrier for half of the warp": (
        "gather.cuh", "__syncwarp();\n    if (live)", "__syncwarp(0xffffu);\n    if (live)",
        products, FAULT,
    ),
    "a sum without its last step": (
        "sample.cuh", "distance > 0;", "distance > 1;", products, WRONG,
    ),
    "a shuffle under a condition": (
        "sample.cuh", "const float total = warp_sum(sum[j]);\n    if (lane == j",
        "const float total = lane <= j ? warp_sum(sum[j]) : 0.0f;\n    if (lane == j",
        products, FAULT,
    ),
    "the gradient of another row": (
        "sample.cuh", "if (j > 0 && row[j] != row[j - 1])", "if (false)", products, WRONG,
    ),
    "padding in sums that are not finite": (
        "gather.cuh", "if (inside.has(pixel))", "if (pixel >= 0)", borders, WRONG,
    ),
    "padding in samples that are not finite": (
        "sample.cuh", "if (inside.has(window.pixel(unit) + offset))", "if (offset >= 0)", borders,
        WRONG,
    ),
    "no barrier in the unpacking": (
        "pack.cuh", "  __syncthreads();\n  if (q0 +", "  if (q0 +", products, WRONG,
    ),
    "padding that is not zero": (
        "pack.cuh", "from_float<T>(0.0f)", "from_float<T>(1.0f)", products, WRONG,
    ),
    "no barrier before the bins are read": (
        "grow.cuh", "  __syncthreads();\n  if (bins[threadIdx.x])", "  if (bins[threadIdx.x])",
        growth, WRONG,
    ),
    "ties to the higher position": (
        "grow.cuh", "<< 32 | ~position", "<< 32 | position", growth, WRONG,
    ),
    "zeros of two signs": (
        "grow.cuh", "score == 0.0f ? 0.0f : score", "score", growth, WRONG,
    ),
    "places taken by one lane of the warp": (
        "grow.cuh", "place = __shfl_sync(kAllLanes, place, 0) +", "place +=", growth, WRONG,
    ),
    "no barrier before the sums are read": (
        "topology.cuh", "  __syncthreads();\n", "", topologies, WRONG,
    ),
    "a rank among half of the lower lanes": (
        "topology.cuh", "bits_below(threadIdx.x % kWarp)", "bits_below(threadIdx.x % kWarp / 2)",
        topologies, WRONG,
    ),
    "a rank without its last digit": (
        "topology.cuh", "kVec >> digit;", "kVec >> digit > 1;", topologies, WRONG,
    ),
    "a ballot for rows that go on": (
        "topology.cuh", "first < mask.vectors; first += kWarp)\n    sum",
        "first + lane < mask.vectors; first += kWarp)\n    sum", topologies, FAULT,
    ),
    "marks of all rows in one word": (
        "topology.cuh", "row / kMarkRows * cols + column", "column", topologies, WRONG,
    ),
    "marks that overwrite each other": (
        "topology.cuh",
        "atomicOr(&marks[at.word(row, at.col[k])], 1u << row % kMarkRows)",
        "marks[at.word(row, at.col[k])] = 1u << row % kMarkRows", topologies, WRONG,
    ),
    "places without the words before": (
        "topology.cuh", "before[word] + __popc", "__popc", topologies, WRONG,
    ),
}  # fmt: skip


def plant(file: str, before: str, after: str, folder: Path) -> Path:
    """Return a copy of the sources with a mistake."""
    headers = folder / "cuda"
    shutil.copytree(SOURCES, headers)
    text = (headers / file).read_text()
    assert text.count(before) == 1, "the planted text has to be there, once"
    (headers / file).write_text(text.replace(before, after))
    return headers


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(
    name: str, on_cuda, bind, compile_for_the_cpu, tmp_path
) -> None:
    file, before, after, check, failure = MUTANTS[name]
    check()
    headers = plant(file, before, after, tmp_path)
    built = compile_for_the_cpu(headers / "kernels.cu", "-O0", "-g0", "-shared", headers=headers)
    mutant = type(on_cuda)(built)
    bind(mutant)
    found = []
    for order in ORDERS:
        mutant.set_order(order)
        try:
            check()
        except (WRONG, FAULT) as error:
            found.append(type(error))
    assert failure in found


@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_found_in_what_nvcc_makes_of_it(
    name: str, on_ptx, compile_to_ptx, tmp_path, monkeypatch
) -> None:
    file, before, after, check, _ = MUTANTS[name]
    headers = plant(file, before, after, tmp_path)
    text = compile_to_ptx(headers / "kernels.cu", headers=headers).read_text()
    check()
    monkeypatch.setattr(on_ptx, "module", Module(text))
    with pytest.raises(Race if "barrier before" in name else (WRONG, PtxError)):
        check()
