"""Pooling in the blocked layout: torch's values and gradients, and when it runs there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock
from sparsekd.nn.pooling import pool_blocked
from sparsekd.ops.cpu import pooling as cpu_pooling
from sparsekd.ops.cpu.blocked_map import enter, leave

POOLS: dict[str, nn.Module] = {
    "max 2": nn.MaxPool2d(2),
    "max 3, stride 2, padding 1": nn.MaxPool2d(3, 2, 1),
    "max 3, stride 1": nn.MaxPool2d(3, 1, 1),
    "max with gaps": nn.MaxPool2d((1, 2), (3, 2)),
    "average 2": nn.AvgPool2d(2),
    "average 3, padded": nn.AvgPool2d(3, 2, 1),
    "global": nn.AdaptiveAvgPool2d(1),
    "global by a pair": nn.AdaptiveAvgPool2d((1, 1)),
}
OTHERS: dict[str, nn.Module] = {
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "average ceil": nn.AvgPool2d(2, ceil_mode=True),
    "average of what is there": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "own divisor": nn.AvgPool2d(2, divisor_override=3),
    "adaptive": nn.AdaptiveAvgPool2d(2),
    "adaptive to the width": nn.AdaptiveAvgPool2d((1, None)),
    "adaptive maximum": nn.AdaptiveMaxPool2d(1),
    "norm of a window": nn.LPPool2d(2, 2),
}
BATCHES = (1, 7, 16, 17, 33)


def images(batch: int, channels: int = 3, size: tuple[int, int] = (7, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=generator)


@pytest.fixture
def pools(monkeypatch) -> list[Any]:
    """Return a list that grows by one entry for each pooling in the layout."""
    ran: list[Any] = []

    def run(*args: Any, _run: Callable = cpu_pooling.run) -> Any:
        result = _run(*args)
        ran.extend([result] if result is not None else [])
        return result

    monkeypatch.setattr(cpu_pooling, "run", run)
    return ran


def in_layout(pool: nn.Module, x: Tensor) -> Tensor:
    pooled = pool_blocked(pool, enter(x))
    assert pooled is not None
    return leave(pooled)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(pool: nn.Module, batch: int, dtype: torch.dtype, assert_near) -> None:
    x = images(batch).to(dtype)
    sides = []
    for run in (lambda x: in_layout(pool, x), pool):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(torch.arange(y.numel(), dtype=dtype).view(y.shape).cos())
        sides.append([y.detach(), leaf.grad])
    assert_near(*sides, 1e-10 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("pool", [POOLS["max 2"], POOLS["max 3, stride 2, padding 1"]], ids=str)
def test_equal_and_special_values(pool: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (17, 3, 9, 9), generator=generator).double()
    special = torch.rand(x.shape, generator=generator)
    x[special < 0.1] = float("nan")
    x[special > 0.9] = -torch.inf
    x[0], x[1, 0] = -torch.inf, torch.inf
    sides = []
    for run in (lambda x: in_layout(pool, x), pool):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape) + 1)
        sides.append([y.detach(), leaf.grad])
    torch.testing.assert_close(*sides, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_derivatives_of_all_orders(pool: nn.Module) -> None:
    x = (10 * torch.randperm(8 * 2 * 5 * 4).double().view(8, 2, 5, 4).sin()).requires_grad_()
    torch.autograd.gradcheck(lambda x: in_layout(pool, x), x, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: in_layout(pool, x), x, fast_mode=True)


@pytest.mark.parametrize("pool", OTHERS.values(), ids=OTHERS.keys())
def test_other_options_are_left_to_torch(pool: nn.Module, sparse_twins, one_step, assert_near):
    assert pool_blocked(pool, enter(images(16))) is None
    fast, plain = sparse_twins(lambda: nn.Sequential(BasicBlock(4, 8), pool, nn.Conv2d(8, 4, 1)))
    assert_near(one_step(fast, images(16, 4)), one_step(plain, images(16, 4)))


def test_windows_larger_than_the_map_are_refused_as_before(sparse_twins) -> None:
    for model in sparse_twins(lambda: nn.Sequential(BasicBlock(4, 8), nn.MaxPool2d(9))):
        with pytest.raises(RuntimeError, match="too small"):
            model(images(16, 4))


def between(pool: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8, 2), pool, BasicBlock(8, 4))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["max 2", "max 3, stride 2, padding 1", "average 2", "global"])
def test_between_blocks(
    name: str, batch: int, pools, blocks, sparse_twins, one_step, assert_near
) -> None:
    fast, plain = sparse_twins(between(copy.deepcopy(POOLS[name])))
    x = images(batch, 4, (11, 9))
    for training in (True, True, False):
        blocks.clear(), pools.clear()
        if name == "global" and batch == 1 and training:
            continue  # a norm needs more than one value
        found = one_step(fast.train(training), x)
        filled = batch >= 0.6 * 8 * -(-batch // 8)
        assert (len(blocks), len(pools)) == ((3, 1) if filled else (0, 0))
        assert_near(found, one_step(plain.train(training), x))


def test_a_map_that_others_read_too(pools, sparse_twins, assert_near) -> None:
    """The gradient of a block's result may come from a pooling and from elsewhere."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.pool = BasicBlock(4, 8), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            forward = getattr(self.block, "forward_blocked", self.block)
            y = forward(x)
            pooled = self.pool(y) if isinstance(y, Tensor) else leave(pool_blocked(self.pool, y))
            return pooled.sin().sum() + (leave(y) * 0.3).cos().sum()

    sides = []
    for model in sparse_twins(Two):
        x = images(16, 4).requires_grad_()
        y = model(x)
        y.backward()
        sides.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert len(pools) == 1
    assert_near(*sides)


@pytest.mark.parametrize("what", ["hook", "autocast", "reference", "no grad", "functional"])
def test_modes(what: str, pools, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(between(nn.MaxPool2d(2)))
    x = images(16, 4, (8, 8))
    if what == "hook":
        seen: list[Tensor] = []
        fast[2].register_forward_hook(lambda module, args, y: seen.append(args[0].clone()))
        assert_near(one_step(fast, x), one_step(plain, x))
        assert seen[0].shape == (16, 8, 4, 4)
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = [model.float().eval()(x.float()) for model in (fast, plain)]
        torch.testing.assert_close(*y, rtol=0.02, atol=0.05, check_dtype=False)
    elif what == "reference":
        with skd.backend("reference"):
            assert_near(one_step(fast, x), one_step(plain, x))
    elif what == "no grad":
        with torch.no_grad():
            assert_near([fast.eval()(x)], [plain.eval()(x)])
    else:
        values = dict(fast.named_parameters())
        grads = [
            torch.func.grad(
                lambda p, m=m: torch.func.functional_call(m.eval(), p, (x,)).sin().sum()
            )(values)
            for m in (fast, plain)
        ]
        assert_near(list(grads[0].values()), list(grads[1].values()))
    assert len(pools) == (what == "no grad")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18 imagenet": (lambda: skd.models.resnet18(10, "imagenet", width=0.125), 32, 2),
    "resnet20": (lambda: skd.models.resnet20(width=0.5), 8, 1),
    "vgg16": (lambda: skd.models.vgg16_bn(width=0.125), 16, 4),
}


@pytest.mark.parametrize("make, size, count", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(make, size, count, pools, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(make)
    x = images(13, 3, (size, size))
    for training in (True, False):
        pools.clear()
        found = one_step(fast.train(training), x)
        assert len(pools) == count
        assert_near(found, one_step(plain.train(training), x), 1e-9)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_runs_are_equal_bit_for_bit(threads: int, sparse_twins, one_step) -> None:
    fast, _ = sparse_twins(between(nn.MaxPool2d(2)))
    state = copy.deepcopy(fast.state_dict())
    torch.set_num_threads(threads)
    runs = []
    for _ in range(2):
        fast.load_state_dict(state)
        runs.append([t.clone() for t in one_step(fast, images(19, 4, (16, 16)))])
    assert all(map(torch.equal, *runs))
