"""Who sees the calls of modules in the blocked layout: hooks, tracers, modes, other backends."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock
from sparsekd.ops.cpu import blocked as cpu_blocked


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 8, 6, 6, dtype=torch.float64, generator=generator)


def stages() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2)),
        nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
    )


@pytest.fixture
def twins(sparse_twins) -> tuple[nn.Module, nn.Module]:
    return sparse_twins(stages)


WHERE = {  # a module -> blocks that still run in the layout if something sees it
    "": 3, "0": 3, "0.0": 3, "0.0.conv1": 2, "0.0.bn1": 2, "0.0.bn2": 2, "0.1.downsample": 3,
    "0.1.downsample.0": 2, "0.1.downsample.1": 2, "1": 3, "1.0": 2, "1.1": 2, "1.2": 2,
}  # fmt: skip


def _forward(module: nn.Module, seen: list) -> object:
    return module.register_forward_hook(lambda m, args, y: seen.append((args[0].clone(), y)))


def _pre(module: nn.Module, seen: list) -> object:
    return module.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(),)))


def _backward(module: nn.Module, seen: list) -> object:
    return module.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0], go[0])))


def _backward_pre(module: nn.Module, seen: list) -> object:
    return module.register_full_backward_pre_hook(lambda m, go: seen.append((go[0],)))


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("register", [_forward, _pre, _backward, _backward_pre])
@pytest.mark.parametrize("before", [True, False])
def test_hooks(
    name: str, register: Callable, before: bool, twins, x, blocks, one_step, assert_near
) -> None:
    fast, plain = twins
    if before:
        skd.nn.unfuse(fast)
    sides: list[list] = [[], []]
    handles = [
        register(model.get_submodule(name), seen)
        for model, seen in zip((fast, plain), sides, strict=True)
    ]
    skd.optimize(fast)
    assert_near(one_step(fast, x), one_step(plain, x))
    assert len(blocks) == WHERE[name]
    assert len(sides[0]) == len(sides[1]) == 1
    assert all(type(t) is Tensor for t in sides[0][0])
    assert_near(sides[0][0], sides[1][0])
    for handle in handles:
        handle.remove()
    blocks.clear()
    fast(x)
    assert len(blocks) == 3
    assert len(sides[0]) == 1


def test_a_hook_may_replace_what_passes(twins, x, one_step, assert_near) -> None:
    for model in twins:
        model[0][0].register_forward_hook(lambda m, args, y: y * 2)
        model[0][1].bn1.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    assert_near(*(one_step(model, x) for model in twins))


def test_a_global_hook_sees_every_module(twins, x, blocks) -> None:
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: names.append(type(module).__name__)
    )
    try:
        twins[0](x)
    finally:
        handle.remove()
    assert blocks == []
    assert names.count("SparseConv2d") == 6


def test_a_forward_that_was_replaced_runs(twins, x, assert_near, blocks) -> None:
    for model in twins:
        block = model[0][1]
        block.forward = lambda x, block=block: type(block).forward(block, x).neg()
    assert_near([twins[0](x)], [twins[1](x)])


@pytest.mark.parametrize("what", ["parametrized", "subclass", "reflect", "pruned"])
def test_other_convolutions_run_as_before(what: str, twins, x, blocks, assert_near, one_step):
    class Louder(skd.nn.SparseConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Twice(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    for model in twins:
        conv = model[0][0].conv1
        if what == "parametrized":
            parametrize.register_parametrization(model[1][0], "bias", Twice())
        elif what == "subclass":
            conv.__class__ = Louder
        elif what == "reflect":
            conv.padding_mode = "reflect"
        else:
            prune.l1_unstructured(conv, "values", 0.5)
    assert_near(one_step(twins[0], x), one_step(twins[1], x))
    assert len(blocks) == 2


@pytest.mark.parametrize("what", ["identity", "group norm", "plain norm", "relu in shortcut"])
def test_other_norms_run_as_before(what: str, twins, x, assert_near, one_step) -> None:
    for model in twins:
        block = model[0][1]
        if what == "identity":
            block.bn1 = nn.Identity()
        elif what == "group norm":
            block.bn1 = nn.GroupNorm(3, 12, dtype=torch.float64)
        elif what == "plain norm":
            block.bn1 = nn.BatchNorm2d(12, dtype=torch.float64)
        else:
            old = block.downsample[1]
            block.downsample[1] = skd.models.norm_act.BatchNormAct2d(12, dtype=torch.float64)
            block.downsample[1].load_state_dict(old.state_dict())
    skd.optimize(twins[0])
    assert_near(one_step(twins[0], x), one_step(twins[1], x))


@pytest.mark.parametrize(
    "context",
    [
        lambda: skd.backend("reference"), lambda: skd.backend("dense"),
        lambda: FlopCounterMode(display=False), lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["reference", "dense", "flop counter", "autocast"],
)  # fmt: skip
def test_modes_see_every_call(context: Callable, twins, x, blocks, assert_near, one_step) -> None:
    found = []
    for model in twins:
        with context():
            found.append(one_step(model.train(), x))
    assert blocks == []
    assert_near(*found, 1e-10)


def test_a_profiler_measures_what_runs_without_it(twins, x, blocks, assert_near, one_step) -> None:
    with torch.profiler.profile() as profile:
        found = one_step(twins[0].train(), x)
    assert len(blocks) == 3
    names = {event.key for event in profile.key_averages()}
    assert f"sparsekd::{type(twins[0][0][0]).__name__}" in names
    assert_near(found, one_step(twins[1].train(), x), 1e-10)


@pytest.mark.parametrize("name", ["auto", "cpp"])
def test_other_backends_than_the_kernels(name: str, twins, x, blocks) -> None:
    with skd.backend(name):
        twins[0](x)
    assert len(blocks) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, twins, x, blocks) -> None:
    fast, plain = (model.to(dtype) for model in twins)
    torch.testing.assert_close(fast(x.to(dtype)), plain(x.to(dtype)), rtol=0.1, atol=0.1)
    assert blocks == []


def test_mixed_dtypes_raise_as_before(twins, x, blocks) -> None:
    for model in twins:
        with pytest.raises(RuntimeError):
            model(x.float())
    twins[0][0][0].bn1.float()
    twins[1][0][0].bn1.float()
    for model in twins:
        with pytest.raises(RuntimeError):
            model(x)
    assert blocks == []


def test_inputs_that_do_not_fit_raise_as_before(twins, x) -> None:
    for bad in (x[:, :4], x[0, 0], x[:, :, :0], x.int()):
        kinds = []
        for model in twins:
            with pytest.raises((RuntimeError, ValueError, skd.errors.SparsekdError)) as info:
                model(bad)
            kinds.append((info.type, str(info.value)))
        assert kinds[0] == kinds[1]


def test_an_empty_batch(twins, x) -> None:
    for model in twins:
        model.eval()
    assert twins[0](x[:0]).shape == twins[1](x[:0]).shape


def test_torch_compile(twins, x, blocks, assert_near, one_step) -> None:
    compiled = torch.compile(twins[0], backend="aot_eager", fullgraph=True)
    assert_near(one_step(compiled, x), one_step(twins[1], x))
    assert blocks == []
    assert_near(one_step(twins[0], x), one_step(twins[1], x))


@pytest.mark.parametrize("training", [True, False])
def test_export_and_trace(training: bool, twins, x, blocks, assert_near) -> None:
    fast, plain = (model.train(training) for model in twins)
    state = copy.deepcopy(fast.state_dict())
    program = torch.export.export(fast, (x,))
    assert not [n for n in program.graph.nodes if "norm_act" in str(n.target)]
    names = {path for n in program.graph.nodes
             for path, _ in n.meta.get("nn_module_stack", {}).values()}  # fmt: skip
    assert {"0.0", "0.1.downsample", "1"} <= {name.removeprefix("L['self'].") for name in names}
    assert blocks == []
    if not training:
        traced = torch.jit.trace(fast, (x,))
        assert_near([program.module()(x), traced(x)], [plain(x), plain(x)])
    fast.load_state_dict(state)


class _Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, BasicBlock) or super().is_leaf_module(module, name)


def test_fx(twins, x, blocks, assert_near) -> None:
    fast, plain = twins
    graph = torch.fx.GraphModule(fast, torch.fx.symbolic_trace(fast).graph)
    leaves = _Leaves().trace(fast)
    assert [n.target for n in leaves.nodes if n.op == "call_module"][:2] == ["0.0", "0.1"]
    assert blocks == []
    assert_near([graph(x)], [plain(x)])
    assert_near([torch.fx.GraphModule(fast, leaves)(x)], [plain(x)])


def test_transforms(twins, x, blocks, assert_near) -> None:
    fast, plain = (model.eval() for model in twins)
    found = []
    for model in (fast, plain):
        params = {k: v.detach() for k, v in model.named_parameters()}

        def loss(params, x, model=model):
            return functional_call(model, params, (x,)).sin().sum()

        tangent = torch.func.jvp(lambda x, m=model: m(x), (x,), (x.cos(),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.sin())
            forward = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        per_sample = vmap(grad(loss), (None, 0))(params, x.unsqueeze(1))
        found.append([*grad(loss)(params, x).values(), *tangent, forward, *per_sample.values()])
    assert blocks == []
    assert_near(*found)


def test_functional_call_with_other_weights(twins, x, blocks, assert_near) -> None:
    fast, plain = twins
    other = {k: v.detach() * 2 for k, v in fast.named_parameters()}
    assert_near([functional_call(fast, other, (x,))], [functional_call(plain, other, (x,))])
    assert len(blocks) == 3


@pytest.mark.parametrize("method", ["RigL", "SET", "SNFS", "TopKAST"])
def test_methods_grow_the_same_weights(method: str, sparse_twins, x) -> None:
    masks, models = [], sparse_twins(stages)
    for model in models:
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(3)
        options = {"drop_fraction": 0.3, "every": 2, "until": 10}
        if method == "TopKAST":
            options = {"sparsity": 0.7, "backward_sparsity": 0.5, "every": 2, "until": 10}
        dst = getattr(skd.dst, method)(model, opt, **options)
        for _ in range(7):
            opt.zero_grad()
            model(x).sin().sum().backward()
            if not dst.step():
                opt.step()
        masks.append([m.topology.mask() for _, m in skd.nn.sparse_modules(model)])
    del dst
    gc.collect()  # with what it listens by
    assert all(map(torch.equal, *masks))


def test_an_updater_leaves_other_models_in_the_layout(
    sparse_twins, x, blocks, monkeypatch, one_step, assert_near
) -> None:
    """A student whose next update is due, and a teacher that has weights in training as well."""
    (teacher, plain), (student, _) = sparse_twins(stages), sparse_twins(stages)
    ordinary: list[object] = []
    real = cpu_blocked.by_ordinary_ops
    note = lambda *args: ordinary.append(args[1]) or real(*args)  # noqa: E731
    monkeypatch.setattr(cpu_blocked, "by_ordinary_ops", note)
    opt = torch.optim.SGD(student.parameters(), lr=0.05)
    dst = skd.dst.RigL(student, opt, drop_fraction=0.3, every=2, until=10)
    for update in (False, True, False, True):
        assert_near(one_step(teacher, x), one_step(plain, x))
        assert len(blocks) == 3
        assert not ordinary
        blocks.clear()
        opt.zero_grad()
        student(x).sin().sum().backward()
        assert len(blocks) == (0 if update else 3)
        blocks.clear()
        assert dst.step() == update
    del dst
    gc.collect()  # with what it listens by


def test_listeners_that_come_between_the_passes(sparse_twins, x) -> None:
    masks, models = [], sparse_twins(stages)
    for model in models:
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        loss = model(x).sin().sum()
        dst = skd.dst.RigL(model, opt, drop_fraction=0.3, every=1, until=10)
        loss.backward()
        assert dst.step()
        masks.append([m.topology.mask() for _, m in skd.nn.sparse_modules(model)])
    del dst
    gc.collect()  # with what it listens by
    assert all(map(torch.equal, *masks))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "unfuse", "state_dict"])
def test_copies(how: str, twins, x, blocks, assert_near, one_step) -> None:
    fast, plain = twins
    one_step(fast, x)  # with plans
    one_step(plain, x)
    blocks.clear()
    other = fast
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "unfuse":
        other = skd.nn.unfuse(fast)
    else:
        assert list(fast.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(fast.state_dict())
    assert_near(one_step(other, x), one_step(plain, x))
    assert len(blocks) == (0 if how == "unfuse" else 3)


def test_ddp(process_group, twins, x, blocks, assert_near, one_step) -> None:
    fast, plain = twins
    wrapped = nn.parallel.DistributedDataParallel(fast)
    assert_near(one_step(wrapped, x), one_step(plain, x))
    with wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext():
        assert_near(one_step(wrapped, x), one_step(plain, x))
    assert len(blocks) == 6
