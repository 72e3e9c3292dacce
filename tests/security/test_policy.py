"""Attacks on a shared worker by whoever starts or makes deployments; see SECURITY.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import ExecutionException, FetchError, InvalidInputError, ParameterError
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.check import RunContext, check_request
from prefect_mlprojects.request.policy import Policy, Rules, find_policies, read_policy
from prefect_mlprojects.settings import POLICY_VARIABLE
from prefect_mlprojects.sources import WorkingCopy, detect_source
from prefect_mlprojects.types import StopSignal


def policy(**rules: Any) -> Policy:
    return Policy(Path("/etc/mlprojects/policy.yaml"), Rules(**rules))


def project(folder: Path, environment: str = "") -> WorkingCopy:
    (folder / "MLproject").write_text(
        f"name: p\n{environment}entry_points:\n  main:\n    parameters: {{data: {{type: path, default: .}}}}\n"
        "    command: 'true {data}'\n"
    )
    return detect_source(str(folder), None).fetch(StopSignal(), print)


def check(copy: WorkingCopy, rules: Policy, **options: Any) -> None:
    from prefect_mlprojects.backends import get_backend

    request = RunRequest(uri=str(copy.directory), **options)
    config = get_backend(request.backend).parse_config(dict(request.backend_config or {}))  # type: ignore[arg-type]
    rules.check_backend(request)
    check_request(request, copy, RunContext(config, Secret("http://127.0.0.1:1"), policies=(rules,)))


DOCKER = "docker_env: {image: 'registry.acme/train:1', volumes: ['/data/sets:/sets']}\n"


@pytest.mark.parametrize(
    ("rules", "environment", "options", "refused"),
    [
        ({}, "", {"env_manager": "local"}, ""),
        ({"backends": ["kubernetes"]}, "", {"env_manager": "local"}, "the backend 'local'"),
        ({"backends": ["docker"]}, "", {"env_manager": "local"}, "the backend 'local'"),
        ({"backends": ["docker"]}, DOCKER, {}, ""),
        ({"backends": ["local"]}, DOCKER, {}, ""),
        ({"backends": []}, DOCKER, {}, "allowed: none"),
        ({"images": ["registry.acme/*"], "host-paths": ["/data"]}, DOCKER, {}, ""),
        ({"images": ["registry.acme/*"]}, DOCKER, {"docker_args": {"image": "evil/x"}}, "the image 'evil/x'"),
        ({"images": ["registry.acme/*"]}, "", {"docker_args": {"image": "evil/x"}}, "the image 'evil/x'"),
        ({"host-paths": ["/srv"]}, DOCKER, {}, "the path '/data/sets'"),
        ({"host-paths": ["/data"]}, DOCKER, {"docker_args": {"v": "/data/../etc:/x"}}, "the path '/data/../etc'"),
        ({"host-paths": ["/data"]}, DOCKER, {"docker_args": {"mount": "type=bind,source=/etc,target=/x"}}, "'/etc'"),
        ({"host-paths": ["/data"]}, DOCKER, {"docker_args": {"v": "/var/run/docker.sock:/s"}}, "docker.sock"),
        ({"host-paths": ["/data"]}, DOCKER, {"parameters": {"data": "/etc"}}, "the path '/etc'"),
        ({"host-paths": ["/data"]}, "", {"env_manager": "local", "storage_dir": "/etc"}, "the path '/etc'"),
        ({}, DOCKER, {"docker_args": {"privileged": True}}, "privileged"),
        ({}, DOCKER, {"docker_args": {"cap-add": "SYS_ADMIN"}}, "cap-add"),
        ({}, DOCKER, {"docker_args": {"device": "/dev/sda"}}, "devices"),
        ({}, DOCKER, {"docker_args": {"pid": "host"}}, "pid-mode"),
        ({}, DOCKER, {"docker_args": {"network": "host"}}, "network-mode"),
        ({}, DOCKER, {"docker_args": {"security-opt": "seccomp=unconfined"}}, "security-opt"),
        ({}, DOCKER, {"docker_args": {"gpus": "all", "memory": "1g"}}, ""),
        ({"privileged": True}, DOCKER, {"docker_args": {"privileged": True}}, ""),
        ({}, DOCKER, {"backend_config": {"docker-host": "tcp://evil:2375"}}, "docker-host"),
    ],
)
def test_policy_refuses_what_it_does_not_allow(
    rules: dict[str, Any], environment: str, options: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    copy = project(tmp_path, environment)
    if not refused:
        check(copy, policy(**rules), **options)
        return
    with pytest.raises(ParameterError, match=r"The policy of this worker \(/etc/mlprojects/policy.yaml\)") as caught:
        check(copy, policy(**rules), **options)
    assert refused in str(caught.value)


def test_policy_link_out_of_an_allowed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to("/etc")
    (tmp_path / "p").mkdir()
    copy = project(tmp_path / "p", DOCKER)
    rules = policy(**{"host-paths": [str(tmp_path / "allowed"), "/data"]})
    with pytest.raises(ParameterError, match="the path"):
        check(copy, rules, docker_args={"v": f"{tmp_path}/allowed/link:/x"})


KUBERNETES_TEMPLATE = """
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      {pod}
      containers: [{{name: p, image: registry.acme/train, {container}}}]
      restartPolicy: Never
"""


@pytest.mark.parametrize(
    ("pod", "container", "refused"),
    [
        ("", "", ""),
        ("hostNetwork: true", "", "hostNetwork"),
        ("hostPID: true", "", "hostPID"),
        ("volumes: [{name: v, hostPath: {path: /etc}}]", "", "the path '/etc'"),
        ("", "securityContext: {privileged: true}", "privileged"),
        ("", "securityContext: {capabilities: {add: [SYS_ADMIN]}}", "capabilities"),
        ("initContainers: [{name: i, image: evil/x}]", "", "the image 'evil/x'"),
    ],
)
def test_policy_reads_a_job_template(pod: str, container: str, refused: str, tmp_path: Path) -> None:
    import yaml

    from prefect_mlprojects.backends.kubernetes.manifest import demands

    job = yaml.safe_load(
        KUBERNETES_TEMPLATE.format(pod=pod or "dnsPolicy: Default", container=container or "tty: false")
    )
    found = demands(job, "registry.acme/train")
    rules = policy(**{"images": ["registry.acme/*"], "host-paths": ["/data"]})
    if not refused:
        rules.check_demands("kubernetes", found)
        return
    with pytest.raises(ParameterError) as caught:
        rules.check_demands("kubernetes", found)
    assert refused in str(caught.value)


def test_backend_that_tells_nothing_is_refused() -> None:
    from prefect_mlprojects.backends.contract import Demands

    with pytest.raises(ParameterError, match="does not tell which images"):
        policy().check_demands("third-party", Demands(unknown=True))


def test_policy_sources_hold_beside_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_mlprojects import settings

    monkeypatch.setattr(settings, "_policy_sources", [])
    settings.limit_sources((f"{tmp_path}/allowed/*",))
    for name in ("allowed", "other"):
        (tmp_path / name / "p").mkdir(parents=True)
        project(tmp_path / name / "p") if name == "allowed" else (tmp_path / name / "p" / "MLproject").write_text(
            "name: x\n"
        )
    monkeypatch.setenv("PREFECT_MLPROJECTS_TRUSTED_SOURCES", "*")  # as a job variable could
    with pytest.raises(FetchError, match="or the worker's policy, allows"):
        detect_source(str(tmp_path / "other" / "p"), None)
    settings.limit_sources(())
    with pytest.raises(FetchError, match="allows nothing only"):
        detect_source(str(tmp_path / "allowed" / "p"), None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_job_variables_can_not_replace_the_workers_policy(tmp_path: Path) -> None:
    """The worker's environment counts, whatever the environment of the run's process is."""
    (tmp_path / "strict.yaml").write_text("backends: []\n")
    (tmp_path / "lax.yaml").write_text("{}\n")
    show = "from prefect_mlprojects.request.policy import find_policies; print([p.file.name for p in find_policies()])"
    worker = (
        "import os, subprocess, sys\n"
        "for own in ('', sys.argv[1], '/nothing'):\n"
        f"    env = {{**os.environ, {POLICY_VARIABLE!r}: own}}\n"
        f"    done = subprocess.run([sys.executable, '-c', {show!r}], env=env, capture_output=True, text=True)\n"
        "    print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])\n"
        f"env = {{name: value for name, value in os.environ.items() if name != {POLICY_VARIABLE!r}}}\n"
        f"print(subprocess.run(['sh', '-c', 'true; \"$@\"', '', sys.executable, '-c', {show!r}], env=env, "
        "capture_output=True, text=True).stdout.strip())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", worker, str(tmp_path / "lax.yaml")],
        env={**os.environ, POLICY_VARIABLE: str(tmp_path / "strict.yaml")},
        capture_output=True,
        text=True,
        check=True,
    )
    unset, more, missing, deeper = done.stdout.splitlines()
    assert (unset, more, deeper) == ("['strict.yaml']", "['lax.yaml', 'strict.yaml']", "['strict.yaml']")
    assert "The policy file /nothing can't be used: No such file or directory." in missing


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("backends: local\n", 0o644, "backends"),
        ("privleged: false\n", 0o644, "privleged.*Its keys are backends, sources, images, host-paths, privileged"),
        ("- a\n", 0o644, "can't be used"),
        ("a: [\n", 0o644, "can't be used"),
        ("{}\n", 0o666, "other users may write to it"),
    ],
)
def test_unusable_policy_stops_the_run(text: str, mode: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    (tmp_path / "policy.yaml").chmod(mode)
    with pytest.raises(InvalidInputError, match=words) as caught:
        read_policy(tmp_path / "policy.yaml")
    assert isinstance(caught.value, ExecutionException)
    with pytest.raises(InvalidInputError):
        find_policies({POLICY_VARIABLE: str(tmp_path / "policy.yaml")})
