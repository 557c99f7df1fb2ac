"""Phases, cycles and tickets of Sup-tickets, on top of every host there is."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.dst import SET, RigL, Static
from sparsekd.errors import CheckpointError, UnsupportedError
from sparsekd.nn import SparseLinear, sparse_modules, sparsify
from sparsekd.tickets import Cycles, Superposition, SupTickets, kd_loss, superpose
from sparsekd.train import state_hash

TOTAL, FRACTION, LENGTH = 22, 0.6, 4  # 10 + 3 cycles of 4
HOSTS = [SET, RigL, Static]


class Run:
    """Train a small network with Sup-tickets and remember every ticket independently."""

    def __init__(self, host=RigL, seed=0, total=TOTAL, fraction=FRACTION, **options) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
        ).double()
        sparsify(self.model, 0.7, seed=seed)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.dst = host(self.model, self.opt, drop_fraction=0.3, every=3, until=100, seed=seed)
        self.sup = SupTickets(
            self.model, self.opt, self.dst, total_steps=total, cycle_fraction=fraction,
            cycle_steps=LENGTH, **{"lr": (0.01, 0.05), **options},
        )  # fmt: skip
        self.tickets: list[nn.Module] = []
        self.rewired: list[int] = []
        self.rates: list[float] = []

    def train(self, first=0, last=TOTAL, teacher=None):
        for t in range(first, last):
            if t in (10, 14, 18, 22):
                self.tickets.append(copy.deepcopy(self.model))
            x, y = batch(t)
            self.opt.zero_grad()
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
            if teacher is not None:
                loss = kd_loss(logits, teacher(x), y)
            loss.backward()
            if self.sup.step():
                self.rewired.append(t)
            else:
                self.opt.step()
            self.rates.append(self.opt.param_groups[0]["lr"])
        if last == TOTAL:
            self.tickets.append(copy.deepcopy(self.model))
        return self

    def finish(self):
        return self.sup.finish([batch(t) for t in range(5)])

    def save(self):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.opt, self.sup)], file)
        return file

    def load(self, file):
        file.seek(0)
        parts = (self.model, self.opt, self.sup)
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


def batch(t):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (6,), generator=generator)


def nnz(model):
    return [module.topology.nnz for _, module in sparse_modules(model)]


def learned(model):
    """Hash everything but BatchNorm's statistics."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return state_hash({k: v for k, v in model.state_dict().items() if not k.endswith(statistics)})


@pytest.mark.parametrize(
    "total, fraction, length, first_phase, count",
    [
        (250, 0.1, 8, 226, 3),  # the published CIFAR setting, in epochs
        (100, 0.1, 2, 90, 5),
        (100, 0.08, 2, 92, 4),  # the published ImageNet setting
        (9000, 0.1, 300, 8100, 3),
        (100, 0.29, 29, 71, 1),  # 0.29 * 100 is below 29 in floating point
        (100, 0.05, 8, 100, 0),
        (10, 1.0, 5, 0, 2),
        (45, 12 / 45, 4, 33, 3),  # 12 / 45 * 45 is below 12 in floating point
    ],
)
def test_phases(total, fraction, length, first_phase, count):
    cycles = Cycles(total, fraction, length, (0.001, 0.005))
    assert (cycles.first_phase, cycles.count) == (first_phase, count)
    assert cycles.first_phase + cycles.count * length == total
    begins = [step for step in range(total + 5) if cycles.begins(step)]
    assert begins == [first_phase + length * k for k in range(count)]


def test_the_learning_rate_is_a_symmetric_triangle():
    cycles = Cycles(100, 0.5, 10, (0.001, 0.005))
    rates = [cycles.learning_rate(step) for step in range(50, 101)]
    assert rates[0] == rates[10] == rates[50] == 0.001
    assert rates[5] == rates[15] == 0.005
    assert rates[:10] == rates[40:50]
    torch.testing.assert_close(rates[1:10], rates[1:10][::-1])


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_updates_in_the_first_phase_and_then_once_a_cycle(host):
    run = Run(host).train()
    assert run.rewired == ([] if host is Static else [2, 5, 8, 10, 14, 18])
    assert run.rates[:10] == [0.1] * 10
    assert run.rates[10:] == [0.01, 0.03, 0.05, 0.03] * 3


@pytest.mark.parametrize("host", HOSTS)
def test_an_update_of_a_cycle_moves_the_drop_fraction_of_every_layer(host):
    run = Run(host, drop_fraction=0.5)
    before = nnz(run.model)
    run.train(0, 11)
    assert nnz(run.model) == before
    if host is not Static:
        assert [u.dropped for u in run.dst.last_update.values()] == [n // 2 for n in before]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("average", ["caa", "cima"])
def test_the_result_is_the_superposition_of_the_tickets(host, average):
    run = Run(host, average=average).train()
    assert len(run.tickets) == 4
    merged = run.finish()
    assert learned(merged) == learned(superpose(run.tickets, average=average, sparsity=0.7))
    assert sum(nnz(merged)) == sum(nnz(run.model))


def test_pruning_after_each_ticket():
    """The released order: each average is pruned before the next ticket joins it."""
    run = Run(prune_each=True, average="cima", beta=0.25).train()
    expected = run.tickets[0]
    for ticket in run.tickets[1:]:
        expected = superpose([expected, ticket], average="cima", beta=0.25, sparsity=0.7)
    assert learned(run.finish()) == learned(expected)
    assert learned(run.finish()) != learned(Run(average="cima", beta=0.25).train().finish())


def test_beta_1_is_the_last_ticket():
    run = Run(average="cima", beta=1.0).train()
    assert learned(run.finish()) == learned(run.model)


def test_statistics_are_those_of_one_pass_in_train_mode():
    run = Run().train()
    merged = run.finish()
    inputs = torch.stack([merged[0](batch(t)[0]) for t in range(5)])
    means = inputs.mean((1, 3, 4)).mean(0)
    variances = inputs.var((1, 3, 4)).mean(0)
    torch.testing.assert_close(merged[1].running_mean, means.detach())
    torch.testing.assert_close(merged[1].running_var, variances.detach())
    assert merged[1].momentum == run.model[1].momentum
    again = run.finish()
    assert state_hash(again.state_dict()) == state_hash(merged.state_dict())


def test_superposing_does_not_touch_the_run():
    """The same cycles without any averaging end in the same network, random state included."""
    run, plain = Run(), Run()
    plain.sup._collect = lambda: None
    run.train()
    before, random = state_hash(run.model.state_dict()), torch.get_rng_state()
    run.finish()
    assert state_hash(run.model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    plain.train()
    assert state_hash(run.model.state_dict()) == state_hash(plain.model.state_dict())


def test_without_room_for_a_cycle_the_run_is_the_host_s():
    run, host = Run(fraction=0.1), Run(fraction=0.0)
    for one in (run, host):
        one.train()
    assert run.rates == [0.1] * TOTAL
    assert state_hash(run.model.state_dict()) == state_hash(host.model.state_dict())
    assert learned(run.finish()) == learned(run.model)


@pytest.mark.parametrize("host", [SET, RigL])
@pytest.mark.parametrize("prune_each", [False, True])
def test_resuming_at_any_step_is_bit_equal(host, prune_each):
    straight, files = Run(host, prune_each=prune_each), []
    for t in range(TOTAL):
        files.append(straight.save())
        straight.train(t, t + 1)
    files.append(straight.save())
    expected = state_hash(straight.finish().state_dict())
    for t, file in enumerate(files):
        resumed = Run(host, seed=9, prune_each=prune_each).train(0, t % 3)
        resumed.load(file)
        resumed.train(t)
        assert state_hash(resumed.finish().state_dict()) == expected
        assert state_hash(resumed.model.state_dict()) == state_hash(straight.model.state_dict())


def test_with_a_teacher():
    teacher = Run(seed=5).model.eval()
    before = state_hash(teacher.state_dict())
    run, plain = Run().train(teacher=teacher), Run().train()
    assert learned(run.finish()) == learned(superpose(run.tickets, sparsity=0.7))
    assert learned(run.finish()) != learned(plain.finish())
    assert state_hash(teacher.state_dict()) == before


def test_refusals():
    run = Run()
    for name, value in {
        "total_steps": 0, "cycle_steps": 0, "cycle_fraction": 1.5, "lr": (-1.0, 1.0),
        "drop_fraction": 2.0, "average": "mean", "beta": -0.1,
    }.items():  # fmt: skip
        arguments = {"total_steps": 10, "cycle_steps": 2} | {name: value}
        with pytest.raises(ValueError, match=f"{name}: expected"):
            SupTickets(run.model, run.opt, run.dst, **arguments)
    with pytest.raises(ValueError, match="dst: expected a method of this model"):
        SupTickets(Run().model, run.opt, run.dst, total_steps=10, cycle_steps=2)
    with pytest.raises(RuntimeError, match=r"expected after 22 iterations .* got 5"):
        run.train(0, 5).finish()
    with pytest.raises(CheckpointError, match="folded"):
        run.sup.load_state_dict({"dst": run.dst.state_dict(), "merged": None})


@pytest.mark.parametrize("prune_each", [False, True])
def test_tickets_of_blocks_superpose_to_blocks(prune_each):
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear(32, 24, layout="bcsr:4"), SparseLinear(24, 8, layout="bcsr:4")
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    host = RigL(model, opt, drop_fraction=0.5, every=2, until=5)
    sup = SupTickets(
        model, opt, host, total_steps=10, cycle_fraction=0.6, cycle_steps=2, prune_each=prune_each
    )
    batches = [(torch.randn(4, 32), None) for _ in range(10)]
    for x, _ in batches:
        opt.zero_grad()
        model(x).square().sum().backward()
        if not sup.step():
            opt.step()
    merged = sup.finish(batches)
    stored = [sum(m.topology.nnz for m in net) for net in (merged, model)]
    assert stored[0] == stored[1]  # every block has 16 weights
    for module in merged:
        module.layout.check(module.topology.mask())
    fixed = nn.Sequential(SparseLinear(8, 8, sparsity=0.5, layout="nm"))
    opt = torch.optim.SGD(fixed.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="superposition, which takes unions of masks, does"):
        SupTickets(fixed, opt, RigL(fixed, opt, until=5), total_steps=10, cycle_steps=2)


def test_the_union_of_tickets_is_told_before_it_is_pruned():
    run = Run()
    assert run.sup.union_density is None
    run.train()
    masks = [dict(sparse_modules(ticket)) for ticket in run.tickets]
    union, numel = 0, 0
    for name, module in sparse_modules(run.model):
        union += int(sum(m[name].topology.mask() for m in masks).bool().sum())
        numel += module.topology.numel
    assert run.sup.union_density == union / numel > sum(nnz(run.finish())) / numel


def test_cycles_by_count():
    cycles = Cycles(45, 0.0, 4, cycle_count=3)
    assert (cycles.first_phase, cycles.count) == (33, 3)
    with pytest.raises(ValueError, match="cycle_count: 12 cycles of 4 do not fit into 45"):
        Cycles(45, 0.1, 4, cycle_count=12)
    with pytest.raises(ValueError, match="cycle_count: expected at least 0"):
        Superposition(cycle_count=-1)
    assert Superposition(cycle_count=3, cycle_epochs=4).tail(45) == 12


def test_rates_of_cycles_follow_the_hosts_last_in_every_group():
    run = Run(lr=None)
    run.opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    rates = []
    for t in range(TOTAL):
        for group, base in zip(run.opt.param_groups, (0.1, 0.3), strict=True):
            group["lr"] = base * (0.1 if t >= 5 else 1)  # a step schedule sets them every iteration
        run.train(t, t + 1)
        rates.append([group["lr"] for group in run.opt.param_groups])
    assert rates[9] == pytest.approx([0.01, 0.03])
    triangle = torch.tensor([1.0, 3, 5, 3])
    for number, last in enumerate((0.01, 0.03)):
        cycles = torch.tensor(rates)[10:, number].view(3, LENGTH)
        torch.testing.assert_close(cycles, (last * triangle).expand(3, LENGTH))


def test_rates_of_cycles_survive_a_resume():
    whole = Run(lr=None).train()
    first = Run(lr=None).train(last=13)
    second = Run(lr=None, seed=3)
    second.load(first.save())
    second.train(13)
    assert second.rates == whole.rates[13:]
    assert state_hash(second.finish().state_dict()) == state_hash(whole.finish().state_dict())


def test_a_host_annealed_to_nothing_is_a_warning():
    run = Run(lr=None).train(last=9)
    run.opt.param_groups[0]["lr"] = 1e-7
    run.train(9, 10)
    with pytest.warns(RuntimeWarning, match="ends at 1e-07, from 0.1; cycles that rise to 5e-07"):
        run.train(10, 11)


def test_cycles_without_a_host_need_rates():
    with pytest.raises(ValueError, match="lr: expected two numbers"):
        Run(lr=None, total=12, fraction=1.0)
