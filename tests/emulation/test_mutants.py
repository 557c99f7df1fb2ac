"""Mistakes planted in the kernels themselves: parity or the machine's diagnoses find each."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptx_machine import Module, PtxError, Race, Uninitialised
from structures import (
    assert_corrects_what_is_not_finite,
    assert_indices,
    assert_padding_meets_nothing,
    assert_topology_says_what_the_mask_does,
    random_mask,
    starts_of,
)

from sparsekd import Topology, cuda_library, ops
from sparsekd.errors import BackendError
from sparsekd.testing import LayerCase, assert_layer_matches_dense, poisoned_memory

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


GROUPED = dataclasses.replace(
    MAPS, in_features=6, out_features=80, layout="channels_last", options={"groups": 2}
)
DILATED = dataclasses.replace(MAPS, options={"padding": 2, "dilation": 2})
DENSE = dataclasses.replace(MAPS, in_features=20, out_features=40, density=1.0, batch=(6,))


def products() -> None:
    for case in (LAYER, MAPS, DENSE):
        assert_layer_matches_dense(case)


def features() -> None:
    assert_layer_matches_dense(LAYER)


def groups() -> None:
    with poisoned_memory():
        assert_layer_matches_dense(GROUPED)


def dilation() -> None:
    assert_layer_matches_dense(DILATED)


def borders() -> None:
    assert_padding_meets_nothing(MAPS, math.inf, 2e-5)


def corrections() -> None:
    assert_corrects_what_is_not_finite()


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
    "no barrier before the window is read": (
        "gather.cuh", "sizeof(V));\n    __syncthreads();\n", "sizeof(V));\n", features, Race,
    ),
    "no barrier before the window is overwritten": (
        "gather.cuh", "__syncthreads();                           // nobody", "// nobody", products,
        WRONG,
    ),
    "no barrier before the nonzeros are read": (
        "gather.cuh", "__syncwarp();\n      next", "next", products, WRONG,
    ),
    "no barrier before they are overwritten": (
        "gather.cuh", "__syncwarp();  // nobody", "// nobody", features, Race,
    ),
    "no barrier before the outputs take the window's place": (
        "gather.cuh", "__syncthreads();  // nobody still reads what was there", "", products, WRONG,
    ),
    "no barrier before the outputs are read": (
        "gather.cuh", "__syncthreads();\n    for_outputs(", "for_outputs(", products, WRONG,
    ),
    "lanes without an output leave": (
        "gather.cuh", "  const int32_t rows = matrix.rows - first_row;",
        "  if (targets[lane].pixel < 0) return;\n  const int32_t rows = matrix.rows - first_row;",
        groups, WRONG,
    ),
    "one nonzero too few": (
        "gather.cuh", "i < kAtOnce; ++i", "i + 1 < kAtOnce; ++i", products, WRONG,
    ),
    "what fills up the nonzeros is one": (
        "gather.cuh", ": Nonzero{0, 0.0f}", ": Nonzero{0, 1.0f}", products, WRONG,
    ),
    "values in the order of the blocks": (
        "gather.cuh", "values[slots[k]]", "values[k]", products, WRONG,
    ),
    "a barrier for half of the warp": (
        "gather.cuh", "__syncwarp();\n      next", "__syncwarp(0xffffu);\n      next", products,
        FAULT,
    ),
    "rows of the warp that end together": (
        "gather.cuh", "left >> r * kAtOnce & 1", "left & 1", products, WRONG,
    ),
    "channels of the first group": (
        "gather.cuh", "return block * kRows / rows_of_group * channels_of_group;", "return 0;",
        groups, WRONG,
    ),
    "results that stay as they are": (
        "gather.cuh", "check && is_finite(*check)", "check", corrections, WRONG,
    ),
    "results that do not": (
        "gather.cuh", "check && is_finite(*check)", "false", corrections, WRONG,
    ),
    "sums of parts that nobody has written": (
        "sample.cuh", "const float* check) {\n  if (is_right(check)) return;\n  const int64_t k",
        "const float* check) {\n  const int64_t k", corrections, WRONG,
    ),
    "padding in sums that are not finite": (
        "gather.cuh", "if (!maps.has(y, x)) return;",
        "if (!maps.has(y, x)) return act(zeros<T, kVec>());", borders, WRONG,
    ),
    "sums that are not finite": (
        "gather.cuh", "again |= 1u << r;", "again = 0;", borders, WRONG,
    ),
    "samples that are not finite": (
        "sample.cuh", "&& !is_finite(total)", "&& false", borders, WRONG,
    ),
    "a sum without its last step": (
        "sample.cuh", "distance > 0;", "distance > 1;", borders, WRONG,
    ),
    "a lane that gives away what it keeps": (
        "sample.cuh", "upper ? value[i] : value[i + kDistance]",
        "upper ? value[i + kDistance] : value[i]", products, WRONG,
    ),
    "a shuffle under a condition": (
        "sample.cuh", "sum = warp_sum(sum);", "if (lane <= j) sum = warp_sum(sum);", borders, FAULT,
    ),
    "the gradient of another row": (
        "sample.cuh", "if ((place ^ before) >> kRowShift)", "if (false)", products, WRONG,
    ),
    "no barrier before the pixels of the window are read": (
        "sample.cuh", "__syncthreads();  // nor does anybody", "// nor does anybody", products,
        WRONG,
    ),
    "no barrier before the gradients are read": (
        "sample.cuh", "});\n      __syncthreads();\n", "});\n", features, Race,
    ),
    "nonzeros of the first round": (
        "sample.cuh", "matrix.places[first + i]", "matrix.places[from + i]", products, WRONG,
    ),
    "one part too few": (
        "sample.cuh", "part < parts; ++part", "part + 1 < parts; ++part", products, WRONG,
    ),
    "padding that is not zero": (
        "patch.cuh", "static_cast<int32_t>(maps.pixel(y, x)) : -1;",
        "static_cast<int32_t>(maps.pixel(y, x)) : 0;", products, WRONG,
    ),
    "a walk that ends early": (
        "patch.cuh", "walk.digit[2] < (", "walk.digit[2] + 1 < (", features, Uninitialised,
    ),
    "outputs side by side": (
        "patch.cuh", "x * patches.x.step();", "x;", products, WRONG,
    ),
    "outputs of a dilation side by side": (
        "patch.cuh", "return number % spacing + number / spacing * patch * spacing;",
        "return number * patch;", dilation, WRONG,
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


# Some mistakes are seen only where PTX is executed, which knows who wrote what, and when.
OF_PTX = [name for name, mutant in MUTANTS.items() if issubclass(mutant[-1], PtxError)]
OTHERS = [name for name in MUTANTS if name not in OF_PTX]


@pytest.mark.parametrize("name", OTHERS)
def test_a_planted_mistake_is_found(
    name: str, on_cuda, bind, compile_for_the_cpu, tmp_path
) -> None:
    file, before, after, check, failure = MUTANTS[name]
    check()
    on_cuda.repeats()  # where infinity makes them
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


def assert_found_in_ptx(name: str, on_ptx, compile_to_ptx, folder: Path, patch) -> None:
    file, before, after, check, failure = MUTANTS[name]
    headers = plant(file, before, after, folder)
    text = compile_to_ptx(headers / "kernels.cu", headers=headers).read_text()
    check()
    patch.setattr(on_ptx, "module", Module(text))
    race = Race if "barrier before" in name else (WRONG, PtxError)
    with pytest.raises(failure if name in OF_PTX else race):
        check()


@pytest.mark.parametrize("name", OF_PTX)
def test_it_is_found_where_ptx_is_executed(
    name: str, on_ptx, compile_to_ptx, tmp_path, monkeypatch
) -> None:
    assert_found_in_ptx(name, on_ptx, compile_to_ptx, tmp_path, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("name", OTHERS)
def test_it_is_found_in_what_nvcc_makes_of_it(
    name: str, on_ptx, compile_to_ptx, tmp_path, monkeypatch
) -> None:
    assert_found_in_ptx(name, on_ptx, compile_to_ptx, tmp_path, monkeypatch)
