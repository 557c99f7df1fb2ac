"""Mistakes planted in the Triton kernels themselves, their PTX executed: each is found."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton
from ptx_machine import OutOfBounds, PtxError, Race
from structures import assert_padding_meets_nothing

from sparsekd.kernels import gather, gemm, pack
from sparsekd.testing import LayerCase, assert_layer_matches_dense

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
        gemm._places, "if not WHOLE", "if False", STRIDED, WRONG,
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
    "no mask of nonzeros": (gather.row_sample, " total, mask=kept)", " total)", ROWS, PtxError),
    "no mask of packed maps": (
        pack.move_maps, "other=0.0), mask=bounds)", "other=0.0))", ROWS, Race,
    ),
    "padding that is read": (pack.move_maps, "(y >= 0) & ", "", PADDED, OutOfBounds),
    "another pixel": (pack.move_maps, "s % (high * wide)", "s % wide", PADDED, WRONG),
}  # fmt: skip


STRIDED_ROWS = dataclasses.replace(
    PADDED, out_features=9, map_size=(4, 5), options={"padding": (1, 2), "stride": (1, 2)}
)
STRIDED_SHARED = dataclasses.replace(
    STRIDED_ROWS, in_features=10, out_features=32, density=0.4, tile=(32, 1)
)
FILLED = dataclasses.replace(TILES, in_features=32, out_features=32, tile=(1, 16))
INSIDE = "there & _is_inside(pixel, in_high, in_wide, top, bottom, left, right)"
# The same, of what is computed again where numbers are infinite.
OF_INFINITY = {
    "padding of tiles that counts": (
        gemm._product_again, "tl.where(seen, a.to(tl.float32) * b, 0.0)", "a.to(tl.float32) * b",
        STRIDED, WRONG,
    ),
    "zeros of tiles that count": (
        gemm._product_again, "tl.load(slots + at + k) >= 0", "True", FILLED, WRONG,
    ),
    "the results before": (
        gemm._product_again, "y + to_y + (first + n)", "y + to_y + first", FILLED, WRONG,
    ),
    "read while others write": (
        gemm.tile_product, "tl.debug_barrier()", "pass", STRIDED, Race,
    ),
    "no bias": (gemm._product_again, "if BIAS", "if False", STRIDED, WRONG),
    "gradients that meet padding": (
        gemm.tile_sample, "(seen & here)[None, :], ", "(held & here)[None, :], ", STRIDED, WRONG,
    ),
    "padding of shared columns that counts": (
        gather._product_again, "tl.where(seen, a.to(tl.float32) * b, 0.0)", "a.to(tl.float32) * b",
        STRIDED_SHARED, WRONG,
    ),
    "no bias of shared columns": (
        gather._product_again, "if BIAS", "if False", STRIDED_SHARED, WRONG,
    ),
    "padding of shared columns that is sampled": (
        gather._sample_again, INSIDE, "there", STRIDED_SHARED, WRONG,
    ),
    "padding of rows that counts": (
        gather.row_product, "tl.where(seen, term, 0.0)", "term", STRIDED_ROWS, WRONG,
    ),
    "padding of rows that is sampled": (
        gather._sample_again, INSIDE, "there", STRIDED_ROWS, WRONG,
    ),
    "padding on one side": (
        gather._is_inside, "& (x < in_wide - right)", "", STRIDED_ROWS, WRONG,
    ),
    "nothing is computed again": (
        gather.row_sample, "has_nan(total)", "(total.shape[0] < 0)", STRIDED_ROWS, WRONG,
    ),
}  # fmt: skip


def plant(
    kernel: Any, before: str, after: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a changed kernel, or what it calls, in the place of its module's."""
    text = inspect.getsource(kernel.fn)
    assert text.count(before) == 1, "the planted text has to be there, once"
    home = sys.modules[kernel.fn.__module__]
    path = folder / "mutant.py"
    whole = inspect.getsource(home).replace(text, text.replace(before, after))
    path.write_text(whole.replace("from .", "from sparsekd.kernels."))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for name, function in vars(mutant).items():
        if isinstance(function, triton.JITFunction):
            monkeypatch.setattr(home, name, function)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str, on_triton, tmp_path: Path, monkeypatch) -> None:
    *mistake, case, failure = MUTANTS[name]
    assert_layer_matches_dense(case)
    plant(*mistake, tmp_path, monkeypatch)
    with pytest.raises(failure):
        assert_layer_matches_dense(case)


@pytest.mark.thorough
@pytest.mark.parametrize("name", OF_INFINITY)
def test_a_mistake_with_infinity_is_found(name: str, on_triton, tmp_path: Path, monkeypatch):
    *mistake, case, failure = OF_INFINITY[name]
    assert_padding_meets_nothing(case, math.inf, 2e-5, "triton")
    plant(*mistake, tmp_path, monkeypatch)
    with pytest.raises(failure):
        assert_padding_meets_nothing(case, math.inf, 2e-5, "triton")
