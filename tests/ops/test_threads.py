"""What a process has one of, used by several threads at once: each computes what it would alone.

Where an order of events is what goes wrong, events make that order; elsewhere threads start
together, often switch, and do a thing many times.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from sparsekd import ops
from sparsekd.ops import observe
from sparsekd.ops.dispatch import backends, context
from sparsekd.ops.kernel import Product
from sparsekd.ops.single import Single
from sparsekd.topology import Topology

THREADS = 4


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(run: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Run something in threads that start at once; return the results, or raise an error."""
    barrier = threading.Barrier(count)

    def start(number: int) -> Any:
        barrier.wait(60)
        return run(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count), timeout=120))


class Steps:
    """Make two threads take turns: a thread goes on when it is its number's turn."""

    def __init__(self) -> None:
        self._events = [threading.Event() for _ in range(10)]

    def wait(self, number: int) -> None:
        assert self._events[number].wait(60)

    def done(self, number: int) -> None:
        self._events[number].set()


def layer(seed: int = 0) -> skd.nn.SparseConv2d:
    return skd.nn.SparseConv2d(8, 8, 3, padding=1, sparsity=0.7, seed=seed)


# -- backend(...) ---------------------------------------------------------------------------------


def test_contexts_of_two_threads_end_in_any_order() -> None:
    """The first to enter is the first to leave: it used to take the other's backend away."""
    steps = Steps()

    def first() -> list[str | None]:
        with skd.backend("reference"):
            steps.done(0)
            steps.wait(1)  # the other has entered
            inside = context.forced()
        after = context.forced()
        steps.done(2)
        return [inside, after]

    def second() -> list[str | None]:
        steps.wait(0)
        before = context.forced()
        with skd.backend("dense"):
            steps.done(1)
            steps.wait(2)  # the other has left
            inside = context.forced()
        return [before, inside, context.forced()]

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        assert one.result(60) == ["reference", None]
        assert two.result(60) == [None, "dense", None]
    assert context.forced() is None


def test_each_thread_runs_the_backend_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("reference", "cpp", "dense", "reference")
    ran: list[tuple[int, str]] = []
    for name in set(names):
        module = backends.module(name)
        real = module.linear

        def count(*args: Any, name: str = name, real: Any = real) -> Tensor:
            ran.append((threading.get_ident(), name))
            return real(*args)

        monkeypatch.setattr(module, "linear", count)
    monkeypatch.setattr(backends.module("cpp"), "prepare", lambda op, args: None)  # not by name
    linear, x = skd.nn.SparseLinear(16, 8, sparsity=0.5, seed=0), torch.randn(4, 16)
    expected = F.linear(x, linear.dense_weight(), linear.bias)

    def run(number: int) -> int:
        with skd.backend(names[number]):
            for _ in range(50):
                torch.testing.assert_close(linear(x), expected)
        return threading.get_ident()

    threads = together(run)
    for ident, name in zip(threads, names, strict=True):
        assert {other for who, other in ran if who == ident} == {name}


def test_contexts_of_two_tasks_are_their_own() -> None:
    async def task(name: str) -> list[str | None]:
        seen = []
        with skd.backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(context.forced())
        return seen

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(task("reference"), task("dense"))

    assert asyncio.run(both()) == [["reference"] * 3, ["dense"] * 3]


def test_a_backward_pass_on_another_thread_runs_what_its_forward_was_asked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    for name in ("reference", "cpp", "dense"):
        module = backends.module(name)
        real = module.linear_dgrad
        monkeypatch.setattr(
            module, "linear_dgrad", lambda *a, n=name, r=real: ran.append(n) or r(*a)
        )
    monkeypatch.setattr(backends.module("cpp"), "prepare", lambda op, args: None)  # not by name
    linear, x = skd.nn.SparseLinear(16, 8, sparsity=0.5, seed=0), torch.randn(4, 16)

    def forward() -> Tensor:
        return linear(x.requires_grad_()).sum()

    def elsewhere(run: Callable[[], Any]) -> str:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return ran.pop()

    def inside_another() -> None:
        with skd.backend("dense"):
            loss.backward()

    with skd.backend("reference"):
        loss = forward()
    assert elsewhere(loss.backward) == "reference"  # as CUDA's backward passes do
    with skd.backend("reference"):
        loss = forward()
    assert elsewhere(inside_another) == "dense"
    with skd.backend("reference"):
        loss = forward()
    loss.backward()  # on this thread the contexts it is in decide, as ever
    assert ran.pop() == "cpp"
    assert not ran


# -- listeners ------------------------------------------------------------------------------------


class Heard:
    """A listener that counts."""

    watched = None

    def __init__(self) -> None:
        self.calls = 0

    def on_call(self, op: str, args: tuple[Any, ...]) -> None:
        self.calls += 1


def test_listeners_come_and_go_while_others_are_told() -> None:
    always = Heard()
    observe.listeners.add(always)
    linear, x = skd.nn.SparseLinear(16, 8, sparsity=0.5, seed=0), torch.randn(4, 16)

    def run(number: int) -> int:
        heard = 0
        for _ in range(400):
            if number % 2:
                with torch.no_grad():
                    linear(x)
            else:
                mine = Heard()
                observe.listeners.add(mine)
                linear(x)
                observe.listeners.discard(mine)
                heard += mine.calls >= 1
        return heard

    heard = together(run)
    observe.listeners.discard(always)
    assert heard[0] == heard[2] == 400
    assert always.calls == THREADS * 400
    assert not observe.listeners


def test_listeners_change_while_one_is_told() -> None:
    """By construction: the first to be told adds and drops others, as another thread may."""
    added: list[Heard] = []

    class Restless(Heard):
        def on_call(self, op: str, args: tuple[Any, ...]) -> None:
            super().on_call(op, args)
            thread = threading.Thread(target=lambda: observe.listeners.add(added[-1]))
            added.append(Heard())
            thread.start()
            thread.join()

    told = [Restless() for _ in range(3)]
    for one in told:
        observe.listeners.add(one)
    skd.nn.SparseLinear(4, 4, sparsity=0.5)(torch.ones(1, 4))
    assert [one.calls for one in told] == [1, 1, 1]
    assert len(list(observe.listeners)) == 6
    del one
    told.clear()
    added.clear()
    gc.collect()
    assert not observe.listeners, "nobody holds them any more"


def test_growth_goes_on_while_another_model_is_explained() -> None:
    """explain() sees its own model's calls only, and keeps no others from their listeners."""
    explained, trained, x = layer(0), layer(1), torch.randn(2, 8, 6, 6)
    steps, heard = Steps(), Heard()

    class Between(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            steps.done(0)
            steps.wait(1)
            return x

    observe.listeners.add(heard)
    with ThreadPoolExecutor(1) as pool:
        model = torch.nn.Sequential(explained, Between())
        found = pool.submit(skd.explain, model, (2, 8, 6, 6))
        steps.wait(0)
        trained(x).sum().backward()  # the model of another thread, in the middle of it
        calls = heard.calls
        steps.done(1)
        assert len(found.result(60).layers) == 1
    observe.listeners.discard(heard)
    assert calls == heard.calls == 2  # forward, and the weight gradient


# -- structures, plans and growth -----------------------------------------------------------------


def test_threads_train_on_one_structure() -> None:
    """New sizes on every thread at once: plans are made, found and given up among them."""
    conv = layer()
    weight = conv.dense_weight().detach()
    sizes = [(5 + i % 40, 5 + i // 2 % 17) for i in range(120)]

    def run(number: int) -> None:
        x = torch.randn(2, 8, 50, 50, generator=torch.Generator().manual_seed(number))
        for high, wide in sizes[number * 7 :] + sizes[: number * 7]:
            part = x[..., :high, :wide].clone().requires_grad_()
            with skd.backend("cpp"):
                y = conv(part)
                (dx,) = torch.autograd.grad(y.sum(), part)
            expected = F.conv2d(part, weight, conv.bias, padding=1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            (expected_dx,) = torch.autograd.grad(expected.sum(), part)
            torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)

    together(run)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_threads_offer_to_one_search(name: str) -> None:
    topology = Topology.from_mask(torch.rand(64, 96) < 0.3)
    indices = topology.crow_indices, topology.col_indices
    for seed in range(5):
        score = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
        with skd.backend("reference"):
            expected = ops.grow_topk(score, *indices, 200)
        best = backends.module(name).LargestK(*indices, 64, 96, 200, score.dtype)

        def offer(number: int, best: Any = best, score: Tensor = score) -> None:
            for row in range(number, 64, THREADS):
                best.offer(score[row : row + 1], row, 0, False)

        together(offer)
        assert torch.equal(best.positions(), expected)


def test_what_calls_have_in_common_is_forgotten_while_others_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsekd.ops.kernel.MOST_KNOWN", 4)
    product = Product("linear")
    topology = Topology.from_mask(torch.ones(3, 5, dtype=torch.bool))
    indices = topology.crow_indices, topology.col_indices, None, [3, 5]

    def run(number: int) -> None:
        for i in range(200):
            x = torch.ones(1 + (i * (number + 1)) % 11, 5)
            assert product(x, torch.ones(15), *indices).sum() == 15 * len(x)

    together(run)


def test_a_single_thing_is_made_once() -> None:
    made: list[int] = []

    def make() -> object:
        made.append(1)
        threading.Event().wait(0.05)
        return object()

    single = Single(make)
    first, *others = together(lambda _: single())
    assert all(other is first for other in others)
    assert len(made) == 1
    single.cache_clear()
    assert single() is not first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_computes() -> None:
    """A child of a process whose threads have run, as a worker of a DataLoader is."""
    conv, x = layer(), torch.randn(64, 8, 24, 24)
    torch.set_num_threads(2)
    with skd.backend("cpp"), torch.no_grad():
        expected = conv(x)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def child() -> None:
            y = conv(x)
            sender.send(bool((y.numpy() == expected.numpy()).all()))

        process = context.Process(target=child)
        process.start()
        try:
            assert receiver.poll(60), "the child hangs"
            assert receiver.recv()
        finally:
            process.kill()
            process.join()
