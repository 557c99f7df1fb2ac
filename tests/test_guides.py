"""The guides run as printed, from top to bottom."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
_ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
_BLOCK = re.compile(r"^```(python|sh)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def runnable(heading: str) -> bool:
    package = heading.strip().removeprefix("needs ")
    return not package or importlib.util.find_spec(package) is not None


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=_ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def script(page: Path) -> str:
    """Return a page as a program: its Python, and its commands where they stand."""
    lines = ["from sparsekd.cli import app"]
    for package in ("transformers", "torchvision", "lightning"):
        if f"needs {package}" in page.read_text() and runnable(f"needs {package}"):
            lines += ["from tools.packages import load_package", f"load_package({package!r})"]
    for language, heading, text in _BLOCK.findall(page.read_text()):
        if not runnable(heading):
            lines.append(f"print('left out: this block {heading.strip()}')")
        elif language == "python":
            lines.append(text)
        else:
            for command in text.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "sparsekd"
                lines.append(f"assert not app({arguments!r}, standalone_mode=False)")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_a_guide_runs(page, tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "guide.py").write_text(script(page))
    printed = run("guide.py", folder=tmp_path)
    left_out = set(re.findall("left out: this block needs (.*)", printed))
    if left_out:
        pytest.skip(f"all but the blocks that need {', '.join(sorted(left_out))} has run")


def test_there_are_guides():
    assert {page.stem for page in GUIDES} >= {"choose", "deploy", "your-own-model"}
