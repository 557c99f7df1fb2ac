"""Channels that nothing goes into or nothing reads are removed, and results stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.frozen import FrozenModule


def frozen_of(model: nn.Module, *inputs: Tensor) -> FrozenModule:
    """Freeze and compare with the model in float64, to 1e-5 of the largest result."""
    frozen = skd.freeze(model.eval(), *inputs)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        right = exact(*(x.double() for x in inputs))
        assert (frozen(*inputs) - right).abs().max() <= 1e-5 * right.abs().max()
    assert not frozen.outside
    return frozen


def rows(frozen: FrozenModule) -> list[int]:
    nodes = frozen.islands[0].nodes
    return [len(n.lists["crow"]) - 1 for n in nodes if "crow" in n.lists]


class Chain(nn.Module):
    """Two convolutions with BatchNorm between, and a linear layer."""

    def __init__(self, kernel: int, padding: int, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.activation = activation
        self.second = nn.Conv2d(8, 6, kernel, padding=padding)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.activation(self.norm(self.first(x)))).relu()
        return self.last(y.mean((2, 3)))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish()]
)
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 0), (3, 1), (1, 1)])
def test_rows_without_inputs(kernel: int, padding: int, activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = Chain(kernel, padding, activation)
    with torch.no_grad():
        model.first.weight[[1, 4, 6]] = 0
        model.norm.bias.uniform_(0.5, 1)  # after BatchNorm and activation they are not zero
        model.norm.bias[4] = model.norm.running_mean[4] = model.first.bias[4] = 0
    frozen = frozen_of(model, torch.randn(3, 3, 9, 8))
    # Where taps reach into the padding, a constant that is not zero cannot go into the bias.
    gone = 1 if padding else 3
    assert frozen.removed_channels == gone
    assert rows(frozen)[0] == 8 - gone
    assert f"{gone} dead channels removed" in repr(frozen)


def test_channels_without_readers() -> None:
    torch.manual_seed(1)
    model = Chain(3, 1, nn.SiLU())
    with torch.no_grad():
        model.second.weight[:, [0, 5]] = 0
        model.last.weight[:, 2] = 0  # and so nobody reads row 2 of the second convolution
        model.second.weight[[i for i in range(6) if i != 2], 7] = 0  # which alone reads channel 7
    frozen = frozen_of(model, torch.randn(2, 3, 7, 7))
    assert rows(frozen) == [5, 5, 4]
    whole = 3 * 9 * 8 + 8 * 9 * 6 + 6 * 4
    assert frozen.removed_channels == 4
    assert frozen.stored_values == 3 * 9 * 5 + 5 * 9 * 5 + 5 * 4 < whole


class Residual(nn.Module):
    """Channels of a sum stay if one side has them; depthwise layers lose whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.last = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(self.inner(y) + y)
        return self.last(F.max_pool2d(F.relu(self.depthwise(y)), 2).flatten(1))


def test_sums_groups_and_flatten() -> None:
    torch.manual_seed(2)
    model = Residual()
    with torch.no_grad():
        model.stem.weight[[0, 1]] = 0
        model.stem.bias[0], model.stem.bias[1] = 0.5, -1
        model.inner.weight[1] = 0
        model.inner.bias[1] = -0.5  # channel 1: zero on both sides, so its group is a constant
        model.depthwise.bias[2:4] = -1  # which ReLU takes away
    frozen = frozen_of(model, torch.randn(2, 3, 4, 4))
    assert rows(frozen) == [5, 5, 10, 5]
    assert frozen.removed_channels == 1 + 1 + 2


def test_nothing_is_left_of_a_layer() -> None:
    model = Chain(1, 0, nn.ReLU())
    with torch.no_grad():
        model.first.weight.zero_()
    frozen = frozen_of(model, torch.randn(2, 3, 5, 5))
    # Its constants are in the bias of the next, which is a constant itself, and so on.
    assert rows(frozen) == [1, 1, 4]
    assert frozen.stored_values == 0


@pytest.mark.filterwarnings("ignore:no weight is left in some output channels")
@pytest.mark.parametrize("sparsity", [0.9, 0.98])
@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn"])
def test_sparse_networks(name: str, sparsity: float) -> None:
    torch.manual_seed(3)
    model = getattr(skd.models, name)(num_classes=10)
    skd.sparsify(model, sparsity=sparsity, distribution="uniform")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
    nnz = sum(m.values.numel() for m in model.modules() if hasattr(m, "topology"))
    frozen = frozen_of(model, torch.randn(2, 3, 32, 32))
    assert frozen.stored_values <= nnz
    if sparsity == 0.98:
        assert frozen.removed_channels > 0
        assert frozen.stored_values < nnz
