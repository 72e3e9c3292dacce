"""Runs on a real server: listing them, naming one, its status, and running it again."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.git import git
from tests.services.waiting import free_port

from prefect_mlprojects import SubmittedRun
from prefect_mlprojects.exceptions import InvalidInputError
from prefect_mlprojects.request import RUN_ID_LABEL
from prefect_mlprojects.runs import references
from prefect_mlprojects.runs.references import find_run
from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.server.process import ensure_server, stop_server
from prefect_mlprojects.server.rest import RestApi

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LOCAL = ("--env-manager", "local")


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of this module's own: the last run on it is one of these tests."""
    folder = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patch:
        # Its profile and its address are not those of the session's server.
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            patch.delenv(name, raising=False)
        patch.setenv("PREFECT_HOME", str(folder / "prefect"))
        patch.setenv("PREFECT_MLPROJECTS_SERVER_DIR", str(folder / "server"))
        patch.setenv("PREFECT_MLPROJECTS_SERVER_PORT", str(free_port()))
        yield ensure_server(print)
        stop_server()


@pytest.fixture(scope="module")
def project() -> str:
    """The name of a project that no other test has run."""
    return f"history-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def stored(prefect_server: Any, project: str) -> list[str]:
    """Flow runs that this test has written to the server, the last one first."""
    from prefect import states

    from prefect_mlprojects.flows.run_project import run_project

    made: list[tuple[str, Any, dict[str, Any]]] = [
        ("a", states.Completed(), {"parameters": {"alpha": 0.5}}),
        ("a", states.Failed(name="TimedOut", message="It took too long."), {}),
        ("b", states.Crashed(message="It died."), {}),
        ("b", states.Cancelled(), {"extra_parameters": {"note": "two words"}}),
        ("b", states.Running(), {}),
    ]

    async def create(client: Any) -> list[str]:
        ids = []
        for entry_point, state, parameters in made:
            flow_run = await client.create_flow_run(
                run_project,
                name=f"{project}/{entry_point}",
                parameters={"uri": "x", "entry_point": entry_point, **parameters},
                state=state,
                tags=[f"tag-{entry_point}"],
            )
            await client.update_flow_run_labels(flow_run.id, {RUN_ID_LABEL: flow_run.id.hex[::-1]})
            ids.append(str(flow_run.id))
        return ids[::-1]

    return call_api(prefect_server.api_url, create)


@pytest.fixture
def api(prefect_server: Any) -> RestApi:
    return RestApi(prefect_server.api_url)


@pytest.mark.parametrize(
    "reference",
    [
        "{id}",
        "{hex}",
        "{id:.23}",
        "{hex:.12}",
        "http://127.0.0.1:4200/runs/flow-run/{id}?tab=Logs",
        "https://app.prefect.cloud/account/1/workspace/2/flow-runs/flow-run/{id}",
        "{mlflow}",
        "http://127.0.0.1:5000/#/experiments/0/runs/{mlflow}/artifacts",
    ],
)
@pytest.mark.parametrize("page", [2, 200])
def test_run_is_found_by_its_ids_and_links(
    reference: str, page: int, stored: list[str], api: RestApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with many more runs.
    monkeypatch.setattr(references, "_PAGE", page)
    for identifier in stored:
        plain = identifier.replace("-", "")
        text = reference.format(id=identifier, hex=plain, mlflow=plain[::-1])
        assert find_run(text, api).id == identifier


def test_ambiguous_reference_lists_the_candidates(stored: list[str], project: str, api: RestApi) -> None:
    with pytest.raises(InvalidInputError, match="names several runs") as caught:
        find_run(f"{project}/a", api)
    assert [line.split()[0] for line in caught.value.message.splitlines()[1:]] == stored[-2:]


def test_ambiguous_beginning_of_an_id_lists_the_candidates(
    prefect_server: Any, stored: list[str], api: RestApi
) -> None:
    from prefect.states import Completed

    from prefect_mlprojects.flows.run_project import run_project

    async def create(client: Any) -> str:
        return str((await client.create_flow_run(run_project, state=Completed())).id)

    ids = list(stored)
    while len({each[0] for each in ids}) == len(ids):
        ids.append(call_api(prefect_server.api_url, create))
    digit = next(each[0] for each in ids if [other[0] for other in ids].count(each[0]) > 1)
    with pytest.raises(InvalidInputError, match="names several runs") as caught:
        find_run(digit, api)
    assert sum(line.startswith(f"  {digit}") for line in caught.value.message.splitlines()) > 1


@pytest.mark.parametrize(
    "reference", ["nothing", "f" * 32, "00000000-0000-4000-8000-000000000000", "https://x.y/z", ""]
)
def test_unknown_reference_is_refused(reference: str, stored: list[str], api: RestApi) -> None:
    with pytest.raises(InvalidInputError, match="No run"):
        find_run(reference, api)


def test_last_is_the_run_started_last_and_not_a_scheduled_one(
    prefect_server: Any, workspace: Path, api: RestApi
) -> None:
    from datetime import datetime, timedelta, timezone

    from prefect import states

    from prefect_mlprojects.flows.run_project import run_project

    async def create(client: Any, state: Any) -> str:
        return str((await client.create_flow_run(run_project, parameters={"uri": "x"}, state=state)).id)

    new = call_api(prefect_server.api_url, create, states.Pending())
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    call_api(prefect_server.api_url, create, states.Scheduled(scheduled_time=tomorrow))
    handle = SubmittedRun.attach("last")
    assert (handle.flow_run_id, handle.get_status()) == (new, "RUNNING")
    handle.cancel()


def listed(mlprojects: Run, *arguments: str) -> list[dict[str, Any]]:
    done = mlprojects("runs", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_runs_lists_the_latest_first_with_filters(stored: list[str], project: str, mlprojects: Run) -> None:
    rows = listed(mlprojects, "--project", project)
    assert [row["flow_run_id"] for row in rows] == stored
    assert [(row["status"], row["state"]) for row in rows] == [
        ("RUNNING", "Running"),
        ("KILLED", "Cancelled"),
        ("FAILED", "Crashed"),
        ("FAILED", "TimedOut"),
        ("FINISHED", "Completed"),
    ]
    assert [row["flow_run_id"] for row in listed(mlprojects, "--project", project, "-s", "failed")] == stored[2:4]
    assert [row["flow_run_id"] for row in listed(mlprojects, "--project", project, "-s", "TimedOut")] == stored[3:4]
    assert len(listed(mlprojects, "--project", project, "-s", "killed", "-s", "FINISHED")) == 2
    assert len(listed(mlprojects, "--project", project, "--tag", "tag-b", "--limit", "2")) == 2
    assert listed(mlprojects, "--project", project[:-1]) == []

    table = mlprojects("runs", "--project", project).stdout.splitlines()
    assert len(table) == 6
    assert "note='two words'" in table[2]
    assert "FAILED (TimedOut)" in table[4]


def test_reading_commands_do_not_import_prefect(stored: list[str], workspace: Path) -> None:
    code = (
        "import sys\nfrom prefect_mlprojects.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print([name for name in ('prefect', 'mlflow', 'httpx') if name in sys.modules])"
    )
    for arguments in (["runs"], ["status", stored[0]]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_completion_knows_runs(stored: list[str], project: str, mlprojects: Run) -> None:
    def completed(word: str) -> list[str]:
        variables = {
            "_MLPROJECTS_COMPLETE": "bash_complete",
            "COMP_WORDS": f"mlprojects status {word}",
            "COMP_CWORD": "2",
        }
        return [line.partition(",")[2] for line in mlprojects(env=variables).stdout.splitlines()]

    assert completed(stored[0][:4]) == [stored[0][:8]]
    assert completed("las") == ["last"]
    assert completed(f"{project}/b") == [f"{project}/b"]


PROJECT = """\
name: again
entry_points:
  main:
    parameters: {alpha: {type: float, default: 0.5}, word: {type: string, default: x}}
    command: python -c "import mlflow; mlflow.log_metric('val_loss', {alpha}); print('alpha', {alpha}, '{word}')"
  fail: {command: "exit 7 # whatever is appended"}
"""


def test_status_says_why_and_rerun_repeats_a_run(mlprojects: Run, workspace: Path, git_url: str) -> None:
    folder = workspace / "repository"
    other_store = {"MLFLOW_TRACKING_URI": f"sqlite:///{workspace / 'other.db'}"}
    done = mlprojects("run", git_url, "-P", "alpha=0.25", "--tag", "kept", "--json", *LOCAL, env=other_store)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    (folder / "MLproject").write_text(PROJECT.replace("'alpha'", "'changed'"))
    git(folder, "commit", "-qam", "two")
    git(folder, "push", "-q", "origin", "main")

    failed = mlprojects("rerun", first["run_id"], "-e", "fail")
    assert failed.returncode == 1, failed.stderr
    status = mlprojects("status", "last")
    assert status.stdout.startswith("FAILED\n")
    for words in (
        "exit code 7",
        "user-code",
        "again/fail",
        "mlprojects rerun",
        "Prefect page  http",
        "MLflow page   http",
    ):
        assert words in status.stdout

    facts = json.loads(mlprojects("status", first["flow_run_id"][:13], "--json").stdout)
    assert (facts["status"], facts["metric"]) == ("FINISHED", {"name": "val_loss", "value": 0.25})
    assert facts["run_id"] == first["run_id"]

    # MLflow's default would be mlflow.db in this folder.
    again = mlprojects(
        "rerun", first["run_id"], "-P", "word=y z", "--tag", "new", "--json", env={"MLFLOW_TRACKING_URI": ""}
    )
    assert again.returncode == 0, again.stderr
    assert "alpha 0.25 y z" in again.stderr
    result = json.loads(again.stdout)
    assert result["run_id"] != first["run_id"]
    assert result["tracking_uri"] == first["tracking_uri"]
    repeated = json.loads(mlprojects("status", "last", "--json").stdout)
    assert repeated["commit"] == facts["commit"]
    assert sorted(repeated["tags"]) == ["backend:local", "entry-point:main", "kept", "new", "project:again"]

    started = mlprojects("rerun", "last", "-v", "main", "--detach")
    changed = started.stdout.strip()
    assert mlprojects("wait", changed).returncode == 0, started.stderr
    assert "changed 0.25 y z" in mlprojects("logs", changed).stdout

    wrong = mlprojects("rerun", "last", "-e", "main", "-P", "alpha=no")
    assert wrong.returncode == 2
    assert "alpha" in wrong.stderr


@pytest.fixture
def git_url(workspace: Path) -> str:
    """A repository with a project, by a URL that is fetched."""
    folder = workspace / "repository"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    git(folder, "init", "-qb", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "one")
    git(workspace, "clone", "-q", "--bare", str(folder), "origin.git")
    git(folder, "remote", "add", "origin", str(workspace / "origin.git"))
    return f"file://{workspace / 'origin.git'}"
