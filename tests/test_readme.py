"""The README's Python runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]


def test_the_ten_lines_train_a_sparse_model():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    import sparsekd as skd

    layers = [module for _, module in skd.nn.sparse_modules(scope["model"])]
    assert sum(layer.topology.nnz for layer in layers) == round(0.1 * 270_608)
    assert any(layer.topology.version > 0 for layer in layers)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_resolve(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target
