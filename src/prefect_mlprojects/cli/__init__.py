"""The command ``mlprojects``: its commands, and how errors become messages and exit codes.

A command's modules are imported when it is used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import codecs
import importlib
import io
import os
import sys
from typing import Any

import click

from prefect_mlprojects.cli.tables import say
from prefect_mlprojects.exceptions import ExecutionException

_COMMANDS = {
    "blocks": ("resources", "Manage this package's blocks on the Prefect server."),
    "cancel": ("runs", "Cancel a run and wait until it has ended."),
    "completion": ("completion", "Print the completion script of a shell."),
    "databricks": ("backends", "Manage the files of runs in a Databricks workspace."),
    "deploy": ("deployments", "Deploy a project: schedules, and a typed form in Prefect's UI."),
    "deployments": ("deployments", "List, pause, resume and delete deployments."),
    "describe": ("inspection", "List a project's entry points and their parameters."),
    "docker": ("backends", "Manage the containers of runs."),
    "env": ("resources", "Manage the cached environments."),
    "init": ("scaffold", "Write an MLproject file for a script."),
    "kubernetes": ("backends", "Manage the Jobs of runs on a Kubernetes cluster."),
    "logs": ("runs", "Print the log of a run."),
    "plan": ("inspection", "Show what a run would do, without running it."),
    "rerun": ("rerun", "Run a project again as an earlier run did."),
    "run": ("runs", "Run a project."),
    "runs": ("history", "List the latest runs."),
    "serve": ("deployments", "Deploy projects and run them in this process, without a work pool."),
    "server": ("resources", "Manage the embedded Prefect server."),
    "start": ("deployments", "Start a run of a deployment."),
    "status": ("history", "Print the status of a run, why, and where to look."),
    "ui": ("resources", "Start MLflow's UI for the current tracking store."),
    "validate": ("inspection", "Check a project file, and parameter values for it."),
    "wait": ("runs", "Wait for a run to end."),
    "worker": ("deployments", "Start a worker that runs deployments on this machine."),
}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"prefect_mlprojects.cli.{entry[0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from prefect_mlprojects._support.text import nearest

            near = nearest(args[0], _COMMANDS)
            hint = f" Did you mean {near!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in sorted(_COMMANDS.items())])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="prefect-mlprojects")
def group() -> None:
    """Run any MLflow-Projects project (MLproject) as a Prefect flow."""


_ASCII = {"…": "...", "✓": "+", "✗": "x", "■": "#"}


def _replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces what a terminal's encoding lacks: our own characters by ASCII ones, others by a backslash escape."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    shown = (_ASCII.get(each) or each.encode("ascii", "backslashreplace").decode() for each in text)
    return "".join(shown), error.end


def _print_in_any_encoding() -> None:
    codecs.register_error("mlprojects", _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mlprojects")


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line and exits: 0 finished, 1 failed, 2 usage or bad input, 130 cancelled."""
    _print_in_any_encoding()
    try:
        code = group.main(args=arguments, prog_name="mlprojects", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ExecutionException as error:
        say(f"Error: {error.message}", err=True)
        code = error.exit_status
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output has exited (`| head`); without this Python prints a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
