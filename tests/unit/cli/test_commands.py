"""What all commands have in common."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from prefect_mlprojects import deploy
from prefect_mlprojects.cli import group
from prefect_mlprojects.deployments.specification import specify
from prefect_mlprojects.request import OPTIONS, options_of

# They print no data: scripts, pages, other programs' output, or one line about what they did.
_NO_JSON = {
    "blocks register",
    "completion",
    "deployments delete",
    "deployments pause",
    "deployments resume",
    "env path",
    "logs",
    "serve",
    "server start",
    "server stop",
    "ui",
    "worker",
}


def commands(parent: click.Group = group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(parent)
    for name in parent.list_commands(context):
        command = parent.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def names_of(command: click.Command) -> set[str]:
    return {str(each.name) for each in command.params}


def test_commands_that_print_data_have_json() -> None:
    without = {name for name, command in commands() if "as_json" not in names_of(command)}
    # `init` creates files.
    assert without - {"init"} == _NO_JSON


@pytest.mark.parametrize(
    ("name", "missing", "ours"),
    [
        # The progress of a server's start goes to stderr.
        ("deploy", {"announce"}, {"as_json"}),
        # Those of a work pool.
        ("serve", {"announce", "work_pool", "job_variables", "uri"}, {"uris", "limit"}),
    ],
)
def test_command_has_every_argument_of_deploy(name: str, missing: set[str], ours: set[str]) -> None:
    command = dict(commands())[name]
    assert names_of(command) - ours == set(inspect.signature(deploy).parameters) - missing


def test_deploy_takes_what_is_specified() -> None:
    own = set(inspect.signature(specify).parameters) - {"schedule", "options"}
    assert own <= set(inspect.signature(deploy).parameters)


def test_start_and_rerun_have_every_option_of_a_run() -> None:
    found = dict(commands())
    form = {option.name for option in options_of("form")} | {"parameters"}
    assert names_of(found["start"]) == form | {"deployment", "wait", "as_json"}
    assert set(OPTIONS) - {"uri"} <= names_of(found["rerun"])


def complete(words: str, incomplete: str, folder: Path, **variables: str) -> list[str]:
    line = f"mlprojects {words} {incomplete}"
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_MLPROJECTS_SERVER_DIR": str(folder / "server"),
        "_MLPROJECTS_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - (1 if incomplete else 0)),
        **variables,
    }
    command = [sys.executable, "-m", "prefect_mlprojects"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.stderr == ""
    return [each.partition(",")[2] for each in done.stdout.splitlines() if each]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "MLproject").write_text(
        "entry_points:\n  main: {parameters: {alpha: float, beta: int}, command: 'x {alpha} {beta}'}\n  test: {command: y}\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "MLproject").write_text("entry_points: {only: {command: z}}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ("run . -e", "t", ["test"]),
        ("run . -P", "", ["alpha=", "beta="]),
        ("run . -e test -P", "", []),
        ("plan sub -v main -e", "", ["only"]),
        ("deploy . -P", "b", ["beta="]),
        ("run --backend", "k", ["kubernetes"]),
        ("run --env-manager", "v", ["virtualenv"]),
        ("run no-such-folder -e", "", []),
        ("status", "", []),
        ("start", "", []),
        ("worker --pool", "", []),
        ("run --tracking", "", []),
    ],
)
def test_completion_without_server(words: str, incomplete: str, expected: list[str], folder: Path) -> None:
    assert complete(words, incomplete, folder) == expected
    # None was started.
    assert not (folder / "server").exists()


def test_completion_with_unreachable_server_is_quiet(folder: Path, unused_port: int) -> None:
    assert complete("status", "", folder, PREFECT_API_URL=f"http://127.0.0.1:{unused_port}/api") == []
