"""What the values of ``docker run``'s flags mean to Docker's SDK; each raises ``ValueError`` for one that means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def texts(value: Any) -> list[str]:
    """Returns one text, or each of several."""
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def truth(value: Any) -> bool:
    """Returns whether a flag is on."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError("give true or false")
    return known[str(value).lower()]


def nano_cpus(value: Any) -> int:
    """Returns billionths of a CPU."""
    return int(float(value) * 1_000_000_000)


def ulimits(value: Any) -> list[Any]:
    """Reads ``name=soft[:hard]``."""
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
    """Reads ``all``, a number, or ``device=ID[,ID]``."""
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
    """Reads ``name:address``."""
    hosts = {}
    for text in texts(value):
        name, separator, address = text.partition(":")
        if not separator:
            raise ValueError("give name:address")
        hosts[name] = address
    return hosts


def tmpfs(value: Any) -> dict[str, str]:
    """Reads ``folder[:options]``."""
    return {place: mode for place, _, mode in (text.partition(":") for text in texts(value))}


def pairs(value: Any) -> dict[str, str]:
    """Reads ``name=value``, or takes a mapping."""
    if isinstance(value, Mapping):
        return {str(name): str(content) for name, content in value.items()}
    return {name: content for name, _, content in (text.partition("=") for text in texts(value))}


def device_rates(value: Any) -> list[dict[str, Any]]:
    """Reads ``device:rate``, the rate with a unit as ``1mb``."""
    from docker.utils import parse_bytes

    rates = []
    for text in texts(value):
        path, separator, rate = text.rpartition(":")
        if not separator:
            raise ValueError("give device:rate")
        rates.append({"Path": path, "Rate": parse_bytes(rate)})
    return rates


def link_names(value: Any) -> dict[str, str]:
    """Reads ``container[:alias]``."""
    return {name: alias or name for name, _, alias in (text.partition(":") for text in texts(value))}
