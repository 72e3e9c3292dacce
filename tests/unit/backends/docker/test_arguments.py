"""Parsing and splitting of container arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.docker.arguments import parse_arguments, split_arguments
from prefect_mlprojects.exceptions import ParameterError


@pytest.mark.parametrize(
    ("arguments", "kind", "name", "value"),
    [
        ({"memory": "1g"}, "host", "mem_limit", "1g"),
        ({"m": "1g"}, "host", "mem_limit", "1g"),
        ({"cpus": "1.5"}, "host", "nano_cpus", 1_500_000_000),
        ({"shm-size": "64m"}, "host", "shm_size", "64m"),
        ({"shm_size": "64m"}, "host", "shm_size", "64m"),
        ({"network": "host"}, "host", "network_mode", "host"),
        ({"cap-add": ["NET_ADMIN", "SYS_TIME"]}, "host", "cap_add", ["NET_ADMIN", "SYS_TIME"]),
        ({"cap-add": "NET_ADMIN"}, "host", "cap_add", ["NET_ADMIN"]),
        ({"privileged": True}, "host", "privileged", True),
        ({"t": True}, "create", "tty", True),
        ({"user": "1000:1000"}, "create", "user", "1000:1000"),
        ({"name": "box"}, "create", "name", "box"),
        ({"entrypoint": "/bin/run"}, "create", "entrypoint", ["/bin/run"]),
        ({"runtime": "nvidia"}, "host", "runtime", "nvidia"),
        ({"platform": "linux/arm64"}, "create", "platform", "linux/arm64"),
        ({"add-host": "db:10.0.0.1"}, "host", "extra_hosts", {"db": "10.0.0.1"}),
        ({"tmpfs": "/tmp:size=64m"}, "host", "tmpfs", {"/tmp": "size=64m"}),
        ({"cpuset-mems": "0"}, "host", "cpuset_mems", "0"),
        ({"device-read-bps": "/dev/sda:1mb"}, "host", "device_read_bps", [{"Path": "/dev/sda", "Rate": 1048576}]),
        ({"link": ["db", "cache:c"]}, "host", "links", {"db": "db", "cache": "c"}),
        ({"P": True}, "host", "publish_all_ports", True),
        ({"expose": ["80", "53/udp"]}, "create", "ports", [("80", "tcp"), ("53", "udp")]),
        ({"no-healthcheck": True}, "create", "healthcheck", {"test": ["NONE"]}),
        ({"mac-address": "02:42:ac:11:00:02"}, "create", "mac_address", "02:42:ac:11:00:02"),
        ({"l": ["a=1", "b=2"]}, "create", "labels", {"a": "1", "b": "2"}),
    ],
)
def test_flag_sets_its_option(arguments: dict[str, Any], kind: str, name: str, value: Any) -> None:
    options = parse_arguments({"image": "x", **arguments}, {})

    assert getattr(options, kind) == {name: value}


def test_gpus_and_ulimits_become_sdk_types() -> None:
    options = parse_arguments({"gpus": "device=0,2", "ulimit": "nofile=1024:2048"}, {})

    assert options.host["device_requests"][0]["DeviceIDs"] == ["0", "2"]
    assert (options.host["ulimits"][0].soft, options.host["ulimits"][0].hard) == (1024, 2048)
    assert parse_arguments({"gpus": "all"}, {}).host["device_requests"][0]["Count"] == -1


def test_mounts_and_log_options_become_sdk_types() -> None:
    options = parse_arguments(
        {
            "mount": ["type=bind,source=/a,target=/b,readonly", "type=tmpfs,dst=/t,tmpfs-size=64,tmpfs-mode=1770"],
            "log-driver": "local",
            "log-opt": ["max-size=1m", "max-file=2"],
        },
        {},
    )
    bound, memory = options.host["mounts"]

    assert (bound["Type"], bound["Source"], bound["Target"], bound["ReadOnly"]) == ("bind", "/a", "/b", True)
    assert memory["TmpfsOptions"] == {"SizeBytes": 64, "Mode": 0o1770}
    assert options.host["log_config"] == {"Type": "local", "Config": {"max-size": "1m", "max-file": "2"}}


def test_env_file_is_overridden_by_env(tmp_path: Path) -> None:
    file = tmp_path / "some.env"
    file.write_text("# a comment\nA=from file\nB=2\n")
    for arguments in ({"env-file": str(file), "e": "A=by itself"}, {"e": "A=by itself", "env-file": str(file)}):
        assert parse_arguments(arguments, {}).environment == {"A": "by itself", "B": "2"}


@pytest.mark.parametrize("name", ["e", "env", "environment"])
def test_variables_each_form_is_accepted(name: str) -> None:
    assert parse_arguments({name: ["A=1", "B"]}, {"B": "here"}).environment == {"A": "1", "B": "here"}
    assert parse_arguments({name: {"A": 1}}, {}).environment == {"A": "1"}
    with pytest.raises(ParameterError, match="the variable B is not set here"):
        parse_arguments({name: "B"}, {})


@pytest.mark.parametrize("name", ["v", "volume", "volumes"])
def test_volumes_each_form_is_accepted(name: str) -> None:
    assert parse_arguments({name: "/a:/b:ro"}, {}).volumes == ["/a:/b:ro"]
    assert parse_arguments({name: ["/a:/b", "n:/c"]}, {}).volumes == ["/a:/b", "n:/c"]
    assert parse_arguments({name: {"/a": {"bind": "/b", "mode": "ro"}, "/c": "/d"}}, {}).volumes == [
        "/a:/b:ro",
        "/c:/d",
    ]


def test_publish_binds_and_exposes_ports() -> None:
    options = parse_arguments({"p": ["8080:80", "127.0.0.1:53:53/udp"]}, {})

    assert set(options.host["port_bindings"]) == {"80", "53/udp"}
    assert options.create["ports"] == ["80", ("53", "udp")]


def test_flags_that_are_off_are_ignored_and_dashes_stripped() -> None:
    options = parse_arguments({"t": False, "--memory": "1g", "network": None}, {})

    assert (options.create, options.host) == ({}, {"mem_limit": "1g"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memroy": "1g"}, "did you mean 'memory'"),
        ({"rm": True}, "is removed when it has ended"),
        ({"detach": True}, "the run waits for its container"),
        ({"cpus": "many"}, "can't be 'many'"),
        ({"ulimit": "nofile"}, "name=soft"),
        ({"gpus": "some"}, "give all, a number"),
        ({"v": "/a"}, "host:container"),
        ({"pull": "always"}, "is a key of the backend configuration"),
        ({"mount": "typ=bind,target=/x"}, "a mount has no 'typ'"),
        ({"mount": "type=bind,source=/x"}, "give a target"),
        ({"env-file": "nowhere.env"}, "can't be read: No such file"),
        ({"privileged": "maybe"}, "give true or false"),
    ],
)
def test_invalid_argument_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        parse_arguments(arguments, {})


def test_argument_problems_are_reported_together() -> None:
    with pytest.raises(ParameterError) as caught:
        parse_arguments({"memroy": "1g", "cpus": "many"}, {})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("arguments", "public", "secret"),
    [
        ({"e": ["A=1", "MY_TOKEN=x"], "m": "1g"}, {"e": ["A=1", "MY_TOKEN"], "m": "1g"}, {"e": ["A=1", "MY_TOKEN=x"]}),
        (
            {"environment": {"A": 1, "PASSWORD": "x"}},
            {"environment": ["A=1", "PASSWORD"]},
            {"environment": ["A=1", "PASSWORD=x"]},
        ),
        ({"--env": "PROXY=http://u:p@h"}, {"--env": ["PROXY"]}, {"--env": ["PROXY=http://u:p@h"]}),
        ({"env": [SecretStr("A=1")]}, {"env": ["A"]}, {"env": ["A=1"]}),
        (
            {"log-opt": ["splunk-token=x", "a=b"]},
            {"log-opt": ["splunk-token=***", "a=b"]},
            {"log-opt": ["splunk-token=x", "a=b"]},
        ),
        ({"e": "TOKEN", "v": "/tokens:/tokens"}, {"e": "TOKEN", "v": "/tokens:/tokens"}, {}),
        ({"e": ["DB=x", "EPOCHS=3"]}, {"e": ["DB", "EPOCHS=3"]}, {"e": ["DB=x", "EPOCHS=3"]}),
        ({"label": "db-password=x"}, {"label": ["db-password=***"]}, {"label": ["db-password=x"]}),
    ],
)
def test_secret_variables_are_not_stored(
    arguments: dict[str, Any], public: dict[str, Any], secret: dict[str, Any]
) -> None:
    stored, kept = split_arguments(arguments)

    assert stored == public
    assert reveal_all(kept) == secret
    assert "x" not in str(kept)
    assert parse_arguments({**stored, **kept}, {"TOKEN": "t"}) == parse_arguments(reveal_all(arguments), {"TOKEN": "t"})


def test_secret_variables_are_not_quoted_in_errors() -> None:
    _, kept = split_arguments({"e": ["TOKEN=hunter2", "MISSING"]})
    with pytest.raises(ParameterError, match=r"can't be \['\*\*\*'.*MISSING is not set") as caught:
        parse_arguments(kept, {})
    assert "hunter2" not in str(caught.value)
