"""Every supported layer equals masked dense torch: outputs and all gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsekd as skd
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

LIMITS = {torch.float32: 2e-5, torch.float64: 1e-11}
CASES = 360
CHUNK = 30

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


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_layers_equal_masked_dense(backend: str, first: int) -> None:
    if backend == "cpp":
        torch.set_num_threads(1 + (first // CHUNK) % 3)
    with poisoned_memory():
        for seed in range(first, first + CHUNK):
            case = random_layer(seed)
            assert_layer_matches_dense(case, LIMITS[case.dtype])


def test_random_layers_cover_the_supported_set() -> None:
    cases = [random_layer(seed) for seed in range(CASES)]
    convs = [case for case in cases if case.kernel_size is not None]
    seen = {
        "linear": len(cases) - len(convs),
        "batch 0": sum(0 in case.batch for case in convs),
        "no nonzeros": sum(case.tensors()[0].nnz == 0 for case in convs),
        "empty rows": sum(case.empty_rows for case in convs),
        "full density": sum(case.density == 1 and not case.empty_rows for case in convs),
        "depthwise": sum(case.options["groups"] == case.in_features > 1 for case in convs),
        "groups": sum(1 < case.options["groups"] < case.in_features for case in convs),
        "rectangular": sum(case.kernel_size[0] != case.kernel_size[1] for case in convs),
        "same": sum(case.options["padding"] == "same" for case in convs),
        "asymmetric": sum(
            isinstance(case.options["padding"], tuple) and len(case.options["padding"]) == 4
            for case in convs
        ),
        "unbatched": sum(case.batch == () for case in convs),
    }
    for mode in ("reflect", "replicate", "circular"):
        seen[mode] = sum(
            case.options["padding_mode"] == mode and case.options["padding"] not in (0, "valid")
            for case in convs
        )
    for layout in ("channels_last", "sliced", "permuted", "expanded"):
        seen[layout] = sum(case.layout == layout for case in convs)
    assert min(seen.values()) >= 5, seen


@pytest.mark.parametrize("isa", ["scalar", "generic", "avx2", "avx512"])
def test_random_layers_on_every_instruction_set(isa: str) -> None:
    core = pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    if isa not in core.info()["isas"]:
        pytest.skip(f"this processor has no {isa}")
    core.set_isa(isa)
    try:
        with skd.backend("cpp"), poisoned_memory():
            for seed in range(CASES, CASES + 120):
                case = random_layer(seed)
                assert_layer_matches_dense(case, LIMITS[case.dtype])
    finally:
        core.set_isa("auto")


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("channels", [16, 33, 64])
def test_larger_layers_equal_masked_dense(backend: str, channels: int, density: float) -> None:
    torch.set_num_threads(2 if backend == "cpp" else 1)
    case = dataclasses.replace(
        CONV, in_features=channels, out_features=48, density=density, batch=(19,), map_size=(8, 8)
    )
    for dtype, limit in LIMITS.items():
        for stride in (1, 2):
            options = {"padding": 1, "stride": stride}
            with poisoned_memory():
                assert_layer_matches_dense(
                    dataclasses.replace(case, dtype=dtype, options=options), limit
                )


def test_groups_dilation_rectangular_kernel_channels_last(backend: str) -> None:
    options = {"groups": 2, "dilation": (2, 1), "padding": (0, 3, 1, 2), "stride": (1, 2)}
    case = dataclasses.replace(CONV, layout="channels_last", kernel_size=(3, 2), options=options)
    with poisoned_memory():
        assert_layer_matches_dense(case, LIMITS[torch.float32])


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded"])
def test_any_layout_of_the_output_gradient(backend: str, layout: str) -> None:
    grad = with_layout(torch.randn(5, 10, 7, 9), layout)
    expected, actual = dense_results(CONV, grad.double()), sparse_results(CONV, grad)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < LIMITS[torch.float32], name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_output_takes_the_memory_format_of_the_input(backend: str, layout: str, mode: str) -> None:
    options = {"padding": 1, "padding_mode": mode}
    results = sparse_results(dataclasses.replace(CONV, layout=layout, options=options))
    memory_format = {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }[layout]
    assert results["y"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CONV, random_layer(7)], ids=["conv2d", "random"])
def test_half_precision_is_rounded_once(backend: str, case: LayerCase, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    expected, actual = dense_results(case), sparse_results(case)
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], tensor) <= torch.finfo(dtype).eps, name


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 3, 4, 9])
def test_equal_bits_from_run_to_run(backend: str, number: int, seed: int) -> None:
    torch.set_num_threads(number)
    first = sparse_results(random_layer(seed))
    for _ in range(3):
        again = sparse_results(random_layer(seed))
        assert all(torch.equal(first[name], again[name]) for name in first)
