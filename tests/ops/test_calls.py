"""Calls of eager code: the key of equal calls, and what is prepared for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekd as skd
from sparsekd.errors import ShapeError, TopologyError, UnsupportedError
from sparsekd.ops.dispatch.cache_key import call_key

kernels = pytest.importorskip("sparsekd._C")

PRODUCTS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad")


def operands(product: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return the operands of a product of a small layer."""
    torch.manual_seed(0)
    conv = product.startswith("conv2d")
    shape = (6, 4, 3, 3) if conv else (6, 4)
    mask = torch.rand(shape) < 0.5
    topology = skd.Topology.from_mask(mask)
    indices = topology.crow_indices, topology.col_indices
    values, added = torch.randn(topology.nnz, dtype=dtype), torch.randn(6, dtype=dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype) if conv else torch.randn(3, 2, 4, dtype=dtype)
    y = torch.randn(2, 6, 5, 5, dtype=dtype) if conv else torch.randn(3, 2, 6, dtype=dtype)
    geometry = [list(shape), *([[1, 1], [1] * 4, [1, 1], 1] if conv else [])]
    if product.endswith("_dgrad"):
        return [y, values, *indices, *([list(x.shape)] if conv else []), *geometry]
    if product.endswith("_wgrad"):
        return [y, x, *indices, *geometry]
    return [x, values, *indices, added if bias else None, *geometry]


def known(product: str, args: list[Any]) -> bytes | None:
    """Return the compiled key of a call, whose structure is looked at first."""
    getattr(skd.ops, product)(*args)
    return kernels.call_key(None, 1, tuple(args))


@pytest.mark.parametrize("product", PRODUCTS)
def test_equal_calls_have_one_key(product: str) -> None:
    args = operands(product)
    key = known(product, args)
    assert isinstance(key, bytes)
    numbers = [a.clone() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    assert kernels.call_key(None, 1, tuple(numbers)) == key
    as_tuples = [tuple(a) if isinstance(a, list) else a for a in args]
    assert call_key(None, 1, tuple(as_tuples)) == key


def test_whatever_may_change_a_decision_changes_the_key() -> None:
    args = operands("conv2d")
    key = known("conv2d", args)
    x, values, crow, col, bias = args[:5]
    twin_crow, twin_col = crow.clone(), col.clone()
    known("conv2d", [x, values, twin_crow, twin_col, *args[4:]])
    others: dict[str, tuple[str | None, int, list[Any]]] = {
        "backend": ("cpp", 1, args),
        "threads": (None, 2, args),
        "batch": (None, 1, [x[:1], *args[1:]]),
        "memory format": (None, 1, [x.contiguous(memory_format=torch.channels_last), *args[1:]]),
        "dtype": (None, 1, [x.double(), values.double(), *args[2:4], bias.double(), *args[5:]]),
        "gaps in values": (None, 1, [x, torch.empty(len(values), 2)[:, 0], *args[2:]]),
        "no bias": (None, 1, [*args[:4], None, *args[5:]]),
        "stride": (None, 1, [*args[:6], [2, 1], *args[7:]]),
        "padding": (None, 1, [*args[:7], [1, 1, 0, 1], *args[8:]]),
        "groups": (None, 1, [*args[:9], 2]),
        "structure": (None, 1, [x, values, twin_crow, twin_col, *args[4:]]),
    }
    keys = {
        name: kernels.call_key(*rest, tuple(changed)) for name, (*rest, changed) in others.items()
    }
    assert None not in keys.values()
    assert len({key, *keys.values()}) == 1 + len(others)
    col[:1] += 0  # written into, if only the same numbers
    assert kernels.call_key(None, 1, tuple(args)) not in {key, *keys.values()}


def test_what_torch_does_not_lend_has_no_compiled_key() -> None:
    class Labelled(Tensor):
        pass

    args = operands("linear")
    assert kernels.call_key(None, 1, tuple(args)) is None, "nobody has asked for the structure yet"
    known("linear", args)
    others = [args[0].as_subclass(Labelled), args[0].to("meta")]
    for other in others:
        assert kernels.call_key(None, 1, (other, *args[1:])) is None
        assert isinstance(call_key(None, 1, (other, *args[1:])), tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_prepared_call_is_the_product_to_the_bit(product: str, dtype: torch.dtype) -> None:
    from sparsekd.ops.cpu import cpp

    for bias in (True, False):
        args = operands(product, bias, dtype)
        run = cpp.prepare(product, tuple(args))
        assert run is not None
        expected = getattr(cpp, product)(*args)
        result = run(*args)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
        assert result.untyped_storage().resizable()


def test_a_prepared_call_keeps_the_memory_format() -> None:
    from sparsekd.ops.cpu import cpp

    for product in PRODUCTS[:2]:
        first, *rest = operands(product)
        for stride in ([1, 1], [2, 2]):
            conv = [*rest[:-4], stride, *rest[-3:]]
            if product == "conv2d_dgrad" and stride == [2, 2]:
                first = first[:, :, :3, :3]
            for layout in (torch.contiguous_format, torch.channels_last):
                maps = first.contiguous(memory_format=layout)
                run = cpp.prepare(product, (maps, *conv))
                assert run is not None
                result = run(maps, *conv)
                assert torch.equal(result, getattr(cpp, product)(maps, *conv))
                assert result.is_contiguous(memory_format=layout)


def test_a_prepared_call_refuses_other_operands() -> None:
    from sparsekd.ops.cpu import cpp

    args = operands("conv2d")
    run = cpp.prepare("conv2d", tuple(args))
    assert run is not None
    x, values, crow, col, bias = args[:5]
    with pytest.raises(ShapeError, match="y: expected shape"):
        run(torch.cat([x, x]), values, crow, col, bias)
    with pytest.raises(ShapeError, match="values: expected"):
        run(x, values[1:], crow, col, bias)
    with pytest.raises(UnsupportedError, match="dtype float32"):
        run(x, values.double(), crow, col, bias)
    with pytest.raises(UnsupportedError, match="expected a tensor on the CPU"):
        run(x.to("meta"), values, crow, col, bias)
    with pytest.raises(TopologyError):
        run(x, values, crow.flip(0), col, bias)
    with pytest.raises(ShapeError, match="operands"):
        run(x, values)
    with pytest.raises(TypeError):
        type(run)()
    half = [a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    assert cpp.prepare("conv2d", tuple(half)) is None, "it is converted first"


def test_a_subclass_is_read_by_its_attributes() -> None:
    class Labelled(Tensor):
        pass

    x, values, crow, col, bias, _ = operands("linear")
    x, results = x.flatten(0, 1), []
    for maps in (x, x.as_subclass(Labelled)):
        results.append(torch.empty(len(x), 6))
        kernels.linear(maps, values, crow, col, bias, results[-1], 1)
    assert torch.equal(*results)


def test_a_tensor_left_over_from_a_transform_still_works() -> None:
    layer = skd.nn.SparseLinear(4, 3, sparsity=0.5)
    kept: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    x = torch.randn(2, 4)
    torch.func.grad(f)(x)
    assert torch.equal(layer(kept[0]), layer(x))
