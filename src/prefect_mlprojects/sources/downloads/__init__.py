"""Remote files of `path` parameters."""
