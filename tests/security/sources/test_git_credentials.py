"""Credentials of git: to which servers they are sent, and where else they can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.services.git_server import TOKEN, USER, GitSite

from prefect_mlprojects.environments.python.installers import take_git_credentials
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.git import GitCredentials, GitUrl, host_origins

from .conftest import Fetch, ProcessList, add_repository


@pytest.mark.parametrize("hosts", [(), ("OWN",)])
def test_token_with_submodule_on_another_port_is_not_sent_there(
    hosts: tuple[str, ...], own_site: GitSite, other_site: GitSite, fetch: Fetch
) -> None:
    add_repository(own_site, "project", {"MLproject": "name: x\n"}, {"evil": f"{other_site.address}/x.git"})
    listed = tuple(own_site.address for _ in hosts)
    with pytest.raises(FetchError, match="git-credentials block"):
        fetch(f"{own_site.address}/project.git", credentials=GitCredentials(USER, TOKEN, hosts=listed))

    assert own_site.got_token
    assert other_site.received
    assert not other_site.got_token


def test_token_in_url_with_submodule_on_another_port_is_not_sent_there(
    own_site: GitSite, other_site: GitSite, fetch: Fetch
) -> None:
    add_repository(own_site, "project", {"MLproject": "name: x\n"}, {"evil": f"{other_site.address}/x.git"})
    with pytest.raises(FetchError):
        fetch(f"{own_site.address.replace('://', f'://{USER}:{TOKEN}@')}/project.git")

    assert own_site.got_token
    assert not other_site.got_token


def test_token_with_submodule_of_same_origin_is_sent(own_site: GitSite, fetch: Fetch) -> None:
    inner = add_repository(own_site, "inner", {"file": "text"})
    urls = {"relative": "../inner.git", "absolute": f"{own_site.address}/inner.git"}
    add_repository(own_site, "project", {"MLproject": "name: x\n"}, urls, inner)
    copy = fetch(f"{own_site.address}/project.git", credentials=GitCredentials(USER, TOKEN))

    assert [(copy.directory / path / "file").read_text() for path in urls] == ["text", "text"]


@pytest.mark.parametrize("given", ["block", "url"])
def test_token_after_redirect_to_another_port_is_not_sent_there(
    given: str, own_site: GitSite, other_site: GitSite, fetch: Fetch
) -> None:
    add_repository(other_site, "project", {"MLproject": "name: x\n"})
    moved = f"{own_site.redirect_to(other_site.address)}/project.git"
    credentials = GitCredentials(USER, TOKEN) if given == "block" else None
    with pytest.raises(FetchError):
        fetch(moved if given == "block" else moved.replace("://", f"://{USER}:{TOKEN}@"), credentials=credentials)

    assert other_site.received
    assert not other_site.got_token


def test_redirect_to_open_repository_is_followed_without_token(
    own_site: GitSite, other_site: GitSite, fetch: Fetch
) -> None:
    add_repository(other_site, "project", {"MLproject": "name: moved\n"})
    moved = own_site.redirect_to(f"{other_site.address}/open")
    copy = fetch(f"{moved}/project.git", credentials=GitCredentials(USER, TOKEN))

    assert (copy.directory / "MLproject").read_text() == "name: moved\n"
    assert not other_site.got_token


def test_token_for_https_host_is_not_sent_by_http(own_site: GitSite, fetch: Fetch) -> None:
    add_repository(own_site, "project", {"MLproject": "name: x\n"})
    host = own_site.address.removeprefix("http://")
    with pytest.raises(FetchError, match="git-credentials block"):
        fetch(f"{own_site.address}/project.git", credentials=GitCredentials(USER, TOKEN, hosts=(host,)))

    assert not own_site.got_token


def test_token_in_query_is_in_no_command_line_and_no_file(
    own_site: GitSite, fetch: Fetch, cache: Path, process_list: ProcessList
) -> None:
    add_repository(own_site, "project", {"MLproject": "name: secret\n"})
    with process_list.watching():
        copy = fetch(f"{own_site.address}/by-token/project.git?access_token={TOKEN}")

    assert (copy.directory / "MLproject").read_text() == "name: secret\n"
    assert any("remote-http" in line for line in process_list.seen)
    assert not any(TOKEN in line for line in process_list.seen)
    assert not [file for file in cache.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    with pytest.raises(FetchError) as caught:
        fetch(f"{own_site.address}/by-token/project.git?access_token=wrong-{TOKEN}")
    assert TOKEN not in str(caught.value)


def test_cached_commit_of_private_repository_is_given_to_its_credentials_only(own_site: GitSite, fetch: Fetch) -> None:
    commit = add_repository(own_site, "project", {"MLproject": "name: x\n"})
    uri = f"{own_site.address}/project.git"
    right = GitCredentials(USER, TOKEN)
    fetch(uri, credentials=right)
    for wrong in (None, GitCredentials(USER, "wrong"), GitCredentials("mallory", TOKEN)):
        for version in (commit, commit[:9]):
            with pytest.raises(FetchError):
                fetch(uri, version, wrong)
    own_site.received.clear()
    assert fetch(uri, commit, right).commit == commit
    assert own_site.received == []


def test_login_of_git_requirement_is_in_no_command_line() -> None:
    text = "a @ git+https://u:s%40cret@h.example/a.git@v1\nb @ git+https://h.example/b\n-e git+http://token@h.example:1/c#egg=c\n"
    taken, variables = take_git_credentials(text, {"PATH": "x"})

    assert taken == text.replace("u:s%40cret@", "").replace("token@", "")
    settings = {variables[f"GIT_CONFIG_KEY_{n}"]: variables[f"GIT_CONFIG_VALUE_{n}"] for n in range(6)}
    assert settings["credential.https://h.example.username"] == "u"
    assert settings["credential.http://h.example:1.username"] == "token"
    assert "s@cret" in variables.values()


@pytest.mark.parametrize(
    ("host", "url", "expected"),
    [
        ("github.com", "https://github.com/a/b", True),
        ("GitHub.com", "ssh://git@github.com/a/b", True),
        ("github.com", "https://github.com:443/a/b", True),
        ("github.com", "https://github.com:8443/a/b", False),
        ("github.com", "http://github.com/a/b", False),
        ("github.com", "https://github.com.evil.org/a/b", False),
        ("github.com:8443", "https://github.com:8443/a/b", True),
        ("github.com:8443", "https://github.com/a/b", False),
        ("http://github.com", "http://github.com/a/b", True),
        ("http://github.com", "https://github.com/a/b", False),
        ("ssh://github.com", "https://github.com/a/b", False),
        ("[::1]:3000", "https://[::1]:3000/a", True),
        ("[::1", "https://[::1]/a", False),
        ("github.com/acme", "https://github.com/acme/b", False),
    ],
)
def test_listed_host_fits_its_port_and_scheme_only(host: str, url: str, expected: bool) -> None:
    assert GitCredentials(hosts=(host,)).fit(GitUrl(url), GitUrl(url)) is expected
    assert bool(host_origins(host)) or not expected


@pytest.mark.parametrize(
    "project", ["https://a.example:1/x", "http://a.example/x", "ssh://git@a.example/x", "file:///x"]
)
def test_credentials_without_hosts_fit_the_projects_origin_only(project: str) -> None:
    credentials = GitCredentials()
    others = {"https://a.example/x", "https://b.example:1/x", "http://a.example:1/x", "ssh://git@a.example:2222/x"}
    assert [url for url in others if credentials.fit(GitUrl(url), GitUrl(project))] == []
