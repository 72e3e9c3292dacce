"""The tasks of a run and what they share; imports Prefect only where a task is defined."""
