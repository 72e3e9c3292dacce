"""Documents of hostile authors: each ends in an error of ours, within a second and in bounded memory."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects import ExecutionException
from prefect_mlprojects.backends.configuration import load_backend_config
from prefect_mlprojects.backends.kubernetes.config import load_template, parse_kubernetes_config
from prefect_mlprojects.environments.managers import check_environment
from prefect_mlprojects.spec import load_project
from prefect_mlprojects.spec.entry_points import lint


def bomb(levels: int, width: int, first: str = "x") -> str:
    """Nine lines of YAML that stand for ``width ** levels`` values."""
    lines = [f"a0: &a0 [{first}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
DOCUMENTS = {
    "aliases": bomb(10, 9),
    "wide-aliases": bomb(5, 100),
    "long-text": bomb(6, 9, '"' + "x" * 100_000 + '"'),
    "chain": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 5000)),
    "merges": MERGES,
    "itself": "a: &a [*a]\nb: &b {b: *b}\n",
    "large": "a: " + "x" * (20 << 20),
    "many-values": "a:\n" + "- b\n" * 200_000,
    "many-keys": "".join(f"k{n}: v\n" for n in range(100_000)),
    "nested-lists": "a: " + "[" * 100_000,
    "nested-mappings": "a: " + "{a: " * 100_000,
    "nested-dashes": "- " * 100_000,
    "nested-slowly": '"\\ud800": ' + "{" * 60_000,
    "integer": "a: " + "1" * 100_000,
    "hexadecimal": "a: 0x" + "f" * 100_000,
    "sexagesimal": "a: " + ":".join(["1"] * 100_000),
    "sexagesimal-float": "a: " + ":".join(["1"] * 100_000) + ".5",
    "python-object": "a: !!python/object/apply:os.system ['>ran']",
    "unknown-tag": "a: !x y",
    "control-character": "a: \x1b[2J",
    "nul": "a: \0",
    "surrogate": 'a: "\\ud800"',
    "not-text": "a: \udcff",
    "no-date": "a: 2020-13-45",
    "empty-integer": "a: !!int\n",
    "set-of-lists": "? [a, b]\n: c\n",
    "documents": "a: b\n---\nc: d\n",
    "unclosed": "a: [",
}


def validate(folder: Path) -> None:
    lint(folder)
    problems = check_environment(load_project(folder))
    if problems:
        raise ExecutionException("; ".join(map(str, problems)))


def as_template(path: Path) -> None:
    load_template(parse_kubernetes_config({"kube-job-template-path": str(path)}), path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    "MLproject": lambda path: validate(path.parent),
    "conda.yaml": lambda path: validate(path.parent),
    "python_env.yaml": lambda path: validate(path.parent),
    "config.yaml": load_backend_config,
    "job.yaml": as_template,
}


def _read(name: str, path: Path, answers: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        READERS[name](path)
        answer = ""
    except ExecutionException as error:
        answer = str(error)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    answers.put((answer, time.process_time() - start, used >> 10))


def read_apart(name: str, path: Path) -> tuple[str, float, int]:
    """Reads a file in a process of its own; returns the error, the seconds and the MiB it took."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_read, args=(name, path, answers), daemon=True)
    process.start()
    try:
        found: tuple[str, float, int] = answers.get(timeout=30)
        return found
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_hostile_document_is_an_error_within_a_second(name: str, document: str, tmp_path: Path) -> None:
    content = DOCUMENTS[document]
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'true'}}\n")
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    message, seconds, mebibytes = read_apart(name, tmp_path / name)
    assert message or document == "set-of-lists"
    assert len(message) < 5000
    assert "\x1b" not in message
    assert seconds < 1.5
    assert mebibytes < 200
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "1" * 100_000 + "}", "{" * 10, '{"a": \x1b']
)
def test_hostile_json_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExecutionException, match="not valid JSON"):
        load_backend_config(tmp_path / "config.json")
    if text.startswith("{"):
        with pytest.raises(ExecutionException, match="not valid JSON"):
            load_backend_config(text)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "1" * 100_000,
        "version = 1\npackage = [1]\n",
        "x" * (20 << 20),
        "a = {b = " * 50_000,
    ],
)
def test_hostile_lock_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'a'\n")
    (tmp_path / "uv.lock").write_text(text)
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'true'}}\n")
    start = time.process_time()
    with pytest.raises(ExecutionException):
        validate(tmp_path)
    assert time.process_time() - start < 1.5


def test_requirements_without_end_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("dependencies: ['-r a.txt', '-r b.txt']")
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    (tmp_path / "b.txt").write_text("six\n" * (6 << 20))
    with pytest.raises(ExecutionException) as caught:
        validate(tmp_path)
    assert "not a regular file" in str(caught.value)
    assert "larger than" in str(caught.value)
