"""Run the command line as ``python -m sparsekd``."""

from __future__ import annotations

from sparsekd.cli import main

if __name__ == "__main__":
    main()
