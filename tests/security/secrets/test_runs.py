"""Secrets that are given to ``run()`` in every way, through real servers: found nowhere, and yet they reach the program.

The search is that of `tests.services.secret_search`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prefect.blocks.system import Secret as SecretBlock
from tests.services.git_server import TOKEN, USER, serve_repository
from tests.services.mlflow_server import MlflowServer
from tests.services.secret_search import House, leaks, marker

from prefect_mlprojects.server.process import ServerAddress

# Prefect leaves a client open for each flow run.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Only builtins of bash get the values, so that no process has them among its arguments.
MLPROJECT = """\
name: hush
entry_points:
  main:
    parameters: {{token: {{secret: true}}, key: {{secret: true}}, variable: {{secret: true}}, plain: string, url: string}}
    command: |
      {check}
      echo "plain: {{plain}}"; env; echo "got {{token}} {{url}}"; echo '{{key}}' >&2
      echo Authorization: Basic $(printf %s "user:{{token}}" | base64 -w0)
  fail:
    parameters: {{token: {{secret: true}}, key: {{secret: true}}, variable: {{secret: true}}, plain: string, url: string}}
    command: |
      echo "failed with {{token}}, {{key}}, {{variable}} at {{url}}" >&2; exit 3
"""


@pytest.fixture
def house(tmp_path: Path, prefect_server: ServerAddress, mlflow_server: MlflowServer) -> House:
    house = House(tmp_path, prefect_server, mlflow_server)
    house.environment["MLFLOW_TRACKING_URI"] = mlflow_server.uri
    return house


def digest_check(name: str, value: str) -> str:
    found = f'"$(printf %s {{{name}}} | sha256sum | cut -c-64)"'
    return f"[ {found} = {hashlib.sha256(value.encode()).hexdigest()} ] || exit 9"


@pytest.mark.parametrize("fetched", [False, True], ids=["folder", "repository"])
def test_secret_parameters_reach_the_program_and_nothing_else(
    fetched: bool, house: House, save_block: Callable[[Any, str], None]
) -> None:
    secrets = {
        name: marker(name) for name in ("token", "key", "variable", "password", "query", "header", "environment")
    }
    control, name = marker("control"), f"hush-{uuid.uuid4().hex[:8]}"
    save_block(SecretBlock.model_validate({"value": secrets["key"]}), name)
    house.environment |= {"HUSH_VALUE": secrets["variable"], "ACME_API_TOKEN": secrets["environment"]}
    url = f"postgresql://me:p/w?'\"{secrets['password']}@db/x"
    folder = house.root / "work"
    folder.mkdir()
    values = {"token": secrets["token"], "key": secrets["key"], "variable": secrets["variable"], "url": url}
    check = "\n      ".join(digest_check(name, value) for name, value in values.items())
    (folder / "MLproject").write_text(MLPROJECT.format(check=check))
    parameters = {
        "token": secrets["token"],
        "key": f"block://secret/{name}",
        "variable": "env://HUSH_VALUE",
        "url": url,
        "plain": control,
        "undeclared": f"https://h/x?access%5Ftoken={secrets['query']}",
        "header": f"Authorization: Bearer {secrets['header']}",
    }
    # `--undeclared VALUE` would be an argument of the last command.
    del parameters["undeclared"], parameters["header"]
    options = {"env_manager": "local", "parameters": parameters}
    if fetched:
        with serve_repository(folder) as address:
            uri = f"http://{USER}:{TOKEN}@{address}/project.git"
            ends, found = house.run(uri, {**secrets, "repository": TOKEN}, "main", "fail", **options)
    else:
        ends, found = house.run(str(folder), secrets, "main", "fail", **options)

    stderr = (house.root / "stderr").read_text()
    assert ends == ["FINISHED", "FAILED"], stderr
    assert not found | leaks(secrets, *house.kept)
    # What is not secret is found, in Prefect's database too: the values of a repository's project are stored later.
    assert sum(place.endswith(".db") for place in leaks({"control": control}, *house.kept)) == 2
    assert "failed with ***, ***, *** at postgresql://me:***@db/x" in stderr


CALLS = """\
import json, pathlib, pickle, sys
from prefect_mlprojects import run
given = json.load(sys.stdin)
shown = []
for options in given["calls"]:
    try:
        handle = run(synchronous=False, **options)
        result = handle.result()
        shown += [repr(handle), repr(result), str(result.error), repr(vars(result.error or handle)), result.status]
        print(result.status, handle.flow_run_id, result.message, flush=True)
    except Exception as error:
        shown += [repr(error), repr(vars(error))]
        print("refused", error, flush=True)
pathlib.Path(given["shown"]).write_text("\\n".join(shown))
"""


@pytest.fixture
def repository(house: House) -> Iterator[str]:
    """The URI of a project that is only known once it is fetched, so that each run gets a flow run."""
    folder = house.root / "work"
    folder.mkdir()
    (folder / "MLproject").write_text("name: quick\nentry_points: {main: {command: 'true'}}\n")
    with serve_repository(folder) as address:
        yield f"http://{USER}:{TOKEN}@{address}/project.git"


def test_secrets_of_configurations_are_not_in_flow_parameters(house: House, repository: str) -> None:
    secrets: dict[str, str] = {}

    def planted(name: str, form: str = "{}") -> str:
        secrets[name] = marker(name)
        return form.format(secrets[name])

    def template(name: str) -> dict[str, Any]:
        variables = [{"name": "DB", "value": planted(name)}, {"name": "EPOCHS", "value": "3"}]
        containers = [{"name": "main", "image": "x", "env": variables}]
        return {"spec": {"template": {"spec": {"containers": containers, "initContainers": containers}}}}

    file = house.root / "kubernetes.yaml"
    file.write_text(json.dumps({"tracking-uri": planted("tracking-file", "http://u:p/w?{}@mlflow")}))
    short = secrets["spark-variable"] = f"zq{uuid.uuid4().hex[:4]}yw"
    cluster = {
        "spark_version": "15.4.x-scala2.12",
        "docker_image": {"url": "x", "basic_auth": {"username": "u", "password": planted("registry")}},
        # Short, under a plain name; no digits of an ID are like it.
        "spark_env_vars": {"DB": short, "EPOCHS": "3"},
        "spark_conf": {"spark.plain": planted("spark-conf")},
    }
    host, path = repository.partition("@")[2].split("/", 1)
    calls: list[dict[str, Any]] = [
        {"backend": "kubernetes", "backend_config": {"tracking-uri": planted("tracking", "http://u:{}@mlflow")}},
        {"backend": "kubernetes", "backend_config": str(file)},
        {
            "backend": "kubernetes",
            "backend_config": json.dumps({"tracking-uri": planted("tracking-text", "http://h/?token={}")}),
        },
        {"backend": "kubernetes", "backend_config": {"kube-job-template": template("pod-variable")}},
        {
            "backend": "databricks",
            "backend_config": {
                "new_cluster": cluster,
                "libraries": [{"pypi": {"package": "six", "repo": planted("index", "https://u:{}@pypi/simple")}}],
                "network-timeout": 1,
            },
        },
        {
            "docker_args": {
                "e": [planted("container-variable", "DB={}")],
                "env": {"OTHER": planted("container-mapping")},
            }
        },
        {"docker_args": {"label": planted("label", "a=https://u:{}@h")}},
        {"uri": f"http://{planted('lone-token')}@{host}/{path}"},
        {"uri": f"http://{host}/{path.removesuffix('.git')}.zip?access_token={planted('zip-token')}"},
        {"uri": f"ssh://git:{planted('ssh')}@127.0.0.1:9/x.git"},
        {"uri": f"https://conda.example.invalid/t/{planted('path-token')}/p.zip"},
        {"run_name": planted("run-name", "https://u:{}@h"), "env_manager": "local"},
        {"parameters": {"url": planted("parameter", "AccountKey={}")}, "env_manager": "local"},
    ]
    given = {"calls": [{"uri": repository, **call} for call in calls], "shown": str(house.root / "shown")}
    result = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={**house.environment, "GIT_SSH_COMMAND": "false", "GIT_TERMINAL_PROMPT": "0"},
        cwd=house.root,
        timeout=300,
    )
    (house.root / "stdout").write_text(result.stdout)
    (house.root / "stderr").write_text(result.stderr)

    assert result.stdout.count("\n") >= len(calls), result.stderr
    assert not leaks({**secrets, "repository": TOKEN}, *house.kept), result.stdout
    started = [line for line in result.stdout.splitlines() if line.startswith(("FINISHED", "FAILED"))]
    assert len(started) >= len(calls) - 3, result.stdout


def test_basic_authentication_of_a_known_password_is_redacted_in_output(house: House) -> None:
    secret = marker("password")
    header = base64.b64encode(f"someone:{secret}".encode()).decode()
    folder = house.root / "work"
    folder.mkdir()
    command = f"echo {header}; echo {quote(secret)}; printf %s {secret[:20]}; sleep 0.3; echo {secret[20:]}"
    (folder / "MLproject").write_text(
        f"name: hush\nentry_points:\n  main:\n    parameters: {{token: {{secret: true}}}}\n    command: {command!r}\n"
    )
    ends, _ = house.run(str(folder), {}, "main", env_manager="local", parameters={"token": secret})

    assert ends == ["FINISHED"], (house.root / "stderr").read_text()
    places = [each for each in house.kept if each.name not in ("tmp", "home")]
    assert not leaks({"token": secret, "header": base64.b64encode(secret.encode()).decode()[2:30]}, *places)
    assert "***\n***\n" in (house.root / "stdout").read_text()
