from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefect_mlprojects.environments.python.installers import (
    build_variables,
    key_settings,
    uv_arguments,
    uv_configuration,
    uv_settings_from_pip,
)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose pip and uv are not set up; the machine's own settings are out of sight."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "none"), "PIP_CONFIG_FILE": os.devnull}


def test_pip_variables_are_translated_to_uv_settings(home: dict[str, str], tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    environ = {
        **home,
        "PIP_INDEX_URL": "https://user:secret@example.org/simple",
        "PIP_EXTRA_INDEX_URL": "https://a.example/simple\n https://b.example/simple",
        "PIP_FIND_LINKS": f"{links} {tmp_path}/none https://c.example/links file://{links}",
        "PIP_TRUSTED_HOST": "a.example b.example",
        "PIP_DEFAULT_TIMEOUT": "180",
        "PIP_CERT": "/ca.pem",
        "PIP_PROXY": "proxy.example:3128",
        "PIP_PRE": "1",
        "PIP_CONSTRAINT": "/limits.txt",
    }
    assert uv_settings_from_pip(environ) == {
        "UV_DEFAULT_INDEX": "https://user:secret@example.org/simple",
        "UV_EXTRA_INDEX_URL": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": f"{links},https://c.example/links,file://{links}",
        "UV_INSECURE_HOST": "a.example b.example",
        "UV_HTTP_TIMEOUT": "180",
        "SSL_CERT_FILE": "/ca.pem",
        "ALL_PROXY": "http://proxy.example:3128",
        "UV_PRERELEASE": "allow",
        "UV_CONSTRAINT": "/limits.txt",
    }


def test_pips_files_count_less_than_its_variables(home: dict[str, str], tmp_path: Path) -> None:
    del home["PIP_CONFIG_FILE"]
    user = tmp_path / ".config/pip/pip.conf"
    user.parent.mkdir(parents=True)
    user.write_text(
        "[global]\nindex-url = https://user.example\nno_index = false\n[install]\ntrusted-host =\n  a\n  b\n"
    )
    named = tmp_path / "named.conf"
    named.write_text("[global]\nindex-url = https://named.example\n")
    assert uv_settings_from_pip(home)["UV_DEFAULT_INDEX"] == "https://user.example"
    assert uv_settings_from_pip(home)["UV_INSECURE_HOST"] == "a b"
    home["PIP_CONFIG_FILE"] = str(named)
    assert uv_settings_from_pip(home)["UV_DEFAULT_INDEX"] == "https://named.example"
    home["PIP_INDEX_URL"] = "https://variable.example"
    assert uv_settings_from_pip(home)["UV_DEFAULT_INDEX"] == "https://variable.example"
    named.write_text("not an ini file\n")
    del home["PIP_INDEX_URL"]
    assert uv_settings_from_pip(home)["UV_DEFAULT_INDEX"] == "https://user.example"


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_CONFIG_FILE"])
def test_indexes_that_the_user_names_to_uv_win(home: dict[str, str], variable: str) -> None:
    environ = {**home, "PIP_INDEX_URL": "https://pip.example", "PIP_NO_INDEX": "1", variable: "https://uv.example"}
    assert uv_settings_from_pip(environ) == {}
    assert uv_arguments(environ) == ()


def test_uv_configuration_file_takes_precedence_over_pip_index(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".config/uv").mkdir(parents=True)
    (tmp_path / ".config/uv/uv.toml").touch()
    assert uv_settings_from_pip({**home, "PIP_INDEX_URL": "https://pip.example", "PIP_TRUSTED_HOST": "a"}) == {
        "UV_INSECURE_HOST": "a"
    }


@pytest.mark.parametrize(
    ("value", "arguments"), [("1", ("--no-index",)), ("true", ("--no-index",)), ("0", ()), ("", ())]
)
def test_pip_no_index_sets_uv_no_index_flag(home: dict[str, str], value: str, arguments: tuple[str, ...]) -> None:
    assert uv_arguments({**home, "PIP_NO_INDEX": value}) == arguments


def test_build_variables_omit_install_target_overrides(home: dict[str, str]) -> None:
    environ = {
        **home,
        "PIP_TARGET": "/t",
        "PIP_USER": "1",
        "UV_SYSTEM_PYTHON": "1",
        "UV_PROJECT_ENVIRONMENT": "/v",
        "A": "b",
    }
    environ |= {"UV_CACHE_DIR": "/c", "PIP_CACHE_DIR": "/p", "SSL_CERT_FILE": "/s", "HTTPS_PROXY": "http://p"}
    variables = build_variables(environ, environ)
    assert not {"PIP_TARGET", "PIP_USER", "UV_SYSTEM_PYTHON", "UV_PROJECT_ENVIRONMENT"} & variables.keys()
    assert {
        name: variables[name] for name in ("A", "UV_CACHE_DIR", "PIP_CACHE_DIR", "SSL_CERT_FILE", "HTTPS_PROXY")
    } == {
        "A": "b",
        "UV_CACHE_DIR": "/c",
        "PIP_CACHE_DIR": "/p",
        "SSL_CERT_FILE": "/s",
        "HTTPS_PROXY": "http://p",
    }
    assert (variables["PIP_NO_INPUT"], variables["GIT_TERMINAL_PROMPT"]) == ("1", "0")


def test_settings_that_choose_packages_and_credentials_are_part_of_the_key_and_addresses_are_not(
    tmp_path: Path,
) -> None:
    limits = tmp_path / "limits.txt"
    limits.write_text("six<2\n")
    plain = key_settings({"PIP_INDEX_URL": "https://example.org"}, "uv", tmp_path)
    assert plain == key_settings({}, "uv", tmp_path)
    urls = ("https://example.org", "https://u:p@example.org", "https://u:q@example.org")
    assert len({key_settings({"PIP_INDEX_URL": url}, "uv", tmp_path) for url in urls}) == 3
    assert key_settings({"UV_INDEX_OWN_PASSWORD": "p"}, "uv", tmp_path) != plain
    assert key_settings({"PIP_PRE": "1"}, "uv", tmp_path) != plain
    limited = key_settings({"PIP_CONSTRAINT": str(limits)}, "virtualenv", tmp_path)
    limits.write_text("six<1\n")
    assert key_settings({"PIP_CONSTRAINT": str(limits)}, "virtualenv", tmp_path) != limited


def test_uvs_configuration_is_the_nearest_above_the_project(tmp_path: Path) -> None:
    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer/uv.toml").touch()
    (inner / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert uv_configuration(inner) == tmp_path / "outer/uv.toml"
    before = key_settings({}, "uv", inner)
    (inner / "pyproject.toml").write_text("[tool.uv]\nprerelease = 'allow'\n")
    assert uv_configuration(inner) == inner / "pyproject.toml"
    assert key_settings({}, "uv", inner) != before
    assert key_settings({}, "virtualenv", inner) == ()
