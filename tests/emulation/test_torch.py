"""What of torch reaches around the CUDA kernels: compilation, autocast, the rules of capture."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.nn import sparse_modules
from sparsekd.ops.gpu import structure as gpu_structure


def network() -> nn.Module:
    return nn.Sequential(
        skd.nn.SparseConv2d(3, 8, 3, stride=2, padding=1, sparsity=0.5, seed=1),
        nn.Tanh(),  # smooth: rounding cannot flip it
        nn.Flatten(),
        skd.nn.SparseLinear(8 * 4 * 4, 10, sparsity=0.8, seed=2),
    )


def gradients(model: Any, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_a_compiled_network_runs_the_same_kernels(on_cuda, x: Tensor) -> None:
    torch._dynamo.reset()
    model = network()
    parameters = list(model.parameters())
    expected = gradients(model, parameters, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, same in zip(gradients(compiled, parameters, x), expected, strict=True):
        assert torch.equal(ours, same)


def test_inductor_leaves_the_ops_out_of_its_cuda_graphs(on_cuda, x: Tensor) -> None:
    torch._dynamo.reset()
    seen: list[bool] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        ours = [node for node in graph.graph.nodes if "sparsekd" in str(node.target)]
        seen.extend(map(is_cudagraph_unsafe_fx_node, ours))
        return make_boxed_func(graph.forward)

    model = network()
    torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)(x).sum().backward()
    assert seen == [True] * 6  # forward, and two gradients, of two layers


def test_plans_are_not_made_while_a_graph_is_recorded(on_cuda, x: Tensor, monkeypatch) -> None:
    conv, smaller = network()[0], x[..., :6].detach()
    expected = conv(x)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(conv(x), expected)
    for new in (lambda: conv(smaller), lambda: network()[0](x)):
        with pytest.raises(UnsupportedError, match="run the same step before recording it"):
            new()


def test_a_network_may_move_in_inference_mode(on_cuda, x: Tensor) -> None:
    model = network()
    expected = model(x).detach()
    with torch.inference_mode():
        for module in model.modules():  # as nn.Module.cuda does
            module._buffers |= {name: made.clone() for name, made in module._buffers.items()}
        assert torch.equal(model(x), expected)
        made = network()
        assert torch.equal(made(x), expected)
        assert all(module.topology.version == 0 for _, module in sparse_modules(made))


def test_threads_meet_new_structures_at_once() -> None:
    """As those of backward passes on several devices, and of nn.DataParallel, do."""

    def structures(count: int) -> list[tuple[Tensor, Tensor]]:
        found = []
        for _ in range(count):
            found.append((torch.tensor([0, 1]).int(), torch.tensor([0]).int()))
            gpu_structure.find_structure(*found[-1], 1, 1)
        return found

    living, before = structures(300), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: len(structures(200)), range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(gpu_structure._known) >= len(living)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_factors_and_sums_in_float32(on_cuda, x: Tensor, dtype) -> None:
    model = network()
    parameters = list(model.parameters())
    expected = gradients(model, parameters, x)
    with torch.autocast("cpu", dtype):
        actual = gradients(model, parameters, x)
    assert actual[0].dtype == dtype
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours.float() - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()


class NoWaiting(TorchDispatchMode):
    """Refuse what makes the host wait for a device: a number read, a shape that data decides."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), name
        assert not (name == "_to_copy" and kwargs.get("device") is not None), "a copy elsewhere"
        return func(*args, **(kwargs or {}))


def test_a_step_on_a_known_structure_waits_for_nothing(on_cuda, x: Tensor) -> None:
    model = network()
    parameters = list(model.parameters())
    gradients(model, parameters, x)  # plans are made here
    with NoWaiting():
        gradients(model, parameters, x)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            x.sum().item()
