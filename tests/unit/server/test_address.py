"""Which Prefect API is configured, found without importing Prefect, and as Prefect itself finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from prefect_mlprojects.server.address import configured_api_url
ours = configured_api_url()
assert "prefect" not in sys.modules
from prefect.settings import get_current_settings
print(ours, get_current_settings().api.url)
"""
PROFILES = 'active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://profile/api"\n[profiles.other]\n'


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({}, {}, "None"),
        ({}, {"PREFECT_API_URL": "http://env/api"}, "http://env/api"),
        ({"home/profiles.toml": PROFILES}, {}, "http://profile/api"),
        ({"home/profiles.toml": PROFILES}, {"PREFECT_PROFILE": "other"}, "None"),
        ({"home/profiles.toml": PROFILES, "prefect.toml": '[api]\nurl = "http://toml/api"\n'}, {}, "http://toml/api"),
        ({"pyproject.toml": '[tool.prefect.api]\nurl = "http://project/api"\n'}, {}, "http://project/api"),
        ({}, {"PREFECT_PROFILE": "local"}, "None"),
        (
            {"pyproject.toml": '[tool.prefect]\nprofiles_path = "mine.toml"\n', "mine.toml": PROFILES},
            {},
            "http://profile/api",
        ),
        ({".env": "PREFECT_PROFILES_PATH=mine.toml", "mine.toml": PROFILES}, {}, "http://profile/api"),
        ({".env": "PREFECT_API_URL=http://dotenv/api\n"}, {}, "http://dotenv/api"),
    ],
)
def test_configured_api_url_agrees_with_prefect(
    files: dict[str, str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={**environment, "PREFECT_HOME": str(tmp_path / "home"), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected, expected]
