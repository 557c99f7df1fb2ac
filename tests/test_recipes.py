"""Presets, overrides, plans, and folders that resume."""

from __future__ import annotations

import json
import signal
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from sparsekd.dst import METHODS
from sparsekd.errors import CheckpointError, DataError
from sparsekd.recipes import (
    RECIPES,
    DataChoice,
    Experiment,
    ModelChoice,
    Recipe,
    RunFolder,
    build_model,
    get,
    load_data,
    override,
    plan,
)
from sparsekd.recipes.report import read_rows, table
from sparsekd.train import Interrupted, Reporter, StopRequest, Training, load_state, state_hash

TINY = Recipe(
    "tiny",
    "",
    DataChoice("digits"),
    ModelChoice("resnet20"),
    Training(epochs=2, batch_size=100),
    sparsities=(0.8,),
)


def test_the_published_cifar_recipe():
    recipe = get("kd_ticket_cifar10")
    training, kd = recipe.training, recipe.kd
    assert (recipe.model.name, recipe.model.bottleneck) == ("resnet56", True)
    assert (recipe.data.name, recipe.data.val_fraction) == ("cifar10", 0.1)
    assert (kd.temperature, kd.alpha, kd.reduction, kd.until) == (5, 0.9, "mean", None)
    assert (training.epochs, training.batch_size, training.milestones) == (182, 128, (90, 135))
    assert (training.lr, training.gamma, training.momentum) == (0.1, 0.1, 0.9)
    assert (training.weight_decay, training.nesterov, training.warmup) == (2e-4, False, 0)
    percent = [round(100 * s, 2) for s in recipe.sparsities]
    assert percent[:6] == [20, 36, 48.8, 59.04, 67.23, 73.79]
    assert percent[-4:] == [94.5, 95.6, 96.48, 97.19]
    assert recipe.rewind_epoch == 33


def test_the_published_imagenet_recipe():
    recipe = get("kd_ticket_imagenet")
    training, kd = recipe.training, recipe.kd
    assert (recipe.model.name, recipe.model.stem) == ("resnet50", "imagenet")
    assert (kd.temperature, kd.alpha, kd.reduction, kd.until) == (4, 0.9, "batchmean", 60)
    assert (training.epochs, training.batch_size, training.lr) == (90, 512, 0.4)
    assert (training.warmup, training.milestones) == (5, (30, 60, 80))
    assert (training.weight_decay, training.momentum) == (1e-4, 0.9)
    assert [round(100 * s, 2) for s in recipe.sparsities] == [36, 59.04, 73.79, 83.22, 89.26]
    assert (recipe.data.scale, recipe.data.ratio) == ((0.1, 1.0), (0.8, 1.25))


@pytest.mark.parametrize(
    "name, tail, milestones, warmup, lr",
    [
        ("sup_tickets_cifar100", 24, (113, 169), 0, (0.001, 0.005)),
        ("sup_tickets_imagenet", 8, (30, 60, 85), 5, (1e-4, 5e-4)),
    ],
)
def test_the_published_recipes_of_sup_tickets(name, tail, milestones, warmup, lr):
    recipe = get(name)
    assert recipe.sup.tail(recipe.training.epochs) == tail
    squeezed = recipe.training.squeezed(tail)
    assert (squeezed.milestones, squeezed.warmup) == (milestones, warmup)
    assert (recipe.sup.lr, recipe.sup.drop_fraction, recipe.sup.prune_each) == (lr, 0.5, True)
    assert (recipe.dynamics.distribution, recipe.dynamics.decay) == ("erk", "constant")
    assert {"rigl", "sup-rigl"} <= set(recipe.methods)


def test_a_method_on_its_own_trains_the_dense_network_only_where_it_needs_it():
    assert [run.name for run in plan(get("sup-rigl"))] == [
        "seed0/sup-rigl-0.95",
        "seed0/sup-rigl-0.98",
    ]
    assert "seed0/dense" in {run.name for run in plan(get("kd-sup-rigl"))}
    recipe = get("sup-rigl")
    assert recipe.sup.tail(recipe.training.epochs) == 3
    assert recipe.data == get("fashion-mnist").data


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_recipe_of_its_own(name):
    recipe = get(name)
    assert recipe.methods == (name,)
    assert any(run.method == "dense" for run in plan(recipe)) == METHODS[name].needs_dense


@pytest.mark.parametrize(
    "name, until, milestones",
    [("rigl_cifar10", 0.75, (77, 153, 230)), ("rigl_imagenet", 25 / 32, (30, 70, 90))],
)
def test_the_published_recipes_of_rigl(name, until, milestones):
    recipe = get(name)
    assert (recipe.dynamics.drop_fraction, recipe.dynamics.every) == (0.3, 100)
    assert (recipe.dynamics.until, recipe.training.milestones) == (until, milestones)


def test_the_published_recipe_of_granet():
    recipe = get("granet_cifar100")
    assert recipe.dynamics.prune_until * recipe.training.epochs == 110
    assert (recipe.dynamics.every, recipe.dynamics.drop_fraction) == (1000, 0.5)


def test_a_layout_is_a_field_of_every_recipe():
    recipe = override(get("rigl"), "layout=bcsr")
    assert recipe.layout == "bcsr:16"
    recipe.check_layout()
    with pytest.raises(ValueError, match="layout: expected one of csr, bcsr, fanin, nm"):
        override(recipe, "layout=blocks")
    nm = override(recipe, "layout=nm")
    with pytest.raises(ValueError, match="sparsity: layout 'nm:2:4' keeps 2 of 4 weights"):
        nm.check_layout()
    override(nm, "sparsities=0.5").check_layout()


def test_methods_by_their_long_names_and_dense():
    recipe = replace(get("compare"), methods=("kd-ticket", "dense", "kd"), sparsities=(0.9,))
    assert recipe.methods == ("kd", "dense")
    assert [run.name for run in plan(replace(recipe, seeds=1))] == ["seed0/dense", "seed0/kd-0.9"]
    assert [run.name for run in plan(replace(recipe, methods=("dense",), seeds=1))] == [
        "seed0/dense"
    ]
    with pytest.raises(ValueError, match="did you mean rigl"):
        replace(recipe, methods=("rgl",))


def test_a_comparison_reads_fewer_images_the_same_for_every_seed():
    choice = DataChoice("digits", train_images=100)
    first, second = (load_data(choice, None).train for _ in range(2))
    assert len(first) == 100
    assert torch.equal(first.images, second.images)
    with pytest.raises(DataError, match="train_images: expected at most"):
        load_data(DataChoice("digits", train_images=100_000), None)
    with pytest.raises(ValueError, match="train_images"):
        DataChoice("digits", train_images=0)


def test_the_demo_compares_three_methods_at_three_sparsities():
    runs = plan(get("demo"))
    assert len({run.sparsity for run in runs if run.method != "dense"}) == 3
    assert {run.method for run in runs} == {"dense", "lt", "reinit", "kd"}


def test_fashion_mnist_pairs_lt_and_kd_on_one_teacher_a_seed():
    recipe = get("fashion-mnist")
    assert recipe == get("fashion_mnist")
    runs = plan(recipe)
    assert [run.name for run in runs if run.seed == 1] == [
        "seed1/dense",
        "seed1/lt-0.9",
        "seed1/kd-0.9",
        "seed1/lt-0.98",
        "seed1/kd-0.98",
    ]
    assert {run.seed for run in runs} == {0, 1, 2}


def test_an_iterative_plan_reaches_the_highest_sparsity():
    recipe = replace(get("demo"), methods=("imp",), sparsities=(0.36, 0.5904))
    rounds = [run for run in plan(recipe) if run.method == "imp"]
    assert [run.sparsity for run in rounds] == [0.2, 0.36, 0.488, 0.5904]
    assert rounds[-1].name == "seed0/imp-round04"


def test_presets_are_frozen():
    with pytest.raises(FrozenInstanceError):
        get("demo").seeds = 2
    with pytest.raises(ValueError, match="demo, fashion-mnist"):
        get("unknown")
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_epochs_scale_the_whole_schedule():
    recipe = get("kd_ticket_imagenet").with_epochs(18)
    assert recipe.training.milestones == (6, 12, 16)
    assert (recipe.training.warmup, recipe.kd.until, recipe.rewind_epoch) == (1, 12, 1)


@pytest.mark.parametrize(
    "assignment, path, value",
    [
        ("training.lr=0.05", ("training", "lr"), 0.05),
        ("training.epochs=3", ("training", "epochs"), 3),
        ("training.nesterov=True", ("training", "nesterov"), True),
        ("training.milestones=4, 6", ("training", "milestones"), (4, 6)),
        ("training.milestones=", ("training", "milestones"), ()),
        ("training.schedule=step", ("training", "schedule"), "step"),
        ("kd.until=7", ("kd", "until"), 7),
        ("kd.until=none", ("kd", "until"), None),
        ("data.scale=0.1,1", ("data", "scale"), (0.1, 1.0)),
        ("sparsities=0.5,0.75", ("sparsities",), (0.5, 0.75)),
        ("methods=kd", ("methods",), ("kd",)),
        ("model.stem=imagenet", ("model", "stem"), "imagenet"),
    ],
)
def test_overrides(assignment, path, value):
    changed = override(get("demo"), assignment)
    for name in path:
        changed = getattr(changed, name)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("training.lr", "expected a.b=value"),
        ("training.lrr=1", "did you mean lr"),
        ("train.lr=1", "did you mean training"),
        ("training=1", "expected one of its fields"),
        ("seeds.x=1", "has no fields"),
        ("training.lr=fast", "training.lr: expected a number, got 'fast'"),
        ("training.epochs=2.5", "training.epochs: expected a whole number"),
        ("training.nesterov=yes", "expected true or false"),
        ("training.schedule=linear", "'step' or 'cosine'"),
        ("training.milestones=1,b", "expected a whole number, got 'b'"),
        ("training.lr=-1", "lr: expected a positive number"),
        ("methods=lt,foo", "got 'foo'"),
        ("sparsities=1.0", "sparsities"),
        ("seeds=0", "seeds"),
        ("kd.alpha=2", "alpha"),
        ("rewind_epoch=99", "rewind_epoch"),
    ],
)
def test_overrides_that_cannot_be(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(get("demo"), assignment)


def test_networks_follow_the_data_and_the_seed(digits):
    a, b = (build_model(ModelChoice("resnet20"), digits, seed) for seed in (0, 0))
    other = build_model(ModelChoice("resnet20"), digits, 1)
    assert a.conv1.in_channels == 1
    assert a.fc.out_features == 10
    assert (
        state_hash(a.state_dict()) == state_hash(b.state_dict()) != state_hash(other.state_dict())
    )


def test_a_choice_the_network_does_not_have_raises(digits):
    with pytest.raises(ValueError, match="lenet5 does not fit"):
        build_model(ModelChoice("lenet5", stem="cifar"), digits, 0)


@pytest.fixture(scope="module")
def digits():
    whole = load_data(DataChoice("digits"), None)
    train, test = whole.train.subset(torch.arange(300)), whole.test.subset(torch.arange(100))
    return replace(whole, train=train, test=test)


@pytest.fixture(scope="module")
def run(digits):
    def run(recipe, path, **options):
        with RunFolder(path, recipe) as folder:
            Experiment(recipe, digits, folder, **options).run()

    return run


def comparable(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    run(TINY, path)
    return path


def test_a_run_leaves_its_rows_models_and_configuration(run, finished):
    rows = read_rows(finished)
    assert [row["run"] for row in rows if row["kind"] == "result"] == [r.name for r in plan(TINY)]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs if row["run"] == "seed0/kd-0.8"] == [1, 2]
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["training"]["batch_size"] == 100
    assert config["sessions"][0]["torch"]
    lt, kd = (load_state(finished / f"seed0/{name}-0.8/final.safetensors") for name in ("lt", "kd"))
    assert lt.keys() == kd.keys()
    for name in lt:
        if name.endswith("indices"):  # the same masks, whatever the loss
            assert lt[name].equal(kd[name])
    assert state_hash(lt) != state_hash(kd)
    assert not list(finished.rglob("training.pt"))


def test_a_result_counts_what_it_stores(finished):
    rows = {row["run"]: row for row in read_rows(finished) if row["kind"] == "result"}
    dense, lt = rows["seed0/dense"], rows["seed0/lt-0.8"]
    assert dense["nnz"] == dense["numel"] == lt["numel"]
    assert lt["nnz"] == lt["numel"] - int(0.8 * lt["numel"])
    assert dense["flops_train"] == dense["flops_train_dense"] == lt["flops_train_dense"]
    assert lt["flops_train"] < 0.5 * lt["flops_train_dense"]
    assert lt["density"]["fc"] == 1.0


def test_a_run_counts_its_teacher_and_its_topology(finished):
    rows = {row["run"]: row for row in read_rows(finished) if row["kind"] == "result"}
    dense, lt, kd = (rows[f"seed0/{name}"] for name in ("dense", "lt-0.8", "kd-0.8"))
    images = 2 * 300
    assert dense["flops_run"] == images * dense["flops_train"]
    assert lt["flops_run"] == images * lt["flops_train"]
    assert kd["flops_run"] == lt["flops_run"] + images * dense["flops_train"] // 3


def test_finished_runs_are_neither_lost_nor_repeated(run, finished):
    before = read_rows(finished)
    run(TINY, finished)
    assert read_rows(finished) == before


def test_more_can_be_asked_for_later(run, finished):
    before = read_rows(finished)
    run(replace(TINY, sparsities=(0.8, 0.9), methods=("lt",)), finished)
    rows = read_rows(finished)
    assert rows[: len(before)] == before
    assert [r["run"] for r in rows[len(before) :] if r["kind"] == "result"] == ["seed0/lt-0.9"]


def test_another_experiment_in_the_same_folder_is_refused(run, finished):
    other = override(TINY, "training.lr=0.2")
    with pytest.raises(CheckpointError, match=r"training\.lr=0\.1, expected 0\.2"):
        run(other, finished)


def test_a_folder_older_than_a_field_is_one_with_its_default(run, finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    del config["recipe"]["sup"], config["recipe"]["training"]["tail"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with RunFolder(tmp_path, TINY):
        pass
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = override(TINY, "sup.drop_fraction=0.1")
    with pytest.raises(CheckpointError, match=r"sup\.drop_fraction=0\.5, expected 0\.1"):
        RunFolder(tmp_path, other).__enter__()


def test_two_processes_in_one_folder_are_refused(run, finished):
    with RunFolder(finished, TINY), pytest.raises(CheckpointError, match="another process"):
        run(run, finished)


def test_a_refused_folder_is_not_left_locked(finished):
    other = replace(TINY, training=replace(TINY.training, lr=0.37))
    refused = RunFolder(finished, other)
    with pytest.raises(CheckpointError) as error, refused:
        pass
    assert "another process" not in str(error.value)
    with RunFolder(finished, TINY):  # `error` still holds the refused attempt
        pass


class StopAfter(StopRequest):
    """Ask for a stop after so many looks at the flag."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGINT if self.left < 0 else None


@pytest.mark.parametrize("looks", [0, 2, 4, 7, 11, 18])
def test_an_interrupted_experiment_ends_with_the_same_rows(run, finished, tmp_path, looks):
    with pytest.raises(Interrupted):
        run(TINY, tmp_path, stop=StopAfter(looks))
    run(TINY, tmp_path)
    names = {planned.name for planned in plan(TINY)}
    expected = [row for row in read_rows(finished) if row["run"] in names]
    assert comparable(read_rows(tmp_path)) == comparable(expected)


def test_a_crash_before_the_last_row_repeats_no_epoch(run, finished, tmp_path, monkeypatch):
    def crash(self, run, model, rows):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_result", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(TINY, tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "epo')
    run(TINY, tmp_path)
    names = {planned.name for planned in plan(TINY)}
    expected = [row for row in read_rows(finished) if row["run"] in names]
    assert comparable(read_rows(tmp_path)) == comparable(expected)


def test_iterative_pruning_runs_and_reports_every_round(run, tmp_path):
    run(replace(TINY, methods=("imp",), sparsities=(0.36,)), tmp_path)
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "result"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.2, 0.36]
    remaining = rows[0]["numel"]
    for row in rows[1:]:
        remaining -= -(-remaining // 5)
        assert row["nnz"] == remaining
    assert rows[1]["epochs"] == 1  # rewound to epoch 1 of 2


def test_the_table_has_a_line_a_method_and_sparsity(finished):
    rows = read_rows(finished)
    cells = {(r["method"], r["sparsity"]) for r in rows if r["kind"] == "result"}
    assert table(rows).row_count == len(cells)


def test_a_collapsed_layer_is_announced(digits, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(Reporter, "message", lambda self, text: messages.append(text))
    recipe = replace(TINY, training=Training(1, batch_size=300), sparsities=(0.9999,))
    with RunFolder(tmp_path, recipe) as folder:
        Experiment(recipe, digits, folder).run()
    assert any("lost every weight" in message for message in messages)
