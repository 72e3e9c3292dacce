"""The exit codes of the commands: 2 for what the user named wrongly, 1 for what failed or was refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
NO_RUN = "00000000-0000-0000-0000-000000000001"
NOBODY = "127.0.0.1:9"
GREET = ("run", "{greet}", "--env-manager", "local")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["run", "file:///no/such.git#x"], {}, "/no/such.git"),
        (["run", "block://nowhere"], {}, "no block 'mlflow-project/nowhere'"),
        (["run", "{greet}", "--env-manager", "mamba"], {}, "no environment manager 'mamba'"),
        ([*GREET, "-c", "mlproject-backend/nowhere"], {}, "no block 'mlproject-backend/nowhere'"),
        ([*GREET, "--tracking", "nowhere"], {}, "no block 'mlflow-tracking-server/nowhere'"),
        ([*GREET, "--experiment-id", "987654"], {}, "No MLflow experiment with the ID '987654'"),
        ([*GREET, "--run-id", "f" * 32], {}, f"No MLflow run with the ID '{'f' * 32}'"),
        ([*GREET], {"PREFECT_MLPROJECTS_GRACE_PERIOD": "soon"}, "PREFECT_MLPROJECTS_GRACE_PERIOD is 'soon'"),
        (["status", NO_RUN], {}, f"No run '{NO_RUN}'"),
        (["wait", "x"], {}, "No run 'x' found"),
        (["cancel", NO_RUN], {}, f"No run '{NO_RUN}'"),
        (["logs", NO_RUN], {}, f"No run '{NO_RUN}'"),
        (["start", "nowhere"], {}, "no deployment of that name"),
        (["deployments", "pause", "nowhere"], {}, "no deployment of that name"),
        (["deploy", "{greet}", "-p", "nowhere"], {}, "No work pool 'nowhere'"),
        (["worker", "-p", "nowhere"], {}, "No work pool 'nowhere'"),
        (["env", "path", "nothing"], {}, "'nothing'"),
    ],
)
def test_wrong_name_exits_with_2(
    arguments: list[str], variables: dict[str, str], message: str, mlprojects: Run, greet: str
) -> None:
    done = mlprojects(*[each.replace("{greet}", greet) for each in arguments], env=variables)
    assert message in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([*GREET, "-e", "fail"], {}, "exit code 3"),
        (["run", f"https://{NOBODY}/acme/churn.git"], {}, "can't be fetched"),
        (["run", f"http://{NOBODY}/churn.zip"], {}, "can't be downloaded"),
        ([*GREET], {"MLFLOW_TRACKING_URI": f"http://{NOBODY}"}, "can't be reached"),
        (["status", NO_RUN], {"PREFECT_API_URL": f"http://{NOBODY}/api"}, "can't be reached"),
        (["deploy", "{greet}"], {"PREFECT_API_URL": f"http://{NOBODY}/api"}, "can't be reached"),
        (["docker", "ps"], {"DOCKER_HOST": f"tcp://{NOBODY}"}, "No Docker engine answers"),
        (["run", "{image}"], {"DOCKER_HOST": f"tcp://{NOBODY}"}, "No Docker engine answers"),
        (["server", "status"], {"PREFECT_MLPROJECTS_SERVER_DIR": "{workspace}/none"}, ""),
    ],
)
def test_unavailable_service_exits_with_1(
    arguments: list[str], variables: dict[str, str], message: str, mlprojects: Run, greet: str, workspace: Path
) -> None:
    (workspace / "image").mkdir()
    (workspace / "image" / "MLproject").write_text(
        "docker_env: {image: 'nowhere.invalid/x'}\nentry_points: {main: {command: 'true'}}\n"
    )
    names = {"{greet}": greet, "{image}": "image"}
    done = mlprojects(
        *[names.get(each, each) for each in arguments],
        env={name: value.replace("{workspace}", str(workspace)) for name, value in variables.items()},
    )
    assert message in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
