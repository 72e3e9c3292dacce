"""Runs deployments in one process, without a work pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefect_mlprojects.deployments.creation import prefect_schedules
from prefect_mlprojects.deployments.specification import DeploymentSpecification
from prefect_mlprojects.server.api import call_api, use_api


def serve(
    specifications: Sequence[DeploymentSpecification],
    *,
    limit: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Makes deployments and runs what is asked of them, until the process is told to end.

    Args:
        specifications: The deployments, as ``specify`` made them.
        limit: How many runs may be under way at once; None for Prefect's default.
        announce: Takes lines about a server that is being started; None prints them to stderr.

    Raises:
        PrefectServerError: The Prefect server can't be reached.
    """
    from prefect_mlprojects.server.process import resolve_api

    address = resolve_api(announce)
    from prefect import serve as serve_deployments

    from prefect_mlprojects.deployments.zombies import ensure_zombie_automation

    call_api(address.api_url, ensure_zombie_automation)
    with use_api(address.api_url):
        serve_deployments(*[_runner_deployment(each) for each in specifications], limit=limit)


def _runner_deployment(specification: DeploymentSpecification) -> Any:
    from prefect.types.entrypoint import EntrypointType

    from prefect_mlprojects.flows.run_project import run_project
    from prefect_mlprojects.server.compat import set_parameter_schema

    deployment: Any = run_project.to_deployment(
        name=specification.name,
        schedules=prefect_schedules(specification) or None,
        paused=specification.paused,
        concurrency_limit=specification.concurrency_limit,
        parameters=specification.flow_parameters(),
        description=specification.description,
        tags=list(specification.tags),
        version=specification.version,
        enforce_parameter_schema=True,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    set_parameter_schema(deployment, specification.schema)
    return deployment
