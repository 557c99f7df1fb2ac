"""The bounds that docs/gpu.md prints are those that the script computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_roofline import gather, layer_of, sheet_of
from sparsekd.bench.cases import LayerCase

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_what_the_script_prints() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_roofline.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("tile_product") >= 4
    assert printed.strip() in (ROOT / "docs" / "gpu.md").read_text()


def test_strided_layers_read_what_their_taps_meet() -> None:
    wide = layer_of(LayerCase("conv", 64, 128, size=32, kernel=3, stride=2, batch=8))
    assert wide.maps == 8 * (64 * 32**2 + 128 * 16**2)
    assert wide.halo == (2 * 3 + 3) * (2 * 7 + 3) / 32  # of patches of 4x8
    narrow = layer_of(LayerCase("conv", 64, 128, size=32, stride=2, batch=8))
    assert narrow.maps == 8 * (64 + 128) * 16**2
    assert narrow.halo == 1


def test_patches_that_reach_past_the_borders_are_counted_whole() -> None:
    layer = layer_of(LayerCase("conv", 64, 64, size=7, kernel=3))
    assert layer.halo == pytest.approx(2 * (4 + 2) * (8 + 2) / 7**2)  # two patches of 4x8


def test_chunks_are_larger_where_a_batch_has_fewer_vectors() -> None:
    case = LayerCase("linear", 2048, 1000, batch=128)
    # 32 vectors of float32, 16 of bfloat16, padded by one, of 1152 that a block has room for
    assert layer_of(case).chunk == 32
    assert layer_of(case, torch.bfloat16).chunk == 64


def test_an_input_gradient_multiplies_as_often() -> None:
    layer = layer_of(LayerCase("conv", 64, 128, size=32, kernel=3, stride=2, batch=8))
    back = layer.exchanged
    assert (back.channels, back.outs, back.fan_in) == (128, 64, 128 * 9)
    assert gather(back, 0.1, "fp32").flops == gather(layer, 0.1, "fp32").flops


def test_a_data_sheet_is_of_a_device_that_has_its_name() -> None:
    names = ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB")
    sheets = [sheet_of(name) for name in (*names, "cpu", "")]
    found = [sheet.name if sheet else None for sheet in sheets]
    assert found == ["A100", "H100", "H200", None, None, None]
