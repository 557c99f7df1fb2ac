"""Layers that are also held outside of the tree of modules, and models in wrappers."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import weakref

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")

Pair = collections.namedtuple("Pair", "layer rest")


@dataclasses.dataclass
class Plain:
    layer: nn.Module


@dataclasses.dataclass(frozen=True)
class Frozen:
    layer: nn.Module


class Slotted:
    __slots__ = ("__inner", "layer")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = self.__inner = layer

    def inner(self) -> nn.Module:
        return self.__inner


class Tracker:
    def __init__(self, layer: nn.Module) -> None:
        self.watched = {"one": [layer]}

    def hook(self, *_: object) -> None:
        pass


class Key(collections.UserDict):
    pass


def with_hook(layer: nn.Module) -> object:
    return Tracker(layer).hook


def with_itself(layer: nn.Module) -> list[object]:
    endless: list[object] = [layer]
    endless.append(endless)
    return endless


# How an attribute holds a layer, and how the layer is reached from there.
HOLDERS = {
    "list": (lambda m: [m], lambda h: h[0]),
    "tuple": (lambda m: (1, m), lambda h: h[1]),
    "dict": (lambda m: {"a": m}, lambda h: h["a"]),
    "ordered dict": (lambda m: collections.OrderedDict(a=m), lambda h: h["a"]),
    "key": (lambda m: {0: 1, m: "first", 2: 3}, lambda h: list(h)[1]),
    "set": (lambda m: {m}, lambda h: next(iter(h))),
    "frozenset": (lambda m: frozenset([m]), lambda h: next(iter(h))),
    "deque": (lambda m: collections.deque([m], maxlen=3), lambda h: h[0]),
    "named tuple": (lambda m: Pair(m, 2), lambda h: h.layer),
    "nested": (lambda m: [{"a": (1, [m])}], lambda h: h[0]["a"][1][0]),
    "cycle": (with_itself, lambda h: h[1][1][0]),
    "dataclass": (Plain, lambda h: h.layer),
    "namespace": (lambda m: types.SimpleNamespace(x=Plain(m)), lambda h: h.x.layer),
    "slots": (Slotted, lambda h: h.layer),
    "private slots": (Slotted, lambda h: h.inner()),
    "user dict": (lambda m: Key(a=m), lambda h: h["a"]),
    "partial": (lambda m: functools.partial(m, 1, key=m), lambda h: h.func),
    "partial of lists": (lambda m: functools.partial(print, [m]), lambda h: h.args[0][0]),
    "method": (lambda m: m.forward, lambda h: h.__self__),
    "method of a holder": (with_hook, lambda h: h.__self__.watched["one"][0]),
    "weak reference": (weakref.ref, lambda h: h()),
    "module outside of the tree": (lambda m: [nn.Sequential(nn.ReLU(), m)], lambda h: h[0][1]),
    "shared": (lambda m: [(m,)] * 2, lambda h: h[1][0]),
}  # fmt: skip


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


@pytest.mark.parametrize("name", HOLDERS)
def test_holders_get_the_new_layers_and_back(name, recwarn):
    build, reach = HOLDERS[name]
    model = Holding()
    model.inner.held = build(model.inner.fc)
    skd.sparsify(model, 0.5)
    assert isinstance(model.inner.fc, SparseLinear)
    assert reach(model.inner.held) is model.inner.fc
    skd.densify(model)
    assert type(model.inner.fc) is nn.Linear
    assert reach(model.inner.held) is model.inner.fc
    assert not [w for w in recwarn if "cannot give" in str(w.message)]


def test_a_layer_that_is_an_attribute_besides_the_tree():
    model = Holding()
    model.__dict__["alias"] = model.head
    skd.sparsify(model, 0.5)
    assert model.__dict__["alias"] is model.head


def closure(layer: nn.Module) -> object:
    return lambda x: layer(x)


def default(layer: nn.Module) -> object:
    def call(x: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
        return layer(x)

    return call


LOST = {
    "closure": (closure, r"model\.inner\.held \(layer of "),
    "default": (default, r"model\.inner\.held \(a default of "),
    "closure in a list": (lambda m: [closure(m)], r"model\.inner\.held\[0\] \(layer of"),
    "frozen": (Frozen, r"model\.inner\.held\.layer"),
    "weight": (lambda m: [m.weight], r"model\.inner\.held\[0\] \(its weight\)"),
    "counter": (lambda m: collections.Counter([m]), r"model\.inner\.held \(a key\)"),
    "weak reference": (lambda m: weakref.ref(m, print), r"model\.inner\.held \(a weak reference\)"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_put_right_is_named(name):
    build, where = LOST[name]
    model = Holding()
    layer = model.inner.fc
    model.inner.held = build(layer)
    with pytest.warns(UserWarning, match=f"cannot give every holder.*\n  {where}") as caught:
        skd.sparsify(model, 0.5)
    assert [w.filename for w in caught if "cannot give" in str(w.message)] == [__file__]


def test_forward_hooks_that_close_over_a_layer_are_named():
    model = Holding()
    layer = model.inner.fc
    model.head.register_forward_hook(lambda *_: layer.weight.sum())
    with pytest.warns(UserWarning, match=r"model\.head\._forward_hooks\[\d+\] \(layer of"):
        skd.sparsify(model, 0.5)


def test_a_model_that_runs_its_layers_from_a_list_equals_dense_and_trains():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
            self.steps = [("a", self.a), ("b", self.b)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _, layer in self.steps:
                x = layer(x).tanh()
            return x

    model = skd.sparsify(Listed().double(), 0.5)
    dense = skd.densify(copy.deepcopy(model))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    dense(x).sum().backward()
    for name, layer in skd.nn.sparse_modules(model):
        expected = dense.get_submodule(name).weight.grad[layer.topology.mask()]
        torch.testing.assert_close(layer.values.grad, expected, rtol=1e-9, atol=1e-12)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "OptimizedModule": functools.partial(torch.compile, backend="eager"),
    "FullyShardedDataParallel": fsdp1,
    "FSDPModule": fsdp2,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrappers_are_refused_by_name(name, nested):
    for call, layer in ((skd.sparsify, nn.Linear(8, 8)), (skd.densify, SparseLinear(8, 8))):
        if name.startswith("F") and call is skd.densify:
            continue  # what sharding does to sparse layers is tested with the replicas
        wrapped = WRAPPERS[name](nn.Sequential(layer))
        model = nn.Sequential(nn.ReLU(), wrapped) if nested else wrapped
        classes = [type(m) for m in model.modules()]
        where = "'1' in it" if nested else "it"
        with pytest.raises(UnsupportedError, match=f"{where} is a {name}.*call {call.__name__} on"):
            call(model)
        assert [type(m) for m in model.modules()] == classes


def test_scripted_and_traced_models_are_refused_by_name():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    for scripted in (torch.jit.script(model), torch.jit.trace(model, x)):
        with pytest.raises(UnsupportedError, match="is a ScriptModule"):
            skd.sparsify(scripted)


def test_masks_are_not_drawn_for_a_wrapped_model():
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))
    for method in (skd.sparsity.snip, skd.sparsity.grasp, skd.sparsity.synflow):
        with pytest.raises(UnsupportedError, match="DataParallel"):
            method(wrapped, (torch.ones(2, 4), torch.tensor([0, 1])))


def test_a_model_compiled_in_place_and_a_graph_module_are_converted():
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.compile(backend="eager")
    model(x)
    skd.sparsify(model, 0.5)
    torch.testing.assert_close(model(x), skd.densify(copy.deepcopy(model))(x))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    skd.sparsify(traced, 0.5)
    torch.testing.assert_close(traced(x), skd.densify(copy.deepcopy(traced))(x))
