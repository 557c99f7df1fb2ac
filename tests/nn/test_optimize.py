"""skd.optimize on models: which norms it reaches and which it leaves, and what stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekd as skd


class Helper(nn.Module):
    """The norm is called in a method that forward calls, with a closure and a private name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.__act = F.relu

    def extra(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.norm(x), x))

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(x) + self.__act(x)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        x = F.relu(self.norms[0](x), inplace=True)
        return x.flip(0) if flip else x


class Shared(nn.Module):
    """A norm whose output is needed as it is must not lose it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(x)
        b = F.relu(a)
        c = self.bn2(x)
        if self.training:
            c = c * 2
        return a + b + F.relu(c)


class Branches(nn.Module):
    """Control flow that depends on data, on the mode and on optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.drop = 0.5
        self.calls = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            positive = bool(x.mean() > 0)
        out = self.bn(x)
        if residual is not None:
            out = out + residual
        out = F.relu(out) if positive else torch.tanh(out)
        return F.dropout(out, self.drop, self.training)


LEFT: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], list[str]]] = {
    "helper": (Helper, (0, 1, 2), ["norm"]),
    "loop": (Loop, (0, 4, 4), ["norms.0", "norms.1", "norms.2"]),
    "shared": (Shared, (0, 2, 2), ["bn1", "bn2"]),
    "branches": (Branches, (0, 1, 1), ["bn"]),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.BatchNorm2d(4), nn.Tanh()
        ),
        (2, 0, 0),
    ),
    "bare": (lambda: nn.Sequential(nn.BatchNorm2d(4)), (1, 0, 0)),
    "affine": (
        lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False, momentum=None), nn.ReLU()),
        (1, 0, 0),
    ),
    "untracked": (
        lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        (1, 0, 0),
    ),
}


@pytest.mark.parametrize("make, expected", MODELS.values(), ids=MODELS.keys())
def test_equal_and_fused(
    make: Callable, expected: tuple[int, int, int], x: Tensor, twins, count, assert_equal_steps
) -> None:
    fast, plain = twins(make)
    assert count(copy.deepcopy(fast), x) == expected
    assert_equal_steps(fast, plain, x)
    fast.eval()
    plain.eval()
    assert_equal_steps(fast, plain, x)


@pytest.mark.parametrize("make, expected, names", LEFT.values(), ids=LEFT.keys())
def test_classes_without_a_row_are_left_and_named(
    make: Callable, expected: tuple[int, int, int], names: list[str], x: Tensor, twins, count
) -> None:
    fast, plain = twins(lambda: nn.Sequential(make()))
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    torch.manual_seed(3)
    y = fast(x)
    torch.manual_seed(3)
    right = plain(x)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-14)  # in another layout
    torch.manual_seed(3)
    assert torch.equal(skd.optimize(copy.deepcopy(plain), channels_last=False)(x), right)
    assert count(fast, x) == expected
    report = skd.nn.fused_norms(fast)
    assert report.fused == ()
    assert list(report.left) == [f"0.{name}" for name in names]
    assert f"left, as optimize has no row for {type(fast[0]).__name__}: 0." in str(report)


def test_the_users_code_still_runs(x: Tensor, twins) -> None:
    fast, plain = twins(Branches)
    for given in ((x,), (-x,), (x, x), (-x.abs(), x)):
        for training in (True, False):
            fast.train(training)
            plain.train(training)
            torch.manual_seed(3)
            y = fast(*given)
            torch.manual_seed(3)
            torch.testing.assert_close(y, plain(*given))
    assert fast.calls == plain.calls == 8


def test_a_model_without_source_stays_as_it_is(x: Tensor, twins, assert_equal_steps) -> None:
    space: dict = {"nn": nn, "F": F}
    exec(
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.bn = nn.BatchNorm2d(4)\n"
        "    def forward(self, x):\n"
        "        return F.relu(self.bn(x))\n",
        space,
    )
    fast, plain = twins(space["Odd"])
    assert type(fast) is space["Odd"]
    assert_equal_steps(fast, plain, x)


def parts(model: nn.Module) -> tuple:
    """Return what must be the same objects under the same names, of whatever class."""
    return (
        list(model.state_dict()),
        [(name, id(p)) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [name for name, _ in model.named_modules()],
        [
            (name, id(m))
            for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear)
        ],
    )


@pytest.mark.parametrize("name", ["resnet18", "wrn22_2", "vgg16_bn"])
def test_names_parameters_and_state_stay(name: str) -> None:
    model = skd.models.build(name)
    before, classes, shown = parts(model), [type(m) for m in model.modules()], repr(model)
    assert skd.optimize(model) is model
    fused = [type(m) for m in model.modules()]
    modules = [id(m) for m in model.modules()]
    assert all(issubclass(new, old) for new, old in zip(fused, classes, strict=True))
    assert skd.optimize(model) is model
    assert [id(m) for m in model.modules()] == modules
    assert parts(model) == before
    assert skd.nn.unfuse(model) is model
    assert parts(model) == before
    assert [type(m) for m in model.modules()] == classes
    assert repr(model) == shown


def test_the_report_counts_norms_and_says_why_others_are_left(caplog) -> None:
    class Odd(nn.BatchNorm2d): ...

    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(2), Odd(2)), Branches(), nn.BatchNorm1d(2))
    assert str(skd.nn.fused_norms(model)) == (
        "0 of 3 BatchNorm2d fused\n"
        "  left, as optimize was not called: 0.0\n"
        "  left, as its class is Odd: 0.1\n"
        "  left, as optimize has no row for Branches: 1.bn"
    )
    with caplog.at_level("INFO", logger="sparsekd"):
        skd.optimize(model)
    report = skd.nn.fused_norms(model)
    assert report.fused == ("0.0",)
    assert report.left.keys() == {"0.1", "1.bn"}
    assert str(report) in caplog.text


def test_a_model_that_changes_itself_stays_the_object_it_is(x: Tensor, count) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double()
    before = parts(model)
    fast = skd.optimize(model)
    assert fast is model
    assert isinstance(fast, nn.Sequential)
    assert parts(fast) == before
    fast.eval()
    assert count(fast[:1], x) == (1, 0, 0)  # a slice stops where it says
    torch.testing.assert_close(fast[:1](x), model[0](x))
    assert skd.nn.unfuse(fast) is model
    assert type(model) is nn.Sequential
    assert parts(model) == before


def test_lists_and_hooks_see_the_new_modules(x: Tensor) -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).double()
    model.blocks = [model[0]]
    seen: list[nn.Module] = []
    handle = model[0].register_forward_hook(lambda module, *_: seen.append(module))
    skd.optimize(model)
    model(x)
    assert model.blocks[0] is model[0] is seen[0]
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_a_replacement_extends_what_it_replaces() -> None:
    with pytest.raises(TypeError, match="FusedSequential: expected a subclass of Branches"):
        skd.nn.register_fused(Branches)(type(skd.optimize(nn.Sequential(nn.BatchNorm2d(1)))))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_optimized(how: str, count) -> None:
    torch.manual_seed(0)
    model = skd.optimize(skd.models.resnet20(10))
    x = torch.randn(2, 3, 16, 16)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert count(other, x) == (21, 0, 0)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), model(x))
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("order", ["sparsify first", "optimize first"])
def test_with_sparse_layers(order: str, count) -> None:
    torch.manual_seed(0)
    model = skd.models.resnet20(10)
    if order == "optimize first":
        skd.optimize(model)
    skd.sparsify(model, sparsity=0.8, seed=0)
    plain = skd.densify(copy.deepcopy(model))
    skd.optimize(model)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=1, until=10)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        if not dst.step():
            opt.step()
    counted = skd.flops.count(model, (1, 3, 32, 32))
    assert counted.forward < 0.5 * counted.forward_dense
    assert count(model, x) == (21, 0, 0)
    skd.densify(model)
    assert count(model, x) == (21, 0, 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_whole_network_runs_in_channels_last(channels: int, sparse: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)
    )
    if sparse:
        skd.sparsify(model, sparsity=0.5, distribution="uniform")
    plain = copy.deepcopy(model)
    skd.optimize(model)
    x = torch.randn(2, channels, 9, 9)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain(x))
    dense = skd.densify(model)
    assert dense(x).is_contiguous(memory_format=torch.channels_last)
