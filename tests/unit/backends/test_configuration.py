"""Backend configurations in each of their forms, good and bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.backends.configuration import load_backend_config
from prefect_mlprojects.exceptions import BackendError


def test_load_backend_config_each_form_gives_the_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"grace-period": 3}')
    (tmp_path / "a.yaml").write_text("grace-period: 3\n")
    for form in ({"grace-period": 3}, str(tmp_path / "a.json"), tmp_path / "a.yaml", '{"grace-period": 3}'):
        assert load_backend_config(form) == {"grace-period": 3}
    assert load_backend_config(None) == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{\n"a": }', "a.json:2: not valid JSON"),
        ("a.yaml", "a: b: c", "a.yaml:1: not valid YAML"),
        ("a.yaml", "- a", "must hold a mapping"),
        ("a.yml", "a: \x00", "not valid YAML"),
        ("a.toml", "", "neither a mapping"),
    ],
)
def test_load_backend_config_bad_file_is_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BackendError, match=words):
        load_backend_config(tmp_path / name)


@pytest.mark.parametrize("text", ["missing.json", '{"a": ', "kubernetes"])
def test_load_backend_config_bad_text_is_refused(text: str) -> None:
    with pytest.raises(BackendError):
        load_backend_config(text)
