"""Modules that keep their activations in the blocked layout: the same numbers, and when it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock, Bottleneck
from sparsekd.models.wide_resnet import WideResNet

BATCHES = (1, 9, 10, 16, 17, 27, 33, 130)


def images(batch: int, channels: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=generator)


def in_layout(batch: int) -> bool:
    """Whether at least three fifths of the lanes hold images, eight to a group in float64."""
    return batch >= 0.6 * 8 * -(-batch // 8)


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (lambda: skd.models.resnet20(width=0.5), 8, 10),
    "resnet18": (lambda: skd.models.resnet18(width=0.125), 8, 9),
    "resnet18 imagenet": (lambda: skd.models.resnet18(10, "imagenet", width=0.125), 32, 9),
    "resnet50": (lambda: skd.models.resnet50(width=0.125), 8, 17),
    "vgg16": (lambda: skd.models.vgg16_bn(width=0.125), 16, 13),
    "wrn10": (lambda: WideResNet(10, 1), 8, 4),
}


@pytest.mark.parametrize("batch", [10, 17])
@pytest.mark.parametrize("make, size, count", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(
    make, size: int, count: int, batch: int, blocks, sparse_twins, one_step, assert_near
) -> None:
    fast, plain = sparse_twins(make)
    x = images(batch, size=size)
    for training in (True, True, False):
        blocks.clear()
        found = one_step(fast.train(training), x)
        assert 0.7 * count <= len(blocks) <= count
        assert_near(found, one_step(plain.train(training), x), 1e-9)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: int, blocks, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2)))
    x = images(batch, 8)
    found = one_step(fast, x)
    assert len(blocks) == 2 * in_layout(batch)
    assert_near(found, one_step(plain, x))


def _strided(x: Tensor) -> Tensor:
    wide = x.new_empty(x.shape[0], 2 * x.shape[1], x.shape[2] + 3, 2 * x.shape[3])
    return wide[:, ::2, 1:-2, ::2].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": _strided,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout: str, blocks, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(Bottleneck(8, 4, 2), BasicBlock(16, 16)))
    x = LAYOUTS[layout](images(11, 8, 7))
    found = one_step(fast, x)
    assert len(blocks) == 2
    assert_near(found, one_step(plain, x))
    y = fast(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "stride 3, 2": {"kernel_size": 3, "stride": (3, 2), "padding": (1, 0)},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "wide": {"kernel_size": (1, 5), "padding": (0, 2)},
    "even": {"kernel_size": 4, "padding": 1},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
    "padding of two": {"kernel_size": 1, "padding": 2},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("size", [(7, 9), (4, 3)])
def test_geometries(options: dict, size, sparse_twins, one_step, assert_near) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(8, 16, **options), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8),
        )  # fmt: skip

    fast, plain = sparse_twins(make, 0.5)
    x = images(12, 8, max(size))[:, :, : size[0], : size[1]]
    assert_near(one_step(fast, x), one_step(plain, x))


def _freeze(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _set(**values) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in values.items():
                    setattr(module, name, value)

    return change


NORMS = {
    "no affine": (lambda n: nn.BatchNorm2d(n, affine=False), None),
    "untracked": (lambda n: nn.BatchNorm2d(n, track_running_stats=False), None),
    "cumulative": (lambda n: nn.BatchNorm2d(n, momentum=None), None),
    "momentum 0": (lambda n: nn.BatchNorm2d(n, momentum=0.0), None),
    "momentum 1": (lambda n: nn.BatchNorm2d(n, momentum=1.0), None),
    "large eps": (lambda n: nn.BatchNorm2d(n, eps=0.5), None),
    "no bias": (lambda n: nn.BatchNorm2d(n), _set(bias=None)),
    "frozen": (lambda n: nn.BatchNorm2d(n), _freeze),
    "eval": (lambda n: nn.BatchNorm2d(n), lambda model: model.eval()),
    "untracked from now": (lambda n: nn.BatchNorm2d(n), _set(track_running_stats=False)),
    "uncounted": (lambda n: nn.BatchNorm2d(n), _set(num_batches_tracked=None)),
    "uncounted, cumulative": (
        lambda n: nn.BatchNorm2d(n, momentum=None), _set(num_batches_tracked=None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("norm, change", NORMS.values(), ids=NORMS.keys())
def test_norms(norm, change, blocks, sparse_twins, one_step, assert_near) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), norm(12), nn.ReLU(), nn.Conv2d(12, 8, 3), norm(8)
        )

    fast, plain = sparse_twins(make)
    for model in (fast, plain):
        if change is not None:
            change(model)
    for seed in range(3):
        x = images(10, 8, seed=seed)
        assert_near(one_step(fast, x), one_step(plain, x))
    assert len(blocks) == 6
    training = plain.training
    assert_near([fast.eval()(x)], [plain.eval()(x)])
    fast.train(training)


def test_a_constant_channel_and_large_offsets(sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(stack)
    x = images(16, 8)
    x[:, 0] = 7.0
    x[:, 1] += 1e4
    assert_near(one_step(fast, x), one_step(plain, x), 1e-6)
    with torch.no_grad():
        for model in (fast, plain):
            model[0].values.zero_()
    assert_near(one_step(fast, x), one_step(plain, x), 1e-8)


def test_float32_is_as_near_to_float64_as_torch(blocks, sparse_twins, one_step) -> None:
    _, exact = sparse_twins(stack)
    plain = copy.deepcopy(exact).float()
    fast = skd.optimize(copy.deepcopy(plain))
    for model in (exact, plain, fast):  # far from the bend of the ReLUs, whatever is rounded
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.bias.abs_().add_(8)
    x = images(20, 8)
    right, near, found = (one_step(m, x.to(m[0].values.dtype)) for m in (exact, plain, fast))
    assert len(blocks) == 3
    for r, n, f in zip(right, near, found, strict=True):
        scale = max(1.0, float(r.abs().max()))
        assert float((f - r).abs().max()) <= 4 * float((n - r).abs().max()) + 2e-5 * scale


def test_rewiring_and_moving_values(blocks, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(stack)
    x = images(16, 8)
    for seed in range(4):
        for model in (fast, plain):
            for _, module in skd.nn.sparse_modules(model):
                flat = torch.zeros(module.topology.mask().numel(), dtype=torch.bool)
                order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))
                flat[order[: module.topology.nnz + seed]] = True
                module.rewire(flat.view(module.weight_shape))
        assert_near(one_step(fast, x), one_step(plain, x))
        assert len(blocks) == 3 * (seed + 1)
    assert len(fast[0].values) > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_runs_are_equal_bit_for_bit(threads: int, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(BasicBlock(8, 8), Bottleneck(8, 4, 2)))
    state = copy.deepcopy(fast.state_dict())
    torch.set_num_threads(threads)
    runs = []
    for _ in range(3):
        fast.load_state_dict(state)
        runs.append([t.clone() for t in one_step(fast, images(19, 8))])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
    assert_near(runs[0], one_step(plain, images(19, 8)))


def test_both_ends_of_a_mixed_network(sparse_twins, one_step, assert_near) -> None:
    """Blocked and ordinary modules take turns, in every order."""

    def make() -> nn.Module:
        return nn.Sequential(
            BasicBlock(4, 8), nn.MaxPool2d(2, 1), BasicBlock(8, 8), nn.Identity(),
            nn.Sequential(BasicBlock(8, 8), nn.Sequential(Bottleneck(8, 2))), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GELU(), BasicBlock(8, 8), nn.Conv2d(8, 4, 3),
        )  # fmt: skip

    fast, plain = sparse_twins(make)
    x = images(24, 4)
    assert_near(one_step(fast, x), one_step(plain, x))


def test_other_activations_and_functions_see_ordinary_images(sparse_twins, assert_near) -> None:
    class Tap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return F.silu(x)

    fast, plain = sparse_twins(lambda: nn.Sequential(BasicBlock(4, 8), Tap(), BasicBlock(8, 8)))
    x = images(16, 4)
    assert_near([fast(x), fast[1].seen], [plain(x), plain[1].seen])
    assert type(fast[1].seen) is Tensor
