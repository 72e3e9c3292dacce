from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from prefect_mlprojects.environments.conda.solving import credentials_file, take_credentials


@pytest.mark.parametrize(
    ("url", "clean", "found"),
    [
        ("https://me:p%40ss@host:8/c", "https://host:8/c", {"BasicHTTP": {"username": "me", "password": "p@ss"}}),
        ("https://host/t/tk-1/c", "https://host/c", {"CondaToken": "tk-1"}),
        ("https://host/api/t/tk-1/c", "https://host/api/t/tk-1/c", None),
        ("https://me:pass@host/t/tk-1/c", "https://me:pass@host/t/tk-1/c", None),
        ("https://host/c", "https://host/c", None),
        ("file:///a/t/b", "file:///a/t/b", None),
    ],
)
def test_credentials_are_removed_from_channel_url(url: str, clean: str, found: object) -> None:
    access = take_credentials([url])
    assert access.url(url) == clean
    assert access.credentials == ({} if found is None else {"host": found})
    assert "pass" not in repr(access)
    assert "tk-1" not in repr(access)


def test_host_with_two_credentials_uses_the_first() -> None:
    one, other = "https://a:1@host/x", "https://b:2@host/y"
    access = take_credentials([one, other])
    assert (access.url(one), access.url(other)) == ("https://host/x", other)


def test_credentials_file_merges_with_user_file_and_is_deleted(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"elsewhere": {"BearerToken": "x"}}))
    environ = {"RATTLER_AUTH_FILE": str(own)}
    with credentials_file(take_credentials(["https://host/t/tk-1/c"]), environ) as name:
        assert name is not None
        file = Path(name)
        assert json.loads(file.read_text()) == {"elsewhere": {"BearerToken": "x"}, "host": {"CondaToken": "tk-1"}}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not file.exists()
    with credentials_file(take_credentials(["https://host/c"]), environ) as name:
        assert name == str(own)
    with credentials_file(take_credentials([]), {}) as name:
        assert name is None
