"""Records what a backend reports while it executes; an `ExecutionEvents`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.types import StreamName


@dataclass
class Recorder:
    """Keeps output (both streams together in `data`), progress lines, tags, links and adopted runs."""

    data: bytes = b""
    streams: dict[StreamName, bytes] = field(default_factory=lambda: {"stdout": b"", "stderr": b""})
    reports: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)
    adopted: list[tuple[str, Secret]] = field(default_factory=list)

    @property
    def stdout(self) -> str:
        return self.streams["stdout"].decode()

    @property
    def stderr(self) -> str:
        return self.streams["stderr"].decode()

    def write(self, stream: StreamName, data: bytes) -> None:
        self.data += data
        self.streams[stream] += data

    def report(self, line: str) -> None:
        self.reports.append(line)

    def tag(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def link(self, title: str, url: str) -> None:
        self.links.append((title, url))

    def adopt_run(self, run_id: str, tracking_uri: Secret) -> None:
        self.adopted.append((run_id, tracking_uri))
