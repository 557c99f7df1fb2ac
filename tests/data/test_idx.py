"""Fashion-MNIST's IDX files: read exactly, and refused whole when anything is wrong."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekd import data
from sparsekd.data.idx import read_idx
from sparsekd.errors import DataError

SYSTEM_ROOT = Path("/usr/share/datasets/fashion-mnist")
TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder: Path, *, zipped: bool = True, **parts: np.ndarray) -> None:
    random = np.random.default_rng(0)
    contents = {
        TRAIN_IMAGES: parts.get("train_images", random.integers(0, 256, (20, 28, 28))),
        TRAIN_LABELS: parts.get("train_labels", np.arange(20) % 10),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (6, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(6),
    }
    for name, array in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_every_pixel_and_label_arrives(tmp_path, zipped):
    random = np.random.default_rng(3)
    images, labels = random.integers(0, 256, (20, 28, 28)), random.integers(0, 10, 20)
    write(tmp_path, zipped=zipped, train_images=images, train_labels=labels)
    dataset = data.load("fashion-mnist", root=tmp_path, val_fraction=0.25)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (15, 5, 6)
    assert dataset.input_shape == (1, 28, 28)
    pairs = zip(images.astype(np.uint8), labels, strict=True)
    expected = {image.tobytes(): label for image, label in pairs}
    for split in (dataset.train, dataset.val):
        for image, label in zip(split.images, split.labels, strict=True):
            assert expected.pop(image.numpy().tobytes()) == label
    assert not expected


@pytest.mark.skipif(not SYSTEM_ROOT.is_dir(), reason=f"no {SYSTEM_ROOT} on this machine")
def test_the_real_files():
    dataset = data.load("fashion-mnist")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (54_000, 6_000, 10_000)
    counts = torch.bincount(dataset.train.labels) + torch.bincount(dataset.val.labels)
    assert counts.tolist() == [6000] * 10
    images = torch.cat([dataset.train.images, dataset.val.images]).float()
    std, mean = torch.std_mean(images)
    assert dataset.train.mean.item() == pytest.approx(mean.item(), rel=1e-3)
    assert dataset.train.std.item() == pytest.approx(std.item(), rel=1e-3)


@pytest.mark.parametrize("missing", [TRAIN_IMAGES, TRAIN_LABELS, "t10k-labels-idx1-ubyte"])
def test_missing_file_is_named(tmp_path, missing):
    write(tmp_path)
    (tmp_path / f"{missing}.gz").unlink()
    with pytest.raises(DataError, match=rf"{missing}.*found neither"):
        data.load("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 15, 16, 1000, -1])
def test_truncated_file(tmp_path, zipped, keep):
    write(tmp_path, zipped=zipped)
    path = tmp_path / (f"{TRAIN_IMAGES}.gz" if zipped else TRAIN_IMAGES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path.name}: expected .*found"):
        data.load("fashion-mnist", root=tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_gzip_notices_each_flipped_bit_or_reads_the_truth(tmp_path, position, bit):
    path = tmp_path / "array.gz"
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7))
    content = bytearray(gzip.compress(idx(array), mtime=0))
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = read_idx(path, ndim=3)
    except DataError:
        pass
    else:  # a bit of the gzip header that carries no data, such as its time stamp
        assert np.array_equal(found.numpy(), array)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 15), bit=st.integers(0, 7))
def test_each_flipped_bit_of_a_raw_header_is_noticed(tmp_path, at, bit):
    path = tmp_path / "array"
    content = bytearray(idx(np.ones((3, 5, 7))))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"array: expected .*found"):
        read_idx(path, ndim=3)


def test_a_header_may_not_exhaust_memory(tmp_path):
    path = tmp_path / "array"
    path.write_bytes(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"abc")
    with pytest.raises(DataError, match="found 3 bytes"):
        read_idx(path, ndim=3)


def test_too_long(tmp_path):
    write(tmp_path, zipped=False)
    with (tmp_path / TRAIN_LABELS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"{TRAIN_LABELS}: expected 20 bytes.*found more"):
        data.load("fashion-mnist", root=tmp_path)


def test_labels_where_images_belong(tmp_path):
    write(tmp_path)
    labels = (tmp_path / f"{TRAIN_LABELS}.gz").read_bytes()
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(labels)
    with pytest.raises(DataError, match="expected magic number 2051; found 2049"):
        data.load("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train_labels": np.arange(19) % 10}, "expected 20 labels.*found 19"),
        ({"train_labels": np.full(20, 10)}, "labels from 0 to 9; found 10 at position 0"),
        ({"train_images": np.zeros((20, 28, 27))}, "28 x 28; found 28 x 27"),
        ({"train_images": np.zeros((0, 28, 28)), "train_labels": np.zeros(0)}, "found 0"),
    ],
)
def test_mislabelled(tmp_path, parts, message):
    write(tmp_path, **parts)
    with pytest.raises(DataError, match=message):
        data.load("fashion-mnist", root=tmp_path)


def test_half_of_the_official_set_is_incomplete(tmp_path):
    write(
        tmp_path,
        train_images=np.zeros((60_000, 28, 28), np.uint8),
        train_labels=np.arange(60_000) % 10,
    )
    with pytest.raises(DataError, match=r"t10k.*expected 10000 images in all; found 6"):
        data.load("fashion-mnist", root=tmp_path)
