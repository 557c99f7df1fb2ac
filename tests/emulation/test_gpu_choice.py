"""CUDA tensors get the fastest one of the backends that take a product, or what structure suits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from gpu_choice import Stopwatch, choose_with, linear_args, operands, running
from triton.runtime.errors import OutOfResources
from triton_backend import float32_products

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.gpu import structure as gpu_structure


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
