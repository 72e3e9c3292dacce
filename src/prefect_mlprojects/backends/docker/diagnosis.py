"""Why a container could not be started, or ended: pure functions of what the engine says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_mlprojects.backends.outcome import Cause, find_cause

_START_FAILURES: tuple[tuple[str, str, str], ...] = (
    ("no such image", "the image is not there", "Pull or build it, or correct its name."),
    ("manifest unknown", "the registry has no such image or tag", "Correct the image's name or tag."),
    ("executable file not found", "the image has no shell (sh) to run the command with", "Use an image that has one."),
    (
        "no such file or directory: unknown",
        "the image's entrypoint, or its shell, is not there",
        "Correct the entrypoint.",
    ),
    (
        "could not select device driver",
        "the engine has no driver for the devices that were asked for",
        "For GPUs install the NVIDIA Container Toolkit on the engine's machine, or leave gpus out.",
    ),
    ("no such device", "a device that was asked for is not there", "Correct the devices."),
    ("error gathering device information", "a device that was asked for is not there", "Correct the devices."),
    ("port is already allocated", "a port is in use already", "Publish another port."),
    ("address already in use", "a port is in use already", "Publish another port."),
    ("is already in use by container", "another container has that name", "Leave the name out, or choose another."),
    ("unknown runtime", "the engine does not know that runtime", "Correct the runtime."),
    ("network", "the network is not there or can't be used", "Correct the network."),
    ("permission denied", "the engine was not permitted to do it", "Look at the engine's message."),
    ("unable to find user", "the image has no such user", "Correct the user."),
    ("mount", "a folder can't be mounted", "Correct the volumes."),
    ("no space left", "the engine's disk is full", "Free some space: docker system prune."),
)


def explain_start_failure(message: str) -> tuple[str, str]:
    """Says why a container could not be created or started.

    Args:
        message: The engine's message.

    Returns:
        The cause with the engine's words, and what to do.
    """
    low = message.lower()
    words = message.strip().rstrip(".")
    for sign, cause, advice in _START_FAILURES:
        if sign in low:
            return f"{cause} ({words})", advice
    return f"the engine refused it: {words}", ""


def explain_end(state: Mapping[str, Any]) -> Cause:
    """Says why a container ended.

    Args:
        state: ``State`` of what the engine's inspection says.
    """
    code = int(state.get("ExitCode") or 0)
    if state.get("OOMKilled"):
        return Cause(
            code,
            9,
            "out of memory: the kernel killed it",
            "Give the container more memory (docker_args memory=…), or use less.",
        )
    if error := str(state.get("Error") or "").strip():
        cause, advice = explain_start_failure(error)
        return Cause(code, None, cause, advice)
    return find_cause(code)
