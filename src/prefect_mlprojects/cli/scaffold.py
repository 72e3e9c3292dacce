"""``mlprojects init``: makes a project of a script."""

from __future__ import annotations

import os
from pathlib import Path

import click

from prefect_mlprojects.cli.tables import say


@click.command("init")
@click.argument("script", required=False, type=click.Path(path_type=Path))
@click.option("--name", help="The project's name; by default that of its folder.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--dry-run", is_flag=True, help="Print the files; write nothing.")
def init_command(script: Path | None, name: str | None, force: bool, dry_run: bool) -> None:
    """Write an MLproject file for SCRIPT: entry points from its argparse, click or typer options.

    SCRIPT is a Python file, or a folder with a main.py, a train.py or one script; by default this folder. A python_env.yaml lists
    the packages that it imports, unless there is an environment file. The script is read, not run.
    """
    from prefect_mlprojects._support.files import is_within
    from prefect_mlprojects.environments.activation import environment_without_ours, own_environment
    from prefect_mlprojects.scaffold import find_script, scaffold

    script = script or Path()
    folder = script if script.is_dir() else None
    if folder is not None:
        script = find_script(folder)
    elif folder is None:
        folder = Path() if is_within(script, Path()) else script.parent
    # The versions are those of the caller's environment: ours has other packages.
    active = "VIRTUAL_ENV" in os.environ or "CONDA_PREFIX" in os.environ
    environ = dict(os.environ) if active else environment_without_ours(os.environ, own_environment())
    made = scaffold(script, folder, name, environ)
    for note in made.notes:
        say(f"Note: {note}", err=True)
    if dry_run:
        for file, text in made.files.items():
            say(f"--- {file}\n{text}", nl=False)
        return
    made.write(overwrite=force)
    for file in made.files:
        say(f"Wrote {folder / file}", err=True)
    say(f"Next: mlprojects describe {folder}, then mlprojects run {folder}", err=True)
