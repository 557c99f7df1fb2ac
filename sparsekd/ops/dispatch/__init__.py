"""Dispatch: the table of backends, and choices between them, measured and cached."""
