"""Parses values of ``docker run``'s flags for Docker's SDK; each function raises ``ValueError`` for an invalid one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def texts(value: Any) -> list[str]:
    """Returns the value, or each of a list, as text."""
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def truth(value: Any) -> bool:
    """Parses a boolean flag."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError("give true or false")
    return known[str(value).lower()]


def nano_cpus(value: Any) -> int:
    """Converts CPUs to billionths of a CPU."""
    return int(float(value) * 1_000_000_000)


def ulimits(value: Any) -> list[Any]:
    """Parses ``name=soft[:hard]``."""
    from docker.types import Ulimit

    limits = []
    for text in texts(value):
        name, separator, numbers = text.partition("=")
        soft, _, hard = numbers.partition(":")
        if not separator:
            raise ValueError("give name=soft[:hard]")
        limits.append(Ulimit(name=name, soft=int(soft), hard=int(hard or soft)))
    return limits


def gpu_requests(value: Any) -> list[Any]:
    """Parses ``all``, a number, or ``device=ID[,ID]``."""
    from docker.types import DeviceRequest

    text = str(value).strip().strip('"')
    if text == "all" or value is True:
        return [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    if text.isdigit():
        return [DeviceRequest(count=int(text), capabilities=[["gpu"]])]
    if text.startswith("device="):
        return [DeviceRequest(device_ids=text.removeprefix("device=").split(","), capabilities=[["gpu"]])]
    raise ValueError("give all, a number, or device=ID[,ID]")


def extra_hosts(value: Any) -> dict[str, str]:
    """Parses ``name:address``."""
    hosts = {}
    for text in texts(value):
        name, separator, address = text.partition(":")
        if not separator:
            raise ValueError("give name:address")
        hosts[name] = address
    return hosts


def tmpfs(value: Any) -> dict[str, str]:
    """Parses ``folder[:options]``."""
    return {place: mode for place, _, mode in (text.partition(":") for text in texts(value))}


def pairs(value: Any) -> dict[str, str]:
    """Parses ``name=value``, or takes a mapping."""
    if isinstance(value, Mapping):
        return {str(name): str(content) for name, content in value.items()}
    return {name: content for name, _, content in (text.partition("=") for text in texts(value))}


def device_rates(value: Any) -> list[dict[str, Any]]:
    """Parses ``device:rate``, the rate with a unit as ``1mb``."""
    from docker.utils import parse_bytes

    rates = []
    for text in texts(value):
        path, separator, rate = text.rpartition(":")
        if not separator:
            raise ValueError("give device:rate")
        rates.append({"Path": path, "Rate": parse_bytes(rate)})
    return rates


def link_names(value: Any) -> dict[str, str]:
    """Parses ``container[:alias]``."""
    return {name: alias or name for name, _, alias in (text.partition(":") for text in texts(value))}
