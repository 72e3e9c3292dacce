"""Reads the ``docker_env`` section of MLproject files."""

from __future__ import annotations

from typing import Any

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import DockerEnvironment
from prefect_mlprojects.spec.yaml_lines import YamlDocument, kind_of

_KEYS = ("image", "volumes", "environment")
_VARIABLES_FIX = 'write [["NEW_VARIABLE", "value"], "COPIED_FROM_HOST"]'


def parse_docker_environment(
    value: Any, document: YamlDocument
) -> tuple[DockerEnvironment | None, list[Problem], list[Problem]]:
    """Reads what stands under ``docker_env``.

    Args:
        value: What stands there; not empty.
        document: The file, for line numbers.

    Returns:
        The environment as far as it could be understood, the problems, and warnings of unknown keys.
    """
    if not isinstance(value, dict):
        message = f"'docker_env' must be a mapping with an 'image', not {kind_of(value)}"
        return None, [document.problem(message, "docker_env", fix="write 'docker_env: {image: name:tag}'")], []
    problems: list[Problem] = []
    unknown = []
    for key in value:
        if key not in _KEYS:
            near = nearest(key, _KEYS)
            fix = f"did you mean {near!r}?" if near else f"the keys are {', '.join(_KEYS)}"
            message = f"unknown key {key!r} in 'docker_env'; it is ignored"
            unknown.append(document.problem(message, "docker_env", key, fix=fix))
    image = value.get("image")
    if not isinstance(image, str) or not image:
        message = "'docker_env' needs an 'image' that is text"
        problems.append(document.problem(message, "docker_env", "image", fix="write 'image: name:tag'"))
        image = ""
    volumes = value.get("volumes") or []
    if not isinstance(volumes, list) or not all(isinstance(each, str) for each in volumes):
        message = "'volumes' of 'docker_env' must be a list of texts"
        fix = 'write ["/host/path:/container/path"]'
        problems.append(document.problem(message, "docker_env", "volumes", fix=fix))
        volumes = []
    variables = _variables(value.get("environment") or [], document, problems)
    return DockerEnvironment(image, tuple(volumes), variables), problems, unknown


def _variables(entries: Any, document: YamlDocument, problems: list[Problem]) -> tuple[tuple[str, str | None], ...]:
    path = ("docker_env", "environment")
    if not isinstance(entries, list):
        message = f"'environment' of 'docker_env' must be a list, not {kind_of(entries)}"
        problems.append(document.problem(message, *path, fix=_VARIABLES_FIX))
        return ()
    variables: list[tuple[str, str | None]] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and entry:
            variables.append((entry, None))
        elif isinstance(entry, list) and len(entry) == 2 and not any(isinstance(each, dict | list) for each in entry):
            variables.append((str(entry[0]), str(entry[1])))
        else:
            message = "each of 'environment' must be a name or a pair of name and value"
            problems.append(document.problem(message, *path, str(index), fix=_VARIABLES_FIX))
    return tuple(variables)
