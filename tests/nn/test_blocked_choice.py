"""Blocks of which no rule tells whether they run in the layout: measured, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock, Bottleneck
from sparsekd.models.wide_resnet import WideResNet
from sparsekd.ops.cpu import blocked as cpu_blocked
from sparsekd.ops.dispatch.blocks import BlockChooser


def images(batch: int = 16, channels: int = 8, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=generator)


def stages() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2), Bottleneck(12, 4, 1)),
    )


class Answers:
    """Stands for the clock: the choice of each block in turn, after a run each way."""

    def __init__(self) -> None:
        self.next: list[bool] = []
        self.asked = 0

    def layout_wins(self, chooser, key, layout, ordinary) -> bool:
        layout()
        ordinary()
        self.asked += 1
        return self.next[(self.asked - 1) % len(self.next)]


@pytest.fixture
def answers(monkeypatch) -> Answers:
    """Return what is answered in the place of measured times."""
    found = Answers()
    monkeypatch.setattr(BlockChooser, "layout_wins", lambda *args: found.layout_wins(*args))
    return found


PATTERNS = {
    "all": [True], "none": [False], "first": [True, False, False, False],
    "last": [False, False, False, True], "in turn": [True, False], "later": [False, True],
}  # fmt: skip
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "stages": (stages, 8, 4),
    "resnet50": (lambda: skd.models.resnet50(width=0.125), 3, 17),
    "vgg16": (lambda: skd.models.vgg16_bn(width=0.125), 3, 13),
    "wrn10": (lambda: WideResNet(10, 1), 3, 4),
}


CASES = [
    *(("stages", pattern) for pattern in PATTERNS),
    *((name, pattern) for name in ("resnet50", "vgg16", "wrn10") for pattern in ("all", "later")),
]


@pytest.mark.parametrize("name, pattern", CASES)
def test_the_same_numbers_whatever_is_chosen(
    name: str, pattern: str, answers, sparse_twins, one_step, assert_near
) -> None:
    make, channels, count = NETWORKS[name]
    answers.next = PATTERNS[pattern]
    fast, plain = sparse_twins(make, 0.4)
    x = images(10, channels, 16)
    for training in (True, False):
        found = one_step(fast.train(training), x)
        assert_near(found, one_step(plain.train(training), x), 1e-9)
    assert answers.asked >= count


def test_a_choice_holds_until_the_call_or_the_density_changes(
    answers, sparse_twins, one_step, blocks
) -> None:
    fast, _ = sparse_twins(stages, 0.4)
    answers.next = [True]
    for _ in range(3):
        one_step(fast, images())
    fast.eval()(images())
    assert answers.asked == 4
    assert len(blocks) == 4 * 5  # a run of each trial, then four calls
    one_step(fast.train(), images(32))
    assert answers.asked == 8
    conv = fast[1][0].conv1
    mask = conv.topology.mask()
    conv.rewire(mask.flip(0))
    one_step(fast, images())
    assert answers.asked == 8
    mask.view(-1)[mask.view(-1).nonzero()[0]] = False
    conv.rewire(mask)
    one_step(fast, images())
    assert answers.asked == 9


def test_what_lost_runs_outside(answers, sparse_twins, one_step, blocks) -> None:
    fast, _ = sparse_twins(stages, 0.4)
    answers.next = [False]
    one_step(fast, images())
    asked = answers.asked  # also for shortcuts by themselves
    blocks.clear()
    one_step(fast, images())
    assert blocks == []
    assert answers.asked == asked
    assert not any(module in cpu_blocked._plans for module in fast.modules())


def _nothing(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _inference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x.clone()).clone()


def _recomputed(model: nn.Module, x: Tensor) -> Tensor:
    y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    return torch.autograd.grad(y.sin().sum(), x)[0]


@pytest.mark.parametrize("run", [_nothing, _inference, _recomputed])
@pytest.mark.parametrize("wins", [True, False])
def test_modes(run: Callable, wins: bool, answers, sparse_twins, assert_near) -> None:
    answers.next = [wins]
    fast, plain = sparse_twins(stages, 0.4)
    asked = []
    for _ in range(2):
        assert_near([run(fast, images())], [run(plain, images())])
        assert_near(list(fast.buffers()), list(plain.buffers()))
        asked.append(answers.asked)
    assert asked[0] == asked[1] >= 4


def test_hooks_of_saved_tensors_see_no_trial(answers, sparse_twins) -> None:
    answers.next = [True]
    fast, _ = sparse_twins(stages, 0.4)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fast(images())
        first = len(seen)
        fast(images())
    assert len(seen) == 2 * first > 0


def test_no_gradient_is_left_behind(answers, sparse_twins) -> None:
    answers.next = [True]
    fast, _ = sparse_twins(stages, 0.4)
    fast(images())
    assert all(p.grad is None for p in fast.parameters())


def test_pinned_kernels_are_not_measured(answers, sparse_twins, one_step, blocks) -> None:
    for sparsity, runs in ((0.4, 0), (0.51, 4)):
        fast, _ = sparse_twins(stages, sparsity)
        with skd.backend("cpp"):
            one_step(fast, images())
        assert len(blocks) == runs
    assert answers.asked == 0


def test_what_is_not_finite_is_not_measured(answers, sparse_twins, assert_near, caplog) -> None:
    answers.next = [True]
    fast, plain = sparse_twins(stages, 0.4)
    x = images()
    x[0, 0, 0, 0] = torch.inf
    assert_near([fast(x)], [plain(x)])
    assert answers.asked == 0
    assert "not finite" in caplog.text


@pytest.mark.parametrize("wins", [True, False])
@pytest.mark.parametrize("skip", [["0.0"], ["1.1.downsample.0"], ["1.0.conv1", "1.2.conv2"]])
def test_dense_convolutions_take_part(
    skip: list[str], wins: bool, answers, one_step, assert_near, blocks
) -> None:
    answers.next = [wins]
    torch.manual_seed(0)
    plain = skd.sparsify(stages().double(), sparsity=0.5, distribution="uniform", skip=skip)
    fast = skd.optimize(copy.deepcopy(plain))
    for _ in range(2):
        assert_near(one_step(fast, images()), one_step(plain, images()))
    blocks.clear()
    fast(images())
    assert len(blocks) == (3 + (skip != ["0.0"])) * wins


def test_the_clock_decides_by_itself(sparse_twins, one_step, assert_near) -> None:
    """Without a stand-in, at a size where a measurement takes milliseconds."""
    fast, plain = sparse_twins(stages, 0.4)
    for _ in range(2):
        assert_near(one_step(fast, images()), one_step(plain, images()))
