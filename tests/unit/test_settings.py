"""Settings from environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects import settings
from prefect_mlprojects.exceptions import ExecutionException


def test_settings_have_defaults_and_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFECT_MLPROJECTS_GRACE_PERIOD", raising=False)
    assert settings.grace_period() == 10
    monkeypatch.setenv("PREFECT_MLPROJECTS_GRACE_PERIOD", "0.5")
    assert settings.grace_period() == 0.5
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path))
    assert settings.cache_directory() == tmp_path
    monkeypatch.delenv("PREFECT_MLPROJECTS_SERVER_DIR", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    assert settings.server_directory() == tmp_path / "home" / "mlprojects"


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("SERVER_PORT", "0", settings.server_port),
        ("SERVER_PORT", "http", settings.server_port),
        ("MAX_CONCURRENT_RUNS", "0", settings.max_concurrent_runs),
        ("GRACE_PERIOD", "-1", settings.grace_period),
        ("GRACE_PERIOD", "nan", settings.grace_period),
        ("SERVER_START_TIMEOUT", "inf", settings.server_start_timeout),
    ],
)
def test_invalid_value_error_names_variable(
    name: str, value: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PREFECT_MLPROJECTS_{name}", value)
    with pytest.raises(ExecutionException, match=f"PREFECT_MLPROJECTS_{name} is '{value}'"):
        read()  # type: ignore[operator]  # the table's functions return different types
