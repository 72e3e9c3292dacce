from __future__ import annotations

import pytest

from prefect_mlprojects._support.redaction import holds_secret, redact, strip_user_info, url_secrets
from prefect_mlprojects._support.secrets import Secret, reveal


@pytest.mark.parametrize(
    ("uri", "masked"),
    [
        ("https://user:s3cret@host/path", "https://user:***@host/path"),
        ("https://ghp_abcdef@github.com/o/r", "https://***@github.com/o/r"),
        ("git+https://oauth2:tok@host/r#sub", "git+https://oauth2:***@host/r#sub"),
        ("ssh://git@host/r", "ssh://git@host/r"),
        ("git+ssh://git@host/r", "git+ssh://git@host/r"),
        ("ssh://git:pw@host/r", "ssh://git:***@host/r"),
        ("git@host:o/r", "git@host:o/r"),
        ("postgresql+psycopg2://me:p@ss@db:5432/mlflow", "postgresql+psycopg2://me:***@db:5432/mlflow"),
        ("https://:token@host/", "https://:***@host/"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host/x?access_token=abc&y=1", "https://host/x?access_token=***&y=1"),
        ("s3://b/k?X-Amz-Signature=ff00&X-Amz-Credential=AK%2F1", "s3://b/k?X-Amz-Signature=***&X-Amz-Credential=***"),
        ("https://acc.blob.example/c?sv=1&sig=qqq%3D", "https://acc.blob.example/c?sv=1&sig=***"),
        ("/home/me/a@b:c", "/home/me/a@b:c"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("", ""),
    ],
)
def test_redact_uri_hides_secrets_only(uri: str, masked: str) -> None:
    assert redact(uri) == masked


def test_redact_text_covers_every_uri() -> None:
    text = "could not reach 'http://a:one@h/x' nor \"https://b:two@h/y\"; see https://docs.example/page."

    masked = redact(text)

    assert masked == "could not reach 'http://a:***@h/x' nor \"https://b:***@h/y\"; see https://docs.example/page."


def test_redaction_is_idempotent() -> None:
    once = redact("https://user:pw@host/x?token=abc")

    assert redact(once) == once


@pytest.mark.parametrize(
    ("url", "stripped"),
    [
        ("https://user:tok@host/o/r.git", "https://host/o/r.git"),
        ("https://tok@host:8443/o/r.git", "https://host:8443/o/r.git"),
        ("ssh://git@host/o/r.git", "ssh://host/o/r.git"),
        ("git@host:o/r.git", "git@host:o/r.git"),
        ("https://host/o/r.git", "https://host/o/r.git"),
        ("../elsewhere", "../elsewhere"),
        ("https://[broken/o@r", "https://[broken/o@r"),
    ],
)
def test_credentials_are_stripped_from_a_repository_url_as_mlflow_strips_them(url: str, stripped: str) -> None:
    from mlflow.utils import git_utils

    assert strip_user_info(url) == stripped
    # MLflow 3.13 has no such function.
    if "[" not in url and (strip := getattr(git_utils, "_strip_credentials_from_url", None)):
        assert strip(url) == stripped


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://u:p%40ss@h/x", ["p%40ss", "p@ss"]),
        ("https://ghp_tok@h/x?token=abc", ["ghp_tok", "abc"]),
        ("ssh://git@h/x", []),
        ("https://u:***@h/x", []),
        ("/plain/path", []),
    ],
)
def test_url_secrets_are_found(url: str, found: list[str]) -> None:
    assert [reveal(each) for each in url_secrets(url)] == found
    assert holds_secret(url) == bool(found)


def test_redact_known_secret_hides_every_occurrence() -> None:
    text = redact("login me:p@ssw0rd, quoted p%40ssw0rd, line-two", Secret("p@ssw0rd"), Secret("line-one\nline-two"))
    assert text == "login me:***, quoted ***, ***"
    assert redact("connect to h as u with hidden-pw", Secret("postgresql://u:hidden-pw@h/db")) == (
        "connect to h as u with ***"
    )
