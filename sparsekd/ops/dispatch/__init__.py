"""Who runs an op: the table of backends, and choices that are measured and kept."""
