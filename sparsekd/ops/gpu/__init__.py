"""Shared by both GPU backends: validated structures, and the plans that kernels read."""
