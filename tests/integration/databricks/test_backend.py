from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.databricks_api import FakeWorkspace
from tests.integration.databricks.bench import CLUSTER, Bench
from tests.services.git import git
from tests.services.waiting import wait_for

from prefect_mlprojects.exceptions import BackendError, EnvironmentBuildError, ExecutionException
from prefect_mlprojects.sources import WorkingCopy

SHOW = (
    "import os, sys\nprint(os.environ.get('TOKEN'), os.environ['MLFLOW_RUN_ID'], os.environ['MLFLOW_TRACKING_URI'])\n"
)


@pytest.mark.parametrize(
    "compute",
    [
        {"new_cluster": CLUSTER},
        {"cluster_spec": {"new_cluster": CLUSTER}},
        CLUSTER,
        {"job_cluster": CLUSTER},
        {"existing-cluster-id": "c-1"},
        {"environment": {"environment_version": "3"}},
    ],
)
def test_project_on_each_kind_of_compute_succeeds(bench: Bench, compute: dict[str, Any]) -> None:
    bench.program(SHOW)

    outcome = bench.run(compute)

    assert outcome.succeeded, outcome
    assert bench.recorder.streams["stdout"] == b"None run-1 https://tracking.invalid\n"
    assert bench.recorder.tags["mlflow.databricks.shellJobRunID"] == "1000"
    assert bench.recorder.links == [("Databricks run", f"{bench.workspace.host}/?o=1#job/77/run/1000")]
    assert bench.files("runs") == bench.files("output") == []


@pytest.mark.parametrize("runtime", ["dbruntime", "pyspark"])
def test_secrets_are_read_on_the_driver(bench: Bench, runtime: str) -> None:
    bench.workspace.secrets.values = {"mlflow": {"token": "s3cr3t"}}
    bench.workspace.drivers.runtime = runtime
    bench.program(SHOW)

    outcome = bench.run({"secrets": {"TOKEN": "mlflow/token"}})

    assert outcome.succeeded, outcome
    assert bench.recorder.streams["stdout"].startswith(b"s3cr3t ")
    assert "s3cr3t" not in json.dumps(bench.last.body)


def test_secret_parameter_is_read_on_the_driver_or_refused(bench: Bench) -> None:
    bench.workspace.secrets.values = {"mlflow": {"token": "s3cr3t"}}
    bench.write(
        MLproject="name: p\nentry_points:\n  main:\n    parameters: {token: {secret: true}}\n"
        "    command: echo got {token}\n"
    )

    outcome = bench.run(parameters={"token": "{{secrets/mlflow/token}}"})

    assert outcome.output_tail == ("got s3cr3t",)
    assert "s3cr3t" not in json.dumps(bench.last.body)
    for value in ("s3cr3t", "block://secret/token", "env://TOKEN"):
        with pytest.raises(BackendError, match="secrets/SCOPE/KEY") as caught:
            bench.run(parameters={"token": value})
        assert "s3cr3t" not in caught.value.message


def test_unreadable_secret_is_reported(bench: Bench) -> None:
    bench.workspace.secrets.values = {"mlflow": {"token": "s3cr3t"}}
    bench.workspace.secrets.readers = {"mlflow": {"bob@example.com"}}
    bench.program(SHOW)

    outcome = bench.run({"secrets": {"TOKEN": "mlflow/token"}})

    assert outcome.ending == "not-started"
    assert "The secret mlflow/token for the variable TOKEN can't be read on the driver" in outcome.cause
    assert "READ" in outcome.cause


def test_git_project_with_git_source_is_checked_out_by_databricks(bench: Bench, tmp_path: Path) -> None:
    bench.workspace.secrets.values = {"mlflow": {"token": "s3cr3t"}}
    bench.program(SHOW + "print(sys.argv[1:])\n", "python main.py --rate 'a b'")
    git(bench.folder, "init", "-q")
    git(bench.folder, "add", ".")
    git(bench.folder, "commit", "-qm", "first")
    commit = git(bench.folder, "rev-parse", "HEAD")
    bench.write(main__py="print('newer')")
    git(bench.folder, "commit", "-qam", "second")
    url = "https://github.com/ada/project.git"
    bench.workspace.drivers.repositories[url] = bench.folder
    copy = WorkingCopy(bench.folder, url, "git", url, commit=commit, repository_url=url)

    outcome = bench.run({"git-source": True, "secrets": {"TOKEN": "mlflow/token"}}, working_copy=copy)

    assert outcome.succeeded, outcome
    assert bench.recorder.streams["stdout"].splitlines()[:2] == [
        b"s3cr3t run-1 https://tracking.invalid",
        b"['--rate', 'a b']",
    ]
    assert bench.last.body["git_source"]["git_commit"] == commit
    assert bench.files("code") == []
    assert "s3cr3t" not in json.dumps(bench.last.body)


def test_unavailable_git_commit_is_reported(bench: Bench) -> None:
    bench.program(SHOW)
    url = "https://github.com/ada/elsewhere.git"
    copy = WorkingCopy(bench.folder, url, "git", url, commit="0" * 40, repository_url=url)

    outcome = bench.run({"git-source": True}, working_copy=copy)

    assert outcome.ending == "not-started"
    assert "could not check the repository out" in outcome.cause
    assert "leave git-source out" in outcome.advice


def test_git_source_needs_a_new_cluster(bench: Bench) -> None:
    bench.program(SHOW)

    with pytest.raises(BackendError, match="git-source needs a new_cluster"):
        bench.run({"git-source": True, "existing-cluster-id": "c-1"})


SPARK_FILE = "import os, sys, six\nprint(sys.argv[1:], six.__version__, os.environ['MLFLOW_RUN_ID'], __name__)\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  python_file: job.py\n  parameters: [a, 'b c']\n  python_libraries: [six==1.16.0]\n", "['a', 'b c']"),
        (
            "  python_libraries: [six==1.16.0]\nentry_points:\n  main:\n    parameters: {x: {type: float, default: 1}}\n"
            "    command: python job.py --x {x}\n",
            "['--x', '1']",
        ),
    ],
)
@pytest.mark.parametrize("compute", [{}, {"environment": {"environment_version": "3"}}])
def test_spark_job_with_parameters_succeeds(bench: Bench, text: str, expected: str, compute: dict[str, Any]) -> None:
    bench.write(MLproject=f"name: j\ndatabricks_spark_job:\n{text}", job__py=SPARK_FILE)

    outcome = bench.run(compute)

    assert outcome.succeeded, outcome
    assert bench.recorder.streams["stdout"].decode() == f"{expected} 1.16.0 run-1 __main__\n"


def test_spark_job_error_is_reported(bench: Bench) -> None:
    bench.write(MLproject="databricks_spark_job: {python_file: job.py}\n", job__py="raise RuntimeError('no data')\n")

    outcome = bench.run(entry_point="other")

    assert outcome.exit_code == 1
    assert any("RuntimeError: no data" in line for line in outcome.output_tail)
    assert any("entry point 'other' is ignored" in line for line in bench.recorder.reports)


def test_output_comes_while_the_run_goes_on(bench: Bench) -> None:
    bench.program("import sys, time\nprint('early')\nprint('warned', file=sys.stderr)\ntime.sleep(600)\n")

    thread, found, stop = bench.start()
    wait_for(
        lambda: b"early" in bench.recorder.streams["stdout"] and b"warned" in bench.recorder.streams["stderr"],
        "live output",
    )
    assert bench.last.life_cycle == "RUNNING"
    stop.request("enough")
    thread.join(60)

    assert found[0].ending == "stopped"
    assert bench.last.result == "CANCELED"


def test_output_may_come_at_the_end_only(bench: Bench) -> None:
    bench.program("print('late')\n")

    outcome = bench.run({"live-output": False})

    assert outcome.succeeded
    assert b"late" in bench.recorder.streams["stdout"]
    assert bench.files("output") == []
    bench.program("raise SystemExit(3)\n")
    assert bench.run({"live-output": False}).exit_code == 3


def test_cluster_policy_applies_to_job_cluster(bench: Bench) -> None:
    bench.workspace.clusters.policies = {"p-1": {"node_type_id": "i3.xlarge"}}
    bench.program(SHOW)

    bare = {"spark_version": "7.3.x-scala2.12", "num_workers": 1, "policy_id": "p-1"}
    assert bench.run({"new_cluster": {**bare, "apply_policy_default_values": True}}).succeeded
    assert bench.last.task["new_cluster"]["spark_version"] == "7.3.x-scala2.12"
    with pytest.raises(BackendError, match=r"the value must be i3.xlarge \(is \"big\"\)"):
        bench.run({"new_cluster": {**bare, "node_type_id": "big"}})
    with pytest.raises(BackendError, match="not authorized to use cluster policy p-2"):
        bench.run({"new_cluster": {**bare, "policy_id": "p-2"}})
    assert bench.files("runs") == []


def test_access_is_given_to_others(bench: Bench) -> None:
    bench.program(SHOW)
    granted = {"group_name": "data-science", "permission_level": "CAN_MANAGE_RUN"}

    assert bench.run({"access-control": [granted], "run-name": "nightly"}).succeeded
    assert bench.last.body["access_control_list"] == [granted]
    assert bench.last.body["run_name"] == "nightly"
    with pytest.raises(BackendError, match=r"Principal: user_name\(nobody\) does not exist"):
        bench.run({"access-control": [{"user_name": "nobody", "permission_level": "CAN_VIEW"}]})


@pytest.mark.parametrize("place", ["/Volumes/main/ml/code/projects", "dbfs:/projects", "/Workspace/Shared/projects"])
def test_code_upload_to_each_storage_happens_once(bench: Bench, place: str) -> None:
    bench.program(SHOW)
    assert bench.run({"code-path": place}).succeeded
    assert bench.recorder.streams["stdout"] == b"None run-1 https://tracking.invalid\n"
    uploads = [line for line in bench.recorder.reports if line.startswith("Uploading")]
    assert len(uploads) == 2
    assert all(place in line for line in uploads)

    assert bench.run({"code-path": place}).succeeded

    assert [line for line in bench.recorder.reports if line.startswith("Uploading")] == uploads


def test_half_an_upload_is_uploaded_again(bench: Bench) -> None:
    bench.program(SHOW)
    assert bench.run().succeeded
    archive = next(bench.workspace.root.rglob("*.tar.gz"))
    archive.write_bytes(archive.read_bytes()[:100])

    assert bench.run().succeeded


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/Workspace/Users/bob@example.com/x", "doesn't have Manage permission"),
        ("/Volumes/main/ml/nothing/x", "Volume 'main.ml.nothing' does not exist"),
        ("dbfs:/projects", "Public DBFS root is disabled"),
    ],
)
def test_unwritable_code_path_is_reported(bench: Bench, place: str, message: str) -> None:
    bench.workspace.dbfs.enabled = False
    bench.program(SHOW)

    with pytest.raises(BackendError, match=message):
        bench.run({"code-path": place})

    assert bench.workspace.runs == {}


def test_cluster_libraries_are_importable_by_command(bench: Bench) -> None:
    bench.program("import six; print(six.__version__)")

    assert bench.run({"libraries": [{"pypi": {"package": "six==1.16.0"}}]}).succeeded
    assert bench.recorder.streams["stdout"] == b"1.16.0\n"


def requirements(bench: Bench, text: str, program: str = "import six; print(six.__version__)") -> None:
    bench.program(program)
    mlproject = (bench.folder / "MLproject").read_text()
    bench.write(MLproject=mlproject + "python_env: python_env.yaml\n", python_env__yaml=text)


def test_environment_with_unchanged_requirements_is_reused(bench: Bench) -> None:
    bench.write(more__txt="six==1.16.0\n")
    requirements(bench, "build_dependencies: []\ndependencies: [-r more.txt]\n")
    assert bench.run({"existing-cluster-id": "c-1"}).succeeded
    bench.write(main__py="import six, sys; print('changed', six.__version__, sys.prefix)")

    assert bench.run({"existing-cluster-id": "c-1"}).succeeded

    assert b"changed 1.16.0" in bench.recorder.streams["stdout"]
    assert b"mlprojects-environments" in bench.recorder.streams["stdout"]
    assert "using the existing environment" in bench.last.logs


@pytest.mark.parametrize("how", [{"env_manager": "virtualenv"}, {}])
def test_without_uv_pip_builds_the_environment(bench: Bench, how: dict[str, Any]) -> None:
    if not how:
        # No uv on PATH, and none to be installed: the driver's Python has a pip that finds nothing.
        bench.workspace.drivers.variables = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1"}
    requirements(bench, "dependencies: []\n", "import pip, sys; print(sys.prefix != sys.base_prefix)")

    outcome = bench.run(**how)

    assert outcome.succeeded, (outcome, bench.last.logs)
    assert bench.recorder.streams["stdout"].endswith(b"True\n")
    assert "with pip" in bench.last.logs


def test_nonexistent_package_fails_before_command_starts(bench: Bench) -> None:
    requirements(bench, "dependencies: [six==99.99]\n")

    outcome = bench.run()

    assert outcome.ending == "not-started"
    assert "The environment can't be built: 'uv pip install" in outcome.cause
    assert any("six==99.99" in line for line in outcome.output_tail)


def test_editable_package_of_project_is_importable(bench: Bench) -> None:
    package = bench.folder / "own"
    package.mkdir()
    (package / "own_package.py").write_text("value = 41 + 1\n")
    (package / "pyproject.toml").write_text(
        '[project]\nname = "own-package"\nversion = "1"\n[build-system]\nrequires = ["setuptools"]\n'
        'build-backend = "setuptools.build_meta"\n[tool.setuptools]\npy-modules = ["own_package"]\n'
    )
    requirements(bench, "dependencies: ['-e ./own']\n", "import own_package; print(own_package.value)")

    for _ in range(2):
        outcome = bench.run({"existing-cluster-id": "c-1"})
        assert outcome.succeeded, outcome
    assert bench.recorder.streams["stdout"] == b"42\n42\n"


def test_requirement_outside_project_is_rejected_before_submission(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/pyproject.toml").write_text("[project]\nname = 'outside'\nversion = '1'\n")
    (tmp_path / "outside.txt").write_text(f"{tmp_path}/outside\n")
    requirements(bench, f"dependencies: ['-r {tmp_path}/outside.txt']\n")

    with pytest.raises(ExecutionException, match="outside of the project's files"):
        bench.run()

    assert bench.workspace.requests == []


@pytest.mark.parametrize("env_manager", [None, "virtualenv"])
def test_options_and_files_of_requirements_reach_the_driver(bench: Bench, env_manager: str | None) -> None:
    (bench.folder / "links").mkdir()
    for version in ("1.0", "1.1", "2.0rc1"):
        with zipfile.ZipFile(bench.folder / f"links/alpha-{version}-py3-none-any.whl", "w") as wheel:
            info = f"alpha-{version}.dist-info"
            wheel.writestr("alpha.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: alpha\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    (bench.folder / "more").mkdir()
    (bench.folder / "more/alpha.txt").write_text("--pre\n-c limits.txt\nalpha\n")
    (bench.folder / "more/limits.txt").write_text("alpha!=1.1\n")
    requirements(
        bench,
        "dependencies: [--no-index, --find-links links, '-r more/alpha.txt']\n",
        "import alpha; print(alpha.VERSION)",
    )
    outcome = bench.run(env_manager=env_manager)
    assert outcome.succeeded, (outcome, bench.last.logs)
    assert bench.recorder.streams["stdout"] == b"2.0rc1\n"


def test_locked_project_is_installed_from_uv_lock(bench: Bench) -> None:
    bench.program("import six, sys; print(six.__version__, sys.prefix)")
    bench.write(
        pyproject__toml='[project]\nname = "locked"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["six<1.17"]\n'
    )
    subprocess.run(["uv", "lock", "-q"], cwd=bench.folder, check=True)
    lock = (bench.folder / "uv.lock").read_text()
    assert 'version = "1.16.0"' in lock

    outcome = bench.run({"existing-cluster-id": "c-1"})

    assert outcome.succeeded, (outcome, bench.last.logs)
    assert b"1.16.0" in bench.recorder.streams["stdout"]
    assert b"mlprojects-environments" in bench.recorder.streams["stdout"]


def test_conda_packages_are_left_out_with_a_warning(bench: Bench) -> None:
    bench.program("import six; print(six.__version__)")
    mlproject = (bench.folder / "MLproject").read_text()
    bench.write(
        MLproject=mlproject + "conda_env: conda.yaml\n",
        conda__yaml="dependencies: [gcc=13, {pip: [six==1.16.0]}]\n",
    )

    assert bench.run().succeeded
    assert any("gcc=13" in line for line in bench.recorder.reports)
    with pytest.raises(EnvironmentBuildError, match="drivers have no conda"):
        bench.run(env_manager="conda")


def test_dbfs_paths_are_the_drivers(bench: Bench) -> None:
    (bench.workspace.root / "dbfs/data").mkdir()
    (bench.workspace.root / "dbfs/data/x.txt").write_text("content")
    bench.program("import sys; print(open(sys.argv[1]).read())", "python main.py /dbfs/data/x.txt")

    assert bench.run().succeeded
    assert bench.recorder.streams["stdout"] == b"content\n"


def test_secret_variables_are_not_submitted(bench: Bench) -> None:
    bench.program(SHOW)

    assert bench.run(variables={"DATABRICKS_TOKEN": "geheim", "MLFLOW_TRACKING_PASSWORD": "geheim"}).succeeded

    assert "geheim" not in json.dumps(bench.last.body)


def test_profile_in_tracking_uri_selects_workspace(
    bench: Bench, workspace: FakeWorkspace, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("DATABRICKS_HOST")
    monkeypatch.delenv("DATABRICKS_TOKEN")
    (tmp_path / "databrickscfg").write_text(f"[staging]\nhost = {workspace.host}\ntoken = good-token\n")
    bench.program(SHOW)

    assert bench.run(tracking_uri="databricks://staging").succeeded
    assert bench.recorder.streams["stdout"] == b"None run-1 databricks\n"
    with pytest.raises(BackendError, match="production"):
        bench.run(tracking_uri="databricks://production")


def test_oauth_tokens_are_renewed_while_the_run_goes_on(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setenv("DATABRICKS_TOKEN", "somebody-elses")
    bench.workspace.people.token_seconds = 2
    bench.program("import time; time.sleep(4)")
    credentials = {"host": bench.workspace.host, "client_id": "robot", "client_secret": "robot-secret"}

    outcome = bench.run({"credentials": credentials, "code-path": "/Volumes/main/ml/code/robot"})

    assert outcome.succeeded
    assert bench.workspace.people.issued > 1
    assert bench.last.creator == "robot"
    assert "robot-secret" not in json.dumps(bench.last.body)


def test_wrong_client_secret_is_reported_and_redacted(bench: Bench) -> None:
    bench.program(SHOW)
    credentials = {"host": bench.workspace.host, "client_id": "robot", "client_secret": "guessed"}

    with pytest.raises(BackendError, match="client_secret is wrong or expired") as caught:
        bench.run({"credentials": credentials, "network-timeout": 1})

    assert "guessed" not in caught.value.message
