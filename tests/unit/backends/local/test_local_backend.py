"""The local backend: the outcome of each way a command can end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.services.recorder import Recorder

from prefect_mlprojects.backends.configuration import dump_config
from prefect_mlprojects.backends.contract import BackendRequest, Command, Prepared, RunIdentity
from prefect_mlprojects.backends.local import LocalBackend
from prefect_mlprojects.backends.outcome import Outcome, explain_exit
from prefect_mlprojects.environments import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.spec import check_parameters, find_entry_point, load_project
from prefect_mlprojects.types import FailureCategory, StopSignal

GREET = Path(__file__).parents[3] / "projects" / "greet"
ENVIRONMENT = PreparedEnvironment(dict(os.environ), EnvironmentPlan("local", "local"))


def execute(
    command: str,
    directory: Path,
    events: Recorder | None = None,
    stop: StopSignal | None = None,
    timeout: float | None = None,
    environment: PreparedEnvironment = ENVIRONMENT,
) -> Outcome:
    backend = LocalBackend()
    project = load_project(GREET)
    entry_point = find_entry_point(project, "main")
    request = BackendRequest(
        project=project,
        entry_point=entry_point,
        parameters=check_parameters(entry_point, {"name": "x"}),
        working_copy=WorkingCopy(directory, str(directory), "local", str(directory)),
        config=backend.parse_config({"grace-period": 1}),
    )
    prepared = Prepared(request, environment, "local")
    identity = RunIdentity("flow-run", "run", "project", "main")
    line = Command(command, {"GREETING": "it's me"}, identity, timeout)
    return backend.execute(prepared, line, events or Recorder(), stop or StopSignal())


def test_command_runs_in_the_folder_with_the_variables(tmp_path: Path) -> None:
    events = Recorder()
    outcome = execute('pwd; echo "$GREETING"', tmp_path, events)
    assert outcome.succeeded
    assert outcome.category is None
    assert events.stdout.splitlines() == [str(tmp_path), "it's me"]


@pytest.mark.parametrize(
    ("command", "cause", "advice"),
    [
        ("exit 3", "exit code 3", ""),
        ("no-such-command-here", "exit code 127", "not found"),
        ("/etc/passwd", "exit code 126", "chmod"),
        ("kill -SEGV $$", "ended by SIGSEGV", "memory"),
        ("bash -c 'kill -9 $$'; exit $?", "exit code 137: ended by SIGKILL", "memory"),
    ],
)
def test_failure_has_cause_and_advice(command: str, cause: str, advice: str, tmp_path: Path) -> None:
    outcome = execute(command, tmp_path)
    assert (outcome.ending, outcome.cause) == ("exited", cause)
    assert outcome.category == FailureCategory.USER_CODE
    assert advice in outcome.advice


def test_output_tail_has_the_last_lines(tmp_path: Path) -> None:
    outcome = execute("seq 100; echo oops >&2; exit 1", tmp_path)
    assert len(outcome.output_tail) == 20
    assert {"100", "oops"} <= set(outcome.output_tail)


def test_missing_or_vanished_folder_is_reported(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert execute("true", gone).ending == "not-started"
    gone.mkdir()
    outcome = execute(f"rm -r {gone}; cd . 2>&1; exit 1", gone)
    assert "vanished" in outcome.advice


def test_stop_before_the_start_starts_nothing(tmp_path: Path) -> None:
    stop = StopSignal()
    stop.request("too late")
    outcome = execute("touch started", tmp_path, stop=stop)
    assert (outcome.ending, outcome.cause, outcome.category) == ("stopped", "too late", "cancelled")
    assert not (tmp_path / "started").exists()


def test_timeout_ends_the_command(tmp_path: Path) -> None:
    outcome = execute("echo begun; sleep 100", tmp_path, timeout=0.3)
    assert (outcome.ending, outcome.output_tail) == ("timed-out", ("begun",))
    assert "0.3 s" in outcome.cause


def test_command_that_is_too_long_is_not_started(tmp_path: Path) -> None:
    outcome = execute("true " + "x" * 3_000_000, tmp_path)
    assert outcome.ending == "not-started"
    assert "too long" in outcome.cause


def test_command_with_a_null_byte_is_not_started(tmp_path: Path) -> None:
    outcome = execute("echo a\0b", tmp_path)
    assert outcome.ending == "not-started"
    assert "null byte" in outcome.cause


def test_missing_command_prefix_is_named(tmp_path: Path) -> None:
    environment = PreparedEnvironment(dict(os.environ), EnvironmentPlan("local", "local"), ("no-such-launcher",))
    outcome = execute("true", tmp_path, environment=environment)
    assert outcome.ending == "not-started"
    assert "no-such-launcher" in outcome.cause


def test_configuration_unknown_key_is_refused() -> None:
    backend = LocalBackend()
    assert dump_config(backend.parse_config({})) == {}
    assert dump_config(backend.parse_config({"grace-period": 3})) == {"grace-period": 3.0}
    with pytest.raises(BackendError, match=r"'grace-perod'.*did you mean 'grace-period'"):
        backend.parse_config({"grace-perod": 3})
    with pytest.raises(BackendError, match="grace-period"):
        backend.parse_config({"grace-period": "soon"})


@pytest.mark.parametrize("code", [-200, -1, 0, 1, 128, 129, 200, 255])
def test_explain_exit_every_code_has_a_cause(code: int) -> None:
    assert explain_exit(code).cause
