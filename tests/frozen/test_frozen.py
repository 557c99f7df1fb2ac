"""Frozen networks give what the model gives in eval mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.frozen.draft import ATTENTION


def trained(model: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics and weights that training would."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model.eval()


def assert_frozen_equals(model: nn.Module, x: Tensor, outside: int = 0) -> None:
    """Compare with the model in float64, to 1e-5 of the largest result."""
    frozen = skd.freeze(model, x)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        right = exact(x.double())
        error = (frozen(x) - right).abs().max() / right.abs().max()
    assert error < 1e-5
    assert len(frozen.outside) == outside, frozen.outside
    if not outside:
        assert len(frozen.islands) == 1


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: skd.models.resnet20(num_classes=10), (3, 32, 32)),
    "resnet18": (lambda: skd.models.resnet18(num_classes=10, stem="cifar"), (3, 32, 32)),
    "resnet50": (lambda: skd.models.resnet50(num_classes=10, stem="imagenet"), (3, 65, 71)),
    "vgg16": (lambda: skd.models.vgg16_bn(num_classes=10), (3, 32, 32)),
    "wrn22_2": (lambda: skd.models.wrn22_2(num_classes=10), (3, 32, 32)),
    "lenet5": (lambda: skd.models.lenet5(num_classes=10), (1, 28, 28)),
    "lenet300_100": (lambda: skd.models.lenet300_100(num_classes=10), (1, 28, 28)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_models(name: str, sparsity: float) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    if sparsity:
        skd.sparsify(model, sparsity=sparsity)
    assert_frozen_equals(trained(model), torch.randn(3, *shape))


class Zoo(nn.Module):
    """Everything that has a rule, between the layers that take it up and without them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 12, (1, 3), stride=(1, 2), groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = F.gelu(self.depthwise(x)) + x
        y = F.max_pool2d(F.hardswish(y + y), 3, 2, 1)
        y = F.relu6(self.norm(self.grouped(F.avg_pool2d(y, 2, 1, 1, count_include_pad=False))))
        y = F.relu(F.avg_pool2d(y, (2, 1), 1))
        return self.last(F.dropout(y.mean((2, 3)), training=self.training))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_every_rule(groups: int, batch: int) -> None:
    torch.manual_seed(1)
    assert_frozen_equals(trained(Zoo(groups)), torch.randn(batch, 3, 23, 30))


class Squeeze(nn.Module):
    """Squeeze and excitation as torchvision writes it, or as timm does."""

    def __init__(self, pool: bool, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1) if pool else None, gate
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        y = self.pool(x) if self.pool else x.mean((2, 3), keepdim=True)
        y = self.gate(self.up(F.relu(self.down(y))))
        return self.last(y * x if self.pool else x * y)


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_squeeze_and_excitation(pool: bool, gate: nn.Module, batch: int) -> None:
    torch.manual_seed(5)
    assert_frozen_equals(trained(Squeeze(pool, gate)), torch.randn(batch, 3, 9, 14))


class Masked(nn.Module):
    """An encoder layer whose keys are masked, with the scale given as BERT gives it."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.heads, self.packed = 3, packed
        self.qkv = nn.Linear(24, 72)
        self.parts = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.out, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        if self.packed:
            packed = self.qkv(x).reshape(batch, tokens, 3, self.heads, 8).permute(2, 0, 3, 1, 4)
            q, k, v = packed.unbind(0)
        else:
            q, k, v = (f(x).view(batch, tokens, self.heads, 8).transpose(1, 2) for f in self.parts)
        if mask.ndim == 2:  # of keys, as tokenizers give it
            mask = (mask > 0)[:, None, None].expand(batch, 1, tokens, tokens)
        met = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8**-0.5)
        return self.norm(x + self.out(met.transpose(1, 2).reshape(batch, tokens, 24)))


@pytest.mark.parametrize("tokens", [5, 33, 70])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_masks_of_numbers(packed: bool, heads: int, tokens: int) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, tokens, 24)
    model = Masked(packed).eval()
    for queries in (1, tokens):
        mask = torch.randn(2, heads, queries, tokens)
        mask[0, :, :, tokens // 2 :] = torch.finfo(torch.float32).min
        mask[1, :, :, 1] = -torch.inf
        frozen = skd.freeze(model, x, mask)
        with torch.inference_mode():
            torch.testing.assert_close(frozen(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)
        assert not frozen.outside
        assert len(frozen.islands) == 1


def test_masks_of_a_tokenizer() -> None:
    torch.manual_seed(7)
    x, mask = torch.randn(3, 20, 24), torch.ones(3, 20)
    mask[0, 12:] = 0
    mask[1, 1:] = 0
    mask[2] = 0  # nothing is left to attend to
    model = Masked(packed=False).eval()
    frozen = skd.freeze(model, x, mask)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)
    assert len(frozen.islands) == 1
    kinds = [node.kind for node in frozen.islands[0].nodes]
    assert kinds.count(ATTENTION) == 1
    assert frozen.islands[0].input_shapes[-1] == (1, 1, 20)  # no copy for every query


def test_operators_without_a_rule_run_in_torch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x).relu()
            return self.second(torch.tanh(y)), y

    model = Odd().eval()
    x = torch.randn(2, 3, 9, 9)
    frozen = skd.freeze(model, x)
    with torch.inference_mode():
        for ours, right in zip(frozen(x), model(x), strict=True):
            torch.testing.assert_close(ours, right)
    assert frozen.outside == ["aten.tanh.default"]
    assert len(frozen.islands) == 2


def test_a_kept_map_is_not_overwritten_by_its_reader() -> None:
    """Two readers of a convolution: neither may become part of it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y.relu() + y

    assert_frozen_equals(trained(Twice()), torch.randn(2, 3, 7, 7))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_batches(threads: int) -> None:
    """One image at a time gives the same up to rounding; the same call the same bits."""
    torch.manual_seed(2)
    model = trained(skd.sparsify(skd.models.resnet20(num_classes=10), sparsity=0.8))
    frozen = skd.freeze(model)
    x = torch.randn(9, 3, 32, 32)
    with torch.inference_mode():
        one_by_one = torch.cat([frozen(image[None]) for image in x])
        torch.set_num_threads(threads)
        result = frozen(x)
        torch.testing.assert_close(result, one_by_one)
        assert torch.equal(frozen(x), result)
        assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), result)
        assert frozen(x[:0]).shape == (0, 10)


def test_nan_and_infinity_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(0)
    x = torch.tensor([[float("nan"), 1, 2, 3], [0, 0, float("inf"), 0.0]])[None, None]
    with torch.inference_mode():
        torch.testing.assert_close(skd.freeze(model, x)(x), model(x), equal_nan=True)


def test_the_model_and_its_copy_are_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).train()
    frozen = skd.freeze(model, torch.zeros(1, 4))
    x = torch.randn(2, 4)
    before = model(x)
    with torch.no_grad():
        model[0].weight.zero_()
    assert model.training
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), before)
        torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), before)
        torch.testing.assert_close(copy.deepcopy(frozen)(x), before)


def test_refusals() -> None:
    frozen = skd.freeze(nn.Linear(4, 3), torch.zeros(1, 4))
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        frozen.train()
    assert not frozen.eval().training
    with pytest.raises(UnsupportedError, match="no gradients"):
        frozen(torch.zeros(1, 4, requires_grad=True))
    with pytest.raises(UnsupportedError, match=r"float32 on the CPU, got torch\.float64"):
        skd.freeze(nn.Linear(4, 3).double())
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace"):
        skd.freeze(nn.Linear(4, 3), torch.zeros(1, 5))
    with pytest.raises(ShapeError, match="a tensor with a batch"):
        skd.freeze(nn.Linear(4, 3), 5)
    with pytest.raises(UnsupportedError, match="call the module once"):
        _ = skd.freeze(nn.Linear(4, 3)).outside
