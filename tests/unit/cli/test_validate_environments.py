"""``mlprojects validate`` reads the environment's files too."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from prefect_mlprojects.cli.inspection import validate_command


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("python_env.yaml", "python: 3.10\n", "python_env.yaml:1: error: python is a number"),
        ("python_env.yaml", "dependencies: [-r no.txt]\n", "python_env.yaml:1: error: it names the requirements file"),
        ("conda.yaml", "dependencies:\n  - 3\n", "conda.yaml:2: error: a conda dependency must be a text"),
        ("conda.yaml", "dependencies:\n  - numpy>=1..*0\n", "conda.yaml:2: error: 'numpy>=1..*0' is not"),
    ],
)
def test_validate_reports_environment_problems_with_file_and_line(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    (tmp_path / "MLproject").write_text("name: demo\nentry_points:\n  main: {command: echo}\n")
    (tmp_path / file).write_text(text)
    result = CliRunner().invoke(validate_command, [str(tmp_path)])
    assert words in result.output
    assert result.exit_code == 1
    (tmp_path / file).write_text("dependencies: [six]\n")
    assert CliRunner().invoke(validate_command, [str(tmp_path)]).exit_code == 0
