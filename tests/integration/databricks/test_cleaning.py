from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.databricks_api import FakeWorkspace
from tests.integration.databricks.bench import Bench
from tests.services.waiting import wait_for

from prefect_mlprojects.backends.databricks.config import parse_databricks_config
from prefect_mlprojects.backends.databricks.storage import clean_workspace

SHARED = "/Volumes/main/ml/code/shared"


def clean(days: float = 0.0, *, dry_run: bool = False, place: str | None = None) -> list[str]:
    return clean_workspace(parse_databricks_config({"code-path": place}), days=days, dry_run=dry_run)


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 86_400
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


@pytest.mark.parametrize("place", [None, SHARED, "dbfs:/projects"])
def test_files_of_terminated_runs_are_removed(bench: Bench, place: str | None) -> None:
    config = {"code-path": place} if place else {}
    bench.program("raise SystemExit(3)")
    bench.run(config)

    assert len(clean(place=place, dry_run=True)) == 3
    assert len(clean(place=place)) == 3

    assert list(bench.workspace.root.rglob("*.tar.gz")) == []
    assert clean(place=place) == []


def test_files_younger_than_limit_are_kept(bench: Bench) -> None:
    bench.program("print()")
    bench.run()

    assert clean(30) == []
    age(bench.workspace.root / "Workspace", 31)
    assert len(clean(30)) == 2


@pytest.mark.parametrize("state", ["QUEUED", "PENDING", None])
def test_code_of_active_run_is_kept(bench: Bench, state: str | None) -> None:
    bench.workspace.drivers.hold = state
    bench.program("import time; print('started', flush=True); time.sleep(3)")
    thread, found, _ = bench.start()
    wait_for(lambda: 1000 in bench.workspace.runs and bench.last.life_cycle == (state or "RUNNING"), "the run")
    # Days later: it still waits, and its note is as old.
    age(bench.workspace.root / "Workspace", 40)
    before = bench.files("code") + bench.files("runs")

    assert clean() == []
    assert bench.files("code") + bench.files("runs") == before
    bench.workspace.drivers.hold = None
    thread.join(60)

    assert found[0].succeeded, found
    assert len(clean()) == 2


def test_code_of_another_users_run_is_kept(bench: Bench, workspace: FakeWorkspace, monkeypatch: Any) -> None:
    workspace.drivers.hold = "QUEUED"
    bench.program("print('done')")
    thread, found, _ = bench.start({"code-path": SHARED})
    wait_for(lambda: 1000 in workspace.runs, "the submission")
    age(workspace.root / "Volumes", 20)
    # He may not see the run at all.
    monkeypatch.setenv("DATABRICKS_TOKEN", workspace.people.grant("bob@example.com"))

    assert clean(place=SHARED) == []
    workspace.drivers.hold = None
    thread.join(60)

    assert found[0].succeeded, found


def test_code_that_went_between_preparation_and_submission_is_uploaded_again(bench: Bench, monkeypatch: Any) -> None:
    from prefect_mlprojects.backends.databricks.backend import DatabricksBackend

    bench.program("print('done')")
    prepare = DatabricksBackend.prepare

    def cleaned_after(self: Any, *arguments: Any) -> Any:
        preparation = prepare(self, *arguments)
        assert len(clean()) == 2
        return preparation

    monkeypatch.setattr(DatabricksBackend, "prepare", cleaned_after)

    assert bench.run().succeeded


def test_run_with_deleted_code_reports_unreadable_code(bench: Bench) -> None:
    bench.workspace.drivers.hold = "QUEUED"
    bench.program("print('done')")
    thread, found, _ = bench.start()
    wait_for(lambda: 1000 in bench.workspace.runs, "the submission")
    next(bench.workspace.root.rglob("*.tar.gz")).unlink()
    bench.workspace.drivers.hold = None
    thread.join(60)

    assert found[0].ending == "not-started"
    assert "can't be read on the driver" in found[0].cause


def test_many_runs_are_looked_through(bench: Bench) -> None:
    bench.workspace.drivers.hold = "QUEUED"
    bench.program("print('done')")
    threads = [bench.start()[0] for _ in range(1)]
    wait_for(lambda: 1000 in bench.workspace.runs, "the submission")
    body = {key: value for key, value in bench.last.body.items() if key != "idempotency_token"}
    other = {**body["tasks"][0]["spark_python_task"], "parameters": ["{}"]}
    for _ in range(60):
        bench.workspace.jobs.answer(
            "POST",
            "submit",
            {**body, "tasks": [{**body["tasks"][0], "spark_python_task": other}]},
            "ada@example.com",
        )
    age(bench.workspace.root / "Workspace", 40)

    assert clean() == []
    bench.workspace.drivers.hold = None
    threads[0].join(120)
