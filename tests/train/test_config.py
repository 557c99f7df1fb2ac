"""Learning-rate schedules and the checks of hyper-parameters."""

from __future__ import annotations

import pytest

from sparsekd.train import Training


def test_steps_decay_at_their_milestones():
    config = Training(epochs=182, lr=0.1, milestones=(90, 135))
    rates = [config.learning_rate(epoch) for epoch in (0, 89.99, 90, 134.99, 135, 181)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_warm_up_is_linear_and_meets_the_schedule():
    config = Training(epochs=90, lr=0.4, warmup=5, milestones=(30, 60, 80))
    assert [config.learning_rate(e) for e in (0, 1, 2.5, 5, 29.9)] == pytest.approx(
        [0, 0.08, 0.2, 0.4, 0.4]
    )


def test_cosine_goes_from_the_peak_to_zero():
    config = Training(epochs=10, lr=0.2, schedule="cosine", warmup=2)
    assert [config.learning_rate(e) for e in (2, 6, 10)] == pytest.approx([0.2, 0.1, 0])


def test_scaling_keeps_the_shape():
    config = Training(epochs=182, milestones=(90, 135), warmup=18).scaled(91)
    assert (config.epochs, config.milestones, config.warmup) == (91, (45, 68), 9)
    assert Training(epochs=182, milestones=(90, 135)).scaled(1).milestones == ()


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("schedule", "linear"),
        ("milestones", (3, 2)),
        ("gamma", 0.0),
        ("warmup", 11),
        ("label_smoothing", 1.0),
    ],
)
def test_values_out_of_range_raise(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Training(**{"epochs": 10, name: value})


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov"):
        Training(epochs=1, momentum=0.0, nesterov=True)
