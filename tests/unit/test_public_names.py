"""The names that the package root exports."""

from __future__ import annotations

import pytest

import prefect_mlprojects


@pytest.mark.parametrize("name", prefect_mlprojects.__all__)
def test_public_name_is_importable(name: str) -> None:
    assert getattr(prefect_mlprojects, name) is not None


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        prefect_mlprojects.nothing  # noqa: B018 - looking it up is the test
