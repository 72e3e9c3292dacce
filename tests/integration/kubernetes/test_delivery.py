"""How a project's code gets to its pod."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.services.git import git
from tests.services.git_server import TOKEN, USER, SmartHttp

from prefect_mlprojects.backends.kubernetes import KubernetesBackend
from prefect_mlprojects.exceptions import BackendError
from prefect_mlprojects.sources.base import WorkingCopy
from prefect_mlprojects.sources.git import GitCredentials, GitUrl
from prefect_mlprojects.types import StopSignal

from .conftest import ENGINE_IMAGE


def test_archive_of_maximum_size_is_delivered(cluster: Any) -> None:
    (cluster.project / "weights").write_bytes(os.urandom(880_000))
    assert cluster.run("wc -c < weights").output_tail == ("880000",)
    assert any(line.startswith("Code delivery: archive, because it fits") for line in cluster.recorder.reports)
    (maps,) = [each for each in cluster.core.list_namespaced_config_map(cluster.namespace).items if each.binary_data]
    assert maps.metadata.owner_references[0].name == cluster.jobs[0].metadata.name


def test_too_large_project_error_lists_the_ways(cluster: Any) -> None:
    (cluster.project / "weights").write_bytes(os.urandom(1_000_000))
    for config in ({}, {"code-delivery": "archive"}):
        with pytest.raises(BackendError) as caught:
            cluster.run("true", **config)
        for word in ("900 kB", "repository-uri", "git", "none", ".dockerignore"):
            assert word in caught.value.message
    (cluster.project / ".dockerignore").write_text("weights\n")
    assert cluster.run("LC_ALL=C ls").output_tail == ("MLproject", "hello ä.txt")


def test_archive_keeps_modes_and_links(cluster: Any) -> None:
    script = cluster.project / "deep" / "run me"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o755)
    (cluster.project / "link").symlink_to("deep/run me")
    (cluster.project / ("long-" * 40)).write_text("long\n")
    outcome = cluster.run("./link; cat long-*")
    assert outcome.output_tail == ("ran", "long")


def test_example_project_runs(cluster: Any) -> None:
    folder = Path(__file__).parents[3] / "examples" / "kubernetes"
    copy = WorkingCopy(folder, str(folder), "local", str(folder))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    outcome = cluster.run("python3 train.py reader; touch /scratch/x", call=cluster.call(copy=copy, **config))
    assert outcome.succeeded, (outcome, cluster.recorder.reports)
    (job,) = cluster.jobs
    assert outcome.output_tail == ("hello reader", f"on {outcome.output_tail[1].split()[1]} for the run run-1")
    assert (job.metadata.labels["team"], job.spec.backoff_limit) == ("research", 1)


def test_delivery_none_delivers_no_code(cluster: Any) -> None:
    outcome = cluster.run("ls /mlflow/projects/code 2>/dev/null; echo done", **{"code-delivery": "none"})
    assert outcome.output_tail == ("done",)
    assert "Code delivery: none, because the configuration asks for it." in cluster.recorder.reports
    assert not [each for each in cluster.core.list_namespaced_config_map(cluster.namespace).items if each.binary_data]


def test_image_is_built_once_pushed_and_pinned(cluster: Any, registry: tuple[str, dict[str, str] | None]) -> None:
    registry_address, login = registry
    options = {"image": ENGINE_IMAGE, "docker_auth": login, "repository-uri": f"{registry_address}/projects/sample"}
    outcome = cluster.run("cat hello*; pwd", **options)
    assert outcome.succeeded, (outcome, cluster.recorder.reports)
    assert outcome.output_tail == ("hello", "/mlflow/projects/code")
    assert "Code delivery: image, because 'repository-uri' is set." in cluster.recorder.reports
    (pod,) = cluster.pods
    assert pod.spec.containers[0].image.startswith(f"{registry_address}/projects/sample@sha256:")
    again = KubernetesBackend().prepare(cluster.call(**options), cluster.recorder.report, StopSignal())
    assert again.reused
    assert again.image == pod.spec.containers[0].image
    (cluster.project / "more").write_text("more\n")
    changed = KubernetesBackend().prepare(cluster.call(**options), cluster.recorder.report, StopSignal())
    assert (changed.reused, changed.image == again.image) == (False, False)
    if login is not None:
        jobs = cluster.core.api_client.sanitize_for_serialization(cluster.jobs)
        assert login["password"] not in str(jobs) + str(cluster.recorder)


def test_refusing_registry_error_hides_the_password(cluster: Any, registry: tuple[str, dict[str, str] | None]) -> None:
    registry_address, login = registry
    if login is None:
        pytest.skip("the registry of --kube-registry asks for no password")
    wrong = {**login, "password": "not-the-password"}
    with pytest.raises(BackendError, match="can't be pushed") as caught:
        cluster.run(
            "true", image=ENGINE_IMAGE, docker_auth=wrong, **{"repository-uri": f"{registry_address}/projects/other"}
        )
    assert "not-the-password" not in str(caught.value)


@pytest.fixture
def git_project(cluster: Any, host: str, tmp_path: Path) -> Iterator[WorkingCopy]:
    """A project in a subfolder of a private repository on a server of this machine."""
    root = tmp_path / "served"
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)

    git(work, "init", "-q", "-b", "main")
    (work / "sub" / "MLproject").write_text("name: p\nentry_points:\n  main: {command: 'true'}\n")
    (work / "sub" / "text").write_text("first\n")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "first")
    sha = git(work, "rev-parse", "HEAD")
    (work / "sub" / "text").write_text("second\n")
    git(work, "commit", "-qam", "second")
    git(work, "clone", "-q", "--bare", str(work), str(root / "p.git"))
    git(work, "checkout", "-q", sha)
    listen = "127.0.0.1" if host == "127.0.0.1" else ""
    server = http.server.ThreadingHTTPServer((listen, 0), type("Handler", (SmartHttp,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://{host}:{server.server_port}/p.git"
    yield WorkingCopy(work / "sub", url, "git", f"{url}#sub", sha, None, url)
    server.shutdown()
    server.server_close()


@pytest.fixture
def git_image(request: pytest.FixtureRequest, cluster: Any) -> str:
    image = request.config.getoption("--kube-git-image")
    if cluster.real and not image:
        pytest.skip("--kube-git-image is not given: an image that the cluster's nodes hold, with sh and git")
    return str(image or cluster.image)


def test_pod_clones_the_commit(cluster: Any, git_project: WorkingCopy, git_image: str) -> None:
    asked: list[str] = []

    def lookup(url: GitUrl) -> GitCredentials:
        asked.append(url.url)
        return GitCredentials(USER, TOKEN)

    config = {"code-delivery": "git", "git-image": git_image}
    outcome = cluster.run(
        "cat text; LC_ALL=C ls; pwd", call=cluster.call(copy=git_project, git_credentials=lookup, **config)
    )
    assert outcome.succeeded, (outcome, cluster.recorder.reports)
    assert outcome.output_tail == ("first", "MLproject", "text", "/mlflow/projects/code")
    assert asked[0] == git_project.uri
    assert TOKEN not in str(cluster.core.api_client.sanitize_for_serialization([*cluster.jobs, *cluster.pods]))


def test_refusing_repository_is_not_started(cluster: Any, git_project: WorkingCopy, git_image: str) -> None:
    config = {"code-delivery": "git", "git-image": git_image}
    outcome = cluster.run("cat text", call=cluster.call(copy=git_project, **config))
    assert outcome.ending == "not-started"
    assert "mlprojects-clone" in outcome.cause
    assert "git-credentials" in outcome.advice
    assert any(line.startswith("[mlprojects-clone] fatal:") for line in cluster.recorder.reports)


def test_uncloneable_project_is_refused(cluster: Any) -> None:
    with pytest.raises(BackendError, match=r"not at a git commit.*archive"):
        cluster.run("true", **{"code-delivery": "git"})
    copy = WorkingCopy(cluster.project, "x", "git", "x", "a" * 40, None, "file:///srv/p.git")
    with pytest.raises(BackendError, match="a folder of this machine"):
        cluster.run("true", call=cluster.call(copy=copy, **{"code-delivery": "git"}))
    dirty = WorkingCopy(cluster.project, "x", "git", "x", "a" * 40, None, "https://git.example.com/p.git", dirty=True)
    with pytest.raises(BackendError, match="files differ"):
        cluster.run("true", call=cluster.call(copy=dirty, **{"code-delivery": "git"}))
