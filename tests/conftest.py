"""What tests of several folders share."""

from __future__ import annotations

import signal
import socket
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import sparsekd as skd
from sparsekd.train import StopRequest
from tools.packages import load_package


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that have slow tests, so that none still runs when all else is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group with this process as its only member."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Start every test on one thread, the fastest for small layers, and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpp", "dense", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every backend of the CPU; skip, saying why, where one cannot run."""
    entry = skd.ops.info()["backends"][request.param]
    if not entry["available"]:
        pytest.skip(f"backend {request.param}: {entry['detail']}")
    with skd.backend(request.param):
        yield request.param


@pytest.fixture
def no_missing_rules() -> Iterator[None]:
    """Fail where torch falls back to a loop because a batching rule is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


@pytest.fixture(scope="session")
def images() -> skd.data.Dataset:
    """Return a data set that small networks learn in seconds."""
    return skd.data.load(
        "synthetic", num_classes=4, input_shape=(1, 8, 8), train_size=150, test_size=60
    )


class StopAt(StopRequest):
    """Ask for a stop after so many checks of the flag by the loop."""

    def __init__(self, step: int) -> None:
        self.left = step

    @property
    def signal(self) -> signal.Signals | None:
        self.left -= 1
        return signal.SIGINT if self.left < 0 else None


@pytest.fixture
def stop_at() -> type[StopAt]:
    return StopAt


def _or_skip(name: str) -> ModuleType:
    try:
        return load_package(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    return _or_skip("torchvision")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return _or_skip("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return _or_skip("transformers")


@pytest.fixture(scope="session")
def lightning() -> ModuleType:
    return _or_skip("lightning.pytorch")


@pytest.fixture(scope="session")
def accelerate() -> ModuleType:
    return _or_skip("accelerate")
