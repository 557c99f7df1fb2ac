"""Datasets of torch: loaded beside the step, the same for any number of workers and ranks."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from sparsekd.data import Samples, as_source
from sparsekd.data.samples import default_workers
from sparsekd.errors import DataError


class Noisy(Dataset):
    """Image i is i plus noise from each of the global generators."""

    def __init__(self, count: int, damaged: int = -1) -> None:
        self.count, self.damaged = count, damaged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.damaged:
            raise DataError(f"{index}.jpg: expected an image; found it damaged")
        noise = torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())  # noqa: NPY002
        return (index + torch.hstack(noise).float()).view(5, 1, 1), index


class Plain(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((5, 1, 1), float(index)), index


def epoch(source, seed=0, batch_size=4, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"shuffle": True, "augment": True, "generator": generator, **options}
    return list(source.batches(batch_size, **options))


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def test_an_epoch_does_not_depend_on_workers():
    plain = epoch(Samples(Noisy(22), workers=0))
    for workers in (1, 2):
        assert equal(epoch(Samples(Noisy(22), workers=workers)), plain)
    assert sorted(torch.cat([y for _, y in plain]).tolist()) == list(range(22))
    assert not equal(epoch(Samples(Noisy(22), workers=0), seed=1), plain)


def test_every_sample_draws_its_own_noise_in_every_epoch():
    noise = [(x - y.view(-1, 1, 1, 1)).flatten(1) for x, y in epoch(Samples(Noisy(40), workers=0))]
    first = torch.cat(noise)
    for column in first.T:  # torch's three, Python's and NumPy's
        assert len(column.unique()) == 40
        assert 0.3 < column.mean() < 0.7
    second = torch.cat([x.flatten(1) for x, _ in epoch(Samples(Noisy(40), workers=0), seed=1)])
    assert not torch.equal(first.sort(0).values, (second % 1).sort(0).values)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_an_interrupted_epoch_resumes_exactly(workers, done):
    source = Samples(Noisy(22), workers=workers)
    assert equal(epoch(source)[done:], epoch(source, start=done))


def test_what_was_done_before_a_resume_is_not_loaded_again():
    class Counting(Plain):
        loaded = 0

        def __getitem__(self, index):
            self.loaded += 1
            return super().__getitem__(index)

    counting = Counting(22)
    epoch(Samples(counting, workers=0), start=4)
    assert counting.loaded == 22 - 4 * 4


def test_ranks_divide_each_batch_and_augment_as_one_would():
    source = Samples(Noisy(24), workers=0)
    whole = epoch(source)
    shares = [epoch(source, rank=rank, ranks=2) for rank in range(2)]
    for number, (x, y) in enumerate(whole):
        assert equal([(x[rank::2], y[rank::2]) for rank in range(2)], [s[number] for s in shares])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_untouched(workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    epoch(Samples(Noisy(8), workers=workers))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_evaluation_reads_the_plain_view():
    source = Samples(Noisy(6), Plain(6), workers=0)
    ((x, y),) = source.batches(6)
    assert torch.equal(x[:, 0, 0, 0], y.float())
    ((x, y),) = source.subset(torch.tensor([4, 1])).batches(6)
    assert x[:, 0, 0, 0].tolist() == y.tolist() == [4, 1]


def test_without_a_plain_view_evaluation_repeats():
    source = Samples(Noisy(6), workers=0)
    assert equal(list(source.batches(3)), list(source.batches(3)))


def test_images_are_normalised_in_the_memory_format_asked_for():
    pairs = [(torch.full((3, 2, 2), 9, dtype=torch.uint8), 0)] * 2
    source = Samples(
        pairs, mean=torch.tensor([1.0, 3, 5]), std=torch.tensor([4.0, 2, 1]), workers=0
    )
    ((x, _),) = source.batches(2, channels_last=True)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[1, :, 1, 1].tolist() == [2.0, 3.0, 4.0]
    raw = Samples([(torch.ones(3, 2, 2), 0)], workers=0)
    ((x, _),) = raw.batches(1, channels_last=True)
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_told_in_one_line(workers):
    with pytest.raises(DataError) as caught:
        epoch(Samples(Noisy(20, damaged=13), workers=workers))
    assert str(caught.value) == "13.jpg: expected an image; found it damaged"


@pytest.mark.parametrize("workers", [0, 1])
def test_another_error_names_the_index(workers):
    class Broken(Plain):
        def __getitem__(self, index):
            if index == 5:
                raise KeyError("no such thing")
            return super().__getitem__(index)

    with pytest.raises(KeyError) as caught:
        epoch(Samples(Broken(8), workers=workers))
    told = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("at index 5 of the data set" in line for line in told)


def test_dictionaries_of_two_are_pairs():
    items = [{"image": torch.zeros(1, 2, 2), "label": n} for n in range(3)]
    ((x, y),) = as_source(items).batches(3)
    assert x.shape == (3, 1, 2, 2)
    assert y.tolist() == [0, 1, 2]


@pytest.mark.parametrize("item", [torch.zeros(2), 7, (torch.zeros(1), 0, 0), {"image": 1}])
def test_what_is_no_pair_is_refused(item):
    with pytest.raises(DataError, match="sample 0: expected an image and a label; found a"):
        list(Samples([item], workers=0).batches(1))


def test_bad_arguments():
    with pytest.raises(DataError, match="workers"):
        Samples([], workers=-1)
    with pytest.raises(DataError, match="mean, std"):
        Samples([], mean=torch.zeros(3))
    with pytest.raises(DataError, match="batch_size"):
        Samples(Plain(3)).batches(0)
    assert list(Samples(Plain(0)).batches(4)) == []


def test_ranks_of_a_machine_share_its_processors(monkeypatch):
    processors = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_workers() == min(4, processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * processors))
    assert default_workers() == 1
