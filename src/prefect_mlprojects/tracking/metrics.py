"""Which of a run's metrics stands for it where only one is shown."""

from __future__ import annotations

from collections.abc import Mapping

_HELD_OUT = ("val", "valid", "validation", "test", "eval")


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """Returns name and value of the metric that stands for a run, one of held-out data if any; None without metrics."""
    own = sorted(name for name in metrics if not name.startswith("system/"))
    held_out = [name for name in own if name.lower().replace("-", "_").replace("/", "_").split("_")[0] in _HELD_OUT]
    chosen = next(iter(held_out or own), None)
    return None if chosen is None else (chosen, metrics[chosen])
