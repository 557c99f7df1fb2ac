"""The bounds that docs/gpu.md prints are those that the script computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_what_the_script_prints() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_roofline.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("tile_product") >= 4
    assert printed.strip() in (ROOT / "docs" / "gpu.md").read_text()
