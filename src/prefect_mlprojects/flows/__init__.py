"""The flow `run_project`."""
