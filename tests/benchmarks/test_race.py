"""What a race records: times of those that are right, reasons for the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.arena.competitors import LAYERS, STEPS
from benchmarks.arena.epoch import EpochRace, small_epoch
from benchmarks.arena.passes import PASSES, PassRace, pass_competitors
from benchmarks.arena.steps import ArenaStepRace
from sparsekd.bench.cases import LayerCase, ModelCase
from sparsekd.bench.layers import RESULTS, LayerCompetitor, LayerRace, LayerRun
from sparsekd.bench.steps import StepRun

CONV = LayerCase("conv", 8, 6, size=9, kernel=3, stride=2, batch=5)
POINT = LayerCase("conv", 16, 12, size=4, batch=16)
LINEAR = LayerCase("linear", 48, 32, batch=16)
TINY = ModelCase("resnet20", (1, 8, 8), batch=4)
PLAIN = ("dense_contiguous", "dense_channels_last", "sparsekd", "sparsekd_contiguous")


def by_key(rows):
    return {(row["arm"], row["sparsity"]): row for row in rows}


@pytest.mark.parametrize("case", [CONV, POINT, LINEAR], ids=lambda case: case.name)
def test_every_competitor_of_a_layer_is_right_or_says_why_it_is_not_there(case):
    race = LayerRace(case, (0.5, 0.9), LAYERS, rounds=2)
    rows = by_key(race.measure())
    assert set(rows) == set(race.keys())
    for (name, _), row in rows.items():
        if row["ms"] is None:  # another package may be wrong on a shape; ours and torch may not
            assert "skipped" in row or name in ("sparseprop", "sparselab"), row
        else:
            assert len(row["times"]) == 2
            assert min(row["times"]) <= row["ms"] <= max(row["times"])
            assert 0 <= row["error"] < 0.05
    ours = rows["sparsekd", 0.9]
    nnz = round(0.1 * case.outs * case.fan_in)
    assert (ours["nnz"], ours["flops"]) == (nnz, 3 * 2 * nnz * case.positions)
    assert rows["dense_contiguous", None]["flops"] == 3 * case.flops(case.outs * case.fan_in)
    assert LayerCase(**ours["layer"]) == case


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda case: case.name)
@pytest.mark.parametrize("name", PASSES)
def test_single_passes_agree_with_dense(case, name):
    rows = by_key(PassRace(case, (0.9,), pass_competitors(name), rounds=1, op=name).measure())
    assert rows["sparsekd_contiguous", 0.9]["ms"] > 0
    assert rows["sparsekd_contiguous", 0.9]["flops"] == case.flops(
        rows["sparsekd_contiguous", 0.9]["nnz"]
    )


@pytest.mark.parametrize("result", RESULTS)
def test_a_competitor_that_computes_something_else_gets_no_time(result):
    def build(problem):
        honest = LAYERS["sparsekd"].build(problem)

        def call():
            found = list(honest.call())
            wrong = (
                found[RESULTS.index(result)].detach().clone(memory_format=torch.contiguous_format)
            )
            wrong.view(-1)[0] += 0.01 * wrong.abs().max()
            found[RESULTS.index(result)] = wrong
            return tuple(found)

        return LayerRun(call, honest.names, honest.nonzeros)

    competitors = {
        "dense_contiguous": LAYERS["dense_contiguous"],
        "cheat": LayerCompetitor("cheat", "cheat", build, sparse=True),
    }
    rows = by_key(LayerRace(POINT, (0.9,), competitors, rounds=1).measure())
    assert rows["cheat", 0.9]["ms"] is None
    assert rows["cheat", 0.9]["refused"].startswith(f"{result} differs")
    assert "times" not in rows["cheat", 0.9]
    assert rows["dense_contiguous", None]["ms"] > 0


def test_a_competitor_that_raises_does_not_end_the_race():
    def build(problem):
        raise ValueError("this shape\nis not for me")

    competitors = {
        "dense_contiguous": LAYERS["dense_contiguous"],
        "broken": LayerCompetitor("broken", "broken", build, sparse=True),
    }
    rows = by_key(LayerRace(POINT, (0.9,), competitors, rounds=1).measure())
    assert rows["broken", 0.9]["failed"] == "ValueError: this shape"


def test_training_steps_agree_with_dense_and_count_their_work():
    race = ArenaStepRace(TINY, (0.8, 0.95), {name: STEPS[name] for name in PLAIN}, rounds=1)
    rows = by_key(race.measure())
    assert set(rows) == set(race.keys())
    assert all(row["ms"] > 0 for row in rows.values())
    dense, sparse = rows["dense_contiguous", None], rows["sparsekd", 0.95]
    assert sparse["flops"] < 0.1 * dense["flops"]
    assert sparse["bytes"] < dense["bytes"]


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_a_step_that_trains_one_layer_wrongly_gets_no_time(factor):
    def build(problem):
        run = STEPS["sparsekd"].build(problem)

        def step(x, y):
            loss = run.step(x, y)
            run.model.layer2[1].conv1.values.grad.mul_(factor)
            return loss

        return StepRun(step, run.model, run.x, run.y)

    cheat = replace(STEPS["sparsekd"], name="cheat", build=build)
    competitors = {"dense_contiguous": STEPS["dense_contiguous"], "cheat": cheat}
    case = replace(TINY, batch=32)
    rows = by_key(ArenaStepRace(case, (0.8,), competitors, rounds=1).measure())
    assert rows["cheat", 0.8]["refused"].startswith("layer2.1.conv1.weight gradient differs")


def test_an_epoch_goes_through_the_loader():
    epoch = small_epoch(96)
    case = ModelCase("resnet20", tuple(epoch.split.images.shape[1:]), batch=32)
    competitors = {name: STEPS[name] for name in ("dense_contiguous", "sparsekd")}
    race = EpochRace(case, (0.9,), competitors, 1, epoch)
    size = "28x28" if "fashion-mnist" in epoch.title else "8x8"  # where that is installed
    assert race.name == ("epoch", f"resnet20 {size} b32", epoch.title)
    assert all(row["ms"] > 0 for row in race.measure())
