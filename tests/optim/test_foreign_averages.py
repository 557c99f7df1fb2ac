"""Averages that other code keeps of a sparse model: wrong once it moves, and the user is told."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sparsekd.errors import TopologyError
from sparsekd.nn import SparseLinear, sparse_modules


class HandWritten:
    """Averages as people write them: each changes the copy by the model, slot by slot."""

    @staticmethod
    def parameters(copied: nn.Module, model: nn.Module) -> None:
        with torch.no_grad():
            for mean, new in zip(copied.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.3)

    @staticmethod
    def data(copied: nn.Module, model: nn.Module) -> None:
        for mean, new in zip(copied.parameters(), model.parameters(), strict=True):
            mean.data.mul_(0.7).add_(new.data, alpha=0.3)

    @staticmethod
    def reassigned(copied: nn.Module, model: nn.Module) -> None:
        for mean, new in zip(copied.parameters(), model.parameters(), strict=True):
            mean.data = mean.data * 0.7 + new.data * 0.3

    @staticmethod
    def state(copied: nn.Module, model: nn.Module) -> None:
        for mean, new in zip(
            copied.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(new, 0.3)
            else:
                mean.copy_(new)


HANDS = [getattr(HandWritten, name) for name in ("parameters", "data", "reassigned", "state")]
USES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "forward": lambda model, x: model(x),
    "forward-eval": lambda model, x: model.eval()(x),
    "no-grad": lambda model, x: torch.no_grad()(model)(x),
    "copied": lambda model, x: copy.deepcopy(model),
    "saved": lambda model, x: model.state_dict(),
    "compiled": lambda model, x: torch.compile(model.eval(), backend="eager")(x),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("average_", HANDS)
def test_an_average_behind_our_back_warns_when_it_is_used(average_, use, network, batch):
    model = network()
    copied = copy.deepcopy(model)
    average_(copied, model)
    for _, module in sparse_modules(model):
        module.rewire(module.topology.mask().roll(1, dims=0))
    average_(copied, model)
    with pytest.warns(RuntimeWarning, match=r"skd\.optim\.AveragedModel"):
        USES[use](copied, batch(0))


@pytest.mark.parametrize("use", USES)
def test_torchs_own_average_warns_when_it_is_used(use, network, batch):
    model = network()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    for _, module in sparse_modules(model):
        module.rewire(module.topology.mask().roll(1, dims=0))
    average.update_parameters(model)
    with pytest.warns(RuntimeWarning, match=r"skd\.optim\.AveragedModel"):
        USES[use](average, batch(0))


def noticed(use: Callable[[], object]) -> bool:
    """Return whether a use warns of the average, or refuses indices that are none any more."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            use()
        except TopologyError as error:
            return "skd.optim.AveragedModel" in str(error)
    return any("skd.optim.AveragedModel" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("moves", [False, True])
def test_averaged_indices_are_noticed(moves, network, batch):
    """torch rounds averages of indices down, so they move even if the model's do not."""
    model = network()
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    average = swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
        if moves:
            model[0].rewire(model[0].topology.mask().roll(1, dims=0))
    assert noticed(lambda: average.eval())


@pytest.mark.parametrize("average_", HANDS)
def test_a_model_that_changes_size_names_the_average_that_cannot_follow(average_, network, batch):
    model = network()
    copied, untouched = copy.deepcopy(model), copy.deepcopy(model)
    nn.init.normal_(model[0].values)
    average_(copied, model)
    smaller = model[0].topology.mask()
    smaller[0] = False
    with pytest.warns(RuntimeWarning, match=r"number of weights.*skd\.optim\.AveragedModel"):
        model[0].rewire(smaller)
    with pytest.raises(RuntimeError, match="size"):
        average_(copied, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untouched(batch(0))
        del copied
        model[0].rewire(~smaller)


def test_other_positions_in_a_model_that_is_no_copy_are_noticed():
    layer, other = (SparseLinear(40, 30, sparsity=0.9) for _ in range(2))
    mask = layer.topology.mask()
    mask[0] = mask[0].roll(1)
    layer.rewire(mask)
    other.col_indices.copy_(layer.col_indices)
    with pytest.warns(RuntimeWarning, match=r"skd\.optim\.AveragedModel"):
        other(torch.randn(2, 40))
    assert other.topology == layer.topology


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("average_", HANDS)
def test_right_averages_and_copies_do_not_warn(average_, network, batch):
    model = network()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    copied, twin = copy.deepcopy(model), copy.deepcopy(model)
    for t in range(3):  # the topology stays
        nn.init.normal_(model[0].values)
        average.update_parameters(model)
        average_(copied, model)
        for each in (average, copied, copied.eval()):
            each(batch(t))
    del average, copied, each  # a model that changes size warns of averages that it has
    snapshot = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for t in range(3):  # a copy that trains by itself, beside a model that moves
        optimizer.zero_grad()
        twin(batch(t)).sum().backward()
        model[0].rewire(~model[0].topology.mask())
        optimizer.step()
    snapshot.float().double()
    snapshot(batch(0))
    snapshot.load_state_dict(model.state_dict())
    snapshot.eval()(batch(0))
    again = pickle.loads(pickle.dumps(snapshot))
    model[0].rewire(~model[0].topology.mask())
    nn.init.normal_(again[0].values)
    again(batch(0))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_writing_the_same_indices_changes_nothing(network, batch):
    model = network()
    topology = model[0].topology
    for buffer in model.buffers():  # as a broadcast does
        buffer.copy_(buffer.clone())
    model(batch(0))
    assert model[0].topology is topology
    topology.transpose()


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm(version, network, batch, timm):
    ema_class = getattr(timm.utils, version)
    model = network()
    ema = ema_class(model, decay=0.9)
    ema.update(model)
    for _, module in sparse_modules(model):
        module.rewire(module.topology.mask().roll(1, dims=0))

    def use() -> None:
        ema.update(model)
        ema.module(batch(0))

    assert noticed(use)
