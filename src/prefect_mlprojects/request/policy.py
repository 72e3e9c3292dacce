"""A worker's policy: which projects and backends its runs may use, and what of the machine. See docs/deployments.md.

Whoever may make deployments chooses a run's options and its job variables, hence the environment of its process. So the policy
comes from a file in a fixed place, and from the environments of the process's ancestors: those of the worker.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_mlprojects._support.process.tree import ancestor_values
from prefect_mlprojects.backends.contract import Demands
from prefect_mlprojects.exceptions import InvalidInputError, ParameterError, Problem
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.settings import POLICY_VARIABLE

SYSTEM_FILE = Path("/etc/mlprojects/policy.yaml")


class Rules(BaseModel):
    """The content of a policy file; None does not restrict, an empty list allows nothing.

    Attributes:
        backends: Names of backends; ``docker`` is ``local`` in a container only.
        sources: Patterns of projects, as in ``PREFECT_MLPROJECTS_TRUSTED_SOURCES``.
        images: Patterns of images, as they are written.
        host_paths: Folders of the machine that containers may mount, and downloads may go to.
        privileged: Whether containers may get more rights than usual, and runs another Docker engine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    backends: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    images: tuple[str, ...] | None = None
    host_paths: tuple[str, ...] | None = Field(default=None, alias="host-paths")
    privileged: bool = False


@dataclass(frozen=True)
class Policy:
    """The rules of one file."""

    file: Path
    rules: Rules = field(default_factory=Rules)

    def check_backend(self, request: RunRequest) -> None:
        """Raises `ParameterError` if the backend, or the folder for downloads, is not allowed; before the project is fetched."""
        names = {request.backend} | ({"docker"} if request.backend == "local" else set())
        problems = []
        if self.rules.backends is not None and names.isdisjoint(self.rules.backends):
            problems.append(_refused("the backend", request.backend, self.rules.backends))
        if request.storage_dir is not None:
            problems += self._path_problems([request.storage_dir])
        self._raise(problems)

    def check_demands(self, backend: str, demands: Demands) -> None:
        """Raises `ParameterError` if what a run would use is not allowed; before anything is built or started."""
        rules, problems = self.rules, list[Problem]()
        if (
            rules.backends is not None
            and backend not in rules.backends
            and not (backend == "docker" and "local" in rules.backends)
        ):
            problems.append(_refused("the backend", backend, rules.backends))
        if demands.unknown:
            problems.append(Problem(f"the backend {backend!r} does not tell which images and paths it uses"))
        for image in demands.images:
            if rules.images is not None and not any(fnmatchcase(image, pattern) for pattern in rules.images):
                problems.append(_refused("the image", image, rules.images))
        problems += self._path_problems(demands.host_paths)
        if not rules.privileged:
            problems += [Problem(f"{each} needs 'privileged: true'") for each in demands.privileges]
        self._raise(problems)

    def _path_problems(self, paths: Iterable[str]) -> list[Problem]:
        allowed = self.rules.host_paths
        if allowed is None:
            return []
        # A link must not lead out of an allowed folder.
        folders = [Path(os.path.realpath(each)) for each in allowed]
        outside = [
            each for each in paths if not any(Path(os.path.realpath(each)).is_relative_to(one) for one in folders)
        ]
        return [_refused("the path", each, allowed) for each in outside]

    def _raise(self, problems: list[Problem]) -> None:
        if problems:
            raise ParameterError(f"The policy of this worker ({self.file}) does not allow the run", problems)


def _refused(what: str, value: str, allowed: Iterable[str]) -> Problem:
    return Problem(f"{what} {value!r}", fix=f"allowed: {', '.join(allowed) or 'none'}")


def find_policies(environ: Mapping[str, str] = os.environ) -> tuple[Policy, ...]:
    """Returns the policies of this process, each of which has to allow a run.

    Raises:
        InvalidInputError: A file can't be read, is malformed, or others may write to it.
    """
    named = dict.fromkeys([environ.get(POLICY_VARIABLE, ""), *ancestor_values(POLICY_VARIABLE)])
    system = [SYSTEM_FILE] if SYSTEM_FILE.exists() else []
    return tuple(read_policy(file) for file in [*system, *(Path(each) for each in named if each)])


def read_policy(file: Path) -> Policy:
    """Reads a policy file; raises `InvalidInputError`, since runs without the policy would be worse than none."""
    import yaml

    why = f"The policy file {file} can't be used"
    try:
        found = file.stat()
        if found.st_mode & (stat.S_IWOTH | stat.S_IWGRP) or found.st_uid not in (0, os.geteuid()):
            raise InvalidInputError(f"{why}: other users may write to it. Give it to root, with mode 644.")
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Policy(file, Rules.model_validate(content or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InvalidInputError(f"{why}: {problems}. Its keys are {', '.join(_keys())}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInputError(f"{why}: {getattr(error, 'strerror', None) or error}.") from None


def _keys() -> list[str]:
    return [each.alias or name for name, each in Rules.model_fields.items()]
