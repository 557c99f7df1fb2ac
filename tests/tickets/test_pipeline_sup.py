"""Sup-tickets in the pipeline: cycles at the end of a host, their rates, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsekd.dst import METHODS, Dynamics
from sparsekd.tickets import Distillation, Superposition
from sparsekd.train import Training, state_hash

BUSY = {
    "dynamics": Dynamics(drop_fraction=0.5, every=2, until=1.0),
    "superposition": Superposition(cycle_fraction=0.7, cycle_epochs=1, lr=(0.01, 0.05)),
}


@pytest.mark.parametrize("method", ["sup-rigl", "kd-sup-rigl"])
def test_sup_tickets_superpose_at_the_end_and_squeeze_the_schedule(pipeline, method):
    pipeline = replace(pipeline, **BUSY)
    masks = pipeline.masks(METHODS[method], 0.8)
    trainer = pipeline.ticket_trainer(METHODS[method], masks, method)
    assert isinstance(trainer.objective, Distillation) == (method == "kd-sup-rigl")
    rows = trainer.fit()
    assert (trainer.dst.cycles.first_phase, trainer.dst.cycles.count) == (5, 2)
    assert trainer.config.milestones == ()  # 2 of 3 epochs, of which only the first is left
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.026, 0.026])
    merged = pipeline.outcome(trainer)
    assert merged is not trainer.model
    assert state_hash(merged.state_dict()) == state_hash(pipeline.outcome(trainer).state_dict())


def test_cycles_begin_at_the_last_rate_of_their_host(pipeline):
    training = Training(epochs=4, batch_size=32, lr=0.4, milestones=(2, 3))
    sup = Superposition(cycle_fraction=0.25, cycle_epochs=1)
    pipeline = replace(pipeline, training=training, superposition=sup)
    method = METHODS["sup-set"]
    trainer = pipeline.ticket_trainer(method, pipeline.masks(method, 0.5), "a")
    assert trainer.config.milestones == (2,)  # 3 would be the first epoch of the cycle
    assert trainer.dst.cycles.lr == pytest.approx((0.04, 0.2))


@pytest.mark.parametrize(
    "lr, effect", [(None, "hardly train the weights"), ((0.01, 0.05), "leave the minimum")]
)
def test_a_host_annealed_to_nothing_is_a_warning_before_it_trains(pipeline, lr, effect):
    cosine = replace(pipeline.training, schedule="cosine", epochs=300, milestones=())
    pipeline = replace(pipeline, training=cosine, superposition=Superposition(lr=lr))
    method = METHODS["sup-set"]
    with pytest.warns(RuntimeWarning, match=effect):
        pipeline.ticket_trainer(method, pipeline.masks(method, 0.5), "a")


def test_a_sup_run_resumes_after_its_last_step(pipeline):
    pipeline = replace(pipeline, **BUSY)
    method = METHODS["sup-set"]
    masks = pipeline.masks(method, 0.8)
    trainer = pipeline.ticket_trainer(method, masks, "a")
    trainer.fit()
    again = pipeline.ticket_trainer(method, masks, "a")
    assert again.epoch == 3
    first, second = (state_hash(pipeline.outcome(t).state_dict()) for t in (trainer, again))
    assert first == second
