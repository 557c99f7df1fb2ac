"""Numbers that stand for index tensors in the key of a call."""

from __future__ import annotations

import gc

import torch

from sparsekd.ops.dispatch import cache_key


def test_serial_numbers_of_structures_do_not_pile_up() -> None:
    gc.collect()
    before = len(cache_key._serials)
    crow = torch.tensor([0, 1], dtype=torch.int32)
    for _ in range(50):
        col = torch.tensor([0], dtype=torch.int32)
        first = cache_key.serial(crow, col)
        assert cache_key.serial(crow, col) == first
        col.zero_()
        assert cache_key.serial(crow, col) != first
    del col
    assert len(cache_key._serials) <= before
    with torch.inference_mode():
        col = torch.tensor([0], dtype=torch.int32)
    assert cache_key.serial(crow, col) == cache_key.serial(crow, col)
