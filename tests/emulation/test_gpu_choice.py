"""CUDA tensors get the fastest one of the backends that take a product, or what structure suits."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from semi_structured_kernels import mask_2to4, transposable_mask
from triton.runtime.errors import OutOfResources
from triton_backend import float32_products

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.dispatch import backends, gpu_chooser
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.dispatch.gpu_chooser import Chooser, Measured
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.ops.store import Store


@pytest.fixture
def on_gpu(on_cuda, dense_cuda, on_triton, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test on the backend "gpu", on CPU tensors, with our own of its backends emulated."""
    entry = dataclasses.replace(backends.BACKENDS["gpu"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "gpu", entry)
    backends.load.cache_clear()
    choose_with(monkeypatch, lambda device: None)
    with skd.backend("gpu"):
        yield
    del sys.modules["sparsekd.ops.dispatch.gpu"]


def choose_with(
    patch: pytest.MonkeyPatch, clock_on: Callable[[torch.device], Any], path: Path | None = None
) -> Chooser:
    """Put a chooser with a clock in the place of the process's."""
    gpu = backends.module("gpu")
    made = Chooser(Store(path, Measured.of), clock_on)
    patch.setattr(gpu, "chooser", lambda: made)
    return made


def running(op: str, args: tuple[Any, ...]) -> str:
    return decide(op, args).backend


class Stopwatch:
    """Answer that a backend took a time, and count.

    Attributes:
        timed: what ran, in order.
    """

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = {"dense_cuda": 10.0, **milliseconds}
        self.timed: list[str] = []

    def __call__(self, device: torch.device) -> Callable[[partial], float]:
        return self.clock

    def clock(self, run: partial) -> float:
        run()
        parts = {"triton": "triton", "semi_structured": "semi_structured", "dense": "dense_cuda"}
        kinds = [name for part, name in parts.items() if part in run.func.__module__]
        name = kinds[0] if kinds else "cuda"
        self.timed.append(name)
        return self.milliseconds[name]


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure products however small."""
    monkeypatch.setattr(gpu_chooser, "LEAST_PRODUCTS", 1)


def operands(tile: tuple[int, int], dtype: torch.dtype) -> tuple[Topology, Tensor, Tensor]:
    grid = (
        torch.rand(64 // tile[0], 64 // tile[1], generator=torch.Generator().manual_seed(0)) < 0.4
    )
    mask = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    topology = Topology.from_mask(mask)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(topology.nnz, generator=generator).to(dtype)
    return topology, values, torch.randn(5, 64, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "tile, dtype, precision, expected",
    [
        ((16, 16), torch.float32, "ieee", "triton"),
        ((32, 16), torch.bfloat16, "ieee", "triton"),
        ((16, 1), torch.float16, "ieee", "triton"),
        ((16, 1), torch.float32, "tf32", "triton"),
        ((16, 1), torch.float32, "ieee", "cuda"),
        ((1, 16), torch.float16, "ieee", "cuda"),
        ((1, 1), torch.bfloat16, "ieee", "cuda"),
    ],
)
def test_structure_decides(on_gpu, tile, dtype, precision: str, expected: str) -> None:
    topology, values, x = operands(tile, dtype)
    structure = topology.crow_indices, topology.col_indices
    with float32_products(precision):
        assert running("linear", (x, values, *structure, None, [64, 64])) == expected


def test_equal_shapes_of_other_structure_run_elsewhere(on_gpu, on_triton) -> None:
    """The choice is made at each call: nothing in the shapes of these two tells them apart."""
    tiled, values, x = operands((16, 16), torch.float32)
    order = torch.randperm(tiled.numel, generator=torch.Generator().manual_seed(2))
    plain = Topology.from_mask(tiled.mask().flatten()[order].view(64, 64))
    for topology, launches in ((tiled, 1), (plain, 1), (tiled, 2)):
        y = skd.functional.linear(topology, values, x)
        assert on_triton["tile_product"] == launches
        dense = torch.zeros(64, 64)
        dense[topology.mask()] = values
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-4)


def linear_args(tile: tuple[int, int] = (16, 16)) -> tuple[Any, ...]:
    topology, values, x = operands(tile, torch.float16)
    return x, values, topology.crow_indices, topology.col_indices, None, [64, 64]


@pytest.mark.parametrize("tile", [(16, 16), (1, 1)], ids=["tiles", "rows"])
@pytest.mark.parametrize("faster, slower", [("cuda", "triton"), ("triton", "cuda")])
def test_the_faster_one_runs_from_then_on(
    on_gpu, any_size, monkeypatch, tmp_path: Path, faster: str, slower: str, tile
) -> None:
    watch, path = Stopwatch(**{faster: 1.25, slower: 2.5}), tmp_path / "gpu.jsonl"
    choose_with(monkeypatch, watch, path)
    args = linear_args(tile)
    for _ in range(3):
        assert running("linear", args).endswith(faster)
    assert watch.timed == ["cuda", "triton", "dense_cuda"]
    row = json.loads(path.read_text())
    assert (row["backend"], row["ms"]) == (faster, watch.milliseconds)
    assert "linear float16 half weight=64x64" in row["kind"]

    watch.milliseconds[faster] = 5.0  # a process that comes later finds the file
    assert (
        choose_with(monkeypatch, watch, path).store.get(row["kind"], tuple(row["step"])) is not None
    )
    assert running("linear", args).endswith(faster)
    assert watch.timed == ["cuda", "triton", "dense_cuda"]


def test_what_differs_in_time_is_measured_apart(on_gpu, any_size, monkeypatch) -> None:
    watch = Stopwatch(cuda=1.0, triton=2.0)
    chooser = choose_with(monkeypatch, watch)
    x, values, *rest = linear_args()
    running("linear", (x, values, *rest))
    running("linear", (x, values + 1, *rest))
    assert len(chooser.store) == 1
    running("linear", linear_args((1, 1)))
    running("linear", (x.float(), values.float(), *rest))
    with float32_products("tf32"):
        running("linear", (x.float(), values.float(), *rest))
    running("linear", (x.repeat(20, 1), values, *rest))
    running("linear_wgrad", (x, x, *rest[:2], [64, 64]))
    assert len(chooser.store) == 6
    assert len(watch.timed) == 18


def test_a_clear_result_serves_inputs_of_like_size(on_gpu, any_size, monkeypatch) -> None:
    watch = Stopwatch(cuda=1.0, triton=2.0)
    choose_with(monkeypatch, watch)
    x, *rest = linear_args()
    for rows in range(5, 40):
        assert running("linear", (x[:1].repeat(rows, 1), *rest)) == "cuda"
    assert watch.timed == ["cuda", "triton", "dense_cuda"]


def test_structure_decides_between_equals(on_gpu, any_size, monkeypatch) -> None:
    for watch in (Stopwatch(cuda=1.0, triton=1.04), Stopwatch(cuda=1.04, triton=1.0)):
        choose_with(monkeypatch, watch)
        assert running("linear", linear_args((16, 16))) == "triton"
        assert running("linear", linear_args((1, 1))) == "cuda"
        assert watch.timed == ["cuda", "triton", "dense_cuda"] * 2


def test_the_way_not_taken_leaves_no_plans(on_gpu, any_size, monkeypatch) -> None:
    choose_with(monkeypatch, Stopwatch(cuda=1.0, triton=2.0))
    gpu_structure._known.clear()
    args = linear_args()
    running("linear", args)
    (structure,) = [known for known, _ in gpu_structure._known.values()]
    assert {key[0] for key in structure._plans} == {"structure", "whether there are tiles"}


def test_small_products_are_not_measured(on_gpu, monkeypatch) -> None:
    watch = Stopwatch(cuda=1.0, triton=2.0)
    choose_with(monkeypatch, watch)
    assert running("linear", linear_args()) == "triton"
    assert watch.timed == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        OutOfResources(2, 1, "shared"),
        BackendError("no"),
        UnsupportedError("too many pixels"),
    ],
)
def test_structure_decides_where_one_does_not_run(
    on_gpu, any_size, monkeypatch, caplog, error: Exception
) -> None:
    def clock(run: partial) -> float:
        raise error

    chooser = choose_with(monkeypatch, lambda device: clock)
    for tile, expected in (((16, 16), "triton"), ((1, 1), "cuda")):
        assert running("linear", linear_args(tile)) == expected
    assert len(chooser.store) == 0
    assert "linear is not measured" in caplog.text


def test_damaged_choices_are_skipped(on_gpu, any_size, monkeypatch, tmp_path: Path) -> None:
    path, watch = tmp_path / "gpu.jsonl", Stopwatch(cuda=1.0, triton=2.0)
    choose_with(monkeypatch, watch, path)
    running("linear", linear_args())
    row = json.loads(path.read_text())
    for damage in (
        {"backend": "dense"},
        {"ms": 1.0},
        {"ms": {"cuda": None}},
        {"ms": {"cuda": "fast"}},
        {"ms": {"cuda": 1.0, "mine": 2.0}},
        {"backend": "gpu", "ms": {"gpu": 1.0}},
        {"backend": "cpp", "ms": {"cpp": 1.0}},
    ):
        path.write_text(json.dumps(row | damage) + "\n")
        watch.timed.clear()
        choose_with(monkeypatch, watch, path)
        assert running("linear", linear_args()) == "cuda"
        assert watch.timed == ["cuda", "triton", "dense_cuda"]


def test_info_names_the_file(on_gpu, any_size, monkeypatch, tmp_path: Path) -> None:
    choose_with(monkeypatch, Stopwatch(cuda=1.0, triton=2.0), tmp_path / "gpu.jsonl")
    running("linear", linear_args())
    info = skd.ops.info()["gpu_choices"]
    assert info == {"path": str(tmp_path / "gpu.jsonl"), "known": 1}


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
