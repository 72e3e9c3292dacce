"""The embedded Prefect server, and access to the API of any Prefect server."""
