"""Benchmarks of the sparse kernels against dense torch on the same masks: `sparsekd bench`.

The results of every competitor are compared with dense torch's before it is timed, the competitors
of a case take turns in one process, every row names the machine, and tables and figures are made
from rows alone. `benchmarks/` in the repository builds on this for the published figures.
"""
