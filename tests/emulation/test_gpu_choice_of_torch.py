"""Torch's kernels among those that CUDA tensors get: dense ones, and those for 2:4 weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from gpu_choice import Stopwatch, choose_with, linear_args, running
from semi_structured_kernels import mask_2to4, transposable_mask

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import UnsupportedError
from sparsekd.ops.dispatch import backends
from sparsekd.ops.dispatch.decisions import decide

# -- torch's dense kernels -------------------------------------------------------------------------


def test_a_weight_is_densified_where_that_is_fastest(on_gpu, any_size, monkeypatch) -> None:
    args = linear_args()
    sparse = skd.ops.linear(*args)
    choose_with(monkeypatch, Stopwatch(cuda=3.0, triton=2.0, dense_cuda=1.0))
    assert running("linear", args) == "dense_cuda"
    torch.testing.assert_close(skd.ops.linear(*args), sparse, rtol=2e-3, atol=2e-3)


def test_nothing_is_dense_that_is_not_clearly_faster(on_gpu, any_size, monkeypatch) -> None:
    choose_with(monkeypatch, Stopwatch(cuda=3.0, triton=1.04, dense_cuda=1.0))
    assert running("linear", linear_args((16, 16))) == "triton"
    assert running("linear", linear_args((1, 1))) == "dense_cuda"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN
    ],
)
def test_the_others_are_compared_where_a_dense_weight_does_not_run(
    on_gpu, any_size, monkeypatch, tmp_path: Path, error: Exception
) -> None:
    watch = Stopwatch(cuda=1.0, triton=2.0)

    def clock(run: partial) -> float:
        if "dense" in run.func.__module__:
            raise error
        return watch.clock(run)

    choose_with(monkeypatch, lambda device: clock, tmp_path / "gpu.jsonl")
    assert running("linear", linear_args()) == "cuda"
    assert json.loads((tmp_path / "gpu.jsonl").read_text())["ms"] == {"cuda": 1.0, "triton": 2.0}


def test_what_no_longer_fits_into_memory_runs_sparse(on_gpu, any_size, monkeypatch, caplog) -> None:
    args, asked = linear_args(), []
    sparse = skd.ops.linear(*args)
    choose_with(monkeypatch, Stopwatch(cuda=2.0, triton=3.0, dense_cuda=1.0))
    assert running("linear", args) == "dense_cuda"

    def densify(*_: Any) -> Tensor:
        asked.append(1)
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(backends.module("dense_cuda"), "_densify", densify)
        assert torch.equal(skd.ops.linear(*args), sparse)
    assert torch.equal(skd.ops.linear(*args), sparse)
    assert running("linear", args) == "triton"  # as structure decides
    assert len(asked) == 1
    assert "linear runs on triton from now on: full" in caplog.text


def test_memory_that_our_own_kernels_lack_is_an_error(on_gpu, any_size, monkeypatch) -> None:
    choose_with(monkeypatch, Stopwatch(cuda=1.0, triton=2.0))
    args = linear_args()
    assert running("linear", args) == "cuda"

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(backends.module("cuda"), "_gather", full)
    with pytest.raises(torch.OutOfMemoryError):
        skd.ops.linear(*args)


def test_nothing_is_dense_where_results_must_be_reproducible(
    on_gpu, any_size, monkeypatch, tmp_path: Path
) -> None:
    watch, path = Stopwatch(cuda=2.0, triton=3.0, dense_cuda=1.0), tmp_path / "gpu.jsonl"
    args = linear_args()
    for _ in range(2):  # the second time from the file
        choose_with(monkeypatch, watch, path)
        assert running("linear", args) == "dense_cuda"
        torch.use_deterministic_algorithms(True)
        try:
            assert running("linear", args) == "cuda"
        finally:
            torch.use_deterministic_algorithms(False)
        assert running("linear", args) == "dense_cuda"
    assert watch.timed == ["cuda", "triton", "dense_cuda", "cuda", "triton"]


# -- torch's kernels for 2:4 weights ---------------------------------------------------------------


def args_2to4(mask: Tensor, dtype: torch.dtype = torch.float16) -> tuple[Any, ...]:
    topology = Topology.from_mask(mask)
    x, values = torch.ones(5, 64, dtype=dtype), torch.ones(topology.nnz, dtype=dtype)
    return x, values, topology.crow_indices, topology.col_indices, None, [64, 64]


def permuted(mask: Tensor) -> Tensor:
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(0))
    return mask.flatten()[order].view(mask.shape)


def test_structure_sends_what_is_2to4_to_torch(on_gpu, semi_structured) -> None:
    both, one = args_2to4(transposable_mask(64, 64)), args_2to4(mask_2to4(64, 64))
    other = args_2to4(permuted(mask_2to4(64, 64)))
    assert running("linear", both) == running("linear", one) == "semi_structured"
    assert running("linear", other) == "cuda"
    assert running("linear", args_2to4(mask_2to4(64, 64), torch.float32)) == "cuda"
    assert running("linear_dgrad", (*both[:4], [64, 64])) == "semi_structured"
    assert running("linear_dgrad", (*one[:4], [64, 64])) == "cuda"
    assert running("linear_wgrad", (both[0], both[0], *both[2:4], [64, 64])) == "cuda"
    assert decide("linear", both).reason == "structure of the weight"
    y = skd.ops.linear(*both)
    assert torch.equal(y, torch.full_like(y, 32.0))
    assert semi_structured == {"mm": 1}


@pytest.mark.parametrize("fastest", ["cuda", "triton", "semi_structured", "dense_cuda"])
def test_the_fastest_of_all_runs_from_then_on(
    on_gpu, semi_structured, any_size, monkeypatch, tmp_path: Path, fastest: str
) -> None:
    times = {"cuda": 3.0, "triton": 3.0, "semi_structured": 3.0, fastest: 1.25}
    watch, path = Stopwatch(**times), tmp_path / "gpu.jsonl"
    chooser = choose_with(monkeypatch, watch, path)
    args = args_2to4(mask_2to4(64, 64))
    for _ in range(3):
        assert running("linear", args) == fastest
    assert watch.timed == ["cuda", "triton", "semi_structured", "dense_cuda"]
    assert dict(decide("linear", args).ms) == watch.milliseconds
    row = json.loads(path.read_text())
    assert (row["backend"], row["ms"]) == (fastest, watch.milliseconds)
    # A weight of the same density that is not 2:4 has a measurement of its own, of the others.
    choose_with(monkeypatch, watch, path)
    assert running("linear", args) == fastest
    watch.timed.clear()
    assert running("linear", args_2to4(permuted(mask_2to4(64, 64)))) == (
        "cuda" if fastest == "semi_structured" else fastest
    )
    assert watch.timed == ["cuda", "triton", "dense_cuda"]
    assert len(chooser.store) == 1


def test_one_that_is_nearly_the_fastest_is_not_displaced_by_the_slowest(
    on_gpu, semi_structured, any_size, monkeypatch
) -> None:
    args = args_2to4(mask_2to4(64, 64))
    for vendor, expected in ((1.04, "semi_structured"), (5.0, "cuda")):
        choose_with(monkeypatch, Stopwatch(cuda=1.0, triton=1.02, semi_structured=vendor))
        assert running("linear", args) == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), UnsupportedError("no")])
def test_torchs_kernels_are_out_of_the_race_where_they_do_not_run(
    on_gpu, semi_structured, any_size, monkeypatch, error: Exception
) -> None:
    watch = Stopwatch(cuda=2.0, triton=3.0, semi_structured=1.0)

    def clock(run: partial) -> float:
        if "semi_structured" in run.func.__module__:
            raise error
        return watch.clock(run)

    choose_with(monkeypatch, lambda device: clock)
    args = args_2to4(mask_2to4(64, 64))
    assert running("linear", args) == "cuda"
    assert dict(decide("linear", args).ms) == {"cuda": 2.0, "triton": 3.0, "dense_cuda": 10.0}


def test_our_kernels_run_what_could_not_be_measured(
    on_gpu, semi_structured, any_size, monkeypatch
) -> None:
    def clock(run: partial) -> float:
        raise torch.OutOfMemoryError("full")

    choose_with(monkeypatch, lambda device: clock)
    assert running("linear", args_2to4(mask_2to4(64, 64))) == "cuda"


def test_semi_structured_leaves_to_gpu_what_it_does_not_take(on_gpu, semi_structured) -> None:
    args = args_2to4(transposable_mask(64, 64))
    with skd.backend("semi_structured"):
        assert running("linear", args) == "semi_structured"
        assert running("linear_wgrad", (args[0], args[0], *args[2:4], [64, 64])) == "cuda"
        assert running("linear", linear_args((16, 16))) == "triton"
        assert running("linear", args_2to4(mask_2to4(64, 64), torch.float32)) == "cuda"
        kept = skd.ops.grow_topk(torch.ones(64, 64), *args[2:4], 1)
    assert kept.numel() == 1


def test_where_one_of_two_can_run_it_runs_all_but_what_is_2to4(
    on_gpu, semi_structured, monkeypatch
) -> None:
    monkeypatch.setattr(backends.module("gpu"), "chooser", lambda: None)
    assert running("linear", args_2to4(mask_2to4(64, 64))) == "semi_structured"
    other = decide("linear", args_2to4(permuted(mask_2to4(64, 64))))
    assert (other.backend, other.reason) == ("cuda", "the only backend that can run here")
