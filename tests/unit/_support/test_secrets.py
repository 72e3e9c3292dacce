from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic_core import PydanticSerializationError

from prefect_mlprojects._support.secrets import (
    Secret,
    has_secret,
    reveal,
    reveal_all,
    reveal_values,
    secrets_in,
    storable,
    without_secrets,
)

MARKER = "s3cr3t-marker"


class Login(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    user: str
    password: Secret | None = None


def test_secret_is_hidden_in_text() -> None:
    secret = Secret(MARKER)
    shown = [repr(secret), str(secret), f"{secret}", f"{[secret]}", f"{secret!r:>30}"]
    assert not any(MARKER in each for each in shown)
    assert reveal(secret) == MARKER
    assert secret == Secret(MARKER) != Secret("other")
    assert hash(secret) == hash(Secret(MARKER))
    assert secret
    assert not Secret("")


def test_secret_refuses_pickle_and_json() -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(Secret(MARKER))
    with pytest.raises(TypeError):
        json.dumps({"a": Secret(MARKER)})


@pytest.mark.parametrize("given", [MARKER, SecretStr(MARKER), Secret(MARKER)])
def test_model_accepts_secret_and_refuses_to_serialise_it(given: Any) -> None:
    login = Login(user="me", password=given)
    assert login.password == Secret(MARKER)
    assert MARKER not in repr(login)
    assert login.model_dump()["password"] == Secret(MARKER)
    with pytest.raises(PydanticSerializationError):
        login.model_dump_json()
    with pytest.raises(PydanticSerializationError):
        login.model_dump(mode="json")


def test_model_error_does_not_quote_secret() -> None:
    with pytest.raises(ValidationError) as error:
        Login.model_validate({"user": "me", "password": [MARKER]})
    assert MARKER not in str(error.value)


def test_model_without_secret_is_serialised() -> None:
    assert json.loads(Login(user="me").model_dump_json()) == {"user": "me", "password": None}
    assert Login.model_json_schema()["properties"]["password"]["anyOf"][0]["format"] == "password"


def test_nested_secrets_are_found_revealed_and_redacted() -> None:
    value = {"a": [1, {"b": Secret(MARKER)}], "c": "open", "d": (SecretStr("other"),)}
    assert has_secret(value)
    assert secrets_in(value) == [Secret(MARKER), Secret("other")]
    assert reveal_all(value) == {"a": [1, {"b": MARKER}], "c": "open", "d": ["other"]}
    assert without_secrets(value) == {"a": [1, {"b": "***"}], "c": "open", "d": ["***"]}
    assert has_secret(Login(user="me", password=Secret("x")))
    assert secrets_in(Login(user="me", password=Secret("x"))) == [Secret("x")]
    assert not has_secret(Login(user="me"))
    assert not has_secret({"a": [1, "b", None], "e": Secret("")})
    assert reveal_values({"A": Secret("1"), "B": "2"}) == {"A": "1", "B": "2"}


def test_storable_values_are_plain_data() -> None:
    assert storable({"a": [1, 2.5, None, True, ("x",)], "p": Path("/d")}) == {
        "a": [1, 2.5, None, True, ["x"]],
        "p": "/d",
    }


@pytest.mark.parametrize("value", [Secret(MARKER), {"a": [Secret(MARKER)]}, {"a": SecretStr(MARKER)}, {"a": object()}])
def test_storable_refuses_a_secret(value: Any) -> None:
    with pytest.raises(TypeError, match="can't be stored") as error:
        storable(value, "backend_config")
    assert "backend_config" in str(error.value)
    assert MARKER not in str(error.value)
