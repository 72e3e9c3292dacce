"""What all commands have in common."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

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
    # What it reads belongs to `parameters`.
    return {str(each.name) for each in command.params} - {"params_file"}


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


@pytest.fixture
def complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """Completes a command line as a shell would ask for it, where no Prefect server runs."""
    monkeypatch.chdir(folder)
    for name in ("HOME", "PREFECT_HOME", "PREFECT_MLPROJECTS_SERVER_DIR"):
        monkeypatch.setenv(name, str(folder / "home"))
    # Pretends that Prefect is not imported, as in a shell's completion.
    monkeypatch.delitem(sys.modules, "prefect.settings", raising=False)

    def completed(words: str, incomplete: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", f"mlprojects {words} {incomplete}")
        found = ShellComplete(group, {}, "mlprojects", "_X").get_completions(words.split(), incomplete)
        return [each.value for each in found]

    return completed


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
def test_completion_without_server(
    words: str, incomplete: str, expected: list[str], folder: Path, complete: Callable[[str, str], list[str]]
) -> None:
    assert complete(words, incomplete) == expected
    # None was started.
    assert not (folder / "home").exists()


def test_completion_with_unreachable_server_is_quiet(
    complete: Callable[[str, str], list[str]], unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{unused_port}/api")
    assert complete("status", "") == []
