"""Runs projects as one-time runs of a Databricks workspace."""
