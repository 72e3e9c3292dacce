"""Tags of flow runs and of MLflow runs."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_mlprojects._support.known_secrets import KnownSecrets
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.exceptions import ParameterError
from prefect_mlprojects.request.tags import automatic_tags, checked_tags, mlflow_tags, user_tags


@pytest.mark.parametrize(
    ("given", "tags"),
    [
        ((), ()),
        (["nightly", "team=vision", "nightly"], ("nightly", "team=vision")),
        ([" padded ", "note=a b = c"], ("padded", "note=a b = c")),
        (["source=https://u:s3cret-word@host/p"], ("source=https://u:***@host/p",)),
    ],
)
def test_tags_given_are_returned_once_without_secrets(given: Any, tags: tuple[str, ...]) -> None:
    assert checked_tags(given) == tags


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nightly", r"a list of texts, not 'nightly'"),
        (5, "a list of texts, not 5"),
        ([5], "must be a text, not 5"),
        ([""], "'' is not a tag"),
        (["=value"], "'=value' is not a tag"),
        (["two\nlines"], "is not a tag"),
    ],
)
def test_tags_of_other_forms_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        checked_tags(given)


def test_mlflow_tags_lack_those_that_every_run_has() -> None:
    automatic = automatic_tags("wine", "train", "kubernetes")
    tags = ["nightly", "auto-scheduled", "team=vision=2", *automatic]

    assert automatic == ("project:wine", "entry-point:train", "backend:kubernetes")
    assert user_tags(tags) == ["nightly", "team=vision=2"]
    assert mlflow_tags(tags) == {"nightly": "true", "team": "vision=2"}


def test_mlflow_tags_of_prefects_ui_lack_known_secrets() -> None:
    with KnownSecrets() as known:
        known.add(Secret("hunter2-hunter2"))

        assert mlflow_tags(["note=hunter2-hunter2"]) == {"note": "***"}
