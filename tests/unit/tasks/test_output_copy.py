"""The copy of a run's output for the MLflow run."""

from __future__ import annotations

import pytest

from prefect_mlprojects.tasks.output_copy import OutputCopy


def test_short_output_is_whole_and_in_order() -> None:
    copy = OutputCopy(1000)
    copy.write("stdout", b"one\n")
    copy.write("stderr", "zwei ü\n".encode())
    copy.write("stdout", b"\xff\n")
    assert copy.text() == "one\nzwei ü\n\\xff\n"


@pytest.mark.parametrize("size", [1, 7, 100, 250])
def test_long_output_keeps_its_end_and_says_how_much_is_missing(size: int) -> None:
    whole = b"".join(b"%05d\n" % number for number in range(200))
    copy = OutputCopy(100)
    for start in range(0, len(whole), size):
        copy.write("stdout", whole[start : start + size])
    first, _, rest = copy.text().partition("\n")
    assert whole.decode().endswith(rest)
    assert first == f"[{len(whole) - len(rest)} bytes before this are left out]"
    assert len(rest) == 100


def test_copy_that_is_switched_off_keeps_nothing() -> None:
    copy = OutputCopy(0)
    copy.write("stdout", b"one\n")
    assert copy.text() == ""


def test_secrets_are_redacted() -> None:
    copy = OutputCopy(1000)
    copy.write("stdout", b"postgresql://me:hunter2secret@host/db\n")
    assert "hunter2secret" not in copy.text()
