"""A report of an experiment as one page that needs no network: table, figures, configuration."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from sparsekd.dst import METHODS
from sparsekd.plots import COLORS
from sparsekd.recipes.folder import flatten
from sparsekd.recipes.report import LABELS, savings_table, table
from sparsekd.terminal import Columns
from sparsekd.train import Row, write_atomic
from sparsekd.train.optional import need

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2rem auto; padding: 0 1rem;
       color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child, .pairs td {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
.note {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_html(folder: Path, rows: Sequence[Row]) -> Path:
    """Write report.html into the folder of an experiment.

    Args:
        folder: with config.json.
        rows: of the experiment.

    Returns:
        The file.

    Raises:
        UnavailableError: plotly is not installed.
    """
    page = build(json.loads((folder / "config.json").read_bytes()), rows)
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def build(config: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the page of an experiment.

    Args:
        config: the content of its config.json.
        rows: raw rows.
    """
    graphs = need("plotly.graph_objects", "report")
    figures = [
        _accuracy(graphs, rows),
        *(_price(graphs, rows, price) for price in ("flops_run", "seconds")),
        _losses(graphs, rows),
        _density(graphs, rows),
    ]
    shown = [
        # the library goes into the page with the first figure
        figure.to_html(full_html=False, include_plotlyjs=number == 0, default_height="460px")
        for number, figure in enumerate(filter(None, figures))
    ]
    recipe, sessions = config["recipe"], config["sessions"]
    machine = flatten(sessions[-1]) if sessions else {}
    body = [
        f"<p>{escape(recipe.get('description', ''))}</p>",
        _table(savings_table(rows)),
        _table(table(rows)),
        *shown,
        "<h2>Configuration</h2>",
        _pairs(flatten(recipe).items()),
        "<h2>Machine and versions</h2>",
        _pairs(machine.items()),
    ]
    return _PAGE.format(title=escape(f"sparsekd: {recipe['name']}"), body="\n".join(body))


def _table(source: Columns) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in source.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in source.rows
    )
    note = escape(source.note)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'</div><p class="note">{note}</p>'
    )


def _pairs(items: Iterable[tuple[str, Any]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in items
    )
    return f'<div class="wide"><table class="pairs">{lines}</table></div>'


def _figure(graphs: Any, title: str, x: str, y: str, **axis: Any) -> Any:
    return graphs.Figure(
        layout={
            "title": title,
            "template": "plotly_white",
            "colorway": list(COLORS),
            "xaxis": {"title": {"text": x}, **axis},
            "yaxis": {"title": {"text": y}},
        }
    )


def log_ticks(
    values: Iterable[float], label: Callable[[float], str] = "{:g}".format
) -> dict[str, Any]:
    """Return a logarithmic axis with whole labels at one, two and five times a power of ten.

    Plotly's own labels leave out the power: a 2 between 1T and 10T.

    Args:
        values: on the axis; those that are not above 0 are left out.
        label: writes a number.

    Example:
        >>> log_ticks([3, 30])["ticktext"]
        ['1', '2', '5', '10', '20', '50']
    """
    powers = [math.floor(math.log10(value)) for value in values if value > 0] or [0]
    ticks = [s * 10.0**power for power in range(min(powers), max(powers) + 1) for s in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [label(tick) for tick in ticks]}


def _line(number: int) -> dict[str, Any]:
    """Return the style of a line; the first 21 differ."""
    cycle, symbols = number // len(COLORS), ("circle", "square", "triangle-up")
    color = COLORS[number % len(COLORS)]
    return {
        "line": {"color": color, "dash": ("solid", "dash", "dot")[cycle % 3]},
        "marker": {"color": color, "symbol": symbols[cycle % 3]},
    }


def _groups(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """Return the results of the sparse methods: method -> sparsity -> seeds."""
    groups: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "result" and row["method"] in METHODS:
            groups[row["method"]][row["sparsity"]].append(row)
    return {name: dict(sorted(groups[name].items())) for name in METHODS if name in groups}


def _bars(cells: Iterable[list[Row]]) -> dict[str, Any] | None:
    """Return error bars over seeds, none where there is one seed."""
    accuracies = [[row["test_accuracy"] for row in group] for group in cells]
    if all(len(group) == 1 for group in accuracies):
        return None
    spread = [statistics.stdev(group) if len(group) > 1 else 0 for group in accuracies]
    return {"type": "data", "array": spread}


def _dense(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "result" and row["method"] == "dense"]


def _accuracy(graphs: Any, rows: Sequence[Row]) -> Any:
    groups, dense = _groups(rows), _dense(rows)
    if not groups:
        return None
    ticks = sorted({sparsity for cells in groups.values() for sparsity in cells})
    figure = _figure(
        graphs, "Accuracy after the last epoch", "sparsity", "test accuracy", tickvals=ticks
    )
    for number, (name, cells) in enumerate(groups.items()):
        figure.add_scatter(
            **_line(number),
            x=list(cells),
            y=[statistics.mean(row["test_accuracy"] for row in group) for group in cells.values()],
            error_y=_bars(cells.values()),
            name=LABELS[name],
            mode="lines+markers",
        )
    if dense:
        level = statistics.mean(row["test_accuracy"] for row in dense)
        figure.add_hline(y=level, line_dash="dash", annotation_text="dense")
    figure.update_yaxes(tickformat=".1%")
    return figure


def _price(graphs: Any, rows: Sequence[Row], price: str) -> Any:
    groups, dense = _groups(rows), {row["seed"]: row for row in _dense(rows)}
    results = [row for row in rows if row["kind"] == "result"]
    if not groups or not all(price in row for row in results):
        return None
    title = {"flops_run": "training FLOPs", "seconds": "training time in seconds"}[price]
    figure = _figure(graphs, "Accuracy and what it took", title, "test accuracy")
    for number, (name, cells) in enumerate(groups.items()):
        extra = dense if METHODS[name].needs_dense else {}
        cost = [
            statistics.mean(
                row[price] + (extra[row["seed"]][price] if row["seed"] in extra else 0)
                for row in group
            )
            for group in cells.values()
        ]
        figure.add_scatter(
            **_line(number),
            x=cost,
            y=[statistics.mean(row["test_accuracy"] for row in group) for group in cells.values()],
            text=[f"sparsity {sparsity:g}" for sparsity in cells],
            error_y=_bars(cells.values()),
            name=LABELS[name] + (" + dense run" if extra else ""),
            mode="lines+markers",
        )
    if dense:
        figure.add_scatter(
            x=[statistics.mean(row[price] for row in dense.values())],
            y=[statistics.mean(row["test_accuracy"] for row in dense.values())],
            name="dense",
            mode="markers",
            marker={"symbol": "star", "size": 11, "color": "#666"},
        )
    costs = [cost for trace in figure.data for cost in trace.x]
    label = EngFormatter() if price == "flops_run" else "{:g}".format  # 2 T
    figure.update_xaxes(**log_ticks(costs, label))
    figure.update_yaxes(tickformat=".1%")
    return figure


def _losses(graphs: Any, rows: Sequence[Row]) -> Any:
    first = min((row["seed"] for row in rows if row["kind"] == "result"), default=0)
    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "epoch" and row["run"].startswith(f"seed{first}/"):
            curves[row["run"]].append(row)
    if not curves:
        return None
    figure = _figure(graphs, "Training loss, first seed", "epoch", "loss of the run's objective")
    for number, (run, points) in enumerate(curves.items()):
        figure.add_scatter(
            line=_line(number)["line"],
            x=[point["epoch"] for point in points],
            y=[point["train_loss"] for point in points],
            name=run.partition("/")[2],
            mode="lines",
        )
    figure.update_yaxes(**log_ticks(loss for trace in figure.data for loss in trace.y))
    return figure


def _density(graphs: Any, rows: Sequence[Row]) -> Any:
    groups = _groups(rows)
    if not groups:
        return None
    figure = _figure(graphs, "Density of each layer at the end, first seed", "", "density")
    lines = ((name, sparsity, group) for name in groups for sparsity, group in groups[name].items())
    for number, (name, sparsity, group) in enumerate(lines):
        density = group[0]["density"]
        figure.add_scatter(
            **_line(number),
            x=list(density),
            y=[value or None for value in density.values()],
            name=f"{LABELS[name]}, {sparsity:g}",
            mode="lines+markers",
        )
    figure.update_yaxes(type="log", dtick=1)
    return figure
