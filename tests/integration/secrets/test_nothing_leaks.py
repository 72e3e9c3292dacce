"""A marker is planted in every entrance of a secret; after runs of each outcome it must not be found anywhere.

The search is that of `tests.services.secret_search`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.git_server import TOKEN, USER, serve_repository
from tests.services.mlflow_server import MlflowServer
from tests.services.package_index import PACKAGE, package_index
from tests.services.secret_search import ENDS, House, leaks, marker

from prefect_mlprojects.blocks import GitCredentialsBlock, MLflowTrackingServer, MLprojectBackend
from prefect_mlprojects.server.process import ServerAddress

THIRD_PARTY = """\
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.backends.containers.engine import LocalConfig
from prefect_mlprojects.backends.local import LocalBackend


class MoonConfig(LocalConfig):
    token: Secret | None = None
    headers: dict[str, Secret] = {}


class Moon(LocalBackend):
    name = "moon"
    config_model = MoonConfig
"""


@pytest.fixture
def house(tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer) -> House:
    return House(tmp_path, prefect_server, mlflow_server)


@pytest.fixture
def private_repository(house: House) -> Iterator[str]:
    """HOST:PORT of a server with the project as ``project.git``, behind the password `TOKEN`."""
    with serve_repository(house.project(PACKAGE)) as address:
        yield address


def test_secrets_given_to_run(house: House, private_repository: str) -> None:
    control = marker("control")
    secrets = {
        "project": TOKEN,
        **{name: marker(name) for name in ("tracking", "index", "proxy", "auth", "registry", "engine", "header")},
    }
    with package_index("ci", secrets["index"]) as index:
        house.environment |= {
            "MLFLOW_TRACKING_URI": house.mlflow_server.uri.replace("://", f"://ci:{secrets['tracking']}@"),
            "UV_INDEX_URL": f"http://ci:{secrets['index']}@{index}/simple",
            "HTTPS_PROXY": f"http://ci:{secrets['proxy']}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
            "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"X-Access": secrets["header"]}),
        }
        ends, found = house.run(
            f"http://{USER}:{TOKEN}@{private_repository}/project.git",
            secrets,
            "main",
            "fail",
            "sleep",
            env_manager="uv",
            parameters={"control": control},
            docker_auth={"username": "ci", "password": secrets["auth"]},
            backend_config={
                "credentials": {"username": "ci", "password": secrets["registry"]},
                "docker-engine": {"host": "tcp://127.0.0.1:9", "client_key": secrets["engine"]},
            },
        )

    assert ends == ENDS, (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)
    # The search does find what is stored in the clear.
    seen = leaks({"control": control}, *house.kept)
    servers = (os.environ["PREFECT_MLPROJECTS_SERVER_DIR"], str(house.mlflow_server.folder))
    assert all(any(server in place and place.endswith(".db") for place in seen) for server in servers), seen


def test_secrets_from_blocks(house: House, private_repository: str, save_block: Callable[[Any, str], None]) -> None:
    secrets = {"project": TOKEN, "tracking": marker("tracking"), "registry": marker("registry")}
    name = f"leak-{uuid.uuid4().hex[:8]}"
    save_block(GitCredentialsBlock.model_validate({"username": USER, "token": TOKEN}), name)
    save_block(
        MLflowTrackingServer.model_validate(
            {"uri": house.mlflow_server.uri, "username": "ci", "password": secrets["tracking"]}
        ),
        name,
    )
    credentials = {"credentials": {"username": "ci", "password": secrets["registry"]}}
    save_block(MLprojectBackend.model_validate({"config": {"grace-period": 3}, "secrets": credentials}), name)
    ends, found = house.run(
        f"http://{private_repository}/project.git",
        secrets,
        "fail",
        "sleep",
        env_manager="local",
        git_credentials=name,
        tracking=name,
        backend_config=f"mlproject-backend/{name}",
    )

    assert ends == ["FAILED", "KILLED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)


def test_secrets_of_a_third_partys_backend(house: House) -> None:
    secrets = {"token": marker("token"), "header": marker("header")}
    (house.root / "site" / "moon-1.0.dist-info").mkdir(parents=True)
    (house.root / "site" / "moon.py").write_text(THIRD_PARTY)
    info = house.root / "site" / "moon-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prefect_mlprojects.backends]\nmoon = moon:Moon\n")
    house.environment["PYTHONPATH"] = os.pathsep.join(
        [str(house.root / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    ends, found = house.run(
        str(house.project()),
        secrets,
        "fail",
        "sleep",
        env_manager="local",
        backend="moon",
        backend_config={"token": secrets["token"], "headers": {"Authorization": secrets["header"]}},
    )

    assert ends == ["FAILED", "KILLED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *house.kept)


@pytest.mark.parametrize("served", [True, False])
def test_secrets_in_a_projects_requirements(served: bool, house: House) -> None:
    secrets = {"index": marker("index")}
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    with package_index("ci", secrets["index"] if served else "another") as index:
        folder = house.project(f"--index-url http://ci:{secrets['index']}@{index}/simple", PACKAGE)
        ends, found = house.run(str(folder), secrets, "main", env_manager="uv")

    assert ends == ["FINISHED" if served else "FAILED"], (house.root / "stderr").read_text()
    # The cache may keep the project's own files, for its owner.
    assert not found | leaks(secrets, *(each for each in house.kept if each.name != "cache"))
    assert not leaks(secrets, house.root / "cache", private=True)


def test_secrets_of_a_conda_channel(house: House) -> None:
    secrets = {"channel": marker("channel")}
    house.environment["MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    folder = house.project()
    (folder / "MLproject").write_text(
        (folder / "MLproject").read_text().replace("python_env: python_env.yaml", "conda_env: conda.yaml")
    )
    channel = f"http://ci:{secrets['channel']}@127.0.0.1:9/channel"
    (folder / "conda.yaml").write_text(json.dumps({"channels": [channel], "dependencies": ["python"]}))
    ends, found = house.run(str(folder), secrets, "main", env_manager="conda")

    assert ends == ["FAILED"], (house.root / "stderr").read_text()
    assert not found | leaks(secrets, *(each for each in house.kept if each.name != "cache"))
    assert not leaks(secrets, house.root / "cache", private=True)


@pytest.fixture(autouse=True)
def needs_git() -> None:
    assert shutil.which("git") is not None, "these tests need git"
