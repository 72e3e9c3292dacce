"""The run request, and the table of run options that the command line, forms, blocks and signatures come from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from prefect_mlprojects._support.text import nearest
from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.types import EnvironmentManagerName

FLOW_NAME = "run_project"
"""The name of the flow that runs projects."""

# Labels of its flow runs.
RUN_ID_LABEL = "mlflow.run_id"
EXPERIMENT_ID_LABEL = "mlflow.experiment_id"
TRACKING_URI_LABEL = "mlflow.tracking_uri"
COMMIT_LABEL = "git.commit"
BRANCH_LABEL = "git.branch"
REPOSITORY_LABEL = "git.repository"
SOURCE_LABEL = "mlprojects.source"
ENVIRONMENT_LABEL = "mlprojects.environment"
SECRETS_LABEL = "mlprojects.secrets"  # the names of secret options that the flow's parameters lack
CATEGORY_LABEL = "mlprojects.failure.category"
CAUSE_LABEL = "mlprojects.failure.cause"
EXIT_CODE_LABEL = "mlprojects.exit_code"
METRIC_LABEL = "mlprojects.metric"
METRIC_VALUE_LABEL = "mlprojects.metric.value"

PROJECT_SCHEME = "block://"
"""``block://NAME`` as a project's URI names a project block."""

_F = TypeVar("_F", bound=Callable[..., Any])

Entrance: TypeAlias = Literal["run", "cli", "flow", "deploy", "form", "block", "plugin"]
"""Where a run option may be given: ``run()``, the command line, the flow, ``deploy()``, a deployment's form, a project block, or
the configuration of MLflow's backend plugin."""

_OptionKind: TypeAlias = Literal["text", "texts", "flag", "integer", "number", "mapping", "mapping or text"]
_KINDS: Mapping[str, _OptionKind] = {
    "str": "text",
    "str | None": "text",
    "bool": "flag",
    "int": "integer",
    "float | None": "number",
    "Mapping[str, Any] | None": "mapping",
    "Mapping[str, Any] | str | None": "mapping or text",
}
_JSON_TYPES: Mapping[_OptionKind, Mapping[str, Any]] = {
    "text": {"type": "string"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "flag": {"type": "boolean"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "mapping": {"type": "object"},
    "mapping or text": {"anyOf": [{"type": "object"}, {"type": "string"}]},
}
_EVERYWHERE: frozenset[Entrance] = frozenset(get_args(Entrance))
_NOT_IN_PLUGIN: frozenset[Entrance] = _EVERYWHERE - {"plugin"}
"""Of options that MLflow passes to its plugin, or decides, by itself."""
_OWN_FIELD: frozenset[Entrance] = _NOT_IN_PLUGIN - {"form", "block"}
"""Of options for which forms and project blocks have other fields."""


@dataclass(frozen=True)
class RunOption:
    """One run option, as every entrance shows it.

    Attributes:
        flags: Its names on the command line; empty for the command's argument.
        envvar: The variable that ``mlflow run`` reads it from.
        title: Its title in a form; empty for its name.
        mlflow_key: The key under which MLflow passes it to a backend plugin; empty if MLflow does not know it.
        values: Returns its closed set of values; None for an open one.
        bounds: Its limits, as in JSON schema.
        expected: Describes valid values in the message about one that is out of bounds.
        restricted: True if it can make the worker run other code, elsewhere, or report to another server. A deployment's form
            has it only if the deployment says so.
    """

    name: str
    kind: _OptionKind
    default: Any
    help: str
    entrances: frozenset[Entrance] = _NOT_IN_PLUGIN
    flags: tuple[str, ...] = ()
    metavar: str = ""
    envvar: str | None = None
    title: str = ""
    mlflow_key: str = ""
    values: Callable[[], tuple[str, ...]] | None = field(default=None, repr=False)
    bounds: Mapping[str, float] = field(default_factory=dict)
    expected: str = ""
    restricted: bool = False

    def json_schema(self, value: Any = None) -> dict[str, Any]:
        """Returns its field in a form, with `value` as the default."""
        title = self.title or self.name.replace("_", " ").capitalize()
        schema = {"title": title, **_JSON_TYPES[self.kind], **self.bounds}
        if self.values is not None:
            names = self.values()
            schema["enum"] = list(names if value is None or value in names else (*names, value))
        return {**schema, "description": self.help, **({} if value is None else {"default": value})}

    def problem(self, value: Any) -> Problem | None:
        """Returns the problem with a value that is out of bounds, else None."""
        if value is None or not self.bounds:
            return None
        above, least = self.bounds.get("exclusiveMinimum", -math.inf), self.bounds.get("minimum", -math.inf)
        if above < value < math.inf and value >= least:
            return None
        return Problem(f"{self.name} must be {self.expected}, not {value!r}", parameter=self.name)


def _option(help: str, *, default: Any = None, **attributes: Any) -> Any:  # noqa: A002 - the usual name in command line libraries
    return field(default=default, metadata={"help": help, **attributes})


def _backend_names() -> tuple[str, ...]:
    from prefect_mlprojects.backends.registry import available_backends

    return available_backends()


@dataclass(frozen=True)
class RunRequest:
    """The options of one run as plain JSON data without secrets; its fields are the table of run options.

    To add an option, add a field here, and an argument to ``run()``, ``deploy()`` and the flow ``run_project``, whose
    signatures are written out for their readers; a test compares them with this table.
    """

    uri: str = _option(
        "Project folder or URI, with an optional #sub/directory; block://NAME for a project block.",
        default=MISSING,
        entrances=_OWN_FIELD,
        flags=(),
    )
    entry_point: str = _option(
        "Entry point, or the name of a .py, .sh or .R file of the project.",
        default="main",
        entrances=_OWN_FIELD,
        flags=("-e", "--entry-point"),
        metavar="NAME",
    )
    version: str | None = _option(
        "Branch, tag or commit of a git project. Default: its default branch, or a folder as it is.",
        flags=("-v", "--version"),
        metavar="VERSION",
        restricted=True,
    )
    parameters: Mapping[str, Any] | None = _option(
        "Parameter values by name; undeclared ones are appended to the command as --NAME VALUE.",
        entrances=_OWN_FIELD,
        flags=("-P", "--param-list"),
        metavar="NAME=VALUE",
    )
    docker_args: Mapping[str, Any] | None = _option(
        "Arguments for the container, by their names in `docker run`.",
        title="Container arguments",
        flags=("-A", "--docker-args"),
        metavar="NAME[=VALUE]",
        mlflow_key="DOCKER_ARGS",
        restricted=True,
    )
    experiment_name: str | None = _option(
        "MLflow experiment by name; created if it does not exist.",
        title="MLflow experiment",
        metavar="NAME",
        envvar="MLFLOW_EXPERIMENT_NAME",
    )
    experiment_id: str | None = _option(
        "MLflow experiment by ID, instead of its name.",
        title="ID of the MLflow experiment",
        metavar="ID",
        envvar="MLFLOW_EXPERIMENT_ID",
    )
    backend: str = _option(
        "Backend that runs the command: local, kubernetes, databricks, or one of an installed package.",
        default="local",
        entrances=_EVERYWHERE,
        flags=("-b", "--backend"),
        metavar="NAME",
        values=_backend_names,
        restricted=True,
    )
    backend_config: Mapping[str, Any] | str | None = _option(
        "Configuration of the backend: a mapping, a .json or .yaml file, a JSON text, or block-type/block-name.",
        title="Backend configuration",
        entrances=_EVERYWHERE,
        flags=("-c", "--backend-config"),
        metavar="FILE",
        restricted=True,
    )
    storage_dir: str | None = _option(
        "Folder for downloads of remote 'path' parameters. Default: one that is deleted with the run.",
        title="Folder for downloads",
        metavar="DIR",
        envvar="MLFLOW_TMP_DIR",
        mlflow_key="STORAGE_DIR",
    )
    run_id: str | None = _option(
        "ID of an existing MLflow run to continue. Default: a new run.",
        title="MLflow run to continue",
        metavar="ID",
    )
    run_name: str | None = _option("Name of the MLflow run.", title="Name of the MLflow run", metavar="NAME")
    env_manager: str | None = _option(
        "Environment manager: local, virtualenv, uv or conda. Default: chosen by the project's files.",
        title="Environment manager",
        metavar="NAME",
        mlflow_key="ENV_MANAGER",
        values=lambda: get_args(EnvironmentManagerName),
    )
    build_image: bool = _option(
        "Build an image with the project's files for a Docker project.",
        title="Build an image",
        default=False,
        mlflow_key="build_image",
    )
    timeout: float | None = _option(
        "Time limit for the command, in seconds. Default: no limit.",
        entrances=_EVERYWHERE,
        metavar="SECONDS",
        bounds={"exclusiveMinimum": 0},
        expected="a positive number of seconds",
    )
    retries: int = _option(
        "How often a failed command is retried.",
        default=0,
        entrances=_EVERYWHERE,
        metavar="N",
        bounds={"minimum": 0},
        expected="0 or more",
    )
    git_credentials: str | None = _option(
        "Name of a git-credentials block. Default: the one for the repository's host, if any.",
        entrances=_EVERYWHERE,
        metavar="NAME",
    )
    tracking: str | None = _option(
        "Name of an mlflow-tracking-server block. Default: MLflow's own setting where the run executes.",
        title="Tracking server",
        metavar="NAME",
        restricted=True,
    )

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> RunRequest:
        """Returns the request in a function's arguments; ignores those that are not run options."""
        return cls(**{name: arguments[name] for name in OPTIONS if name in arguments})

    def with_options(self, options: Mapping[str, Any], entrance: Entrance) -> RunRequest:
        """Returns the request with other values of run options; None keeps a value. Raises `ParameterError`."""
        given = {name: value for name, value in options.items() if value is not None}
        if problems := unknown_options(given, entrance):
            raise ParameterError("The run options are not valid", problems)
        return replace(self, **given)

    def with_project(self, project: Mapping[str, Any]) -> RunRequest:
        """Returns the request with the fields of a project block as its defaults. Raises `ParameterError`."""
        named = replace(
            self,
            uri=str(project["uri"]),
            version=self.version or project.get("version"),
            entry_point=project.get("entry_point") or "main" if self.entry_point == "main" else self.entry_point,
            parameters={**(project.get("parameters") or {}), **(self.parameters or {})},
        )
        defaults = project.get("options") or {}
        given = {name for name, option in OPTIONS.items() if getattr(self, name) != option.default}
        return named.with_options({name: value for name, value in defaults.items() if name not in given}, "block")

    def options(self, entrance: Entrance) -> dict[str, Any]:
        """Returns an entrance's options that differ from their defaults."""
        values = {option.name: (getattr(self, option.name), option.default) for option in options_of(entrance)}
        return {name: value for name, (value, default) in values.items() if value != default and value not in ({}, "")}

    def flow_parameters(self) -> dict[str, Any]:
        """Returns the parameters for the flow ``run_project``."""
        return asdict(self)


def _table() -> dict[str, RunOption]:
    table = {}
    for each in fields(RunRequest):
        default = None if each.default is MISSING else each.default
        attributes = {"flags": (f"--{each.name.replace('_', '-')}",), **each.metadata}
        table[each.name] = RunOption(each.name, _KINDS[str(each.type)], default, **attributes)
    return table


OPTIONS: Mapping[str, RunOption] = _table()
"""The run options by name, in the order of ``run()``."""

CALL_OPTIONS: Mapping[str, RunOption] = {
    option.name: option
    for option in (
        RunOption(
            "synchronous",
            "flag",
            True,
            "Wait for the run to end. Otherwise it continues in this process, which waits for it at exit.",
            frozenset({"run"}),
            mlflow_key="SYNCHRONOUS",
        ),
        RunOption(
            "docker_auth",
            "mapping",
            None,
            "Credentials for the image registry; they stay in memory.",
            frozenset({"run"}),
            mlflow_key="docker_auth",
        ),
        RunOption(
            "tags",
            "texts",
            (),
            "Tag of the flow run and of the MLflow run: NAME or NAME=VALUE.",
            frozenset({"run", "cli", "deploy"}),
            ("--tag",),
            "TAG",
        ),
    )
}
"""Options of ``run()`` that are not in the request: they concern the caller's process only, or the flow run itself has them."""


def document_options(**others: str) -> Callable[[_F], _F]:
    """Appends the ``Args:`` section to a function's docstring: the help of run options, and of `others`."""

    def document(function: _F) -> _F:
        helps = {**{name: option.help for name, option in OPTIONS.items()}, **others}
        names = [name for name in inspect.signature(function).parameters if name in helps]
        lines = ["", "", "    Args:", *(f"        {name}: {helps[name]}" for name in names), "    "]
        function.__doc__ = (function.__doc__ or "").rstrip() + "\n".join(lines)
        return function

    return document


def options_of(entrance: Entrance) -> tuple[RunOption, ...]:
    """Returns an entrance's run options."""
    return tuple(option for option in OPTIONS.values() if entrance in option.entrances)


def unknown_options(names: Iterable[str], entrance: Entrance) -> list[Problem]:
    """Returns a problem for each name that is not an entrance's run option, with the nearest known one."""
    known = [option.name for option in options_of(entrance)]
    problems = []
    for name in names:
        if name not in known:
            near = nearest(name, known)
            fix = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            problems.append(Problem(f"unknown run option {name!r}", parameter=name, fix=fix))
    return problems


def secret_uri_problem(uri: str) -> Problem:
    """Returns the problem with a project URI that holds a secret, which would be stored on the Prefect server."""
    from prefect_mlprojects._support.redaction import redact_url, strip_user_info

    return Problem(
        f"the project's URI {redact_url(uri)!r} holds a password or token, which would be stored on the Prefect server",
        parameter="uri",
        fix=f"keep it in a git-credentials block for the host, and give the URI without it: {strip_user_info(uri)!r}",
    )


def holds_secret_url(value: Any) -> bool:
    """Returns whether JSON data contains a URL with a secret, at any depth."""
    if isinstance(value, str):
        from prefect_mlprojects._support.redaction import holds_secret

        return holds_secret(value)
    if isinstance(value, Mapping):
        return any(map(holds_secret_url, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_secret_url, value))


def holds_secret_value(value: Any, name: str = "") -> bool:
    """Returns whether JSON data contains a secret at any depth, by the names of its fields or by its texts."""
    from prefect_mlprojects._support.redaction import is_secret

    if isinstance(value, Mapping):
        return any(holds_secret_value(each, str(key)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return any(holds_secret_value(each) for each in value)
    return isinstance(value, str) and is_secret(name, value)
