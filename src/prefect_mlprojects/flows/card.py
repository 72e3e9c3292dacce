"""A run's card: the markdown artifact of its flow run."""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefect_mlprojects._support.known_secrets import redact_known
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects._support.text import span, split_url
from prefect_mlprojects.request.check import CheckedRun
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.tracking import TrackedRun, display_uri

_MAX_VALUE_CHARACTERS = 300
_MAX_COMMAND_CHARACTERS = 10_000
_MAX_METRICS = 100


@dataclass(frozen=True)
class MetricHistory:
    """The values of a metric, by step or by seconds since its first one."""

    name: str
    points: Sequence[tuple[float, float]]
    axis: Literal["step", "seconds"]

    @classmethod
    def of(cls, name: str, values: Sequence[tuple[int, int, float]]) -> MetricHistory | None:
        """Returns the history in values with their steps and times (in milliseconds); None for a single value."""
        if len(values) < 2:
            return None
        if len({step for step, _, _ in values}) > 1:
            return cls(name, [(step, value) for step, _, value in values], "step")
        first = min(time for _, time, _ in values)
        return cls(name, [((time - first) / 1000, value) for _, time, value in values], "seconds")


@dataclass(frozen=True)
class RunFacts:
    """What a card says of a run beside its request; empty as long as it is not known.

    Attributes:
        message: Why it did not finish.
        seconds: How long it took.
        experiment: The name of its MLflow experiment.
        history: That of its main metric, if it has several values.
    """

    status: str = "RUNNING"
    message: str = ""
    exit_code: int | None = None
    seconds: float | None = None
    command: str = ""
    environment: str = ""
    experiment: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: MetricHistory | None = None


def render(checked: CheckedRun, backend: str, tracked: TrackedRun, facts: RunFacts) -> str:
    """Returns the card's markdown."""
    copy, project, entry_point = (
        checked.backend_request.working_copy,
        checked.project.display_name,
        checked.entry_point.name,
    )
    parameters = {**checked.parameters.declared, **checked.parameters.extra}
    experiment = f"{code(facts.experiment)} (ID {tracked.experiment_id})" if facts.experiment else ""
    rows = {
        "Status": f"**{facts.status}**",
        "Duration": "" if facts.seconds is None else span(facts.seconds),
        "Exit code": "" if facts.exit_code is None else str(facts.exit_code),
        "Project": code(copy.source_name),
        "Version": _version(copy),
        "Entry point": code(entry_point),
        "Environment": escape(facts.environment) or "being prepared",
        "Backend": escape(backend),
        "MLflow run": _run_link(tracked),
        "MLflow experiment": experiment or code(tracked.experiment_id),
        "Tracking": code(display_uri(tracked.tracking_uri)),
    }
    sections = [f"# {escape(project)} / {escape(entry_point)}", _table(("", ""), {k: v for k, v in rows.items() if v})]
    if facts.message:
        sections.append(_fenced("Why it ended", facts.message))
    if facts.command:
        command = redact_known(facts.command)
        cut = "\n…" if len(command) > _MAX_COMMAND_CHARACTERS else ""
        sections.append(_fenced("Command", command[:_MAX_COMMAND_CHARACTERS] + cut))
    if values := {code(name): code(value) for name, value in parameters.items()}:
        sections.append("## Parameters\n\n" + _table(("Parameter", "Value"), values))
    if facts.metrics:
        shown = {code(name): f"{value:g}" for name, value in list(facts.metrics.items())[:_MAX_METRICS]}
        sections.append("## Metrics\n\n" + _table(("Metric", "Value"), shown))
    text = redact("\n\n".join(sections) + "\n")
    # After redaction, which might take its base64 text for a key.
    return f"{text}\n{_picture(facts.history)}\n" if facts.history is not None else text


def _run_link(tracked: TrackedRun) -> str:
    link = f"[{tracked.run_id}]({tracked.url})" if tracked.url else code(tracked.run_id)
    return f"{link} (served by {code(tracked.hint)})" if tracked.hint else link


def code(text: str) -> str:
    """Returns a text as inline markdown code on one line, which a table may contain."""
    text = text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "…"
    text = re.sub(r"\s", " ", text)
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    escaped = text.replace("|", "\\|")
    return f"{fence}{space}{escaped}{space}{fence}"


def escape(text: str) -> str:
    """Escapes markdown's special characters."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", text)


def _fenced(title: str, text: str) -> str:
    fence = _fence(text, 3)
    return f"## {title}\n\n{fence}text\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def _version(copy: WorkingCopy) -> str:
    if copy.commit is None:
        return "not under git"
    shown = f"`{copy.commit[:12]}`"
    link = commit_url(copy.repository_url, copy.commit)
    branch = f" of {code(copy.branch)}" if copy.branch else ""
    return (f"[{shown}]({link})" if link else shown) + branch + (" with uncommitted changes" if copy.dirty else "")


def commit_url(repository_url: str | None, commit: str) -> str | None:
    """Returns the web page of a commit on a known hosting service; None for other repositories."""
    text = repository_url or ""
    scp = re.match(r"^[^@/\s]+@([^:/\s]+):(.+)$", text)
    parts = split_url(text)
    host, path = (scp[1], scp[2]) if scp else (parts.hostname or "", parts.path)
    path = path.strip("/").removesuffix(".git")
    kinds = {"github.com": "commit", "codeberg.org": "commit", "gitlab.com": "-/commit", "bitbucket.org": "commits"}
    return f"https://{host}/{path}/{kinds[host]}/{commit}" if host in kinds and path else None


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


_WIDTH, _HEIGHT, _MARGIN = 640, 240, 64
_EDGE = 28  # above and below
_MAX_POINTS = 400


def _picture(history: MetricHistory) -> str:
    image = base64.b64encode(chart(history).encode()).decode()
    name = re.sub(r"[\[\]()\\`]", "_", history.name)
    return f"## {code(history.name)} by {history.axis}\n\n![{name}](data:image/svg+xml;base64,{image})"


def chart(history: MetricHistory) -> str:
    """Returns a line chart of a metric's history as SVG; values that are not numbers are gaps."""
    points = _thinned(sorted(history.points, key=lambda point: point[0]))
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    xs, ys = [x for x, _ in finite] or [0.0], [y for _, y in finite] or [0.0]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> str:
        right = _MARGIN + (x - low_x) / ((high_x - low_x) or 1) * (_WIDTH - 2 * _MARGIN)
        # Halves, because the difference of two huge numbers may be infinite.
        up = (y / 2 - low_y / 2) / ((high_y / 2 - low_y / 2) or 1) * (_HEIGHT - 2 * _EDGE)
        return f"{right:.1f},{_HEIGHT - _EDGE - up:.1f}"

    line = '<polyline fill="none" stroke="#2563eb" stroke-width="2" stroke-linecap="round" points="{}"/>'
    lines = [line.format(" ".join(part)) for part in _parts(points, place)]
    base, top, right = _HEIGHT - _EDGE, _EDGE, _WIDTH - _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#475569">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
        f'<path d="M{_MARGIN} {top}V{base}H{right}" fill="none" stroke="#94a3b8"/>{"".join(lines)}'
        f'<text x="{_MARGIN - 6}" y="{top + 8}" text-anchor="end">{high_y:.4g}</text>'
        f'<text x="{_MARGIN}" y="{base + 16}">{low_x:g}</text>'
        f'<text x="{_MARGIN - 6}" y="{base}" text-anchor="end">{low_y:.4g}</text>'
        f'<text x="{right}" y="{base + 16}" text-anchor="end">{history.axis} {high_x:g}</text></svg>'
    )


def _parts(points: Sequence[tuple[float, float]], place: Callable[[float, float], str]) -> Iterator[list[str]]:
    """Yields the places of consecutive finite points; a single one as a short line."""
    for finite, group in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            places = [place(x, y) for x, y in group]
            yield places if len(places) > 1 else places * 2


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most some hundred of the points, the last one too."""
    every = math.ceil(len(points) / _MAX_POINTS)
    return list(points) if every <= 1 else [*points[::every], points[-1]]
