"""skd.optimize: what it must not change, and where fusion steps aside."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsekd as skd


class Calls(TorchDispatchMode):
    """Count the fused and the plain BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.plain = self.relus = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        self.fused += name == "sparsekd::norm_act"
        self.plain += name == "aten::native_batch_norm"
        self.relus += name.startswith(("aten::relu", "aten::clamp_min"))
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    with Calls() as calls:
        model(x)
    return calls.fused, calls.plain, calls.relus


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


class Helper(nn.Module):
    """The site lies in a method that forward calls, with a closure and a private name."""

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


class Child(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.relu(self.bn1(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "torchvision": (lambda: Torchvision(False), (2, 0, 0)),
    "projected": (lambda: Torchvision(True), (3, 0, 0)),
    "helper": (Helper, (1, 0, 1)),
    "loop": (Loop, (4, 0, 0)),
    "shared": (Shared, (2, 0, 2)),
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


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return skd.optimize(copy.deepcopy(model)), model


def assert_equal_steps(fast: nn.Module, plain: nn.Module, x: Tensor) -> None:
    for _ in range(2):
        sides = []
        for model in (fast, plain):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            grads = [p.grad for p in model.parameters()]
            sides.append([y.detach(), leaf.grad, *grads, *model.buffers()])
        torch.testing.assert_close(sides[0], sides[1])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make, expected", MODELS.values(), ids=MODELS.keys())
def test_equal_and_fused(make: Callable, expected: tuple[int, int, int], x: Tensor) -> None:
    fast, plain = twins(make)
    assert count(copy.deepcopy(fast), x) == expected
    assert_equal_steps(fast, plain, x)
    fast.eval()
    plain.eval()
    assert_equal_steps(fast, plain, x)


def test_the_users_code_still_runs(x: Tensor) -> None:
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


def test_super_keeps_its_meaning(x: Tensor) -> None:
    fast, plain = twins(lambda: Child(True))
    assert_equal_steps(fast, plain, x)
    assert type(fast).__name__ == "Child"
    assert isinstance(fast, Torchvision)


def test_a_model_without_source_stays_as_it_is(x: Tensor) -> None:
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


def test_names_parameters_and_state_stay() -> None:
    model = skd.models.resnet18()
    before = (
        list(model.state_dict()),
        [(name, id(p)) for name, p in model.named_parameters()],
        [(name, id(m)) for name, m in model.named_modules()],
        repr(model),
    )
    assert skd.optimize(model) is model
    classes = [type(m) for m in model.modules()]
    skd.optimize(model)
    assert [type(m) for m in model.modules()] == classes
    after = (
        list(model.state_dict()),
        [(name, id(p)) for name, p in model.named_parameters()],
        [(name, id(m)) for name, m in model.named_modules()],
        repr(model),
    )
    assert before == after
    assert isinstance(model.layer1[0], skd.models.resnet.BasicBlock)


def test_unfuse_takes_it_back(x: Tensor) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    assert type(skd.nn.unfuse(fast)) is Torchvision
    assert count(copy.deepcopy(fast), x) == (0, 3, 2)
    assert_equal_steps(fast, plain, x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_optimized(how: str) -> None:
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


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", ["bn2", "relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_make_their_sites_plain(hook: str, child: str, when: str, x: Tensor) -> None:
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
        skd.optimize(fast)
    fast_seen, handle = seen_by(fast)
    plain_seen, _ = seen_by(plain)
    skd.optimize(fast)
    assert_equal_steps(fast, plain, x)
    assert plain_seen
    torch.testing.assert_close(fast_seen, plain_seen)
    handle.remove()
    assert count(fast, x) == (3, 0, 0)


def test_global_hooks_see_every_module(x: Tensor) -> None:
    fast, _ = twins(lambda: Torchvision(True))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        fast(x)
    finally:
        handle.remove()
    assert {fast.bn1, fast.bn2, fast.relu} <= set(seen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, x: Tensor) -> None:
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
def test_compile_without_graph_breaks(backend: str, training: bool, x: Tensor) -> None:
    torch._dynamo.reset()
    fast, plain = twins(lambda: nn.Sequential(Torchvision(True), Loop()))
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


def test_frozen_norms_in_a_training_model(x: Tensor) -> None:
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


def test_second_derivatives(x: Tensor) -> None:
    fast, plain = twins(lambda: Torchvision(True))
    sides = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).tanh().sum(), leaf, create_graph=True)
        sides.append(torch.autograd.grad(grad.square().sum(), [leaf, *model.parameters()]))
    torch.testing.assert_close(*sides)


def test_torch_func(x: Tensor) -> None:
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


def test_replaced_modules_are_seen(x: Tensor) -> None:
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


@pytest.mark.parametrize("order", ["sparsify first", "optimize first"])
def test_with_sparse_layers(order: str) -> None:
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
