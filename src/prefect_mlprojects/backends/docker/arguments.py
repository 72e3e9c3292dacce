"""Arguments for containers: from MLflow's flags, or a mapping, to what Docker's SDK takes. One table, no silence.

``mlflow run -A name=value`` passes ``--name value`` to ``docker run``
(https://docs.docker.com/reference/cli/docker/container/run/); the names here are those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from prefect_mlprojects.exceptions import ParameterError, Problem


@dataclass
class ContainerOptions:
    """What a container is created with.

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
    """Reads a call's arguments for the container.

    Args:
        arguments: Values by name: flags as ``docker run`` has them (without dashes), or ``volumes`` and ``environment`` as lists or
            mappings. ``image`` is passed over.
        environ: This process's variables: ``e=NAME`` copies from them.

    Raises:
        ParameterError: An argument is unknown (the nearest is named) or has a value that it can't have; all of them at once.
    """
    options, problems = ContainerOptions(), []
    for name, value in arguments.items():
        if name == "image" or value is None or value is False:
            continue
        key = name.lstrip("-").replace("_", "-")
        setter = _TABLE.get(key)
        if setter is None:
            near = get_close_matches(key, _TABLE, n=1)
            why = _REFUSED.get(key)
            problems.append(
                Problem(
                    f"there is no container argument {name!r}" if why is None else f"{name!r} {why}",
                    parameter=name,
                    fix=f"did you mean {near[0]!r}?" if near and why is None else None,
                )
            )
            continue
        try:
            setter(options, value)
            if key in ("e", "env", "environment"):
                _copy_variables(options, environ)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(
                Problem(
                    f"the container argument {name!r} can't be {value!r}: {error}", parameter=name, value=str(value)
                )
            )
    if problems:
        raise ParameterError("The arguments for the container do not fit", problems)
    return options


_REFUSED: Mapping[str, str] = {
    "rm": "is not needed: the container is removed when it has ended",
    "d": "can't be used: the run waits for its container",
    "detach": "can't be used: the run waits for its container",
    "i": "can't be used: a run has no terminal to read from",
    "interactive": "can't be used: a run has no terminal to read from",
    "restart": "can't be used: a run ends when its command does",
}


def _each(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _create(name: str, convert: Callable[[Any], Any] = str) -> _Setter:
    def set_it(options: ContainerOptions, value: Any) -> None:
        options.create[name] = convert(value)

    return set_it


def _host(name: str, convert: Callable[[Any], Any] = str) -> _Setter:
    def set_it(options: ContainerOptions, value: Any) -> None:
        options.host[name] = convert(value)

    return set_it


def _true(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError("give true or false")
    return known[str(value).lower()]


def _cpus(value: Any) -> int:
    return int(float(value) * 1_000_000_000)


def _entrypoint(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _ulimits(value: Any) -> list[Any]:
    from docker.types import Ulimit

    limits = []
    for text in _each(value):
        name, separator, numbers = text.partition("=")
        soft, _, hard = numbers.partition(":")
        if not separator:
            raise ValueError("give name=soft[:hard]")
        limits.append(Ulimit(name=name, soft=int(soft), hard=int(hard or soft)))
    return limits


def _gpus(value: Any) -> list[Any]:
    from docker.types import DeviceRequest

    text = str(value).strip().strip('"')
    if text == "all" or value is True:
        return [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    if text.isdigit():
        return [DeviceRequest(count=int(text), capabilities=[["gpu"]])]
    if text.startswith("device="):
        return [DeviceRequest(device_ids=text.removeprefix("device=").split(","), capabilities=[["gpu"]])]
    raise ValueError("give all, a number, or device=ID[,ID]")


def _extra_hosts(value: Any) -> dict[str, str]:
    hosts = {}
    for text in _each(value):
        name, separator, address = text.partition(":")
        if not separator:
            raise ValueError("give name:address")
        hosts[name] = address
    return hosts


def _tmpfs(value: Any) -> dict[str, str]:
    return {place: mode for place, _, mode in (text.partition(":") for text in _each(value))}


def _pairs(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(name): str(content) for name, content in value.items()}
    return {name: content for name, _, content in (text.partition("=") for text in _each(value))}


def _set_environment(options: ContainerOptions, value: Any) -> None:
    if isinstance(value, Mapping):
        options.environment |= {str(name): "" if content is None else str(content) for name, content in value.items()}
        return
    for text in _each(value):
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
        for place, facts in value.items():
            if isinstance(facts, Mapping):
                mode = f":{facts['mode']}" if facts.get("mode") else ""
                options.volumes.append(f"{place}:{facts['bind']}{mode}")
            else:
                options.volumes.append(f"{place}:{facts}")
        return
    for text in _each(value):
        if ":" not in text:
            raise ValueError("give host:container[:mode]")
        options.volumes.append(text)


def _set_ports(options: ContainerOptions, value: Any) -> None:
    from docker.utils.ports import build_port_bindings

    bindings = build_port_bindings(_each(value)) if not isinstance(value, Mapping) else dict(value)
    options.host["port_bindings"] = bindings
    options.create["ports"] = [tuple(port.split("/")) if "/" in str(port) else port for port in bindings]


def _set_network(options: ContainerOptions, value: Any) -> None:
    options.host["network_mode"] = str(value)


def _labels(options: ContainerOptions, value: Any) -> None:
    options.create["labels"] = {**options.create.get("labels", {}), **_pairs(value)}


_BY_LONG_NAME: Mapping[str, _Setter] = {
    "add-host": _host("extra_hosts", _extra_hosts),
    "blkio-weight": _host("blkio_weight", int),
    "cap-add": _host("cap_add", _each),
    "cap-drop": _host("cap_drop", _each),
    "cgroup-parent": _host("cgroup_parent"),
    "cpu-period": _host("cpu_period", int),
    "cpu-quota": _host("cpu_quota", int),
    "cpu-shares": _host("cpu_shares", int),
    "cpus": _host("nano_cpus", _cpus),
    "cpuset-cpus": _host("cpuset_cpus"),
    "device": _host("devices", _each),
    "dns": _host("dns", _each),
    "domainname": _create("domainname"),
    "entrypoint": _create("entrypoint", _entrypoint),
    "env": _set_environment,
    "environment": _set_environment,
    "gpus": _host("device_requests", _gpus),
    "group-add": _host("group_add", _each),
    "hostname": _create("hostname"),
    "init": _host("init", _true),
    "ipc": _host("ipc_mode"),
    "label": _labels,
    "memory": _host("mem_limit"),
    "memory-reservation": _host("mem_reservation"),
    "memory-swap": _host("memswap_limit"),
    "name": _create("name"),
    "network": _set_network,
    "oom-kill-disable": _host("oom_kill_disable", _true),
    "pid": _host("pid_mode"),
    "pids-limit": _host("pids_limit", int),
    "platform": _create("platform"),
    "privileged": _host("privileged", _true),
    "publish": _set_ports,
    "read-only": _host("read_only", _true),
    "runtime": _host("runtime"),
    "security-opt": _host("security_opt", _each),
    "shm-size": _host("shm_size"),
    "stop-signal": _create("stop_signal"),
    "sysctl": _host("sysctls", _pairs),
    "tmpfs": _host("tmpfs", _tmpfs),
    "tty": _create("tty", _true),
    "ulimit": _host("ulimits", _ulimits),
    "user": _create("user"),
    "userns": _host("userns_mode"),
    "uts": _host("uts_mode"),
    "volume": _set_volumes,
    "volumes": _set_volumes,
    "volumes-from": _host("volumes_from", _each),
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
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_TABLE: Mapping[str, _Setter] = {
    **_BY_LONG_NAME,
    **{short: _BY_LONG_NAME[long] for short, long in _SHORT_NAMES.items()},
}
