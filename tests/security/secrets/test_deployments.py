"""Deployments and project blocks, which Prefect stores: secrets are refused, references and plain values are taken."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import use_server

from prefect_mlprojects import deploy
from prefect_mlprojects.blocks import MLflowProject
from prefect_mlprojects.deployments.specification import specify
from prefect_mlprojects.exceptions import ExecutionException, ParameterError
from prefect_mlprojects.flows.secrets import refuse_missing
from prefect_mlprojects.request.check import RunSecrets
from prefect_mlprojects.request.secrets import withhold
from prefect_mlprojects.runs.start import make_request
from prefect_mlprojects.server.process import ServerAddress

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECRET = "geheim-0815"
URL = f"https://u:{SECRET}@h/x"
CLUSTER = {"spark_version": "15.4.x-scala2.12"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(
        f"name: hush-{uuid.uuid4().hex[:8]}\nentry_points:\n  main:\n"
        "    parameters: {token: {secret: true, default: none}, word: {default: x}}\n    command: echo {token} {word}\n"
    )
    return folder


def template(name: str, value: str) -> dict[str, Any]:
    containers = [{"name": "main", "image": "x", "env": [{"name": name, "value": value}]}]
    return {"spec": {"template": {"spec": {"containers": containers}}}}


def kubernetes(**config: Any) -> dict[str, Any]:
    return {"backend": "kubernetes", "backend_config": {key.replace("_", "-"): each for key, each in config.items()}}


def databricks(**config: Any) -> dict[str, Any]:
    return {"backend": "databricks", "backend_config": {"new_cluster": {**CLUSTER, **config}}}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (kubernetes(tracking_uri=URL), "block"),
        (
            {"backend": "kubernetes", "backend_config": json.dumps({"tracking-uri": f"http://h/?token={SECRET}"})},
            "block",
        ),
        (kubernetes(kube_job_template=template("DB_PASSWORD", SECRET)), "block"),
        (kubernetes(kube_job_template=template("STORE", URL)), "block"),
        (databricks(docker_image={"url": "x", "basic_auth": {"username": "u", "password": SECRET}}), "block"),
        (databricks(spark_env_vars={"DB_PIN": SECRET}), "block"),
        (databricks(spark_conf={"fs.azure.account.key.x": SECRET}), "block"),
        (
            {
                "backend": "databricks",
                "backend_config": {"new_cluster": CLUSTER, "libraries": [{"pypi": {"package": "x", "repo": URL}}]},
            },
            "block",
        ),
        ({"docker_args": {"e": [f"DB_PASSWORD={SECRET}"]}}, "name alone"),
        ({"docker_args": {"env": {"STORE": URL}}}, "name alone"),
        ({"job_variables": {"env": {"DB_PASSWORD": SECRET}}}, "prefect.blocks.secret"),
        ({"job_variables": {"command": f"x --store {URL}"}}, "prefect.blocks.secret"),
        ({"parameters": {"word": URL}}, "block://secret/NAME"),
        ({"parameters": {"undeclared": f"AccountKey={SECRET}"}}, "block://secret/NAME"),
        ({"parameters": {"token": SECRET}}, "block://secret/NAME"),
    ],
)
def test_secret_given_to_a_deployment_is_refused_with_what_to_use(
    project: Path, options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ExecutionException, match=remedy) as caught:
        specify(project, **options)
    assert SECRET not in f"{caught.value} {vars(caught.value)}"


@pytest.mark.parametrize(
    "uri", [URL, f"https://{SECRET}@h/x", f"https://h/p.zip?access%5Ftoken={SECRET}", f"ssh://git:{SECRET}@h/x"]
)
def test_secret_in_the_uri_of_a_deployment_or_block_is_refused(uri: str) -> None:
    with pytest.raises(ParameterError, match="git-credentials block") as caught:
        specify(uri)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="git-credentials block") as refused:
        MLflowProject(uri=uri)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"parameters": {"url": URL}},
        {"options": {"docker_args": {"e": f"DB_PASSWORD={SECRET}"}}},
        {
            "options": {
                "backend": "databricks",
                "backend_config": {"new_cluster": {"spark_env_vars": {"API_KEY": SECRET}}},
            }
        },
        {"options": {"backend": "kubernetes", "backend_config": {"tracking-uri": URL}}},
    ],
)
def test_secret_in_the_fields_of_a_project_block_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        MLflowProject.model_validate({"uri": "https://h/x", **fields})
    assert SECRET not in str(caught.value)


def test_plain_values_of_a_deployment_are_stored_as_written(project: Path) -> None:
    variables = {"EPOCHS": "3", "STAGE": "prod", "TOKENIZERS_PARALLELISM": "false"}
    job = template("STAGE", "prod")

    assert specify(project, docker_args={"env": variables}).options["docker_args"] == {
        "env": [f"{name}={value}" for name, value in variables.items()]
    }
    config = kubernetes(kube_job_template=job)
    assert specify(project, **config).options["backend_config"] == config["backend_config"]
    stored = specify(project, **databricks(spark_env_vars=variables)).options["backend_config"]
    assert stored == {"new-cluster": {**CLUSTER, "spark_env_vars": variables}}
    assert specify(project, job_variables={"env": variables, "image": "x"}).job_variables["env"] == variables


def test_variable_that_the_setting_calls_public_is_stored(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParameterError):
        specify(project, docker_args={"env": {"MODEL_KEY": "resnet"}})
    monkeypatch.setenv("PREFECT_MLPROJECTS_PUBLIC_VARIABLES", "MODEL_KEY")

    assert specify(project, docker_args={"env": {"MODEL_KEY": "resnet"}}).options["docker_args"] == {
        "env": {"MODEL_KEY": "resnet"}
    }


def test_reference_of_a_deployment_is_stored_and_its_form_refuses_values(
    project: Path, prefect_server: ServerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_server(monkeypatch, prefect_server.api_url)
    deployment = deploy(project, parameters={"token": "block://secret/api"})

    assert deployment.specification.parameters == {"token": "block://secret/api"}
    for refused in (SECRET, URL):
        with pytest.raises(ParameterError) as caught:
            deployment.run({"token": refused})
        assert SECRET not in str(caught.value)
    with pytest.raises(ParameterError) as caught:
        deployment.run({"word": URL})
    assert SECRET not in str(caught.value)
    with pytest.raises(ExecutionException) as caught_config:
        deployment.run(backend="kubernetes", backend_config={"tracking-uri": URL})
    assert SECRET not in str(caught_config.value)
    deployment.run({"token": "env://API_TOKEN"}).cancel()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"uri": f"https://h/p.zip?token={SECRET}"}, ["uri"]),
        ({"uri": "p", "parameters": {"token": SECRET, "url": URL}}, ["parameters: token", "parameters: url"]),
        ({"uri": "p", **kubernetes(tracking_uri=URL)}, ["backend_config: tracking-uri"]),
        ({"uri": "p", **databricks(spark_env_vars={"DB": "hunter2"})}, ["backend_config: new-cluster"]),
        ({"uri": "p", "docker_args": {"log-opt": f"splunk-token={SECRET}"}}, ["docker_args: log-opt"]),
    ],
)
def test_run_in_another_process_than_its_callers_says_what_it_lacks(
    arguments: dict[str, Any], missing: list[str]
) -> None:
    request, secrets = withhold(*make_request(arguments), None)

    refuse_missing(request, secrets)
    with pytest.raises(ParameterError, match="start the run again") as caught:
        refuse_missing(request, RunSecrets())
    assert [problem.parameter for problem in caught.value.problems if problem.parameter] == missing


def test_parameter_that_only_looks_redacted_is_passed_as_it_is() -> None:
    request, secrets = withhold(*make_request({"uri": "p", "parameters": {"pattern": "***"}}), {})

    refuse_missing(request, secrets)
    assert request.parameters == {"pattern": "***"}
