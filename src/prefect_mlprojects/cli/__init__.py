"""The command ``mlprojects``. Nothing heavy is imported until a command needs it, so that ``--help`` answers at once."""

from prefect_mlprojects.cli.app import main

__all__ = ["main"]
