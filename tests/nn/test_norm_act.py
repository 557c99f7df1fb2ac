"""Blocks with fused norms: what fusion must not change, and where it steps aside."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock
from sparsekd.nn import conv_norm_act

norms = importlib.import_module("sparsekd.nn.norm_act")  # a function has the name, too


class Torchvision(nn.Module):
    """Statements, a residual that is computed in between, in place."""

    def __init__(self, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class OutOfPlace(Torchvision):
    """The same, for backward hooks, which refuse what works in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = torch.add(x if self.downsample is None else self.downsample(x), out)
        return self.relu(out)


class Child(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.relu(self.bn1(x))


@skd.nn.register_fused(Torchvision)
class FusedTorchvision(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_act(self.conv1, self.bn1, x, self.relu)
        identity = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv2, self.bn2, out, self.relu, identity)


@skd.nn.register_fused(OutOfPlace)
class FusedOutOfPlace(OutOfPlace):
    forward = FusedTorchvision.forward


@pytest.mark.parametrize("project", [False, True])
def test_equal_and_fused(project: bool, x: Tensor, twins, count, assert_equal_steps) -> None:
    fast, plain = twins(lambda: Torchvision(project))
    assert count(copy.deepcopy(fast), x) == (2 + project, 0, 0)
    assert_equal_steps(fast, plain, x)
    fast.eval()
    plain.eval()
    assert_equal_steps(fast, plain, x)


def test_maps_too_small_to_pay_run_as_modules(
    monkeypatch, x: Tensor, twins, count, assert_equal_steps
) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    monkeypatch.setattr(norms, "LEAST", x.numel() + 1)
    assert count(copy.deepcopy(fast), x) == (0, 3, 2)
    assert_equal_steps(fast, plain, x)
    monkeypatch.setattr(norms, "LEAST", x.numel())
    assert count(copy.deepcopy(fast), x) == (3, 0, 0)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_backward_follows_the_backend_asked_for_then(backend: str, x: Tensor, twins) -> None:
    """The kernels are called past the table of backends only where these would be chosen."""
    fast, plain = twins(lambda: Torchvision(True))
    ys = [model(x) for model in (fast, plain)]
    with skd.backend(backend):
        ys[0].sin().sum().backward()
    ys[1].sin().sum().backward()
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_subclass_without_a_row_is_left(x: Tensor, twins, count, assert_equal_steps) -> None:
    fast, plain = twins(lambda: Child(True))
    assert_equal_steps(fast, plain, x)
    assert type(fast) is Child
    assert isinstance(fast, Torchvision)
    assert count(fast, x) == (1, 3, 3)  # the Sequential of the shortcut


def test_unfuse_takes_it_back(x: Tensor, twins, count, assert_equal_steps) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    fast = skd.nn.unfuse(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert count(copy.deepcopy(fast), x) == (0, 3, 2)
    assert_equal_steps(fast, plain, x)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", ["bn2", "relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_make_their_block_plain(
    hook: str, child: str, when: str, x: Tensor, count, assert_equal_steps
) -> None:
    def seen_by(model: nn.Module) -> tuple[list, object]:
        seen: list[Tensor] = []

        def note(module: nn.Module, *tensors: object) -> None:
            for value in tensors:
                for tensor in value if isinstance(value, tuple) else (value,):
                    if tensor is not None:
                        seen.append(tensor.detach().clone())

        return seen, getattr(getattr(model, child), hook)(note)

    torch.manual_seed(0)
    plain = OutOfPlace(True).double()
    plain.relu.inplace = False
    fast = copy.deepcopy(plain)
    if when == "after":
        fast = skd.optimize(fast)
    fast_seen, handle = seen_by(fast)
    plain_seen, _ = seen_by(plain)
    fast = skd.optimize(fast)
    assert_equal_steps(fast, plain, x)
    assert plain_seen
    torch.testing.assert_close(fast_seen, plain_seen)
    handle.remove()
    assert count(fast, x) == (3, 0, 0)


def test_global_hooks_see_every_module(x: Tensor, twins) -> None:
    fast, _ = twins(lambda: Torchvision(True))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        fast(x)
    finally:
        handle.remove()
    assert {fast.bn1, fast.bn2, fast.relu} <= set(seen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, x: Tensor, twins, assert_equal_steps) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Torchvision(True)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    fast, plain = twins(Checkpointed)
    assert_equal_steps(fast, plain, x)  # buffers too: both count the recomputation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(backend: str, training: bool, x: Tensor, twins) -> None:
    torch._dynamo.reset()
    fast, plain = twins(lambda: nn.Sequential(Torchvision(True), BasicBlock(4, 4)))
    fast.train(training)
    plain.train(training)
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    for _ in range(2):
        sides = []
        for model, call in ((fast, compiled), (plain, plain)):
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            sides.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        torch.testing.assert_close(sides[0], sides[1])


def test_frozen_norms_in_a_training_model(x: Tensor, twins) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    for model in (fast, plain):
        model.bn1.eval().requires_grad_(False)
        model.bn2.requires_grad_(False)
    sides = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        assert model.bn1.weight.grad is None
        assert model.bn2.bias.grad is None
        sides.append([leaf.grad, model.conv1.weight.grad, *model.buffers()])
    torch.testing.assert_close(*sides)


def test_second_derivatives(x: Tensor, twins) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    sides = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).tanh().sum(), leaf, create_graph=True)
        sides.append(torch.autograd.grad(grad.square().sum(), [leaf, *model.parameters()]))
    torch.testing.assert_close(*sides)


def test_torch_func(x: Tensor, twins) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    fast.eval()
    plain.eval()

    def loss(model: nn.Module) -> Tensor:
        call = torch.func.grad(lambda image: model(image[None]).sum())
        return torch.func.vmap(call)(x)

    torch.testing.assert_close(loss(fast), loss(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast_run_plainly(dtype: torch.dtype, x: Tensor) -> None:
    torch.manual_seed(0)
    plain = Torchvision(True)
    fast = skd.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(fast(x.float()), plain(x.float()))
    half = x.to(dtype)
    torch.testing.assert_close(fast.to(dtype)(half), plain.to(dtype)(half))


def test_other_devices_run_plainly() -> None:
    model = skd.optimize(Torchvision(True)).to("meta")
    assert model(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)


def test_batch_of_one_value_is_refused_as_by_torch() -> None:
    model = skd.optimize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.ones(1, 3, 1, 1))


def test_replaced_modules_are_seen(x: Tensor, twins, assert_equal_steps) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    for model in (fast, plain):
        model.relu = nn.GELU()
    assert_equal_steps(fast, plain, x)
    for model in (fast, plain):
        model.bn2 = nn.GroupNorm(2, 4).double()
    assert_equal_steps(fast, plain, x)
    assert not any(
        isinstance(m, nn.BatchNorm2d)
        for m in nn.SyncBatchNorm.convert_sync_batchnorm(fast).modules()
    )
