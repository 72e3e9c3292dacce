"""Runs Docker projects on a real engine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.services import docker_engine
from tests.services.recorder import Recorder
from tests.services.waiting import wait_for, wait_for_exit

from prefect_mlprojects import run
from prefect_mlprojects._support.progress import send_progress_to
from prefect_mlprojects.backends.docker import containers
from prefect_mlprojects.exceptions import (
    BackendError,
    BackendUnavailableError,
    ExecutionException,
    ParameterError,
    RunFailed,
    RunTimedOut,
)

Containers = Callable[[str], list[Any]]


def _shared_folder(tmp_path: Path) -> Path:
    """A folder that everybody may write into, in folders that everybody may enter."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for parent in shared.parents:
        if parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o755)
    return shared


def test_run_copies_the_project_and_records_the_image(
    project: Path, capfd: pytest.CaptureFixture[str], containers_of: Containers
) -> None:
    from mlflow import MlflowClient

    done = run(str(project), parameters={"word": "two words; $(date) 'q' \"d\" \\ é"})
    output = capfd.readouterr()

    assert output.out == "out two words; $(date) 'q' \"d\" \\ é\nthe data\n/mlflow/projects/code\n"
    assert "err\n" in output.err
    assert containers_of(done.flow_run_id) == []
    # What the command writes stays in the container.
    assert not (project / "copy.txt").exists()
    found = MlflowClient().get_run(done.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.project.env"] == "docker"
    assert found.data.tags["mlflow.docker.image.uri"] == "busybox-tests:1"
    assert found.data.tags["mlflow.docker.image.id"].startswith("sha256:")


def test_variables_of_project_call_and_run_reach_the_container(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "for S3")
    monkeypatch.setenv("UNRELATED", "stays here")
    done = run(str(project), "variables", docker_args={"e": ["FIXED=from call", "MORE=1"], "hostname": "box"})
    variables = dict(line.partition("=")[::2] for line in capfd.readouterr().out.splitlines())

    assert variables["FIXED"] == "from call"
    assert (variables["MORE"], variables["COPIED"], variables["AWS_SECRET_ACCESS_KEY"]) == ("1", "from here", "for S3")
    assert variables["MLFLOW_RUN_ID"] == done.run_id
    assert variables["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_TRACKING_URI"]
    assert "UNRELATED" not in variables


def test_failed_command_removes_the_container(project: Path, containers_of: Containers) -> None:
    with pytest.raises(RunFailed, match="exit code 3") as caught:
        run(str(project), "fail")
    assert (caught.value.exit_code, caught.value.output_tail) == (3, ("going down",))
    assert containers_of(str(caught.value.flow_run_id)) == []
    with pytest.raises(RunFailed, match=r"exit code 127\. A command was not found"):
        run(str(project), "missing")


def test_output_arrives_in_order(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(str(project), "lines")
    assert capfd.readouterr().out.splitlines() == [f"line {number}" for number in range(2000)]


def test_timeout_and_cancel_remove_the_container(project: Path, containers_of: Containers) -> None:
    with pytest.raises(RunTimedOut) as caught:
        run(str(project), "sleep", timeout=2)
    assert containers_of(str(caught.value.flow_run_id)) == []

    handle = run(str(project), "sleep", synchronous=False)
    wait_for(
        lambda: [each for each in containers_of(handle.flow_run_id) if each["State"] == "running"], "the container"
    )
    handle.cancel()
    assert handle.get_status() == "KILLED"
    assert containers_of(handle.flow_run_id) == []


@pytest.mark.parametrize("init", [True, False])
def test_cancel_lets_a_program_of_a_sequence_handle_sigterm(
    project: Path, init: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = run(str(project), "checkpoint", docker_args={"init": init}, synchronous=False)
    output: list[str] = []

    def begun() -> bool:
        output.append(capfd.readouterr().out)
        return "begun" in "".join(output)

    wait_for(begun, "the command's output", 60)
    handle.cancel()

    assert handle.get_status() == "KILLED"
    assert ("".join(output) + capfd.readouterr().out).splitlines() == ["begun", "checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_process_removes_the_container(
    number: signal.Signals, project: Path, tmp_path: Path, engine: Any
) -> None:
    code = (
        "import sys\nfrom prefect_mlprojects import run\n"
        "run(sys.argv[1], 'sleep', docker_args={'label': 'test=' + sys.argv[2]})\n"
    )
    with (tmp_path / "stderr").open("wb") as stderr:
        owner = subprocess.Popen(
            [sys.executable, "-c", code, str(project), f"-{os.getpid()}-{number}"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"sleeping now\n"
    ours = f"test=-{os.getpid()}-{number}"
    (container,) = engine.containers(all=True, filters={"label": ours})
    owner.send_signal(number)
    wait_for_exit(owner, tmp_path / "stderr")

    def gone() -> bool:
        return all(each["Id"] != container["Id"] for each in engine.containers(all=True))

    wait_for(gone, "the container's end")


def test_image_with_the_project_runs_unchanged(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "MLproject").write_text("name: x\nentry_points:\n  main: {command: pwd}\n")
    run(str(project), docker_args={"image": "busybox-carried:1"})
    assert capfd.readouterr().out == "/carried\n"


def test_path_parameter_outside_the_project_is_mounted(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "with space" / "outside.txt"
    outside.parent.mkdir()
    outside.write_text("from outside\n")
    run(str(project), parameters={"file": str(outside)})
    assert "from outside\n" in capfd.readouterr().out


def test_mounted_project_keeps_written_files(project: Path) -> None:
    run(str(project), backend_config={"project-files": "mount"})
    assert (project / "copy.txt").read_text() == "the data\n"


def test_written_files_belong_to_the_caller(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared = _shared_folder(tmp_path)
    run(str(project), "who", docker_args={"volumes": {str(shared): {"bind": "/shared", "mode": "rw"}}})
    assert (shared / "made").stat().st_uid == os.getuid()
    assert capfd.readouterr().out == f"{os.getuid()}\n"
    (shared / "made").unlink()
    run(str(project), "who", docker_args={"v": f"{shared}:/shared", "user": "1234"})
    assert capfd.readouterr().out == "1234\n"
    assert (shared / "made").stat().st_uid == 1234


def test_built_image_is_reused_until_files_change(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / ".dockerignore").write_text("secret.txt\n")
    (project / "secret.txt").write_text("x")
    from mlflow import MlflowClient

    def image() -> tuple[str, str]:
        done = run(str(project), build_image=True)
        tags = MlflowClient().get_run(done.run_id).data.tags
        return tags["mlflow.docker.image.uri"], tags["mlflow.docker.image.id"]

    first = image()
    assert first[0].startswith("contained:")
    assert "/mlflow/projects/code" in capfd.readouterr().out
    assert image() == first
    (project / "data.txt").write_text("other data\n")
    second = image()
    assert second[1] != first[1]
    assert "other data" in capfd.readouterr().out
    (project / "MLproject").write_text((project / "MLproject").read_text().replace("pwd", "ls -A"))
    capfd.readouterr()
    image()
    assert "secret.txt" not in capfd.readouterr().out.splitlines()


@pytest.mark.parametrize("options", [{}, {"build_image": True}])
def test_links_out_of_the_project_lead_to_their_files(
    options: dict[str, Any], project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "data.txt").write_text("from a link\n")
    (project / "data.txt").unlink()
    (project / "data.txt").symlink_to(tmp_path / "large" / "data.txt")
    run(str(project), **options)
    assert "from a link\n" in capfd.readouterr().out
    with (tmp_path / "large" / "sparse").open("wb") as sparse:
        sparse.truncate(2 << 30)
    (project / "all").symlink_to(tmp_path / "large")
    with pytest.raises(ExecutionException, match=r"The link 'all' leads out of the project, to .*large: .*1024 MiB"):
        run(str(project), **options)


def test_links_to_a_mounted_folder_are_kept(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data.txt").write_text("here\n")
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "data.txt").write_text("mounted\n")
    (project / "data.txt").unlink()
    (project / "data.txt").symlink_to(tmp_path / "here" / "data.txt")
    run(str(project), docker_args={"v": f"{tmp_path / 'mounted'}:{tmp_path / 'here'}"})
    assert "mounted\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"docker_args": {"memroy": "1g"}}, ParameterError, "did you mean 'memory'"),
        ({"docker_args": {"d": True}}, ParameterError, "the run waits for its container"),
        ({"docker_args": {"cpus": "many"}}, ParameterError, "can't be 'many'"),
        (
            {"docker_args": {"image": "no-such-image:1"}, "backend_config": {"pull": "never"}},
            BackendUnavailableError,
            "pull is 'never'",
        ),
        ({"docker_args": {"gpus": "all"}}, RunFailed, "no driver|NVIDIA|could not select"),
        ({"docker_args": {"network": "nowhere"}}, RunFailed, "network"),
        ({"docker_args": {"entrypoint": "/no/such"}}, RunFailed, "entrypoint|No such file"),
        ({"env_manager": "uv"}, ParameterError, "can't be used in a container"),
        ({"backend_config": {"project-file": "mount"}}, BackendError, "did you mean 'project-files'"),
        (
            {"backend_config": {"docker-host": "unix:///nowhere.sock"}},
            BackendError,
            "No Docker engine answers at unix:///nowhere",
        ),
    ],
    ids=str,
)
def test_invalid_request_is_refused(
    arguments: dict[str, Any], error: type[Exception], words: str, project: Path
) -> None:
    with pytest.raises(error) as caught:
        run(str(project), **arguments)
    assert re.search(words, "\n".join([str(caught.value), *getattr(caught.value, "output_tail", ())]))


def test_missing_variable_to_copy_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COPIED")
    with pytest.raises(ParameterError, match="copies the variable COPIED, which is not set"):
        run(str(project))


def test_push_and_pull_use_credentials(
    project: Path, engine: Any, registry: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from prefect_mlprojects.backends.containers.image import EngineImages
    from prefect_mlprojects.types import StopSignal

    auth = {"username": docker_engine.USER, "password": docker_engine.PASSWORD}
    name = f"{registry}/team/box:1"
    engine.tag("busybox-tests:1", f"{registry}/team/box", "1")
    lines: list[str] = []
    images = EngineImages(engine, "local", lines.append, StopSignal())
    progress: list[tuple[str, float]] = []
    with send_progress_to(lambda what, fraction: progress.append((what, fraction))):
        pinned = images.push(name, auth)
    assert progress[-1] == (f"pushing {name}", 1.0)
    assert pinned.startswith(f"{registry}/team/box@sha256:")
    with pytest.raises(BackendError, match="can't be pushed"):
        images.push(name, None)
    engine.remove_image(name)
    with pytest.raises(BackendUnavailableError, match=r"can't be pulled.*docker_auth"):
        run(str(project), docker_args={"image": name})
    for call in (
        {"docker_auth": auth, "docker_args": {"image": name}},
        {"docker_args": {"image": name}, "backend_config": {"pull": "always", "credentials": auth}},
        {"docker_args": {"image": pinned}},
    ):
        done = run(str(project), **call)
        assert done.get_status() == "FINISHED"
        assert docker_engine.PASSWORD not in capfd.readouterr().err
    assert docker_engine.PASSWORD not in "".join(lines)


def test_restarted_flow_run_continues_with_its_container(project: Path, engine: Any, containers_of: Containers) -> None:
    """A second execution of the same flow run finds its container and starts no other."""
    import threading

    from prefect_mlprojects.backends.contract import BackendRequest, Command, RunIdentity
    from prefect_mlprojects.backends.docker.backend import DockerBackend
    from prefect_mlprojects.sources import detect_source
    from prefect_mlprojects.spec import check_parameters, find_entry_point, load_project
    from prefect_mlprojects.types import StopSignal

    backend = DockerBackend()
    loaded = load_project(project)
    entry_point = find_entry_point(loaded, "sleep")
    copy = detect_source(str(project)).fetch(StopSignal(), lambda _: None)
    request = BackendRequest(loaded, entry_point, check_parameters(entry_point, {}), copy, backend.parse_config({}))
    prepared = backend.prepare(request, lambda _: None, StopSignal())
    identity = RunIdentity("flow-run-" + str(os.getpid()), "m", "contained", "sleep")
    command = Command(entry_point.command, {}, identity)
    events = Recorder()

    stops = [StopSignal(), StopSignal()]
    threads = []
    for number, stop in enumerate(stops):
        threads.append(threading.Thread(target=backend.execute, args=(prepared, command, events, stop)))
        threads[-1].start()
        wait_for(lambda n=number: events.data.count(b"sleeping now") == n + 1, "the output")  # type: ignore[misc]
    assert len(containers_of(identity.flow_run_id)) == 1
    stops[1].request("enough")
    for thread in threads:
        thread.join(60)
    assert containers_of(identity.flow_run_id) == []


def test_quiet_container_is_not_lost(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_PING_AFTER", 0.5)
    run(str(project), "quiet")
    assert capfd.readouterr().out == "at last\n"


def test_out_of_memory_is_named(project: Path) -> None:
    with pytest.raises(RunFailed, match="out of memory") as caught:
        run(str(project), "greedy", docker_args={"memory": "16m", "memory-swap": "16m"})
    assert "memory=" in str(caught.value)
    assert caught.value.category == "out-of-memory"


def test_failed_build_names_its_step(project: Path, engine: Any) -> None:
    docker_engine.import_busybox(engine, "busybox-onbuild:1", changes=["ONBUILD RUN echo building && false"])
    with pytest.raises(BackendError, match=r"can't be built in the step 'Step 1/4 : FROM.*returned a non-zero code: 1"):
        run(str(project), docker_args={"image": "busybox-onbuild:1"}, build_image=True)


@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_stop_while_pulling_ends_the_run(number: signal.Signals | None, project: Path) -> None:
    """The registry accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        image = f"127.0.0.1:{silent.getsockname()[1]}/team/box:1"
        if number is None:
            handle = run(str(project), docker_args={"image": image}, synchronous=False)
            silent.accept()
            handle.cancel()
            assert handle.get_status() == "KILLED"
            return
        code = "import sys\nfrom prefect_mlprojects import run\nrun(sys.argv[1], docker_args={'image': sys.argv[2]})\n"
        owner = subprocess.Popen([sys.executable, "-c", code, str(project), image], stderr=subprocess.PIPE)
        silent.accept()
        owner.send_signal(number)
        _, stderr = owner.communicate(timeout=60)
    assert b"KeyboardInterrupt" in stderr
    assert owner.returncode in (1, 130, -signal.SIGINT)


def test_unprivileged_caller_can_write_into_the_project(project: Path, tmp_path: Path) -> None:
    shared = _shared_folder(tmp_path)
    (project / "MLproject").write_text(
        "name: own\ndocker_env: {image: 'busybox-tests:1'}\n"
        "entry_points:\n  main: {command: 'cat data.txt > new.txt && mkdir sub && id -u > /shared/id'}\n"
    )
    # Another user's identity, with which this Python can still read its own files.
    code = (
        "import os, sys\nos.setresgid(4321, 0, 0)\nos.setresuid(4321, 0, 0)\n"
        "from prefect_mlprojects import run\nrun(sys.argv[1], docker_args={'v': sys.argv[2]})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(project), f"{shared}:/shared"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (shared / "id").read_text() == "4321\n"
    assert (shared / "id").stat().st_uid == 4321


def test_metrics_and_artifacts_reach_the_local_store(project: Path, python_image: str) -> None:
    """The store is a SQLite file of this machine, with an artifact folder beside it."""
    from mlflow import MlflowClient

    (project / "MLproject").write_text(
        f"name: trains\ndocker_env: {{image: '{python_image}'}}\nentry_points:\n  main: {{command: python train.py}}\n"
    )
    (project / "train.py").write_text(
        "import mlflow\n"
        "with mlflow.start_run():\n"
        "    mlflow.log_metric('loss', 0.5)\n"
        "    mlflow.log_text('learnt', 'model/weights.txt')\n"
    )
    packages = sysconfig.get_path("purelib")
    done = run(str(project), docker_args={"v": f"{packages}:/packages:ro", "e": "PYTHONPATH=/packages"})
    client = MlflowClient()
    assert client.get_run(done.run_id).data.metrics == {"loss": 0.5}
    assert [each.path for each in client.list_artifacts(done.run_id, "model")] == ["model/weights.txt"]


@pytest.fixture
def training(project: Path, python_image: str) -> dict[str, Any]:
    """The ``docker_args`` of a project that logs an artifact, and another in a nested run."""
    (project / "MLproject").write_text(
        f"name: trains\ndocker_env: {{image: '{python_image}'}}\nentry_points:\n  main: {{command: python train.py}}\n"
    )
    (project / "train.py").write_text(
        "import mlflow\n"
        "with mlflow.start_run():\n"
        "    mlflow.log_text('learnt', 'weights.txt')\n"
        "    with mlflow.start_run(nested=True):\n"
        "        mlflow.log_text('learnt', 'nested.txt')\n"
    )
    return {"v": [f"{sysconfig.get_path('purelib')}:/packages:ro"], "e": "PYTHONPATH=/packages"}


@pytest.mark.parametrize("form", ["path", "uri"])
def test_artifacts_in_another_local_folder_are_kept(
    form: str, training: dict[str, Any], project: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "with space" / "artifacts"
    client = MlflowClient()
    experiment = client.create_experiment("elsewhere", str(folder) if form == "path" else folder.as_uri())
    done = run(str(project), docker_args=training, experiment_id=experiment)

    stored = sorted(each.name for each in folder.rglob("*.txt"))
    assert stored == ["nested.txt", "stdout.txt", "weights.txt"]
    assert [each.path for each in client.list_artifacts(done.run_id)] == ["logs", "weights.txt"]


def test_artifact_folder_mounted_by_caller_is_not_mounted_twice(
    training: dict[str, Any], project: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    folder, other = tmp_path / "artifacts", tmp_path / "other"
    other.mkdir()
    experiment = MlflowClient().create_experiment("elsewhere", str(folder))
    training["v"].append(f"{other}:{folder}")
    run(str(project), docker_args=training, experiment_id=experiment)
    assert sorted(each.name for each in other.rglob("*.txt")) == ["nested.txt", "weights.txt"]


def test_credentials_of_the_artifact_store_are_passed_on(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[work]\n")
    (tmp_path / "ticket").write_text("a ticket\n")
    for name, value in {
        "HOME": str(tmp_path),
        "AWS_PROFILE": "work",
        "MLFLOW_KERBEROS_TICKET_CACHE": str(tmp_path / "ticket"),
        "MLFLOW_KERBEROS_USER": "me",
        "MLFLOW_PYARROW_EXTRA_CONF": "a=b",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    (project / "MLproject").write_text(
        "name: reads\ndocker_env: {image: 'busybox-tests:1'}\nentry_points:\n"
        "  s3: {command: 'cat $AWS_SHARED_CREDENTIALS_FILE; ls -d /.aws; echo $AWS_PROFILE'}\n"
        "  hdfs: {command: 'cat $MLFLOW_KERBEROS_TICKET_CACHE; "
        "echo $MLFLOW_KERBEROS_USER $MLFLOW_PYARROW_EXTRA_CONF $MLFLOW_ALLOW_FILE_STORE'}\n"
    )
    for scheme, output in (("s3", "[work]\n/.aws\nwork\n"), ("hdfs", "a ticket\nme a=b true\n")):
        experiment = MlflowClient().create_experiment(scheme, f"{scheme}://bucket/artifacts")
        run(str(project), scheme, experiment_id=experiment)
        assert capfd.readouterr().out == output


def test_docker_example_runs(project: Path, engine: Any, python_image: str, capfd: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[3] / "examples" / "docker"
    # Its image can't be had without the internet: another one with Python takes its name.
    if not engine.images("python:3.12-slim"):
        engine.tag(python_image, "python", "3.12-slim")
    done = run(str(example), parameters={"rounds": 2})
    assert capfd.readouterr().out == f"round 1: 3.0000\nround 2: 3.0000\nMLflow run: {done.run_id}\n"


def test_leftover_containers_are_listed_and_removed(project: Path, engine: Any) -> None:
    mine = f"leftover-{os.getpid()}"
    labels = {"prefect-mlprojects.flow-run-id": mine, "prefect-mlprojects.project": "contained"}
    host = engine.create_host_config(network_mode="none")
    running = engine.create_container("busybox-tests:1", ["sleep", "600"], labels=labels, host_config=host)["Id"]
    ended = engine.create_container("busybox-tests:1", ["true"], labels=labels, host_config=host)["Id"]
    engine.start(running)
    command = [sys.executable, "-m", "prefect_mlprojects", "docker"]

    listed = subprocess.run([*command, "ps"], capture_output=True, text=True, check=True).stdout
    assert f"{running[:12]}  running" in listed
    assert mine in listed
    # They may belong to a run that prepares them, or reads their last output.
    assert subprocess.run([*command, "clean"], capture_output=True, text=True, check=True).stdout == ""
    removed = subprocess.run([*command, "clean", "--all"], capture_output=True, text=True, check=True).stdout
    assert ended[:12] in removed
    assert running[:12] in removed


@pytest.mark.parametrize("phase", ["probe", "copy"])
def test_process_killed_while_it_prepares_a_container_leaves_none(
    project: Path, engine: Any, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"probe": "get_archive", "copy": "put_archive"}[phase]
    code = (
        "import os, signal, sys\nimport docker\nfrom prefect_mlprojects import run\n"
        f"docker.APIClient.{method} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(sys.argv[1], 'sleep')\n"
    )
    before = {each["Id"] for each in engine.containers(all=True)}

    killed = subprocess.run([sys.executable, "-c", code, str(project)], capture_output=True, check=False)

    assert killed.returncode == -signal.SIGKILL
    (left,) = [each for each in engine.containers(all=True) if each["Id"] not in before]
    if phase == "copy":
        wait_for(lambda: left["Id"] not in {each["Id"] for each in engine.containers(all=True)}, "its removal", 60)
        return
    # Listed, so that it can be removed; a later run removes it.
    assert left["Labels"].items() >= containers.PROBE_LABELS.items()
    monkeypatch.setattr(containers, "YOUNG_SECONDS", -1.0)
    containers.remove_old_probes(engine)
    assert left["Id"] not in {each["Id"] for each in engine.containers(all=True)}


def test_restarted_engine_is_named_and_its_container_removed(project: Path, engine: Any) -> None:
    # A short path: the engine's sockets are in it.
    folder = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / f"engine-{os.getpid()}"
    address = docker_engine.start_engine(folder)
    try:
        import docker

        client = docker.APIClient(base_url=address, version="auto")
        docker_engine.import_busybox(client, "busybox-tests:1")
        handle = run(str(project), "sleep", backend_config={"docker-host": address}, synchronous=False)
        wait_for(lambda: client.containers(), "the container", 60)
        docker_engine.stop_engine(folder)
        docker_engine.start_engine(folder)
        result = handle.result()
        assert "Docker engine was stopped or restarted" in result.message
        assert result.category == "infrastructure"
        assert client.containers(all=True) == []
        client.close()
    finally:
        docker_engine.stop_engine(folder)
