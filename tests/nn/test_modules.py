"""SparseLinear and SparseConv2d compute what their dense counterparts compute."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from sparsekd.errors import ShapeError, TopologyError, UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear, SparseModule

CONVOLUTIONS = {
    "plain": ((6, 8, 3), {}),
    "stride": ((6, 8, 3), {"stride": 2, "padding": 1}),
    "groups": ((6, 8, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((6, 12, 3), {"groups": 6}),
    "dilation": ((6, 8, 3), {"dilation": 2, "padding": 2}),
    "rectangular": ((6, 8, (1, 4)), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    "same": ((6, 8, 3), {"padding": "same"}),
    "same, even kernel": ((6, 8, (2, 4)), {"padding": "same", "dilation": (1, 3)}),
    "valid": ((6, 8, 3), {"padding": "valid", "stride": 2}),
    "pointwise": ((6, 8, 1), {"bias": False}),
    "reflect": ((6, 8, 3), {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": ((6, 8, 3), {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    "circular": ((6, 8, 5), {"padding": "same", "padding_mode": "circular", "groups": 2}),
}
INPUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 0).transpose(2, 3)[::2],
    "empty batch": lambda x: x[:0],
    "unbatched": lambda x: x[0],
}


def assert_same_as_dense(module: SparseModule, x: Tensor) -> None:
    """Compare the output and every gradient with the dense twin, in float64."""
    dense = module.to_dense()
    sparse_x, dense_x = (x.detach().requires_grad_() for _ in range(2))
    y, expected = module(sparse_x), dense(dense_x)
    assert y.shape == expected.shape
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(sparse_x.grad, dense_x.grad, **close)
    torch.testing.assert_close(
        module.values.grad, dense.weight.grad[module.topology.mask()], **close
    )
    if module.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad, **close)


@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_equals_dense(name, layout):
    sizes, options = CONVOLUTIONS[name]
    conv = SparseConv2d(*sizes, **options, sparsity=0.7, dtype=torch.float64)
    assert_same_as_dense(conv, INPUTS[layout](torch.randn(3, 6, 9, 11, dtype=torch.float64)))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (4, 0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_dense(shape, bias):
    linear = SparseLinear(7, 5, bias, sparsity=0.6, dtype=torch.float64)
    assert_same_as_dense(linear, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("sparsity", [0.0, 0.97, 1.0])
def test_extreme_densities(sparsity):
    conv = SparseConv2d(6, 8, 3, sparsity=sparsity, dtype=torch.float64)
    assert_same_as_dense(conv, torch.randn(2, 6, 5, 5, dtype=torch.float64))
    linear = SparseLinear(6, 8, sparsity=sparsity, dtype=torch.float64)
    assert_same_as_dense(linear, torch.randn(2, 6, dtype=torch.float64))


def test_empty_rows():
    mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    mask[[0, 5], 2] = True
    conv = SparseConv2d(6, 8, 3, mask=mask, dtype=torch.float64)
    assert_same_as_dense(conv, torch.randn(2, 6, 5, 5, dtype=torch.float64))


def test_values_are_the_nonzeros_in_row_major_order():
    for module in (SparseConv2d(4, 6, 3, groups=2, sparsity=0.8), SparseLinear(9, 5, sparsity=0.5)):
        topology = module.topology
        assert type(module.values) is nn.Parameter
        assert module.values.shape == (topology.nnz,)
        weight = module.dense_weight()
        assert weight.shape == topology.shape
        assert torch.equal(weight[topology.mask()], module.values)
        assert weight.count_nonzero() == topology.nnz


def test_dense_weight_is_differentiable():
    linear = SparseLinear(9, 5, sparsity=0.5)
    scale = torch.randn(5, 9)
    (linear.dense_weight() * scale).sum().backward()
    assert torch.equal(linear.values.grad, scale[linear.topology.mask()])


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.999, 1.0])
def test_nnz_is_exact(sparsity):
    conv = SparseConv2d(7, 11, (3, 2), sparsity=sparsity)
    assert conv.topology.nnz == round((1 - sparsity) * 7 * 11 * 6)
    assert conv.topology.density == conv.topology.nnz / (7 * 11 * 6)


def test_parameters_and_buffers_have_the_promised_names():
    conv = SparseConv2d(4, 8, 3)
    assert [name for name, _ in conv.named_parameters()] == ["values", "bias"]
    assert [name for name, _ in conv.named_buffers()] == ["crow_indices", "col_indices"]
    assert conv.crow_indices.dtype == conv.col_indices.dtype == torch.int32
    assert SparseConv2d(4, 8, 3, bias=False).bias is None


def test_construction_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = SparseConv2d(4, 8, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    for other, same in ((SparseConv2d(4, 8, 3, seed=5), True), (SparseConv2d(4, 8, 3), False)):
        assert (first.topology == other.topology) is same
        assert torch.equal(first.values, other.values) is same
        assert torch.equal(first.bias, other.bias) is same


def test_dtype_does_not_change_what_is_drawn():
    double, single = (SparseLinear(40, 30, dtype=d) for d in (torch.float64, torch.float32))
    assert double.topology == single.topology
    assert torch.equal(double.values.float(), single.values)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_to_dense_and_back(name, bias):
    sizes, options = CONVOLUTIONS[name]
    conv = SparseConv2d(*sizes, **{**options, "bias": bias}, sparsity=0.8).eval()
    dense = conv.to_dense()
    again = SparseConv2d.from_dense(dense, mask=conv.topology.mask())
    assert type(dense) is nn.Conv2d
    assert again.topology == conv.topology
    assert torch.equal(again.values, conv.values)
    assert again.extra_repr() == conv.extra_repr()
    assert not dense.training
    assert not again.training
    made = nn.Conv2d(*sizes, **{**options, "bias": bias})
    assert dense.extra_repr() == made.extra_repr()


def test_from_dense_by_mask_keeps_these_weights():
    dense = nn.Conv2d(4, 6, 3, groups=2)
    mask = torch.rand(dense.weight.shape) < 0.3
    conv = SparseConv2d.from_dense(dense, mask=mask)
    assert torch.equal(conv.values, dense.weight[mask])
    assert torch.equal(conv.topology.mask(), mask)
    assert torch.equal(conv.bias, dense.bias)
    assert conv.bias is not dense.bias


def test_from_dense_by_sparsity_keeps_the_largest():
    dense = nn.Linear(30, 20)
    linear = SparseLinear.from_dense(dense, sparsity=0.85)
    assert linear.topology.nnz == round((1 - 0.85) * 600)
    kept = dense.weight[linear.topology.mask()].abs().min()
    assert kept >= dense.weight[~linear.topology.mask()].abs().max()


def test_from_dense_breaks_ties_by_position():
    dense = nn.Linear(10, 10)
    nn.init.ones_(dense.weight)
    linear = SparseLinear.from_dense(dense, sparsity=0.77)
    assert linear.topology.flat_indices().tolist() == list(range(23))


def test_from_dense_keeps_dtype_mode_and_frozen_parameters():
    dense = nn.Linear(8, 8, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    linear = SparseLinear.from_dense(dense, sparsity=0.5)
    assert linear.values.dtype == linear.bias.dtype == torch.bfloat16
    assert not linear.training
    assert not linear.values.requires_grad
    assert linear.bias.requires_grad
    assert not linear.to_dense().weight.requires_grad


@pytest.mark.parametrize("arguments", [{}, {"mask": torch.ones(4, 4, dtype=bool), "sparsity": 0.5}])
def test_from_dense_wants_a_mask_or_a_sparsity(arguments):
    with pytest.raises(ValueError, match="exactly one"):
        SparseLinear.from_dense(nn.Linear(4, 4), **arguments)


def test_from_dense_refuses_what_it_cannot_copy():
    with pytest.raises(UnsupportedError, match=r"expected an nn.Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(1, 1, 1), sparsity=0.5)
    with pytest.raises(UnsupportedError, match=r"expected an nn.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(1, 1), sparsity=0.5)
    with pytest.raises(UnsupportedError, match="UninitializedParameter"):
        SparseLinear.from_dense(nn.LazyLinear(4), sparsity=0.5)
    with pytest.raises(ShapeError, match=r"mask: expected shape \[4, 4\], got \[4, 3\]"):
        SparseLinear.from_dense(nn.Linear(4, 4), mask=torch.ones(4, 3, dtype=bool))
    with pytest.raises(TopologyError, match=r"torch\.bool"):
        SparseLinear.from_dense(nn.Linear(4, 4), mask=torch.ones(4, 4))


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ShapeError, "groups: expected a divisor", {"groups": 3}),
        (ShapeError, "groups: expected a divisor", {"groups": 0}),
        (ShapeError, "kernel_size: expected", {"kernel_size": 0}),
        (ShapeError, "stride: expected", {"stride": (1, 0)}),
        (ShapeError, "dilation: expected", {"dilation": (1, 1, 1)}),
        (ShapeError, "padding: expected", {"padding": -1}),
        (ShapeError, "padding: expected", {"padding": (1, 1, 1, 1)}),
        (UnsupportedError, "padding: expected", {"padding": "full"}),
        (UnsupportedError, "needs stride 1", {"padding": "same", "stride": 2}),
        (UnsupportedError, "padding_mode: expected one of zeros", {"padding_mode": "mirror"}),
        (ValueError, "sparsity: expected", {"sparsity": 90}),
        (ShapeError, "mask: expected shape", {"mask": torch.ones(3, 3, dtype=bool)}),
    ],
)
def test_conv2d_refuses(error, text, arguments):
    with pytest.raises(error, match=text):
        SparseConv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **arguments})


def test_repr_tells_density_and_nnz():
    assert repr(SparseLinear(100, 50, sparsity=0.9)) == (
        "SparseLinear(in_features=100, out_features=50, bias=True, density=0.1, nnz=500)"
    )
    assert repr(SparseConv2d(4, 10, 5, padding="same", groups=2, bias=False, sparsity=0.5)) == (
        "SparseConv2d(4, 10, kernel_size=(5, 5), stride=(1, 1), padding='same', groups=2, "
        "bias=False, density=0.5, nnz=250)"
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="wieght"):
        _ = SparseLinear(4, 4).wieght


def test_gradcheck():
    conv = SparseConv2d(2, 4, (2, 3), stride=(1, 2), padding=1, groups=2, sparsity=0.5).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    parameters = dict(conv.named_parameters())

    def run(x, *tensors):
        return torch.func.functional_call(conv, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()))


def test_random_configurations_equal_dense():
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for seed, bias in itertools.product(range(20), (True, False)):
        groups = pick(1, 1, 2, 3)
        conv = SparseConv2d(
            groups * pick(1, 2, 5),
            groups * pick(1, 3, 4),
            (pick(1, 2, 3), pick(1, 3, 5)),
            stride=(pick(1, 2), pick(1, 3)),
            padding=(pick(0, 1, 2), pick(0, 2)),
            dilation=(pick(1, 2), pick(1, 2)),
            groups=groups,
            bias=bias,
            sparsity=pick(0.0, 0.5, 0.9, 1.0),
            seed=seed,
            dtype=torch.float64,
        )
        x = torch.randn(pick(1, 4), conv.in_channels, 9, 10, dtype=torch.float64)
        assert_same_as_dense(conv, INPUTS[pick("contiguous", "channels_last", "strided")](x))
