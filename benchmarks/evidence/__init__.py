"""Studies that ask whether methods do what their papers say, on fresh seeds."""
