"""Mistakes planted in the Triton kernels themselves, their PTX executed: each is found."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from ptx_machine import OutOfBounds, PtxError, Race

from sparsekd.kernels import gather, gemm, pack
from sparsekd.testing import LayerCase, assert_layer_matches_dense

HEAD = """import triton
import triton.language as tl
from sparsekd.kernels.config import PLAIN
from sparsekd.kernels.gather import _pixels
from sparsekd.kernels.gemm import ROW, _chunk


"""
TILES = LayerCase(
    seed=3,
    in_features=48,
    out_features=64,
    batch=(5,),
    density=0.6,
    bias=True,
    dtype=torch.float32,
    layout="contiguous",
    tile=(16, 16),
)
RAGGED = dataclasses.replace(TILES, in_features=40)
IN_PLACE = dataclasses.replace(TILES, in_features=64, out_features=40)
ROWS = dataclasses.replace(TILES, out_features=7, tile=(1, 1))
SHARED = dataclasses.replace(TILES, tile=(16, 1))
PADDED = dataclasses.replace(
    ROWS, in_features=5, kernel_size=(3, 3), map_size=(3, 4), options={"padding": 1}
)
STRIDED = dataclasses.replace(
    TILES, in_features=32, out_features=32, kernel_size=(3, 3), map_size=(6, 6),
    options={"padding": 1, "stride": 2},
)  # fmt: skip
WRONG = AssertionError
# The kernel, what is changed in it, the layer that runs, and how it must fail.
MUTANTS = {
    "no mask of the input": (
        gemm.tile_product, "(offset + k)[None, :], mask=mask, other=0.0)",
        "(offset + k)[None, :])", TILES, OutOfBounds,
    ),
    "no mask of the output": (
        gemm.tile_product, "element_ty), mask=mask)", "element_ty))", TILES, PtxError,
    ),
    "the chunk after": (
        gemm.tile_product, "weight + e *", "weight + (e + 1) *", RAGGED, OutOfBounds,
    ),
    "one chunk too few": (
        gemm.tile_product, "in range(begin, end)", "in range(begin, end - 1)", TILES, WRONG,
    ),
    "the value after": (
        gemm.tile_product, "weight + value + n", "weight + value + 1 + n", IN_PLACE, OutOfBounds,
    ),
    "rows of values a column apart": (
        gemm.tile_product, "k[:, None] * step", "k[:, None] * (step - ROW)", IN_PLACE, WRONG,
    ),
    "no mask of values": (
        gemm.tile_product, "b_at, mask=kept[None, :], other=0.0)", "b_at)", IN_PLACE, OutOfBounds,
    ),
    "the place of the chunk after": (
        gemm.tile_product, "e + 1, end", "e + 2, end", TILES, WRONG,
    ),
    "results of another layout": (
        gemm.tile_product, "if not WHOLE", "if False", STRIDED, WRONG,
    ),
    "one list for all programs": (gemm.tile_product, "program % count", "0", TILES, Race),
    "one place for all chunks": (gemm.tile_sample, "* entries + e)", "* entries)", TILES, Race),
    "the columns of the chunk before": (
        gather.shared_product, "(e + 1) * BK + k", "e * BK + k", SHARED, WRONG,
    ),
    "the input of the nonzero before": (
        gather.row_product, "offset + j + 1", "offset + j", ROWS, WRONG,
    ),
    "a row for two programs": (
        gather.row_product, "program // blocks)", "program // blocks // 2)", ROWS, Race,
    ),
    "no mask of a row": (
        gather.row_product, "element_ty), mask=live)", "element_ty))", ROWS, PtxError,
    ),
    "no mask of nonzeros": (gather.row_sample, "axis=1), mask=kept)", "axis=1))", ROWS, PtxError),
    "no mask of packed maps": (
        pack.move_maps, "other=0.0), mask=bounds)", "other=0.0))", ROWS, Race,
    ),
    "padding that is read": (pack.move_maps, "(y >= 0) & ", "", PADDED, OutOfBounds),
    "another pixel": (pack.move_maps, "s % (high * wide)", "s % wide", PADDED, WRONG),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str, on_triton, tmp_path: Path, monkeypatch) -> None:
    kernel, before, after, case, failure = MUTANTS[name]
    text, function = inspect.getsource(kernel.fn), kernel.fn.__name__
    assert text.count(before) == 1, "the planted text has to be there, once"
    path = tmp_path / "mutant.py"
    path.write_text(HEAD + text.replace(before, after))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    assert_layer_matches_dense(case)
    home = next(home for home in (gather, gemm, pack) if home.__name__ == kernel.fn.__module__)
    monkeypatch.setattr(home, function, getattr(mutant, function))
    with pytest.raises(failure):
        assert_layer_matches_dense(case)
