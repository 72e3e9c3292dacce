"""The local backend: what it says of each way a command can end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefect_mlprojects.backends.contract import ExecutionOutcome, ExecutionRequest, RunIdentity
from prefect_mlprojects.backends.local.backend import LocalBackend
from prefect_mlprojects.backends.outcome import find_cause
from prefect_mlprojects.environments.base import EnvironmentPlan, PreparedEnvironment
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.types import StopSignal, StreamName


class Sink:
    def __init__(self) -> None:
        self.data: dict[str, bytes] = {"stdout": b"", "stderr": b""}

    def write(self, stream: StreamName, data: bytes) -> None:
        self.data[stream] += data


def execute(
    command: str,
    directory: Path,
    sink: Sink | None = None,
    stop: StopSignal | None = None,
    timeout: float | None = None,
) -> ExecutionOutcome:
    environment = PreparedEnvironment(dict(os.environ), EnvironmentPlan("local", "local"))
    identity = RunIdentity("flow-run", "run", "project", "main")
    request = ExecutionRequest(
        command, directory, environment, {"GREETING": "it's me"}, identity, {"grace-period": 1}, timeout
    )
    return LocalBackend().execute(request, sink or Sink(), stop or StopSignal())


def test_it_runs_in_the_folder_with_the_variables(tmp_path: Path) -> None:
    sink = Sink()
    outcome = execute('pwd; echo "$GREETING"', tmp_path, sink)
    assert outcome.succeeded
    assert sink.data["stdout"].decode().splitlines() == [str(tmp_path), "it's me"]


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
def test_causes(command: str, cause: str, advice: str, tmp_path: Path) -> None:
    outcome = execute(command, tmp_path)
    assert (outcome.ending, outcome.cause) == ("exited", cause)
    assert advice in outcome.advice


def test_the_last_lines_are_kept(tmp_path: Path) -> None:
    outcome = execute("seq 100; echo oops >&2; exit 1", tmp_path)
    assert len(outcome.output_tail) == 20
    assert {"100", "oops"} <= set(outcome.output_tail)


def test_a_folder_that_is_missing_or_vanishes(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert execute("true", gone).ending == "not-started"
    gone.mkdir()
    outcome = execute(f"rm -r {gone}; cd . 2>&1; exit 1", gone)
    assert "vanished" in outcome.advice


def test_a_stop_before_the_start_starts_nothing(tmp_path: Path) -> None:
    stop = StopSignal()
    stop.request("too late")
    outcome = execute("touch started", tmp_path, stop=stop)
    assert (outcome.ending, outcome.cause) == ("stopped", "too late")
    assert not (tmp_path / "started").exists()


def test_a_timeout(tmp_path: Path) -> None:
    outcome = execute("echo begun; sleep 100", tmp_path, timeout=0.3)
    assert (outcome.ending, outcome.output_tail) == ("timed-out", ("begun",))
    assert "0.3 s" in outcome.cause


def test_a_command_that_is_too_long(tmp_path: Path) -> None:
    outcome = execute("true " + "x" * 3_000_000, tmp_path)
    assert outcome.ending == "not-started"
    assert "too long" in outcome.cause


def test_a_command_that_no_program_can_be_given(tmp_path: Path) -> None:
    outcome = execute("echo a\0b", tmp_path)
    assert outcome.ending == "not-started"
    assert "null byte" in outcome.cause


def test_a_prefix_that_does_not_exist_is_named(tmp_path: Path) -> None:
    environment = PreparedEnvironment(dict(os.environ), EnvironmentPlan("local", "local"), ("no-such-launcher",))
    identity = RunIdentity("flow-run", "run", "project", "main")
    outcome = LocalBackend().execute(
        ExecutionRequest("true", tmp_path, environment, {}, identity), Sink(), StopSignal()
    )
    assert outcome.ending == "not-started"
    assert "no-such-launcher" in outcome.cause


def test_configuration() -> None:
    backend = LocalBackend()
    assert backend.validate_config({}) == {}
    assert backend.validate_config({"grace-period": 3}) == {"grace-period": 3.0}
    with pytest.raises(BackendError, match=r"'grace-perod'.*did you mean 'grace-period'"):
        backend.validate_config({"grace-perod": 3})
    with pytest.raises(BackendError, match="grace-period"):
        backend.validate_config({"grace-period": "soon"})


@pytest.mark.parametrize("code", [-200, -1, 0, 1, 128, 129, 200, 255])
def test_every_code_has_a_cause(code: int) -> None:
    assert find_cause(code).text
