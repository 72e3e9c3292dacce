"""Builds a run's submission from its request and configuration. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.backends.databricks import failure
from prefect_mlprojects.backends.databricks.config import DatabricksRequest
from prefect_mlprojects.backends.databricks.storage import Upload, driver_path
from prefect_mlprojects.environments.python import VenvManagerName, files, pinned_python, read_contents
from prefect_mlprojects.environments.python.requirements import RequirementSet
from prefect_mlprojects.exceptions import EnvironmentBuildError, InvalidEnvironmentError, Problem
from prefect_mlprojects.spec.project import NoEnvironment
from prefect_mlprojects.spec.secrets import databricks_place

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


def secret_places(request: DatabricksRequest) -> dict[str, str]:
    """Returns ``scope/key`` by variable, of the configuration and of secret parameters.

    Raises:
        BackendError: The submitted task would show the value of a secret parameter.
    """
    parameters = request.parameters
    places = {name: databricks_place(reveal(value)) for name, value in parameters.secrets.items()}
    if hidden := [name for name, place in places.items() if place is None]:
        raise failure(
            f"The parameter '{hidden[0]}' is secret, and whoever may see the task would see its value. Put it into a "
            f"Databricks secret and give {hidden[0]}={{{{secrets/SCOPE/KEY}}}}."
        )
    if places and (request.project.databricks_spark_job is not None or request.config.git_source):
        raise failure(
            f"The secret parameter '{next(iter(places))}' can't be passed to a Spark job or with git-source, which run no shell. "
            "Let the project's code read the secret with dbutils."
        )
    return {**request.config.secrets, **{parameters.variables[name]: str(place) for name, place in places.items()}}


def spark_arguments(request: DatabricksRequest, command: str) -> list[str]:
    """Returns the file and the parameters of the project's Spark job by MLflow's rules; empty if it has none."""
    job = request.project.databricks_spark_job
    if job is None:
        return []
    if job.get("python_file") is not None:
        return [str(each) for each in (job["python_file"], *(job.get("parameters") or ()))]
    words = shlex.split(command)
    if len(words) < 2 or words[0] != "python":
        raise failure("Databricks spark job only supports 'python' command in the entry point configuration.")
    return words[1:]


def _job_argument(request: DatabricksRequest, command: str, code: Upload, variables: Any, token: str) -> str:
    """Returns the bootstrap's argument as JSON."""
    environment, spark = driver_environment(request).job, spark_arguments(request, command)
    job = {
        "archive": driver_path(code.archive),
        "sha256": code.sha256,
        "variables": variables,
        "secrets": secret_places(request),
        "output": driver_path(code.output(token)) if request.config.live_output else None,
        **({"spark_job": {"file": spark[0], "parameters": spark[1:]}} if spark else {"command": command}),
        **({"environment": environment} if environment else {}),
    }
    text = json.dumps(job, sort_keys=True)
    if len(text.encode()) > MAX_ARGUMENT_BYTES:
        raise failure(
            f"The command and its variables have {len(text.encode())} bytes; Databricks accepts {MAX_ARGUMENT_BYTES}. Put long "
            "values into a file of the project."
        )
    return text


def submission(
    request: DatabricksRequest, command: str, code: Upload, child_env: Mapping[str, str], token: str
) -> dict[str, Any]:
    """Returns the body of ``POST /api/2.2/jobs/runs/submit``."""
    config, task = request.config, dict[str, Any](task_key="mlproject")
    variables = remote_variables(child_env, reveal(request.tracking_uri))
    body: dict[str, Any] = {
        "run_name": config.run_name or f"MLflow Run for {request.working_copy.source_name}",
        "idempotency_token": token,
        "tasks": [task],
    }
    if config.git_source:
        body["git_source"], task["spark_python_task"] = _git_task(request, command)
    else:
        argument = _job_argument(request, command, code, variables, token)
        task["spark_python_task"] = {"python_file": code.bootstrap, "parameters": [argument]}
    packages = (request.project.databricks_spark_job or {}).get("python_libraries") or ()
    libraries = [*config.libraries, *({"pypi": {"package": str(each)}} for each in packages)]
    if config.compute == "new":
        cluster = dict(config.new_cluster or {})
        if config.git_source:
            references = {name: f"{{{{secrets/{key}}}}}" for name, key in config.secrets.items()}
            cluster["spark_env_vars"] = {**cluster.get("spark_env_vars", {}), **variables, **references}
        task["new_cluster"] = cluster
    elif config.compute == "existing":
        task["existing_cluster_id"] = config.existing_cluster_id
    else:
        environment = dict(config.environment or {})
        if packages:
            environment["dependencies"] = [*environment.get("dependencies", []), *map(str, packages)]
            libraries = []
        task["environment_key"] = ENVIRONMENT_KEY
        body["environments"] = [{"environment_key": ENVIRONMENT_KEY, "spec": environment}]
    task |= {"libraries": libraries} if libraries else {}
    body |= {"timeout_seconds": config.timeout} if config.timeout else {}
    return body | ({"access_control_list": config.access_control} if config.access_control else {})


def _git_task(request: DatabricksRequest, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    copy, spark = request.working_copy, spark_arguments(request, command)
    words = ["python", *spark] if spark else shlex.split(command)
    provider = _PROVIDERS.get(split_url(copy.repository_url or "").hostname or "")
    if not copy.commit or not copy.repository_url or copy.dirty:
        problem = "the project must be a commit of a git repository, without uncommitted changes"
    elif provider is None:
        problem = f"Databricks knows no git provider for {strip_user_info(copy.repository_url)}"
    elif len(words) < 2 or words[0] not in ("python", "python3") or _PLAIN.fullmatch(command) is None:
        problem = "the entry point must be one plain command 'python FILE …'"
    elif driver_environment(request).job:
        problem = "the project has an environment of its own; name it under libraries and give env_manager='local'"
    else:
        url = strip_user_info(copy.repository_url)
        source = {"git_url": url, "git_provider": provider, "git_commit": copy.commit}
        subfolder = copy.uri.partition("#")[2].strip("/")
        file = f"{subfolder}/{words[1]}" if subfolder else words[1]
        return source, {"python_file": file, "parameters": words[2:], "source": "GIT"}
    raise failure(f"git-source can't be used: {problem}. Leave it out, so that the code is uploaded.")


@dataclass(frozen=True)
class DriverEnvironment:
    """The driver's own Python, or an environment to build: the bootstrap's instructions, and further files of the archive."""

    description: str = "the driver's own Python"
    job: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def driver_environment(request: DatabricksRequest) -> DriverEnvironment:
    """Returns the command's environment: the driver's own without a file, for a Spark job, and for ``--env-manager local``."""
    # What the files name is sent to the driver.
    project = replace(request.project, root=request.project.root or request.project.directory)
    request = replace(request, project=project)
    if request.env_manager == "local" or project.databricks_spark_job is not None:
        return DriverEnvironment()
    if request.env_manager == "conda":
        raise InvalidEnvironmentError(
            f"Project '{project.display_name}' can't be run with --env-manager conda on Databricks: its drivers have no conda. "
            "Leave it out, so that uv installs the pip section of the conda.yaml, or use --env-manager local.",
            manager="conda",
        )
    manager: VenvManagerName = "virtualenv" if request.env_manager == "virtualenv" else "uv"
    if (lock := files.uv_lock_of(project)) is not None and manager == "uv":
        return _locked(request, lock)
    if isinstance(project.environment, NoEnvironment):
        return DriverEnvironment()
    contents = read_contents(project, manager)
    if isinstance(contents, tuple):
        raise _problems(request, contents)
    build, run, python = contents.build, contents.run, contents.python_range or contents.python
    build_file, run_file = ".mlprojects-build.txt", ".mlprojects-requirements.txt"
    packed = {**_files(request, build_file, build), **_files(request, run_file, run)}
    editable = any(package.editable for package in (*build.local_packages, *run.local_packages))
    job = {
        "installer": "uv" if manager == "uv" else "pip",
        "python": python,
        # An editable package refers to the unpacked project, which is removed with the run: not cacheable.
        "key": None
        if editable
        else files.digest_text(["python", python or "", "build", *build.key_inputs, "run", *run.key_inputs]),
        "files": [name for name in (build_file, run_file) if name in packed],
        "variables": _variables(build.variables | run.variables),
    }
    count, name = build.count + run.count, contents.source.name if contents.source is not None else "no file"
    interpreter = f"Python {python}" if python else "the driver's Python"
    description = f"{interpreter}, {count} requirement{'' if count == 1 else 's'} ({name}), built on the driver"
    return DriverEnvironment(description, job, packed, contents.warnings)


_PIP_VARIABLES = {
    "UV_PRERELEASE": "PIP_PRE",
    "UV_REQUIRE_HASHES": "PIP_REQUIRE_HASHES",
    "UV_INSECURE_HOST": "PIP_TRUSTED_HOST",
}


def _variables(options: Mapping[str, str]) -> dict[str, str]:
    """Returns the options of requirements files as variables of uv, and of pip, which installs where uv can't be had."""
    known = {name: value for name, value in options.items() if name in _PIP_VARIABLES}
    return {**options, **{_PIP_VARIABLES[name]: "1" if value == "allow" else value for name, value in known.items()}}


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
    found = files.read_lock(lock, request.project)
    if isinstance(found, Problem):
        raise _problems(request, (found,))
    requires, packages = found
    folder = request.project.directory
    inputs = ["lock", lock.read_bytes().decode("utf-8", "surrogateescape"), files.digest_metadata(folder)]
    for package in packages:
        _inside(request, package.path)
        if package.installed:
            inputs += [package.name, files.digest_package(package.path)]
    python = pinned_python(request.project) or requires
    return DriverEnvironment(
        f"Python {python}, locked by {lock.name}, built on the driver",
        {"installer": "uv", "python": python, "key": files.digest_text([*inputs, python or ""]), "locked": True},
    )


def _problems(request: DatabricksRequest, problems: tuple[Problem, ...]) -> EnvironmentBuildError:
    what = f"The environment of project '{request.project.display_name}' can't be built"
    return InvalidEnvironmentError(f"{what}: {'; '.join(map(str, problems))}", manager="uv")
