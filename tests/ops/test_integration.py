"""How the ops behave inside torch: autocast, compile, meta, FLOP counting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sparsekd import Topology, functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = Topology.from_mask(torch.rand(8, 2, 3, 3, generator=generator) < 0.3)
        self.head = Topology.from_mask(torch.rand(5, 8, generator=generator) < 0.4)
        self.conv_values = nn.Parameter(torch.randn(self.conv.nnz, generator=generator))
        self.head_values = nn.Parameter(torch.randn(self.head.nnz, generator=generator))
        self.bias = nn.Parameter(torch.randn(8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"}
        y = functional.conv2d(self.conv, self.conv_values, x, self.bias, **options).tanh()
        return functional.linear(self.head, self.head_values, y.mean((2, 3)))


def gradients(net: nn.Module, call: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])]


def shuffled(topology: Topology, seed: int) -> Topology:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(topology.numel, dtype=torch.bool)
    mask[torch.randperm(topology.numel, generator=generator)[: topology.nnz]] = True
    return topology.rewire(mask.view(topology.shape))[0]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_does_not_recompile_at_equal_nnz(backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 4, 9, 9)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for seed in range(4):
        torch.testing.assert_close(gradients(net, compiled, x), gradients(net, net, x))
        net.conv, net.head = shuffled(net.conv, seed), shuffled(net.head, seed)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(
    " " in torch.__file__, reason="inductor cannot link against a torch in a path with a space"
)
def test_compile_with_inductor(backend: str) -> None:
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 4, 9, 9)
    compiled = torch.compile(net, fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = x.contiguous(memory_format=layout)
        torch.testing.assert_close(gradients(net, compiled, maps), gradients(net, net, maps))


def test_compile_with_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 5, 8, 13):
        x = torch.randn(batch, 4, 9, 9)
        torch.testing.assert_close(gradients(net, compiled, x), gradients(net, net, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(backend: str, dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 4, 9, 9)
    call = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    with torch.autocast("cpu", dtype=dtype):
        y = call(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    exact = gradients(net, net, x)
    grads = [p.grad for p in net.parameters()]
    for actual, expected in zip([y, *grads], [exact[0], *exact[2:]], strict=True):
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert error < 8 * torch.finfo(dtype).eps


def test_autocast_accumulates_in_float32(backend: str) -> None:
    topology = Topology.from_mask(torch.ones(1, 4096, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.linear(topology, torch.ones(4096), torch.ones(1, 4096))
    assert y.item() == 4096  # a bfloat16 sum of ones stops growing at 256


def test_autocast_leaves_float64_alone(backend: str) -> None:
    topology = Topology.from_mask(torch.ones(1, 3, dtype=torch.bool))
    ones = torch.ones(3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(topology, ones, ones).dtype == torch.float64


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_flops(backend: str, stride: int, groups: int) -> None:
    topology = Topology.from_mask(torch.rand(6, 4 // groups, 3, 3) < 0.4)
    values = torch.randn(topology.nnz, requires_grad=True)
    x = torch.randn(3, 4, 9, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = functional.conv2d(topology, values, x, stride=stride, padding=1, groups=groups)
        y.sum().backward()
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    assert counter.get_total_flops() == 3 * 2 * topology.nnz * positions


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_linear_flops(backend: str, lead: tuple[int, ...]) -> None:
    topology = Topology.from_mask(torch.rand(6, 4) < 0.4)
    values = torch.randn(topology.nnz, requires_grad=True)
    x = torch.randn(*lead, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        functional.linear(topology, values, x, torch.zeros(6)).sum().backward()
    rows = x.numel() // 4
    assert counter.get_total_flops() == 3 * 2 * topology.nnz * rows


def test_meta_tensors_get_shapes_without_kernels() -> None:
    topology = Topology.from_mask(torch.rand(6, 4, 3, 3) < 0.4)
    values = torch.empty(topology.nnz, device="meta")
    x = torch.empty(2, 4, 8, 8, device="meta")
    y = functional.conv2d(topology, values, x, padding="same")
    assert y.shape == (2, 6, 8, 8)
    assert y.device.type == "meta"
