"""How many turns calls get and what is kept of them, by a clock that the test sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekd import timing
from sparsekd.timing import fastest, interleave


class Clock:
    """Stand in for time.perf_counter: time passes only while a call runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *ms: float) -> Call:
        """Return a call that takes these times in turn, the last of them ever after."""
        return Call(self, ms)


class Call:
    def __init__(self, clock: Clock, ms: tuple[float, ...]) -> None:
        self.clock, self.ms, self.runs = clock, ms, 0

    def __call__(self) -> None:
        self.clock.now += self.ms[min(self.runs, len(self.ms) - 1)] / 1e3
        self.runs += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


def test_a_clear_result_is_short_and_the_first_runs_do_not_count(clock: Clock) -> None:
    a, b = clock.call(500, 10), clock.call(1, 20)
    assert fastest(interleave({"a": a, "b": b})) == pytest.approx({"a": 10, "b": 20})
    assert a.runs == b.runs == 4  # one run to warm up and three turns


def test_a_close_result_takes_more_turns(clock: Clock) -> None:
    a, b = clock.call(10), clock.call(11)
    interleave({"a": a, "b": b})
    assert a.runs == b.runs == 10


def test_short_calls_are_repeated_for_a_while(clock: Clock) -> None:
    a, b = clock.call(0.1), clock.call(0.4)
    interleave({"a": a, "b": b})
    assert 40 <= a.runs <= 43


def test_it_goes_on_until_the_fastest_run_was_met_twice(clock: Clock) -> None:
    disturbed = (90, 60, 40, 12, 50, 10, 40, 10)
    a = clock.call(*disturbed)
    assert fastest(interleave({"a": a, "b": clock.call(30)})) == pytest.approx({"a": 10, "b": 30})
    assert a.runs >= len(disturbed)


def test_it_ends_on_a_machine_that_never_rests(clock: Clock) -> None:
    a = clock.call(*(1000 * 0.8**turn for turn in range(60)))
    interleave({"a": a, "b": clock.call(50)})
    assert a.runs == 4


def test_a_number_of_rounds_is_kept_to_but_by_slow_calls(clock: Clock) -> None:
    quick, slow = clock.call(10), clock.call(2000)
    times = interleave({"quick": quick, "slow": slow}, rounds=5, slow=1.0)
    assert times == {"quick": pytest.approx([10] * 5), "slow": pytest.approx([2000] * 3)}
    assert (quick.runs, slow.runs) == (6, 4)


def test_a_turn_lasts_as_long_as_it_should(clock: Clock) -> None:
    call = clock.call(2)
    assert interleave({"call": call}, rounds=2, least=0.02)["call"] == pytest.approx([2, 2])
    assert call.runs == 1 + 2 * 10


def test_every_round_has_every_call_also_in_another_order(clock: Clock) -> None:
    order: list[str] = []
    interleave({name: lambda name=name: order.append(name) for name in "abcde"}, 3, shuffle=True)
    rounds = ["".join(order[start : start + 5]) for start in range(0, 20, 5)]
    assert all(sorted(found) == list("abcde") for found in rounds)
    assert len(set(rounds)) > 1


def test_warming_up_ends_once_memory_has_settled(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([0, 5000, 5000, 9000, 9000, 9001])
    monkeypatch.setattr(timing, "_page_faults", lambda: next(faults))
    call = clock.call(1)
    interleave({"call": call}, rounds=1, settle=True)
    assert call.runs == 3 + 1


def test_nothing_to_time_takes_no_time() -> None:
    assert interleave({}, rounds=3) == {}


def test_a_turn_on_a_gpu_ends_when_the_gpu_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", happened.append)
    for name in ("cuda:1", "cpu"):
        calls = {"call": lambda: happened.append("queued")}
        interleave(calls, rounds=1, device=torch.device(name))
    gpu = torch.device("cuda:1")
    turn = [gpu, "queued", gpu]
    assert happened == [*turn, *turn, "queued", "queued"]
