"""When a choice is measured again, by a clock that only work moves on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd.nn import SparseLinear
from sparsekd.ops.cpu import cpp, dense
from sparsekd.ops.dispatch import auto
from sparsekd.ops.dispatch.auto import Dispatcher
from sparsekd.ops.dispatch.choices import Choice, Choices
from sparsekd.ops.dispatch.watch import Watch
from sparsekd.ops.kernel import products
from sparsekd.timing import time

BACKENDS = {"cpp": cpp, "dense": dense}


class Machine:
    """Two backends of which each run takes as long as the test says.

    Attributes:
        ms: of a run, by backend; or what makes it of the number of runs so far.
        runs: which backend ran, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path | None) -> None:
        self.ms: dict[str, float | Callable[[int], float]] = {"cpp": 1.0, "dense": 2.0}
        self.runs: list[str] = []
        self.now = 0.0
        self.path, self._patch = path, monkeypatch
        monkeypatch.delenv("SPARSEKD_BACKEND", raising=False)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for name, module in BACKENDS.items():
            monkeypatch.setattr(module, "linear", self.timed(name, module.linear))
        # What is prepared would go past these functions.
        monkeypatch.setattr(BACKENDS["cpp"], "prepare", lambda op, args: None)
        self.start_process()

    def start_process(self) -> None:
        made = Dispatcher(Choices(self.path))
        self._patch.setattr(auto, "dispatcher", lambda: made)
        self._patch.setattr(products["linear"], "_known", {})

    def timed(self, name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def linear(*args: Any) -> Tensor:
            self.runs.append(name)
            ms = self.ms[name]
            self.now += (ms(len(self.runs)) if callable(ms) else ms) / 1e3
            return run(*args)

        return linear


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path / "choices.jsonl")


class Work:
    """A layer and its input; `run` calls it and returns what ran last."""

    def __init__(self, machine: Machine, sparsity: float = 0.8) -> None:
        self.layer, self.x = SparseLinear(128, 128, sparsity=sparsity, seed=0), torch.ones(400, 128)
        self.machine = machine

    def run(self, times: int = 1) -> str:
        for _ in range(times):
            self.layer(self.x)
        return self.machine.runs[-1]


def test_a_choice_made_on_a_busy_machine_is_corrected(machine: Machine) -> None:
    """The race was disturbed: all that ran took longer, the better backend more so."""
    work = Work(machine)
    machine.ms = {"cpp": 20.0, "dense": 10.0}
    assert work.run() == "dense"
    machine.ms = {"cpp": 1.0, "dense": 2.0}
    assert work.run(300) == "cpp"
    assert machine.runs.count("dense") < 200
    machine.start_process()  # a later process knows it too
    machine.runs.clear()
    assert work.run(10) == "cpp"
    assert set(machine.runs) == {"cpp"}


def test_what_runs_slower_than_it_did_is_measured_again(machine: Machine) -> None:
    work = Work(machine)
    assert work.run(100) == "cpp"
    machine.ms["cpp"] = 4.0
    assert work.run(200) == "dense"
    assert machine.runs.count("cpp") < 200


def test_a_choice_of_an_earlier_process_is_measured_again_where_it_runs_slower(
    machine: Machine,
) -> None:
    work = Work(machine)
    work.run()
    machine.ms["cpp"] = 4.0
    machine.start_process()
    assert work.run(500) == "dense"


def test_a_disturbed_loser_is_found_too(machine: Machine) -> None:
    """What runs takes as long as it did, so that nothing looks wrong."""
    work = Work(machine)
    machine.ms = {"cpp": 1.0, "dense": 5.0}
    assert work.run() == "cpp"
    machine.ms["dense"] = 0.5
    assert work.run(6000) == "dense"


def test_a_spread_as_large_as_the_gain_is_never_pinned(machine: Machine) -> None:
    sparse, vague = Work(machine, 0.9), Work(machine, 0.3)
    machine.ms = {
        "cpp": lambda n: (9.0, 12.0, 16.0, 21.0, 30.0)[n % 5],
        "dense": lambda n: (10.0, 19.0, 13.0, 26.0, 15.0)[n * 7 // 3 % 5],
    }
    assert (sparse.run(), vague.run()) == ("cpp", "dense")  # by density
    for choices in (auto.dispatcher().choices, Choices(machine.path)):
        choices.get("", 0)
        assert [len(choices), choices.info()["undecided"]] == [2, 2]
    machine.ms = {"cpp": 9.0, "dense": 6.0}
    assert (sparse.run(1500), vague.run(1500)) == ("dense", "dense")
    assert auto.info() == {
        "path": str(machine.path),
        "known": 2,
        "undecided": 0,
    }


def test_a_noisy_race_does_not_undo_a_choice() -> None:
    watch = Watch(Choice("cpp", 1.0, 2.0, 0.05, 100, 1.0))
    assert not watch.takes(Choice("dense", 2.2, 2.0, 0.3, 100, 2.0))
    assert watch.takes(Choice("dense", 2.2, 2.0, 0.05, 100, 2.0))
    watch = Watch(Choice("cpp", 1.0, 1.02, 0.05, 100, 1.0))
    assert watch.takes(Choice("dense", 2.2, 2.0, 0.3, 100, 2.0))


@pytest.mark.parametrize("cold", [1.0, 3.0])
@pytest.mark.parametrize("ms", [1.5, 1.02])
def test_races_take_a_small_share_of_the_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, ms: float, cold: float
) -> None:
    """Also where timings never settle, and where every run is slower than any race."""
    machine.ms = {"cpp": cold, "dense": cold * ms}
    interleave, racing = auto.interleave, []

    def noted(calls: Any) -> Any:
        before, usual = len(machine.runs), machine.ms
        machine.ms = {"cpp": 1.0, "dense": ms}
        times = interleave(calls)
        machine.ms = usual
        racing.append(len(machine.runs) - before)
        return times

    monkeypatch.setattr(auto, "interleave", noted)
    runs = 5000
    Work(machine).run(runs)
    assert len(machine.runs) == runs + sum(racing)
    assert len(racing) <= 10
    assert sum(racing) < runs / 10


def test_a_size_close_to_a_measured_one_is_raced_once_it_is_worth_it(machine: Machine) -> None:
    machine.ms["dense"] = 1.2
    work = Work(machine)
    work.run()
    raced = len(machine.runs)
    work.x = torch.ones(800, 128)
    assert work.run(20) == "cpp"
    assert len(machine.runs) == raced + 20  # what the first size tells
    machine.ms["dense"] = 0.5
    assert work.run(800) == "dense"
    assert len(auto.dispatcher().choices) == 2
