"""What every test shares: folders of its own instead of the user's, and one Prefect server for the whole session."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.mlflow_server import MlflowServer
from tests.services.waiting import free_port

from prefect_mlprojects.server.process import ServerAddress, ensure_server, stop_server
from prefect_mlprojects.settings import OWN_VARIABLES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets the Kubernetes tests run on a real cluster."""
    group = parser.getgroup("kubernetes")
    group.addoption(
        "--kube-context", help="Run tests/integration/kubernetes on the cluster of this kubeconfig context."
    )
    group.addoption("--kube-image", help="An image that its nodes hold, with sh, tar, gzip and python3.")
    group.addoption("--kube-registry", help="HOST:PORT of a registry that its nodes pull from.")
    group.addoption(
        "--kube-host", help="The address by which its pods reach this machine, for servers of the tests' own."
    )
    group.addoption("--kube-git-image", help="An image that its nodes hold, with sh and git; by default --kube-image.")


_ROOT_VARIABLE = "PREFECT_MLPROJECTS_TEST_ROOT"


def pytest_configure(config: pytest.Config) -> None:
    """Points everything that is kept between runs into one temporary folder, which all workers of the session share."""
    if _ROOT_VARIABLE not in os.environ:
        os.environ[_ROOT_VARIABLE] = tempfile.mkdtemp(prefix="mlp-tests-")
        config.stash[_owner] = True
    root = Path(os.environ[_ROOT_VARIABLE])
    os.environ.update(
        PREFECT_HOME=str(root / "prefect"),
        # What asks for a server that nobody named is a mistake, and shall fail.
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false",
        PREFECT_MLPROJECTS_SERVER_DIR=str(root / "server"),
        PREFECT_MLPROJECTS_SERVER_PORT="4280",
        PREFECT_MLPROJECTS_CACHE_DIR=str(root / "cache"),
        PREFECT_MLPROJECTS_GRACE_PERIOD="5",
        # A test machine is busy: the server of another test may be starting too.
        PREFECT_MLPROJECTS_SERVER_START_TIMEOUT="240",
    )
    # A shell that starts the tests in the background has interrupts ignored, and every process below inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(name, None)


_owner = pytest.StashKey[bool]()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stops what the session started and removes its folder."""
    if config.stash.get(_owner, False):
        stop_server()
        docker = Path(os.environ[_ROOT_VARIABLE]) / "docker"
        if docker.is_dir():
            from tests.services.docker_engine import stop_engine

            stop_engine(docker)
        shutil.rmtree(os.environ[_ROOT_VARIABLE], ignore_errors=True)


@pytest.fixture(autouse=True)
def mlflow_forgets() -> Iterator[None]:
    """Takes back what a test chose in MLflow: what it sets stays in the process and its environment."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ.update(before)
    chosen = {
        "mlflow.tracking.fluent": "_active_experiment_id",
        "mlflow.tracking._tracking_service.utils": "_tracking_uri",
    }
    for module, name in chosen.items():
        if module in sys.modules:
            setattr(sys.modules[module], name, None)


@pytest.fixture(autouse=True)
def own_settings_are_forgotten() -> Iterator[None]:
    """Takes back the variables that a command or run, called in this process, has set for itself."""
    before = os.environ.get(OWN_VARIABLES)
    server = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    yield
    for name, value in server.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if before is None and (added := os.environ.pop(OWN_VARIABLES, None)) is not None:
        for name in added.split():
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def need_program() -> Callable[[str], str]:
    """Returns the path of a program that a real service needs; without it the test is skipped, and in CI it fails."""

    def need(name: str) -> str:
        path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
        if path is None:
            message = f"the program {name} is not installed; scripts/test installs it when it runs as root"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return need


@pytest.fixture
def unused_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    return free_port()


@pytest.fixture(scope="session")
def mlflow_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """The session's MLflow server; pods of a real cluster reach it, too."""
    public = bool(request.config.getoption("--kube-host"))
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"), free_port(), public=public)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def prefect_server() -> ServerAddress:
    """The session's Prefect server: the embedded one, started when the first test asks for it."""
    return ensure_server(print)


@pytest.fixture
def save_block(prefect_server: ServerAddress) -> Callable[[Any, str], None]:
    """Saves a block on the session's server; ``Block.save()`` knows only the server of the settings that Prefect began with."""
    from prefect_mlprojects.server.api import call_api

    def save(block: Any, name: str) -> None:
        async def keep(client: Any) -> None:
            await block.asave(name, overwrite=True, client=client)

        call_api(prefect_server.api_url, keep)

    return save
