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
from prefect_mlprojects._support.secrets import reveal
from prefect_mlprojects.backends.databricks import failure
from prefect_mlprojects.backends.databricks.config import DatabricksRequest
from prefect_mlprojects.backends.databricks.storage import Upload, driver_path
from prefect_mlprojects.environments.python import files as env_files
from prefect_mlprojects.environments.python import requirements as reqs
from prefect_mlprojects.environments.python.files import PythonSpec
from prefect_mlprojects.environments.python.requirements import RequirementSet
from prefect_mlprojects.exceptions import EnvironmentBuildError, Problem
from prefect_mlprojects.spec.project import CondaEnvironment, NoEnvironment, PythonEnvironment

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
        "secrets": request.config.secrets,
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
    provider = _PROVIDERS.get(urlsplit(copy.repository_url or "").hostname or "")
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
    project = request.project
    if request.env_manager == "local" or project.databricks_spark_job is not None:
        return DriverEnvironment()
    if request.env_manager == "conda":
        raise EnvironmentBuildError(
            f"Project '{project.display_name}' can't be run with --env-manager conda on Databricks: its drivers have no conda. "
            "Leave it out, so that uv installs the pip section of the conda.yaml, or use --env-manager local.",
            manager="conda",
        )
    environment = project.environment
    if isinstance(environment, NoEnvironment):
        lock = env_files.uv_lock_of(project)
        return _locked(request, lock) if lock and request.env_manager != "virtualenv" else DriverEnvironment()
    if isinstance(environment, PythonEnvironment):
        spec = env_files.read_python_env(environment.file)
    else:
        assert isinstance(environment, CondaEnvironment)  # the backend refuses containers before
        spec = env_files.read_conda_env(environment.file, "uv")
    if not isinstance(spec, PythonSpec):
        raise _problems(request, spec)
    build = reqs.expand_requirements(spec.build_dependencies, spec.source, project.directory)
    run = reqs.expand_requirements(spec.dependencies, spec.source, project.directory)
    if not isinstance(build, RequirementSet) or not isinstance(run, RequirementSet):
        raise _problems(request, tuple(each for part in (build, run) if isinstance(part, tuple) for each in part))
    files = {".mlprojects-build.txt": _lines(request, build), ".mlprojects-requirements.txt": _lines(request, run)}
    files = {name: content for name, content in files.items() if content}
    installer = "pip" if request.env_manager == "virtualenv" else "uv"
    job = {"installer": installer, "python": spec.python, "key": _key(spec, build, run), "files": list(files)}
    return DriverEnvironment(_description(spec, build.count + run.count), job, files, spec.warnings)


def _description(spec: PythonSpec, count: int) -> str:
    name = spec.source.name if spec.source else "no file"
    python = f"Python {spec.python}" if spec.python else "the driver's Python"
    return f"{python}, {count} requirement{'' if count == 1 else 's'} ({name}), built on the driver"


def _key(spec: PythonSpec, build: RequirementSet, run: RequirementSet) -> str | None:
    if any(package.editable for package in (*build.local_packages, *run.local_packages)):
        # It refers to the unpacked project, which is removed with the run: not cacheable.
        return None
    return reqs.digest_text(["python", spec.python or "", "build", *build.key_inputs, "run", *run.key_inputs])


def _lines(request: DatabricksRequest, requirements: RequirementSet) -> bytes:
    """Returns the requirements file for the archive; its files must be in the project."""
    flags, paths = requirements.arguments[::2], requirements.arguments[1::2]
    options = (f"{flag} {_inside(request, Path(path))}" for flag, path in zip(flags, paths, strict=True))
    lines = [*requirements.lines, *options]
    for path in (*(package.directory for package in requirements.local_packages), *requirements.files):
        _inside(request, path)
    return "".join(f"{line}\n" for line in lines).encode()


def _inside(request: DatabricksRequest, path: Path) -> Path:
    folder = request.project.directory
    if not path.is_relative_to(folder):
        raise EnvironmentBuildError(
            f"The environment of project '{request.project.display_name}' names {path}, which is not in the project's folder and "
            "so does not get to Databricks. Put it into the project.",
            manager="uv",
        )
    return path.relative_to(folder)


def _locked(request: DatabricksRequest, lock: Path) -> DriverEnvironment:
    found = env_files.read_lock(lock)
    if isinstance(found, Problem):
        raise _problems(request, (found,))
    requires, packages = found
    folder = request.project.directory
    inputs = ["lock", lock.read_bytes().decode("utf-8", "surrogateescape"), reqs.digest_metadata(folder)]
    for package in packages:
        _inside(request, package.path)
        if package.installed:
            inputs += [package.name, reqs.digest_package(package.path)]
    try:
        named = (folder / ".python-version").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        named = []
    python = named[0] if named and env_files.is_python_request(named[0]) else requires
    return DriverEnvironment(
        f"Python {python}, locked by {lock.name}, built on the driver",
        {"installer": "uv", "python": python, "key": reqs.digest_text([*inputs, python or ""]), "locked": True},
    )


def _problems(request: DatabricksRequest, problems: tuple[Problem, ...]) -> EnvironmentBuildError:
    what = f"The environment of project '{request.project.display_name}' can't be built"
    return EnvironmentBuildError(f"{what}: {'; '.join(map(str, problems))}", manager="uv")
