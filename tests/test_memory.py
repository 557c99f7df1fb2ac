"""Freed memory stays mapped where glibc can do it, and the caller is told where it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsekd import memory

_COUNT_FAULTS = """
import resource, torch
from sparsekd.memory import keep_memory_warm
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(4 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cold = faults()
assert keep_memory_warm() and keep_memory_warm()
for _ in range(4):  # the heap grows until freed blocks are reused
    faults()
print(cold, faults())
"""


@pytest.mark.skipif(memory._find_mallopt() is None, reason="needs glibc on Linux")
def test_pages_are_faulted_in_once():
    out = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True
    )
    cold, warm = map(int, out.stdout.split())
    assert warm < cold / 10


def test_other_platforms_are_told_that_nothing_happened(monkeypatch, caplog):
    monkeypatch.setattr(memory, "_applied", False)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_memory_warm() is False
    assert "darwin" in caplog.text


def test_a_refused_setting_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(memory, "_applied", False)
    monkeypatch.setattr(memory, "_find_mallopt", lambda: lambda parameter, value: 0)
    assert memory.keep_memory_warm() is False
    assert "refused" in caplog.text
