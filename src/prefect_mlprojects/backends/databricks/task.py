"""Builds a run's submission from its request and configuration. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.backends.databricks.config import NAME, DatabricksRequest
from prefect_mlprojects.backends.databricks.storage import Code, driver_path
from prefect_mlprojects.environments.python import VenvManagerName, pinned_python, read_contents
from prefect_mlprojects.environments.python.files import (
    digest_metadata,
    digest_package,
    digest_text,
    read_lock,
    uv_lock_of,
)
from prefect_mlprojects.environments.python.requirements import RequirementSet
from prefect_mlprojects.exceptions import BackendError, EnvironmentBuildError, InvalidEnvironmentError, Problem
from prefect_mlprojects.spec.project import NoEnvironment

TASK_KEY = "mlproject"
ENVIRONMENT_KEY = "default"
MAX_ARGUMENT_BYTES = 9_500  # The Jobs API takes 10,000 bytes of parameters as JSON.
_PASSED_ON = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "PREFECT_MLPROJECTS_FLOW_RUN_ID")
# A command without shell operators, variables and patterns.
_PLAIN = re.compile(r"""(?:[\w@%+=:,./ \t-]|'[^']*'|"[^"$`\\]*")+""")
_PROVIDERS: Mapping[str, str] = {
    "github.com": "gitHub",
    "gitlab.com": "gitLab",
    "bitbucket.org": "bitbucketCloud",
    "dev.azure.com": "azureDevOpsServices",
}


def remote_variables(variables: Mapping[str, str], tracking_uri: str) -> dict[str, str]:
    """Returns the command's variables on the driver; none is secret."""
    plain = {name: variables[name] for name in _PASSED_ON if name in variables}
    inside = tracking_uri.partition(":")[0]
    plain["MLFLOW_TRACKING_URI"] = inside if inside.startswith("databricks") else strip_user_info(tracking_uri)
    return plain


@dataclass(frozen=True)
class SparkJob:
    """A ``databricks_spark_job``: a Python file that runs in the driver's own Python, with its Spark session."""

    file: str
    parameters: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


def spark_job(request: DatabricksRequest, command: str) -> SparkJob | None:
    """Returns the project's Spark job by MLflow's rules; None if it has none."""
    job = request.project.databricks_spark_job
    if job is None:
        return None
    libraries = tuple(str(each) for each in job.get("python_libraries") or ())
    if job.get("python_file") is not None:
        return SparkJob(str(job["python_file"]), tuple(str(each) for each in job.get("parameters") or ()), libraries)
    words = shlex.split(command)
    if len(words) < 2 or words[0] != "python":
        raise BackendError(
            "Databricks spark job only supports 'python' command in the entry point configuration.", backend=NAME
        )
    return SparkJob(words[1], tuple(words[2:]), libraries)


def job_argument(request: DatabricksRequest, command: str, code: Code, variables: Mapping[str, str]) -> str:
    """Returns the bootstrap's argument as JSON."""
    environment, spark = driver_environment(request), spark_job(request, command)
    job: dict[str, Any] = {
        "archive": driver_path(code.archive),
        "sha256": code.sha256,
        "variables": dict(variables),
        "secrets": request.config.secrets,
        "output": driver_path(code.output) if code.output else None,
    }
    if spark is not None:
        job["spark_job"] = {"file": spark.file, "parameters": list(spark.parameters)}
    else:
        job["command"] = command
    if environment is not None:
        job["environment"] = dict(environment.job)
    text = json.dumps(job, sort_keys=True)
    if len(text.encode()) > MAX_ARGUMENT_BYTES:
        raise BackendError(
            f"The command and its variables have {len(text.encode())} bytes; Databricks accepts {MAX_ARGUMENT_BYTES}. Put long "
            "values into a file of the project.",
            backend=NAME,
        )
    return text


def submission(
    request: DatabricksRequest, command: str, code: Code, variables: Mapping[str, str], token: str
) -> dict[str, Any]:
    """Returns the body of ``POST /api/2.2/jobs/runs/submit``."""
    config, task = request.config, dict[str, Any](task_key=TASK_KEY)
    body: dict[str, Any] = {
        "run_name": config.run_name or f"MLflow Run for {request.working_copy.source_name}",
        "idempotency_token": token,
        "tasks": [task],
    }
    if config.git_source:
        body["git_source"], task["spark_python_task"] = _git_task(request, command)
    else:
        argument = job_argument(request, command, code, variables)
        task["spark_python_task"] = {"python_file": code.bootstrap, "parameters": [argument]}
    spark = spark_job(request, command)
    libraries = [*config.libraries, *({"pypi": {"package": each}} for each in (spark.libraries if spark else ()))]
    if config.compute == "new":
        cluster = dict(config.new_cluster or {})
        if config.git_source:
            cluster["spark_env_vars"] = {
                **cluster.get("spark_env_vars", {}),
                **variables,
                **{name: f"{{{{secrets/{place}}}}}" for name, place in config.secrets.items()},
            }
        task["new_cluster"] = cluster
    elif config.compute == "existing":
        task["existing_cluster_id"] = config.existing_cluster_id
    else:
        environment = dict(config.environment or {})
        if libraries:
            environment["dependencies"] = [
                *environment.get("dependencies", []),
                *(each["pypi"]["package"] for each in libraries),
            ]
            libraries = []
        task["environment_key"] = ENVIRONMENT_KEY
        body["environments"] = [{"environment_key": ENVIRONMENT_KEY, "spec": environment}]
    task |= {"libraries": libraries} if libraries else {}
    body |= {"timeout_seconds": config.timeout} if config.timeout else {}
    return body | ({"access_control_list": config.access_control} if config.access_control else {})


def _git_task(request: DatabricksRequest, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    copy, spark = request.working_copy, spark_job(request, command)
    words = shlex.split(command) if spark is None else ["python", spark.file, *spark.parameters]
    provider = _PROVIDERS.get(urlsplit(copy.repository_url or "").hostname or "")
    if not copy.commit or not copy.repository_url or copy.dirty:
        problem = "the project must be a commit of a git repository, without uncommitted changes"
    elif provider is None:
        problem = f"Databricks knows no git provider for {strip_user_info(copy.repository_url)}"
    elif len(words) < 2 or words[0] not in ("python", "python3") or _PLAIN.fullmatch(command) is None:
        problem = "the entry point must be one plain command 'python FILE …'"
    elif driver_environment(request) is not None:
        problem = "the project has an environment of its own; name it under libraries and give env_manager='local'"
    else:
        url = strip_user_info(copy.repository_url)
        source = {"git_url": url, "git_provider": provider, "git_commit": copy.commit}
        subfolder = copy.uri.partition("#")[2].strip("/")
        file = f"{subfolder}/{words[1]}" if subfolder else words[1]
        return source, {"python_file": file, "parameters": words[2:], "source": "GIT"}
    raise BackendError(
        f"git-source can't be used: {problem}. Leave it out, so that the code is uploaded.", backend=NAME
    )


BUILD_FILE = ".mlprojects-build.txt"
REQUIREMENTS_FILE = ".mlprojects-requirements.txt"


@dataclass(frozen=True)
class DriverEnvironment:
    """An environment to build on the driver: the bootstrap's instructions, and further files of the archive, by name."""

    description: str
    job: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def driver_environment(request: DatabricksRequest) -> DriverEnvironment | None:
    """Returns the environment to build on the driver; None for the driver's own Python.

    The latter is used without an environment file, for a Spark job, and with ``env_manager`` ``local``.
    """
    project = request.project
    if request.env_manager == "local" or project.databricks_spark_job is not None:
        return None
    if request.env_manager == "conda":
        raise InvalidEnvironmentError(
            f"Project '{project.display_name}' can't be run with --env-manager conda on Databricks: its drivers have no conda. "
            "Leave it out, so that uv installs the pip section of the conda.yaml, or use --env-manager local.",
            manager="conda",
        )
    manager: VenvManagerName = "virtualenv" if request.env_manager == "virtualenv" else "uv"
    if isinstance(project.environment, NoEnvironment):
        lock = uv_lock_of(project)
        return _locked(request, lock) if lock is not None and manager == "uv" else None
    contents = read_contents(project, manager)
    if isinstance(contents, tuple):
        raise _problems(request, contents)
    build, run, python = contents.build, contents.run, contents.python_range or contents.python
    files = {**_files(request, BUILD_FILE, build), **_files(request, REQUIREMENTS_FILE, run)}
    editable = any(package.editable for package in (*build.local_packages, *run.local_packages))
    texts = ["python", python or "", "build", *build.key_inputs, "run", *run.key_inputs]
    job = {
        "installer": "uv" if manager == "uv" else "pip",
        "python": python,
        # An editable package refers to the unpacked project, which is removed with the run: not cacheable.
        "key": None if editable else digest_text(texts),
        "files": [name for name in (BUILD_FILE, REQUIREMENTS_FILE) if name in files],
        "variables": _variables(build.variables | run.variables),
    }
    count, name = build.count + run.count, contents.source.name if contents.source is not None else "no file"
    interpreter = f"Python {python}" if python else "the driver's Python"
    description = f"{interpreter}, {count} requirement{'' if count == 1 else 's'} ({name}), built on the driver"
    return DriverEnvironment(description, job, files, contents.warnings)


_PIP_VARIABLES = {
    "UV_PRERELEASE": "PIP_PRE",
    "UV_REQUIRE_HASHES": "PIP_REQUIRE_HASHES",
    "UV_INSECURE_HOST": "PIP_TRUSTED_HOST",
}


def _variables(options: Mapping[str, str]) -> dict[str, str]:
    """Returns the options of requirements files as variables of uv, and of pip, which installs where uv can't be had."""
    pip = {
        _PIP_VARIABLES[name]: {"allow": "1"}.get(value, value)
        for name, value in options.items()
        if name in _PIP_VARIABLES
    }
    return {**options, **pip}


def _files(request: DatabricksRequest, name: str, requirements: RequirementSet) -> dict[str, bytes]:
    """Returns the requirements and constraints files for the archive; what they name must be in the project."""
    if not requirements.key_inputs:
        return {}
    for package in requirements.local_packages:
        _inside(request, package.directory)
    constraints = f"{name}.constraints"
    text = requirements.file_text([str(_inside(request, link)) for link in requirements.links], constraints)
    return {name: text.encode(), constraints: "".join(f"{line}\n" for line in requirements.constraints).encode()}


def _inside(request: DatabricksRequest, path: Path) -> Path:
    folder = request.project.directory
    if not path.is_relative_to(folder):
        raise InvalidEnvironmentError(
            f"The environment of project '{request.project.display_name}' names {path}, which is not in the project's folder and "
            "so does not get to Databricks. Put it into the project.",
            manager="uv",
        )
    return path.relative_to(folder)


def _locked(request: DatabricksRequest, lock: Path) -> DriverEnvironment:
    found = read_lock(lock)
    if isinstance(found, Problem):
        raise _problems(request, (found,))
    requires, packages = found
    folder = request.project.directory
    facts = ["lock", lock.read_bytes().decode("utf-8", "surrogateescape"), digest_metadata(folder)]
    for package in packages:
        _inside(request, package.path)
        if package.installed:
            facts += [package.name, digest_package(package.path)]
    python = pinned_python(request.project) or requires
    return DriverEnvironment(
        f"Python {python}, locked by {lock.name}, built on the driver",
        {"installer": "uv", "python": python, "key": digest_text([*facts, python or ""]), "locked": True},
    )


def _problems(request: DatabricksRequest, problems: tuple[Problem, ...]) -> EnvironmentBuildError:
    details = "; ".join(str(each) for each in problems)
    return EnvironmentBuildError(
        f"The environment of project '{request.project.display_name}' can't be built: {details}", manager="uv"
    )
