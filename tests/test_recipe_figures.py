"""Figures show what the rows say, and nothing where the rows say nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.image import imread

from sparsekd.recipes.figures import accuracy_figure, density_figure, draw, loss_figure

LABELS = {"lt": "LT", "kd": "KD ticket"}


def result(method, sparsity, seed, accuracy):
    density = {"conv1": 1 - sparsity / 2, "conv2": 1 - sparsity, "fc": 1.0}
    return {
        "kind": "result",
        "run": f"seed{seed}/{method}-{sparsity}",
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "test_accuracy": accuracy,
        "density": density,
    }


@pytest.fixture
def rows():
    results = [
        *(result("dense", 0.0, seed, 0.95) for seed in (0, 1)),
        *(result("lt", s, seed, 0.9 - s / 10 + seed / 50) for s in (0.8, 0.9) for seed in (0, 1)),
        *(result("kd", s, seed, 0.92 - s / 10 + seed / 50) for s in (0.8, 0.9) for seed in (0, 1)),
    ]
    epochs = [
        {"kind": "epoch", "run": row["run"], "epoch": epoch, "train_loss": 1 / epoch}
        | {"train_accuracy": 1 - 1 / (epoch + 1)}
        for row in results
        for epoch in (1, 2, 3)
    ]
    return epochs + results


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_accuracy_is_the_mean_over_seeds_with_its_spread(rows):
    axes = accuracy_figure(of(rows, "result"), LABELS).axes[0]
    lt, kd = axes.containers
    assert lt.lines[0].get_ydata() == pytest.approx([0.83, 0.82])
    assert kd.lines[0].get_ydata() == pytest.approx([0.85, 0.84])
    (spread,) = lt.lines[2]
    low, high = spread.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.02 / 2**0.5)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.8", "0.9"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "LT",
        "KD ticket",
        "dense",
    }
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_loss_curves_have_a_panel_a_sparsity_of_the_first_seed(rows):
    figure = loss_figure(of(rows, "result"), of(rows, "epoch"), LABELS)
    assert len(figure.axes) == 4  # loss above accuracy, two sparsities
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["dense", "LT", "KD ticket"]
        assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)


def test_density_has_a_line_a_sparsity_over_all_layers(rows):
    axes = density_figure(of(rows, "result")).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [
        pytest.approx([0.6, 0.2, 1.0]),
        pytest.approx([0.55, 0.1, 1.0]),
    ]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["conv1", "conv2", "fc"]


def test_files_are_images_with_something_on_them(rows, tmp_path):
    files = draw(rows, tmp_path / "figures", LABELS)
    assert [file.name for file in files] == [
        "accuracy_vs_sparsity.png",
        "loss_curves.png",
        "density_per_layer.png",
    ]
    for file in files:
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02


def test_a_dense_run_alone_has_loss_curves_only(rows, tmp_path):
    dense = [row for row in rows if "dense" in row["run"]]
    assert [file.name for file in draw(dense, tmp_path, LABELS)] == ["loss_curves.png"]


def test_many_sparsities_stay_readable():
    rates = [round(1 - 0.8**k, 4) for k in range(1, 17)]
    results = [result("lt", rate, 0, 0.9) for rate in rates]
    figure = accuracy_figure(results, LABELS)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x1 for a, b in pairwise(boxes))
    assert len(density_figure(results).axes[0].lines) == 6
