"""Why a container could not be started, or ended: pure functions of what the engine reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect_mlprojects.backends.outcome import ExitCause, explain_exit
from prefect_mlprojects.types import FailureCategory

_IMAGE, _INFRASTRUCTURE = FailureCategory.IMAGE, FailureCategory.INFRASTRUCTURE


@dataclass(frozen=True)
class StartFailure:
    """Why the engine refused to create or start a container.

    Attributes:
        cause: The cause with the engine's message.
        advice: What to do about it; may be empty.
        category: The category of the failure.
    """

    cause: str
    advice: str
    category: FailureCategory


# What the engine's message contains, the cause, what to do, the category; the first that fits counts.
_START_FAILURES: tuple[tuple[str, str, str, FailureCategory], ...] = (
    ("no such image", "the engine has no such image", "Pull or build it, or correct its name.", _IMAGE),
    ("manifest unknown", "the registry has no such image or tag", "Correct the image's name or tag.", _IMAGE),
    (
        "executable file not found",
        "the image has no shell (sh) to run the command with",
        "Use an image that has one.",
        _IMAGE,
    ),
    (
        "no such file or directory: unknown",
        "the image has no sh, or its entrypoint is missing",
        "Correct the entrypoint.",
        _IMAGE,
    ),
    (
        "could not select device driver",
        "the engine has no driver for the devices requested",
        "For GPUs install the NVIDIA Container Toolkit on the engine's machine, or leave gpus out.",
        FailureCategory.SCHEDULING,
    ),
    (
        "no such device",
        "a requested device does not exist on the Docker host",
        "Correct the devices.",
        FailureCategory.SCHEDULING,
    ),
    (
        "error gathering device information",
        "a requested device does not exist on the Docker host",
        "Correct the devices.",
        FailureCategory.SCHEDULING,
    ),
    ("port is already allocated", "a port is in use already", "Publish another port.", _INFRASTRUCTURE),
    ("address already in use", "a port is in use already", "Publish another port.", _INFRASTRUCTURE),
    (
        "is already in use by container",
        "another container has that name",
        "Leave the name out, or choose another.",
        _INFRASTRUCTURE,
    ),
    ("unknown runtime", "the engine does not know that runtime", "Correct the runtime.", _INFRASTRUCTURE),
    ("network", "the network does not exist or can't be used", "Correct the network.", _INFRASTRUCTURE),
    ("permission denied", "the engine was not permitted to do it", "Look at the engine's message.", _INFRASTRUCTURE),
    ("unable to find user", "the image has no such user", "Correct the user.", _IMAGE),
    ("mount", "a folder can't be mounted", "Correct the volumes.", _INFRASTRUCTURE),
    ("no space left", "the engine's disk is full", "Free some space: docker system prune.", _INFRASTRUCTURE),
)


def explain_start_failure(message: str) -> StartFailure:
    """Explains the engine's message about a container that could not be created or started."""
    low = message.lower()
    words = message.strip().rstrip(".")
    for sign, cause, advice, category in _START_FAILURES:
        if sign in low:
            return StartFailure(f"{cause} ({words})", advice, category)
    return StartFailure(f"the engine refused it: {words}", "", _INFRASTRUCTURE)


def explain_end(state: Mapping[str, Any]) -> ExitCause:
    """Explains why a container ended, by ``State`` of the engine's inspection."""
    code = int(state.get("ExitCode") or 0)
    if state.get("OOMKilled"):
        return ExitCause(
            code,
            9,
            "out of memory: the kernel killed it",
            "Give the container more memory (docker_args memory=…), or use less.",
            FailureCategory.OUT_OF_MEMORY,
        )
    if error := str(state.get("Error") or "").strip():
        failure = explain_start_failure(error)
        return ExitCause(code, None, failure.cause, failure.advice, failure.category)
    return explain_exit(code)
