"""How a handle shows its run: one line in a terminal, a table in a notebook, which follows the run until it has ended.

Nothing here raises, and IPython is used only where it is imported already.
"""

from __future__ import annotations

import contextvars
import html
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_mlprojects._support.redaction import redact

_COLORS = {"RUNNING": "#0b7285", "FINISHED": "#2b8a3e", "FAILED": "#c92a2a", "KILLED": "#e67700"}
_MAX_ENTRIES = 20
_MAX_CHARACTERS = 200
_REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class RunView:
    """What is shown of a run.

    Attributes:
        status: Its status, and Prefect's state where that says more.
        message: Why it did not finish; empty for a run that did.
        url: The flow run's page.
        run_url: The MLflow run's page.
        live: Whether it may still change.
    """

    flow_run_id: str
    status: str
    name: str = ""
    message: str = ""
    seconds: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    url: str | None = None
    run_id: str | None = None
    run_url: str | None = None
    live: bool = False

    def as_text(self, kind: str) -> str:
        """Returns one line; `kind` is the handle's class."""
        parts = [kind, self.name or self.flow_run_id, self.status]
        parts += [f"{name}={_short(value, 40)}" for name, value in _first(self.parameters, 5)]
        parts += [f"{name}={value:.4g}" for name, value in _first(self.metrics, 5)]
        return f"<{' '.join([*parts, self.url or self.flow_run_id])}>"

    def as_html(self) -> str:
        """Returns a table; every value is escaped."""
        color = _COLORS.get(self.status.partition(" ")[0], "inherit")
        elapsed = "" if self.seconds is None else f" &nbsp;{self.seconds:.0f} s"
        title = f'<b style="color:{color}">{_escaped(self.status)}</b> &nbsp;<b>{_escaped(self.name)}</b>{elapsed}'
        rows = {
            "Why": f"<pre>{_escaped(self.message)}</pre>" if self.message else "",
            "Parameters": _entries({name: _short(value) for name, value in self.parameters.items()}),
            "Metrics": _entries({name: f"{value:.6g}" for name, value in self.metrics.items()}),
            "Prefect": _link(self.url, self.flow_run_id),
            "MLflow": _link(self.run_url, self.run_id or ""),
        }
        cells = "".join(
            f'<tr><td style="text-align:left;vertical-align:top">{name}</td><td style="text-align:left">{value}</td></tr>'
            for name, value in rows.items()
            if value
        )
        return f"<div>{title}<table>{cells}</table></div>"


def _first(entries: Mapping[str, Any], count: int) -> list[tuple[str, Any]]:
    return list(entries.items())[:count]


def _short(value: Any, most: int = _MAX_CHARACTERS) -> str:
    text = redact(str(value))
    text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= most else f"{text[:most]}…"


def _escaped(text: str) -> str:
    return html.escape(redact(text))


def _entries(entries: Mapping[str, str]) -> str:
    lines = [f"<code>{_escaped(name)} = {_escaped(value)}</code>" for name, value in _first(entries, _MAX_ENTRIES)]
    more = len(entries) - _MAX_ENTRIES
    return "<br>".join([*lines, *([f"and {more} more"] if more > 0 else [])])


def _link(url: str | None, text: str) -> str:
    if url is None or not url.startswith(("http://", "https://")):
        return f"<code>{_escaped(text)}</code>" if text else ""
    return f'<a href="{_escaped(url)}" target="_blank" rel="noopener">{_escaped(text)}</a>'


def display_live(read: Callable[[], RunView], kind: str) -> None:
    """Displays a run in a notebook, and updates the display until the run has ended.

    Raises:
        NotImplementedError: This is no notebook; IPython then takes the other representations.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # Terminals have a shell without a kernel.
    if shell is None or getattr(shell, "kernel", None) is None:
        raise NotImplementedError
    from importlib import import_module

    view = read()
    handle = import_module("IPython.display").display(_bundle(view, kind), raw=True, display_id=True)
    if view.live and handle is not None:
        # Without the context of this cell the kernel sends updates as part of the cell that executes then: programs that execute
        # notebooks (nbclient) ignore messages of earlier cells. The display is found by its ID in any case.
        context = contextvars.Context()
        name = f"display of run {view.flow_run_id}"
        threading.Thread(target=context.run, args=(_follow, handle, read, kind), name=name, daemon=True).start()


def _follow(handle: Any, read: Callable[[], RunView], kind: str) -> None:
    shown: Mapping[str, str] = {}
    while True:
        view = read()
        bundle = _bundle(view, kind)
        try:
            if bundle != shown:
                handle.update(bundle, raw=True)
        except Exception:  # noqa: BLE001 - the kernel is shutting down
            return
        if not view.live:
            return
        shown = bundle
        time.sleep(_REFRESH_SECONDS)


def _bundle(view: RunView, kind: str) -> dict[str, str]:
    return {"text/html": view.as_html(), "text/plain": view.as_text(kind)}
