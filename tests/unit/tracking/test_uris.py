from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.tracking.uris import absolute_tracking_uri, run_page, sqlite_path, sqlite_uri

HERE = Path("/here/now")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:////here/now/mlflow.db"),
        ("sqlite:///../mlflow.db", "sqlite:////here/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite+pysqlite:///a/b.db?timeout=5", "sqlite+pysqlite:////here/now/a/b.db?timeout=5"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite:///file:mlflow.db?uri=true", "sqlite:///file:mlflow.db?uri=true"),
        ("mlruns", "file:///here/now/mlruns"),
        ("./my runs", "file:///here/now/my%20runs"),
        ("/data/mlruns", "file:///data/mlruns"),
        ("file:mlruns", "file:///here/now/mlruns"),
        ("file:./my%20runs", "file:///here/now/my%20runs"),
        ("file:///data/mlruns", "file:///data/mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("https://me:pw@host/prefix", "https://me:pw@host/prefix"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("postgresql://me@db/mlflow", "postgresql://me@db/mlflow"),
        ("plugin-scheme://x", "plugin-scheme://x"),
    ],
)
def test_absolute_tracking_uri_changes_relative_paths_only(uri: str, expected: str) -> None:
    assert absolute_tracking_uri(uri, HERE) == expected
    assert absolute_tracking_uri(expected, Path("/elsewhere")) == expected


def test_absolute_tracking_uri_percent_in_directory_is_kept(tmp_path: Path) -> None:
    # A question mark begins the query in SQLAlchemy 2.0, which has no way to write it in a path.
    folder = tmp_path / "100%20 x"

    assert sqlite_path(absolute_tracking_uri("sqlite:///mlflow.db", folder)) == folder / "mlflow.db"
    assert sqlite_path(sqlite_uri(folder / "mlflow.db")) == folder / "mlflow.db"


@pytest.mark.parametrize(
    "uri", ["sqlite://", "sqlite:///:memory:", "http://host", "postgresql://db/mlflow", "file:///x"]
)
def test_sqlite_path_other_uris_is_none(uri: str) -> None:
    assert sqlite_path(uri) is None


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("http://host:5000", "http://host:5000/#/experiments/3/runs/abc"),
        ("https://me:pw@host/prefix/", "https://host/prefix/#/experiments/3/runs/abc"),
        ("sqlite:////data/mlflow.db", "http://127.0.0.1:5000/#/experiments/3/runs/abc"),
        ("databricks", None),
    ],
)
def test_run_page_is_that_of_the_server_or_of_the_local_ui(uri: str, page: str | None) -> None:
    assert run_page(Secret(uri), "3", "abc")[0] == page


def test_run_page_in_workspace_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team a")

    assert run_page(Secret("http://host"), "3", "abc")[0] == "http://host/#/experiments/3/runs/abc?workspace=team%20a"


def test_run_page_database_hint_has_no_password() -> None:
    _, hint = run_page(Secret("postgresql://me:hunter2@db/mlflow"), "3", "abc")

    assert hint == "MLFLOW_TRACKING_URI='postgresql://me:***@db/mlflow' mlprojects ui"


# These tests start interpreters: the results depend on whether MLflow is imported and on the state set in it.
ASK = "from prefect_mlprojects._support.secrets import reveal\n"
ASK += "from prefect_mlprojects.tracking import resolve_tracking_uri, active_run_id, active_experiment_id\n"


def answer(program: str, directory: Path, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={**environment, "MLFLOW_ALLOW_FILE_STORE": "true", **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.splitlines()


def test_resolve_tracking_uri_default_is_a_local_database_without_importing_mlflow(
    tmp_path: Path,
) -> None:
    program = (
        ASK
        + "import sys; print(reveal(resolve_tracking_uri())); print('mlflow' in sys.modules, 'prefect' in sys.modules)"
    )

    assert answer(program, tmp_path) == [f"sqlite:///{tmp_path}/mlflow.db", "False False"]


def test_resolve_tracking_uri_variable_overrides_default(tmp_path: Path) -> None:
    program = ASK + "print(reveal(resolve_tracking_uri()))"

    assert answer(program, tmp_path, MLFLOW_TRACKING_URI="sqlite:///a.db") == [f"sqlite:///{tmp_path}/a.db"]
    assert answer(program, tmp_path, MLFLOW_TRACKING_URI="") == [f"sqlite:///{tmp_path}/mlflow.db"]


def test_resolve_tracking_uri_existing_mlruns_is_used_as_by_mlflow(tmp_path: Path) -> None:
    program = ASK + "print(reveal(resolve_tracking_uri())); import mlflow; print(mlflow.get_tracking_uri())"
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    assert answer(program, tmp_path) == [f"sqlite:///{tmp_path}/mlflow.db"] * 2

    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()

    assert answer(program, tmp_path) == [f"file://{tmp_path}/mlruns"] * 2


def test_state_set_in_mlflow_overrides_variables(tmp_path: Path) -> None:
    program = (
        ASK
        + "import mlflow; print(reveal(resolve_tracking_uri())); print(active_run_id(), active_experiment_id())\n"
        + "mlflow.set_tracking_uri('sqlite:///set.db'); print(reveal(resolve_tracking_uri()))\n"
        + "experiment = mlflow.set_experiment('mine'); print(active_experiment_id() == experiment.experiment_id)\n"
        + "with mlflow.start_run() as run: print(active_run_id() == run.info.run_id)\n"
        + "print(active_run_id())"
    )

    assert answer(program, tmp_path, MLFLOW_TRACKING_URI="sqlite:///variable.db") == [
        f"sqlite:///{tmp_path}/variable.db",
        "None None",
        f"sqlite:///{tmp_path}/set.db",
        "True",
        "True",
        "None",
    ]


def test_active_run_id_in_child_process_is_its_run(tmp_path: Path) -> None:
    program = ASK + "print(active_run_id())"

    assert answer(program, tmp_path, MLFLOW_RUN_ID="abc", MLFLOW_TRACKING_URI="sqlite:////x/y.db") == ["abc"]
    assert answer(program, tmp_path, MLFLOW_RUN_ID="abc") == ["None"]


def test_active_run_id_of_another_store_is_ignored(tmp_path: Path) -> None:
    program = ASK + "import mlflow; mlflow.set_tracking_uri('sqlite:///other.db')\n"
    program += "import os; os.environ['MLFLOW_TRACKING_URI'] = 'sqlite:///first.db'; print(active_run_id())"

    assert answer(program, tmp_path, MLFLOW_RUN_ID="abc") == ["None"]
