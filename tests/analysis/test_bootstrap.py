"""Worlds, populations and errors, and that both worlds are one run in the first pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sparsekd.analysis import StudyFolder
from sparsekd.analysis.bootstrap import (
    BootstrapStudy,
    DeepBootstrap,
    Mixture,
    errors,
    gaps,
    held_out_population,
    ideal_world,
    mixture_population,
    real_world,
    stopping_time,
)
from sparsekd.analysis.bootstrap import figure as bootstrap_figure
from sparsekd.analysis.bootstrap.study import WorldRun
from sparsekd.errors import DataError
from sparsekd.ops import backend
from sparsekd.plots import save
from sparsekd.train import state_hash

CONFIG = DeepBootstrap(
    network="lenet300_100",
    samples=96,
    steps=14,
    batch_size=16,
    sparsities=(0.9,),
    seeds=1,
    every=4,
    probes=14,
    test=100,
    lr=0.05,
)


@given(st.integers(1, 40), st.integers(0, 120), st.integers(0, 3))
def test_worlds_share_the_first_pass_and_the_ideal_one_never_repeats(samples, length, seed):
    real, ideal = (world(samples, length, seed) for world in (real_world, ideal_world))
    assert len(real) == len(ideal) == length
    first = min(samples, length)
    assert torch.equal(real[:first], ideal[:first])
    assert len(ideal.unique()) == length
    for start in range(0, length - samples + 1, samples):
        assert torch.equal(real[start : start + samples].sort().values, torch.arange(samples))


def test_passes_differ():
    world = real_world(50, 100, seed=0)
    assert not torch.equal(world[:50], world[50:])
    assert not torch.equal(world, real_world(50, 100, seed=1))
    with pytest.raises(ValueError, match="samples"):
        real_world(0, 5, seed=0)


def test_a_sample_of_the_mixture_depends_on_its_position_alone():
    one, other = Mixture(1000, seed=3), Mixture(1000, seed=3)
    index = torch.tensor([999, 0, 128, 127, 0])
    images = one[index]
    assert torch.equal(images[1], images[4])
    for position, image in zip(index.tolist(), images, strict=True):
        assert torch.equal(other[torch.tensor([position])][0], image)
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(Mixture(1000, seed=4)[index], images)
    assert len(one[torch.arange(1000)].flatten(1).unique(dim=0)) == 1000


def test_the_mixture_keeps_a_bounded_number_of_images():
    images = Mixture(128 * 300)
    for number in range(300):
        images[torch.tensor([128 * number])]
    assert images._block.cache_info().currsize == 256


def test_a_stream_is_read_in_its_own_order():
    population = mixture_population(500, test=50)
    positions = torch.tensor([7, 7, 300, 2])
    stream = population.stream(positions)
    ((x, y),) = stream.batches(4, shuffle=True, generator=torch.Generator())
    ((plain, _),) = population.samples.subset(positions).batches(4)
    assert torch.equal(x, plain)
    assert torch.equal(y, population.samples.labels[positions])
    with pytest.raises(DataError, match="fewer than 500"):
        population.stream(torch.tensor([500]))


def test_no_test_sample_is_in_a_world(digits):
    population = mixture_population(300, test=200)
    world = population.samples.images[torch.arange(300)].flatten(1)
    test = population.test.images[torch.arange(200)].flatten(1)
    assert torch.cdist(world, test).min() > 0.1
    held = held_out_population(digits)
    assert len(held.samples) == 400
    assert torch.equal(held.test.labels, digits.test.labels)
    order = held.samples.labels.sort().values
    assert torch.equal(order, digits.train.labels.sort().values)


def test_soft_error_is_what_its_definition_says(digits):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 10)

    uniform = errors(Constant(), digits.test)
    assert uniform.soft == pytest.approx(1 - 1 / 10)
    assert uniform.loss == pytest.approx(2.302585, rel=1e-6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = errors(model, digits.test, batch_size=30)
    ((x, y),) = digits.test.batches(200)
    logits = model(x).double()
    expected = 1 - logits.softmax(1)[torch.arange(200), y].mean()
    assert found.soft == pytest.approx(expected.item(), rel=1e-9)
    assert found.hard == (logits.argmax(1) != y).double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-9)
    assert 0 <= found.soft <= 1


def test_the_stopping_time_is_the_last_step_above_the_level():
    rows = [{"step": s, "train_soft": soft} for s, soft in enumerate([0.9, 0.005, 0.02, 0.001])]
    assert stopping_time(rows, 0.01) == 2
    assert stopping_time(rows, 0.0001) == 3
    assert stopping_time(rows, 1.0) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("bootstrap")
    with backend("cpp"), StudyFolder(path, CONFIG) as folder:
        BootstrapStudy(CONFIG, None, folder).run()
    return path


@pytest.mark.parametrize("method", ["dense", "static", "rigl", "lt"])
def test_the_gap_is_zero_through_the_first_pass(finished, method):
    with StudyFolder(finished, CONFIG) as folder:
        mine = [row for row in folder.rows("probe") if row["method"] == method]
    worlds = {w: [r for r in mine if r["world"] == w] for w in ("real", "ideal")}
    for key in ("test_soft", "test_loss", "train_soft"):
        gap = gaps(worlds["real"], worlds["ideal"], key)
        assert list(gap) == list(range(15))
        # 96 samples are 6 batches; the step that first sees a repeat is the seventh.
        assert [step for step, value in gap.items() if value == 0][:7] == list(range(7))
        assert all(value != 0 for step, value in gap.items() if step > 6)


def test_the_real_error_is_the_ideal_error_plus_the_gap(finished):
    with StudyFolder(finished, CONFIG) as folder:
        rows = folder.rows()
    found = bootstrap_figure.summaries(rows)
    assert len(found) == 5
    for group in found.values():
        for row in group:
            assert row["real"] == pytest.approx(row["ideal"] + row["gap"], abs=1e-12)


def test_both_worlds_start_from_one_network(finished):
    with StudyFolder(finished, CONFIG) as folder:
        study = BootstrapStudy(CONFIG, None, folder)
        for method in ("static", "lt", "kd", "rigl"):
            real, ideal = (study.start(WorldRun(method, 0.9, w, 0)) for w in ("real", "ideal"))
            assert state_hash(real.state_dict()) == state_hash(ideal.state_dict())


def test_teachers_know_their_own_world_alone(finished):
    with StudyFolder(finished, CONFIG) as folder:
        study = BootstrapStudy(CONFIG, None, folder)
        real, ideal = (study._dense(world, 0) for world in ("real", "ideal"))
        assert state_hash(real.state_dict()) != state_hash(ideal.state_dict())
        probes = folder.rows("probe")
    kd = {
        w: [r for r in probes if (r["method"], r["world"]) == ("kd", w)] for w in ("real", "ideal")
    }
    # So worlds of a KD ticket part at the first step, by their teachers.
    gap = gaps(kd["real"], kd["ideal"], "test_loss")
    assert gap[0] == 0
    assert gap[1] != 0


def test_the_figure_and_the_table_need_nothing_but_rows(finished, tmp_path):
    with StudyFolder(finished, CONFIG) as folder:
        rows = folder.rows()
    assert [f.name for f in save(bootstrap_figure.figures(rows), tmp_path)] == [
        "deep-bootstrap.png"
    ]
    assert len(bootstrap_figure.table(rows)) == 1 + 5
    assert bootstrap_figure.figures([]) == {}


def test_a_held_out_population_that_is_too_small_is_refused(digits, tmp_path):
    with StudyFolder(tmp_path, CONFIG) as folder:
        study = BootstrapStudy(replace(CONFIG, data="digits", samples=401), digits, folder)
        with pytest.raises(DataError, match="expected fewer than 400 of digits"):
            study.run()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'magic'"):
        DeepBootstrap(methods=("magic",))
