"""Folders of runs: what they refuse, and how they go on."""

from __future__ import annotations

import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparsekd.dst import Dynamics
from sparsekd.errors import CheckpointError
from sparsekd.recipes import (
    DataChoice,
    Experiment,
    ModelChoice,
    Recipe,
    RunFolder,
    experiment,
    get,
    load_data,
    override,
    plan,
)
from sparsekd.recipes.report import read_rows
from sparsekd.train import Interrupted, MetricsLog, Training


def comparable(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_finished_runs_are_neither_lost_nor_repeated(run, finished, tiny):
    before = read_rows(finished)
    run(tiny, finished)
    assert read_rows(finished) == before


def test_more_can_be_asked_for_later(run, finished, tiny):
    before = read_rows(finished)
    run(replace(tiny, sparsities=(0.8, 0.9), methods=("lt",)), finished)
    rows = read_rows(finished)
    assert rows[: len(before)] == before
    assert [r["run"] for r in rows[len(before) :] if r["kind"] == "result"] == ["seed0/lt-0.9"]


def test_another_experiment_in_the_same_folder_is_refused(run, finished, tiny):
    other = override(tiny, "training.lr=0.2")
    with pytest.raises(CheckpointError, match=r"training\.lr=0\.1, expected 0\.2"):
        run(other, finished)


def test_a_folder_older_than_a_field_is_one_with_its_default(run, finished, tmp_path, tiny):
    config = json.loads((finished / "config.json").read_text())
    del config["recipe"]["sup"], config["recipe"]["training"]["tail"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with RunFolder(tmp_path, tiny):
        pass
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = replace(override(tiny, "sup.drop_fraction=0.1"), methods=("sup-set",))
    with pytest.raises(CheckpointError, match=r"sup\.drop_fraction=0\.5, expected 0\.1"):
        RunFolder(tmp_path, other).__enter__()


def test_two_processes_in_one_folder_are_refused(run, finished, tiny):
    with RunFolder(finished, tiny), pytest.raises(CheckpointError, match="another process"):
        run(run, finished)


def test_a_refused_folder_is_not_left_locked(finished, tiny):
    other = replace(tiny, training=replace(tiny.training, lr=0.37))
    refused = RunFolder(finished, other)
    with pytest.raises(CheckpointError) as error, refused:
        pass
    assert "another process" not in str(error.value)
    with RunFolder(finished, tiny):  # `error` still holds the refused attempt
        pass


@pytest.mark.parametrize("looks", [0, 2, 4, 7, 11, 18])
def test_an_interrupted_experiment_ends_with_the_same_rows(
    run, finished, tmp_path, looks, stop_at, tiny
):
    with pytest.raises(Interrupted):
        run(tiny, tmp_path, stop=stop_at(looks))
    run(tiny, tmp_path)
    names = {planned.name for planned in plan(tiny)}
    expected = [row for row in read_rows(finished) if row["run"] in names]
    assert comparable(read_rows(tmp_path)) == comparable(expected)


def test_a_crash_before_the_last_row_repeats_no_epoch(run, finished, tmp_path, monkeypatch, tiny):
    def crash(*arguments):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "result", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tiny, tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "epo')
    run(tiny, tmp_path)
    names = {planned.name for planned in plan(tiny)}
    expected = [row for row in read_rows(finished) if row["run"] in names]
    assert comparable(read_rows(tmp_path)) == comparable(expected)


@pytest.fixture
def of_version_0_1_0(tmp_path):
    """Return a recipe, with the folder that version 0.1.0 made of it in `tmp_path`."""
    with tarfile.open(Path(__file__).with_name("run_folder_0.1.0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return Recipe(
        "old",
        "",
        DataChoice("digits", train_images=200),
        ModelChoice("resnet20"),
        Training(epochs=2, batch_size=50, augment=False),
        dynamics=Dynamics(every=2),
        methods=("static", "rigl"),
        sparsities=(0.99,),
    )


def test_a_folder_of_version_0_1_0_is_resumed(tmp_path, of_version_0_1_0):
    """One run has finished there; RigL was stopped after its first of two epochs."""
    recipe = of_version_0_1_0
    before = MetricsLog(tmp_path / "metrics.jsonl").rows()
    with RunFolder(tmp_path, recipe) as folder:
        Experiment(recipe, load_data(recipe.data, None), folder).run()
    rows = read_rows(tmp_path)
    assert rows[: len(before)] == before
    assert [row["run"] for row in rows if row["kind"] == "result"] == [r.name for r in plan(recipe)]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs if row["run"] == "seed0/rigl-0.99"] == [1, 2]
    sessions = json.loads((tmp_path / "config.json").read_text())["sessions"]
    assert sessions[0] == {"sparsekd": "0.1.0"}
    assert len(sessions) == 2
    rigl = rows[-1]
    assert (rigl["method"], rigl["layers"]) == ("rigl", "convolutions")
    assert (rigl["density"]["fc"], 1 - rigl["sparsity_masked"] < 0.011) == (1.0, True)


def test_masks_of_an_older_folder_stay_on_its_convolutions(tmp_path, of_version_0_1_0):
    """Methods mask linear layers too by now; this folder goes on as it began, time after time."""
    recipe = of_version_0_1_0
    for _ in range(2):
        with RunFolder(tmp_path, recipe) as folder:
            assert folder.as_meant(recipe).layers == "convolutions"
    with RunFolder(tmp_path, replace(recipe, layers="convolutions")):
        pass
    whole = replace(recipe, layers="all")
    refused = r"layers='convolutions', expected 'all'"
    with pytest.raises(CheckpointError, match=refused), RunFolder(tmp_path, whole):
        pass


def test_masks_of_a_new_folder_are_those_of_each_method(tmp_path, tiny):
    for _ in range(2):
        with RunFolder(tmp_path, tiny) as folder:
            assert folder.as_meant(tiny) == tiny
    other = replace(tiny, layers="convolutions")
    refused = r"layers=None, expected 'convolutions'"
    with pytest.raises(CheckpointError, match=refused), RunFolder(tmp_path, other):
        pass


def test_a_preset_that_has_changed_goes_on_in_an_older_folder_as_it_was(tmp_path):
    """A recipe that ships has other values by now; what a command asks for still has to fit."""
    recipe = get("compare")
    old = replace(recipe.dynamics, drop_fraction=0.123)
    before = replace(recipe, own_dynamics=False, dynamics=old)
    stored = json.loads(json.dumps(asdict(before)))
    for name in ("layers", "skip", "init", "own_dynamics"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps({"recipe": stored, "sessions": []}))
    for _ in range(2):
        with RunFolder(tmp_path, recipe) as folder:
            meant = folder.as_meant(recipe)
            assert meant == replace(before, layers="convolutions")
    asked = override(recipe, "training.lr=0.2")
    with pytest.raises(CheckpointError, match=r"training\.lr=0\.1, expected 0\.2"):
        RunFolder(tmp_path, asked).__enter__()


@pytest.mark.parametrize("name, epochs", [("compare", 16), ("fashion-mnist", 5)])
def test_folders_of_published_results_go_on_by_their_commands(tmp_path, name, epochs):
    published = Path(__file__).parents[2] / "docs/results" / name / "config.json"
    stored = json.loads(published.read_text())["recipe"]
    (tmp_path / "config.json").write_bytes(published.read_bytes())
    recipe = get(name).with_epochs(epochs)
    with RunFolder(tmp_path, recipe) as folder:
        meant = json.loads(json.dumps(asdict(folder.as_meant(recipe))))
    for field in ("training", "dynamics", "sup", "kd"):
        assert stored.get(field, {}).items() <= meant[field].items()
    assert (meant["layers"], meant["own_dynamics"], meant["init"]) == (
        "convolutions",
        False,
        "keep",
    )


def test_fields_of_cycles_may_change_where_no_run_has_them(tmp_path, tiny):
    with RunFolder(tmp_path, tiny):
        pass
    other = override(tiny, "sup.drop_fraction=0.1")
    with RunFolder(tmp_path, other):
        pass
    with pytest.raises(CheckpointError, match=r"sup\.drop_fraction=0\.1, expected 0\.5"):
        RunFolder(tmp_path, replace(tiny, methods=("sup-set",))).__enter__()


def test_every_field_that_differs_is_named(tmp_path, tiny):
    with RunFolder(tmp_path, tiny):
        pass
    other = override(override(tiny, "training.lr=0.2"), "kd.alpha=0.5")
    with pytest.raises(CheckpointError, match=r"kd\.alpha=0\.9, .*training\.lr=0\.1"):
        RunFolder(tmp_path, other).__enter__()
