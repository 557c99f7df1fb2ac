"""Two and four processes train one sparse network: topologies, gradients, bytes, mismatches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import replicas_worker as worker
import torch

import sparsekd
from sparsekd.dst import replicas

WORKER = Path(worker.__file__)


@pytest.fixture(
    scope="module",
    params=[
        (2, tuple(worker.METHODS)),
        pytest.param((4, worker.FOUR), marks=pytest.mark.slow),
        pytest.param((4, tuple(worker.METHODS)), marks=pytest.mark.thorough),
    ],
    ids=["2", "4", "4-all"],
)
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """Run every scenario in as many processes, and return what each of them found."""
    world, methods = request.param
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(WORKER), str(out)]
    command.append(",".join(methods))
    root = str(Path(sparsekd.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(params=worker.METHODS)
def method(request, ranks) -> str:
    if request.param not in ranks[0]["many_rewires"]:
        pytest.skip(f"only thorough tests run it in {len(ranks)} processes")
    return request.param


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_up_to_a_hundred_rewires_leave_all_ranks_with_the_same_network(ranks, method):
    first = ranks[0]["many_rewires"][method]
    assert first["rewired"] == worker.rewires(method, len(ranks))
    for other in ranks[1:]:
        assert equal(first["state"], other["many_rewires"][method]["state"])


def test_the_ranks_together_do_what_one_process_does(ranks, method):
    """Sharded batches, accumulated passes: the topologies of one process on whole batches."""
    alone = worker.train(method, 12, 0, 1, passes=2)
    for rank in ranks:
        found = rank["like_one_process"][method]
        assert equal(found["masks"], alone["masks"])
        for name, tensor in alone["state"].items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-9, atol=1e-12)


def test_parameters_stay_themselves_in_model_and_optimizer(ranks, method):
    for rank in ranks:
        assert rank["many_rewires"][method]["same parameters"]
        assert rank["many_rewires"][method]["held"]


def test_growth_sees_the_mean_of_all_ranks_and_passes(ranks):
    for rank in ranks:
        assert all(error < 1e-12 for error in rank["dense_gradient"].values())


@pytest.mark.parametrize("how", ["zeroed in place", "synchronised twice", "clipped", "hooked"])
def test_growth_follows_the_gradients_that_were_exchanged(ranks, how):
    for rank in ranks:
        difference, reported = rank["followed_gradient"][how]
        assert difference < 1e-9
        assert reported == []


def test_gradients_that_are_no_mean_of_backward_passes_are_reported(ranks):
    for rank in ranks:
        assert rank["followed_gradient"]["noisy"][1] == ["0", "2", "5"]


def test_a_mismatch_raises_everywhere_and_names_layers_and_ranks(ranks):
    others = ", ".join(str(rank) for rank in range(len(ranks)) if rank != 1)
    for number, rank in enumerate(ranks):
        message = rank["mismatch_after_growth"]
        for layer in ("0", "2", "5"):
            assert f"{layer} on rank {others} against rank 1" in message
        assert message.startswith(f"rank {number}: topologies differ")
        start = rank["mismatch_at_the_start"]
        firsts = ", ".join(str(rank) for rank in range(len(ranks) - 1))
        assert f"2 on rank {firsts} against rank {len(ranks) - 1}" in start


def test_a_layer_that_some_ranks_skip_is_named(ranks):
    for number, rank in enumerate(ranks):
        assert rank["skipped_layer"].startswith(f"rank {number}: layers took part")
        assert "spare on rank 0 against rank 1" in rank["skipped_layer"]


def test_only_stored_weights_go_over_the_wire(ranks):
    for rank in ranks:
        sent = rank["bytes_on_the_wire"]["sent"]
        assert all(found == expected for found, expected in sent)
        assert sent[-1][0] < 0.2 * sent[0][0]  # GMP went to a tenth; biases stay
        assert rank["bytes_on_the_wire"]["buffers"] == []


@pytest.mark.parametrize(
    "how", ["as the model", "attached", "static graph", "views", "outer", "inner"]
)
def test_wrappers_that_were_handed_over_follow_a_change_of_size(ranks, how):
    alone = ranks[0]["handed_over"]["alone"]
    for rank in ranks:
        found = rank["handed_over"][how]
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_change_of_size_without_a_known_wrapper_is_refused(ranks):
    for rank in ranks:
        found = rank["no_wrapper_known"]
        assert re.search(
            r"GMP changes the number of nonzeros.*GMP\(network, .*attach", found["message"]
        )
        assert found["unchanged"]
        assert found["density"] == pytest.approx(0.3, abs=0.01)


def test_an_updater_takes_no_wrapper_of_another_model():
    model = worker.network()
    updater = worker.METHODS["gmp"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="wrappers: expected DistributedDataParallel"):
        updater.attach(model)


def test_a_fingerprint_means_the_same_in_every_process(ranks):
    expected = replicas.fingerprint(worker.network()[0].topology)
    assert {rank["fingerprint"] for rank in ranks} == {expected}


def test_without_processes_nothing_is_averaged_or_compared():
    tensor = torch.tensor([1.0, 3.0])
    assert torch.equal(replicas.mean_(tensor.clone()), tensor)
    assert not replicas.several()
