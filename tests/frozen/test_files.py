"""Files of frozen networks: they give the same network, or an error, whatever is in them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn

import sparsekd as skd
from sparsekd.errors import CheckpointError, ShapeError, UnsupportedError
from sparsekd.frozen import load_frozen, save_frozen
from sparsekd.train.checkpoint import state_hash


@pytest.fixture(params=["float32", "int8"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    )
    skd.sparsify(model, sparsity=0.5)
    frozen = skd.freeze(model, torch.zeros(1, 3, 12, 12), weights=request.param)
    save_frozen(frozen, tmp_path / "net.frozen")
    return tmp_path / "net.frozen"


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_round_trip(tmp_path: Path, weights: str) -> None:
    model = skd.sparsify(skd.models.resnet20(num_classes=10), sparsity=0.9).eval()
    x = torch.randn(3, 3, 32, 32)
    frozen = skd.freeze(model, x, weights=weights)
    save_frozen(frozen, tmp_path / "net.frozen")
    loaded = load_frozen(tmp_path / "net.frozen")
    with torch.inference_mode():
        assert torch.equal(loaded(x), frozen(x))
        with pytest.raises(ShapeError, match="from a file: expected inputs of"):
            loaded(torch.randn(3, 3, 16, 16))
    save_frozen(loaded, tmp_path / "again.frozen")
    assert (tmp_path / "again.frozen").read_bytes() == (tmp_path / "net.frozen").read_bytes()


def test_wide_and_narrow_columns(tmp_path: Path) -> None:
    sizes = []
    for inputs in (1 << 15, (1 << 15) + 1):
        layer = nn.Linear(inputs, 2)
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[:, -500:] = torch.randn(2, 500)
        x = torch.randn(2, inputs)
        frozen = skd.freeze(layer, x)
        save_frozen(frozen, tmp_path / "net.frozen")
        sizes.append((tmp_path / "net.frozen").stat().st_size)
        with torch.inference_mode():
            assert torch.equal(load_frozen(tmp_path / "net.frozen")(x), frozen(x))
    assert abs(sizes[1] - sizes[0] - 2 * 1000) < 100  # bytes of the columns


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    class Tanh(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x)

    frozen = skd.freeze(nn.Sequential(nn.Linear(3, 2), Tanh()), torch.zeros(1, 3))
    with pytest.raises(UnsupportedError, match=r"aten\.tanh"):
        save_frozen(frozen, tmp_path / "net.frozen")
    assert list(tmp_path.iterdir()) == []


class TwoInputs(nn.Module):
    """Reads its second input first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(y)) + self.first(x)


def test_inputs_keep_their_order(tmp_path: Path) -> None:
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = TwoInputs().eval()
    save_frozen(skd.freeze(model, x, y), tmp_path / "net.frozen")
    with torch.inference_mode():
        torch.testing.assert_close(load_frozen(tmp_path / "net.frozen")(x, y), model(x, y))


def test_an_input_that_is_not_read(tmp_path: Path) -> None:
    class Half(TwoInputs):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.second(y)

    x, y = torch.randn(2, 4), torch.randn(2, 4)
    model = Half().eval()
    frozen = skd.freeze(model, x, y)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x, y), model(x, y))
    with pytest.raises(UnsupportedError, match="reads all of its inputs"):
        save_frozen(frozen, tmp_path / "net.frozen")


def test_missing_and_foreign_files(tmp_path: Path, file: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable"):
        load_frozen(tmp_path / "none")
    skd.train.save_model(tmp_path / "model.safetensors", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="expected a file of save_frozen"):
        load_frozen(tmp_path / "model.safetensors")


def _mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    cut = chance.randrange(len(changed)) if chance.random() < 0.1 else len(changed)
    return bytes(changed[:cut])


def _mutate_numbers(content: bytes, about: dict[str, object], chance: random.Random) -> bytes:
    """Change numbers and give the file a hash that fits, as somebody with intent would."""
    tensors = {name: tensor.clone() for name, tensor in load(content).items()}
    for _ in range(chance.choice([1, 1, 2, 4])):
        name = chance.choice(sorted(tensors))
        flat = tensors[name].view(-1)
        if chance.random() < 0.1:
            tensors[name] = flat[: chance.randrange(len(flat) + 1)].clone()
        elif len(flat) and not flat.dtype.is_floating_point:
            least, most = torch.iinfo(flat.dtype).min, torch.iinfo(flat.dtype).max
            near = int(flat[0]) + chance.randint(-2, 2)
            options = [near, -1, 0, 1, 2, 5, 7, 1024, most // 2 + 1, most, least]
            chosen = min(max(chance.choice(options), least), most)
            flat[chance.randrange(len(flat))] = chosen
    about = {**about, "sha256": state_hash(tensors)}
    return save(tensors, {"sparsekd": json.dumps(about)})


def _mutations(file: Path, count: int) -> Iterator[bytes]:
    content, chance = file.read_bytes(), random.Random(0)
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["sparsekd"])
    for number in range(count):
        if number % 2:
            yield _mutate_bytes(content, chance)
        else:
            yield _mutate_numbers(content, about, chance)


COUNTS = pytest.mark.parametrize(
    "count", [2_000, pytest.param(100_000, marks=pytest.mark.thorough)], ids=str
)


@COUNTS
def test_damaged_files_never_crash(file: Path, tmp_path: Path, count: int) -> None:
    refused = 0
    damaged = tmp_path / "damaged.frozen"
    x = torch.zeros(2, 3, 12, 12)
    for content in _mutations(file, count):
        damaged.write_bytes(content)
        try:
            network = load_frozen(damaged)
        except CheckpointError:
            refused += 1
            continue
        with torch.inference_mode():
            try:
                assert network(x).ndim == 2
            except ShapeError:
                refused += 1
    assert refused > count // 2


@COUNTS
def test_c_refuses_what_python_refuses(
    file: Path, tmp_path: Path, c_library: Any, count: int
) -> None:
    damaged = tmp_path / "damaged.frozen"
    for content in _mutations(file, count):
        damaged.write_bytes(content)
        try:
            network = c_library.load(content)
        except ValueError:
            assert "\n" not in c_library.error()
            with pytest.raises(CheckpointError):
                load_frozen(damaged)
            continue
        load_frozen(damaged)
        shapes = c_library.shapes(network, "input")
        c_library.run(network, *(torch.zeros(2, *shape) for shape in shapes))
        c_library.free(network)
