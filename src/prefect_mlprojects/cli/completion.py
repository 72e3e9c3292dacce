"""``mlprojects completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: add `eval "$(mlprojects completion bash)"` to ~/.bashrc.
    """
    from prefect_mlprojects.cli.app import group

    completion = get_completion_class(shell)
    if completion is None:
        raise click.ClickException(f"There is no completion for {shell}.")
    click.echo(completion(group, {}, "mlprojects", "_MLPROJECTS_COMPLETE").source())
