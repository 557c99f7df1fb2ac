"""What only a GPU can show: the kernels on it, its streams, its graphs. Run by `make gpu-check`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from structures import assert_topology_says_what_the_mask_does, random_mask
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.nn import sparse_modules
from sparsekd.ops.eager import plain
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    available_backends,
    poisoned_memory,
    random_layer,
    sparse_results,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
LIMITS = {torch.float32: 2e-5} | {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)}
# The gradient of a padding other than zeros is torch's, which adds up several halves.
OVERLAPS = 8
LAYERS, CHUNK = 150, 25


@pytest.fixture(params=["cuda", "triton"])
def on_gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param}: {skd.ops.info()['backends'][request.param]}")
    # torch's own convolutions are what we compare steps with
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with skd.backend(request.param), precise:
        yield request.param


@pytest.mark.parametrize("seed", range(20))
def test_equal_bits_every_time(on_gpu: str, seed: int) -> None:
    case = dataclasses.replace(random_layer(seed), dtype=torch.float32)
    first = sparse_results(case, device=DEVICE)
    for _ in range(5):
        again = sparse_results(case, device=DEVICE)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1), (70, 37), (64, 576), (1000, 2048), (3, 300_000), (300_000, 3)], ids=str
)
def test_topologies_say_what_the_mask_does(shape: tuple[int, int], density: float) -> None:
    mask = random_mask(*shape, density).to(DEVICE)
    with poisoned_memory():
        assert_topology_says_what_the_mask_does(mask)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_tuning_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    if "triton" not in available_backends():
        pytest.skip("needs the backend triton")
    from sparsekd.ops.triton import tuning as triton_tuning

    case = LayerCase(
        seed=3, in_features=256, out_features=256, batch=(8,), density=0.2, bias=True, dtype=dtype,
        layout="channels_last", kernel_size=(3, 3), map_size=(16, 16), options={"padding": 1},
        tile=(64, 64),
    )  # fmt: skip
    monkeypatch.setenv("SPARSEKD_CACHE", str(tmp_path))
    results = []
    for tuned in (False, True):
        monkeypatch.setenv("SPARSEKD_TUNE", "on" if tuned else "off")
        triton_tuning.tuner.cache_clear()
        with skd.backend("triton"):
            results.append(sparse_results(case, device=DEVICE))
        assert (len(triton_tuning.tuner().store) > 0) == tuned
    triton_tuning.tuner.cache_clear()
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_the_faster_backend_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsekd.ops.dispatch import backends

    gpu = backends.module("gpu")
    if gpu.chooser() is None:
        pytest.skip("needs both GPU backends")
    monkeypatch.setenv("SPARSEKD_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSEKD_TUNE", "on")
    gpu.chooser.cache_clear()
    layer = skd.nn.SparseConv2d(64, 64, 3, padding=1, sparsity=0.8, seed=0, device=DEVICE)
    x = torch.randn(32, 64, 32, 32, device=DEVICE, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
        assert skd.ops.info()["gpu_choices"]["known"] == 3
    gpu.chooser.cache_clear()


def network(layout: str = "csr") -> nn.Module:
    torch.manual_seed(0)
    model = skd.models.resnet20(width=2.0)
    return skd.sparsify(model, sparsity=0.8, layout=layout, seed=0).to(DEVICE)


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 3, 16, 16, generator=generator)
        y = torch.randint(10, (16,), generator=generator)
        yield x.to(DEVICE), y.to(DEVICE)


def assert_rewired_twice(model: nn.Module) -> None:
    topologies = [module.topology for _, module in sparse_modules(model)]
    assert {topology.version for topology in topologies if topology.density < 1} == {2}


@pytest.mark.parametrize("layout", ["csr", "bcsr", "fanin:32x16"])
def test_rigl_trains_as_on_the_cpu(on_gpu: str, layout: str) -> None:
    start = network(layout)
    runs = []
    for device in (DEVICE, "cpu"):
        model = copy.deepcopy(start).to(device)
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=9, until=100)
        losses = []
        with skd.backend(on_gpu if device == DEVICE else "cpp"):
            for x, y in batches(50):
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
                loss.backward()
                losses.append(loss.item())
                if not dst.step():
                    opt.step()
        runs.append((losses, [m.topology.mask().cpu() for _, m in sparse_modules(model)]))
    (losses, masks), (expected, same) = runs
    assert losses == pytest.approx(expected, rel=1e-3)
    # A score at the edge may fall either way by rounding: a handful of weights, not more.
    moved = sum(int((a ^ b).sum()) for a, b in zip(masks, same, strict=True))
    assert moved <= 1e-3 * sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("layout", ["csr", "bcsr"])
def test_forward_and_backward_wait_for_nothing(on_gpu: str, layout: str) -> None:
    model = network(layout)
    (x, y), *_ = batches(1)
    for waits in ("default", "error"):  # plans are made in the first pass
        torch.cuda.set_sync_debug_mode(waits)
        try:
            nn.functional.cross_entropy(model(x), y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_work_is_queued_on_the_current_stream(on_gpu: str) -> None:
    model, stream = network(), torch.cuda.Stream()
    (x, _), *_ = batches(1)
    expected = model(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever does not wait for this reads zeros
        late = torch.zeros_like(x)
        late.copy_(x, non_blocking=True)
        y = model(late)
    stream.synchronize()
    torch.testing.assert_close(y, expected)


def test_eager_calls_go_past_the_dispatcher() -> None:
    x = torch.ones(2, 2, device=DEVICE)
    assert plain((x, x))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not plain((x, x))


@pytest.mark.parametrize("layout", ["csr", "bcsr"])
def test_a_recorded_step_goes_on_after_a_rewire(on_gpu: str, layout: str) -> None:
    model = skd.make_capturable(network(layout))
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dst = skd.dst.SET(model, opt, drop_fraction=0.3, every=5, until=100)
    (x, y), *_ = batches(1)

    def step() -> Tensor:
        opt.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(12):
        twin = copy.deepcopy(model)
        graph.replay()
        expected = nn.functional.cross_entropy(twin(x), y)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        dst.step()
    assert_rewired_twice(model)


@pytest.mark.parametrize("layout", ["csr", "bcsr"])
@pytest.mark.parametrize("method", ["RigL", "GMP"])
def test_graphed_trains_as_a_plain_loop_does(on_gpu: str, layout: str, method: str) -> None:
    models, losses = [network(layout), network(layout)], []
    for number, model in enumerate(models):
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if method == "RigL":
            dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=6, until=100)
        else:
            dst = skd.dst.GMP(model, opt, sparsity=0.95, every=6, until=100)

        def step(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        run = skd.cuda.graphed(step, model, dst) if number else step
        losses.append([])
        for x, y in batches(16):
            opt.zero_grad()
            losses[-1].append(run(x, y).item())
            if not dst.step():
                opt.step()
        if number:
            assert run.recorded == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_rewired_twice(models[1])


def test_a_step_that_never_ran_is_not_recorded(on_gpu: str) -> None:
    conv = skd.nn.SparseConv2d(16, 16, 3, sparsity=0.5).to(DEVICE)
    x, graph = torch.ones(8, 16, 9, 9, device=DEVICE), torch.cuda.CUDAGraph()
    refused = pytest.raises(UnsupportedError, match="run the same step before recording it")
    with refused, torch.cuda.graph(graph):
        conv(x)
    conv(x)


def test_a_network_compiled_to_cuda_graphs_goes_on_after_a_rewire(on_gpu: str) -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, mode="reduce-overhead")
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dst = skd.dst.SET(model, opt, drop_fraction=0.3, every=4, until=100)
    (x, y), *_ = batches(1)
    for _ in range(10):
        torch.compiler.cudagraph_mark_step_begin()
        expected = nn.functional.cross_entropy(copy.deepcopy(model)(x), y)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        loss.backward()
        if not dst.step():
            opt.step()
    assert_rewired_twice(model)


def test_a_compiled_network_trains(on_gpu: str) -> None:
    torch._dynamo.reset()
    model = network()
    (x, _), *_ = batches(1)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model)
    actual = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for ours, same in zip(actual, expected, strict=True):
        # Inductor rounds BatchNorm otherwise; a ReLU that this flips moves gradients by a percent.
        assert (ours - same).norm() <= 0.05 * same.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(on_gpu: str, dtype: torch.dtype) -> None:
    model = network("bcsr")
    (x, y), *_ = batches(1)
    exact = nn.functional.cross_entropy(model(x), y)
    with torch.autocast(DEVICE, dtype):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(module.values.grad.isfinite().all() for _, module in sparse_modules(model))


def test_rigl_trains_in_half_precision_with_scaled_gradients(on_gpu: str) -> None:
    model = network("bcsr")
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=3, until=100)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128)
    for x, y in batches(7):
        opt.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if not dst.step():
            scaler.step(opt)
            scaler.update()
        assert loss.isfinite()
    assert_rewired_twice(model)


def test_explain_names_the_backend(on_gpu: str) -> None:
    found = skd.explain(network(), (16, 3, 16, 16))
    assert {times.backend for layer in found.layers for times in layer.passes.values()} == {on_gpu}


def assert_equals_masked_dense(seed: int, dtype: torch.dtype, device: str) -> None:
    case = dataclasses.replace(random_layer(seed), dtype=dtype)
    padded = case.options.get("padding_mode", "zeros") != "zeros"
    assert_layer_matches_dense(case, LIMITS[dtype] * (OVERLAPS if padded else 1), device=device)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("seed", range(10))
def test_layers_need_not_be_on_the_current_device(on_gpu: str, seed: int) -> None:
    assert_equals_masked_dense(seed, torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0


# Last, as Triton compiles for minutes here when it sees these layers for the first time.
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("first", range(0, LAYERS, CHUNK))
def test_random_layers_equal_masked_dense(on_gpu: str, first: int, dtype: torch.dtype) -> None:
    with poisoned_memory():
        for seed in range(first, first + CHUNK):
            assert_equals_masked_dense(seed, dtype, DEVICE)
