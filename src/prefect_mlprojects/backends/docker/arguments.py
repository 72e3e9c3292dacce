"""Maps container arguments (MLflow's flags, or a mapping) to the options of Docker's SDK.

``mlflow run -A name=value`` passes ``--name value`` to ``docker run``
(https://docs.docker.com/reference/cli/docker/container/run/); the names here are those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects._support.redaction import is_secret
from prefect_mlprojects._support.secrets import Secret, has_secret, reveal_all, without_secrets
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.backends.docker.flag_values import (
    device_rates,
    extra_hosts,
    gpu_requests,
    link_names,
    nano_cpus,
    pairs,
    texts,
    tmpfs,
    truth,
    ulimits,
)
from prefect_mlprojects.exceptions import ParameterError, Problem


@dataclass
class ContainerOptions:
    """The options to create a container with.

    Attributes:
        create: Keywords of ``APIClient.create_container``.
        host: Keywords of ``APIClient.create_host_config``.
        environment: Variables.
        volumes: ``host:container[:mode]`` or ``name:container`` strings.
    """

    create: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)


_Setter = Callable[[ContainerOptions, Any], None]


def parse_arguments(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> ContainerOptions:
    """Parses `docker_args`.

    Args:
        arguments: Values by name: flags as ``docker run`` has them (without dashes), or ``volumes`` and ``environment`` as lists or
            mappings. ``image`` is ignored.
        environ: This process's variables: ``e=NAME`` copies from them.

    Raises:
        ParameterError: An argument is unknown (the nearest is named) or has an invalid value; all problems at once.
    """
    options, problems = ContainerOptions(), []
    for name, value in arguments.items():
        if name == "image" or value is None or value is False:
            continue
        key = _key(name)
        setter = _TABLE.get(key)
        if setter is None:
            near = nearest(key, _TABLE)
            why = _REFUSED.get(key)
            problems.append(
                Problem(
                    f"unknown container argument {name!r}" if why is None else f"{name!r} {why}",
                    parameter=name,
                    fix=f"did you mean {near!r}?" if near and why is None else None,
                )
            )
            continue
        try:
            setter(options, reveal_all(value))
            if key in _VARIABLES:
                _copy_variables(options, environ)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(
                Problem(
                    f"container argument {name!r} can't be {without_secrets(value)!r}: {error}",
                    parameter=name,
                    value=str(without_secrets(value)),
                )
            )
    if problems:
        raise ParameterError("docker_args are invalid", problems)
    return options


_VARIABLES = ("e", "env", "environment")


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides `docker_args` into what may be stored with a flow run, and the arguments that hold secrets, as `Secret` values.

    Secrets are ``NAME=VALUE`` of variables and log options whose name says so, or whose value is a URL with one. Of a variable
    the name is stored, which ``docker run`` copies from the environment.
    """
    public, secret = dict(arguments), dict[str, Any]()
    for name, value in arguments.items():
        key, plain = _key(name), reveal_all(value)
        if key not in (*_VARIABLES, "log-opt"):
            continue
        given = (
            [f"{each}={content}" for each, content in pairs(plain).items()]
            if isinstance(plain, Mapping)
            else texts(plain)
        )
        hidden = [text for text in given if has_secret(value) or is_secret(*text.partition("=")[::2])]
        if hidden:
            secret[name] = [Secret(text) for text in given]
            public[name] = [text.partition("=")[0] if text in hidden else text for text in given if key in _VARIABLES]
    return public, secret


def _key(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


_REFUSED: Mapping[str, str] = {
    "a": "can't be used: a run always attaches to all output",
    "attach": "can't be used: a run always attaches to all output",
    "cidfile": "is not needed: the container's id is in the run's log, and its labels hold the run's ids",
    "pull": "is a key of the backend configuration: pull: missing, always or never",
    "q": "can't be used: a run always reports its progress",
    "quiet": "can't be used: a run always reports its progress",
    "sig-proxy": "is not needed: stopping the run stops its container",
    "stop-timeout": "is the key grace-period of the backend configuration",
    "rm": "is not needed: the container is removed when it has ended",
    "d": "can't be used: the run waits for its container",
    "detach": "can't be used: the run waits for its container",
    "i": "can't be used: a run has no terminal to read from",
    "interactive": "can't be used: a run has no terminal to read from",
    "restart": "can't be used: a run ends when its command does",
}


def _create(name: str, convert: Callable[[Any], Any] = str) -> _Setter:
    def set_it(options: ContainerOptions, value: Any) -> None:
        options.create[name] = convert(value)

    return set_it


def _host(name: str, convert: Callable[[Any], Any] = str) -> _Setter:
    def set_it(options: ContainerOptions, value: Any) -> None:
        options.host[name] = convert(value)

    return set_it


def _log(field_name: str) -> _Setter:
    def set_it(options: ContainerOptions, value: Any) -> None:
        from docker.types import LogConfig

        known = options.host.get("log_config") or LogConfig(type="json-file", config={})
        given: dict[str, Any] = {"type": known.type, "config": known.config}
        given[field_name] = str(value) if field_name == "type" else {**known.config, **pairs(value)}
        options.host["log_config"] = LogConfig(**given)

    return set_it


# Keys of --mount by the names of Docker's SDK
# (https://docs.docker.com/engine/storage/bind-mounts/#options-for---mount).
_MOUNT_KEYS = {
    "type": "type",
    "source": "source",
    "src": "source",
    "target": "target",
    "destination": "target",
    "dst": "target",
    "readonly": "read_only",
    "ro": "read_only",
    "bind-propagation": "propagation",
    "consistency": "consistency",
    "volume-nocopy": "no_copy",
    "tmpfs-size": "tmpfs_size",
    "tmpfs-mode": "tmpfs_mode",
}


def _mounts(options: ContainerOptions, value: Any) -> None:
    from docker.types import Mount

    for text in texts(value):
        given: dict[str, Any] = {"type": "volume", "source": None}
        for part in text.split(","):
            key, separator, content = part.partition("=")
            if key not in _MOUNT_KEYS:
                raise ValueError(f"a mount has no {key!r}; it knows {', '.join(sorted(_MOUNT_KEYS))}")
            name = _MOUNT_KEYS[key]
            flag = name in ("read_only", "no_copy")
            given[name] = truth(content) if separator and flag else True if flag else content
        if "tmpfs_mode" in given:
            given["tmpfs_mode"] = int(given["tmpfs_mode"], 8)
        if "target" not in given:
            raise ValueError("give a target")
        options.host.setdefault("mounts", []).append(Mount(**given))


def _expose(options: ContainerOptions, value: Any) -> None:
    ports = [(port, protocol or "tcp") for port, _, protocol in (text.partition("/") for text in texts(value))]
    options.create["ports"] = [*options.create.get("ports", []), *ports]


def _no_health_check(options: ContainerOptions, value: Any) -> None:
    if truth(value):
        options.create["healthcheck"] = {"test": ["NONE"]}


def _set_environment_files(options: ContainerOptions, value: Any) -> None:
    from docker.utils import parse_env_file

    for path in texts(value):
        try:
            found = parse_env_file(path)
        except OSError as error:
            raise ValueError(f"the file can't be read: {error.strerror}") from None
        # --env takes precedence over --env-file, whatever the order.
        options.environment = {**found, **options.environment}


def _set_environment(options: ContainerOptions, value: Any) -> None:
    if isinstance(value, Mapping):
        options.environment |= {str(name): "" if content is None else str(content) for name, content in value.items()}
        return
    for text in texts(value):
        name, separator, content = text.partition("=")
        # A name alone is copied from this process; see _copy_variables.
        options.environment[name] = content if separator else _COPY


_COPY = "\0copy"


def _copy_variables(options: ContainerOptions, environ: Mapping[str, str]) -> None:
    for name, value in list(options.environment.items()):
        if value == _COPY:
            if name not in environ:
                del options.environment[name]
                raise ValueError(f"the variable {name} is not set here")
            options.environment[name] = environ[name]


def _set_volumes(options: ContainerOptions, value: Any) -> None:
    if isinstance(value, Mapping):
        for source, target in value.items():
            if isinstance(target, Mapping):
                mode = f":{target['mode']}" if target.get("mode") else ""
                options.volumes.append(f"{source}:{target['bind']}{mode}")
            else:
                options.volumes.append(f"{source}:{target}")
        return
    for text in texts(value):
        if ":" not in text:
            raise ValueError("give host:container[:mode]")
        options.volumes.append(text)


def _set_ports(options: ContainerOptions, value: Any) -> None:
    from docker.utils.ports import build_port_bindings

    bindings = build_port_bindings(texts(value)) if not isinstance(value, Mapping) else dict(value)
    options.host["port_bindings"] = bindings
    ports = [tuple(port.split("/")) if "/" in str(port) else port for port in bindings]
    options.create["ports"] = [*options.create.get("ports", []), *ports]


def _labels(options: ContainerOptions, value: Any) -> None:
    options.create["labels"] = {**options.create.get("labels", {}), **pairs(value)}


_BY_LONG_NAME: Mapping[str, _Setter] = {
    "add-host": _host("extra_hosts", extra_hosts),
    "blkio-weight": _host("blkio_weight", int),
    "cap-add": _host("cap_add", texts),
    "cap-drop": _host("cap_drop", texts),
    "cgroup-parent": _host("cgroup_parent"),
    "cgroupns": _host("cgroupns"),
    "cpu-period": _host("cpu_period", int),
    "cpu-quota": _host("cpu_quota", int),
    "cpu-rt-period": _host("cpu_rt_period", int),
    "cpu-rt-runtime": _host("cpu_rt_runtime", int),
    "cpu-shares": _host("cpu_shares", int),
    "cpus": _host("nano_cpus", nano_cpus),
    "cpuset-cpus": _host("cpuset_cpus"),
    "cpuset-mems": _host("cpuset_mems"),
    "device": _host("devices", texts),
    "device-cgroup-rule": _host("device_cgroup_rules", texts),
    "device-read-bps": _host("device_read_bps", device_rates),
    "device-read-iops": _host("device_read_iops", device_rates),
    "device-write-bps": _host("device_write_bps", device_rates),
    "device-write-iops": _host("device_write_iops", device_rates),
    "dns": _host("dns", texts),
    "dns-option": _host("dns_opt", texts),
    "dns-search": _host("dns_search", texts),
    "domainname": _create("domainname"),
    "entrypoint": _create("entrypoint", texts),
    "env": _set_environment,
    "env-file": _set_environment_files,
    "environment": _set_environment,
    "expose": _expose,
    "gpus": _host("device_requests", gpu_requests),
    "group-add": _host("group_add", texts),
    "hostname": _create("hostname"),
    "init": _host("init", truth),
    "ipc": _host("ipc_mode"),
    "label": _labels,
    "link": _host("links", link_names),
    "log-driver": _log("type"),
    "log-opt": _log("config"),
    "mac-address": _create("mac_address"),
    "memory": _host("mem_limit"),
    "memory-reservation": _host("mem_reservation"),
    "memory-swap": _host("memswap_limit"),
    "memory-swappiness": _host("mem_swappiness", int),
    "mount": _mounts,
    "name": _create("name"),
    "network": _host("network_mode"),
    "no-healthcheck": _no_health_check,
    "oom-kill-disable": _host("oom_kill_disable", truth),
    "oom-score-adj": _host("oom_score_adj", int),
    "pid": _host("pid_mode"),
    "pids-limit": _host("pids_limit", int),
    "platform": _create("platform"),
    "privileged": _host("privileged", truth),
    "publish": _set_ports,
    "publish-all": _host("publish_all_ports", truth),
    "read-only": _host("read_only", truth),
    "runtime": _host("runtime"),
    "security-opt": _host("security_opt", texts),
    "shm-size": _host("shm_size"),
    "stop-signal": _create("stop_signal"),
    "storage-opt": _host("storage_opt", pairs),
    "sysctl": _host("sysctls", pairs),
    "tmpfs": _host("tmpfs", tmpfs),
    "tty": _create("tty", truth),
    "ulimit": _host("ulimits", ulimits),
    "user": _create("user"),
    "userns": _host("userns_mode"),
    "uts": _host("uts_mode"),
    "volume": _set_volumes,
    "volume-driver": _host("volume_driver"),
    "volumes": _set_volumes,
    "volumes-from": _host("volumes_from", texts),
    "workdir": _create("working_dir"),
}
_SHORT_NAMES = {
    "c": "cpu-shares",
    "e": "env",
    "h": "hostname",
    "l": "label",
    "m": "memory",
    "net": "network",
    "p": "publish",
    "P": "publish-all",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_TABLE: Mapping[str, _Setter] = {
    **_BY_LONG_NAME,
    **{short: _BY_LONG_NAME[long] for short, long in _SHORT_NAMES.items()},
}
