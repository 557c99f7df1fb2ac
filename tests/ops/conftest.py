from __future__ import annotations

from collections.abc import Iterator

import pytest

import sparsekd as skd


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every backend of the CPU; skip, saying why, where one cannot run."""
    entry = skd.ops.info()["backends"][request.param]
    if not entry["available"]:
        pytest.skip(f"backend {request.param}: {entry['detail']}")
    with skd.backend(request.param):
        yield request.param
