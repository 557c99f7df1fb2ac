"""The backend "semi_structured": torch's kernels for weights that are 2:4."""
