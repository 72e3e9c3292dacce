"""Checks a deployment's run in its own process: against the deployment's form and the worker's policy."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun

from prefect_mlprojects.exceptions import ParameterError, Problem
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.policy import Policy, find_policies
from prefect_mlprojects.server.compat import schema_errors
from prefect_mlprojects.settings import limit_sources


async def check_form(client: Any, flow_run: FlowRun) -> None:
    """Checks the parameters of a deployment's run against the deployment's form.

    Prefect's server does that too, unless whoever starts the run tells it not to (``enforce_parameter_schema``).

    Raises:
        ParameterError: The form does not allow them.
    """
    if flow_run.deployment_id is None:
        return
    deployment = await client.read_deployment(flow_run.deployment_id)
    schema = deployment.parameter_openapi_schema or {}
    if schema.get("additionalProperties") is not False:
        # A form of an older version, or one that Prefect derived from the flow's signature, excludes nothing.
        return
    if errors := schema_errors(flow_run.parameters, schema):
        raise ParameterError(
            f"The form of the deployment '{deployment.name}' does not allow this run",
            [Problem(error) for error in errors],
        )


def apply_policies(request: RunRequest) -> tuple[Policy, ...]:
    """Checks a worker's run against its policies as far as is possible before the project is fetched, and returns them.

    Raises:
        ParameterError: A policy does not allow it.
        InvalidInputError: A policy can't be read.
    """
    policies = find_policies()
    for policy in policies:
        policy.check_backend(request)
        if policy.rules.sources is not None:
            limit_sources(policy.rules.sources)
    return policies
