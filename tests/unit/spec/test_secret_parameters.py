"""Parameters with ``secret: true``: what people see of them, and what the program gets."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects._support.secrets import MASK, Secret, reveal, reveal_values
from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.spec import CheckedParameters, EntryPoint, build_command, check_parameters, load_project
from prefect_mlprojects.spec.schema import parameters_schema

HOSTILE = "a'b\"c $HOME `id` $(id) \\ *\n{x} ;&|<>#!"


def entry_point(tmp_path: Path, command: str, declared: str = "{token: {type: string, secret: true}}") -> EntryPoint:
    quoted = command.replace("'", "''")
    (tmp_path / "MLproject").write_text(
        f"entry_points:\n  main:\n    parameters: {declared}\n    command: '{quoted}'\n"
    )
    return load_project(tmp_path).entry_points["main"]


def run(point: EntryPoint, checked: CheckedParameters, shell: str) -> list[str]:
    child_env = reveal_values(checked.child_variables)
    command = build_command(point, checked)
    assert not any(value and value in command for value in child_env.values())
    result = subprocess.run([shell, "-c", command], env={"PATH": "/usr/bin:/bin", **child_env}, stdout=subprocess.PIPE)
    return result.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("value", ["hunter2", HOSTILE, "", "-n", "*"])
def test_secret_value_reaches_the_program_as_itself_in_any_quotes(tmp_path: Path, shell: str, value: str) -> None:
    command = "printf '%s\\0' {token} '{token}' \"{token}\" pre{token}post 'a {token} b' \"$(printf %s \"{token}\")\""
    point = entry_point(tmp_path, command)

    seen = run(point, check_parameters(point, {"token": value}), shell)

    assert seen == [value, value, value, f"pre{value}post", f"a {value} b", value]


def test_secret_undeclared_value_follows_as_an_option(tmp_path: Path) -> None:
    point = entry_point(tmp_path, "printf '%s\\0' x", "{}")
    url = "postgresql://me:pa'ss@db/x"

    checked = check_parameters(point, {"url": url, "alpha": 1}, hidden=["url"])

    assert run(point, checked, "bash") == ["x", "--url", url, "--alpha", "1"]
    assert checked.extra == {"url": "postgresql://me:***@db/x", "alpha": "1"}


def test_secret_value_is_shown_and_recorded_nowhere(tmp_path: Path) -> None:
    point = entry_point(tmp_path, "echo {token}", "{token: {secret: true}, url: string}")

    checked = check_parameters(point, {"token": "hunter2", "url": "http://u:pass-word@h"}, hidden=["url"])

    assert checked.declared == {"token": MASK, "url": "http://u:***@h"}
    assert checked.recorded == {"url": "http://u:***@h"}
    assert "hunter2" not in repr(checked) + build_command(point, checked)
    assert {name: reveal(each) for name, each in checked.secrets.items()} == {
        "token": "hunter2",
        "url": "http://u:pass-word@h",
    }


@pytest.mark.parametrize(
    ("declared", "values"),
    [
        ("{token: {type: int, secret: true}}", {"token": "hunter2"}),
        ("{token: {type: uri, secret: true}}", {"token": "hunter2"}),
        ("{token: {type: path, secret: true}}", {"token": "hunter2/x"}),
        ("{token: {secret: true}}", {"token": "hunter2\0"}),
    ],
)
def test_secret_value_of_another_type_is_refused_without_showing_it(
    tmp_path: Path, declared: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match="token") as caught:
        check_parameters(entry_point(tmp_path, "echo {token}", declared), values)

    assert "hunter2" not in str(caught.value)
    assert not any("hunter2" in str(problem.value) for problem in caught.value.problems)


@pytest.mark.parametrize(
    "command", ["echo `echo {token}`", "echo $(( {token} ))", "cat <<{token}", "echo ${{x:-{token}}}"]
)
def test_secret_placeholder_where_no_quoting_is_safe_is_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(ParameterError, match="secret parameter 'token' can't stand") as caught:
        check_parameters(entry_point(tmp_path, command), {"token": "plain"})
    assert "plain" not in str(caught.value)


def test_secret_reference_is_kept_and_resolved_later(tmp_path: Path) -> None:
    point = entry_point(tmp_path, "printf '%s\\0' {token}", "{token: {type: int, secret: true}}")

    checked = check_parameters(point, {"token": "env://TOKEN"})

    assert checked.declared == {"token": "env://TOKEN"}
    resolved = checked.with_secrets(lambda name, value: Secret(f"{name}={reveal(value)}"))
    assert run(point, resolved, "bash") == ["token=env://TOKEN"]


def test_secret_parameters_with_alike_names_have_variables_of_their_own(tmp_path: Path) -> None:
    names = ["a-b", "a_b", "a.b", "A_B"]
    declared = "{" + ", ".join(f"{name}: {{secret: true}}" for name in names) + "}"
    command = "printf '%s\\0' " + " ".join(f"{{{name}}}" for name in names if "." not in name)
    point = entry_point(tmp_path, command, declared)

    checked = check_parameters(point, {name: f"value {name}" for name in names})

    assert run(point, checked, "bash") == [f"value {name}" for name in names if "." not in name]
    assert len(set(checked.variables.values())) == len(names)


def test_secret_field_of_the_form_takes_references_only(tmp_path: Path) -> None:
    point = entry_point(tmp_path, "echo {token}", "{token: {secret: true, default: changeme}}")

    schema = parameters_schema(point, {})["properties"]["token"]

    assert "default" not in schema
    assert "block://secret/NAME" in schema["description"]
    accepts = re.compile(schema["pattern"]).search
    assert all(map(accepts, ["block://secret/api", "env://API_TOKEN", "{{secrets/scope/key}}"]))
    assert not any(map(accepts, ["hunter2", "x block://secret/api", "env://A B", "block://other/x", ""]))


def test_same_file_under_mlflow_run_puts_the_value_into_the_command(tmp_path: Path) -> None:
    from mlflow.projects import _project_spec  # type: ignore[attr-defined, unused-ignore]

    point = entry_point(tmp_path, "python train.py {token}")
    load_theirs: Any = _project_spec.load_project
    theirs = load_theirs(str(tmp_path)).get_entry_point("main")

    assert shlex.split(theirs.compute_command({"token": "a b"}, None)) == ["python", "train.py", "a b"]
    assert build_command(point, check_parameters(point, {"token": "a b"})) == (
        'python train.py "${MLPROJECTS_PARAM_TOKEN}"'
    )
