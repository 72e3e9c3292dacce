"""The form of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.deployments.form import (
    default_form_options,
    form_options_of,
    narrow_form,
    parse_form_options,
)
from prefect_mlprojects.deployments.specification import deployment_schema
from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.request import unknown_options
from prefect_mlprojects.server.compat import schema_errors
from prefect_mlprojects.spec import find_entry_point, load_project
from prefect_mlprojects.spec.project import EntryPoint
from prefect_mlprojects.spec.schema import schema_changes, typed_value

PARAMETERS = """\
      count: int
      zero: {type: int, default: 0}
      rate: {type: float, default: 1e-3}
      whole: {type: float, default: 2}
      limit: {type: float, default: inf}
      word: {type: string, default: ""}
      number: {type: string, default: 3}
      data: path
      place: {type: uri, default: "s3://bucket/key"}
      odd: {type: thing, default: x}
"""


def entry_point(folder: Path, parameters: str = PARAMETERS) -> EntryPoint:
    (folder / "MLproject").write_text(
        f"name: x\nentry_points:\n  main:\n    parameters:\n{parameters}    command: 'true'\n"
    )
    return find_entry_point(load_project(folder), "main")


def properties(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["properties"]["parameters"]["properties"]
    return found


def test_form_has_typed_field_for_each_parameter(tmp_path: Path) -> None:
    schema = deployment_schema("/p", entry_point(tmp_path))
    found = properties(schema)

    assert list(found) == ["count", "zero", "rate", "whole", "limit", "word", "number", "data", "place", "odd"]
    assert [facts["position"] for facts in found.values()] == list(range(10))
    assert found["count"] == {"title": "count", "position": 0, "type": "integer", "description": "int"}
    assert (found["zero"]["type"], found["zero"]["default"]) == ("integer", 0)
    assert (found["rate"]["type"], found["rate"]["default"]) == ("number", 0.001)
    assert found["whole"]["default"] == 2
    assert found["limit"]["default"] == "inf"
    assert {"type": "string"} in found["limit"]["anyOf"]
    assert (found["word"]["type"], found["word"]["default"]) == ("string", "")
    assert found["number"]["default"] == "3"
    assert found["data"]["format"] == "path"
    assert "default" not in found["data"]
    assert found["place"]["format"] == "uri"
    assert found["odd"]["type"] == "string"
    assert schema["properties"]["parameters"]["required"] == ["count", "data"]
    assert "parameters" in schema["required"]


def test_form_defaults_are_the_deployments_values(tmp_path: Path) -> None:
    schema = deployment_schema(
        "/p", entry_point(tmp_path), {"count": 7, "rate": 0.5, "more": "x"}, {"version": "v1", "timeout": 60}
    )

    assert properties(schema)["count"]["default"] == 7
    assert properties(schema)["rate"]["default"] == 0.5
    assert schema["properties"]["extra_parameters"]["default"] == {"more": "x"}
    options = schema["properties"]
    assert (options["version"]["default"], options["timeout"]["default"]) == ("v1", 60)
    assert "default" not in options["env_manager"]
    assert schema["properties"]["uri"]["enum"] == ["/p"]


def test_form_of_entry_point_without_parameters_is_empty(tmp_path: Path) -> None:
    schema = deployment_schema("/p", entry_point(tmp_path, "      {}\n"))

    assert properties(schema) == {}
    assert schema["required"] == ["uri"]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3),
        ("int", "-0", 0),
        ("int", "9" * 30, "9" * 30),
        ("float", "1e-3", 0.001),
        ("float", "5", 5),
        ("float", "nan", "nan"),
        ("float", "1e999", "1e999"),
        ("string", "3", "3"),
        ("path", "/x", "/x"),
    ],
)
def test_typed_values_keep_their_value(kind: Any, text: str, value: Any) -> None:
    found = typed_value(kind, text)

    assert found == value
    assert type(found) is type(value)


def test_schema_changes_since_deployment_are_listed(tmp_path: Path) -> None:
    old = deployment_schema("/p", entry_point(tmp_path))
    assert schema_changes(old, entry_point(tmp_path)) == ()

    new = entry_point(
        tmp_path,
        "      count: float\n      zero: int\n      rate: {type: float, default: 5}\n      data: path\n"
        "      fresh: {type: int, default: 1}\n      needed: string\n"
        "      whole: float\n      limit: {type: float, default: inf}\n      word: {type: string, default: b}\n"
        "      number: {type: string, default: 3}\n      odd: {type: thing, default: x}\n",
    )
    assert schema_changes(old, new) == (
        "parameter 'place' was removed",
        "parameter 'count' was int and is float",
        "parameter 'zero' needs a value now",
        "parameter 'fresh' (int) is new",
        "parameter 'needed' (string) is new and needs a value",
        "parameter 'whole' needs a value now",
    )
    assert schema_changes({}, new) == ()


def test_unknown_option_names_the_nearest() -> None:
    (problem,) = unknown_options({"env_manger": "uv"}, "form")

    assert "did you mean 'env_manager'" in str(problem)


def narrowed(tmp_path: Path, *names: str, **options: Any) -> dict[str, Any]:
    schema = deployment_schema("/p", entry_point(tmp_path, "      count: {type: int, default: 1}\n"), {}, options)
    return narrow_form(schema, parse_form_options(names) if names else default_form_options(), options)


def test_narrowed_form_by_default_lacks_restricted_options(tmp_path: Path) -> None:
    shown = narrowed(tmp_path, backend="kubernetes")["properties"]
    assert {"backend", "backend_config", "docker_args", "version", "tracking"}.isdisjoint(shown)
    assert {"parameters", "extra_parameters", "uri", "entry_point", "timeout", "env_manager"} <= set(shown)


@pytest.mark.parametrize(
    ("names", "values", "refused"),
    [
        ((), {}, ""),
        ((), {"backend": "local", "backend_config": {"namespace": "ml"}}, ""),  # what the deployment has
        ((), {"backend": "databricks"}, "backend: 'local' was expected"),
        ((), {"backend_config": {"namespace": "ml", "docker-host": "tcp://evil"}}, "backend_config"),
        ((), {"docker_args": {"image": "evil"}}, "docker_args"),
        ((), {"version": "evil"}, "version"),
        ((), {"tracking": "evil"}, "tracking"),
        ((), {"timeout": 60}, ""),
        (("backend", "version"), {"backend": "databricks", "version": "evil"}, ""),
        (("backend", "version"), {"timeout": 60}, "timeout"),
        (("none",), {"timeout": 60}, "timeout"),
        (("all",), {"docker_args": {"image": "any"}, "tracking": "any"}, ""),
        (("all",), {"unknown": 1}, "unknown"),
        ((), {"uri": "https://evil/x"}, "uri"),
        ((), {"entry_point": "other"}, "entry_point"),
    ],
)
def test_narrowed_form_refuses_other_values(
    names: tuple[str, ...], values: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    schema = narrowed(tmp_path, *names, backend="local", backend_config={"namespace": "ml"})
    errors = schema_errors({"uri": "/p", "parameters": {"count": 2}, **values}, schema)
    assert bool(errors) == bool(refused), errors
    assert refused in "\n".join(errors)


def test_form_options_are_read_back_and_checked(tmp_path: Path) -> None:
    assert form_options_of(narrowed(tmp_path, "retries", "backend")) == ("backend", "retries")
    assert form_options_of(narrowed(tmp_path, "none")) == ()
    assert form_options_of(deployment_schema("/p", entry_point(tmp_path))) is None
    assert form_options_of(None) is None
    with pytest.raises(ParameterError, match=r"unknown run option 'bakend' .did you mean 'backend'\?"):
        parse_form_options(["bakend"])
