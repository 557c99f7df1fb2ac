"""DataLoaders of the user's own: their batches as they come, seeded by the epoch, resumable."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from sparsekd.data import Loader, Samples, as_source, load
from sparsekd.errors import DataError, UnsupportedError


class Noisy(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        return index + torch.rand(3, 2, 2), index


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([(torch.rand(3, 2, 2), n) for n in range(self.count)])

    def __len__(self):
        return 6


def epoch(loader, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return list(as_source(loader).batches(99, generator=generator, **options))


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def loaders(**options):
    yield DataLoader(Noisy(), 4, shuffle=True, **options)
    yield DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator(), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_follows_its_seed_and_resumes_exactly(workers):
    for loader in loaders(num_workers=workers):
        torch.manual_seed(1)
        whole = epoch(loader)
        torch.manual_seed(2)
        assert equal(epoch(loader), whole)
        assert equal(epoch(loader, start=3), whole[3:])
        assert not equal(epoch(loader, seed=1), whole)
        assert sorted(torch.cat([y for _, y in whole]).tolist()) == list(range(22))


def test_the_batches_are_the_loaders_own():
    loader = DataLoader(Noisy(), batch_size=5, drop_last=True)
    source = Loader(loader)
    assert len(source.batches(64)) == len(loader) == 4
    assert len(source) == 22
    assert [y.tolist() for _, y in source.batches(64)] == [y.tolist() for _, y in loader]


def test_steps_between_batches_do_not_change_them():
    """Dropout draws from the generator from which an unseeded loader draws too."""
    (loader, _) = loaders()
    whole = epoch(loader)
    mixed = []
    for batch in as_source(loader).batches(99, generator=torch.Generator().manual_seed(0)):
        mixed.append(batch)
        torch.rand(17)
    assert equal(mixed, whole)


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    for loader in loaders():
        epoch(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_need_a_sampler_that_divides():
    with pytest.raises(DataError, match="DistributedSampler"):
        epoch(DataLoader(Noisy(), 4), rank=1, ranks=2)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(Noisy(), num_replicas=2, rank=rank, seed=5)
        source = as_source(DataLoader(Noisy(), 4, sampler=sampler))
        source.set_epoch(3)
        assert sampler.epoch == 3
        seen.append({int(n) for _, y in source.batches(1, rank=rank, ranks=2) for n in y})
    assert len(seen[0] & seen[1]) == 0
    assert seen[0] | seen[1] == set(range(22))


def test_streams():
    loader = DataLoader(Stream(6), batch_size=2)
    assert len(Loader(loader).batches(1)) == 3
    assert equal(epoch(loader), epoch(loader))
    with pytest.raises(DataError, match="expected 3 batches; it ended after 2"):
        epoch(DataLoader(Stream(4), batch_size=2))
    with pytest.raises(DataError, match=r"found a int for labels.*into a DataLoader"):
        epoch(Stream(6))
    with pytest.raises(DataError, match=r"a length.*with_length"):
        as_source(iter([]))


def test_what_is_no_batch_is_refused():
    with pytest.raises(DataError, match="batch: expected an image and a label; found a Tensor"):
        epoch(DataLoader([torch.zeros(1)] * 3))
    with pytest.raises(DataError, match="start"):
        epoch(DataLoader(Noisy(), 4), start=7)
    with pytest.raises(UnsupportedError, match="give the Dataset"):
        Loader(DataLoader(Noisy())).subset(torch.arange(2))


def test_anything_else_is_refused():
    with pytest.raises(DataError, match="a Dataset or a DataLoader; found a int"):
        as_source(3)
    digits = load("digits").train
    assert as_source(digits) is digits
    assert isinstance(as_source(Noisy()), Samples)
    assert isinstance(as_source(DataLoader(Noisy())), Loader)


def test_channels_last():
    ((x, _), *_) = epoch(DataLoader(Noisy(), 4), channels_last=True)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_shards_of_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"train-{shard}.tar")) as sink:
            for n in range(6):
                key = f"{shard}{n}"
                sink.write({"__key__": key, "image.pth": torch.full((3, 2, 2), float(n)), "cls": n})
    shards = [str(tmp_path / f"train-{shard}.tar") for shard in range(2)]
    stream = wds.WebDataset(shards, shardshuffle=2, detshuffle=True, seed=1).decode()
    stream = stream.to_tuple("image.pth", "cls").batched(4)
    loader = wds.WebLoader(stream, batch_size=None, num_workers=1).with_epoch(3).with_length(3)
    batches = epoch(loader)
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == sorted([*range(6)] * 2)
    assert all(torch.equal(x[:, 0, 0, 0], y.float()) for x, y in batches)
