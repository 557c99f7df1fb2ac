"""An experiment that several processes share: whoever has the lock of a part trains it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from itertools import chain

import pytest
import torch

from sparsekd import ops
from sparsekd.errors import CheckpointError, FolderInUseError
from sparsekd.recipes import DataChoice, ModelChoice, Recipe, RunFolder, share
from sparsekd.recipes.report import read_rows, table
from sparsekd.recipes.sharing import parts
from sparsekd.train import Training, load_state, state_hash

RECIPE = Recipe(
    "shared",
    "",
    DataChoice("digits", train_images=300),
    ModelChoice("resnet20"),
    Training(epochs=2, batch_size=100, augment=False),
    methods=("set", "rigl"),
    seeds=3,
).with_dynamics(every=2)
NAMES = [f"seed{seed}-{method}" for seed in range(3) for method in ("set", "rigl")]


def work(path) -> list[str]:
    """Do what each process does: bit-equal runs need one backend and one thread."""
    with ops.backend("cpp"):
        return share(RECIPE, path, threads=1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    assert work(path) == NAMES
    return path


def hashes(path):
    files = sorted(path.glob("*/seed*/*/final.safetensors"))
    return {str(file.relative_to(path)): state_hash(load_state(file)) for file in files}


def check_result(path, alone, done):
    assert set(done) == set(NAMES)
    assert hashes(path) == hashes(alone)
    rows = [row for row in read_rows(path) if row["kind"] == "result"]
    assert sorted((row["seed"], row["method"]) for row in rows) == sorted(
        (seed, method) for seed in range(3) for method in ("set", "rigl")
    )
    epochs = [(r["run"], r["epoch"]) for r in read_rows(path) if r["kind"] == "epoch"]
    assert len(epochs) == len(set(epochs)) == 12
    assert table(rows).row_count == 2


def test_two_processes_divide_the_parts(tmp_path, alone):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        finished = pool.map(work, [tmp_path] * 2, chunksize=1)
    check_result(tmp_path, alone, chain(*finished))


def test_jobs_of_submitit_divide_the_parts(tmp_path, alone, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("SPARSEKD_BACKEND", "cpp")
    executor = submitit.AutoExecutor(tmp_path / "log", cluster="local")
    executor.update_parameters(timeout_min=5)
    shared = tmp_path / "shared"
    jobs = [executor.submit(share, RECIPE, shared, threads=1) for _ in range(2)]
    check_result(shared, alone, chain(*(job.result() for job in jobs)))


def test_a_part_that_another_process_trains_is_passed_over(tmp_path, alone):
    with RunFolder(tmp_path / NAMES[2], parts(RECIPE)[NAMES[2]]):
        with pytest.raises(FolderInUseError), RunFolder(tmp_path / NAMES[2], RECIPE):
            pass
        assert work(tmp_path) == [name for name in NAMES if name != NAMES[2]]
    assert work(tmp_path) == NAMES  # free again: it is trained now, and the others not again
    check_result(tmp_path, alone, NAMES)


def test_methods_that_need_the_dense_run_stay_with_it():
    recipe = replace(RECIPE, methods=("dense", "lt", "rigl", "kd"), seeds=2, first_seed=4)
    assert {name: part.methods for name, part in parts(recipe).items()} == {
        "seed4-dense-lt-kd": ("dense", "lt", "kd"),
        "seed4-rigl": ("rigl",),
        "seed5-dense-lt-kd": ("dense", "lt", "kd"),
        "seed5-rigl": ("rigl",),
    }
    assert all((part.seeds, part.first_seed) in ((1, 4), (1, 5)) for part in parts(recipe).values())


def test_another_experiment_in_the_folder_is_refused(tmp_path):
    with RunFolder(tmp_path / NAMES[0], replace(parts(RECIPE)[NAMES[0]], prune_rate=0.5)):
        pass
    with pytest.raises(CheckpointError, match="holds an experiment with"):
        work(tmp_path)


def test_threads_are_those_asked_for(tmp_path, alone):
    torch.set_num_threads(2)
    work(alone)
    assert torch.get_num_threads() == 1
