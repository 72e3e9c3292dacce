"""``mlprojects databricks clean``: what runs left in a workspace."""

from __future__ import annotations

import click


@click.group("databricks")
def databricks_command() -> None:
    """Manage what runs leave in a Databricks workspace."""


@databricks_command.command("clean")
@click.option("--profile", help="The profile of ~/.databrickscfg; by default the environment's credentials.")
@click.option("--code-path", help="The code-path of the backend configuration; by default the user's own folder.")
@click.option("--older-than", type=click.FloatRange(min=0), default=30, show_default=True, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
def clean(profile: str | None, code_path: str | None, older_than: float, dry_run: bool) -> None:
    """Remove uploaded code and output that is older than some days; a run under way needs its code only at its start."""
    from prefect_mlprojects.backends.databricks.cleaning import clean_workspace
    from prefect_mlprojects.backends.databricks.config import parse_databricks_config

    config = parse_databricks_config({"profile": profile, "code-path": code_path})
    removed = clean_workspace(config, days=older_than, dry_run=dry_run)
    for path in removed:
        click.echo(f"{'Would remove' if dry_run else 'Removed'} {path}")
    click.echo(f"{len(removed)} files and folders.")
