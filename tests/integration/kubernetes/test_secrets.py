"""After runs of each outcome, a secret that the kubernetes backend was given is in the cluster's Secrets and nowhere else.

The search is that of `tests.services.secret_search`, and includes each state of the namespace's other objects and pods' logs.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.services.git_server import TOKEN, USER, serve_repository
from tests.services.mlflow_server import MlflowServer
from tests.services.secret_search import ENDS, House, leaks, marker

from prefect_mlprojects.blocks import (
    GitCredentialsBlock,
    KubernetesCluster,
    KubernetesJobDefaults,
    MLflowTrackingServer,
)
from prefect_mlprojects.server.process import ServerAddress

from .conftest import ENGINE_IMAGE, Cluster

_PROJECT = """\
name: leaky
entry_points:
  main:
    parameters: &declared {control: {type: string, default: none}, hush: {secret: true, default: none}}
    command: |
      case {hush} in MARK-hush*|none) ;; *) exit 9;; esac
      test -n "$MLFLOW_TRACKING_URI" && cat MLproject && echo {control}
  fail: {parameters: *declared, command: "echo going down >&2; exit 3"}
  sleep: {parameters: *declared, command: "echo begun; sleep 600"}
"""


class ClusterHouse(House):
    """The folders of a test, and the states of its namespace's objects in the folder ``objects``."""

    def __init__(self, root: Path, prefect: ServerAddress, mlflow: MlflowServer, cluster: Cluster) -> None:
        super().__init__(root, prefect, mlflow)
        self.cluster = cluster
        self.config = {"namespace": cluster.namespace, "termination-grace": 1}
        self.in_secrets = ""
        """The values of all Secrets that were in the namespace."""
        self.objects = root / "objects"
        self.objects.mkdir()
        (cluster.project / "MLproject").write_text(_PROJECT)
        self.environment["MLFLOW_TRACKING_URI"] = mlflow.uri

    def url(self, password: str) -> str:
        """Returns the tracking URI with a password in its user-info."""
        return self.mlflow_server.uri.replace("://", f"://ci:{password}@")

    def search(
        self, secrets: Mapping[str, str], *entry_points: str, uri: str | None = None, **options: Any
    ) -> set[str]:
        """Runs the entry points, which end as in `ENDS`, and returns where secrets were found besides the cluster's Secrets."""
        options = {"backend": "kubernetes", "docker_args": {"image": self.cluster.image}, **options}
        with self._watched_namespace():
            ends, found = self.run(uri or str(self.cluster.project), secrets, *entry_points, **options)
        assert ends == [dict(zip(("main", "fail", "sleep"), ENDS, strict=True))[each] for each in entry_points], (
            self.root / "stderr"
        ).read_text()
        return found | leaks(secrets, *self.kept, self.objects)

    @contextmanager
    def _watched_namespace(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                self._keep_state()
                running = [pod for pod in self.cluster.pods if pod.status.phase == "Running"]
                if any(pod.metadata.labels["prefect-mlprojects/entry-point"] == "sleep" for pod in running):
                    (self.root / "started").touch()

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        over.set()
        thread.join()
        self._keep_state()

    def _keep_state(self) -> None:
        core, batch, namespace = self.cluster.core, self.cluster.batch, self.cluster.namespace
        for kind, list_objects in (
            ("jobs", batch.list_namespaced_job),
            ("pods", core.list_namespaced_pod),
            ("configmaps", core.list_namespaced_config_map),
            ("events", core.list_namespaced_event),
        ):
            text = list_objects(namespace, _preload_content=False).data
            (self.objects / f"{kind}-{json.loads(text)['metadata']['resourceVersion']}").write_bytes(text)
        for secret in core.list_namespaced_secret(namespace).items:
            self.in_secrets += "\n".join(base64.b64decode(each).decode() for each in (secret.data or {}).values())


@pytest.fixture
def house(tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer, cluster: Cluster) -> ClusterHouse:
    if cluster.real:
        pytest.skip("it looks for its secrets in the process list, where only the double's pods are")
    return ClusterHouse(tmp_path, prefect_server, mlflow_server, cluster)


@pytest.fixture
def private_repository(house: ClusterHouse) -> Iterator[str]:
    """HOST:PORT of a server with the project as ``project.git``, behind the password `TOKEN`."""
    with serve_repository(house.cluster.project) as address:
        yield address


def _kubeconfig(house: ClusterHouse, **user: str) -> tuple[dict[str, Any], str]:
    """Returns a kubeconfig with more fields of its user, and its token."""
    kubeconfig = {**house.cluster.config["kubeconfig"]}
    token = kubeconfig["users"][0]["user"]["token"]
    kubeconfig["users"] = [{"name": "tests", "user": {"token": token, **user}}]
    return kubeconfig, token


def test_secrets_of_the_configuration_are_only_in_secrets(house: ClusterHouse) -> None:
    secrets = {name: marker(name) for name in ("tracking", "pods-tracking", "pull", "password", "hush", "tag")}
    kubeconfig, secrets["token"] = _kubeconfig(house, password=secrets["password"])
    house.environment["MLFLOW_TRACKING_URI"] = house.url(secrets["tracking"])
    control = marker("control")
    found = house.search(
        secrets,
        "main",
        "fail",
        "sleep",
        parameters={"control": control, "hush": secrets["hush"]},
        tags=[f"data=https://ci:{secrets['tag']}@127.0.0.1:9/"],
        docker_auth={"username": "ci", "password": secrets["pull"], "registry": "registry.invalid"},
        backend_config={**house.config, "kubeconfig": kubeconfig, "tracking-uri": house.url(secrets["pods-tracking"])},
    )

    assert not found
    assert all(secrets[name] in house.in_secrets for name in ("pods-tracking", "pull", "hush"))
    assert not any(secrets[name] in house.in_secrets for name in ("tracking", "token", "password"))
    # The search does find what is stored in the clear.
    seen = leaks({"control": control}, *house.kept, house.objects)
    assert {"jobs", "pods"} <= {Path(path).name.partition("-")[0] for path in seen}, seen


def test_secrets_of_a_cloned_project_are_only_in_secrets(house: ClusterHouse, private_repository: str) -> None:
    secrets = {"project": TOKEN, **{name: marker(name) for name in ("kube-tracking", "user-password", "user-token")}}
    _, secrets["token"] = _kubeconfig(house)
    house.environment |= {
        "KUBE_MLFLOW_TRACKING_URI": house.url(secrets["kube-tracking"]),
        "MLFLOW_TRACKING_USERNAME": "ci",
        "MLFLOW_TRACKING_PASSWORD": secrets["user-password"],
    }
    credentials = {"host": house.cluster.api.configuration.host, "token": secrets["token"]}
    found = house.search(
        secrets,
        "main",
        "fail",
        "sleep",
        uri=f"http://{USER}:{TOKEN}@{private_repository}/project.git",
        backend_config={
            **house.config,
            "credentials": credentials,
            "code-delivery": "git",
            "git-image": house.cluster.image,
        },
    )

    assert not found
    assert all(secrets[name] in house.in_secrets for name in ("project", "kube-tracking", "user-password"))
    assert secrets["token"] not in house.in_secrets


def test_secrets_from_blocks_are_only_in_secrets(
    house: ClusterHouse, private_repository: str, save_block: Callable[[Any, str], None]
) -> None:
    secrets = {"project": TOKEN, "tracking": marker("tracking")}
    kubeconfig, secrets["token"] = _kubeconfig(house)
    name = f"leak-{uuid.uuid4().hex[:8]}"
    save_block(GitCredentialsBlock.model_validate({"username": USER, "token": TOKEN}), name)
    save_block(KubernetesCluster(kubeconfig=SecretStr(json.dumps(kubeconfig))), name)
    config = {**house.config, "code-delivery": "git", "git-image": house.cluster.image}
    save_block(KubernetesJobDefaults(config=config, credentials=name), name)
    tracking = {"uri": house.mlflow_server.uri, "username": "ci", "password": secrets["tracking"]}
    save_block(MLflowTrackingServer.model_validate(tracking), name)
    house.environment["KUBE_MLFLOW_TRACKING_URI"] = house.mlflow_server.uri
    found = house.search(
        secrets,
        "main",
        "fail",
        "sleep",
        uri=f"http://{private_repository}/project.git",
        git_credentials=name,
        tracking=name,
        backend_config=f"kubernetes-backend/{name}",
    )

    assert not found
    assert TOKEN in house.in_secrets
    assert secrets["token"] not in house.in_secrets


@pytest.mark.parametrize(
    ("refused_by", "message"),
    [
        ("cluster", "Authentication failed at the cluster"),
        ("kubeconfig", "'kubeconfig' is not a kubeconfig"),
        ("registry", "can't be pushed"),
    ],
)
def test_refused_secrets_are_nowhere(
    refused_by: str, message: str, house: ClusterHouse, registry: tuple[str, dict[str, str] | None]
) -> None:
    secret = marker(refused_by)
    login = {"username": "ci", "password": secret, "registry": registry[0]}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "cluster": ({"credentials": {"host": house.cluster.api.configuration.host, "token": secret}}, {}),
        "kubeconfig": ({"kubeconfig": f"users:\n- {secret}: ["}, {}),
        "registry": (
            {**house.cluster.config, "repository-uri": f"{registry[0]}/projects/leaky"},
            {"docker_args": {"image": ENGINE_IMAGE}, "docker_auth": login},
        ),
    }
    config, options = cases[refused_by]
    house.environment["DOCKER_HOST"] = os.environ["DOCKER_HOST"]
    config |= {**house.config, "tracking-uri": "http://tracking.invalid"}
    assert not house.search({refused_by: secret}, "fail", backend_config=config, **options)
    assert message in (house.root / "stderr").read_text()
    assert not house.in_secrets
