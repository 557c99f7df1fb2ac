"""The arena: everything behind docs/performance.md, `python -m benchmarks.arena`.

It is `sparsekd bench` with other packages among the competitors and more levels: the roofs of the
machine, single passes, epochs, profiles of a step, memory.
"""
