"""Datasets and DataLoaders of the user's own in the trainer and in the pipeline of tickets."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sparsekd import data
from sparsekd.data import Samples
from sparsekd.dst import METHODS, RigL
from sparsekd.errors import CheckpointError, DataError
from sparsekd.nn import optimize
from sparsekd.tickets import Pipeline
from sparsekd.train import (
    Interrupted,
    Trainer,
    Training,
    evaluate,
    make_optimizer,
    state_hash,
)
from sparsekd.train.working_folder import lock_folder

CONFIG = Training(epochs=2, batch_size=32, lr=0.05)


class Shifted(Dataset):
    """The images of a split, each moved sideways by a step that torch's global generator gives."""

    def __init__(self, split: data.Split) -> None:
        images = split.images[torch.arange(len(split))].float()
        self.images = (images - split.mean.view(-1, 1, 1)) / split.std.view(-1, 1, 1)
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        step = int(torch.randint(-1, 2, ()))
        return self.images[index].roll(step, -1), int(self.labels[index])


def sources(images):
    shifted = Shifted(images.train)
    yield lambda: Samples(shifted, workers=0)
    yield lambda: Samples(shifted, workers=2)
    yield lambda: DataLoader(shifted, 32, shuffle=True)
    yield lambda: DataLoader(shifted, 32, shuffle=True, num_workers=2)


def comparable(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def trained(build, source, **options):
    model = build()
    optimizer = make_optimizer(model, CONFIG)
    dst = RigL(model, optimizer, every=3, until=8)
    trainer = Trainer(model, source, CONFIG, optimizer=optimizer, dst=dst, **options)
    trainer.fit()
    return comparable(trainer.rows), state_hash(model.state_dict())


def test_a_run_resumes_bit_equal_in_mid_epoch(build, images, tmp_path, stop_at):
    results = []
    for number, source in enumerate(sources(images)):
        whole = trained(build, source())
        assert whole[0][-1]["updates"] > 0
        for step in (2, 7):
            folder = tmp_path / f"{number} {step}"
            with pytest.raises(Interrupted):
                trained(build, source(), folder=folder, stop=stop_at(step))
            torch.manual_seed(99)
            assert trained(build, source(), folder=folder) == whole
        results.append(whole)
    assert results[0] == results[1]  # the number of workers changes nothing


def test_a_loader_trains_as_in_a_loop_written_out(build, images):
    shifted = Shifted(images.train)
    batches = [(x.clone(), y) for x, y in DataLoader(shifted, 32)]
    model, by_hand = build(), build()
    model.pop(6), by_hand.pop(6)  # no dropout, whose numbers would have to be drawn alike
    Trainer(model, DataLoader(batches, batch_size=None), CONFIG).fit()

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    by_hand = optimize(by_hand.train(), channels_last=False)
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x.contiguous(memory_format=torch.channels_last)), y).backward()
            optimizer.step()
    assert state_hash(model.state_dict()) == state_hash(by_hand.state_dict())


def test_loaders_evaluate_and_validate(build, images):
    pairs = DataLoader(Shifted(images.val), 7)
    rows = Trainer(build(), images.train, CONFIG, validation=pairs).fit()
    assert 0 <= rows[-1]["val_accuracy"] <= 1
    split, model = images.test, build()
    loader = DataLoader([(x, y) for x, y in split.batches(16)], batch_size=None)
    assert evaluate(model, loader).accuracy == evaluate(model, split).accuracy
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model, DataLoader([]))


def test_a_failure_between_epochs_names_the_file(build):
    class Damaged(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            if index == 40:
                raise DataError("40.jpg: expected an image; found it damaged")
            return torch.zeros(1, 8, 8), 0

    with pytest.raises(DataError, match=r"^40\.jpg: expected an image; found it damaged$"):
        Trainer(build(), Damaged(), CONFIG).fit()


@pytest.mark.parametrize("own", [lambda d: d, lambda d: DataLoader(d, 32, shuffle=True)])
def test_tickets_take_them(build, images, tmp_path, own):
    mine = data.Dataset(
        *("mine", images.num_classes, images.input_shape),
        train=own(Shifted(images.train)),
        val=own(Shifted(images.val)),
        test=images.test,
    )

    def dense(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 6, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten()),
            torch.nn.Linear(54, 4),
        )

    pipeline = Pipeline(dense, mine, CONFIG, 0, tmp_path)
    pipeline.dense_trainer().fit()
    for name in ("kd", "rigl", "snip"):
        method = METHODS[name]
        trainer = pipeline.ticket_trainer(method, pipeline.masks(method, 0.5), name, 0.5)
        rows = trainer.fit()
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
        assert 0 <= rows[-1]["val_accuracy"] <= 1


def test_workers_do_not_hold_the_lock_of_a_folder(tmp_path):
    lock = lock_folder(tmp_path)
    fork = multiprocessing.get_context("fork")
    runs = fork.Event()
    worker = fork.Process(target=lambda: (runs.set(), time.sleep(60)))
    worker.start()
    assert runs.wait(30)
    with pytest.raises(CheckpointError, match="another process"):
        lock_folder(tmp_path)
    lock.close()  # as when the process is killed
    lock_folder(tmp_path).close()
    worker.kill()
    worker.join()
