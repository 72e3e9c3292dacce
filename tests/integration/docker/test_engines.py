"""Engines on other machines: by TCP with TLS, by ssh, by Docker contexts, over connections that break."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.services.forwarder import Forwarder
from tests.services.prefect_api import api
from tests.services.waiting import free_port, wait_for

from prefect_mlprojects import run
from prefect_mlprojects.blocks import DockerEngine
from prefect_mlprojects.exceptions import BackendError, RunFailed
from prefect_mlprojects.server.process import ServerAddress

HOST_NETWORK = {"network": "host"}
OUTPUT = "out hi\nthe data\n/mlflow/projects/code\n"


def _pem(folder: Path, name: str) -> str:
    return (folder / "tls" / f"{name}.pem").read_text()


def test_engine_block_with_certificates(
    save_block: Callable[[Any, str], None],
    elsewhere: Path,
    prefect_server: ServerAddress,
    capfd: pytest.CaptureFixture[str],
) -> None:
    block = DockerEngine(
        host=(elsewhere / "tcp.address").read_text(),
        ca_certificate=_pem(elsewhere, "ca"),
        client_certificate=_pem(elsewhere, "cert"),
        client_key=SecretStr(_pem(elsewhere, "key")),
    )
    block.test_connection()
    save_block(block, "tls-engine")
    run(".", docker_args=HOST_NETWORK, backend_config={"docker-engine": "tls-engine"})
    output = capfd.readouterr()
    assert output.out == OUTPUT
    assert "PRIVATE KEY" not in output.err
    # Given as a mapping, the key stays in memory.
    done = run(".", docker_args=HOST_NETWORK, backend_config={"docker-engine": block.get_credentials()})
    stored = api(prefect_server.api_url).get(f"/flow_runs/{done.flow_run_id}").text
    assert done.flow_run_id in stored
    assert "PRIVATE KEY" not in stored
    with pytest.raises(BackendError, match="No Docker engine answers at tcp://"):
        run(".", backend_config={"docker-engine": {"host": block.host}})


def test_engine_with_certificates_in_a_folder(elsewhere: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = {"docker-host": (elsewhere / "tcp.address").read_text(), "docker-tls": str(elsewhere / "tls")}
    run(".", docker_args=HOST_NETWORK, backend_config=config)
    assert capfd.readouterr().out == OUTPUT


def test_engine_in_docker_host_variable(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", (elsewhere / "tcp.address").read_text())
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(elsewhere / "tls"))
    run(".", docker_args=HOST_NETWORK)
    assert capfd.readouterr().out == OUTPUT


def test_engine_of_a_docker_context(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from docker.context import ContextAPI
    from docker.tls import TLSConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text("{}")
    folder = elsewhere / "tls"
    tls = TLSConfig(
        client_cert=(str(folder / "cert.pem"), str(folder / "key.pem")), ca_cert=str(folder / "ca.pem"), verify=True
    )
    ContextAPI.create_context("far", host=(elsewhere / "tcp.address").read_text(), tls_cfg=tls)
    monkeypatch.setenv("DOCKER_CONTEXT", "far")
    run(".", docker_args=HOST_NETWORK)
    assert capfd.readouterr().out == OUTPUT
    monkeypatch.delenv("DOCKER_CONTEXT")
    (tmp_path / ".docker" / "config.json").write_text('{"currentContext": "far"}')
    run(".", docker_args=HOST_NETWORK)
    assert capfd.readouterr().out == OUTPUT
    monkeypatch.setenv("DOCKER_CONTEXT", "farther")
    with pytest.raises(BackendError, match="no Docker context 'farther', which DOCKER_CONTEXT names"):
        run(".")


def test_local_store_is_refused_on_a_remote_engine(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    store = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    config = {"docker-host": (elsewhere / "tcp.address").read_text(), "docker-tls": str(elsewhere / "tls")}
    with pytest.raises(BackendError, match="is on this machine, but the Docker engine is remote"):
        run(".", backend_config=config)
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    with pytest.raises(
        BackendError,
        match=r"Parameter 'file': the Docker engine can't mount .*outside\.txt, since it is on another machine",
    ):
        run(".", parameters={"file": str(outside)}, backend_config=config)


def test_artifacts_in_a_local_folder_are_refused_on_a_remote_engine(elsewhere: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    experiment = MlflowClient().create_experiment(f"local-{os.getpid()}", (tmp_path / "artifacts").as_uri())
    config = {"docker-host": (elsewhere / "tcp.address").read_text(), "docker-tls": str(elsewhere / "tls")}
    with pytest.raises(BackendError, match=r"stored in the folder .*artifacts/?.* of this machine.*would be lost"):
        run(".", experiment_id=experiment, docker_args=HOST_NETWORK, backend_config=config)


@pytest.fixture
def ssh(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_program: Callable[[str], str]
) -> Iterator[str]:
    """An ssh server of this test's own, where the docker command reaches the session's engine; the address to use."""
    server, client = need_program("sshd"), need_program("ssh")
    need_program("docker")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    port, user = free_port(), os.environ.get("USER", "root")
    (tmp_path / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path / 'host'}\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {tmp_path / 'user.pub'}\nPermitRootLogin yes\n"
        f"SetEnv DOCKER_HOST=unix://{elsewhere / 'docker.sock'} PATH={os.environ['PATH']}\n"
    )
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    # ssh reads its configuration from the user's real home, which is not ours to change.
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ssh"
    program.write_text(
        f'#!/bin/sh\nexec {client} -F none -i {tmp_path / "user"} -o UserKnownHostsFile={tmp_path / "known"} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (tmp_path / "sshd.log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(tmp_path / "sshd.conf")], stderr=log)
    try:
        address = f"ssh://{user}@127.0.0.1:{port}"
        probe = [str(program), "-p", str(port), f"{user}@127.0.0.1", "true"]
        wait_for(lambda: subprocess.run(probe, capture_output=True).returncode == 0, "the ssh server", 30)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_engine_by_ssh(ssh: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(".", docker_args=HOST_NETWORK, backend_config={"docker-host": ssh})
    assert capfd.readouterr().out == OUTPUT
    with pytest.raises(RunFailed, match="exit code 3"):
        run(".", "fail", docker_args=HOST_NETWORK, backend_config={"docker-host": ssh})


@pytest.fixture
def forwarder(elsewhere: Path) -> Iterator[Forwarder]:
    forwarder = Forwarder(str(elsewhere / "docker.sock"))
    yield forwarder
    forwarder.close()


def test_broken_connections_lose_no_output(forwarder: Forwarder, capfd: pytest.CaptureFixture[str]) -> None:
    """No output is lost or repeated, and the run continues."""
    broken: list[int] = []

    def breaks() -> None:
        for _ in range(3):
            time.sleep(1.2)
            broken.append(forwarder.break_connections())

    config = {"docker-host": f"tcp://127.0.0.1:{forwarder.port}"}
    handle = run(".", "slow", docker_args=HOST_NETWORK, backend_config=config, synchronous=False)
    captured: list[str] = []

    def started() -> bool:
        captured.append(capfd.readouterr().out)
        return "line 3" in "".join(captured)

    wait_for(started, "the output")
    breaker = threading.Thread(target=breaks)
    breaker.start()
    assert handle.wait()
    breaker.join()
    captured.append(capfd.readouterr().out)

    assert sum(broken) > 0
    assert "".join(captured) == "".join(f"line {number}\n" for number in range(40)) + "end"
