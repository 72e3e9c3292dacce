"""The card of a run."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.flows.card import MetricHistory, RunFacts, chart, commit_url, render
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.check import CheckedRun, RunContext, check_request
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackedRun

TRACKED = TrackedRun(
    "abc123", "7", Secret("http://localhost:5000"), "http://localhost:5000/#/experiments/7/runs/abc123"
)


@pytest.fixture
def checked(tmp_path: Path) -> CheckedRun:
    (tmp_path / "MLproject").write_text("name: wine\nentry_points: {main: {command: 'python train.py'}}\n")
    copy = WorkingCopy(directory=tmp_path, uri=str(tmp_path), kind="local", source_name=str(tmp_path))
    return check_request(RunRequest(str(tmp_path), parameters={"lr": "0.1"}, env_manager="local"), copy, RunContext())


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, point.split(","))) for point in each.attrib["points"].split()] for each in lines]  # type: ignore[misc]


def test_card_of_finished_run_has_its_facts_and_picture(checked: CheckedRun) -> None:
    history = MetricHistory.of("val_loss", [(0, 10, 2.0), (1, 20, 1.0)])
    facts = RunFacts("FINISHED", "", 0, 83.4, "python train.py --lr 0.1", "uv", "wines", {"val_loss": 1.0}, history)
    card = render(checked, "local", TRACKED, facts)

    assert "| Duration | 1m23s |" in card
    assert "| Exit code | 0 |" in card
    assert "| MLflow experiment | `wines` (ID 7) |" in card
    assert "## Command\n\n```text\npython train.py --lr 0.1\n```" in card
    image = re.search(r"!\[val_loss\]\(data:image/svg\+xml;base64,([^)]+)\)", card)
    assert image is not None
    assert len(polylines(base64.b64decode(image[1]).decode())) == 1


def test_card_of_active_run_lacks_what_is_not_known(checked: CheckedRun) -> None:
    card = render(checked, "local", TRACKED, RunFacts())

    assert "| MLflow experiment | `7` |" in card
    assert not any(word in card for word in ("Duration", "Exit code", "Command", "data:image"))


def test_card_of_failed_run_has_secrets_redacted(checked: CheckedRun) -> None:
    facts = RunFacts("FAILED", "exit code 3", 3, 1.0, "curl https://u:s3cret-word@host/ && echo '```'")
    card = render(checked, "local", TRACKED, facts)

    assert "s3cret-word" not in card
    assert "````text\ncurl https://u:***@host/" in card
    assert "## Why it ended" in card


def test_chart_of_values_spans_the_axes_with_gaps_for_nan() -> None:
    values = [(step, step * 1000, math.nan if step == 2 else float(step)) for step in range(5)]
    history = MetricHistory.of("loss", values)
    assert history is not None
    first, second = polylines(chart(history))

    assert (len(first), len(second)) == (2, 2)
    (left, bottom), (right, top) = first[0], second[-1]
    assert left < right
    assert bottom > top


@pytest.mark.parametrize("values", [[math.nan, math.inf], [1.0, 1.0], [-1e308, 1e308], [0.0, 5e-324]])
def test_chart_of_extreme_values_stays_in_its_frame(values: list[float]) -> None:
    history = MetricHistory.of("x", [(index, index, value) for index, value in enumerate(values)])
    assert history is not None

    assert all(0 <= x <= 640 and 0 <= y <= 240 for line in polylines(chart(history)) for x, y in line)


def test_chart_of_many_values_is_small_and_keeps_the_last() -> None:
    history = MetricHistory.of("x", [(step, step, float(step)) for step in range(100_001)])
    assert history is not None
    svg = chart(history)

    assert len(svg) < 10_000
    assert polylines(svg)[0][-1] == (576.0, 28.0)


def test_history_without_steps_is_by_time() -> None:
    history = MetricHistory.of("x", [(0, 5000, 1.0), (0, 6500, 2.0)])
    assert history is not None

    assert (history.axis, list(history.points)) == ("seconds", [(0.0, 1.0), (1.5, 2.0)])
    assert MetricHistory.of("x", [(0, 5000, 1.0)]) is None


def test_commit_url_of_ssh_repository_is_its_web_page() -> None:
    assert commit_url("git@github.com:o/r.git", "abc") == "https://github.com/o/r/commit/abc"
