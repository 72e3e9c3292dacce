"""``run()`` in this process: the ends a run can come to, and what Prefect and MLflow say of them."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import api
from tests.services.waiting import is_alive, wait_for

from prefect_mlprojects import SubmittedRun, run
from prefect_mlprojects.exceptions import (
    BackendError,
    ExecutionException,
    FetchError,
    ParameterError,
    ProjectSpecError,
    RunCancelled,
    RunFailed,
    RunTimedOut,
    TrackingError,
)
from prefect_mlprojects.settings import max_concurrent_runs

Read = Callable[[str], Any]


def test_finished_run_is_recorded_in_mlflow_and_prefect(
    greet: str, workspace: Path, tracked: Read, prefect_state: Read, flow_log: Read, capfdbinary: Any
) -> None:
    submitted = run(greet, parameters={"name": "it's $(me)", "times": 2, "extra": "x y"}, env_manager="local")

    assert submitted.get_status() == "FINISHED"
    assert submitted.wait() is True
    flow_run = prefect_state(submitted.flow_run_id)
    assert (flow_run.name, flow_run.state.type.value) == ("greet/main", "COMPLETED")
    assert flow_run.labels["mlflow.run_id"] == submitted.run_id
    assert [log.message for log in flow_log(submitted.flow_run_id)] == [
        "hello it's $(me)\nhello it's $(me)",
        "done",
    ] or (
        "\n".join(log.message for log in flow_log(submitted.flow_run_id)) == "hello it's $(me)\nhello it's $(me)\ndone"
    )
    output = capfdbinary.readouterr()
    assert output.out == b"hello it's $(me)\nhello it's $(me)\n"
    assert b"done\n" in output.err

    mlflow_run = tracked(submitted.run_id)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params == {"name": "it's $(me)", "times": "2", "extra": "x y"}
    tags = mlflow_run.data.tags
    assert tags["mlflow.project.entryPoint"] == "main"
    assert tags["mlflow.project.backend"] == "local"
    assert tags["mlflow.source.type"] == "PROJECT"
    assert tags["prefect.flow_run_id"] == submitted.flow_run_id
    assert submitted.flow_run_id in tags["prefect.flow_run_url"]


def test_flow_run_has_four_tasks(greet: str, workspace: Path, prefect_server: Any) -> None:
    submitted = run(greet, env_manager="local")

    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import TaskRunSort

    from prefect_mlprojects.server.api import call_api

    async def task_runs(client: Any) -> list[Any]:
        from uuid import UUID

        found: list[Any] = await client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(submitted.flow_run_id)])),
            sort=TaskRunSort.ID_DESC,
            limit=100,
        )
        return found

    def names() -> set[str]:
        runs = call_api(prefect_server.api_url, task_runs)
        return {each.name.rsplit("-", 1)[0] for each in runs if each.state and each.state.is_completed()}

    # Task runs reach the server as events, a moment after the flow run's own end.
    wait_for(lambda: names() == {"fetch", "resolve-env", "validate-params", "execute"}, "the task runs")


def test_failing_command_reports_exit_code_and_output_tail(
    greet: str, workspace: Path, tracked: Read, prefect_state: Read
) -> None:
    with pytest.raises(RunFailed, match=r"Run \(ID '[0-9a-f]{32}'\) failed: exit code 3") as caught:
        run(greet, "fail", env_manager="local")

    error = caught.value
    assert (error.exit_code, error.signal) == (3, None)
    assert "going down" in error.output_tail
    assert "\n" not in error.message
    assert error.run_id is not None
    assert error.flow_run_id is not None
    mlflow_run = tracked(error.run_id)
    assert mlflow_run.info.status == "FAILED"
    assert mlflow_run.data.tags["mlprojects.failure.category"] == error.category == "user-code"
    assert mlflow_run.data.tags["mlprojects.failure.cause"] == error.cause == "exit code 3"
    state = prefect_state(error.flow_run_id).state
    assert (state.type.value, state.message) == ("FAILED", error.message)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.exit_code, copy.message, copy.run_id) == (3, error.message, error.run_id)
    assert (copy.category, copy.cause) == ("user-code", "exit code 3")


def test_failed_run_reports_its_error_once(workspace: Path, flow_records: Callable[[str], list[Any]]) -> None:
    (workspace / "MLproject").write_text("entry_points:\n  main:\n    command: python broken.py\n")
    (workspace / "broken.py").write_text("import sys\n\nraise LookupError('no such ' + 'row')\n")
    script = "import prefect_mlprojects\nprefect_mlprojects.run('.', env_manager='local')\n"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=workspace, check=False)

    assert done.returncode == 1
    assert done.stderr.count("LookupError: no such row") == 1
    # One message, below the lines of the caller and of run().
    shown = done.stderr[done.stderr.rindex("Traceback (most recent call last)") :]
    assert shown.count('  File "') == 2
    assert "RunFailed: Run (ID '" in shown.splitlines()[-1]
    flow_run_id = re.search(r"runs/flow-run/([0-9a-f-]{36})", done.stderr)
    assert flow_run_id is not None
    messages = [record.message for record in flow_records(flow_run_id[1])]
    assert sum("LookupError: no such row" in message for message in messages) == 1
    assert sum("failed: exit code 1." in message for message in messages) == 1


def test_wrong_options_and_values_are_reported_together(greet: str, workspace: Path) -> None:
    with pytest.raises(ParameterError) as caught:
        run(greet, parameters={"times": 1.5}, timeout=-1, retries=-1, experiment_name="a", experiment_id="1")
    assert [problem.parameter for problem in caught.value.problems] == ["experiment_id", "timeout", "retries", "times"]


def test_invalid_parameters_are_reported_once(greet: str, workspace: Path, prefect_state: Read) -> None:
    project = f"file://{greet}"
    with pytest.raises(ParameterError) as caught:
        run(project, parameters={"times": "many", "name": None}, env_manager="local")
    lines = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert lines == ["test_invalid_parameters_are_reported_once", "run"]
    assert "\n" not in caught.value.summary


def test_killed_command_reports_signal(greet: str, workspace: Path) -> None:
    (workspace / "MLproject").write_text("entry_points:\n  main:\n    command: 'kill -9 $$'\n")
    with pytest.raises(RunFailed, match="SIGKILL") as caught:
        run(str(workspace), env_manager="local")
    assert caught.value.signal == signal.SIGKILL or caught.value.exit_code == 137


def test_timeout_ends_run(greet: str, workspace: Path, prefect_state: Read) -> None:
    with pytest.raises(RunTimedOut) as caught:
        run(greet, "sleep", env_manager="local", timeout=0.5)
    assert caught.value.flow_run_id is not None
    state = prefect_state(caught.value.flow_run_id).state
    assert (state.type.value, state.name) == ("FAILED", "TimedOut")


def test_retries_try_the_command_again(greet: str, workspace: Path, tracked: Read) -> None:
    submitted = run(greet, "flaky", parameters={"marker": str(workspace / "marker")}, env_manager="local", retries=1)
    assert submitted.get_status() == "FINISHED"
    assert tracked(submitted.run_id).info.status == "FINISHED"


def test_invalid_parameters_are_listed_together_and_leave_no_run(greet: str, workspace: Path) -> None:
    with pytest.raises(ParameterError) as caught:
        run(greet, "needs", parameters={"count": "3.7", "place": "nowhere"})
    assert {problem.parameter for problem in caught.value.problems} == {"count", "rate", "place"}
    assert not (workspace / "mlflow.db").exists()


def test_mistakes_of_the_project_and_of_the_call_come_together(workspace: Path, mlprojects: Callable[..., Any]) -> None:
    (workspace / "MLproject").write_text(
        "python_env: missing.yaml\nentry_points:\n  main:\n    parameters: {epochs: int}\n    command: 'echo {epochs} }'\n"
    )
    with pytest.raises(ProjectSpecError) as caught:
        run(".", parameters={"epochs": 3.7})
    assert [(problem.line, problem.parameter) for problem in caught.value.problems] == [
        (1, None),
        (5, None),
        (None, "epochs"),
    ]
    done = mlprojects("run", ".", "-P", "epochs=3.7")
    assert done.returncode == 2
    for words in (
        "MLproject:1: 'python_env' names the file",
        "MLproject:5: the command",
        "a whole number was expected",
    ):
        assert words in done.stderr


def test_duplicate_key_warns_in_run_and_fails_validate(workspace: Path, mlprojects: Callable[..., Any]) -> None:
    (workspace / "MLproject").write_text("entry_points:\n  main: {command: echo first}\n  main: {command: echo last}\n")
    done = mlprojects("run", ".", "--env-manager", "local")
    assert (done.returncode, done.stdout) == (0, "last\n")
    assert "MLproject:3: the key 'main' is given twice, first in line 2" in done.stderr
    assert mlprojects("validate").returncode == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"uri": "no/such/folder"}, FetchError, "no/such/folder"),
        ({"entry_point": "mian"}, ProjectSpecError, "main"),
        ({"backend": "locall"}, BackendError, "local"),
        ({"env_manager": "pipenv"}, ExecutionException, "virtualenv"),
        ({"experiment_name": "a", "experiment_id": "1"}, ParameterError, "experiment"),
        ({"timeout": -1}, ParameterError, "timeout"),
        ({"backend_config": {"grace-perod": 3}}, BackendError, "grace-period"),
        ({"backend_config": "missing.json"}, BackendError, "missing.json"),
        ({"version": "no-such-branch"}, ExecutionException, "no branch, tag or commit"),
    ],
)
def test_bad_calls(
    greet: str, workspace: Path, call: dict[str, Any], error: type[ExecutionException], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(**{"uri": greet, "env_manager": "local", **call})


def test_deleted_experiment_and_unknown_run_id_are_reported(greet: str, workspace: Path, tracked: Read) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="gone"):
        run(greet, env_manager="local", experiment_name="gone")
    with pytest.raises(TrackingError, match="0123"):
        run(greet, env_manager="local", run_id="0123456789abcdef0123456789abcdef")


def test_asynchronous_runs_return_at_once_and_can_be_cancelled(
    greet: str, workspace: Path, tracked: Read, prefect_state: Read
) -> None:
    submitted = run(greet, "tree", env_manager="local", synchronous=False)
    assert submitted.get_status() == "RUNNING"
    run_id = submitted.run_id

    submitted.cancel()
    submitted.cancel()

    assert submitted.get_status() == "KILLED"
    assert submitted.wait() is False
    assert prefect_state(submitted.flow_run_id).state.type.value == "CANCELLED"
    assert tracked(run_id).info.status == "KILLED"


def started_grandchild(submitted: SubmittedRun, flow_log: Read) -> int:
    def lines() -> list[str]:
        return [line for log in flow_log(submitted.flow_run_id) for line in log.message.splitlines()]

    wait_for(lambda: any(line.startswith("grandchild") for line in lines()), "the grandchild")
    return int(next(line for line in lines() if line.startswith("grandchild")).split()[1])


@pytest.mark.parametrize("how", ["handle", "attach", "api"])
def test_cancel_kills_process_tree(
    how: str, greet: str, workspace: Path, tracked: Read, prefect_state: Read, flow_log: Read, prefect_server: Any
) -> None:
    submitted = run(greet, "tree", env_manager="local", synchronous=False)
    grandchild = started_grandchild(submitted, flow_log)
    assert is_alive(grandchild)

    if how == "handle":
        submitted.cancel()
    elif how == "attach":
        attached = SubmittedRun.attach(submitted.flow_run_id)
        assert attached.get_status() == "RUNNING"
        assert attached.run_id == submitted.run_id
        attached.cancel()
        assert attached.get_status() == "KILLED"
        assert attached.wait() is False
    else:
        cancel_through_the_api(prefect_server.api_url, submitted.flow_run_id)
    assert submitted.wait() is False

    assert not is_alive(grandchild)
    assert submitted.get_status() == "KILLED"
    assert prefect_state(submitted.flow_run_id).state.type.value == "CANCELLED"
    assert tracked(submitted.run_id).info.status == "KILLED"


def cancel_through_the_api(api_url: str, flow_run_id: str) -> None:
    answer = api(api_url).post(
        f"/flow_runs/{flow_run_id}/set_state",
        json={"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False},
    )
    answer.raise_for_status()


OWNER = """
import sys
from prefect_mlprojects import run
run(sys.argv[1], "tree", env_manager="local", synchronous=sys.argv[2] == "sync")
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_cancels_run(
    number: signal.Signals, mode: str, greet: str, workspace: Path, prefect_server: Any
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, greet, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    grandchild = int(owner.stdout.readline().split()[1])

    owner.send_signal(number)
    _, errors = owner.communicate(timeout=120)

    assert not is_alive(grandchild)
    assert owner.returncode in {-number, 128 + number, 1} if mode == "sync" else True, errors
    from mlflow.tracking import MlflowClient

    (mlflow_run,) = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}").search_runs(["0"])
    assert mlflow_run.info.status == "KILLED", errors


def test_kill_9_of_the_owner_leaves_no_process(greet: str, workspace: Path, prefect_server: Any) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, greet, "sync"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    grandchild = int(owner.stdout.readline().split()[1])
    owner.kill()
    owner.wait()
    wait_for(lambda: not is_alive(grandchild), "the guard to end the grandchild")


def test_run_inside_flow_becomes_child_flow_run(
    greet: str, workspace: Path, prefect_state: Read, prefect_server: Any
) -> None:
    import prefect
    from prefect.settings import PREFECT_API_URL, temporary_settings

    ids: list[str] = []

    @prefect.flow
    def parent() -> None:
        ids.append(run(greet, env_manager="local").flow_run_id)

    @prefect.flow
    async def async_parent() -> None:
        ids.append(run(greet, env_manager="local").flow_run_id)

    import asyncio

    # Prefect reads its environment once, when it is imported: by another test, perhaps, before there was a server.
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url}):
        parent()
        asyncio.run(async_parent())
    assert [prefect_state(each).parent_task_run_id is not None for each in ids] == [True, True]


def test_run_uses_active_mlflow_experiment_by_default(greet: str, workspace: Path, tracked: Read) -> None:
    import mlflow

    chosen = mlflow.set_experiment("chosen")
    ours = run(greet, env_manager="local")
    named = run(greet, env_manager="local", experiment_name="named")

    assert tracked(str(ours.run_id)).info.experiment_id == chosen.experiment_id
    assert tracked(str(named.run_id)).info.experiment_id != chosen.experiment_id


def test_run_inside_mlflow_run_is_nested(greet: str, workspace: Path, tracked: Read) -> None:
    import mlflow

    with mlflow.start_run() as parent:
        submitted = run(greet, env_manager="local")
    assert tracked(submitted.run_id).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_runs_inside_a_running_event_loop(greet: str, workspace: Path) -> None:
    import asyncio

    async def body() -> str:
        return run(greet, env_manager="local").get_status()

    assert asyncio.run(body()) == "FINISHED"


def test_more_asynchronous_runs_than_places_all_finish(greet: str, workspace: Path, prefect_state: Read) -> None:
    count = max_concurrent_runs() + 8
    runs = [run(greet, parameters={"name": str(n)}, env_manager="local", synchronous=False) for n in range(count)]
    assert [each.wait() for each in runs] == [True] * count
    assert len({each.run_id for each in runs}) == count
    assert {prefect_state(each.flow_run_id).state.type.value for each in runs} == {"COMPLETED"}


def test_handles_are_thread_safe(greet: str, workspace: Path) -> None:
    submitted = run(greet, "sleep", env_manager="local", synchronous=False)
    threads = [threading.Thread(target=method) for method in [submitted.wait, submitted.cancel] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert submitted.get_status() == "KILLED"


def test_long_output_is_logged_completely_and_in_order(greet: str, workspace: Path, flow_log: Read, capfd: Any) -> None:
    submitted = run(greet, "lines", parameters={"count": 20_000}, env_manager="local")
    records = flow_log(submitted.flow_run_id)
    assert "\n".join(record.message for record in records).splitlines() == [f"line {n}" for n in range(20_000)]
    assert len(records) < 500


def test_progress_bar_is_reduced_to_few_log_lines(workspace: Path, flow_log: Read, capfd: Any) -> None:
    (workspace / "bar.py").write_text(
        "import sys, time\n"
        "for step in range(101):\n"
        "    sys.stderr.write(f'\\r{step} %'), sys.stderr.flush(), time.sleep(0.025)\n"
        "sys.stderr.write('\\n'), print('done')\n"
    )
    submitted = run(str(workspace), "bar.py", env_manager="local")
    lines = [line for record in flow_log(submitted.flow_run_id) for line in record.message.splitlines()]
    assert lines[0] == "0 %"
    assert sorted(lines[-2:]) == ["100 %", "done"]
    assert 4 <= len(lines) <= 6
    assert capfd.readouterr().err.count("\r") == 101


def test_child_process_receives_run_ids(greet: str, workspace: Path, capfd: Any) -> None:
    submitted = run(greet, "variables", env_manager="local")
    variables = dict(line.split("=", 1) for line in capfd.readouterr().out.splitlines() if "=" in line)
    assert variables["MLFLOW_RUN_ID"] == submitted.run_id
    assert variables["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_TRACKING_URI"]
    assert variables["MLFLOW_EXPERIMENT_ID"] == "0"
    assert variables["PREFECT_MLPROJECTS_FLOW_RUN_ID"] == submitted.flow_run_id


def test_cancelled_before_it_starts(
    greet: str, workspace: Path, prefect_state: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys
from prefect_mlprojects import run
first = run(sys.argv[1], "sleep", env_manager="local", synchronous=False)
second = run(sys.argv[1], env_manager="local", synchronous=False)
assert second.get_status() == "RUNNING"
second_cancel = __import__("threading").Thread(target=second.cancel)
second_cancel.start()
first.cancel()
second_cancel.join()
print(first.get_status(), second.get_status(), second.flow_run_id)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, greet],
        capture_output=True,
        text=True,
        env={**os.environ, "PREFECT_MLPROJECTS_MAX_CONCURRENT_RUNS": "1"},
        check=True,
        timeout=120,
    )
    *_, last = done.stdout.splitlines()
    first, second, flow_run_id = last.split()
    assert (first, second) == ("KILLED", "KILLED")
    assert prefect_state(flow_run_id).state.type.value == "CANCELLED"


def test_attach_to_unknown_flow_run_reports_id(workspace: Path) -> None:
    with pytest.raises(ExecutionException, match="00000000-0000-0000-0000-000000000001"):
        SubmittedRun.attach("00000000-0000-0000-0000-000000000001")
    with pytest.raises(ExecutionException, match="No run 'nonsense' found"):
        SubmittedRun.attach("nonsense")


def test_cancelled_is_not_failed(greet: str, workspace: Path) -> None:
    submitted = run(greet, "sleep", env_manager="local", synchronous=False)
    submitted.cancel()
    result = submitted.result()
    assert isinstance(result.error, RunCancelled)
