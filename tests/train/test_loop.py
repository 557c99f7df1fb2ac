"""The loop trains as written by hand, and resumes to the very same numbers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsekd.dst import RigL
from sparsekd.errors import CheckpointError
from sparsekd.nn import optimize
from sparsekd.train import (
    CrossEntropy,
    Interrupted,
    Reporter,
    Trainer,
    Training,
    derive_seed,
    evaluate,
    make_optimizer,
    state_hash,
)

CONFIG = Training(epochs=3, batch_size=32, warmup=1, schedule="cosine", nesterov=True)


def comparable(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_the_loop_is_sgd_written_out(build, images):
    model, by_hand = build(), build()
    model.pop(6), by_hand.pop(6)  # no dropout, whose numbers would have to be drawn alike
    Trainer(model, images.train, CONFIG, seed=5).fit()

    optimizer = torch.optim.SGD(
        by_hand.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    by_hand = optimize(by_hand.train()).to(memory_format=torch.channels_last)
    for epoch in range(3):
        order = torch.Generator().manual_seed(derive_seed(5, "order", epoch))
        batches = images.train.batches(
            32, shuffle=True, augment=True, generator=order, channels_last=True
        )
        for step, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = CONFIG.learning_rate(epoch + step / len(batches))
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            optimizer.step()
    assert state_hash(model.state_dict()) == state_hash(by_hand.state_dict())


def test_training_learns_and_reports_it(build, images):
    rows = Trainer(build(), images.train, CONFIG, validation=images.val).fit()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_accuracy"] > 0.5  # a quarter by chance
    assert all(row["images_per_second"] > 0 for row in rows)


def test_labels_may_be_probabilities(build, images):
    """One-hot probabilities train and score like the classes they name."""

    def soft(split):
        return replace(split, labels=torch.eye(4)[split.labels])

    hard = Trainer(build(), images.train, CONFIG, validation=images.val, seed=1)
    mixed = Trainer(build(), soft(images.train), CONFIG, validation=soft(images.val), seed=1)
    for one, other in zip(hard.fit(), mixed.fit(), strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), key


@pytest.mark.parametrize("step", [1, 3, 5, 7, 12])  # five steps an epoch
def test_an_interrupted_run_resumes_bit_equal(build, images, tmp_path, stop_at, step):
    whole = Trainer(build(), images.train, CONFIG, validation=images.val)
    whole.fit()

    first = Trainer(
        build(), images.train, CONFIG, validation=images.val, folder=tmp_path, stop=stop_at(step)
    )
    with pytest.raises(Interrupted):
        first.fit()
    torch.manual_seed(99)
    resumed = Trainer(build(), images.train, CONFIG, validation=images.val, folder=tmp_path)
    assert resumed.epoch + resumed._step > 0
    resumed.fit()
    assert comparable(resumed.rows) == comparable(whole.rows)
    assert state_hash(resumed.model.state_dict()) == state_hash(whole.model.state_dict())


def test_a_killed_run_resumes_from_its_last_epoch(build, images, tmp_path):
    whole = Trainer(build(), images.train, CONFIG)
    whole.fit()
    epochs = Trainer(build(), images.train, CONFIG, folder=tmp_path).epochs()
    next(epochs)  # and then nothing more happens in this process
    resumed = Trainer(build(), images.train, CONFIG, folder=tmp_path)
    assert resumed.epoch == 1
    resumed.fit()
    assert state_hash(resumed.model.state_dict()) == state_hash(whole.model.state_dict())
    # A finished run is not repeated.
    again = Trainer(build(), images.train, CONFIG, folder=tmp_path)
    assert list(again.epochs()) == []
    assert comparable(again.rows) == comparable(whole.rows)


def test_dynamic_topology_resumes_bit_equal(build, images, tmp_path, stop_at):
    def trainer(folder=None, stop=None):
        model = build()
        optimizer = make_optimizer(model, CONFIG)
        dst = RigL(model, optimizer, every=3, until=12)
        options = {"optimizer": optimizer, "dst": dst, "folder": folder, "stop": stop}
        return Trainer(model, images.train, CONFIG, **options)

    whole = trainer()
    start = whole.model[3].topology.mask()
    whole.fit()
    assert not torch.equal(whole.model[3].topology.mask(), start)
    with pytest.raises(Interrupted):
        trainer(tmp_path, stop_at(7)).fit()
    resumed = trainer(tmp_path)
    resumed.fit()
    assert state_hash(resumed.model.state_dict()) == state_hash(whole.model.state_dict())


def test_runs_of_one_seed_see_the_same_batches_whatever_the_loss(build, images):
    def batches_seen(seed, scale):
        seen = []

        def objective(logits, x, y, epoch):
            seen.append((x.clone(), y))
            return scale * F.cross_entropy(logits, y)

        Trainer(build(), images.train, CONFIG, seed=seed, objective=objective).fit()
        return seen

    a, b, c = batches_seen(0, 1.0), batches_seen(0, 0.5), batches_seen(1, 1.0)
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(a, b, strict=True))
    assert not any(torch.equal(x, z) for (x, _), (z, _) in zip(a, c, strict=True))
    assert not torch.equal(a[0][0], a[5][0])  # the second epoch has its own order


def test_the_global_generator_is_left_alone(build, images):
    model = build()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    Trainer(model, images.train, CONFIG).fit()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"start_epoch": 1}, {"config": Training(epochs=4, batch_size=32)}]
)
def test_the_state_of_another_run_is_refused(build, images, tmp_path, changes):
    Trainer(build(), images.train, CONFIG, folder=tmp_path).save()
    options = {"config": CONFIG, "folder": tmp_path, **changes}
    with pytest.raises(CheckpointError, match="another run"):
        Trainer(build(), images.train, **options)


def test_the_state_of_another_model_is_refused(build, images, tmp_path):
    Trainer(build(), images.train, CONFIG, folder=tmp_path).save()
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(nn.Linear(2, 2), images.train, CONFIG, folder=tmp_path)


def test_weight_decay_spares_biases_and_norms_when_asked(build):
    model = build()
    config = Training(epochs=1, weight_decay=0.1, decay_norm_and_bias=False)
    decayed, plain = make_optimizer(model, config).param_groups
    weights = {model[0].values, model[3].values, model[8].weight}
    assert set(decayed["params"]) == weights
    assert set(plain["params"]) == set(model.parameters()) - weights
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_by_lists_are_updates_one_by_one_to_the_bit(build, nesterov):
    config = replace(CONFIG, lr=0.1, nesterov=nesterov, weight_decay=1e-2)
    model, twin = build(), build()

    def one_by_one() -> torch.optim.SGD:
        rule = {"momentum": config.momentum, "nesterov": nesterov, "weight_decay": 1e-2}
        return torch.optim.SGD(twin.parameters(), lr=config.lr, foreach=False, **rule)

    optimizer, other = make_optimizer(model, config), one_by_one()
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            p.grad = None if (i + step) % 5 == 0 else torch.randn(p.shape, generator=generator)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step(), other.step()
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        if step == 2:  # a run that was saved with the other kind goes on to the bit
            saved = deepcopy(other.state_dict())
            optimizer = make_optimizer(model, config)
            optimizer.load_state_dict(saved)


def test_label_smoothing_reaches_the_loss(build, images):
    trainer = Trainer(build(), images.train, Training(epochs=1, label_smoothing=0.1))
    assert trainer.objective == CrossEntropy(0.1)
    logits, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    expected = F.cross_entropy(logits, y, label_smoothing=0.1)
    assert torch.equal(trainer.objective(logits, logits, y, 0), expected)


def test_a_diverging_loss_stops_the_run(build, images):
    def objective(logits, x, y, epoch):
        return F.cross_entropy(logits, y) * (float("inf") if epoch == 1 else 1.0)

    with pytest.raises(FloatingPointError, match="epoch 2"):
        Trainer(build(), images.train, CONFIG, objective=objective).fit()


def test_start_epoch_outside_the_schedule_raises(build, images):
    with pytest.raises(ValueError, match="start_epoch"):
        Trainer(build(), images.train, CONFIG, start_epoch=4)


def test_evaluate_weighs_every_image_alike_and_keeps_the_mode(build, images):
    model = build().train()
    result = evaluate(model, images.test, batch_size=7)
    assert model.training
    model.eval()
    ((x, y),) = images.test.batches(len(images.test))
    logits = model(x)
    assert result.accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_evaluating_nothing_raises(build, images):
    with pytest.raises(ValueError, match="empty"):
        evaluate(build(), images.test.subset(torch.arange(0)))


def test_the_reporter_hears_every_step_and_epoch(build, images):
    class Recorder(Reporter):
        def __init__(self):
            self.steps, self.epochs = [], []

        def step(self, done, steps, loss, accuracy, images):
            self.steps.append((done, steps))

        def epoch(self, epoch, summary):
            self.epochs.append(epoch)

    recorder = Recorder()
    Trainer(build(), images.train, CONFIG, reporter=recorder).fit()
    assert recorder.steps == [(step, 5) for step in (1, 2, 3, 4, 5)] * 3
    assert recorder.epochs == [0, 1, 2]
