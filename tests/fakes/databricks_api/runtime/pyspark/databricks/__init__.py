"""Older runtimes have no `databricks.sdk`: this package without it stands before the installed one."""
