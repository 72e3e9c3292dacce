"""What a repository's address, its submodules and the working directory can make git do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.services.git import git
from tests.services.git_server import TOKEN, USER, GitSite

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.sources.git import GitCredentials

from .conftest import Fetch, add_repository

MLPROJECT = {"MLproject": "name: x\n"}


def test_configuration_of_working_directory_is_not_used(
    own_site: GitSite, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_repository(own_site, "project", MLPROJECT)
    here = tmp_path / "here"
    here.mkdir()
    git(here, "init", "-q")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ncat >> {tmp_path}/ran\n")
    program.chmod(0o755)
    for key, value in (
        ("credential.helper", str(program)),
        (f"credential.{own_site.address}.helper", str(program)),
        ("core.sshCommand", str(program)),
        (f"url.{own_site.address}/evil/.insteadOf", f"{own_site.address}/project.git"),
        ("http.proxy", "http://127.0.0.1:9"),
    ):
        git(here, "config", key, value)
    monkeypatch.chdir(here)
    copy = fetch(f"{own_site.address}/project.git", credentials=GitCredentials(USER, TOKEN))
    with pytest.raises(FetchError):
        fetch("ssh://127.0.0.1:9/x.git")

    assert (copy.directory / "MLproject").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "address",
    [
        "file:///SECRET",
        "/SECRET",
        "../../../../../../SECRET",
        "ext::sh -c touch% /tmp/ran",
        "fd::3",
        "SSH+EXT://x/y",
        "-u./evil",
        "ssh://-oProxyCommand=touch/x",
        "host:-x",
        "http://[::1/x",
        "\\\\host\\share",
        "C:/SECRET",
    ],
)
def test_submodule_of_remote_repository_can_not_leave_the_network(
    address: str, own_site: GitSite, fetch: Fetch, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    git(secret, "init", "-q")
    (secret / "key").write_text("secret")
    git(secret, "add", "-A")
    git(secret, "commit", "-qm", "x")
    commit = git(secret, "rev-parse", "HEAD")
    address = address.replace("/SECRET", str(secret))
    add_repository(own_site, "project", MLPROJECT, {"sub": f'"{address}"'.replace("\\", "\\\\")}, commit)
    # Also where git would allow it.
    (tmp_path / "gitconfig").write_text('[protocol]\n\tallow = always\n[protocol "file"]\n\tallow = always\n')
    with pytest.raises(FetchError) as caught:
        fetch(f"{own_site.address}/open/project.git")

    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "working-copies").glob("run-*/project/sub/key"))
    assert not list((tmp_path / "cache" / "repositories").glob("secret-*/mlprojects-complete/*"))


@pytest.mark.parametrize("address", ["ext::sh -c touch% ran", "fd::7", "ssh+ext://x/y.git", "transport::address"])
def test_transport_that_runs_programs_is_refused(address: str) -> None:
    with pytest.raises(FetchError, match=r"can't be fetched|does not exist"):
        detect_source(address)
