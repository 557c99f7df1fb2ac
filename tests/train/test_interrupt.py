"""The first signal asks, the second acts."""

from __future__ import annotations

import signal

import pytest

from sparsekd.train import Interrupted, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
    assert signal.getsignal(number) is before


def test_a_second_signal_acts_at_once():
    # Python's own, which a process that runs in the background starts without.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
