"""The table of run options, and the interfaces derived from it or compared with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from prefect_mlprojects import deploy, run, run_project
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects.cli.deployments import deploy_command
from prefect_mlprojects.cli.runs import run_command
from prefect_mlprojects.deployments.specification import deployment_schema
from prefect_mlprojects.exceptions import BackendError, ParameterError
from prefect_mlprojects.request import CALL_OPTIONS, OPTIONS, RunRequest, options_of
from prefect_mlprojects.runs.start import make_request
from prefect_mlprojects.spec import find_entry_point, load_project

SECRET = "s3cret-marker"


def described_arguments(function: Any) -> dict[str, str]:
    """The arguments in a Google-style docstring with their descriptions, each on one line."""
    section = inspect.cleandoc(function.__doc__).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n    (?=\w+: )", f"\n{section}")
    return {
        name: " ".join(text.split()) for name, _, text in (each.strip().partition(": ") for each in entries if each)
    }


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: None if each.default is each.empty else each.default for name, each in parameters.items()}


def test_run_has_every_option_with_its_default_and_help() -> None:
    table = {**OPTIONS, **CALL_OPTIONS}

    assert defaults(run) == {name: table[name].default for name in defaults(run)}
    assert set(defaults(run)) == set(table)
    assert described_arguments(run) == {name: table[name].help for name in defaults(run)}


def test_deploy_has_every_option_with_its_default() -> None:
    written = defaults(deploy)

    assert {name: written[name] for name in OPTIONS} == {name: option.default for name, option in OPTIONS.items()}


def test_flow_parameters_match_options() -> None:
    written = defaults(run_project.fn)
    described = {name: facts["description"] for name, facts in run_project.parameters.properties.items()}

    assert {name: written[name] for name in OPTIONS} == {name: option.default for name, option in OPTIONS.items()}
    assert set(written) - set(OPTIONS) == {"extra_parameters"}
    assert {name: described[name] for name in OPTIONS} == {name: option.help for name, option in OPTIONS.items()}


@pytest.mark.parametrize("command", [run_command, deploy_command])
def test_command_line_has_every_option(command: click.Command) -> None:
    found = {each.name: each for each in command.params}

    for name, option in OPTIONS.items():
        assert tuple(found[name].opts) == (option.flags or (name,))
        if option.flags:
            assert (getattr(found[name], "help", "") or "").startswith(option.help)


def test_command_line_accepts_mlflow_run_flags() -> None:
    from mlflow import cli

    ours = {flag for option in OPTIONS.values() for flag in option.flags}
    theirs = {flag for each in cli.run.params if isinstance(each, click.Option) for flag in each.opts}
    assert theirs - ours <= {"--skip-image-build"}


def test_deployment_form_has_every_option_and_lists_choices(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'true'}}\n")
    fields = deployment_schema("/p", find_entry_point(load_project(tmp_path), "main"))["properties"]

    assert set(OPTIONS) <= set(fields)
    assert fields["env_manager"]["enum"] == ["local", "virtualenv", "uv", "conda"]
    assert {"local", "kubernetes", "databricks"} <= set(fields["backend"]["enum"])
    for option in options_of("form"):
        assert fields[option.name]["description"] == option.help


def test_documentation_lists_every_option() -> None:
    page = (Path(__file__).parents[3] / "docs" / "running.md").read_text()

    for option in (*OPTIONS.values(), *CALL_OPTIONS.values()):
        flags = ", ".join(f"`{flag}`" for flag in option.flags)
        shown = f" {flags} " if flags else " the argument `URI` " if option.name == "uri" else " "
        assert f"| `{option.name}` |{shown}| {option.help} |" in page


def test_project_block_schema_describes_options() -> None:
    from prefect_mlprojects.blocks import MLflowProject

    fields = MLflowProject.model_json_schema()["properties"]["options"]["properties"]

    assert set(fields) == {option.name for option in options_of("block")}
    assert fields["env_manager"]["enum"] == ["local", "virtualenv", "uv", "conda"]


def test_project_block_options_act_as_defaults() -> None:
    project = {"uri": "/p", "version": "v1", "options": {"timeout": 5.0, "retries": 2, "env_manager": "uv"}}
    request = RunRequest("block://p", env_manager="local", retries=1).with_project(project)

    assert (request.uri, request.version, request.timeout, request.retries, request.env_manager) == (
        "/p",
        "v1",
        5.0,
        1,
        "local",
    )
    with pytest.raises(ParameterError, match="did you mean 'env_manager'"):
        request.with_project({"uri": "/p", "options": {"env_manger": "uv"}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ({"timeout": float("inf")}, "timeout must be a positive number of seconds, not inf"),
        ({"timeout": float("nan")}, "timeout must be a positive number of seconds, not nan"),
        ({"retries": -1}, "retries must be 0 or more, not -1"),
        ({"uri": " "}, "URI is empty"),
        ({"experiment_name": "a", "experiment_id": 0}, "only one of experiment_name and experiment_id"),
    ],
)
def test_values_out_of_bounds_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make_request({"uri": "p", **arguments})


@pytest.mark.parametrize(
    ("uri", "stored"),
    [
        (f"https://ci:{SECRET}@example.com/o/r#sub", "https://example.com/o/r#sub"),
        (f"https://{SECRET}@example.com/o/r", "https://example.com/o/r"),
        (f"git+https://ci:{SECRET}@example.com/o/r", "git+https://example.com/o/r"),
        (f"https://example.com/p.zip?token={SECRET}", "https://example.com/p.zip?token=***"),
    ],
)
def test_uri_secret_is_kept_out_of_request(uri: str, stored: str) -> None:
    request, secrets = make_request({"uri": uri})

    assert request.uri == stored
    assert secrets.uri is not None
    assert reveal(secrets.uri) == uri
    assert SECRET not in repr(request) + repr(secrets)


@pytest.mark.parametrize("uri", ["git@example.com:o/r", "ssh://git@example.com/o/r", "https://example.com/o/r", "/p@q"])
def test_uri_without_secret_is_stored_unchanged(uri: str) -> None:
    request, secrets = make_request({"uri": uri})

    assert (request.uri, secrets.uri) == (uri, None)


def _deploy(uri: str) -> object:
    return deploy(uri)


def _serve(uri: str) -> object:
    from prefect_mlprojects.deployments.specification import specify

    return specify(uri)


@pytest.mark.parametrize("entrance", [_deploy, _serve])
def test_deployment_uri_with_secret_is_rejected(entrance: Callable[[str], object]) -> None:
    with pytest.raises(ParameterError, match=r"git-credentials block.*'https://example.com/o/r'") as caught:
        entrance(f"https://ci:{SECRET}@example.com/o/r")
    assert SECRET not in str(caught.value)


def test_project_block_uri_with_secret_is_rejected() -> None:
    from prefect_mlprojects.blocks import MLflowProject

    with pytest.raises(ValueError, match="git-credentials block") as caught:
        MLflowProject(uri=f"https://ci:{SECRET}@example.com/o/r")
    assert SECRET not in str(caught.value)


def test_other_secrets_of_a_deployment_are_refused(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'true'}}\n")
    index = f"https://ci:{SECRET}@pypi.example.com/simple"
    with pytest.raises(ParameterError, match=r"job variable 'env'.*prefect.blocks.secret") as caught:
        deploy(tmp_path, job_variables={"env": {"PIP_INDEX_URL": index}})
    assert SECRET not in str(caught.value)
    with pytest.raises(BackendError, match=r"holds secrets \(docker-host\).*Keep them in a block") as refused:
        deploy(tmp_path, backend_config={"docker-host": f"tcp://ci:{SECRET}@example.com:2376"})
    assert SECRET not in str(refused.value)
