"""The page of an experiment: everything in one file, and it opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekd.errors import UnavailableError
from sparsekd.recipes.html import build, log_ticks, write_html
from sparsekd.recipes.report import read_rows

COMPARE = Path(__file__).parents[2] / "docs/results/compare"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("plotly", reason="draws the figures")
    folder = tmp_path_factory.mktemp("page")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(COMPARE / name, folder)
    return write_html(folder, read_rows(folder))


def test_the_page_has_all_parts_and_needs_no_network(page):
    text = page.read_text()
    for part in ("KD ticket", "91.27% ± 0.14", "training.batch_size", "Machine and versions"):
        assert part in text
    assert text.count('class="plotly-graph-div"') == 5
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?http", text)


def test_labels_of_logarithmic_axes_are_whole_numbers(page):
    assert log_ticks([2e12, 9e12])["tickvals"] == [1e12, 2e12, 5e12]
    assert log_ticks([])["ticktext"] == ["1", "2", "5"]
    assert '"ticktext":["1 T","2 T","5 T"' in page.read_text()


def test_text_of_a_run_is_text(page):
    config = json.loads((COMPARE / "config.json").read_text())
    config["recipe"]["description"] = "<script>alert(1)</script>"
    built = build(config, read_rows(COMPARE))
    assert "<script>alert(1)" not in built
    assert "&lt;script&gt;alert(1)" in built


def test_a_browser_draws_every_figure(page):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium, as Debian's package chromium")
    dump = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert dump.stdout.count('class="main-svg"') >= 5


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsekd\[report\]'"):
        build({"recipe": {"name": "x"}, "sessions": []}, [])
