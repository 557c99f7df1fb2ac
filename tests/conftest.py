"""What tests of several folders share."""

from __future__ import annotations

import signal

import pytest

from sparsekd.train import StopRequest


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
