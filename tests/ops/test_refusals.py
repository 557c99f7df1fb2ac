"""Arguments that do not fit are named; crafted index tensors never reach a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsekd as skd
from sparsekd import Topology, functional, ops
from sparsekd.errors import ShapeError, TopologyError, UnsupportedError

CROW = torch.tensor([0, 2, 3, 3], dtype=torch.int32)
COL = torch.tensor([0, 3, 1], dtype=torch.int32)
CONV: Any = ([3, 1, 2, 2], [1, 1], [0, 0, 0, 0], [1, 1], 1)


def crafted() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    def crow(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    return {
        "falls": (crow(0, 3, 2, 3), COL),
        "negative": (crow(0, -5, 2, 3), COL),
        "starts late": (crow(1, 2, 3, 3), COL),
        "ends late": (crow(0, 2, 3, 1000), COL),
        "ends early": (crow(0, 1, 1, 2), COL),
        "too long": (crow(0, 2, 3, 3, 3), COL),
        "too short": (crow(0, 2, 3), COL),
        "empty": (crow(), COL),
        "column out of range": (CROW, crow(0, 4, 1)),
        "column far out of range": (CROW, crow(0, 2**31 - 1, 1)),
        "column negative": (CROW, crow(0, 3, -1)),
        "unsorted": (CROW, crow(3, 0, 1)),
        "duplicated": (CROW, crow(3, 3, 1)),
        "int64": (CROW.long(), COL.long()),
        "floating": (CROW.float(), COL.float()),
        "two-dimensional": (CROW[None], COL[None]),
    }


@pytest.mark.parametrize("case", crafted())
def test_crafted_indices_are_refused_by_every_op(backend: str, case: str) -> None:
    crow, col = crafted()[case]
    x, y, values = torch.ones(2, 1, 3, 3), torch.ones(2, 3, 2, 2), torch.ones(3)
    calls = {
        ops.conv2d: (x, values, crow, col, None, *CONV),
        ops.conv2d_dgrad: (y, values, crow, col, [2, 1, 3, 3], *CONV),
        ops.conv2d_wgrad: (y, x, crow, col, *CONV),
        ops.linear: (torch.ones(2, 4), values, crow, col, None, [3, 4]),
        ops.linear_dgrad: (torch.ones(2, 3), values, crow, col, [3, 4]),
        ops.linear_wgrad: (torch.ones(2, 3), torch.ones(2, 4), crow, col, [3, 4]),
    }
    for op, args in calls.items():
        with pytest.raises(TopologyError):
            op(*args)


def test_an_index_tensor_modified_after_its_first_use_is_refused(backend: str) -> None:
    crow, col = CROW.clone(), COL.clone()
    args = (torch.ones(2, 4), torch.ones(3), crow, col, None, [3, 4])
    expected = ops.linear(*args)
    col[1] = 1 << 20
    with pytest.raises(TopologyError):
        ops.linear(*args)
    col[1] = 3
    assert torch.equal(ops.linear(*args), expected)
    col[0] = 2  # still a structure, another one
    assert torch.equal(ops.linear(*args), expected)


def test_a_structure_of_another_matrix_is_refused(backend: str) -> None:
    wide = Topology.from_mask(torch.ones(3, 5, dtype=torch.bool))
    args = (wide.crow_indices, wide.col_indices)
    ops.linear(torch.ones(2, 5), torch.ones(15), *args, None, [3, 5])
    with pytest.raises(TopologyError):
        ops.linear(torch.ones(2, 4), torch.ones(15), *args, None, [3, 4])


TOPOLOGY = Topology(CROW, COL, (3, 1, 2, 2))
X = torch.ones(2, 1, 3, 3)


@pytest.mark.parametrize(
    "x, values, bias, options, message",
    [
        (torch.ones(2, 2, 3, 3), 3, None, {}, r"x: expected shape \[N, 1, H, W\]"),
        (torch.ones(2, 1, 3), 3, None, {}, r"x: expected shape \[N, 1, H, W\]"),
        (torch.ones(3), 3, None, {}, "x: expected shape"),
        (torch.ones(2, 1, 1, 3), 3, None, {}, "x: expected a map no smaller than the kernel"),
        (X, 4, None, {}, r"values: expected shape \[3\], one per nonzero, got \[4\]"),
        (X, 3, torch.ones(2), {}, r"bias: expected shape \[3\], got \[2\]"),
        (X, 3, None, {"groups": 2}, "groups: expected a divisor of the 3 output channels"),
        (X, 3, None, {"groups": 0}, "groups: expected a divisor"),
        (X, 3, None, {"stride": 0}, "expected stride >= 1"),
        (X, 3, None, {"stride": (1, 2, 3)}, "stride: expected one or two numbers"),
        (X, 3, None, {"dilation": (1, 0)}, "dilation >= 1"),
        (X, 3, None, {"padding": -1}, "padding >= 0"),
        (X, 3, None, {"padding": (1, 2, 3)}, "padding: expected one, two or four numbers"),
    ],
)
def test_conv2d_names_what_does_not_fit(backend, x, values, bias, options, message) -> None:
    with pytest.raises(ShapeError, match=message):
        functional.conv2d(TOPOLOGY, torch.ones(values), x, bias, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding": "full"}, "expected 'same', 'valid' or numbers, got 'full'"),
        ({"padding": "same", "stride": 2}, "'same' needs stride 1"),
        ({"padding": 1, "padding_mode": "mirror"}, "padding_mode: expected one of"),
    ],
)
def test_conv2d_says_what_is_supported(backend, options, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        functional.conv2d(TOPOLOGY, torch.ones(3), X, **options)


def test_dtypes_are_not_mixed_silently(backend: str) -> None:
    with pytest.raises(UnsupportedError, match="values: expected dtype and device of the input"):
        functional.conv2d(TOPOLOGY, torch.ones(3), X.double())
    with pytest.raises(UnsupportedError, match="bias: expected dtype and device of the input"):
        functional.conv2d(TOPOLOGY, torch.ones(3), X, torch.ones(3).double())


def test_linear_spmm_sddmm_name_what_does_not_fit(backend: str) -> None:
    with pytest.raises(ShapeError, match=r"x: expected shape \[..., 4\], got \[2, 3\]"):
        functional.linear(TOPOLOGY, torch.ones(3), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"x: expected shape \[..., 4\], got \[\]"):
        functional.linear(TOPOLOGY, torch.ones(3), torch.tensor(1.0))
    with pytest.raises(ShapeError, match=r"x: expected shape \[4, 'n'\], got \[3, 2\]"):
        functional.spmm(TOPOLOGY, torch.ones(3), torch.ones(3, 2))
    with pytest.raises(ShapeError, match=r"a: expected shape \[3, 'n'\], got \[2, 2\]"):
        functional.sddmm(TOPOLOGY, torch.ones(2, 2), torch.ones(2, 4))
    with pytest.raises(ShapeError, match=r"b: expected shape \[5, 4\], got \[2, 4\]"):
        functional.sddmm(TOPOLOGY, torch.ones(3, 5), torch.ones(2, 4))
    with pytest.raises(ShapeError, match="topology: expected a 4-D weight"):
        functional.conv2d(Topology(CROW, COL, (3, 4)), torch.ones(3), X)


def test_gradients_of_the_wrong_shape_are_refused(backend: str) -> None:
    structure = TOPOLOGY.crow_indices, TOPOLOGY.col_indices
    with pytest.raises(ShapeError, match=r"grad: expected shape \[2, 3, 2, 2\]"):
        ops.conv2d_wgrad(torch.ones(2, 3, 3, 3), X, *structure, *CONV)
    with pytest.raises(ShapeError, match=r"grad: expected shape \[2, 3, 2, 2\]"):
        ops.conv2d_dgrad(torch.ones(1, 3, 2, 2), torch.ones(3), *structure, [2, 1, 3, 3], *CONV)
    with pytest.raises(ShapeError, match=r"grad: expected shape \[2, 3\]"):
        ops.linear_wgrad(torch.ones(3, 3), torch.ones(2, 4), *structure, [3, 4])


def test_damaged_indices_are_refused_by_the_dense_backend_too() -> None:
    x, values = torch.ones(2, 4), torch.ones(3)
    crow, col = (
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.tensor([0, 9, 1], dtype=torch.int32),
    )
    with skd.backend("dense"):
        for op, first, second in (("linear", x, values), ("linear_dgrad", x[:, :2], values)):
            more = [None] if op == "linear" else []
            with pytest.raises(TopologyError, match="out of range"):
                getattr(ops, op)(first, second, crow, col, *more, [2, 4])
        with pytest.raises(TopologyError, match="out of range"):
            ops.linear_wgrad(x[:, :2], x, crow, col, [2, 4])
