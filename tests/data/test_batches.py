"""Splits and batches: disjoint, complete, normalised, reproducible, resumable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekd import data
from sparsekd.data.augment import CropFlip
from sparsekd.data.dataset import Split, carve
from sparsekd.errors import DataError, UnsupportedError


def numbered(count: int, channels: int = 1, augmentation=None) -> Split:
    """Make a split whose image i is filled with the number i, unnormalised."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, channels, 4, 4)
    return Split(
        images.contiguous(),
        torch.arange(count),
        torch.zeros(channels),
        torch.ones(channels),
        augmentation or CropFlip(padding=1),
    )


@given(
    count=st.integers(0, 60),
    batch_size=st.integers(1, 70),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_an_epoch_has_each_image_once(count, batch_size, shuffle, drop_last):
    split = numbered(count)
    batches = split.batches(batch_size, shuffle=shuffle, drop_last=drop_last)
    seen = list(batches)
    assert len(seen) == len(batches)
    labels = torch.cat([y for _, y in seen]) if seen else torch.empty(0)
    whole = count // batch_size * batch_size if drop_last else count
    assert len(labels) == whole
    assert len(labels.unique()) == whole
    for x, y in seen:
        assert torch.equal(x[:, 0, 0, 0], y.float())
        assert len(y) == batch_size or not drop_last


@given(count=st.integers(0, 500), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_carve_divides_without_overlap(count, fraction, seed):
    kept, held_out = carve(count, fraction, seed)
    assert len(held_out) == round(fraction * count)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(count))


def test_order_and_augmentation_follow_the_generator():
    split = data.load("digits").train

    def epoch(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = split.batches(100, shuffle=True, augment=True, generator=generator)
        return torch.cat([x for x, _ in batches])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_the_global_generator_is_the_default_and_else_untouched():
    split = numbered(20)
    torch.manual_seed(5)
    first = [y.tolist() for _, y in split.batches(6, shuffle=True)]
    torch.manual_seed(5)
    assert [y.tolist() for _, y in split.batches(6, shuffle=True)] == first
    before = torch.get_rng_state()
    list(split.batches(6, shuffle=True, augment=True, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_epoch_has_its_own_order():
    batches = numbered(50).batches(50, shuffle=True, generator=torch.Generator().manual_seed(0))
    (_, first), (_, second) = next(iter(batches)), next(iter(batches))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("done", [0, 1, 4, 5])
def test_an_interrupted_epoch_resumes_exactly(done):
    split = data.load("synthetic", train_size=90, val_fraction=0, input_shape=(2, 6, 6)).train
    split = Split(split.images, split.labels, split.mean, split.std, CropFlip(padding=2))
    options = {"shuffle": True, "augment": True}
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    whole = list(split.batches(20, generator=generator, **options))
    resumed = torch.Generator()
    resumed.set_state(state)
    batches = split.batches(20, generator=resumed, start=done, **options)
    rest = list(batches)
    assert len(rest) == len(batches) == 5 - done
    for (x, y), (x_again, y_again) in zip(whole[done:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    if rest:
        assert torch.equal(generator.get_state(), resumed.get_state())


@pytest.mark.parametrize("augment", [False, True])
def test_channels_last(augment):
    split = data.load("synthetic", train_size=64, input_shape=(3, 8, 8)).train
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain, last = (
        next(iter(split.batches(16, augment=augment, generator=g, channels_last=layout)))[0]
        for g, layout in zip(generators, (False, True), strict=True)
    )
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_batches_do_not_alias_the_split():
    split = numbered(8)
    for x, y in split.batches(8):
        x.fill_(-1)
        y.fill_(-1)
    assert split.images.min() == 0
    assert split.labels.min() == 0


def test_normalisation_uses_the_mean_and_deviation_of_each_channel():
    images = torch.tensor([10, 30], dtype=torch.uint8).view(1, 2, 1, 1)
    split = Split(
        images,
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([4.0, 10.0]),
        torch.tensor([2.0, 5.0]),
        CropFlip(0),
    )
    ((x, _),) = split.batches(1)
    assert x.flatten().tolist() == [3.0, 4.0]
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_training_images_are_standardised(name):
    dataset = data.load(name)
    x = torch.cat([x for x, _ in dataset.train.batches(256)]).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_splits_are_disjoint_and_typed(name):
    dataset = data.load(name, val_fraction=0.2)
    assert dataset.name == name
    parts = [dataset.train, dataset.val, dataset.test]
    images = torch.cat([part.images for part in parts])
    if name == "synthetic":
        assert len(torch.unique(images.flatten(1), dim=0)) == len(images)
    for part in parts:
        assert len(part) == len(part.images) == len(part.labels) > 0
        assert part.images.shape[1:] == dataset.input_shape
        assert part.labels.dtype == torch.int64
        assert set(part.labels.tolist()) == set(range(dataset.num_classes))
    assert len(dataset.val) == round(0.2 * (len(dataset.train) + len(dataset.val)))


def test_digits_are_all_there():
    dataset = data.load("digits")
    parts = [dataset.train, dataset.val, dataset.test]
    assert sum(len(part) for part in parts) == 1797
    assert torch.bincount(torch.cat([part.labels for part in parts])).tolist() == [
        *(178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
    ]
    assert dataset.input_shape == (1, 8, 8)


def test_the_seed_moves_validation_but_not_test():
    first, again, other = (data.load("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.val.images, again.val.images)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert torch.equal(first.test.images, other.test.images)


def test_no_validation_images_on_request():
    dataset = data.load("digits", val_fraction=0)
    assert len(dataset.val) == 0
    assert list(dataset.val.batches(10)) == []


def test_subset_keeps_what_it_is_told():
    subset = numbered(10).subset(torch.tensor([7, 2]))
    assert len(subset) == 2
    ((x, y),) = subset.batches(5)
    assert y.tolist() == x[:, 0, 0, 0].tolist() == [7, 2]


def test_synthetic_follows_its_options_and_seed():
    options = {"num_classes": 3, "input_shape": (2, 5, 7), "train_size": 30, "test_size": 6}
    dataset = data.load("synthetic", seed=4, val_fraction=0.1, **options)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (27, 3, 6)
    assert dataset.input_shape == (2, 5, 7)
    assert dataset.num_classes == 3
    again = data.load("synthetic", seed=4, val_fraction=0.1, **options)
    assert torch.equal(dataset.train.images, again.train.images)
    other = data.load("synthetic", seed=5, val_fraction=0.1, **options)
    assert not torch.equal(dataset.train.images, other.train.images)


def test_synthetic_is_learnable_across_the_split():
    dataset = data.load("synthetic", num_classes=5, train_size=500, test_size=200)
    train, test = dataset.train, dataset.test
    means = torch.stack([train.images[train.labels == label].mean(0) for label in range(5)])
    distance = torch.cdist(test.images.flatten(1), means.flatten(1))
    assert (distance.argmin(1) == test.labels).float().mean() > 0.95


def test_unknown_name():
    with pytest.raises(UnsupportedError, match=r"name: .*digits.*'mnist'"):
        data.load("mnist")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_val_fraction(fraction):
    with pytest.raises(DataError, match="val_fraction"):
        data.load("digits", val_fraction=fraction)


@pytest.mark.parametrize(
    "name, argument",
    [
        ("batch_size", {"batch_size": 0}),
        ("start", {"batch_size": 4, "start": 9}),
        ("rank", {"batch_size": 4, "rank": 2, "ranks": 2}),
    ],
)
def test_bad_batches(name, argument):
    with pytest.raises(DataError, match=name):
        numbered(16).batches(**argument)


@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), ranks=st.integers(1, 5))
def test_ranks_read_equal_shares_that_make_up_the_batch(count, batch_size, ranks):
    split = numbered(count)

    def read(**share):
        order = torch.Generator().manual_seed(3)
        return [y for _, y in split.batches(batch_size, shuffle=True, generator=order, **share)]

    whole = read()
    shares = [read(rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part) for part in parts} == {-(-len(batch) // ranks)} or count < ranks
        together = torch.stack(parts, 1).flatten() if count >= ranks else torch.cat(parts)
        assert set(batch.tolist()) <= set(together.tolist())
        if count >= ranks:
            assert torch.equal(together[: len(batch)], batch)


def test_ranks_augment_independently():
    augmented = numbered(8, augmentation=lambda raw, draw: raw + torch.rand(1, generator=draw))
    first, second = (
        [x for x, _ in augmented.batches(4, augment=True, generator=torch.Generator(), **share)]
        for share in ({"rank": 0, "ranks": 2}, {"rank": 1, "ranks": 2})
    )
    offsets = {round(float(x.flatten()[0] % 1), 6) for x in [*first, *second]}
    assert len(offsets) == 4


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_wrong_path(name, tmp_path):
    with pytest.raises(DataError, match=r"root: .*nowhere"):
        data.load(name, root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected .*found n"):
        data.load(name, root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_needs_a_path(name):
    with pytest.raises(DataError, match=f"root: .*{name}.*None"):
        data.load(name)
