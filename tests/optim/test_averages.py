"""An averaged sparse model is the dense average, whatever moves the topology."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sparsekd import dst
from sparsekd.errors import CheckpointError, ShapeError
from sparsekd.nn import (
    SparseConv2d,
    SparseLinear,
    densify,
    make_capturable,
    relayout,
    sparse_modules,
    sparsify,
)
from sparsekd.optim import AveragedModel
from sparsekd.tickets import SupTickets, superpose

MOVING = {"every": 2, "until": 100}
METHODS: dict[str, tuple[float, Callable]] = {
    "static": (0.6, lambda m, o: dst.Static(m, o)),
    "set": (0.6, lambda m, o: dst.SET(m, o, drop_fraction=0.5, **MOVING)),
    "rigl": (0.6, lambda m, o: dst.RigL(m, o, drop_fraction=0.5, **MOVING)),
    "rigl-sm": (0.6, lambda m, o: dst.RigLSM(m, o, drop_fraction=0.5, **MOVING)),
    "gmp": (0.0, lambda m, o: dst.GMP(m, o, sparsity=0.9, every=2, until=14)),
    "granet": (0.3, lambda m, o: dst.GraNet(m, o, sparsity=0.8, prune_until=12, **MOVING)),
    "acdc": (0.0, lambda m, o: dst.ACDC(m, o, sparsity=0.8, compress=(3, 9), decompress=(6, 12))),
    "topkast": (
        0.0,
        lambda m, o: dst.TopKAST(m, o, sparsity=0.7, backward_sparsity=0.4, every=2, until=100),
    ),
}
AVERAGES: dict[str, Callable[[], dict]] = {
    "swa": dict,
    "ema": lambda: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)},
    "swa-multi": lambda: {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "own": lambda: {"avg_fn": lambda mean, new, n: mean + (new - mean) * 0.7 / (n + 1)},
    "ema-buffers": lambda: {
        "multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8),
        "use_buffers": True,
    },
}


def dense(model: nn.Module) -> nn.Module:
    return densify(copy.deepcopy(model))


def assert_dense_average(average: AveragedModel, expected: nn.Module, model: nn.Module) -> None:
    """Compare with an average of dense models at every position that `model` stores."""
    theirs = dict(sparse_modules(model))
    for name, mine in sparse_modules(average.module):
        assert mine.topology == theirs[name].topology
        weight = expected.module.get_submodule(name).weight.detach().reshape(-1)
        stored = weight[mine.topology.flat_indices()]
        torch.testing.assert_close(mine.values.detach(), stored, rtol=0, atol=1e-9)
    own = dict(densify(copy.deepcopy(average.module)).state_dict())
    for name, tensor in expected.module.state_dict().items():
        if not any(name == f"{layer}.weight" for layer in theirs):
            torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-9)


def train(model, optimizer, updater, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    if not updater.step():
        optimizer.step()


@pytest.mark.filterwarnings("error:.*AveragedModel")
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("method", METHODS)
def test_it_equals_the_dense_average_at_every_stored_position(method, kind, network, batch):
    sparsity, make = METHODS[method]
    model = network(sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    updater = make(model, optimizer)
    average = AveragedModel(model, **AVERAGES[kind]())
    expected = swa_utils.AveragedModel(dense(model), **AVERAGES[kind]())
    topologies = set()
    for t in range(16):
        train(model, optimizer, updater, batch(t))
        if t % 3 != 1:  # several rewires may come between two updates
            average.update_parameters(model)
            expected.update_parameters(dense(model))
            assert_dense_average(average, expected, model)
        topologies.add(model[0].topology)
    assert len(topologies) > 3 or method in ("static", "acdc")
    assert average.n_averaged == expected.n_averaged == 11
    assert torch.isfinite(average(batch(0))).all()


@pytest.mark.parametrize("layout", ["bcsr:2", "fanin", "nm"])
def test_layouts_with_tiles(layout):
    model = SparseLinear(16, 8, sparsity=0.5, layout=layout).double()
    average = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    expected = swa_utils.AveragedModel(
        dense(model), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8)
    )
    for t in range(6):
        torch.nn.init.normal_(model.values, generator=torch.Generator().manual_seed(t))
        average.update_parameters(model)
        expected.update_parameters(dense(model))
        assert average.module.layout == model.layout
        stored = expected.module.weight.detach().reshape(-1)[model.topology.flat_indices()]
        torch.testing.assert_close(average.module.values.detach(), stored, rtol=0, atol=1e-9)
        model.rewire(SparseLinear(16, 8, sparsity=0.5, layout=layout, seed=t).topology.mask())
    relayout(model, "csr")
    model.rewire(torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) > 0.3)
    average.update_parameters(model)
    assert average.module.topology == model.topology
    assert average.module.layout.name == "csr"


def test_a_position_keeps_its_average_while_it_is_not_stored():
    ones, mask = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    layer = SparseLinear(2, 1, bias=False, mask=ones).double()
    nn.init.constant_(layer.values, 8.0)
    average = AveragedModel(layer, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(layer)
    layer.rewire(mask)
    average.update_parameters(layer)
    average.update_parameters(layer)
    assert average.module.values.tolist() == [8.0]
    layer.rewire(ones)  # grown again at 0
    average.update_parameters(layer)
    assert average.module.values.tolist() == [8.0, 1.0]


def test_what_changes_before_the_first_update_is_copied(network, batch):
    model = network()
    average = AveragedModel(model)
    for _ in range(3):
        for _, module in sparse_modules(model):
            module.rewire(module.topology.mask().roll(1, dims=0))
            nn.init.normal_(module.values)
    average.update_parameters(model)
    assert torch.equal(average(batch(0)), model(batch(0)))
    assert all(len(rest.values) == 0 for rest in average.rests)


def test_loaded_and_superposed_topologies(network, batch):
    model, other = network(0.6), network(0.6)
    for _, module in sparse_modules(other):
        module.rewire(module.topology.mask().roll(1, dims=0))
    average = AveragedModel(model)
    expected = swa_utils.AveragedModel(dense(model))
    states = [model.state_dict(), other.state_dict(), superpose([model, other]).state_dict()]
    for state in [*copy.deepcopy(states), *copy.deepcopy(states)]:
        model.load_state_dict(state)
        average.update_parameters(model)
        expected.update_parameters(dense(model))
        assert_dense_average(average, expected, model)


def test_the_cycles_of_sup_tickets(network, batch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    host = dst.SET(model, optimizer, every=2, until=4)
    options = {"total_steps": 12, "cycle_fraction": 0.7, "cycle_steps": 2, "lr": (0.01, 0.1)}
    tickets = SupTickets(model, optimizer, host, **options)
    average = AveragedModel(model)
    expected = swa_utils.AveragedModel(dense(model))
    for t in range(12):
        train(model, optimizer, tickets, batch(t))
        average.update_parameters(model)
        expected.update_parameters(dense(model))
        assert_dense_average(average, expected, model)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_resumes_exactly(way, network, batch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    updater = dst.SET(model, optimizer, drop_fraction=0.5, every=1, until=100)
    updater.skip_sgd_on_update = False
    ema = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)} if way != "pickle" else {}
    average = AveragedModel(model, **ema)

    def steps(first: int, last: int) -> None:
        for t in range(first, last):
            train(model, optimizer, updater, batch(t))
            for each in averages:
                each.update_parameters(model)

    averages = [average]
    steps(0, 5)
    assert all(len(rest.values) for rest in average.rests)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(average.state_dict(), file)
        file.seek(0)
        twin = AveragedModel(network(), **ema)
        twin.load_state_dict(torch.load(file, weights_only=True))
    elif way == "deepcopy":
        twin = copy.deepcopy(average)
    else:
        twin = pickle.loads(pickle.dumps(average))
    averages.append(twin)
    steps(5, 10)
    for key, tensor in average.state_dict().items():
        assert torch.equal(twin.state_dict()[key], tensor), key


def test_a_damaged_state_is_refused():
    layer = SparseLinear(4, 4, sparsity=0.5)
    average = AveragedModel(layer)
    for positions in ([16], [-1], [3, 3]):
        state = average.state_dict()
        state["rests.0.positions"] = torch.tensor(positions)
        state["rests.0.values"] = torch.ones(len(positions))
        with pytest.raises(CheckpointError, match=r"rests\.0\.positions"):
            average.load_state_dict(state)


def test_update_bn_and_dtypes(network, batch):
    model = network()
    average = AveragedModel(model)
    model[0].rewire(~model[0].topology.mask())
    average.update_parameters(model)
    average.update_parameters(model)
    swa_utils.update_bn([batch(t) for t in range(3)], average)
    assert average.module[1].num_batches_tracked == 3
    average.float()
    model.float()
    model[0].rewire(~model[0].topology.mask())
    average.update_parameters(model)
    assert average.module[0].values.dtype == torch.float32
    assert average(batch(0).float()).dtype == torch.float32


def test_capturable_models():
    """The mask of a capturable layer is written into its tensors; the average has its own."""
    model = make_capturable(nn.Sequential(SparseLinear(8, 8, sparsity=0.5).double()))
    average = AveragedModel(model)
    expected = swa_utils.AveragedModel(dense(model))
    for _ in range(4):
        average.update_parameters(model)
        expected.update_parameters(dense(model))
        assert_dense_average(average, expected, model)
        nn.init.normal_(model[0].values)
        model[0].rewire(model[0].topology.mask().roll(1, dims=0))


def test_another_architecture_is_refused(network):
    average = AveragedModel(nn.Sequential(nn.Linear(4, 4)))
    sparse = sparsify(nn.Sequential(nn.Linear(4, 4)), sparsity=0.5)
    with pytest.raises(ShapeError, match="after the model has become sparse"):
        average.update_parameters(sparse)
    average = AveragedModel(sparse)
    with pytest.raises(ShapeError, match="expected 2 parameters"):
        average.update_parameters(nn.Sequential(*sparse, nn.Linear(4, 4)))


def test_a_convolution_alone():
    model = SparseConv2d(4, 4, 3, sparsity=0.5).double()
    average = AveragedModel(model)
    average.update_parameters(model)
    model.rewire(~model.topology.mask())
    average.update_parameters(model)
    assert average(torch.ones(1, 4, 5, 5, dtype=torch.float64)).shape == (1, 4, 3, 3)
