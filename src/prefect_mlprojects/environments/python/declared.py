"""Reads the environment of ``python_env``: a python_env.yaml, a requirements file, or a pyproject.toml, Poetry's included.

A pyproject.toml lists dependencies as https://packaging.python.org/en/latest/specifications/pyproject-toml/ or
https://python-poetry.org/docs/pyproject/ say. A project that can be built as a package is installed as well, as uv and Poetry do.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_mlprojects.environments.python import interpreters
from prefect_mlprojects.environments.python.files import (
    PythonSpec,
    RequirementEntry,
    is_python_request,
    read_python_env,
    read_text,
    read_toml,
)
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import Project

_MAX_MESSAGE = 300  # characters of a library's message


def read_declared(file: Path, project: Project) -> PythonSpec | tuple[Problem, ...]:
    """Reads the file that ``python_env`` names; its suffix tells its format."""
    # MLflow resolves the names in an environment file from the project's folder.
    place = os.path.relpath(file, project.directory)
    if file.suffix == ".txt":
        return PythonSpec(file, dependencies=(RequirementEntry(f"-r {shlex.quote(place)}"),))
    if file.suffix == ".toml":
        text, content = read_text(file), read_toml(file)
        if isinstance(text, Problem):
            return (text,)
        if isinstance(content, Problem):
            return (content,)
        return _Pyproject(file, os.path.dirname(place), text, content).parse()  # noqa: PTH120 - of a relative path
    return read_python_env(file)


def usable_range(requested: str | None) -> str | None:
    """Returns a range of Python versions, or None if the running Python is in it and so can be used."""
    allowed = requested is None or interpreters.interpreter_allowed(
        requested, interpreters.current_interpreter().version
    )
    return None if allowed else requested


@dataclass
class _Pyproject:
    """A pyproject.toml while it is read; `folder` is its folder, relative to the project's."""

    file: Path
    folder: str
    text: str
    content: Mapping[str, Any]
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def parse(self) -> PythonSpec | tuple[Problem, ...]:
        metadata, poetry = self._table("project"), self._table("tool", "poetry")
        if metadata is None and poetry is None and not self.problems:
            fix = "list them in [project], or name another file"
            self._problem("it lists no dependencies: it has neither [project] nor [tool.poetry]", fix=fix)
        if self._table("tool", "uv", "sources"):
            self._problem("[tool.uv.sources] is used with a uv.lock only", "sources", "run `uv lock` beside it")
        if (self.file.parent / "poetry.lock").is_file():
            self.warnings.append(f"poetry.lock is not read; the versions are those that {self.file.name} allows")
        entries: list[RequirementEntry] = []
        python: str | None = None
        if not self.problems:
            python = self._python(metadata or {}, poetry)
            entries = [*self._package()] if self._is_package() else [*self._listed(metadata, poetry)]
        if self.problems:
            return tuple(self.problems)
        line = self._line("requires-python") or self._line("python")
        requested = usable_range(python)
        return PythonSpec(self.file, requested, None, line, (), tuple(entries), tuple(self.warnings))

    def _is_package(self) -> bool:
        settings = (
            (self._table("tool", "uv") or {}).get("package"),
            (self._table("tool", "poetry") or {}).get("package-mode"),
        )
        return self._table("build-system") is not None and False not in settings

    def _package(self) -> Iterator[RequirementEntry]:
        # Its build backend tells its dependencies, dynamic ones and Poetry's as well.
        yield RequirementEntry(f"-e ./{shlex.quote(self.folder) if self.folder else ''}", self._line("[build-system]"))

    def _listed(
        self, metadata: Mapping[str, Any] | None, poetry: Mapping[str, Any] | None
    ) -> Iterator[RequirementEntry]:
        if metadata is None or (poetry is not None and "dependencies" in poetry):
            yield from self._poetry_requirements()
            return
        if "dependencies" in (metadata.get("dynamic") or ()):
            fix = "list them in 'dependencies', or add a [build-system]"
            self._problem(
                "its dependencies are dynamic, but it has no [build-system] that could tell them", "dynamic", fix
            )
        listed = metadata.get("dependencies", [])
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            self._problem("'dependencies' must be a list of texts, such as 'scikit-learn>=1.5'", "dependencies")
            return
        for each in listed:
            yield RequirementEntry(
                each, self._line(f'"{each}"') or self._line(f"'{each}'") or self._line("dependencies")
            )

    def _python(self, metadata: Mapping[str, Any], poetry: Mapping[str, Any] | None) -> str | None:
        requires = metadata.get("requires-python")
        if requires is None and poetry and "python" in (self._table("tool", "poetry", "dependencies") or {}):
            return str(package.python_constraint).replace(" ", "") if (package := self._poetry()) else None
        if requires is None:
            return None
        if not isinstance(requires, str) or not is_python_request(requires.strip()):
            message = f"requires-python: {requires!r} is not a range of versions"
            self._problem(message, "requires-python", "write requires-python = '>=3.11', for example")
            return None
        return requires.replace(" ", "")

    def _poetry(self) -> Any:
        """Returns Poetry's package, or None with a problem."""
        from poetry.core.factory import Factory

        try:
            # It reads this file, and for dependencies that are folders whether they exist; it runs nothing.
            return Factory().create_poetry(self.file.parent, with_groups=False).package
        except Exception as error:  # noqa: BLE001 - it raises what its parsers raise
            message = " ".join(str(error).split())[:_MAX_MESSAGE]
            self._problem(f"Poetry can't read it: {message or type(error).__name__}", "[tool.poetry")
            return None

    def _poetry_requirements(self) -> Iterator[RequirementEntry]:
        package = self._poetry()
        for dependency in package.requires if package else ():
            if dependency.is_optional() and not dependency.is_activated():
                continue
            line = self._line(f"{dependency.pretty_name} =") or self._line(f'"{dependency.pretty_name}')
            source = getattr(dependency, "source_name", None)
            if source:
                message = f"'{dependency.pretty_name}' comes from the source {source!r}, which only Poetry knows"
                self._problem(message, dependency.pretty_name, "name its index in a requirements file (--index-url)")
            yield RequirementEntry(dependency.to_pep_508(), line)

    def _table(self, *path: str) -> Mapping[str, Any] | None:
        value: Any = self.content
        for key in path:
            value = value.get(key)
            if value is None:
                return None
            if not isinstance(value, dict):
                problem = Problem(f"'{'.'.join(path)}' must be a table", self.file, self._line(key))
                self.problems += [problem] if problem not in self.problems else []
                return None
        return value if isinstance(value, dict) else None

    def _problem(self, message: str, near: str = "", fix: str | None = None) -> None:
        self.problems.append(Problem(message, self.file, self._line(near) if near else None, fix))

    def _line(self, near: str) -> int | None:
        """The first line that holds a text outside of comments; tomllib tells no lines."""
        lines = enumerate(self.text.splitlines(), start=1)
        return next((number for number, line in lines if near in line.partition(" #")[0]), None)
