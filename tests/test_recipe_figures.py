"""Figures show what the rows say, and nothing where the rows say nothing."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from sparsekd.errors import UnsupportedError
from sparsekd.plots import parse_formats
from sparsekd.recipes.figures import (
    accuracy_figure,
    density_figure,
    draw,
    loss_figure,
    price_figure,
)

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


def priced(rows, **costs):
    return [row | costs for row in of(rows, "result")]


def test_one_seed_has_no_error_bars(rows):
    single = [row for row in priced(rows, seconds=90.0) if row["seed"] == 0]
    for figure in (accuracy_figure(single, LABELS), price_figure(single, LABELS, (), "seconds")):
        assert not any(container.has_yerr for container in figure.axes[0].containers)
    several = price_figure(priced(rows, seconds=90.0), LABELS, (), "seconds")
    assert several.axes[0].containers[0].has_yerr


def test_points_along_a_line_of_prices_say_their_sparsity(rows):
    figure = price_figure(priced(rows, flops_run=2.5e13), LABELS, (), "flops_run")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.8", "0.9"] * 2
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axes.get_xticklabels(which="major")]
    assert "20 T" in labels
    assert not any("10^" in label for label in labels)
    assert not any(text.get_text() for text in axes.get_xticklabels(minor=True))


def test_points_at_one_place_share_a_label(rows):
    tickets = [row for row in of(rows, "result") if row["method"] == "lt"]
    twins = [row | {"method": method} for row in tickets for method in ("lt", "kd")]
    twins = [row | {"flops_run": 1e13 / (1 - row["sparsity"])} for row in twins]
    axes = price_figure(twins, LABELS, (), "flops_run").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.8", "0.9"]


@pytest.mark.parametrize("dpi", [100, 150])
def test_no_label_covers_another_one_or_a_point(dpi):
    labels = {f"m{number}": f"method {number}" for number in range(12)}
    results = [
        result(method, sparsity, seed, 0.9 - sparsity**8 / 9 + number / 3000 + seed / 500)
        | {"flops_run": (1.5 - sparsity) * (1 + (number % 4) / 40) * 1e13}
        for number, method in enumerate(labels)
        for sparsity in (0.8, 0.9, 0.95, 0.98)
        for seed in (0, 1)
    ]
    figure = price_figure(results, labels, (), "flops_run")
    figure.set_dpi(dpi)  # files are finer than what is drawn first
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert len(axes.texts) == 48  # crowded, and still each point has its label
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)] == []
    points = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    inside = [box for box in boxes for x, y in np.concatenate(points) if box.contains(x, y)]
    assert inside == []
    assert all((axes.bbox.min <= box.min).all() for box in boxes)
    assert all((axes.bbox.max >= box.max).all() for box in boxes)


def test_the_density_figure_names_the_method_that_it_shows(rows):
    axes = density_figure(of(rows, "result"), LABELS).axes[0]
    assert axes.get_title() == "Density per layer at the end, LT"
    mixed = [result("lt", 0.8, 0, 0.9), result("kd", 0.9, 0, 0.9)]
    axes = density_figure(mixed, LABELS).axes[0]
    assert [line.get_label() for line in axes.lines] == [
        "sparsity 0.8, LT",
        "sparsity 0.9, KD ticket",
    ]


def test_no_legend_is_wider_than_its_figure(rows):
    labels = {f"m{n}": f"a method with a long name {n}" for n in range(9)}
    results = [result(name, 0.9, 0, 0.9) for name in labels]
    epochs = [
        {"kind": "epoch", "run": r["run"], "epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5}
        for r in results
    ]
    figure = loss_figure(results, epochs, labels)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1


def test_figures_come_in_the_formats_asked_for(rows, tmp_path):
    files = draw(rows, tmp_path, LABELS, formats=parse_formats("pdf,svg"))
    assert {file.suffix for file in files} == {".pdf", ".svg"}
    assert all(file.stat().st_size > 1000 for file in files)
    assert "<text" in (tmp_path / "loss_curves.svg").read_text()  # not outlines of letters
    with pytest.raises(UnsupportedError, match="expected some of png, pdf, svg, got 'gif'"):
        parse_formats("gif")
