"""The table of methods, and the page that adds one to it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekd
from sparsekd.dst import METHODS, SNFS, Method, RigL, find_method
from sparsekd.recipes.report import read_rows

DOCS = Path(__file__).parents[2] / "docs"


def test_a_row_agrees_with_its_class():
    with pytest.raises(ValueError, match="expected updates or steps for x, got never"):
        Method("x", "X", RigL, "random")
    with pytest.raises(ValueError, match="expected never or partly for x, got updates"):
        Method("x", "X", dense_gradients="updates")
    assert METHODS["snfs"].updater is SNFS
    assert METHODS["snfs"].dense_gradients == "steps"


def test_names_are_found_in_their_long_form_and_corrected():
    assert find_method("kd-ticket") is find_method("kd") is METHODS["kd"]
    with pytest.raises(ValueError, match="did you mean granet"):
        find_method("grannet")


def test_the_page_of_methods_names_every_row():
    table = (DOCS / "methods.md").read_text().partition("| name | starts with | then |")[2]
    table = table.partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table)) == {"dense", *METHODS}


def test_the_page_adds_a_method_that_runs_by_name(tmp_path):
    page = (DOCS / "adding-a-method.md").read_text()
    file, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    own = tmp_path / "sparsekd"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(sparsekd.__file__).parent, own, copy_function=os.symlink, ignore=ignored)

    (path,) = re.findall(r"all of `sparsekd/(\S+)`", page)
    (own / path).write_text(file)
    add_row(own / "dst" / "registry.py", *row.split("\n\n"))

    program, *arguments = shlex.split(command)
    assert program == "sparsekd"
    result = subprocess.run(
        [sys.executable, "-m", program, *arguments, "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Half and half" in result.stdout
    (finished,) = [row for row in read_rows(tmp_path / "run") if row["kind"] == "result"]
    (epoch,) = [row for row in read_rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert finished["method"] == "half-and-half"
    assert epoch["updates"] > 0
    assert finished["flops_run"] > epoch["flops"]  # the dense gradients of its updates


def add_row(registry: Path, imports: str, row: str) -> None:
    text = registry.read_text()
    registry.unlink()  # a link to the package's own
    text = text.replace("from sparsekd.dst.itop", f"{imports}\nfrom sparsekd.dst.itop", 1)
    comment = "        # topologies that move\n"
    assert comment in text
    registry.write_text(text.replace(comment, comment + row))
