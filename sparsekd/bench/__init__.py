"""The arena: sparse kernels against dense torch and other packages, on the same masks.

`sparsekd bench` is its command line. An arm's results are held against dense torch before it is
timed; the arms of a case take turns in one process; every row names the machine; figures and tables
are made from rows alone.
"""

from __future__ import annotations

from sparsekd.bench.machine import describe, keep_choices
from sparsekd.bench.plan import LEVELS, Plan, is_ours, on_device
from sparsekd.bench.results import Results
from sparsekd.bench.runner import run

__all__ = ["LEVELS", "Plan", "Results", "describe", "is_ours", "keep_choices", "on_device", "run"]
