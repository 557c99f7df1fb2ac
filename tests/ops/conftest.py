from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparsekd as skd


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Start every test on one thread, which is the fastest for small layers, and put it back."""
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
