from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.environments.conda.configuration import (
    DEFAULT_CHANNELS,
    CondaConfiguration,
    channel_urls,
    current_subdir,
    environment_channels,
    public_url,
    read_configuration,
    split_channel,
)
from prefect_mlprojects.exceptions import EnvironmentBuildError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home")}


def test_without_files_condas_defaults_hold(environ: dict[str, str]) -> None:
    assert read_configuration(environ) == CondaConfiguration(subdir=current_subdir())


def test_files_and_variables_outdo_each_other_in_condas_order(environ: dict[str, str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".conda/condarc.d").mkdir(parents=True)
    (home / ".conda/.condarc").write_text("channels: [one, two]\nchannel_alias: https://a\noffline: true\n")
    (home / ".conda/condarc.d/more.yml").write_text(
        "channels: [three]\ncustom_channels: {x: https://x, y: https://y}\n"
    )
    (home / ".condarc").write_text(
        "channels: [four, one]\nchannel_priority: strict\ncustom_channels: {y: https://z}\nenvs_dirs: [passed over]\n"
        "ssl_verify: /ca.pem\nproxy_servers: {https: 'http://u:p@proxy'}\nremote_read_timeout_secs: 60.0\n"
    )
    named = tmp_path / "named"
    named.write_text("channel_alias: https://${HOST}/\nwhitelist_channels: [a]\nadd_pip_as_python_dependency: no\n")
    environ |= {
        "CONDARC": str(named),
        "HOST": "host",
        "CONDA_CHANNELS": "five,six",
        "CONDA_OFFLINE": "false",
        "CONDA_SUBDIR": "osx-arm64",
        "CONDA_REMOTE_MAX_RETRIES": "7",
        "CONDA_EXE": "/opt/conda",
    }
    found = read_configuration(environ)
    assert found.channels == ("five", "six", "four", "one", "three", "two")
    assert found.channel_alias == "https://host"
    assert found.custom_channels == {"x": "https://x", "y": "https://z"}
    assert (found.channel_priority, found.offline, found.subdir) == ("strict", False, "osx-arm64")
    assert (found.ssl_verify, found.remote_max_retries, found.remote_read_timeout_secs) == ("/ca.pem", 7, 60)
    assert found.proxy_servers == {"https": "http://u:p@proxy"}
    assert found.allowlist_channels == ("a",)
    assert not found.add_pip_as_python_dependency
    assert "u:p" not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("channels: one\n", "channels in .*condarc is 'one'; it must be a list"),
        ("custom_channels: [x]\n", "custom_channels in .* must be a mapping"),
        ("custom_multichannels: {x: y}\n", "custom_multichannels in .* must be a mapping of names to lists"),
        ("channel_priority: high\n", "channel_priority in .* must be strict, flexible or disabled"),
        ("offline: maybe\n", "offline in .* must be true or false"),
        ("remote_max_retries: many\n", "remote_max_retries in .* must be a number"),
        ("- channels\n", "condarc must be a mapping"),
        ("channels: [\n", "condarc:"),
    ],
)
def test_invalid_condarc_error_names_file_and_key(
    environ: dict[str, str], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "home/.condarc").write_text(text)
    with pytest.raises(EnvironmentBuildError, match=words) as caught:
        read_configuration(environ)
    assert caught.value.manager == "conda"


@pytest.mark.parametrize(("value", "expected"), [("false", False), ("no", False), ("true", True), ("/a/b", "/a/b")])
def test_ssl_verify(environ: dict[str, str], value: str, expected: bool | str) -> None:
    assert read_configuration({**environ, "CONDA_SSL_VERIFY": value}).ssl_verify == expected


SETTINGS = CondaConfiguration(
    channels=("mine",),
    channel_alias="https://alias",
    custom_channels={"team": "https://team.example/c", "here": "/channels"},
    custom_multichannels={"both": ("conda-forge", "team")},
)


@pytest.mark.parametrize(
    ("name", "urls"),
    [
        ("conda-forge", ("https://alias/conda-forge",)),
        ("user/label/dev", ("https://alias/user/label/dev",)),
        ("https://host/x/", ("https://host/x",)),
        ("https://host/x/linux-64", ("https://host/x",)),
        ("file:///a/b", ("file:///a/b",)),
        ("/a/b", ("file:///a/b",)),
        ("./b", ("file:///base/b",)),
        ("team", ("https://team.example/c/team",)),
        ("team/label/x", ("https://team.example/c/team/label/x",)),
        ("here", ("file:///channels/here",)),
        ("both", ("https://alias/conda-forge", "https://team.example/c/team")),
        ("defaults", DEFAULT_CHANNELS),
        ("pkgs/main", DEFAULT_CHANNELS[:1]),
    ],
)
def test_channel_name_resolves_to_urls(name: str, urls: tuple[str, ...]) -> None:
    assert channel_urls(name, SETTINGS, Path("/base")) == urls


def test_file_channels_precede_user_channels_and_defaults() -> None:
    base = Path("/base")
    assert environment_channels(["a", "mine"], SETTINGS, base) == ("https://alias/a", "https://alias/mine")
    assert environment_channels(["a", "nodefaults"], SETTINGS, base) == ("https://alias/a",)
    assert environment_channels([], SETTINGS, base) == ("https://alias/mine",)
    assert environment_channels([], CondaConfiguration(), base) == DEFAULT_CHANNELS


@pytest.mark.parametrize(
    "settings", [CondaConfiguration(denylist_channels=("bad",)), CondaConfiguration(allowlist_channels=("good",))]
)
def test_channels_can_be_forbidden(settings: CondaConfiguration) -> None:
    assert environment_channels(["good"], settings, Path("/base"))
    with pytest.raises(EnvironmentBuildError, match=r"listchannels|list_channels forbids the channel .*/bad"):
        environment_channels(["good", "bad"], settings, Path("/base"))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("numpy=1.26.*", (None, "numpy=1.26.*")),
        ("conda-forge::numpy", ("conda-forge", "numpy")),
        ("file:///a::numpy >=1", ("file:///a", "numpy >=1")),
        ("numpy[channel='a::b']", (None, "numpy[channel='a::b']")),
    ],
)
def test_dependency_channel_is_split_from_spec(spec: str, parts: tuple[str | None, str]) -> None:
    assert split_channel(spec) == parts


def test_secrets_do_not_show() -> None:
    assert public_url("https://user:secret@host/t/tk-1/channel") == "https://host/channel"
    assert public_url("https://host/t/tk-1") == "https://host"
