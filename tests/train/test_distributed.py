"""Two processes under torchrun: one network, one set of files, death and resurrection."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import models
from sparsekd.train import distributed
from sparsekd.train.batchnorm import synchronize

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("ranks_worker", HERE / "ranks_worker.py")
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(sparsekd.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "SPARSEKD_BACKEND": "cpp",
    "COLUMNS": "120",
}


def torchrun(*arguments: str, restarts: int = 0, **environment: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", *arguments]
    environment = ENVIRONMENT | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(str(HERE / "ranks_worker.py"), str(out))
    assert done.returncode == 0, done.stderr[:3000]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def test_synchronized_batchnorm_is_that_of_the_whole_batch(ranks):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm2d(3).double()
    y = norm(x)
    y.pow(3).sum().backward()
    buffers = {name: tensor.double() for name, tensor in norm.named_buffers()}
    gradients = torch.cat([norm.weight.grad, norm.bias.grad])
    for number, rank in enumerate(ranks):
        share = {"y": y.detach()[number::2], "x.grad": x.grad[number::2]}
        assert_close(rank["normalise"], share | {"gradients": gradients} | buffers, 1e-11)


def test_ranks_read_disjoint_shares_of_a_dataset(ranks):
    first, second = (rank["read_shares"] for rank in ranks)
    assert [len(share) for share in first] == [len(share) for share in second] == [8, 8, 8, 1]
    assert sorted(n for share in first + second for n in share) == list(range(50))


@pytest.mark.parametrize("name", ["resnet20", "wrn22_2"])
def test_synchronized_norms_of_our_models_keep_residual_and_relu(name):
    model, x = models.build(name), torch.randn(2, 3, 16, 16)
    synchronized = synchronize(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronized.modules())
    torch.testing.assert_close(synchronized(x), model(x))
    torch.testing.assert_close(synchronized.state_dict(), model.state_dict())
    # What replaces norms without knowing of the ReLU ends in an error, not in another network.
    with pytest.raises(TypeError, match="positional argument"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()(x)


@pytest.mark.slow
def test_two_processes_train_as_one_does(ranks):
    """Shares of each batch, statistics of all of it: the same run up to rounding."""
    alone = worker.train(worker.network())
    for rank in ranks:
        found = rank["train_with_shared_statistics"]
        assert_close(found["state"], alone.model.state_dict())
        for row, expected in zip(found["rows"], alone.rows, strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-9)


def test_accumulated_gradients_are_those_of_the_batch(ranks):
    whole = worker.train(worker.network(norm=False)).model.state_dict()
    assert_close(worker.train(worker.network(norm=False), accumulate=3).model.state_dict(), whole)
    for rank in ranks:
        assert_close(rank["accumulate"], whole)


def test_one_rank_s_stop_stops_all_and_resuming_is_bit_equal(ranks):
    for rank in ranks:
        assert rank["agreed"] == [True, False]
        assert rank["resume"] == {f"step {step}": True for step in (1, 3, 5, 7)}


def test_without_torchrun_there_is_one_rank():
    with distributed.process_group():
        assert (distributed.rank(), distributed.ranks()) == (0, 1)
        distributed.wait()
        assert not distributed.any_rank(False)
        model = nn.Linear(1, 1)
        assert distributed.replicate(model) is model


CALL = ["train", "rigl", "--data", "digits", "--epochs", "2", "--sparsity", "0.9", "--threads", "1"]
CALL += [
    "--set",
    "data.train_images=320",
    "--set",
    "training.batch_size=64",
]  # steps of an epoch: 5
CALL += ["--set", "dynamics.every=3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, torchrun("-m", "sparsekd", *CALL, "--out", str(out))


def test_the_command_line_runs_under_torchrun_and_speaks_once(uninterrupted):
    out, done = uninterrupted
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("2 processes, each with its share") == 1
    assert done.stdout.count("epoch 2/2") == 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["epoch", "epoch", "result"]


@pytest.mark.slow
def test_a_dead_rank_ends_the_job_and_restarts_go_on_bit_equal(uninterrupted, tmp_path):
    call = [str(HERE / "mortal.py"), *CALL, "--out", str(tmp_path)]
    done = torchrun(*call, MORTAL="8")  # in the second epoch
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "another rank is gone" in done.stderr
    assert f"the same command goes on from {tmp_path}" in done.stderr
    # The same command goes on at the second epoch; now torchrun is told to restart what dies.
    done = torchrun(*call, restarts=1, MORTAL="2")
    assert done.returncode == 0, done.stderr[:3000]
    assert "failed (exitcode: -9)" in done.stderr  # and it has been restarted since
    final = "seed0/rigl-0.9/final.safetensors"
    assert (tmp_path / final).read_bytes() == (uninterrupted[0] / final).read_bytes()
