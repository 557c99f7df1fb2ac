"""Sparse models under FSDP, of either kind, and ZeRO: equal to one process, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Run every scenario in two processes, and return what each of them found."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(WORKER), str(out)]
    root = str(Path(sparsekd.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[:3000]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_sharded_model_trains_like_a_whole_one(ranks, kind):
    for rank in ranks:
        assert len(rank[kind]) >= 2
        for how, difference in rank[kind].items():
            assert difference < 1e-12, how


def test_a_full_state_goes_from_a_sharded_model_to_a_plain_one_and_back(ranks):
    assert ranks[0]["gathered"]["difference"] < 1e-12
    assert ranks[0]["gathered"]["same topology"]
    for rank in ranks:
        assert rank["gathered"]["loaded"] < 1e-12
        assert "nnz=57" in rank["gathered"]["repr"]


def test_what_changes_the_topology_refuses_sharded_values_by_name(ranks):
    for rank in ranks:
        found = rank["refusals"]
        for method in ("RigL", "GMP", "ITOP", "TopKAST"):
            start = f"UnsupportedError: 0.values: dst.{method} needs them whole"
            assert found[f"fsdp2 {method}"].startswith(start)
            assert "fully_shard shards them" in found[f"fsdp2 {method}"]
        for how in ("False wrapper", "False module", "True wrapper", "True module"):
            assert "dst.RigL needs them whole" in found[f"fsdp1 {how}"]
            assert "FullyShardedDataParallel shards them" in found[f"fsdp1 {how}"]
        assert "rewire() needs them whole" in found["rewire"]
        assert "dense_weight() needs all of them" in found["dense_weight"]


def test_weights_that_are_freed_are_never_read(ranks):
    for rank in ranks:
        assert "storage has been freed" in rank["refusals"]["freed False"]
        assert "one per nonzero" in rank["refusals"]["freed True"]


def test_zero_keeps_a_static_topology_and_refuses_another(ranks):
    for rank in ranks:
        assert rank["zero"] < 1e-12
        assert "ZeroRedundancyOptimizer keeps the state" in rank["refusals"]["zero"]
