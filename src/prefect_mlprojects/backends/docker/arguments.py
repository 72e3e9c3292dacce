"""Maps container arguments (MLflow's flags, or a mapping) to the options of Docker's SDK, and separates secret ones.

``mlflow run -A name=value`` passes ``--name value`` to ``docker run``
(https://docs.docker.com/reference/cli/docker/container/run/); the names here are those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefect_mlprojects._support.redaction import holds_secret, is_secret, mark_variable, redact
from prefect_mlprojects._support.secrets import MASK, Secret, has_secret, reveal_all, without_secrets
from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem


@dataclass
class ContainerOptions:
    """The options to create a container with.

    Attributes:
        create: Keywords of ``APIClient.create_container``.
        host: Keywords of ``APIClient.create_host_config``.
        volumes: ``host:container[:mode]`` or ``name:container`` strings.
        environ: The variables of this process, from which names without a value are copied.
    """

    create: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


def parse_arguments(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> ContainerOptions:
    """Parses `docker_args`; ``image`` is ignored, and ``e=NAME`` copies from `environ`.

    Raises `ParameterError` for unknown arguments (the nearest is named) and invalid values; all problems at once.
    """
    options, problems = ContainerOptions(environ=environ), []
    for name, value in arguments.items():
        if name == "image" or value is None or value is False:
            continue
        setter = _SETTERS.get(_flag(name))
        if setter is None:
            problems.append(_unknown(name))
            continue
        try:
            setter(options, reveal_all(value))
        except (ValueError, TypeError, KeyError) as error:
            shown = without_secrets(value)
            message = f"container argument {name!r} can't be {shown!r}: {error}"
            problems.append(Problem(message, parameter=name, value=str(shown)))
    if problems:
        raise ParameterError("docker_args are invalid", problems)
    return options


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides `docker_args` into what may be stored with a flow run, and the arguments that hold secrets, as `Secret` values.

    `mark_variable` says which values of variables are secret or `Withheld`; of these the name is stored, which ``docker run``
    copies from the environment. Of other arguments those are secret whose name says so (``--log-opt splunk-token=…``), and
    URLs with a password.
    """
    public, secret = dict(arguments), dict[str, Any]()
    for name, value in arguments.items():
        flag, plain = _flag(name), reveal_all(value)
        given = (
            [f"{each}={content}" for each, content in plain.items()] if isinstance(plain, Mapping) else _texts(plain)
        )
        kinds = [Secret if has_secret(value) else _kind(flag, text) for text in given]
        if any(kinds):
            secret[name] = [kind(text) if kind else text for text, kind in zip(given, kinds, strict=True)]
            public[name] = [
                text if kind is None else text.partition("=")[0] if flag in _VARIABLES else redact(_hidden(text))
                for text, kind in zip(given, kinds, strict=True)
            ]
    return public, secret


def _kind(flag: str, text: str) -> type[Secret] | None:
    """Returns whether the text of an argument is a secret, withheld, or (None) may be stored."""
    name, separator, content = text.partition("=")
    if flag in _VARIABLES:
        marked = mark_variable(name, content)
        return type(marked) if isinstance(marked, Secret) else None
    by_name = separator and flag in _PAIRS and is_secret(name, content)
    return Secret if by_name or holds_secret(text) else None


def _hidden(text: str) -> str:
    name, separator, _ = text.partition("=")
    return f"{name}{separator}{MASK}" if separator else MASK


_WEAKENING = (
    *(
        "privileged",
        "cap_add",
        "devices",
        "device_cgroup_rules",
        "security_opt",
        "volumes_from",
        "group_add",
        "runtime",
    ),
    *("sysctls", "cgroup_parent", "volume_driver", "userns_mode", "links"),
)
_SHARING = ("network_mode", "pid_mode", "ipc_mode", "uts_mode", "cgroupns")


def privileges(options: ContainerOptions) -> list[str]:
    """Returns the options that weaken a container's isolation from the machine and from other containers."""
    host = options.host
    shared = [name for name in _SHARING if str(host.get(name, "")).startswith(("host", "container:"))]
    return [name.replace("_", "-") for name in (*(each for each in _WEAKENING if host.get(each)), *shared)]


def read_files(arguments: Mapping[str, Any]) -> list[str]:
    """Returns the files of this machine from which `docker_args` read variables."""
    return [
        text for name, value in arguments.items() if _flag(name) == "env-file" for text in _texts(reveal_all(value))
    ]


def _flag(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _unknown(name: str) -> Problem:
    flag = _flag(name)
    if flag in _REFUSED:
        return Problem(f"{name!r} {_REFUSED[flag]}", parameter=name)
    near = nearest(flag, _SETTERS)
    fix = f"did you mean {near!r}?" if near else None
    return Problem(f"unknown container argument {name!r}", parameter=name, fix=fix)


_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("a", "attach"), "can't be used: a run always attaches to all output"),
    **dict.fromkeys(("d", "detach"), "can't be used: the run waits for its container"),
    **dict.fromkeys(("i", "interactive"), "can't be used: a run has no terminal to read from"),
    **dict.fromkeys(("q", "quiet"), "can't be used: a run always reports its progress"),
    "cidfile": "is not needed: the container's id is in the run's log, and its labels hold the run's ids",
    "pull": "is a key of the backend configuration: pull: missing, always or never",
    "restart": "can't be used: a run ends when its command does",
    "rm": "is not needed: the container is removed when it has ended",
    "sig-proxy": "is not needed: stopping the run stops its container",
    "stop-timeout": "is the key grace-period of the backend configuration",
}


# Parsers of values; each raises ValueError for an invalid one.


def _texts(value: Any) -> list[str]:
    """Returns the value, or each of a list, as text."""
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _truth(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError("give true or false")
    return known[str(value).lower()]


def _divided(value: Any, separator: str, form: str, *, last: bool = False) -> Iterator[tuple[str, str]]:
    """Divides each text at its first separator, or its last; `form` describes valid texts."""
    for text in _texts(value):
        name, found, rest = text.rpartition(separator) if last else text.partition(separator)
        if not found:
            raise ValueError(f"give {form}")
        yield name, rest


def _pairs(value: Any) -> dict[str, str]:
    """Parses ``name=value``, or takes a mapping."""
    if isinstance(value, Mapping):
        return {str(name): str(content) for name, content in value.items()}
    return {name: content for name, _, content in (text.partition("=") for text in _texts(value))}


def _colon_pairs(value: Any) -> dict[str, str]:
    """Parses ``folder[:options]``."""
    return {name: rest for name, _, rest in (text.partition(":") for text in _texts(value))}


def _ulimits(value: Any) -> list[Any]:
    from docker.types import Ulimit

    limits = [(name, numbers.partition(":")) for name, numbers in _divided(value, "=", "name=soft[:hard]")]
    return [Ulimit(name=name, soft=int(soft), hard=int(hard or soft)) for name, (soft, _, hard) in limits]


def _gpu_requests(value: Any) -> list[Any]:
    """Parses ``all``, a number, or ``device=ID[,ID]``."""
    from docker.types import DeviceRequest

    text = "all" if value is True else str(value).strip().strip('"')
    if text == "all" or text.isdigit():
        return [DeviceRequest(count=-1 if text == "all" else int(text), capabilities=[["gpu"]])]
    if text.startswith("device="):
        return [DeviceRequest(device_ids=text.removeprefix("device=").split(","), capabilities=[["gpu"]])]
    raise ValueError("give all, a number, or device=ID[,ID]")


def _device_rates(value: Any) -> list[dict[str, Any]]:
    """Parses ``device:rate``, the rate with a unit as ``1mb``."""
    from docker.utils import parse_bytes

    return [{"Path": path, "Rate": parse_bytes(rate)} for path, rate in _divided(value, ":", "device:rate", last=True)]


# Setters of options that several flags or several parts of a value contribute to.

_Setter: TypeAlias = Callable[[ContainerOptions, Any], None]


def _set_log(name: Literal["type", "config"]) -> _Setter:
    def set_log(options: ContainerOptions, value: Any) -> None:
        from docker.types import LogConfig

        known = options.host.get("log_config") or LogConfig(type="json-file", config={})
        given: dict[str, Any] = {"type": known.type, "config": known.config}
        given[name] = str(value) if name == "type" else {**known.config, **_pairs(value)}
        options.host["log_config"] = LogConfig(**given)

    return set_log


# Keys of --mount by the names of Docker's SDK
# (https://docs.docker.com/engine/storage/bind-mounts/#options-for---mount).
_MOUNT_KEYS = {
    **{key: key.replace("-", "_") for key in ("type", "source", "target", "consistency", "tmpfs-size", "tmpfs-mode")},
    "src": "source",
    **dict.fromkeys(("destination", "dst"), "target"),
    **dict.fromkeys(("readonly", "ro"), "read_only"),
    "bind-propagation": "propagation",
    "volume-nocopy": "no_copy",
}


def _add_mounts(options: ContainerOptions, value: Any) -> None:
    from docker.types import Mount

    for text in _texts(value):
        given: dict[str, Any] = {"type": "volume", "source": None}
        for part in text.split(","):
            key, separator, content = part.partition("=")
            if key not in _MOUNT_KEYS:
                raise ValueError(f"a mount has no {key!r}; it knows {', '.join(sorted(_MOUNT_KEYS))}")
            name = _MOUNT_KEYS[key]
            flag = name in ("read_only", "no_copy")
            given[name] = (_truth(content) if separator else True) if flag else content
        if "tmpfs_mode" in given:
            given["tmpfs_mode"] = int(given["tmpfs_mode"], 8)
        if "target" not in given:
            raise ValueError("give a target")
        options.host.setdefault("mounts", []).append(Mount(**given))


def _expose(options: ContainerOptions, value: Any) -> None:
    ports = [(port, protocol or "tcp") for port, _, protocol in (text.partition("/") for text in _texts(value))]
    options.create.setdefault("ports", []).extend(ports)


def _publish(options: ContainerOptions, value: Any) -> None:
    from docker.utils.ports import build_port_bindings

    bindings = build_port_bindings(_texts(value)) if not isinstance(value, Mapping) else dict(value)
    options.host["port_bindings"] = bindings
    ports = [tuple(port.split("/")) if "/" in str(port) else port for port in bindings]
    options.create.setdefault("ports", []).extend(ports)


def _disable_health_check(options: ContainerOptions, value: Any) -> None:
    if _truth(value):
        options.create["healthcheck"] = {"test": ["NONE"]}


def _add_environment_files(options: ContainerOptions, value: Any) -> None:
    from docker.utils import parse_env_file

    for path in _texts(value):
        try:
            found = parse_env_file(path)
        except OSError as error:
            raise ValueError(f"the file can't be read: {error.strerror}") from None
        # --env takes precedence over --env-file, whatever the order.
        options.environment = {**found, **options.environment}


def _add_environment(options: ContainerOptions, value: Any) -> None:
    if isinstance(value, Mapping):
        options.environment |= {str(name): "" if content is None else str(content) for name, content in value.items()}
        return
    for text in _texts(value):
        name, separator, content = text.partition("=")
        if not separator and name not in options.environ:
            raise ValueError(f"the variable {name} is not set here")
        options.environment[name] = content if separator else options.environ[name]


def _add_volumes(options: ContainerOptions, value: Any) -> None:
    if isinstance(value, Mapping):
        for source, target in value.items():
            if isinstance(target, Mapping):
                mode = f":{target['mode']}" if target.get("mode") else ""
                options.volumes.append(f"{source}:{target['bind']}{mode}")
            else:
                options.volumes.append(f"{source}:{target}")
        return
    options.volumes += [f"{source}:{target}" for source, target in _divided(value, ":", "host:container[:mode]")]


def _add_labels(options: ContainerOptions, value: Any) -> None:
    options.create["labels"] = {**options.create.get("labels", {}), **_pairs(value)}


def _assign(group: Literal["create", "host"], name: str, parse: Callable[[Any], Any]) -> _Setter:
    def assign(options: ContainerOptions, value: Any) -> None:
        getattr(options, group)[name] = parse(value)

    return assign


# The flags that are named like their option in create_host_config, by the parser of their value.
_HOST_FLAGS: Mapping[Callable[[Any], Any], str] = {
    str: "cgroup-parent cgroupns cpuset-cpus cpuset-mems runtime shm-size volume-driver",
    int: "blkio-weight cpu-period cpu-quota cpu-rt-period cpu-rt-runtime cpu-shares oom-score-adj pids-limit",
    _texts: "cap-add cap-drop dns dns-search group-add security-opt volumes-from",
    _truth: "init oom-kill-disable privileged read-only",
    _device_rates: "device-read-bps device-read-iops device-write-bps device-write-iops",
    _pairs: "storage-opt",
    _colon_pairs: "tmpfs",
}
_RENAMED_HOST_FLAGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "add-host": ("extra_hosts", lambda value: dict(_divided(value, ":", "name:address"))),
    "cpus": ("nano_cpus", lambda value: int(float(value) * 1_000_000_000)),
    "device": ("devices", _texts),
    "device-cgroup-rule": ("device_cgroup_rules", _texts),
    "dns-option": ("dns_opt", _texts),
    "gpus": ("device_requests", _gpu_requests),
    "ipc": ("ipc_mode", str),
    "link": ("links", lambda value: {name: alias or name for name, alias in _colon_pairs(value).items()}),
    "memory": ("mem_limit", str),
    "memory-reservation": ("mem_reservation", str),
    "memory-swap": ("memswap_limit", str),
    "memory-swappiness": ("mem_swappiness", int),
    "network": ("network_mode", str),
    "pid": ("pid_mode", str),
    "publish-all": ("publish_all_ports", _truth),
    "sysctl": ("sysctls", _pairs),
    "ulimit": ("ulimits", _ulimits),
    "userns": ("userns_mode", str),
    "uts": ("uts_mode", str),
}
_CREATE_FLAGS = "domainname hostname mac-address name platform stop-signal user"
_PAIRS = ("build-arg", "l", "label", "log-opt", "storage-opt")
_VARIABLES = ("e", "env", "environment")
_SHORT_NAMES = {
    **{"c": "cpu-shares", "e": "env", "h": "hostname", "l": "label", "m": "memory", "net": "network", "p": "publish"},
    **{"P": "publish-all", "t": "tty", "u": "user", "v": "volume", "w": "workdir"},
}
_LONG_NAMES: Mapping[str, _Setter] = {
    **{
        flag: _assign("host", flag.replace("-", "_"), parse)
        for parse, flags in _HOST_FLAGS.items()
        for flag in flags.split()
    },
    **{flag: _assign("host", name, parse) for flag, (name, parse) in _RENAMED_HOST_FLAGS.items()},
    **{flag: _assign("create", flag.replace("-", "_"), str) for flag in _CREATE_FLAGS.split()},
    "entrypoint": _assign("create", "entrypoint", _texts),
    "tty": _assign("create", "tty", _truth),
    "workdir": _assign("create", "working_dir", str),
    "env": _add_environment,
    "env-file": _add_environment_files,
    "environment": _add_environment,
    "expose": _expose,
    "label": _add_labels,
    "log-driver": _set_log("type"),
    "log-opt": _set_log("config"),
    "mount": _add_mounts,
    "no-healthcheck": _disable_health_check,
    "publish": _publish,
    "volume": _add_volumes,
    "volumes": _add_volumes,
}
_SETTERS: Mapping[str, _Setter] = {**_LONG_NAMES, **{short: _LONG_NAMES[long] for short, long in _SHORT_NAMES.items()}}
