"""Every op of the backend "cuda" equals masked dense torch, its kernels running on the CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from structures import assert_padding_meets_nothing

import sparsekd as skd
from sparsekd import Topology, ops
from sparsekd.errors import BackendError, TopologyError, UnsupportedError
from sparsekd.ops.cuda import plans
from sparsekd.ops.cuda.plans import Axis, Maps, Product
from sparsekd.ops.gpu.convolution import Conv
from sparsekd.ops.gpu.structure import find_structure
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    dense_results,
    poisoned_memory,
    random_layer,
    relative_error,
    sparse_results,
    with_layout,
)

ORDERS = ("forward", "backward", "shuffled")
# float32 as the CPU's kernels are held to; halves are rounded once, after sums in float32.
LIMITS = {torch.float32: 2e-5} | {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)}
# The gradient of a padding other than zeros is torch's, which adds up several halves.
OVERLAPS = 8
CHUNK = 20

CONV = LayerCase(
    seed=5,
    in_features=12,
    out_features=10,
    batch=(5,),
    density=0.3,
    bias=True,
    dtype=torch.float32,
    layout="contiguous",
    kernel_size=(3, 3),
    map_size=(7, 9),
    options={"padding": 1},
)
LINEAR = dataclasses.replace(
    CONV, in_features=65, out_features=43, kernel_size=None, map_size=(1, 1), options={}
)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, on_cuda) -> str:
    on_cuda.set_order(request.param)
    return request.param


@pytest.mark.parametrize(
    "first, dtype",
    [(i * CHUNK, torch.float32) for i in range(3)] + [(60, torch.float16), (80, torch.bfloat16)],
)
def test_random_layers_equal_masked_dense(on_cuda, first: int, dtype: torch.dtype) -> None:
    with poisoned_memory():
        for seed in range(first, first + CHUNK):
            on_cuda.set_order(ORDERS[seed % 3], seed)
            case = dataclasses.replace(random_layer(seed), dtype=dtype)
            padded = case.options.get("padding_mode", "zeros") != "zeros"
            assert_layer_matches_dense(case, LIMITS[dtype] * (OVERLAPS if padded else 1))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 130, 300])
def test_batches_around_the_sizes_of_vectors(on_cuda, batch: int, dtype: torch.dtype) -> None:
    case = dataclasses.replace(LINEAR, batch=(batch,), dtype=dtype)
    with poisoned_memory():
        assert_layer_matches_dense(case, LIMITS[dtype])


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
def test_larger_convolutions(on_cuda, density: float, stride) -> None:
    options = {"padding": (1, 2, 0, 3), "stride": stride, "dilation": (1, 2), "groups": 2}
    case = dataclasses.replace(
        CONV, in_features=16, out_features=24, batch=(9,), density=density, options=options
    )
    for layout in ("contiguous", "channels_last"):
        with poisoned_memory():
            assert_layer_matches_dense(dataclasses.replace(case, layout=layout))


@pytest.mark.parametrize("features", [(700, 3), (3, 700), (1, 90), (90, 1)])
def test_long_and_short_rows(order: str, features: tuple[int, int]) -> None:
    case = dataclasses.replace(LINEAR, in_features=features[0], out_features=features[1])
    with poisoned_memory():
        assert_layer_matches_dense(case)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded"])
def test_any_layout_of_the_output_gradient(on_cuda, layout: str) -> None:
    grad = with_layout(torch.randn(5, 10, 7, 9), layout)
    expected, actual = dense_results(CONV, grad.double()), sparse_results(CONV, grad)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < LIMITS[torch.float32], name


def test_sums_in_parts(order: str) -> None:
    """A weight gradient of few nonzeros at many positions is summed in two stages."""
    case = dataclasses.replace(
        CONV, in_features=2, out_features=2, batch=(8,), density=0.4, map_size=(36, 40)
    )
    with poisoned_memory():
        assert_layer_matches_dense(case)


@pytest.mark.parametrize("case", [CONV, LINEAR, random_layer(4)], ids=["conv", "linear", "random"])
def test_equal_bits_in_every_order(on_cuda, case: LayerCase) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    first = sparse_results(case)
    for order in ORDERS:
        for seed in (1, 2):
            on_cuda.set_order(order, seed)
            again = sparse_results(case)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_takes_the_memory_format_of_the_input(on_cuda, layout: str) -> None:
    results = sparse_results(dataclasses.replace(CONV, layout=layout))
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    assert results["y"].is_contiguous(memory_format=formats[layout])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_sample_leaves_the_others_alone(on_cuda, value: float) -> None:
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    topology = Topology.from_mask(mask)
    x = torch.ones(9, 30)
    clean = skd.functional.linear(topology, torch.ones(topology.nnz), x)
    x[4] = value
    y = skd.functional.linear(topology, torch.ones(topology.nnz), x)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[others], clean[others])
    assert not y[4, mask.any(dim=1)].isfinite().any()
    assert on_cuda.repeats()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("batch", [1, 3, 16, 37])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_padding_meets_no_infinity(on_cuda, batch: int, value: float, dtype: torch.dtype) -> None:
    options = {"padding": (1, 2, 1, 0), "stride": (1, 2), "groups": 2}
    case = dataclasses.replace(CONV, batch=(batch,), dtype=dtype, options=options)
    assert_padding_meets_nothing(case, value, 2 * LIMITS[dtype])
    assert on_cuda.repeats()


def test_geometries_that_are_mostly_padding(on_cuda) -> None:
    options = {"padding": 300, "stride": 100, "dilation": 100}
    for case in (
        dataclasses.replace(CONV, options=options),
        dataclasses.replace(CONV, kernel_size=(2, 2), map_size=(9, 8), options={"stride": 7}),
    ):
        with poisoned_memory():
            assert_layer_matches_dense(case)


@pytest.mark.parametrize(
    "kernel, size, options",
    [
        ((31, 31), (14, 14), {"padding": 15}),
        ((33, 35), (36, 40), {}),  # no window of it fits: torch computes
        ((3, 3), (33, 33), {"padding": 24, "dilation": 24}),
        ((3, 5), (20, 17), {"padding": (4, 6), "dilation": (4, 3), "stride": (2, 6)}),
        ((7, 7), (30, 20), {"padding": 3, "stride": 2}),
    ],
)
def test_kernels_that_reach_far(on_cuda, kernel, size, options) -> None:
    case = dataclasses.replace(
        CONV, in_features=2, out_features=3, kernel_size=kernel, map_size=size, options=options
    )
    for batch in (1, 5):
        with poisoned_memory():
            assert_layer_matches_dense(dataclasses.replace(case, batch=(batch,)))


@pytest.mark.parametrize("features", [(80, 80), (40, 120), (96, 96)])
def test_groups_that_blocks_of_rows_cut(on_cuda, features: tuple[int, int]) -> None:
    """A block of 64 rows has many groups, or parts of two."""
    for groups in (features[0], 2):
        options = {"padding": 1, "groups": groups}
        case = dataclasses.replace(
            CONV, in_features=features[0], out_features=features[1], density=0.5, options=options
        )
        with poisoned_memory():
            assert_layer_matches_dense(case)


def test_patches_have_no_more_images_than_a_batch(on_cuda) -> None:
    """Else most lanes of a warp would idle where maps are small."""
    topology = Topology.from_mask(torch.rand(64, 64) < 0.5)
    structure = find_structure(topology.crow_indices, topology.col_indices, 64, 64)
    conv = Conv((64, 64, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    for batch, images in ((1, 1), (4, 1), (13, 4), (1000, 32)):
        product = plans.forward(structure, conv, torch.empty(batch, 64, 7, 7), (7, 7))
        assert product.images <= images
        y, x = product.axes
        assert product.images * y.patch * x.patch >= 16


def test_gradients_are_differentiable(on_cuda) -> None:
    topology, values, x, _ = CONV.tensors()
    gradients = []
    for name in ("cuda", "reference"):
        leaves = [values.clone().requires_grad_(), x.clone().requires_grad_()]
        with skd.backend(name):
            y = skd.functional.conv2d(topology, *leaves, padding=1, stride=2)
            inner = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            gradients.append(torch.autograd.grad(sum(g.square().sum() for g in inner), leaves))
    for ours, expected in zip(*gradients, strict=True):
        assert relative_error(ours, expected) < 1e-4


# -- structures -----------------------------------------------------------------------------------

CROW = torch.tensor([0, 2, 3, 3], dtype=torch.int32)
COL = torch.tensor([0, 3, 1], dtype=torch.int32)
POINT = ([3, 4, 1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)


@pytest.mark.parametrize(
    "crow, col",
    [
        ([0, 3, 2, 3], [0, 3, 1]),
        ([0, -5, 2, 3], [0, 3, 1]),
        ([1, 2, 3, 3], [0, 3, 1]),
        ([0, 2, 3, 1000], [0, 3, 1]),
        ([0, 2, 3, 3], [0, 4, 1]),
        ([0, 2, 3, 3], [0, 2**31 - 1, 1]),
        ([0, 2, 3, 3], [0, 3, -1]),
        ([0, 2, 3, 3], [3, 0, 1]),
        ([0, 2, 3, 3], [3, 3, 1]),
    ],
)
def test_crafted_indices_are_refused_by_every_op(on_cuda, crow: list[int], col: list[int]) -> None:
    structure = [torch.tensor(indices, dtype=torch.int32) for indices in (crow, col)]
    x, y, values = torch.ones(2, 4), torch.ones(2, 3), torch.ones(3)
    maps, upper = x[:, :, None, None], y[:, :, None, None]
    calls = {
        ops.conv2d: (maps, values, *structure, None, *POINT),
        ops.conv2d_dgrad: (upper, values, *structure, [2, 4, 1, 1], *POINT),
        ops.conv2d_wgrad: (upper, maps, *structure, *POINT),
        ops.linear: (x, values, *structure, None, [3, 4]),
        ops.linear_dgrad: (y, values, *structure, [3, 4]),
        ops.linear_wgrad: (y, x, *structure, [3, 4]),
        ops.grow_topk: (torch.ones(3, 4), *structure, 1),
    }
    for op, args in calls.items():
        with pytest.raises(TopologyError):
            op(*args)


def test_an_index_tensor_modified_after_its_first_use_is_refused(on_cuda) -> None:
    crow, col = CROW.clone(), COL.clone()
    args = (torch.ones(2, 4), torch.ones(3), crow, col, None, [3, 4])
    expected = ops.linear(*args)
    col[1] = 1 << 20
    with pytest.raises(TopologyError):
        ops.linear(*args)
    col[1] = 3
    assert torch.equal(ops.linear(*args), expected)
    col[0] = 2  # still a structure, another one
    x = torch.arange(8.0).view(2, 4)
    assert ops.linear(x, torch.ones(3), crow, col, None, [3, 4])[:, 0].tolist() == [5, 13]


def test_a_structure_is_validated_once_and_forgotten_with_its_tensors(
    on_cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsekd.ops.gpu import structure as gpu_structure

    known: dict = {}
    made = []
    real = gpu_structure.Structure
    monkeypatch.setattr(gpu_structure, "_known", known)
    monkeypatch.setattr(gpu_structure, "Structure", lambda *args: made.append(1) or real(*args))

    def use(topology: Topology) -> None:
        args = topology.crow_indices, topology.col_indices
        for _ in range(3):
            ops.linear(torch.ones(2, 4), torch.ones(3), *args, None, [3, 4])

    first = Topology(CROW, COL, (3, 4))
    use(first)
    assert len(made) == len(known) == 1
    made.clear()
    del first
    use(Topology(CROW.clone(), COL.clone(), (3, 4)))
    assert len(made) == 1
    assert len(known) == 1, "the first is gone"


def test_indices_on_another_device_are_refused(on_cuda, emulated_module) -> None:
    args = (torch.ones(2, 4), torch.ones(3), CROW.to("meta"), COL, None, [3, 4])
    with pytest.raises(UnsupportedError, match="expected the device of the input, cpu, got meta"):
        emulated_module.linear(*args)


def test_other_dtypes_are_refused(on_cuda) -> None:
    topology = Topology(CROW, COL, (3, 4))
    with pytest.raises(UnsupportedError, match=r"'cuda' supports .*float32.*got torch.float64"):
        skd.functional.linear(topology, torch.ones(3).double(), torch.ones(2, 4).double())


def test_maps_that_span_too_much_are_refused_by_name(on_cuda) -> None:
    x = torch.ones(1).as_strided((1, 1, 1, 1), (1, 1, 1 << 31, 1))
    topology = Topology.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(
        UnsupportedError, match=r"x: .* at most 2147482623 elements, got 2147483649"
    ):
        skd.functional.conv2d(topology, torch.ones(1), x)


def test_sizes_that_do_not_fit_are_refused(on_cuda) -> None:
    maps = dict.fromkeys(Maps._fields, 1) | {"data": None}
    axis = dict.fromkeys(Axis._fields, 1) | {"start": 0, "out_start": 0}
    product = dict.fromkeys(Product._fields[:-1], 1) | dict.fromkeys(("starts", "places", "slots"))

    def gather(x=maps, y=maps, product=product, axis=axis) -> None:
        args = [x.values()], 1, [product.values()], [axis.values()] * 2, *[None] * 3, [y.values()]
        lists = [[*map(tuple, arg)] if isinstance(arg, list) else arg for arg in args]
        on_cuda.run("gather", torch.device("cpu"), torch.float32, *lists)

    wrong = [
        *({name: maps | change} for name in "xy" for change in (
            {"height": -1}, {"height": 1 << 31}, {"batch": 2}, {"stride_h": 1 << 31},
            {"stride_n": -1},
        )),
        *({"product": product | change} for change in (
            {"rows": 2}, {"rows_of_group": 0}, {"channels_of_group": 2}, {"chunk": 0},
            {"chunk": 1153}, {"images": 33}, {"images": 0}, {"chunks": -1},
        )),
        *({"axis": axis | change} for change in (
            {"outputs": 2}, {"out_start": 1}, {"patch": 0}, {"patch": 6}, {"spacing": 0},
            {"pitch": 0}, {"window": 34}, {"start": -(1 << 31)}, {"stride": 1 << 31},
            {"stride": 3, "pitch": 2},
        )),
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(BackendError, match="gather: CUDA error 1, invalid argument"):
            gather(**change)
