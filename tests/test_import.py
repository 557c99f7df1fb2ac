"""What `import sparsekd` brings along, and what waits until it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekd as skd

COUNT = """
import torch
values, x = torch.ones(6), torch.ones(4, 3)
topology = skd.Topology.from_mask(torch.ones(2, 3, dtype=torch.bool))
with FlopCounterMode(display=False) as counter:
    skd.functional.linear(topology, values, x)
assert counter.get_total_flops() == 2 * 6 * 4, counter.get_total_flops()
"""


def run(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(skd.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_import_takes_only_what_layers_need() -> None:
    run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import sparsekd\n"
        "new = set(sys.modules) - before\n"
        "heavy = {'triton', 'rich', 'safetensors', 'torch.utils.flop_counter', 'sparsekd.train',\n"
        "         'sparsekd.data', 'sparsekd.dst', 'sparsekd.tickets', 'sparsekd.diagnose'}\n"
        "assert not heavy & new, heavy & new"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsekd as skd\nfrom torch.utils.flop_counter import FlopCounterMode",
        "from torch.utils.flop_counter import FlopCounterMode\nimport sparsekd as skd",
    ],
    ids=["before", "after"],
)
def test_torchs_counter_knows_the_ops_whichever_is_imported_first(imports: str) -> None:
    run(imports + COUNT)


def test_every_public_name_is_there_in_a_new_process() -> None:
    run(
        "import sparsekd as skd\n"
        "assert set(skd.__all__) <= set(dir(skd))\n"
        "assert all(getattr(skd, name) is not None for name in skd.__all__)\n"
        "assert skd.train.Trainer and skd.kd_loss is skd.tickets.kd_loss"
    )


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sparsfy'"):
        skd.sparsfy  # noqa: B018
