"""What is fuzzed: each target gives hostile input to one reader, and fails unless it works or raises an error of ours."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.security.fuzz.shell_commands import HOSTILE_VALUES, commands, template_of

from prefect_mlprojects.backends.configuration import load_backend_config
from prefect_mlprojects.backends.docker.arguments import parse_arguments
from prefect_mlprojects.backends.kubernetes.config import load_template, parse_kubernetes_config
from prefect_mlprojects.environments.managers import check_environment
from prefect_mlprojects.exceptions import ExecutionException
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.sources.zip_archive import unpack
from prefect_mlprojects.spec import build_command, check_parameters, load_project
from prefect_mlprojects.spec.entry_points import find_entry_point, lint
from prefect_mlprojects.types import StopSignal

SECONDS = 10.0  # of processor time, for the slowest machine; a hostile input takes for ever

_HOSTILE = st.sampled_from(
    [
        "\0",
        "\x1b[2J",
        "\ud800",
        "\u202e",
        "../../canary",
        "/etc/shadow",
        "$(>ran)",
        "{x}",
        "{",
        "1" * 5000,
        "é",
        "",
        " ",
        "\n",
    ]
)
TEXTS = st.one_of(st.text(max_size=20), _HOSTILE, st.sampled_from(HOSTILE_VALUES))
_SCALARS = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=5), st.datetimes()
)
VALUES: SearchStrategy[Any] = st.recursive(
    _SCALARS, lambda each: st.lists(each, max_size=4) | st.dictionaries(TEXTS, each, max_size=4), max_leaves=12
)


def _maybe(valid: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Valid values for the most part, so that the readers get past their first checks."""
    return st.integers(0, 5).flatmap(lambda dice: VALUES if dice == 0 else valid)


_TYPES = st.sampled_from(["string", "int", "float", "path", "uri", "bool", "choice", "list", "x"])
_PARAMETER = _maybe(
    st.fixed_dictionaries(
        {"type": _maybe(_TYPES)},
        optional=dict.fromkeys(
            ("default", "choices", "min", "max", "optional", "option", "separator", "secret"), VALUES
        ),
    )
    | _TYPES
)
_COMMAND = commands().map(template_of) | TEXTS
_ENTRY_POINT = _maybe(
    st.fixed_dictionaries(
        {"command": _maybe(_COMMAND)},
        optional={"parameters": _maybe(st.dictionaries(st.just("x") | TEXTS, _PARAMETER, max_size=3))},
    )
)
_DOCKER = st.fixed_dictionaries({"image": _maybe(TEXTS)}, optional={"volumes": VALUES, "environment": VALUES})
PROJECTS = _maybe(
    st.fixed_dictionaries(
        {"entry_points": _maybe(st.dictionaries(st.just("main") | TEXTS, _ENTRY_POINT, min_size=1, max_size=2))},
        optional={
            "name": _maybe(TEXTS),
            "python_env": _maybe(st.sampled_from(["python_env.yaml", "link", "../canary"])),
            "conda_env": _maybe(st.sampled_from(["conda.yaml", "link", "../canary"])),
            "docker_env": _maybe(_DOCKER),
            "databricks_spark_job": VALUES,
        },
    )
)
REQUIREMENTS = st.one_of(
    TEXTS,
    st.sampled_from(
        ["six==1.0", "-r a.txt", "-r ../canary", "-c link", "-e ..", "-f file:///..", "x @ file:../canary", "--hash"]
    ),
    st.tuples(st.sampled_from(["-r ", "-c ", "-e ", "-f ", "-i ", "--", "x @ ", "git+file:"]), TEXTS).map("".join),
)
ENVIRONMENTS = _maybe(
    st.fixed_dictionaries(
        {
            "dependencies": _maybe(
                st.lists(REQUIREMENTS | st.dictionaries(st.just("pip"), _maybe(st.lists(REQUIREMENTS))), max_size=4)
            )
        },
        optional={
            "python": _maybe(st.sampled_from(["3.11", ">=3.10"])),
            "channels": VALUES,
            "variables": VALUES,
            "name": VALUES,
        },
    )
)
CANARY = "canary-5b1f"


def _dump(value: Any) -> bytes:
    import yaml

    return yaml.dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def _guarded(action: Callable[[], Any]) -> None:
    start, said = time.process_time(), ""
    try:
        action()
    except ExecutionException as error:
        said = str(error)
    assert time.process_time() - start < SECONDS, "it took too long"
    assert CANARY not in said, f"it quoted a file outside of the project: {said}"
    assert "\x1b" not in said, "it quoted a control character"


def _inspect(folder: Path) -> None:
    findings = "\n".join(map(str, lint(folder, root=folder)))
    assert CANARY not in findings
    assert "\x1b" not in findings
    project = load_project(folder, root=folder)
    for name in project.entry_points:
        entry_point = find_entry_point(project, name)
        try:
            parameters = check_parameters(entry_point, {"x": "$(>ran)"}, folder)
        except ExecutionException:
            continue
        if not parameters.downloads:
            build_command(entry_point, parameters)
    problems = "\n".join(map(str, check_environment(project)))
    assert CANARY not in problems


def fuzz_project(value: Any, environment: Any, requirements: list[str]) -> None:
    """An MLproject file with its environment files, as ``mlprojects validate`` reads them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        folder.mkdir()
        (Path(name) / "canary").write_text(f"{CANARY} {CANARY}\n")
        (folder / "link").symlink_to(Path(name) / "canary")
        (folder / "MLproject").write_bytes(_dump(value))
        for file in ("python_env.yaml", "conda.yaml"):
            (folder / file).write_bytes(_dump(environment))
        (folder / "a.txt").write_bytes("\n".join(requirements).encode("utf-8", "surrogatepass"))
        _guarded(lambda: _inspect(folder))


def fuzz_yaml(content: bytes) -> None:
    """Any bytes as an MLproject file, a configuration and a job template."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("MLproject", "python_env.yaml", "config.yaml", "config.json"):
            (folder / file).write_bytes(content)
        _guarded(lambda: _inspect(folder))
        _guarded(lambda: load_backend_config(folder / "config.yaml"))
        _guarded(lambda: load_backend_config(folder / "config.json"))


def fuzz_template(command: str, value: str) -> None:
    """A command with a hostile value, run by bash and dash, and compared with tree-sitter's grammar."""
    from tests.security.test_shell_values import check_against_tree_sitter, run_with

    check_against_tree_sitter(command)
    with tempfile.TemporaryDirectory() as name:
        for shell in ("bash", "dash"):
            run_with(template_of(command), value, shell, Path(name))


def fuzz_uri(uri: str, version: str | None) -> None:
    """The URI of a project; nothing is fetched."""
    with tempfile.TemporaryDirectory() as name:
        _guarded(lambda: detect_source(uri, version, base=Path(name)))


def fuzz_zip(members: list[tuple[str, bytes]], noise: bytes, position: int) -> None:
    """A zip archive with hostile names and damaged bytes."""
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name) / "a.zip", Path(name) / "folder"
        folder.mkdir()
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in members:
                info = zipfile.ZipInfo("x")
                info.filename = member or "x"
                archive.writestr(info, content)
        data = bytearray(file.read_bytes())
        data[position % len(data) :][: len(noise)] = noise
        start = position % len(data)
        data[start : start + len(noise)] = noise
        file.write_bytes(data)
        _guarded(lambda: unpack(file, folder, "a.zip", StopSignal()))
        assert sorted(path.name for path in Path(name).iterdir()) == ["a.zip", "folder"]


def fuzz_docker_args(arguments: dict[str, Any]) -> None:
    """Arguments of a container, as ``-A`` takes them."""
    _guarded(lambda: parse_arguments(arguments, {}))


def fuzz_job_template(template: Any) -> None:
    """A Kubernetes job template."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "job.yaml").write_bytes(_dump(template))
        config = parse_kubernetes_config({"kube-job-template-path": f"{name}/job.yaml"})
        _guarded(lambda: load_template(config, Path(name)))


def _no_surrogates(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= each <= "\udfff" for each in text)


_NAMES = st.one_of(TEXTS, st.sampled_from(["a/b", "a/../b", "../x", "/x", "a\\b", "c:x", "./x", "a/"])).filter(
    _no_surrogates
)
_PARTS = st.sampled_from(
    [
        "http://",
        "git@",
        "ssh://",
        "file://",
        "git+",
        "[::1",
        "]",
        "#",
        "@",
        ":",
        "/",
        "..",
        "%2e",
        ".zip",
        "x",
        "block://",
    ]
)
_ARGUMENTS = st.sampled_from(
    ["gpus", "volume", "v", "env", "e", "memory", "network", "ulimit", "mount", "user", "shm-size", "cpus", "port"]
)
_LINES = st.sampled_from(
    [
        "name: x\n",
        "entry_points:\n",
        "  main:\n",
        "    command: a\n",
        "a: &a [*a]\n",
        "<<: *a\n",
        "- ",
        "? ",
        "{",
        "[",
        "&a ",
        "*a ",
        "!!int ",
        "!x ",
        "|\n",
        "\t",
        '"',
        "\0",
        "---\n",
        "%YAML 1.2\n",
    ]
)
_CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(_LINES, TEXTS.filter(_no_surrogates)), max_size=30).map(lambda each: "".join(each).encode()),
)
TARGETS: dict[str, tuple[Callable[..., None], dict[str, SearchStrategy[Any]]]] = {
    "project": (
        fuzz_project,
        {"value": PROJECTS, "environment": ENVIRONMENTS, "requirements": st.lists(REQUIREMENTS, max_size=4)},
    ),
    "yaml": (fuzz_yaml, {"content": _CONTENT}),
    "template": (fuzz_template, {"command": commands(), "value": st.sampled_from(HOSTILE_VALUES)}),
    "uri": (fuzz_uri, {"uri": st.lists(_PARTS | TEXTS, max_size=6).map("".join), "version": st.none() | TEXTS}),
    "zip": (
        fuzz_zip,
        {
            "members": st.lists(st.tuples(_NAMES, st.binary(max_size=20)), max_size=4, unique_by=lambda each: each[0]),
            "noise": st.binary(max_size=8),
            "position": st.integers(0, 2000),
        },
    ),
    "docker_args": (fuzz_docker_args, {"arguments": st.dictionaries(_ARGUMENTS | TEXTS, VALUES, max_size=3)}),
    "job_template": (fuzz_job_template, {"template": VALUES}),
}
