"""The studies' settings, the tables made of rows, and a study run in two calls."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.evidence import figure, summary
from benchmarks.evidence.__main__ import main, pooled, run_study, run_wall, train
from benchmarks.evidence.studies import EQUAL_FLOPS, STUDIES, Study
from sparsekd import flops, models
from sparsekd.data import load
from sparsekd.dst import Dynamics
from sparsekd.recipes import DataChoice, ModelChoice, Recipe, plan
from sparsekd.sparsity import allocate
from sparsekd.tickets import maskable
from sparsekd.train import Interrupted, Reporter, StopRequest, Training


@pytest.mark.parametrize("name", STUDIES)
def test_settings_are_of_fresh_seeds_and_answer_their_question(name):
    study = STUDIES[name]
    for recipe in study.columns.values():
        seeds = 5 if recipe.model.name == "lenet300_100" else 3
        assert (recipe.first_seed, recipe.seeds) == (3, seeds)
        assert not recipe.training.augment
    for pair in study.pairs:
        (a, m), (b, n) = map(summary.column, pair)
        assert m in study.columns[a].methods
        assert n in study.columns[b].methods
        assert len(study.columns[a].sparsities) == len(study.columns[b].sparsities)


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("superposed")])
def test_hosts_are_trained_as_with_cycles_and_annealed_further(name):
    for column, recipe in STUDIES[name].columns.items():
        if column.endswith("annealed"):
            rates = [recipe.training.learning_rate(e) for e in (0, recipe.training.epochs - 1)]
            assert rates == pytest.approx([0.1, 0.001])
        else:
            steps = -(-recipe.data.train_images // recipe.training.batch_size)
            cycles = recipe.sup.cycles(recipe.training.epochs, steps)
            assert cycles.count == 3
            host_end = (cycles.first_phase - 1) / steps
            assert recipe.training.learning_rate(host_end) == pytest.approx(0.01)
            assert recipe.sup.with_host(0.01, 0.1).lr == pytest.approx((0.01, 0.05))
            if "resnet" in name or "wrn" in name:
                assert cycles.cycle_steps >= 1000


def test_uniform_masks_cost_what_erk_does():
    model = models.build("resnet20", num_classes=10, in_channels=1)
    cost = flops.count(model, (1, 1, 7, 7))
    recipe = STUDIES["reproduced"].columns["erk"]
    layers = maskable(model, "all", recipe.skip)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    for sparsity, equal in zip(recipe.sparsities, EQUAL_FLOPS, strict=True):
        erk = cost.at(allocate(shapes, sparsity, "erk")).forward
        uniform = cost.at(allocate(shapes, equal, "uniform")).forward
        assert uniform == pytest.approx(erk, rel=0.002)


@pytest.fixture
def study():
    recipe = Recipe(
        "evidence",
        "",
        DataChoice("digits", train_images=200),
        ModelChoice("lenet300_100"),
        Training(1, batch_size=50, augment=False),
        dynamics=Dynamics(every=1),
        methods=("static", "rigl"),
        sparsities=(0.9, 0.95),
        seeds=2,
        first_seed=3,
        layers="all",
    )
    columns = {"one": recipe, "two": replace(recipe, sparsities=(0.8, 0.9), methods=("rigl",))}
    return Study("?", columns, (("one/rigl", "one/static"), ("one/rigl", "two/rigl")))


def test_pooled_images_are_means_of_patches_in_every_split():
    data = load("digits", val_fraction=0.1)
    small = pooled(data, 4)
    assert small.input_shape == (1, 2, 2)
    for name in ("train", "val", "test"):
        whole, split = getattr(data, name), getattr(small, name)
        patch = whole.images[3, 0, 4:8, 0:4].double().mean()
        assert split.images.shape == (len(whole), 1, 2, 2)
        assert split.images[3, 0, 1, 0].item() == pytest.approx(patch.item())
        assert torch.equal(split.labels, whole.labels)
    assert pooled(data, 1) is data
    assert len(pooled(replace(data, val=data.val.subset(torch.arange(0))), 2).val) == 0


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_study_goes_on_where_it_stopped_and_pairs_seeds(study, tmp_path, stop_at):
    run = partial(train, data_dir=None, reporter=Reporter())
    with pytest.raises(Interrupted):
        run_study("s", study, tmp_path, partial(run, stop=stop_at(9)))
    order = []

    def train_noted(recipe, folder, pool):
        order.append((folder.name, recipe.seeds))
        run(recipe, folder, pool, stop=StopRequest())

    run_study("s", study, tmp_path, train_noted)
    assert order == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]  # pairs before more seeds
    rows = rows_of(tmp_path)
    assert len(rows) == sum(len(plan(recipe)) for recipe in study.columns.values()) == 12
    run_study("s", study, tmp_path, partial(run, stop=StopRequest()))
    assert rows_of(tmp_path) == rows
    page = (tmp_path / "README.md").read_text()
    assert "have finished" not in page
    partial_page = summary.page("s", study, rows[:5])
    assert "**5 of 12 runs have finished;**" in partial_page
    by = {(r["column"], r["method"], r["sparsity"], r["seed"]): r["test_accuracy"] for r in rows}
    for first, second, s, t in (
        ("one/rigl", "one/static", 0.95, 0.95),
        ("one/rigl", "two/rigl", 0.95, 0.9),  # the second sparsity of each
    ):
        differences = [
            100 * (by[*summary.column(first), s, seed] - by[*summary.column(second), t, seed])
            for seed in (3, 4)
        ]
        line = next(x for x in page.splitlines() if f"| {first} less {second} | {s}" in x)
        assert ", ".join(f"{d:+.2f}" for d in differences) in line
        assert f"| {sum(d > 0 for d in differences)} of 2 |" in line
    assert (tmp_path / "differences.png").stat().st_size > 1000


def test_page_and_figure_are_drawn_again_from_rows_alone(tmp_path):
    rows = [
        {"kind": "result", "column": column, "method": method, "sparsity": 0.98, "seed": seed}
        | {"test_accuracy": accuracy + seed / 100, "sparsity_whole": 0.97}
        for column, method, accuracy in (
            *(("moved", "set", 0.8), ("moved", "sup-set", 0.81)),
            ("moved-annealed", "set", 0.82),
        )
        for seed in (3, 4)
    ]
    for row in rows:
        if row["method"] == "sup-set":
            row |= {"ticket_test_accuracies": [0.7, 0.72 + row["seed"] / 100]}
            row |= {"union_density": 0.03}
    folder = tmp_path / "superposed"
    folder.mkdir()
    summary.write(rows, folder / "rows.jsonl")
    main(["superposed", "--draw", "--out", str(tmp_path)])
    page = (folder / "README.md").read_text()
    assert "| moved/sup-set less moved/set | 0.98 | +1.00 ± 0.00 | +1.00, +1.00 | 2 of 2 |" in page
    assert "| moved/sup-set less moved-annealed/set | 0.98 | -1.00 ± 0.00 |" in page
    assert "| moved | Sup (SET) | 0.98 | 70.00, 75.50 | 84.50 | 0.0300 |" in page
    found = figure.differences(STUDIES["superposed"], rows)
    (axes,) = found.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "moved: Sup (SET) less SET",
        "moved: Sup (SET) less moved-annealed: SET",
    ]
    means = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 1]
    assert np.concatenate(means) == pytest.approx([1, -1])
    assert figure.differences(STUDIES["moving"], rows) is None


def test_time_is_measured_by_both_kinds_of_kernels(study, tmp_path, capsys):
    short = replace(study, columns={"one": replace(study.columns["one"], sparsities=(0.9,))})
    run = partial(train, data_dir=None, reporter=Reporter(), stop=StopRequest())
    run_wall("s", short, tmp_path, run)
    rows = rows_of(tmp_path)
    assert [row["backend"] for row in rows] == ["sparse"] * 2 + ["dense"] * 2
    forced = json.loads((tmp_path / "dense/one/config.json").read_text())["sessions"][0]["forced"]
    assert forced == "dense"
    assert "| RigL | 0.9 |" in capsys.readouterr().out
    run_wall("s", study, tmp_path / "longer", run, epochs=2)
    assert {row["epochs"] for row in rows_of(tmp_path / "longer")} == {2}
    table = summary.times(
        [row | {"seconds": 2 if row["backend"] == "dense" else 1} for row in rows]
    )
    assert table.splitlines()[-2:] == [
        "| RigL | 0.9 | 1.0 | 2.0 | 2.00 |",
        "| all |  | 2.0 | 4.0 | 2.00 |",
    ]


def test_short_studies_keep_their_methods():
    for study in STUDIES.values():
        for name, recipe in study.shortened().columns.items():
            assert recipe.methods == study.columns[name].methods
            assert recipe.sup.tail(recipe.training.epochs) == 1


@pytest.mark.parametrize("options", [["--epochs", "2"], ["--wall", "--epochs", "0"]], ids=str)
def test_the_length_of_a_study_is_that_of_its_settings(options, capsys):
    with pytest.raises(SystemExit):
        main(["moving", *options])
    assert "--epochs: expected at least 1, and --wall" in capsys.readouterr().err
