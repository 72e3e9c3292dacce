"""After runs of each outcome in containers, secrets are only in the containers' environment, which is removed with them.

The search is that of `tests.services.secret_search`, and includes the logs of the engine and the registry.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.services import docker_engine
from tests.services.git_server import TOKEN, USER, serve_repository
from tests.services.mlflow_server import MlflowServer
from tests.services.secret_search import ENDS, House, leaks, marker

from prefect_mlprojects.blocks import DockerRegistry, GitCredentialsBlock, MLflowTrackingServer
from prefect_mlprojects.server.process import ServerAddress

_PROJECT = """\
name: leaky
docker_env: {{image: "busybox-tests:1", volumes: ["{root}:{root}"], environment: [COPIED_TOKEN]}}
entry_points:
  main:
    parameters: &declared {{control: {{type: string, default: none}}, hush: {{secret: true, default: none}}}}
    command: >-
      case {{hush}} in MARK-hush*|none) ;; *) exit 9;; esac;
      test -n "$API_TOKEN" && test -n "$HTTPS_PROXY" && test -n "$COPIED_TOKEN" && test -n "$MLFLOW_TRACKING_URI" &&
      echo {{control}}
  fail: {{parameters: *declared, command: "echo going down >&2; exit 3"}}
  sleep: {{parameters: *declared, command: "touch {root}/started; sleep 600"}}
"""


class EngineHouse(House):
    """The folders of a test, and the logs of the engine and the registry."""

    engine_folder = Path(os.environ["PREFECT_MLPROJECTS_TEST_ROOT"]) / "docker"

    def search(
        self, secrets: Mapping[str, str], *entry_points: str, uri: str, ends: list[str] | None = None, **options: Any
    ) -> set[str]:
        """Runs the entry points, which end as in `ENDS`, and returns where secrets were found."""
        ended, found = self.run(uri, secrets, *entry_points, **options)
        expected = ends or [dict(zip(("main", "fail", "sleep"), ENDS, strict=True))[each] for each in entry_points]
        assert ended == expected, (self.root / "stderr").read_text()
        logs = [file for file in self.engine_folder.glob("*log") if file.is_file()]
        return found | leaks(secrets, *self.kept, *logs)


@pytest.fixture
def house(project: Path, tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer) -> EngineHouse:
    (project / "MLproject").write_text(_PROJECT.format(root=tmp_path))
    house = EngineHouse(tmp_path, prefect_server, mlflow_server)
    house.environment["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    return house


@pytest.fixture
def private_repository(house: EngineHouse, project: Path) -> Iterator[str]:
    """HOST:PORT of a server with the project as ``project.git``, behind the password `TOKEN`."""
    with serve_repository(project) as address:
        yield address


@pytest.fixture
def private_image(engine: Any, registry: str) -> Iterator[str]:
    """The name of an image that only the registry has, behind its password."""
    name = f"{registry}/team/private-{uuid.uuid4().hex[:8]}"
    login = {"username": docker_engine.USER, "password": docker_engine.PASSWORD}
    engine.tag("busybox-tests:1", name, "1")
    for line in engine.push(name, tag="1", stream=True, decode=True, auth_config=login):
        assert "error" not in line, line
    engine.remove_image(f"{name}:1")
    yield f"{name}:1"
    if engine.images(name):
        engine.remove_image(f"{name}:1", force=True)


def test_secrets_given_to_run_are_stored_nowhere(
    house: EngineHouse, private_repository: str, private_image: str
) -> None:
    secrets = {
        "project": TOKEN,
        "registry": docker_engine.PASSWORD,
        **{
            name: marker(name)
            for name in ("tracking", "index", "proxy", "variable", "container-proxy", "copied", "hush", "tag")
        },
    }
    proxy = f"http://ci:{secrets['container-proxy']}@127.0.0.1:9"
    control = marker("control")
    house.environment |= {
        "MLFLOW_TRACKING_URI": house.mlflow_server.uri.replace("://", f"://ci:{secrets['tracking']}@"),
        "UV_INDEX_URL": f"http://ci:{secrets['index']}@127.0.0.1:9/simple",
        "HTTPS_PROXY": f"http://ci:{secrets['proxy']}@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "COPIED_TOKEN": secrets["copied"],
    }
    found = house.search(
        secrets,
        "main",
        "fail",
        "sleep",
        uri=f"http://{USER}:{TOKEN}@{private_repository}/project.git",
        parameters={"control": control, "hush": secrets["hush"]},
        tags=[f"data=https://ci:{secrets['tag']}@127.0.0.1:9/"],
        docker_auth={"username": docker_engine.USER, "password": docker_engine.PASSWORD},
        docker_args={
            "image": private_image,
            "e": [f"API_TOKEN={secrets['variable']}", f"HTTPS_PROXY={proxy}", "PLAIN=value"],
            "label": "plain=label",
        },
    )

    assert not found
    # The search does find what is stored in the clear.
    seen = leaks({"control": control}, *house.kept)
    servers = (os.environ["PREFECT_MLPROJECTS_SERVER_DIR"], str(house.mlflow_server.folder))
    assert all(any(server in place and place.endswith(".db") for place in seen) for server in servers), seen


def test_secrets_from_blocks_are_stored_nowhere(
    house: EngineHouse, private_repository: str, private_image: str, save_block: Callable[[Any, str], None]
) -> None:
    secrets = {
        "project": TOKEN,
        "registry": docker_engine.PASSWORD,
        **{name: marker(name) for name in ("tracking", "variable", "proxy", "copied")},
    }
    name = f"leak-{uuid.uuid4().hex[:8]}"
    save_block(GitCredentialsBlock.model_validate({"username": USER, "token": TOKEN}), name)
    save_block(DockerRegistry(username=docker_engine.USER, password=SecretStr(docker_engine.PASSWORD)), name)
    tracking = {"uri": house.mlflow_server.uri, "username": "ci", "password": secrets["tracking"]}
    save_block(MLflowTrackingServer.model_validate(tracking), name)
    house.environment["COPIED_TOKEN"] = secrets["copied"]
    found = house.search(
        secrets,
        "main",
        "fail",
        "sleep",
        uri=f"http://{private_repository}/project.git",
        git_credentials=name,
        tracking=name,
        backend_config={"credentials": name, "pull": "always"},
        docker_args={
            "image": private_image,
            "environment": {
                "API_TOKEN": secrets["variable"],
                "HTTPS_PROXY": f"http://ci:{secrets['proxy']}@proxy.invalid",
            },
        },
    )

    assert not found


@pytest.mark.parametrize("refused", ["registry", "engine", "variable", "container"])
def test_refused_secrets_are_stored_nowhere(
    refused: str, house: EngineHouse, project: Path, private_image: str
) -> None:
    secret = marker(refused)
    variable = f"API_TOKEN={secret}"
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "registry": (
            {"docker_args": {"image": private_image}, "docker_auth": {"username": "ci", "password": secret}},
            "can't be pulled",
        ),
        "engine": (
            {"backend_config": {"docker-engine": {"host": "tcp://127.0.0.1:9", "client_key": secret}}},
            "No Docker engine answers",
        ),
        "variable": ({"docker_args": {"e": [variable, "MISSING"]}}, "the variable MISSING is not set here"),
        "container": ({"docker_args": {"e": variable, "network": "nowhere"}}, "the network does not exist"),
    }
    options, message = cases[refused]
    house.environment |= {"COPIED_TOKEN": "x", "HTTPS_PROXY": f"http://ci:{secret}@127.0.0.1:9"}
    ends, found = house.run(str(project), {refused: secret}, "main", **options)

    assert ends != ["FINISHED"]
    shown = (house.root / "stderr").read_text() + os.fsdecode((house.root / "shown").read_bytes())
    assert message in shown
    assert not found | leaks({refused: secret}, *house.kept)


def test_secret_arguments_are_refused_by_deployments(house: EngineHouse, project: Path) -> None:
    from prefect_mlprojects import deploy
    from prefect_mlprojects.exceptions import ParameterError

    for argument in ("API_TOKEN=hunter2", "PROXY=http://ci:hunter2@proxy.invalid"):
        with pytest.raises(ParameterError, match=r"'e' holds a secret, which would be stored.*e=NAME") as caught:
            deploy(str(project), docker_args={"e": argument})
        assert "hunter2" not in json.dumps(str(caught.value))
