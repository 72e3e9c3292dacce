"""Every example of docs/mlproject.md: files that load, and commands as they are shown."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from prefect_mlprojects.environments.managers import check_environment
from prefect_mlprojects.scaffold import scaffold
from prefect_mlprojects.spec import build_command, lint, load_project
from prefect_mlprojects.spec.entry_points import check_call
from prefect_mlprojects.spec.values_file import read_values

PAGE = Path(__file__).parents[3] / "docs" / "mlproject.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
PLACE = "/projects/churn"  # where the page's project is


def file_of(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ")


MLPROJECTS = [index for index, (kind, text) in enumerate(BLOCKS) if kind == "yaml" and file_of(text) == "MLproject"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("data.csv", "requirements.txt", "train.py", "score.py"):
        (tmp_path / name).touch()
    (tmp_path / "python_env.yaml").write_text("dependencies: []\n")
    return tmp_path


@pytest.mark.parametrize("index", MLPROJECTS)
def test_project_is_valid_and_gives_the_commands_that_are_shown(index: int, folder: Path) -> None:
    (folder / "MLproject").write_text(BLOCKS[index][1])
    assert lint(folder) == []
    kind, text = BLOCKS[index + 1] if index + 1 < len(BLOCKS) else ("", "")
    lines = text.splitlines() if kind == "console" and "mlprojects run" in text else []
    for call, shown in zip(lines[::2], lines[1::2], strict=True):
        words = shlex.split(call.removeprefix("$ mlprojects run ."))
        options = dict(zip(words[::2], words[1::2], strict=True)) if "-P" not in words else {}
        given = [word for option, word in zip(words[::2], words[1::2], strict=True) if option == "-P"]
        values = dict(each.split("=", 1) for each in given)
        here = {name: str(folder / value) if value == "data.csv" else value for name, value in values.items()}
        _, entry_point, checked = check_call(folder, options.get("-e", "main"), here)
        assert build_command(entry_point, checked).replace(str(folder), PLACE) == shown


def test_environment_and_values_files_are_valid(folder: Path) -> None:
    names = [file_of(text) for kind, text in BLOCKS if kind == "yaml"]
    assert set(names) == {"MLproject", "python_env.yaml", "values.yaml"}
    by_name = {file_of(text): text for kind, text in BLOCKS if kind == "yaml"}
    (folder / "python_env.yaml").write_text(by_name["python_env.yaml"])
    assert check_environment(load_project(folder)) == ()
    (folder / "values.yaml").write_text(by_name["values.yaml"])
    assert read_values(folder / "values.yaml") == yaml.safe_load(by_name["values.yaml"])


def test_file_that_init_writes_is_the_one_shown(folder: Path) -> None:
    index = next(index for index, (kind, text) in enumerate(BLOCKS) if kind == "console" and "mlprojects init" in text)
    assert file_of(BLOCKS[index - 1][1]) == "train.py"
    (folder / "train.py").write_text(BLOCKS[index - 1][1])
    made = scaffold(folder / "train.py", folder, "churn", {"PATH": str(Path(sys.executable).parent)})
    assert made.files["MLproject"] == BLOCKS[index + 1][1].removeprefix("# MLproject\n")


def test_keys_are_all_explained() -> None:
    from prefect_mlprojects.spec import parameter_parser, parser

    text = PAGE.read_text()
    for key in (*parser._TOP_LEVEL_KEYS, *parameter_parser._PARAMETER_KEYS):
        assert f"`{key}" in text, key
