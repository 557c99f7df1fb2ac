"""CIFAR from both distributions: read exactly, and refused whole when anything is wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsekd import data
from sparsekd.errors import DataError

COUNT = 8
FILES = {
    "cifar10": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
FOLDERS = {
    ("cifar10", "bin"): "cifar-10-batches-bin",
    ("cifar10", "py"): "cifar-10-batches-py",
    ("cifar100", "bin"): "cifar-100-binary",
    ("cifar100", "py"): "cifar-100-python",
}
LABEL_KEY = {"cifar10": b"labels", "cifar100": b"fine_labels"}
CLASSES = {"cifar10": 10, "cifar100": 100}
BOTH = pytest.mark.parametrize("name", ["cifar10", "cifar100"])
FORMATS = pytest.mark.parametrize("form", ["bin", "py"])


def content(name: str, file: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(file)
    images = random.integers(0, 256, (COUNT, 3072), dtype=np.uint8)
    return images, random.integers(0, CLASSES[name], COUNT).tolist()


def batch(name: str, images: np.ndarray, labels: list[int]) -> dict[bytes, object]:
    coarse = {b"coarse_labels": [0] * len(labels)} if name == "cifar100" else {}
    return {b"batch_label": b"one", LABEL_KEY[name]: labels, b"data": images, **coarse}


def write(root: Path, name: str, form: str, protocol: int = 2) -> dict[str, Path]:
    """Write a small copy of a distribution and return the path of each file."""
    paths = {}
    for number, file in enumerate(FILES[name]):
        images, labels = content(name, number)
        path = root / (f"{file}.bin" if form == "bin" else file)
        if form == "bin":
            columns = [np.array(labels, np.uint8)[:, None], images]
            if name == "cifar100":
                columns.insert(0, np.full((COUNT, 1), 19, np.uint8))
            path.write_bytes(np.concatenate(columns, axis=1).tobytes())
        else:
            path.write_bytes(pickle.dumps(batch(name, images, labels), protocol))
        paths[file] = path
    return paths


def check(name: str, root: Path) -> None:
    """Compare every image and label that arrives with what was written."""
    dataset = data.load(name, root=root, val_fraction=0.25)
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.num_classes == CLASSES[name]
    *train, test = (content(name, number) for number in range(len(FILES[name])))
    expected = {
        image.tobytes(): label for part in train for image, label in zip(*part, strict=True)
    }
    assert len(dataset.val) == len(expected) // 4
    for split in (dataset.train, dataset.val):
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            assert image.shape == (3, 32, 32)
            assert expected.pop(image.numpy().tobytes()) == label
    assert not expected
    assert dataset.test.images.numpy().tobytes() == test[0].tobytes()
    assert dataset.test.labels.tolist() == test[1]


@BOTH
@FORMATS
@pytest.mark.parametrize("nested", [False, True])
def test_every_pixel_and_label_arrives(tmp_path, name, form, nested):
    folder = tmp_path / FOLDERS[name, form] if nested else tmp_path
    folder.mkdir(exist_ok=True)
    write(folder, name, form)
    check(name, tmp_path)


@BOTH
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path, name, protocol):
    write(tmp_path, name, "py", protocol)
    check(name, tmp_path)


def test_pickles_of_python_2(tmp_path):
    """Read the opcodes of the published files: byte strings, and numpy.core's old module path."""
    for number, file in enumerate(FILES["cifar10"]):
        images, labels = content("cifar10", number)
        numbers = b"".join(b"K" + bytes([label]) for label in labels)
        size = len(images.tobytes()).to_bytes(4, "little")
        (tmp_path / file).write_bytes(
            b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
            b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
            b"(K\x01K" + bytes([COUNT]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + size
            + images.tobytes()
            + b"tbU\x06labelsq\x07]q\x08("
            + numbers
            + b"eu."
        )
    check("cifar10", tmp_path)


@BOTH
def test_column_major_arrays(tmp_path, name):
    for number, file in enumerate(FILES[name]):
        images, labels = content(name, number)
        value = batch(name, np.asfortranarray(images), labels)
        (tmp_path / file).write_bytes(pickle.dumps(value, protocol=2 + 3 * (number % 2)))
    check(name, tmp_path)


@BOTH
def test_labels_as_an_array(tmp_path, name):
    for number, file in enumerate(FILES[name]):
        images, labels = content(name, number)
        (tmp_path / file).write_bytes(pickle.dumps(batch(name, images, np.array(labels))))
    check(name, tmp_path)


class Boom:
    """Run a function when unpickled, as a malicious file would."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["data", "labels", "file"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_pickled_code_runs(tmp_path, where, protocol):
    paths = write(tmp_path, "cifar10", "py")
    mark = tmp_path / "ran"
    images, labels = content("cifar10", 0)
    boom = Boom(Path.touch, mark)
    value = {"data": images, "labels": labels, where: boom} if where != "file" else boom
    paths["data_batch_1"].write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DataError, match=r"data_batch_1: .*asks for"):
        data.load("cifar10", root=tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(boom, protocol))  # the trap does work on an ordinary reader
    assert mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        Boom(eval, "1"),
        Boom(np.load, "x"),
        Boom(np.dtype, "O"),
        Boom(getattr, {}, "clear"),
        np.array([object()]),
        np.zeros((COUNT, 3072), np.float32),
        np.zeros((COUNT, 3072), ">i4"),
        np.array(["a" * 3072] * COUNT),
    ],
)
def test_only_integer_arrays_pass(tmp_path, value):
    paths = write(tmp_path, "cifar10", "py")
    value = {"data": value, "labels": [0] * COUNT}
    paths["test_batch"].write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(DataError, match=r"test_batch: expected"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"garbage",
        b"\x80\x02.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}(X\x01\x00\x00\x00aK\x01ub.",  # BUILD
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"(" * 10_000 + b"t" * 10_000 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02T\xff\xff\xff\x7fabc.",
    ],
)
def test_crafted_pickles(tmp_path, program):
    paths = write(tmp_path, "cifar100", "py")
    paths["train"].write_bytes(program)
    with pytest.raises(DataError, match=r"train: expected .*found"):
        data.load("cifar100", root=tmp_path)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 600), bit=st.integers(0, 7), protocol=st.sampled_from([0, 2, 4, 5]))
def test_a_damaged_pickle_is_refused_or_still_a_batch(tmp_path, position, bit, protocol):
    paths = write(tmp_path, "cifar100", "py", protocol)
    program = bytearray(paths["train"].read_bytes())
    program[position if position < 300 else 300 - position] ^= 1 << bit
    paths["train"].write_bytes(program)
    try:
        dataset = data.load("cifar100", root=tmp_path, val_fraction=0)
    except DataError:
        pass
    else:
        assert len(dataset.train.images) == len(dataset.train.labels) > 0
        assert 0 <= dataset.train.labels.min() <= dataset.train.labels.max() < 100


@BOTH
@FORMATS
@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1])
def test_truncated_file(tmp_path, name, form, keep):
    for file, path in write(tmp_path, name, form).items():
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=rf"{file}.*: expected .*found"):
            data.load(name, root=tmp_path)
        path.write_bytes(whole)


@FORMATS
def test_a_batch_cut_between_images(tmp_path, form):
    path = write(tmp_path, "cifar10", form)["data_batch_3"]
    if form == "bin":
        path.write_bytes(path.read_bytes()[:-3073])
    else:
        images, labels = content("cifar10", 2)
        path.write_bytes(pickle.dumps(batch("cifar10", images[1:], labels[1:])))
    with pytest.raises(DataError, match=r"data_batch_3.*expected 8 images.*found 7"):
        data.load("cifar10", root=tmp_path)


def test_an_official_set_cut_between_images(tmp_path):
    record = np.zeros(3074, np.uint8).tobytes()
    (tmp_path / "train.bin").write_bytes(record * 49_999)
    (tmp_path / "test.bin").write_bytes(record * 10_000)
    with pytest.raises(DataError, match=r"train.bin: expected 50000 images in all; found 49999"):
        data.load("cifar100", root=tmp_path)


@BOTH
@FORMATS
def test_missing_file_is_named(tmp_path, name, form):
    paths = write(tmp_path, name, form)
    last = paths[FILES[name][-1]]
    last.unlink()
    with pytest.raises(DataError, match=rf"{last.name}: expected .*found none"):
        data.load(name, root=tmp_path)


@BOTH
def test_label_out_of_range(tmp_path, name):
    paths = write(tmp_path, name, "bin")
    path = paths[FILES[name][0]]
    records = np.frombuffer(path.read_bytes(), np.uint8).reshape(COUNT, -1).copy()
    records[5, -3073] = CLASSES[name]
    path.write_bytes(records.tobytes())
    with pytest.raises(
        DataError, match=f"to {CLASSES[name] - 1}; found {CLASSES[name]} at position 5"
    ):
        data.load(name, root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0] * (COUNT - 1)}, f"{COUNT} labels.*found {COUNT - 1}"),
        ({b"labels": [0] * (COUNT - 1) + [-1]}, "labels from 0 to 9; found -1 at position 7"),
        ({b"labels": [0] * (COUNT - 1) + [2**70]}, "labels from 0 to 9; found 1180591620717411303"),
        ({b"labels": [0.0] * COUNT}, "list of integers"),
        ({b"labels": "0" * COUNT}, "list of integers"),
        ({b"data": np.zeros((COUNT, 3071), np.uint8)}, r"\[N, 3072\]; found \[8, 3071\]"),
        ({b"data": np.zeros(3072, np.uint8)}, r"\[N, 3072\]; found \[3072\]"),
        ({b"data": np.zeros((COUNT, 3072), np.int64)}, "uint8 array"),
        ({b"data": b"pixels"}, "uint8 array"),
    ],
)
def test_wrong_python_batches(tmp_path, change, message):
    path = write(tmp_path, "cifar10", "py")["data_batch_2"]
    path.write_bytes(pickle.dumps({**batch("cifar10", *content("cifar10", 1)), **change}))
    with pytest.raises(DataError, match=rf"data_batch_2: expected .*{message}"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("value", [{}, [], 3, {b"data": np.zeros((1, 3072), np.uint8)}])
def test_a_pickle_of_something_else(tmp_path, value):
    path = write(tmp_path, "cifar10", "py")["test_batch"]
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match="test_batch: expected"):
        data.load("cifar10", root=tmp_path)


def test_trailing_bytes(tmp_path):
    path = write(tmp_path, "cifar10", "py")["test_batch"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"test_batch: .*after its end"):
        data.load("cifar10", root=tmp_path)
