"""Finds the run that a user names: by ID, by the beginning of one, by a link, by its name, or as the last one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote
from uuid import UUID

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import InvalidInputError
from prefect_mlprojects.request import FLOW_NAME, RUN_ID_LABEL
from prefect_mlprojects.runs.records import RunRecord
from prefect_mlprojects.server.rest import RestApi

LAST = "last"
"""The reference of the run that was started last."""

SHORT = 8
"""How many characters of an ID are shown where they are enough."""

_PAGE = 200  # the most that Prefect's server returns at once
_SHOWN = 10
_UUID = r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}"
_FLOW: Mapping[str, Any] = {"name": {"any_": [FLOW_NAME]}}


def find_run(reference: str, api: RestApi) -> RunRecord:
    """Returns the flow run that a reference names.

    It is a flow run's ID or a beginning of one, the address of its page in Prefect's UI, an MLflow run's ID or page, a flow
    run's name, or ``last``.

    Raises:
        InvalidInputError: It names no run, or several.
    """
    text, where = reference.strip(), f"on the Prefect server at {redact(api.api_url)}"
    if text == LAST:
        if newest := newest_runs(api, limit=1):
            return newest[0]
        raise InvalidInputError(f"No run found {where}: none was started yet.")
    for find in (_by_id, _by_mlflow_run, _by_prefix, _by_name):
        if found := find(text, api):
            return _only(found, text)
    raise InvalidInputError(f"No run {redact(text)!r} found {where}. `mlprojects runs` lists the latest ones.")


def newest_runs(
    api: RestApi,
    *,
    limit: int,
    matching: Mapping[str, Any] | None = None,
    accept: Callable[[RunRecord], bool] = lambda _: True,
    scheduled: bool = False,
) -> list[RunRecord]:
    """Returns the runs that were started last, the latest first.

    `matching` is a filter of Prefect's API, and `accept` one of this process, for which more runs are read as needed. Runs
    that a schedule will start are left out unless `scheduled`.
    """
    now = datetime.now(timezone.utc).isoformat()
    wanted = {**({} if scheduled else {"expected_start_time": {"before_": now}}), **(matching or {})}
    found: list[RunRecord] = []
    for record in _pages(api, {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_DESC"}, min(_PAGE, limit)):
        if len(found) == limit:
            break
        if accept(record):
            found.append(record)
    return found


def short_id(flow_run_id: str) -> str:
    """Returns a beginning of an ID that is most likely enough; the first digits of a UUID of version 7 are a time."""
    return flow_run_id[: SHORT if UUID(flow_run_id).version == 4 else 18]


def short_ids(records: list[RunRecord]) -> dict[str, str]:
    """Returns the beginning of each run's ID that tells it from the others."""
    ids = [record.id for record in records]
    length = next(
        (length for length in (SHORT, 13, 18, 23, 36) if len({each[:length] for each in ids}) == len(set(ids))), 36
    )
    return {each: each[:length] for each in ids}


def _pages(api: RestApi, query: Mapping[str, Any], size: int = _PAGE, offset: int = 0) -> Iterator[RunRecord]:
    while True:
        page = api.post("/flow_runs/filter", {"flows": _FLOW, **query, "limit": size, "offset": offset})
        yield from map(RunRecord.from_json, page)
        if len(page) < size:
            return
        offset += len(page)
        size = _PAGE


def _by_id(text: str, api: RestApi) -> list[RunRecord]:
    match = re.fullmatch(_UUID, text, re.IGNORECASE) or re.search(rf"flow-run/({_UUID})", text, re.IGNORECASE)
    if match is None:
        return []
    found = api.get(f"/flow_runs/{UUID(match[match.lastindex or 0])}")
    return [] if found is None else [RunRecord.from_json(found)]


def _by_mlflow_run(text: str, api: RestApi) -> list[RunRecord]:
    """Returns the flow run of an MLflow run; Prefect can't search labels, so the latest runs are read first."""
    match = re.fullmatch(r"[0-9a-f]{32}", text) or re.search(r"/runs/([0-9a-f]{32})\b", unquote(text))
    if match is None:
        return []
    run_id = match[match.lastindex or 0]
    every = _pages(api, {"sort": "EXPECTED_START_TIME_DESC"})
    # Several flow runs may have continued it.
    return next(([record] for record in every if record.labels.get(RUN_ID_LABEL) == run_id), [])


def _by_prefix(text: str, api: RestApi) -> list[RunRecord]:
    digits = text.lower().replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{1,31}", digits):
        return []
    padded = UUID(digits.ljust(32, "f"))
    # IDs are sorted, the largest first: bisection finds the first one that is not larger than any with this beginning.
    low, high = 0, int(api.post("/flow_runs/count", {"flows": _FLOW}))
    while high - low > _PAGE // 2:
        middle = (low + high) // 2
        at = next(_pages(api, {"sort": "ID_DESC"}, 1, middle), None)
        if at is not None and UUID(at.id) > padded:
            low = middle
        else:
            high = middle
    found: list[RunRecord] = []
    # Runs that were started in the meantime move the others.
    for record in _pages(api, {"sort": "ID_DESC"}, _PAGE, max(0, low - 20)):
        if record.id.replace("-", "").startswith(digits):
            found.append(record)
        elif UUID(record.id) < padded or len(found) > _SHOWN:
            break
    return found


def _by_name(text: str, api: RestApi) -> list[RunRecord]:
    wanted = {"name": {"any_": [text]}}
    return newest_runs(api, limit=_SHOWN + 1, matching=wanted)


def _only(found: list[RunRecord], text: str) -> RunRecord:
    if len(found) == 1:
        return found[0]
    lines = [
        f"  {each.id}  {each.name}  {each.status}  {each.created:%Y-%m-%d %H:%M:%S} UTC" for each in found[:_SHOWN]
    ]
    lines += ["  ..."] if len(found) > _SHOWN else []
    raise InvalidInputError("\n".join([f"{text!r} names several runs; give more of the ID:", *lines]))
