from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import pytest

from prefect_mlprojects._support.known_secrets import KnownSecrets, OutputRedactor
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.secrets import Secret, Withheld

VALUE = 'p\'w/ "d"?#é<&'


@pytest.fixture
def known() -> Iterator[KnownSecrets]:
    with KnownSecrets() as secrets:
        yield secrets


@pytest.mark.parametrize(
    "spelling",
    [
        VALUE,
        quote(VALUE, safe=""),
        quote(VALUE),
        quote_plus(VALUE),
        json.dumps(VALUE)[1:-1],
        repr(VALUE)[1:-1],
    ],
)
def test_redact_known_secret_in_any_spelling_hides_it(known: KnownSecrets, spelling: str) -> None:
    known.add(Secret(VALUE))

    assert redact(f"before {spelling} after") == "before *** after"


@pytest.mark.parametrize("user", ["u", "me", "ci1", "someone"])
def test_redact_known_secret_in_basic_authentication_hides_it(known: KnownSecrets, user: str) -> None:
    known.add(Secret("correct-horse-battery"))
    header = base64.b64encode(f"{user}:correct-horse-battery".encode()).decode()

    shown = redact(f"sent {header}")

    assert "***" in shown
    assert base64.b64encode(b"horse-batt").decode()[4:-4] not in shown


def test_redact_after_the_run_knows_its_secrets_no_longer() -> None:
    with KnownSecrets() as known:
        known.add(Secret("hidden-value"))
        assert redact("a hidden-value") == "a ***"
    assert redact("a hidden-value") == "a hidden-value"


def test_known_secrets_of_a_url_are_its_password_only(known: KnownSecrets) -> None:
    known.add(Secret("http://mlflow.example.com"), Secret("postgresql://me:s3cr3t-pw@db/mlflow"))
    known.add(Secret("https://acme@dev.azure.com/acme/x"), Secret("https://0a1b2c3d4e5f@host/x"))

    text = "http://mlflow.example.com, db, me, acme, s3cr3t-pw, 0a1b2c3d4e5f"
    assert redact(text) == "http://mlflow.example.com, db, me, acme, ***, ***"


def test_redact_short_known_secret_leaves_words_that_contain_it(known: KnownSecrets) -> None:
    known.add(Secret("zeta"), Secret("ab"), Secret("mlflow"), Withheld("staging-value"))

    assert redact("zeta: zetas ab mlflow staging-value") == "***: zetas ab mlflow staging-value"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_output_redactor_hides_a_secret_that_is_cut_anywhere(known: KnownSecrets, size: int) -> None:
    known.add(Secret("hidden-value"), Secret("zeta"))
    data = b"start hidden-valu hidden-value\xff hihidden-value zeta zetas h\r\nend hidden"
    redactor = OutputRedactor()

    pieces = [redactor.feed(data[start : start + size]) for start in range(0, len(data), size)]

    assert b"".join([*pieces, redactor.close()]) == b"start hidden-valu ***\xff hi*** *** zetas h\r\nend hidden"


def test_output_redactor_of_a_line_without_a_secret_holds_nothing_back(known: KnownSecrets) -> None:
    known.add(Secret("hidden-value"))

    assert OutputRedactor().feed(b"a line\n") == b"a line\n"
    assert OutputRedactor().feed(b"50 %\r") == b"50 %\r"
