"""Packing and unpacking by the Triton kernel equal torch's copies, for maps of any strides.

The tests run twice, see test_triton_ops.py.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.testing import LAYOUTS, poisoned_memory, with_layout

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from sparsekd.kernels import pack
from sparsekd.ops.triton import packed_maps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the machine has a shadow of all memory")
executed = pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot show it")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NONE, SAME, UNEVEN = (0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Images, channels, height, width: one of each, and each beside a multiple of 16, 32 or 64.
SHAPES = [
    (1, 1, 1, 1),
    (1, 17, 3, 4),
    (2, 3, 8, 8),
    (16, 16, 2, 3),
    (17, 5, 3, 3),
    (32, 32, 1, 1),
    (31, 33, 1, 2),
    (63, 4, 1, 5),
    (64, 16, 2, 2),
    (65, 16, 1, 3),
    (130, 3, 1, 1),
]


@pytest.fixture(autouse=True)
def on_the_cpu_without_leftovers(on_triton):
    with poisoned_memory():
        yield


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed_by_torch(maps: Tensor, padding: tuple[int, ...]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(maps, (left, right, top, bottom)).permute(1, 2, 3, 0).contiguous()


def assert_packs(maps: Tensor, padding: tuple[int, ...]) -> None:
    packed = packed_maps.pack(maps, padding)
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_by_torch(maps, padding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_of_all_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    maps = drawn(shape, dtype)
    for memory_format in FORMATS:
        for padding in (NONE, SAME, UNEVEN):
            assert_packs(maps.contiguous(memory_format=memory_format), padding)
        unpacked = packed_maps.unpack(packed_by_torch(maps, NONE), memory_format)
        assert torch.equal(unpacked, maps)
        assert unpacked.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("padding", [NONE, UNEVEN])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "unbatched"])
def test_maps_of_all_layouts(layout: str, padding: tuple[int, ...]) -> None:
    for shape in (19, 16, 3, 4), (32, 6, 2, 16):
        assert_packs(with_layout(drawn(shape, torch.float32), layout), padding)


def test_parts_of_larger_maps() -> None:
    whole = drawn((6, 32, 5, 16), torch.float16)
    for memory_format in FORMATS:
        maps = whole.contiguous(memory_format=memory_format)
        for part in maps[1:4], maps[:, 16:], maps[:, 1:], maps[:, :, 1:4], maps[..., 3:], maps[::2]:
            assert_packs(part, NONE)
            assert_packs(part, SAME)


def test_padding_around_nothing() -> None:
    assert_packs(drawn((3, 2, 0, 4), torch.float32), SAME)
    assert packed_maps.pack(drawn((0, 2, 3, 4), torch.float32), SAME).shape == (2, 5, 6, 0)


@interpreted
@pytest.mark.parametrize("memory_format", FORMATS)
def test_elements_more_than_2_31_apart(memory_format: torch.memory_format) -> None:
    """Only the pages of these elements are ever touched, so the memory is not used up."""
    apart = 1 << 30
    memory = torch.UntypedStorage(2 * (3 * apart + 8))
    strides = (apart, 1, 4, 2) if memory_format == torch.channels_last else (apart, 4, 2, 1)
    maps = torch.empty(0, dtype=torch.float16).set_(memory, 0, (4, 2, 2, 2), strides)
    maps.copy_(drawn(maps.shape, torch.float16))
    assert_packs(maps, SAME)


def test_what_is_packed_already_is_not_copied() -> None:
    packed = drawn((3, 2, 2, 5), torch.float32)
    maps = packed.permute(3, 0, 1, 2)
    assert packed_maps.pack(maps, NONE).data_ptr() == maps.data_ptr()
    one = drawn((3, 2, 2, 1), torch.float32)
    assert packed_maps.unpack(one, torch.contiguous_format).data_ptr() == one.data_ptr()


# -- what it costs ---------------------------------------------------------------------------------


@executed
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_is_read_and_written_once_and_in_whole_sectors(ptx, memory_format, dtype) -> None:
    maps = drawn((64, 32, 4, 4), dtype).contiguous(memory_format=memory_format)
    packed_maps.unpack(packed_maps.pack(maps, NONE), memory_format)
    assert len(ptx.launches) == 2
    for counts in (launch.counts for launch in ptx.launches):
        assert counts.read == counts.written == maps.nbytes
    padded = packed_maps.pack(maps, SAME)
    assert ptx.launches[-1].counts.written == padded.nbytes
    if memory_format == torch.channels_last:
        assert ptx.launches[-1].counts.read == maps.nbytes


@executed
@pytest.mark.parametrize("memory_format", FORMATS)
def test_ragged_batches_compile_one_variant_more(memory_format: torch.memory_format) -> None:
    """The one has vectors along images, and the other has not."""
    pack.move_maps.device_caches.clear()
    for batch in (64, 61, 37, 50, 48):
        maps = drawn((batch, 16, 5, 5), torch.float32).contiguous(memory_format=memory_format)
        assert_packs(maps, SAME)
    assert sum(len(cache[0]) for cache in pack.move_maps.device_caches.values()) == 2
