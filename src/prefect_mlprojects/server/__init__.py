"""The embedded Prefect server and the way to its API."""
