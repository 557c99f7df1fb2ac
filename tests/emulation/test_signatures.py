"""Calls of the CUDA library that are not what its header declares."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from sparsekd.cuda_library import HEADER, signatures

CPU = torch.device("cpu")
DECLARED = signatures(HEADER.read_text())
INDICES = torch.zeros(2, dtype=torch.int32)
MASK_CROW = (1, 1, torch.zeros(1, 1, dtype=torch.bool), INDICES)


def harmless(parameter: Any) -> Any:
    """Return an argument of the right kind: null, or zero, or a dtype, or no structs."""
    for value in (0, None, torch.float32, ()):
        try:
            parameter.from_param(value)
        except TypeError:
            continue
        return value
    raise AssertionError(parameter)


def test_right_arguments_are_taken(emulated) -> None:
    emulated.run("mask_crow", CPU, *MASK_CROW)
    assert emulated.size("transpose_scratch", 1, 3) == 24


@pytest.mark.parametrize("name", [name for name, (_, types) in DECLARED.items() if types])
def test_no_argument_passes_for_another(emulated, name: str) -> None:
    function = getattr(emulated._functions, name)
    args = tuple(map(harmless, function.argtypes))
    for place in range(len(args)):
        for wrong in (1.5, "text", object()):
            with pytest.raises(ctypes.ArgumentError, match=f"argument {place + 1}"):
                emulated._call(function, (*args[:place], wrong, *args[place + 1 :]))
    for other in (args[:-1], (*args, 0)):
        with pytest.raises(TypeError, match=f"{name}: expected {len(args)} arguments, got"):
            emulated._call(function, other)


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        (0, None, "TypeError"),
        (1, INDICES, "TypeError"),
        (2, 4096, "expected a tensor or None"),  # an address
        (3, INDICES.long(), "expected a tensor of torch.int32, got torch.int64"),
    ],
)
def test_a_wrong_argument_is_named(emulated, place: int, wrong: Any, reason: str) -> None:
    args = (*MASK_CROW[:place], wrong, *MASK_CROW[place + 1 :])
    with pytest.raises(ctypes.ArgumentError, match=f"argument {place + 1}.*{reason}"):
        emulated.run("mask_crow", CPU, *args)


MAPS = (None, 1, 1, 1, 1, 1, 1, 1, 1)


def gather(emulated, maps: Any = (MAPS,), products: Any = (), dtype: Any = torch.float32) -> None:
    args = maps, len(products), products, (), None, None, None, (MAPS,)
    emulated.run("gather", CPU, dtype, *args)


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        (MAPS, "expected 9 fields|TypeError"),  # a struct where an array of them belongs
        ([MAPS[:-1]], "sparsekd_cuda_maps: expected 9 fields, got 8"),
        ([(4096, *MAPS[1:])], "expected a tensor or None, got 4096"),  # an address
        ([(None, 1.5, *MAPS[2:])], "TypeError"),
    ],
)
def test_a_wrong_struct_is_refused(emulated, maps: Any, reason: str) -> None:
    gather(emulated)
    with pytest.raises(ctypes.ArgumentError, match=f"argument 2.*({reason})"):
        gather(emulated, maps)


def test_indices_in_a_struct_have_their_dtype(emulated) -> None:
    product = (*[1] * 6, INDICES.long(), None, None)
    with pytest.raises(ctypes.ArgumentError, match=r"expected a tensor of torch\.int32"):
        gather(emulated, products=[product])


def test_a_dtype_that_the_kernels_lack_is_refused(emulated) -> None:
    with pytest.raises(ctypes.ArgumentError, match=r"expected one of .*got torch.float64"):
        gather(emulated, dtype=torch.float64)


@pytest.mark.parametrize(
    "declaration", ["int x(unsigned n);", "int x(int64_t);", "int x", "y z();"]
)
def test_a_declaration_of_another_style_is_refused(declaration: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        signatures(f"SPARSEKD_API {declaration}")


def test_structs_have_fields_of_64_bits(emulated) -> None:
    """They are packed without gaps."""
    with pytest.raises(ValueError, match="sparsekd_cuda_small: expected fields of 64 bits"):
        signatures("typedef struct {\n  int64_t a;\n  int b;\n} sparsekd_cuda_small;")
