"""Checks a deployment against its project before Prefect is asked for anything."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.redaction import holds_secret
from prefect_mlprojects.deployments.form import parse_form_options
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.request import (
    PROJECT_SCHEME,
    RunRequest,
    holds_secret_url,
    holds_secret_value,
    options_of,
    secret_uri_problem,
    unknown_options,
)
from prefect_mlprojects.request.secrets import refuse_secret_parameters, storable_request
from prefect_mlprojects.request.tags import checked_tags
from prefect_mlprojects.runs.start import make_request
from prefect_mlprojects.server.api import call_api
from prefect_mlprojects.sources import Source, WorkingCopy, absolute_uri, detect_source
from prefect_mlprojects.sources.git import GitCredentials, GitCredentialsLookup, GitUrl
from prefect_mlprojects.spec import EntryPoint, check_parameters, find_entry_point, load_project
from prefect_mlprojects.spec.parameters import in_project, is_relative_default
from prefect_mlprojects.spec.schema import form_value, parameters_schema
from prefect_mlprojects.spec.secrets import is_reference
from prefect_mlprojects.types import StopSignal


@dataclass(frozen=True)
class Schedule:
    """When a deployment's runs start; exactly one of the first three is set, and the time zone None is UTC."""

    cron: str | None = None
    interval: timedelta | None = None
    rrule: str | None = None
    timezone: str | None = None

    def __str__(self) -> str:
        zone = f" ({self.timezone})" if self.timezone else ""
        if self.cron:
            return f"cron {self.cron}{zone}"
        return f"every {self.interval}{zone}" if self.interval else f"rrule {self.rrule}{zone}"


@dataclass(frozen=True)
class DeploymentSpecification:
    """A deployment that was checked against its project.

    Attributes:
        uri: The project's URI, valid on every machine that can reach it: local paths are absolute.
        parameters: Values of declared parameters, with JSON's types.
        extra_parameters: Values of undeclared parameters.
        options: Run options by name.
        schema: The JSON schema of the flow's parameters: the form, with every run option.
        form_options: The run options that the form shall have; None: those that it has, else the default ones.
        description: Markdown for Prefect's UI.
        version: The project's commit at the time of deployment.
        no_schedule: Whether the schedule of an existing deployment is removed.
        job_variables: Overrides for the work pool's base job template.
    """

    name: str
    uri: str
    entry_point: str
    parameters: Mapping[str, Any]
    extra_parameters: Mapping[str, Any]
    options: Mapping[str, Any]
    schema: Mapping[str, Any] = field(repr=False)
    description: str
    version: str | None
    tags: tuple[str, ...] = ()
    schedule: Schedule | None = None
    paused: bool = False
    no_schedule: bool = False
    concurrency_limit: int | None = None
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    form_options: tuple[str, ...] | None = None

    def flow_parameters(self) -> dict[str, Any]:
        """Returns the flow parameters of a run that is started without others."""
        return {
            "uri": self.uri,
            "entry_point": self.entry_point,
            "parameters": dict(self.parameters),
            "extra_parameters": dict(self.extra_parameters),
            **self.options,
        }


class _Blocks:
    """Reads blocks; the server is found, or started, when the first one is needed."""

    def __init__(self, announce: Callable[[str], None] | None) -> None:
        self._announce = announce

    @cached_property
    def _api_url(self) -> str:
        from prefect_mlprojects.server.process import resolve_api

        return resolve_api(self._announce).api_url

    def project(self, uri: str) -> dict[str, Any]:
        from prefect_mlprojects.blocks.resolution import read_project

        return call_api(self._api_url, read_project, uri)

    def git_credentials(self, name: str | None) -> GitCredentialsLookup:
        """Returns a look-up for fetching a git project: the named block, or one by the repository's host."""

        def lookup(url: GitUrl) -> GitCredentials | None:
            from prefect_mlprojects.blocks.resolution import find_git_credentials

            return call_api(self._api_url, find_git_credentials, url, name)

        return lookup


def refused(message: str, parameter: str | None = None, fix: str | None = None) -> ParameterError:
    """Returns the error of a deployment that can't be created."""
    return ParameterError("The deployment can't be created", [Problem(message, parameter=parameter, fix=fix)])


def specify(
    uri: str | Path,
    entry_point: str = "main",
    name: str | None = None,
    *,
    pin: bool = False,
    schedule: Schedule | None = None,
    tags: Sequence[str] = (),
    concurrency_limit: int | None = None,
    paused: bool = False,
    no_schedule: bool = False,
    job_variables: Mapping[str, Any] | None = None,
    form_options: Sequence[str] | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> DeploymentSpecification:
    """Fetches the project and returns a deployment that fits it; arguments and errors are those of ``deploy()``."""
    if problems := unknown_options(options, "deploy"):
        raise ParameterError("The deployment can't be created", problems)
    chosen_form = parse_form_options(form_options) if form_options is not None else None
    request = _storable_request({**options, "uri": uri, "entry_point": entry_point}, job_variables or {})
    blocks = _Blocks(announce)
    # The version of a project block is not copied: runs follow the block.
    followed, version = request, request.version
    if request.uri.startswith(PROJECT_SCHEME):
        followed = request.with_project(blocks.project(request.uri))
        _refuse_secret_uri(followed.uri)
    source = detect_source(
        followed.uri, followed.version, git_credentials=blocks.git_credentials(followed.git_credentials)
    )
    copy = source.fetch(StopSignal(), lambda _: None)
    try:
        project = load_project(copy.directory, root=copy.root)
        found = find_entry_point(project, followed.entry_point, copy.uri)
        fitting = _fitting_values(
            found, followed.parameters or {}, copy.directory, complete=schedule is not None and not paused
        )
    finally:
        source.remove(copy)
    version = _followed_version(copy, version, pin=pin)
    chosen = {**followed.options("form"), "backend": followed.backend, "version": version}
    run_options = {key: value for key, value in chosen.items() if value is not None}
    declared = {key: value for key, value in fitting.items() if key in found.parameters}
    extra = {key: value for key, value in fitting.items() if key not in found.parameters}
    deployed_uri = request.uri if request.uri.startswith(PROJECT_SCHEME) else _portable_uri(source, copy)
    return DeploymentSpecification(
        name=_checked_name(name or _default_name(project.display_name, found.name)),
        uri=deployed_uri,
        entry_point=found.name,
        parameters=declared,
        extra_parameters=extra,
        options=run_options,
        schema=deployment_schema(deployed_uri, found, fitting, run_options),
        description=_description(project.display_name, found, deployed_uri, copy, version),
        version=copy.commit,
        tags=checked_tags(tags),
        schedule=schedule,
        paused=paused,
        no_schedule=no_schedule,
        concurrency_limit=concurrency_limit,
        job_variables=dict(job_variables or {}),
        form_options=chosen_form,
    )


def _storable_request(arguments: Mapping[str, Any], job_variables: Mapping[str, Any]) -> RunRequest:
    """Returns the run request of a deployment; refuses secrets, which would be stored on the Prefect server."""
    _refuse_secret_uri(str(arguments["uri"]))
    problems = [
        Problem(
            f"the job variable {name!r} holds a password or token, which would be stored on the Prefect server",
            fix='keep it in a Secret block of Prefect and write "{{ prefect.blocks.secret.NAME }}"',
        )
        for name, value in job_variables.items()
        if (holds_secret_value if name == "env" else holds_secret_url)(value)
    ]
    if problems:
        raise ParameterError("The deployment can't be created", problems)
    return storable_request("The deployment can't be created", *make_request(arguments))


def _refuse_secret_uri(uri: str) -> None:
    if holds_secret(uri):
        raise ParameterError("The deployment can't be created", [secret_uri_problem(uri)])


def _fitting_values(
    entry_point: EntryPoint, given: Mapping[str, Any], project: Path, *, complete: bool
) -> dict[str, Any]:
    """Returns the given values with their types; unless `complete`, required ones may be left to the form."""
    outside = [
        Problem(
            f"the default {parameter.default!r} of the path parameter '{parameter.name}' is not in the project, and a run on a "
            "worker has another working directory",
            parameter=parameter.name,
            fix="put it into the project, or give a URI or an absolute path",
        )
        for parameter in entry_point.parameters.values()
        if given.get(parameter.name) is None and is_relative_default(parameter) and not in_project(project, parameter)
    ]
    if outside:
        raise ParameterError("The deployment can't be created", outside)
    if not complete:
        present = {
            name: parameter
            for name, parameter in entry_point.parameters.items()
            if not parameter.required or given.get(name) is not None
        }
        command = entry_point.command if len(present) == len(entry_point.parameters) else "true"
        entry_point = dataclasses.replace(entry_point, parameters=present, command=command)
    literal = [
        name
        for name, parameter in entry_point.parameters.items()
        if parameter.secret and given.get(name) is not None and not is_reference(str(given[name]))
    ]
    refuse_secret_parameters("The deployment can't be created", literal, declared=True)
    checked = check_parameters(entry_point, given, project)
    texts = {**checked.declared, **checked.downloads, **checked.extra}
    values: dict[str, Any] = {}
    for name in given:
        if name not in texts:
            continue
        parameter = entry_point.parameters.get(name)
        if parameter is None:
            values[name] = texts[name]
        elif (
            str(given[name]) == parameter.default and is_relative_default(parameter) and in_project(project, parameter)
        ):
            # The folder that the project was fetched to is not that of the runs.
            values[name] = parameter.default
        else:
            values[name] = form_value(parameter, texts[name])
    return values


def _followed_version(copy: WorkingCopy, version: str | None, *, pin: bool) -> str | None:
    if pin and copy.kind != "git":
        raise refused("only a version of a git project can be pinned", fix="omit pin, or give a git URI or a version")
    return copy.commit if pin else version


def _portable_uri(source: Source, copy: WorkingCopy) -> str:
    # A worker has another working directory: a relative path would mean another folder there.
    return str(copy.directory) if copy.kind == "local" else absolute_uri(source.uri)


def _default_name(project: str, entry_point: str) -> str:
    name = project if entry_point == "main" else f"{project}-{entry_point}"
    return re.sub(r"[/%&<>]+", "-", name).strip("-") or "project"


def _checked_name(name: str) -> str:
    # prefect.types: names may hold anything but these.
    if re.search(r"[/%&<>]", name):
        raise refused(f"the name {name!r} contains one of / % & < >", "name", "choose another name")
    return name


def _description(project: str, entry_point: EntryPoint, uri: str, copy: WorkingCopy, version: str | None) -> str:
    followed = (
        f"version `{version}`" if version else ("its default branch" if copy.kind == "git" else "the folder as it is")
    )
    return (
        f"Runs the entry point `{entry_point.name}` of the MLflow project **{project}** from `{uri}`, {followed}.\n\n"
        f"```\n{entry_point.command.strip()}\n```\n"
    )


def deployment_schema(
    uri: str,
    entry_point: EntryPoint,
    values: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON schema of the flow's parameters for one entry point: Prefect's UI shows it, its server enforces it.

    The deployment's parameter `values` and run `options` are the form's defaults, in place of the project's.
    """
    values, options = values or {}, options or {}
    fields: dict[str, dict[str, Any]] = {
        "parameters": {"title": f"Parameters of {entry_point.name}", **parameters_schema(entry_point, values)},
        "extra_parameters": {
            "title": "Extra parameters",
            "description": "Further parameters by name, appended to the command as --name value.",
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "integer", "boolean"]},
            "default": {name: value for name, value in values.items() if name not in entry_point.parameters},
        },
        **{option.name: option.json_schema(options.get(option.name)) for option in options_of("form")},
        "uri": {"title": "Project", "type": "string", "enum": [uri], "default": uri},
        "entry_point": {
            "title": "Entry point",
            "type": "string",
            "enum": [entry_point.name],
            "default": entry_point.name,
        },
    }
    needs_values = any(each.required for each in entry_point.parameters.values())
    return {
        "title": "Parameters",
        "type": "object",
        "properties": {name: {"position": position, **field} for position, (name, field) in enumerate(fields.items())},
        "required": ["uri", *(["parameters"] if needs_values else [])],
        "definitions": {},
    }
